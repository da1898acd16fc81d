use anyhow::anyhow;
use clap_complete::ArgValueCompleter;

use crate::api::types::{Request, Switched, UseTarget};
use crate::cli::complete;
use crate::cli::context::Context;
use crate::cli::render;
use crate::cli::report::{ExitStatus, Report};
use crate::types::BranchName;

const EXAMPLES: &str = "\
Examples:
  dbranch use try-index     show another branch at the same URL
  dbranch use -             back to the one before
  dbranch use               follow git's HEAD again";

/// Turn this worktree's URL to another branch
///
/// Git stays where it is. Without a name the URL follows git's HEAD again.
#[derive(Debug, clap::Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct Args {
    /// Branch to turn to, or `-` for the one before
    #[arg(add = ArgValueCompleter::new(complete::branches))]
    name: Option<String>,
}

impl Args {
    fn target(self) -> Result<UseTarget, Report> {
        match self.name {
            None => Ok(UseTarget::Head),
            Some(name) if name == "-" => Ok(UseTarget::Previous),
            Some(name) => BranchName::new(name).map(UseTarget::Branch).map_err(|e| {
                Report::new(ExitStatus::Config, anyhow!(e))
                    .hint("see the branches with `dbranch list`")
            }),
        }
    }
}

pub(crate) fn run(cx: &Context, args: Args) -> Result<ExitStatus, Report> {
    let to = args.target()?;
    let request = Request::Use { at: cx.at()?, to };
    cx.answer(&request, |ui, switched: &Switched| {
        if switched.changed {
            let ms = render::millis(switched.duration_ms);
            ui.status(format_args!("switched to `{}` ({ms})", switched.branch));
        } else {
            ui.status(format_args!("already on `{}`", switched.branch));
        }
        Ok(())
    })?;
    Ok(ExitStatus::Done)
}
