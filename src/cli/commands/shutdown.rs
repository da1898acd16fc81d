use crate::api::client::Client;
use crate::api::types::{Request, Stopped};
use crate::cli::context::Context;
use crate::cli::render;
use crate::cli::report::{ExitStatus, Report};

const EXAMPLES: &str = "\
Examples:
  dbranch shutdown                    the branches' postgres go on
  dbranch shutdown --stop-branches    all ends";

/// Stop the daemon
///
/// Without it nothing listens on the projects' ports. The next command starts it again.
#[derive(Debug, clap::Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct Args {
    /// Stop every branch's postgres too
    #[arg(long)]
    stop_branches: bool,
}

pub(crate) fn run(cx: &Context, args: &Args) -> Result<ExitStatus, Report> {
    if Client::connect(&cx.paths)?.is_none() && !args.stop_branches {
        cx.ui.status("no daemon runs");
        if cx.ui.json {
            cx.ui.answer_json(&Stopped {
                instances_stopped: 0,
                instances_left: 0,
            })?;
        }
        return Ok(ExitStatus::Done);
    }
    // Instances outlive a daemon: only a daemon finds and stops them.
    let stop_branches = args.stop_branches;
    cx.answer(
        &Request::Shutdown { stop_branches },
        |ui, stopped: &Stopped| {
            let (stopped, left) = (stopped.instances_stopped, stopped.instances_left);
            let and = match stopped {
                0 => String::new(),
                n => format!(" and {}", render::count(n, "branch", "branches")),
            };
            let but = match left {
                0 => String::new(),
                n => format!("; {} on", render::count(n, "branch goes", "branches go")),
            };
            ui.status(format_args!("stopped the daemon{and}{but}"));
            Ok(())
        },
    )?;
    Ok(ExitStatus::Done)
}
