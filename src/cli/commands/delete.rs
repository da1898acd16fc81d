use clap_complete::ArgValueCompleter;

use crate::api::types::{At, BranchDetails, BranchInfo, Deleted, Request};
use crate::cli::complete;
use crate::cli::context::Context;
use crate::cli::render;
use crate::cli::report::{ExitStatus, Report};
use crate::types::BranchName;

const EXAMPLES: &str = "\
Examples:
  dbranch delete feature/login          to the trash; `undelete` brings it back
  dbranch delete old-1 old-2 --yes
  dbranch delete big-import --now       destroyed at once, to free its space";

/// Move branches to the trash, or destroy them
///
/// The trash keeps a branch for 7 days. The git branch is not touched.
#[derive(Debug, clap::Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct Args {
    /// Branches to delete
    #[arg(required = true, value_name = "NAME", add = ArgValueCompleter::new(complete::branches))]
    names: Vec<BranchName>,
    /// Destroy at once, past the trash
    #[arg(long)]
    now: bool,
    /// Delete even a branch in use
    #[arg(long, short)]
    force: bool,
    /// Don't ask
    #[arg(long, short)]
    yes: bool,
}

pub(crate) fn run(cx: &Context, args: &Args) -> Result<ExitStatus, Report> {
    let at = cx.at()?;
    let mut names = args.names.clone();
    names.sort();
    names.dedup();
    // All are looked at before the first is touched.
    let mut what = Vec::new();
    for name in &names {
        what.push(describe(cx, &at, name, args)?);
    }
    let (what, branch) = (
        what.join(", "),
        if names.len() == 1 {
            "branch"
        } else {
            "branches"
        },
    );
    let consequence = if args.now {
        format!("this destroys the database {branch} {what} for good")
    } else {
        format!("this moves the database {branch} {what} to the trash")
    };
    cx.ui.confirm(&consequence, args.yes)?;
    let mut answers = Vec::new();
    for name in names {
        let request = Request::Delete {
            at: at.clone(),
            name,
            now: args.now,
            force: args.force,
        };
        let deleted: Deleted = cx.call_as(&request)?;
        if deleted.destroyed {
            cx.ui
                .status(format_args!("destroyed branch `{}`", deleted.name));
        } else {
            let until = deleted.expires_at.as_deref().map(render::when);
            let until = until.map_or(String::new(), |t| format!("; it is destroyed {t}"));
            cx.ui.status(format_args!(
                "moved branch `{}` to the trash{until}",
                deleted.name
            ));
            cx.ui.hint(format_args!(
                "bring it back with `dbranch undelete {}`",
                deleted.name
            ));
        }
        answers.push(deleted);
    }
    cx.json_array(&answers)?;
    Ok(ExitStatus::Done)
}

/// A branch and what would be lost with it. What there is not is the daemon's to refuse.
fn describe(cx: &Context, at: &At, name: &BranchName, args: &Args) -> Result<String, Report> {
    let list = |trash| -> Result<Vec<BranchInfo>, Report> {
        let at = at.clone();
        cx.call_as(&Request::List { at, trash })
    };
    let is_meant = |b: &BranchInfo| b.name == *name || b.id.as_str() == name.as_str();
    let is_live = || Ok::<_, Report>(list(false)?.iter().any(is_meant));
    if args.yes && is_live()? {
        // Nobody asks what would be lost, and to count its bytes takes longer than the deletion.
        return Ok(format!("`{name}`"));
    }
    if args.now && !is_live()? && list(true)?.iter().any(is_meant) {
        return Ok(format!("`{name}` (in the trash)"));
    }
    let request = Request::Show {
        at: at.clone(),
        name: name.clone(),
    };
    let branch: BranchDetails = cx.call_as(&request)?;
    let size = branch.exclusive_bytes;
    let size = size.map(|n| format!("{} of its own", render::bytes(n)));
    let sessions = (branch.sessions > 0)
        .then(|| render::count(branch.sessions, "open session", "open sessions"));
    let facts: Vec<String> = [size, sessions].into_iter().flatten().collect();
    Ok(if facts.is_empty() {
        format!("`{name}`")
    } else {
        format!("`{name}` ({})", facts.join(", "))
    })
}
