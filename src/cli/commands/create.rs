use clap_complete::ArgValueCompleter;

use super::how;
use crate::api::types::{Created, Request};
use crate::cli::complete;
use crate::cli::context::Context;
use crate::cli::report::{ExitStatus, Report};
use crate::types::BranchName;

const EXAMPLES: &str = "\
Examples:
  dbranch create try-index               a copy of the active branch
  dbranch create hotfix --from main      a copy of another one
  psql \"$(dbranch url try-index)\"        connect to it on its own port";

/// Make a database branch without a git branch
///
/// The endpoint stays where it is; `dbranch use` turns it.
#[derive(Debug, clap::Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct Args {
    /// Name of the new branch
    name: BranchName,
    /// Branch to copy [default: the active one]
    #[arg(long, value_name = "BRANCH", add = ArgValueCompleter::new(complete::branches))]
    from: Option<BranchName>,
}

pub(crate) fn run(cx: &Context, args: Args) -> Result<ExitStatus, Report> {
    let request = Request::Create {
        at: cx.at()?,
        name: args.name,
        from: args.from,
    };
    cx.answer(&request, |ui, created: &Created| {
        let branch = &created.branch;
        let parent = branch.parent.as_ref();
        let from = parent.map_or(String::new(), |parent| format!(" from `{parent}`"));
        ui.status(format_args!(
            "created branch `{}`{from} ({})",
            branch.name,
            how(created)
        ));
        ui.hint(format_args!(
            "switch to it with `dbranch use {}`",
            branch.name
        ));
        Ok(())
    })?;
    Ok(ExitStatus::Done)
}
