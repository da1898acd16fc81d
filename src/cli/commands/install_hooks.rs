use crate::api::types::{Finding, Level};
use crate::cli::context::{self, Context};
use crate::cli::report::{ExitStatus, Report};
use crate::git::{self, HookState, Installation, Location};

const EXAMPLES: &str = "\
Examples:
  dbranch install-hooks
  DBRANCH_SKIP=1 git checkout main     one checkout without them";

/// Let git's checkout switch the database
///
/// Hooks that are there stay in force. A second run changes nothing, and all worktrees share
/// one installation.
#[derive(Debug, clap::Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct Args {}

pub(crate) fn run(cx: &Context, _: &Args) -> Result<ExitStatus, Report> {
    let location = cx.location()?;
    let program = std::env::current_exe().ok();
    let installed = git::install(&location, program.as_deref())?;
    let did = match installed.installation {
        Installation::Created => "created",
        Installation::Added => "added",
        Installation::Chained => "chained",
        Installation::Updated => "updated",
        Installation::Unchanged => "unchanged",
    };
    if cx.ui.json {
        cx.ui.answer_json(&serde_json::json!({
            "path": installed.path,
            "installation": did,
            "is_active": installed.is_active,
            "manager": installed.manager,
        }))?;
    }
    let path = installed.path.display();
    cx.ui.status(match installed.installation {
        Installation::Created => format!("installed the hook {path}"),
        Installation::Added => format!("added dbranch's lines to the hook {path}"),
        Installation::Chained => {
            format!("installed the hook {path}; the one that was there runs after it")
        }
        Installation::Updated => format!("renewed dbranch's lines in the hook {path}"),
        Installation::Unchanged => format!("the hook {path} is installed already"),
    });
    if !installed.is_active {
        cx.ui.warn(format_args!(
            "git does not run it: the file is not executable"
        ));
        cx.ui
            .hint(format_args!("make it executable with `chmod +x {path}`"));
    }
    if let Some(manager) = installed.manager {
        cx.ui.warn(format_args!(
            "{manager} writes this file too and may overwrite it; then run `dbranch install-hooks` again"
        ));
    }
    if !context::is_marked(&location) {
        cx.ui
            .hint("hooks do nothing until this repository is a project: `dbranch init`");
    }
    Ok(ExitStatus::Done)
}

/// How the hook stands, for `doctor` and `init`.
pub(super) fn finding(location: &Location) -> Finding {
    let install = || Some("install it with `dbranch install-hooks`".to_owned());
    let (level, detail, fix) = match git::status(location) {
        Ok(status) => {
            let path = status.path.display();
            match status.state {
                HookState::Active => (Level::Ok, format!("{path}"), None),
                HookState::Absent => (
                    Level::Warning,
                    "git's hook is not installed".into(),
                    install(),
                ),
                HookState::Foreign => (
                    Level::Warning,
                    format!("{path} is there without dbranch's lines"),
                    install(),
                ),
                HookState::Inactive => (
                    Level::Warning,
                    format!("git does not run {path}: it is not executable"),
                    Some(format!("chmod +x {path}")),
                ),
            }
        }
        Err(e) => return super::doctor::finding_of("git hooks", e.into()),
    };
    Finding {
        what: "git hooks".into(),
        level,
        detail,
        fix,
    }
}
