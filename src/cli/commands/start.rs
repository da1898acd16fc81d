use anyhow::anyhow;

use crate::api::client::Client;
use crate::api::types::{DaemonInfo, Request};
use crate::cli::context::{self, Context};
use crate::cli::report::{ExitStatus, Report};
use crate::daemon::{self, Ended};

const EXAMPLES: &str = "\
Examples:
  dbranch start               in the foreground, with its log
  dbranch start --detach      in the background";

/// Start the daemon
///
/// Seldom needed: every command that needs it starts it.
#[derive(Debug, clap::Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct Args {
    /// Start in the background and return when it answers
    #[arg(long, short)]
    detach: bool,
    /// Be the daemon in the background
    #[arg(long, hide = true, conflicts_with = "detach")]
    detached: bool,
}

impl Args {
    /// Whether this process becomes the daemon.
    pub(crate) fn is_daemon(&self) -> bool {
        !self.detach
    }
}

/// Starts the daemon in the background.
pub(crate) fn run(cx: &Context, _: &Args) -> Result<ExitStatus, Report> {
    let (info, word) = match Client::connect(&cx.paths)?.map(ping) {
        Some(Ok(info)) => (info, "already runs"),
        // One that ends just now is none.
        Some(Err(_)) | None => (
            ping(context::start(&cx.paths, context::START_LIMIT)?)?,
            "started",
        ),
    };
    if cx.ui.json {
        cx.ui.answer_json(&info)?;
    } else {
        cx.ui
            .status(format_args!("the daemon {word} ({})", who(&info)));
    }
    Ok(ExitStatus::Done)
}

/// Is the daemon, until it is told to end.
pub(crate) fn run_daemon(cx: &Context, args: &Args) -> Result<ExitStatus, Report> {
    if args.detached {
        leave_the_caller();
    } else if let Some(client) = Client::connect(&cx.paths)? {
        let info = ping(client)?;
        return Err(already_runs(&format!(" ({})", who(&info))));
    }
    match daemon::run(&cx.paths)? {
        // Whoever started this one finds the other.
        Ended::AlreadyRunning { .. } if args.detached => Ok(ExitStatus::Done),
        Ended::AlreadyRunning { pid } => {
            let pid = pid.map_or(String::new(), |pid| format!(" (pid {pid})"));
            Err(already_runs(&pid))
        }
        Ended::Stopped => Ok(ExitStatus::Done),
    }
}

fn already_runs(who: &str) -> Report {
    Report::refused(anyhow!("the daemon already runs{who}")).hint(
        "stop it with `dbranch shutdown`, or read along with `dbranch logs --daemon --follow`",
    )
}

fn ping(mut client: Client) -> Result<DaemonInfo, Report> {
    Ok(client.call_as(&Request::Ping, drop)?)
}

fn who(info: &DaemonInfo) -> String {
    format!(
        "pid {}, version {}, log {}",
        info.pid,
        info.version,
        info.log_file.display()
    )
}

/// Leaves the terminal and drops what was inherited by accident: a file that a caller holds
/// locked would stay locked as long as the daemon lives. Nothing of this process is open yet
/// but its standard streams.
fn leave_the_caller() {
    // Fails only for the leader of a group, which then has no need of it.
    let _ = nix::unistd::setsid();
    let Ok(open) = std::fs::read_dir("/dev/fd") else {
        return;
    };
    let open: Vec<i32> = open
        .flatten()
        .filter_map(|entry| entry.file_name().to_str()?.parse().ok())
        .collect();
    for fd in open.into_iter().filter(|fd| *fd > 2) {
        // The listing's own is closed already.
        let _ = nix::unistd::close(fd);
    }
}
