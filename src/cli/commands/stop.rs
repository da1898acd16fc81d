use clap_complete::ArgValueCompleter;

use super::named_state;
use crate::api::types::{BranchInfo, Request};
use crate::cli::complete;
use crate::cli::context::Context;
use crate::cli::report::{ExitStatus, Report};
use crate::types::BranchName;

const EXAMPLES: &str = "\
Examples:
  dbranch stop                    the active branch
  dbranch stop feature/login
  dbranch stop --all              every branch of this project";

/// Stop a branch's postgres
///
/// The data stays. The next connection starts it again.
#[derive(Debug, clap::Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct Args {
    /// Branch to stop [default: the active one]
    #[arg(add = ArgValueCompleter::new(complete::branches), conflicts_with = "all")]
    name: Option<BranchName>,
    /// Stop every branch of this project
    #[arg(long, short)]
    all: bool,
}

pub(crate) fn run(cx: &Context, args: Args) -> Result<ExitStatus, Report> {
    let request = Request::Stop {
        at: cx.at()?,
        name: args.name,
        all: args.all,
    };
    cx.answer(&request, |ui, branches: &Vec<BranchInfo>| {
        for branch in branches {
            ui.status(named_state(branch));
        }
        if branches.is_empty() {
            ui.status("no branch was running");
        }
        Ok(())
    })?;
    Ok(ExitStatus::Done)
}
