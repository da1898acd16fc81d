use crate::cli::context::Context;
use crate::cli::report::{ExitStatus, Report};
use crate::git;

const EXAMPLES: &str = "\
Examples:
  dbranch uninstall-hooks";

/// Take dbranch's lines out of git's hooks
///
/// What was there before comes back to the byte.
#[derive(Debug, clap::Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct Args {}

pub(crate) fn run(cx: &Context, _: &Args) -> Result<ExitStatus, Report> {
    let uninstalled = git::uninstall(&cx.location()?)?;
    if cx.ui.json {
        cx.ui
            .answer_json(&serde_json::json!({ "paths": uninstalled.paths }))?;
    }
    for path in &uninstalled.paths {
        cx.ui
            .status(format_args!("uninstalled the hook {}", path.display()));
    }
    if uninstalled.paths.is_empty() {
        cx.ui.status("no hook of dbranch is installed");
    }
    Ok(ExitStatus::Done)
}
