use std::ffi::OsString;
use std::io::ErrorKind;
use std::os::unix::process::CommandExt;
use std::process::Command;

use anyhow::anyhow;
use clap_complete::ArgValueCompleter;

use super::env::variables;
use crate::api::types::{Request, UrlInfo};
use crate::cli::complete;
use crate::cli::context::Context;
use crate::cli::report::{ExitStatus, Report};
use crate::types::BranchName;

const EXAMPLES: &str = "\
Examples:
  dbranch psql                            what this worktree's HEAD shows
  dbranch psql feature/login              one branch, wherever HEAD is
  dbranch psql -- -c 'select count(*) from users'
  dbranch psql main -- --csv -f report.sql";

/// What would lead psql elsewhere than the variables we set.
const MISLEADING: [&str; 3] = ["PGSERVICE", "PGSERVICEFILE", "PGHOSTADDR"];

/// Open psql on a branch
#[derive(Debug, clap::Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct Args {
    /// Branch to connect to, whatever is active
    #[arg(add = ArgValueCompleter::new(complete::branches))]
    name: Option<BranchName>,
    /// Arguments for psql, after `--`
    #[arg(last = true, value_name = "ARGS")]
    args: Vec<OsString>,
}

pub(crate) fn run(cx: &Context, args: Args) -> Result<ExitStatus, Report> {
    let request = Request::Url {
        at: cx.at()?,
        name: args.name,
    };
    let url: UrlInfo = cx.call_as(&request)?;
    let mut psql = Command::new("psql");
    // The password never becomes an argument: every user can read those.
    psql.args(&args.args).envs(variables(&url));
    for name in MISLEADING {
        psql.env_remove(name);
    }
    // Only returns when it fails.
    let e = psql.exec();
    if e.kind() == ErrorKind::NotFound {
        return Err(Report::refused(anyhow!("psql is not on the PATH"))
            .hint("install PostgreSQL's client (Debian: `apt install postgresql-client`), or use `dbranch url` with another"));
    }
    Err(Report::refused(anyhow!("start psql: {e}")))
}
