use serde_json::json;

use super::carry_out::Work;
use super::{Ways, size};
use crate::api::types::PoolChange;
use crate::cli::context::Context;
use crate::cli::render;
use crate::cli::report::{ExitStatus, Report};

const EXAMPLES: &str = "\
Examples:
  dbranch storage grow --size 80G
  dbranch storage grow --size 80G --path /data/branches";

/// Give a pool more room
///
/// Branches in it go on working. A pool can't be made smaller; its file takes only what is in it.
#[derive(Debug, clap::Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct Args {
    /// Most it can hold from now on
    #[arg(long, value_name = "SIZE", value_parser = size)]
    size: u64,
    /// Do it although the disk has less room
    #[arg(long)]
    force: bool,
    #[command(flatten)]
    ways: Ways,
}

pub(crate) fn run(cx: &Context, args: &Args) -> Result<ExitStatus, Report> {
    let change = PoolChange::Grow {
        size_bytes: args.size,
    };
    let mut work = Work::plan(cx, &args.ways, change, args.force)?;
    if args.ways.dry_run {
        return work.show_only();
    }
    let (changed, path) = (!work.is_done(), work.plan.path.clone());
    let size = render::bytes(args.size);
    if changed {
        work.ask(&format!("this gives the pool {} {size}", path.display()))?;
        work.carry_out()?;
        cx.ui.status(format_args!(
            "the pool {} can hold {size} now",
            path.display()
        ));
    } else {
        cx.ui.status(format_args!(
            "nothing to do: the pool {} can hold {size}",
            path.display()
        ));
    }
    if cx.ui.json {
        cx.ui.answer_json(&json!({
            "changed": changed,
            "path": path,
            "image": work.plan.image,
            "size_bytes": args.size,
        }))?;
    }
    Ok(ExitStatus::Done)
}
