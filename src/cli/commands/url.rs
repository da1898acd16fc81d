use clap_complete::ArgValueCompleter;

use crate::api::types::{Request, UrlInfo};
use crate::cli::complete;
use crate::cli::context::Context;
use crate::cli::report::{ExitStatus, Report};
use crate::types::BranchName;

const EXAMPLES: &str = "\
Examples:
  psql \"$(dbranch url)\"                 what this worktree's HEAD shows
  psql \"$(dbranch url feature/login)\"   one branch, wherever HEAD is
  export DATABASE_URL=\"$(dbranch url)\"";

/// Print the URL to connect to
///
/// Without a name it is the URL that follows git's HEAD; with one, that branch's own.
#[derive(Debug, clap::Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct Args {
    /// Branch to connect to, whatever is active
    #[arg(add = ArgValueCompleter::new(complete::branches))]
    name: Option<BranchName>,
}

pub(crate) fn run(cx: &Context, args: Args) -> Result<ExitStatus, Report> {
    let request = Request::Url {
        at: cx.at()?,
        name: args.name,
    };
    cx.answer(&request, |ui, url: &UrlInfo| ui.answer(&url.url))?;
    Ok(ExitStatus::Done)
}
