use std::path::PathBuf;

use clap::ValueHint;

use crate::api::types::{Created, Request};
use crate::cli::context::Context;
use crate::cli::render;
use crate::cli::report::{ExitStatus, Report};
use crate::config::{Machine, Origin, Setting};
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
    /// Storage driver: auto, btrfs, zfs, reflink or copy [default: this machine's setting]
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
    let at = cx.at()?;
    let machine = Machine::load(&cx.paths)?;
    let request = Request::InitPostgres {
        at,
        branch: args.branch,
        storage: args.storage.or(of_variable(machine.storage)),
        runtime: args.runtime.or(of_variable(machine.runtime)),
        pool: match args.pool {
            // The daemon stands elsewhere.
            Some(pool) => Some(cx.dir.join(pool)),
            None => of_variable(machine.pool).flatten(),
        },
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

/// What this shell's variable says; a daemon that runs already has not seen it.
pub(super) fn of_variable<T>(setting: Setting<T>) -> Option<T> {
    matches!(setting.origin, Origin::Variable(_)).then_some(setting.value)
}
