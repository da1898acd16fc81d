use anyhow::anyhow;
use clap_complete::ArgValueCompleter;

use crate::api::types::{BranchDetails, BranchInfo, Deleted, Request};
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
    let known: Vec<BranchInfo> = cx.call_as(&Request::List {
        at: at.clone(),
        trash: false,
    })?;
    if let Some(name) = names
        .iter()
        .find(|name| !known.iter().any(|b| b.name == **name))
    {
        return Err(Report::refused(anyhow!("there is no branch `{name}`"))
            .hint("see the branches with `dbranch list`"));
    }
    if !args.yes {
        let consequence = consequence(cx, &names, args.now)?;
        cx.ui.confirm(&consequence, false)?;
    }
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

fn consequence(cx: &Context, names: &[BranchName], now: bool) -> Result<String, Report> {
    let mut what = Vec::new();
    for name in names {
        let request = Request::Show {
            at: cx.at()?,
            name: name.clone(),
        };
        let branch: BranchDetails = cx.call_as(&request)?;
        let size = branch
            .exclusive_bytes
            .map(|n| format!("{} of its own", render::bytes(n)));
        let sessions = (branch.sessions > 0)
            .then(|| render::count(branch.sessions, "open session", "open sessions"));
        let facts: Vec<String> = [size, sessions].into_iter().flatten().collect();
        what.push(if facts.is_empty() {
            format!("`{name}`")
        } else {
            format!("`{name}` ({})", facts.join(", "))
        });
    }
    let (what, n) = (what.join(", "), names.len());
    let branch = if n == 1 { "branch" } else { "branches" };
    Ok(if now {
        format!("this destroys the database {branch} {what} for good")
    } else {
        format!("this moves the database {branch} {what} to the trash")
    })
}
