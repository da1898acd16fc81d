use crate::api::types::{Request, Synced};
use crate::cli::context::Context;
use crate::cli::report::{ExitStatus, Report};

const EXAMPLES: &str = "\
Examples:
  dbranch sync --dry-run     tell what would be done
  dbranch sync";

/// Bring what is recorded and what is found into line
///
/// Compares git, the volumes and the running postgres with the record. Deletes no data.
#[derive(Debug, clap::Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct Args {
    /// Only tell what would be done
    #[arg(long, short = 'n')]
    dry_run: bool,
}

pub(crate) fn run(cx: &Context, args: &Args) -> Result<ExitStatus, Report> {
    let request = Request::Sync {
        at: cx.at()?,
        dry_run: args.dry_run,
    };
    cx.answer(&request, |ui, synced: &Synced| {
        let would = if synced.dry_run { "would " } else { "" };
        for action in &synced.actions {
            ui.answer(format_args!("{would}{action}"))?;
        }
        for note in &synced.notes {
            ui.status(format_args!("note: {note}"));
        }
        if synced.actions.is_empty() {
            ui.status("nothing to do");
        }
        Ok(())
    })?;
    Ok(ExitStatus::Done)
}
