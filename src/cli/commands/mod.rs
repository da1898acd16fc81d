//! One file a command: its arguments, whose comments are the help, and `run`.

pub(super) mod allow;
pub(super) mod completions;
pub(super) mod create;
pub(super) mod delete;
pub(super) mod delete_project;
pub(super) mod demo;
pub(super) mod doctor;
pub(super) mod env;
pub(super) mod forget;
pub(super) mod hook;
pub(super) mod init;
pub(super) mod init_postgres;
pub(super) mod install_hooks;
pub(super) mod list;
pub(super) mod logs;
pub(super) mod psql;
pub(super) mod resume;
pub(super) mod show;
pub(super) mod shutdown;
pub(super) mod start;
pub(super) mod status;
pub(super) mod stop;
pub(super) mod storage;
pub(super) mod sync;
pub(super) mod undelete;
pub(super) mod uninstall_hooks;
pub(super) mod url;
pub(super) mod usage;
pub(super) mod r#use;

use super::render;
use crate::api::types::{BranchInfo, BranchState, Created};
use crate::cli::ui::{Tone, Ui};

/// `btrfs snapshot, 12 ms`: how a branch was made.
fn how(created: &Created) -> String {
    format!(
        "{}, {}",
        created.method,
        render::millis(created.duration_ms)
    )
}

fn state_word(state: BranchState) -> &'static str {
    match state {
        BranchState::Creating => "creating",
        BranchState::Running => "running",
        BranchState::Stopped => "stopped",
        BranchState::Failed => "failed",
    }
}

/// A state, in its colour.
fn state(ui: Ui, state: BranchState) -> String {
    let tone = match state {
        BranchState::Running => Tone::Good,
        BranchState::Failed => Tone::Bad,
        BranchState::Creating => Tone::Warning,
        BranchState::Stopped => Tone::Faint,
    };
    ui.paint(tone, state_word(state))
}

/// `feature/x (stopped)` for status lines.
fn named_state(branch: &BranchInfo) -> String {
    format!("`{}` is {}", branch.name, state_word(branch.state))
}
