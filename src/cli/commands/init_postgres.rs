use std::path::PathBuf;

use clap::ValueHint;

use crate::api::types::{Created, Request};
use crate::cli::context::Context;
use crate::cli::render;
use crate::cli::report::{ExitStatus, Report};
use crate::types::BranchName;

const EXAMPLES: &str = "\
Examples:
  dbranch init-postgres                              named after the current git branch
  dbranch init-postgres --runtime native             this machine's postgres programs
  dbranch init-postgres --pool /mnt/btrfs/dbranch    volumes where clones are instant";

/// Make the first database branch
#[derive(Debug, clap::Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct Args {
    /// Name of the branch [default: the current git branch]
    #[arg(long, value_name = "NAME")]
    branch: Option<BranchName>,
    /// Storage driver: auto, btrfs or copy [default: this machine's setting]
    #[arg(long, value_name = "DRIVER")]
    storage: Option<String>,
    /// What runs postgres: auto, docker or native [default: this machine's setting]
    #[arg(long, value_name = "RUNTIME")]
    runtime: Option<String>,
    /// Folder for the volumes [default: this machine's setting]
    #[arg(long, value_name = "DIR", value_hint = ValueHint::DirPath)]
    pool: Option<PathBuf>,
}

pub(crate) fn run(cx: &Context, args: Args) -> Result<ExitStatus, Report> {
    let request = Request::InitPostgres {
        at: cx.at()?,
        branch: args.branch,
        storage: args.storage,
        runtime: args.runtime,
        // The daemon stands elsewhere.
        pool: args.pool.map(|pool| cx.dir.join(pool)),
    };
    cx.answer(&request, |ui, created: &Created| {
        ui.status(format_args!(
            "created branch `{}` (PostgreSQL {}, {} runtime, {} storage, {})",
            created.branch.name,
            created.postgres_version,
            created.runtime,
            created.storage,
            render::millis(created.duration_ms)
        ));
        ui.hint("let git's checkout switch it with `dbranch install-hooks`; connect with `psql \"$(dbranch url)\"`");
        Ok(())
    })?;
    Ok(ExitStatus::Done)
}
