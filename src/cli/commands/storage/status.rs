use super::AtStart;
use crate::api::types::{PoolInfo, Request};
use crate::cli::context::Context;
use crate::cli::render;
use crate::cli::report::{ExitStatus, Report};
use crate::cli::ui::Tone;

const EXAMPLES: &str = "\
Examples:
  dbranch storage status
  dbranch storage status --json | jq '.[] | {path, free_bytes}'";

/// Tell where branches live, and what room there is
#[derive(Debug, clap::Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct Args {
    #[command(flatten)]
    at_start: AtStart,
}

pub(crate) fn run(cx: &Context, args: Args) -> Result<ExitStatus, Report> {
    let request = Request::Pools {
        unit_dir: args.at_start.unit_dir,
        fstab: args.at_start.fstab,
    };
    cx.answer(&request, |ui, pools: &Vec<PoolInfo>| {
        for (n, pool) in pools.iter().enumerate() {
            if n > 0 {
                ui.answer("")?;
            }
            ui.answer(ui.paint(Tone::Strong, &pool.path.display().to_string()))?;
            for line in render::fields(&fields(pool)) {
                ui.answer(format_args!("  {line}"))?;
            }
        }
        Ok(())
    })?;
    Ok(ExitStatus::Done)
}

fn fields(pool: &PoolInfo) -> Vec<(&'static str, String)> {
    let mut fields = Vec::new();
    if let Some(problem) = &pool.problem {
        fields.push(("problem", problem.clone()));
        fields.extend(pool.fix.clone().map(|fix| ("mend it by", fix)));
    }
    fields.extend(pool.driver.clone().map(|driver| ("storage", driver)));
    if let Some(name) = &pool.file_system {
        let options = pool.mount_options.as_deref().unwrap_or_default();
        fields.push(("file system", format!("{name} ({options})")));
    }
    if let (Some(free), Some(total)) = (pool.free_bytes, pool.total_bytes) {
        fields.push((
            "room",
            format!("{} of {} free", render::bytes(free), render::bytes(total)),
        ));
    }
    if let Some(image) = &pool.image {
        let host = image.host_free_bytes.map_or(String::new(), |n| {
            format!(", {} free on its disk", render::bytes(n))
        });
        fields.push((
            "file",
            format!(
                "{}, takes {} of {}{host}",
                image.path.display(),
                render::bytes(image.allocated_bytes),
                render::bytes(image.size_bytes)
            ),
        ));
        fields.push((
            "at start",
            pool.mounted_by
                .as_ref()
                .map_or("not mounted".into(), |file| {
                    format!("mounted by {}", file.display())
                }),
        ));
    }
    let branches: Vec<String> = pool
        .branches
        .iter()
        .map(|of| {
            let trashed = match of.trashed {
                0 => String::new(),
                n => format!(" and {n} in the trash"),
            };
            format!("{} of {}{trashed}", of.branches, of.project)
        })
        .collect();
    fields.push((
        "branches",
        if branches.is_empty() {
            "none".into()
        } else {
            branches.join(", ")
        },
    ));
    if pool.for_new_projects {
        fields.push(("new projects", "come here".into()));
    }
    fields
}
