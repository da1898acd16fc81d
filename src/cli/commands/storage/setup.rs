use serde_json::{Value, json};

use super::carry_out::Work;
use super::{Ways, size};
use crate::api::types::{PoolAdopted, PoolChange, PoolJob, PoolPlan, Request};
use crate::cli::context::Context;
use crate::cli::render;
use crate::cli::report::{ExitStatus, Report};
use crate::config::{Machine, Origin};

const EXAMPLES: &str = "\
Examples:
  dbranch storage setup                          shows what it will do, and asks
  dbranch storage setup --size 20G --yes
  dbranch storage setup --path /data/branches    on another disk
  dbranch storage setup --dry-run                only shows it";

/// Make a pool where branches are instant, on any disk
///
/// A sparse file with a file system that can clone, mounted now and whenever the machine starts.
/// New projects use it; the others stay where they are. What needs root is a few lines of shell,
/// shown before anything is done. A second run completes what the first did not.
#[derive(Debug, Default, clap::Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct Args {
    /// Most it can hold; the file takes only what is in it [default: 50G, or less on a small disk]
    #[arg(long, value_name = "SIZE", value_parser = size)]
    size: Option<u64>,
    /// File system: btrfs or xfs [default: btrfs where the kernel has it]
    #[arg(long, value_name = "FS", value_parser = ["btrfs", "xfs"], hide_possible_values = true)]
    fs: Option<String>,
    /// Do it although the disk has less room, or although it is not needed
    #[arg(long)]
    force: bool,
    #[command(flatten)]
    ways: Ways,
}

pub(crate) fn run(cx: &Context, args: Args) -> Result<ExitStatus, Report> {
    let change = PoolChange::SetUp {
        size_bytes: args.size,
        file_system: args.fs,
    };
    let mut work = Work::plan(cx, &args.ways, change, args.force)?;
    if let Some(why) = &work.plan.not_needed {
        cx.ui.status(format_args!("no pool is needed: {why}"));
        cx.ui.hint("`--force` makes one all the same");
        if cx.ui.json {
            cx.ui
                .answer_json(&json!({ "changed": false, "not_needed": why }))?;
        }
        return Ok(ExitStatus::Done);
    }
    if args.ways.dry_run {
        return work.show_only();
    }
    let changed = !work.is_done();
    if changed {
        let consequence = format!("this makes a pool in {}", work.plan.path.display());
        work.ask(&consequence)?;
        work.carry_out()?;
    }
    let path = work.plan.path.clone();
    let adopted: PoolAdopted = cx.call_as(&Request::PoolAdopt { path })?;
    if cx.ui.json {
        cx.ui.answer_json(&answer(&work.plan, &adopted, changed))?;
    }
    tell(cx, &work.plan, &adopted, changed);
    Ok(ExitStatus::Done)
}

fn answer(plan: &PoolPlan, adopted: &PoolAdopted, changed: bool) -> Value {
    json!({
        "changed": changed || adopted.is_new,
        "path": plan.path,
        "image": plan.image,
        "file_system": plan.file_system,
        "size_bytes": plan.size_bytes,
        "driver": adopted.driver,
        "settings_file": adopted.settings_file,
        "projects_elsewhere": adopted.projects_elsewhere,
    })
}

fn tell(cx: &Context, plan: &PoolPlan, adopted: &PoolAdopted, changed: bool) {
    let path = plan.path.display();
    if changed {
        cx.ui.status(format_args!(
            "set up pool {path} ({}, up to {} in {}, {} storage)",
            plan.file_system.as_deref().unwrap_or_default(),
            render::bytes(plan.size_bytes),
            plan.image.display(),
            adopted.driver
        ));
    } else if !adopted.is_new {
        cx.ui.status(format_args!(
            "nothing to do: pool {path} stands, and new projects use it"
        ));
    }
    if adopted.is_new {
        cx.ui.status(format_args!(
            "new projects use it from now on ({})",
            adopted.settings_file.display()
        ));
    }
    let mut variable = adopted
        .overridden_by
        .clone()
        .map(|name| (name, "the daemon"));
    if let Ok(machine) = Machine::load(&cx.paths)
        && let Origin::Variable(name) = machine.pool.origin
        && machine.pool.value.as_ref() != Some(&plan.path)
    {
        variable = Some((name.to_owned(), "this shell"));
    }
    if let Some((name, whose)) = variable {
        cx.ui.warn(format_args!(
            "{name} is set in {whose} and names another pool, which wins; unset it to use this one"
        ));
    }
    if !adopted.projects_elsewhere.is_empty() {
        cx.ui.hint(format_args!(
            "branches stay where they are ({}); `dbranch storage move` brings a project's here",
            adopted.projects_elsewhere.join(", ")
        ));
    }
}

/// On a terminal, offers to make a pool where new projects would copy all of their data for every
/// branch. Whatever keeps it from being made is no trouble of `init`'s.
pub(crate) fn offer(cx: &Context) -> Result<(), Report> {
    let machine = Machine::load(&cx.paths)?;
    let is_chosen = [&machine.pool.origin, &machine.storage.origin]
        .iter()
        .any(|origin| matches!(origin, Origin::Variable(_)));
    if is_chosen || !cx.ui.can_ask() {
        return Ok(());
    }
    let job = PoolJob {
        path: None,
        change: PoolChange::SetUp {
            size_bytes: None,
            file_system: None,
        },
        force: false,
        unit_dir: None,
        fstab: None,
    };
    let Ok(plan) = cx.call_as::<PoolPlan>(&Request::PoolPlan { job, at: None }) else {
        return Ok(());
    };
    if plan.not_needed.is_some() || plan.groups.is_empty() {
        return Ok(());
    }
    let said = cx.ui.ask(
        "On this disk every branch is a full copy; `dbranch storage setup` makes a pool where it is instant. Do it now? [y/N]",
    )?;
    if ["y", "yes"].contains(&said.to_lowercase().as_str())
        && let Err(report) = run(cx, Args::default())
    {
        cx.ui.report(&report);
    }
    Ok(())
}
