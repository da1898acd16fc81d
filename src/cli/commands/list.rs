use crate::api::types::{BranchInfo, Request};
use crate::cli::context::Context;
use crate::cli::render;
use crate::cli::report::{ExitStatus, Report};
use crate::cli::ui::{Tone, Ui};

use super::state_word;

const EXAMPLES: &str = "\
Examples:
  dbranch list                           `*` marks the active branch
  dbranch list --trash                   what `undelete` can bring back
  dbranch list --json | jq -r '.[].name'";

/// List the database branches
#[derive(Debug, clap::Args)]
#[command(after_help = EXAMPLES, visible_alias = "ls")]
pub(crate) struct Args {
    /// List those in the trash
    #[arg(long)]
    trash: bool,
}

pub(crate) fn run(cx: &Context, args: &Args) -> Result<ExitStatus, Report> {
    let trash = args.trash;
    let request = Request::List {
        at: cx.at()?,
        trash,
    };
    cx.answer(&request, |ui, branches: &Vec<BranchInfo>| {
        if branches.is_empty() && trash {
            ui.status("the trash is empty");
            return Ok(());
        }
        if branches.is_empty() {
            ui.status("no branches yet");
            ui.hint("make the first with `dbranch init-postgres`");
            return Ok(());
        }
        for line in lines(ui, branches, trash) {
            ui.answer(line)?;
        }
        for branch in branches {
            if let Some(failure) = &branch.failure {
                ui.warn(failure);
            }
            if let Some(hint) = &branch.failure_hint {
                ui.hint(hint);
            }
        }
        Ok(())
    })?;
    Ok(ExitStatus::Done)
}

fn lines(ui: Ui, branches: &[BranchInfo], trash: bool) -> Vec<String> {
    let parent = |b: &BranchInfo| {
        b.parent
            .as_ref()
            .map_or("-".to_owned(), ToString::to_string)
    };
    let when = |time: &Option<String>| time.as_deref().map_or("-".into(), render::when);
    let lines = if trash {
        let row = |b: &BranchInfo| {
            vec![
                String::new(),
                b.name.to_string(),
                parent(b),
                when(&b.trashed_at),
                when(&b.expires_at),
            ]
        };
        let rows: Vec<_> = branches.iter().map(row).collect();
        render::table(&["", "NAME", "PARENT", "DELETED", "DESTROYED"], &rows)
    } else {
        let row = |b: &BranchInfo| {
            vec![
                if b.active { "*" } else { "" }.to_owned(),
                b.name.to_string(),
                state_word(b.state).to_owned(),
                parent(b),
                b.port.to_string(),
                render::when(&b.created_at),
            ]
        };
        let rows: Vec<_> = branches.iter().map(row).collect();
        render::table(&["", "NAME", "STATE", "PARENT", "PORT", "CREATED"], &rows)
    };
    let tones = branches.iter().map(|b| b.active.then_some(Tone::Good));
    // Whole lines are painted: escapes inside a cell would break the columns.
    lines
        .into_iter()
        .zip([Some(Tone::Faint)].into_iter().chain(tones))
        .map(|(line, tone)| match tone {
            Some(tone) => ui.paint(tone, &line),
            None => line,
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use clap::ColorChoice;

    use super::*;
    use crate::api::types::BranchState;
    use crate::types::{BranchId, BranchName};

    #[test]
    fn the_active_branch_is_marked_as_git_marks_its_own() {
        let branch = |name: &str, parent: Option<&str>, active| BranchInfo {
            id: BranchId::random(),
            name: BranchName::new(name).unwrap(),
            parent: parent.map(|p| BranchName::new(p).unwrap()),
            state: BranchState::Running,
            active,
            port: 15500,
            created_at: "long ago".into(),
            trashed_at: None,
            expires_at: None,
            failure: None,
            failure_hint: None,
        };
        let branches = [
            branch("main", None, false),
            branch("feature/x", Some("main"), true),
        ];
        let ui = Ui::new(ColorChoice::Never, false, false);
        assert_eq!(
            lines(ui, &branches, false),
            [
                "   NAME       STATE    PARENT  PORT   CREATED",
                "   main       running  -       15500  long ago",
                "*  feature/x  running  main    15500  long ago",
            ]
        );
        assert_eq!(
            lines(ui, &branches[..1], true),
            [
                "  NAME  PARENT  DELETED  DESTROYED",
                "  main  -       -        -"
            ]
        );
    }
}
