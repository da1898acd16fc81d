//! `dbranch storage`: the pools, one file a subcommand.

mod carry_out;
mod grow;
mod r#move;
mod remove;
pub(super) mod setup;
mod status;

use std::path::PathBuf;

use clap::{Subcommand, ValueEnum, ValueHint};

use crate::cli::context::Context;
use crate::cli::report::{ExitStatus, Report};

const EXAMPLES: &str = "\
Examples:
  dbranch storage status            where branches live, and the room there
  dbranch storage setup             a pool where branches are instant, on any disk
  dbranch storage grow --size 80G   more room in it
  dbranch storage move --dry-run    what would go there, and the room it takes";

/// Look after the pools, the places where branches live
#[derive(Debug, clap::Args)]
#[command(after_help = EXAMPLES, arg_required_else_help = true)]
pub(crate) struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    Setup(setup::Args),
    Grow(grow::Args),
    Move(r#move::Args),
    Remove(remove::Args),
    Status(status::Args),
}

pub(crate) fn run(cx: &Context, args: Args) -> Result<ExitStatus, Report> {
    match args.command {
        Command::Setup(args) => setup::run(cx, args),
        Command::Grow(args) => grow::run(cx, &args),
        Command::Move(args) => r#move::run(cx, args),
        Command::Remove(args) => remove::run(cx, &args),
        Command::Status(args) => status::run(cx, args),
    }
}

/// Options of whatever changes a pool.
#[derive(Debug, Clone, Default, clap::Args)]
struct Ways {
    /// Folder of the pool [default: this machine's setting, or beside dbranch's data]
    #[arg(long, value_name = "DIR", value_hint = ValueHint::DirPath)]
    path: Option<PathBuf>,
    /// Don't ask
    #[arg(long, short)]
    yes: bool,
    /// Show what would be done, and do nothing
    #[arg(long)]
    dry_run: bool,
    /// Where root's rights come from: sudo, or a container that Docker starts with them
    /// [default: sudo where it is installed]
    #[arg(long, value_name = "WAY", hide_possible_values = true)]
    via: Option<Via>,
    #[command(flatten)]
    at_start: AtStart,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Via {
    Sudo,
    Docker,
}

/// Where the machine keeps what it mounts at its start, for tests.
#[derive(Debug, Clone, Default, clap::Args)]
struct AtStart {
    #[arg(long, hide = true, value_name = "DIR")]
    unit_dir: Option<PathBuf>,
    #[arg(long, hide = true, value_name = "FILE")]
    fstab: Option<PathBuf>,
}

/// Bytes of `50G`: a number and K, M, G or T, each 1024 of the one before, with or without B or iB.
fn size(text: &str) -> Result<u64, String> {
    let wrong = || format!("`{text}` is no size; write it as 50G");
    let digits = text.find(|c: char| !c.is_ascii_digit()).ok_or_else(wrong)?;
    let number: u64 = text[..digits].parse().map_err(|_| wrong())?;
    let unit = text[digits..].trim_end_matches("iB").trim_end_matches('B');
    let shift = ["K", "M", "G", "T"]
        .iter()
        .position(|known| known.eq_ignore_ascii_case(unit))
        .ok_or_else(wrong)?;
    number
        .checked_mul(1 << (10 * (shift + 1)))
        .ok_or_else(wrong)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_written_as_people_do() {
        for text in ["50G", "50g", "50GB", "50GiB"] {
            assert_eq!(size(text), Ok(50 << 30), "{text}");
        }
        assert_eq!(size("1T"), Ok(1 << 40));
        for bad in ["", "50", "G", "5.5G", "-1G", "1X", "99999999999T"] {
            assert!(size(bad).is_err(), "{bad}");
        }
    }
}
