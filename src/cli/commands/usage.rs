use crate::api::types::{Request, UsageInfo};
use crate::cli::context::Context;
use crate::cli::render;
use crate::cli::report::{ExitStatus, Report};

const EXAMPLES: &str = "\
Examples:
  dbranch usage
  dbranch usage --json | jq '.branches[] | {name, exclusive_bytes}'";

/// Tell what each branch takes on disk
///
/// OWN is what only this branch holds, so what destroying it would free.
#[derive(Debug, clap::Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct Args {}

pub(crate) fn run(cx: &Context, _: &Args) -> Result<ExitStatus, Report> {
    cx.answer(&Request::Usage { at: cx.at()? }, |ui, usage: &UsageInfo| {
        let rows: Vec<Vec<String>> = usage
            .branches
            .iter()
            .map(|branch| {
                vec![
                    branch.name.to_string(),
                    render::bytes(branch.logical_bytes),
                    render::bytes(branch.exclusive_bytes),
                    if branch.trashed { "in the trash" } else { "" }.to_owned(),
                ]
            })
            .collect();
        for line in render::table(&["NAME", "SIZE", "OWN", ""], &rows) {
            ui.answer(line)?;
        }
        let pool = &usage.pool;
        ui.status(format_args!(
            "pool: {} on {}, {} of {} free",
            pool.path.display(),
            pool.driver,
            render::bytes(pool.free_bytes),
            render::bytes(pool.total_bytes)
        ));
        Ok(())
    })?;
    Ok(ExitStatus::Done)
}
