//! The pool that holds the volumes.

mod r#move;

use crate::cli::context::Context;
use crate::cli::report::{ExitStatus, Report};

const EXAMPLES: &str = "\
Examples:
  dbranch storage move --dry-run                  what would go where, and the room it takes
  dbranch storage move --to /mnt/btrfs/dbranch    all branches of this project";

/// Look after the pool that holds the branches' data
#[derive(Debug, clap::Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, clap::Subcommand)]
enum Command {
    Move(r#move::Args),
}

pub(crate) fn run(cx: &Context, args: Args) -> Result<ExitStatus, Report> {
    match args.command {
        Command::Move(args) => r#move::run(cx, args),
    }
}
