use clap_complete::ArgValueCompleter;

use crate::api::types::{BranchInfo, Request};
use crate::cli::complete;
use crate::cli::context::Context;
use crate::cli::report::{ExitStatus, Report};
use crate::types::BranchName;

const EXAMPLES: &str = "\
Examples:
  dbranch list --trash
  dbranch undelete feature/login
  dbranch undelete feature/login --as feature/login-old";

/// Bring a branch back from the trash
#[derive(Debug, clap::Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct Args {
    /// Branch to bring back
    #[arg(add = ArgValueCompleter::new(complete::trashed))]
    name: BranchName,
    /// Bring it back under another name
    #[arg(long = "as", value_name = "NAME")]
    rename_to: Option<BranchName>,
}

pub(crate) fn run(cx: &Context, args: Args) -> Result<ExitStatus, Report> {
    let request = Request::Undelete {
        at: cx.at()?,
        name: args.name,
        rename_to: args.rename_to,
    };
    cx.answer(&request, |ui, branch: &BranchInfo| {
        ui.status(format_args!("brought back branch `{}`", branch.name));
        Ok(())
    })?;
    Ok(ExitStatus::Done)
}
