use std::time::{Duration, Instant};

use anyhow::anyhow;
use nix::errno::Errno;
use nix::sys::signal::kill;
use nix::unistd::Pid;

use crate::api::client::Client;
use crate::api::types::{DaemonInfo, Request, Stopped};
use crate::cli::context::Context;
use crate::cli::render;
use crate::cli::report::{ExitStatus, Report};

const EXAMPLES: &str = "\
Examples:
  dbranch shutdown                    the branches' postgres go on
  dbranch shutdown --stop-branches    all ends";

/// Longer than the daemon gives what is under way.
const END_LIMIT: Duration = Duration::from_secs(30);
const LOOK_EVERY: Duration = Duration::from_millis(5);

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
    let daemon: DaemonInfo = cx.call_as(&Request::Ping)?;
    let stop_branches = args.stop_branches;
    let stopped: Stopped = cx.call_as(&Request::Shutdown { stop_branches })?;
    // It answers first, then drains what is under way.
    if !has_ended(daemon.pid, END_LIMIT) {
        return Err(Report::new(
            ExitStatus::Unreachable,
            anyhow!("the daemon (pid {}) is still ending", daemon.pid),
        )
        .hint("see what it waits for with `dbranch logs --daemon`"));
    }
    if cx.ui.json {
        cx.ui.answer_json(&stopped)?;
    } else {
        cx.ui.status(sentence(&stopped));
    }
    Ok(ExitStatus::Done)
}

fn sentence(stopped: &Stopped) -> String {
    let and = match stopped.instances_stopped {
        0 => String::new(),
        n => format!(" and {}", render::count(n, "branch", "branches")),
    };
    let but = match stopped.instances_left {
        0 => String::new(),
        n => format!("; {} on", render::count(n, "branch goes", "branches go")),
    };
    format!("stopped the daemon{and}{but}")
}

/// Waits for the end of a process that is not our child.
fn has_ended(pid: u32, limit: Duration) -> bool {
    let until = Instant::now() + limit;
    while is_alive(pid) {
        if Instant::now() >= until {
            return false;
        }
        std::thread::sleep(LOOK_EVERY);
    }
    true
}

fn is_alive(pid: u32) -> bool {
    let Ok(raw) = i32::try_from(pid) else {
        return false;
    };
    // A zombie, which a container's first process may never reap, has ended: proc(5).
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    let is_zombie = stat
        .rsplit_once(") ")
        .is_some_and(|(_, rest)| rest.starts_with('Z'));
    !is_zombie && kill(Pid::from_raw(raw), None) != Err(Errno::ESRCH)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_has_ended_when_it_is_gone_or_waits_to_be_reaped() {
        assert!(!has_ended(std::process::id(), Duration::ZERO));
        let mut child = std::process::Command::new("true").spawn().unwrap();
        let pid = child.id();
        assert!(!cfg!(target_os = "linux") || has_ended(pid, END_LIMIT));
        child.wait().unwrap();
        assert!(has_ended(pid, END_LIMIT));
    }

    #[test]
    fn what_goes_on_is_told() {
        let stopped = |instances_stopped, instances_left| {
            sentence(&Stopped {
                instances_stopped,
                instances_left,
            })
        };
        assert_eq!(stopped(0, 0), "stopped the daemon");
        assert_eq!(stopped(2, 0), "stopped the daemon and 2 branches");
        assert_eq!(stopped(0, 1), "stopped the daemon; 1 branch goes on");
    }
}
