use clap_complete::ArgValueCompleter;

use super::named_state;
use crate::api::types::{BranchInfo, Request};
use crate::cli::complete;
use crate::cli::context::Context;
use crate::cli::report::{ExitStatus, Report};
use crate::types::BranchName;

const EXAMPLES: &str = "\
Examples:
  dbranch resume                  the active branch
  dbranch resume feature/login";

/// Start a branch's postgres and wait until it answers
///
/// Seldom needed: a connection starts it too.
#[derive(Debug, clap::Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct Args {
    /// Branch to start [default: the active one]
    #[arg(add = ArgValueCompleter::new(complete::branches))]
    name: Option<BranchName>,
}

pub(crate) fn run(cx: &Context, args: Args) -> Result<ExitStatus, Report> {
    let request = Request::Resume {
        at: cx.at()?,
        name: args.name,
    };
    cx.answer(&request, |ui, branch: &BranchInfo| {
        ui.status(named_state(branch));
        Ok(())
    })?;
    Ok(ExitStatus::Done)
}
