use std::path::PathBuf;

use clap::ValueHint;

use crate::api::types::{MovedBranch, Request, StorageMoved};
use crate::cli::commands::init_postgres::of_variable;
use crate::cli::context::Context;
use crate::cli::render;
use crate::cli::report::{ExitStatus, Report};
use crate::cli::ui::Ui;
use crate::config::Machine;

const EXAMPLES: &str = "\
Examples:
  dbranch storage move --dry-run                  what would go where, and the room it takes
  dbranch storage move --to /mnt/btrfs/dbranch    to a pool where clones are instant
  dbranch storage move --driver copy --yes        to plain folders, without being asked";

/// Move this project's branches to another pool or driver
///
/// All branches go, those in the trash too. A branch that runs is copied while it runs, then stands
/// still for a moment, as with `dbranch stop`; its connections wait or come back by themselves.
/// Where the target can clone, branches go on sharing what they have in common. Names,
/// ports, URLs and parents stay. The daemon goes on when this command is interrupted; a move that
/// was broken off is taken up by the same command.
#[derive(Debug, clap::Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct Args {
    /// Pool to move to [default: this machine's setting]
    #[arg(long, value_name = "POOL_DIR", value_hint = ValueHint::DirPath)]
    to: Option<PathBuf>,
    /// Storage driver there: auto, or one by its name [default: this machine's setting]
    #[arg(long, value_name = "DRIVER")]
    driver: Option<String>,
    /// Only tell what would be done
    #[arg(long, short = 'n')]
    dry_run: bool,
    /// Don't ask
    #[arg(long, short)]
    yes: bool,
}

pub(crate) fn run(cx: &Context, args: Args) -> Result<ExitStatus, Report> {
    let at = cx.at()?;
    let machine = Machine::load(&cx.paths)?;
    let driver = args.driver.or(of_variable(machine.storage));
    let pool = match args.to {
        // The daemon stands elsewhere.
        Some(pool) => Some(cx.dir.join(pool)),
        None => of_variable(machine.pool).flatten(),
    };
    let request = |dry_run| Request::StorageMove {
        at: at.clone(),
        pool: pool.clone(),
        driver: driver.clone(),
        dry_run,
    };
    if !args.dry_run && !args.yes {
        let plan: StorageMoved = cx.call_as(&request(true))?;
        if !plan.branches.is_empty() {
            cx.ui.confirm(&consequence(&plan), args.yes)?;
        }
    }
    let moved = cx.answer(&request(args.dry_run), show)?;
    for left in &moved.left {
        cx.ui.warn(format_args!(
            "`{}` stays where it is: {}",
            left.name, left.why
        ));
    }
    Ok(if moved.left.is_empty() {
        ExitStatus::Done
    } else {
        cx.ui.hint(
            "mount what is missing, then dbranch storage move again; if it is lost for good: dbranch forget NAME",
        );
        ExitStatus::Refused
    })
}

fn consequence(plan: &StorageMoved) -> String {
    let all: u64 = plan.branches.iter().map(|b| b.logical_bytes).sum();
    format!(
        "this moves {} ({}) to {} ({}), which takes about {} there; those that run stand still for a moment",
        render::count(plan.branches.len(), "branch", "branches"),
        render::bytes(all),
        plan.pool.display(),
        plan.driver,
        render::bytes(plan.needed_bytes)
    )
}

fn show(ui: Ui, moved: &StorageMoved) -> Result<(), Report> {
    if moved.branches.is_empty() {
        if moved.left.is_empty() {
            ui.status(format_args!(
                "nothing to do: all branches are in {} ({})",
                moved.pool.display(),
                moved.driver
            ));
        }
        return Ok(());
    }
    let rows: Vec<Vec<String>> = moved.branches.iter().map(row).collect();
    let written = if moved.dry_run { "ABOUT NEW" } else { "NEW" };
    for line in render::table(
        &["NAME", "SIZE", written, "SHARES WITH", "STOOD STILL"],
        &rows,
    ) {
        ui.answer(line)?;
    }
    if moved.dry_run {
        ui.status(format_args!(
            "would move to {} ({}): about {} needed, {} free",
            moved.pool.display(),
            moved.driver,
            render::bytes(moved.needed_bytes),
            render::bytes(moved.free_bytes)
        ));
    } else {
        ui.status(format_args!(
            "moved {} to {} ({})",
            render::count(moved.branches.len(), "branch", "branches"),
            moved.pool.display(),
            moved.driver
        ));
    }
    Ok(())
}

fn row(branch: &MovedBranch) -> Vec<String> {
    let trash = if branch.trashed {
        " (in the trash)"
    } else {
        ""
    };
    vec![
        format!("{}{trash}", branch.name),
        render::bytes(branch.logical_bytes),
        render::bytes(branch.written_bytes),
        branch
            .shares_with
            .as_ref()
            .map_or_else(|| "-".into(), ToString::to_string),
        branch
            .stood_still_ms
            .map_or_else(|| "-".into(), render::millis),
    ]
}
