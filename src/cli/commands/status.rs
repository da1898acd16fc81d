use crate::api::types::{Request, StatusInfo};
use crate::cli::context::{Context, VERSION};
use crate::cli::render;
use crate::cli::report::{ExitStatus, Report};
use crate::cli::ui::{Tone, Ui};

use super::state;

const EXAMPLES: &str = "\
Examples:
  dbranch status
  dbranch status --json | jq -r .branch";

/// Tell which branch the URL shows here, and how things stand
#[derive(Debug, clap::Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct Args {}

pub(crate) fn run(cx: &Context, _: &Args) -> Result<ExitStatus, Report> {
    cx.answer(
        &Request::Status { at: cx.at()? },
        |ui, status: &StatusInfo| {
            for line in render::fields(&fields(ui, status)) {
                ui.answer(line)?;
            }
            for note in &status.notes {
                ui.status(format_args!("note: {note}"));
            }
            if status.branch.is_none() {
                ui.hint("make the first branch with `dbranch init-postgres`");
            }
            Ok(())
        },
    )?;
    Ok(ExitStatus::Done)
}

fn fields(ui: Ui, status: &StatusInfo) -> Vec<(&'static str, String)> {
    let mut fields = vec![("project", status.project.clone())];
    let branch = match (&status.branch, status.state) {
        (Some(branch), Some(s)) => format!(
            "{} ({})",
            ui.paint(Tone::Strong, branch.as_str()),
            state(ui, s)
        ),
        (Some(branch), None) => branch.to_string(),
        (None, _) => "none yet".into(),
    };
    fields.push(("branch", branch));
    let git = status
        .git_branch
        .clone()
        .unwrap_or_else(|| "HEAD is detached".into());
    fields.push(("git", git));
    if let Some(worktree) = &status.worktree {
        fields.push(("worktree", worktree.display().to_string()));
    }
    fields.push(("port", status.proxy_port.to_string()));
    fields.push((
        "branches",
        format!("{} ({} running)", status.branches, status.running),
    ));
    fields.push(("sessions", status.sessions.to_string()));
    if let (Some(storage), Some(runtime)) = (&status.storage, &status.runtime) {
        fields.push(("made by", format!("{storage} storage, {runtime} runtime")));
    }
    let daemon = &status.daemon;
    let other = if daemon.version == VERSION {
        ""
    } else {
        ", not this program's version"
    };
    fields.push((
        "daemon",
        format!("pid {}, version {}{other}", daemon.pid, daemon.version),
    ));
    fields
}
