use clap_complete::ArgValueCompleter;

use crate::api::types::{Forgotten, Request};
use crate::cli::complete;
use crate::cli::context::Context;
use crate::cli::report::{ExitStatus, Report};
use crate::types::BranchName;

const EXAMPLES: &str = "\
Examples:
  dbranch forget feature/login
  dbranch forget old-1 old-2 --yes";

/// Drop the record of branches whose disk is lost
///
/// For when a pool is gone for good, and `delete` can't remove what it can't reach. The name and the
/// port become free; children live on without a parent. No data is touched: should the disk come
/// back, `dbranch doctor` names the volumes that no branch knows any more. A branch whose
/// pool is there is refused.
#[derive(Debug, clap::Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct Args {
    /// Branches to forget, in the trash or not
    #[arg(required = true, value_name = "NAME", add = ArgValueCompleter::new(complete::branches))]
    names: Vec<BranchName>,
    /// Don't ask
    #[arg(long, short)]
    yes: bool,
}

pub(crate) fn run(cx: &Context, args: &Args) -> Result<ExitStatus, Report> {
    let at = cx.at()?;
    let names: Vec<String> = args.names.iter().map(|name| format!("`{name}`")).collect();
    let (branch, it) = if names.len() == 1 {
        ("branch", "its")
    } else {
        ("branches", "their")
    };
    cx.ui.confirm(
        &format!(
            "this makes dbranch forget the {branch} {}; {it} data can't be brought back by it afterwards",
            names.join(", ")
        ),
        args.yes,
    )?;
    let mut answers = Vec::new();
    for name in &args.names {
        let request = Request::Forget {
            at: at.clone(),
            name: name.clone(),
        };
        let forgotten: Forgotten = cx.call_as(&request)?;
        cx.ui.status(format_args!(
            "forgot branch `{}`; its data was {}",
            forgotten.name,
            forgotten.volume.display()
        ));
        answers.push(forgotten);
    }
    cx.json_array(&answers)?;
    Ok(ExitStatus::Done)
}
