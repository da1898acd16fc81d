use crate::api::types::{BranchInfo, ProjectDeleted, Request};
use crate::cli::context::Context;
use crate::cli::render;
use crate::cli::report::{ExitStatus, Report};

const EXAMPLES: &str = "\
Examples:
  dbranch delete-project              its branches go to the trash
  dbranch delete-project --now --yes  all is destroyed at once";

/// Forget this project and delete all of its branches
///
/// The repository and its config file stay.
#[derive(Debug, clap::Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct Args {
    /// Destroy the branches at once, past the trash
    #[arg(long)]
    now: bool,
    /// Don't ask
    #[arg(long, short)]
    yes: bool,
}

pub(crate) fn run(cx: &Context, args: &Args) -> Result<ExitStatus, Report> {
    let at = cx.at()?;
    if !args.yes {
        let branches: Vec<BranchInfo> = cx.call_as(&Request::List {
            at: at.clone(),
            trash: false,
        })?;
        let names: Vec<String> = branches.iter().map(|b| format!("`{}`", b.name)).collect();
        let branches = match names.len() {
            0 => "this project, which has no branches".to_owned(),
            n => format!(
                "{} ({})",
                render::count(n, "database branch", "database branches"),
                names.join(", ")
            ),
        };
        let consequence = if args.now {
            format!("this destroys {branches} for good, and what is in the trash")
        } else {
            format!("this forgets the project and moves to the trash {branches}")
        };
        cx.ui.confirm(&consequence, false)?;
    }
    cx.answer(
        &Request::DeleteProject { at, now: args.now },
        |ui, deleted: &ProjectDeleted| {
            let branches = render::count(deleted.branches.len(), "branch", "branches");
            let done = if deleted.destroyed {
                format!("destroyed {branches}")
            } else {
                format!("{branches} moved to the trash")
            };
            ui.status(format_args!("forgot project `{}` ({done})", deleted.name));
            ui.hint("git's hooks stay until `dbranch uninstall-hooks`");
            Ok(())
        },
    )?;
    Ok(ExitStatus::Done)
}
