use serde_json::json;

use super::Ways;
use super::carry_out::Work;
use crate::api::types::{PoolChange, Request};
use crate::cli::context::Context;
use crate::cli::report::{ExitStatus, Report};

const EXAMPLES: &str = "\
Examples:
  dbranch storage remove
  dbranch storage remove --path /data/branches --yes";

/// Remove a pool that `storage setup` made
///
/// Only an empty one: while a branch lives there, also in the trash, it is refused.
#[derive(Debug, clap::Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct Args {
    #[command(flatten)]
    ways: Ways,
}

pub(crate) fn run(cx: &Context, args: &Args) -> Result<ExitStatus, Report> {
    let mut work = Work::plan(cx, &args.ways, PoolChange::Remove, false)?;
    if args.ways.dry_run {
        return work.show_only();
    }
    let path = work.plan.path.clone();
    work.ask(&format!(
        "this removes the pool {} and its file {}",
        path.display(),
        work.plan.image.display()
    ))?;
    // First of all, so that no new project goes there.
    let was_in_use: bool = cx.call_as(&Request::PoolForget { path: path.clone() })?;
    work.carry_out()?;
    cx.ui
        .status(format_args!("removed the pool {}", path.display()));
    if was_in_use {
        cx.ui.hint(format_args!(
            "new projects use {} again",
            cx.paths.default_pool().display()
        ));
    }
    if cx.ui.json {
        cx.ui
            .answer_json(&json!({ "path": path, "removed": true }))?;
    }
    Ok(ExitStatus::Done)
}
