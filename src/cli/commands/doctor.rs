use serde_json::Value;

use crate::api::client;
use crate::api::types::{Finding, Level, Request};
use crate::cli::context::{self, Context, VERSION};
use crate::cli::report::{ExitStatus, Report};
use crate::cli::ui::{Tone, Ui};
use crate::config::{Machine, Origin, ProjectConfig};
use crate::git::Location;

const EXAMPLES: &str = "\
Examples:
  dbranch doctor
  dbranch doctor --json | jq -r '.[] | select(.what == \"read-only\") | .fix'
  dbranch doctor --json | jq '.[] | select(.level != \"ok\")'";

/// Look for what keeps dbranch from working, and tell what mends it
///
/// Looks at the machine, at every pool that holds branches, and at the project you stand in. Below each
/// finding stands the command that mends it. Ends with 1 when there is a problem.
#[derive(Debug, clap::Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct Args {}

pub(crate) fn run(cx: &Context, _: &Args) -> Result<ExitStatus, Report> {
    let mut findings = local(cx);
    match remote(cx) {
        Ok(more) => findings.extend(more),
        Err(report) => findings.push(finding_of("daemon", report)),
    }
    if cx.ui.json {
        cx.ui.answer_json(&findings)?;
    } else {
        show(cx.ui, &findings)?;
    }
    let problem = findings.iter().any(|f| f.level == Level::Problem);
    Ok(if problem {
        ExitStatus::Refused
    } else {
        ExitStatus::Done
    })
}

/// One line a finding, and below it what mends it.
pub(super) fn show(ui: Ui, findings: &[Finding]) -> Result<(), Report> {
    let width = findings
        .iter()
        .map(|f| f.what.chars().count())
        .max()
        .unwrap_or(0);
    for finding in findings {
        let (tone, word) = match finding.level {
            Level::Ok => (Tone::Good, "ok     "),
            Level::Warning => (Tone::Warning, "warning"),
            Level::Problem => (Tone::Bad, "problem"),
        };
        let word = ui.paint(tone, word);
        ui.answer(format_args!(
            "{word}  {:width$}  {}",
            finding.what, finding.detail
        ))?;
        if let Some(fix) = &finding.fix {
            ui.answer(format_args!("{:9}{:width$}  {fix}", "", ""))?;
        }
    }
    Ok(())
}

/// What the daemon finds, from where the user stands.
pub(super) fn remote(cx: &Context) -> Result<Vec<Finding>, Report> {
    let at = Location::discover(&cx.dir).ok().filter(|location| {
        context::is_marked(location) || context::config_file(location).is_some()
    });
    let at = at.as_ref().map(context::at);
    let value: Value = cx.call(&Request::Doctor { at })?;
    Ok(client::decode(value)?)
}

/// What can be seen without the daemon.
fn local(cx: &Context) -> Vec<Finding> {
    let mut findings = vec![
        ok("program", format!("dbranch {VERSION}")),
        ok("data", format!("{}", cx.paths.state_dir().display())),
    ];
    findings.push(match Machine::load(&cx.paths) {
        Ok(machine) => {
            let of =
                |name: &str, value: &str, origin: &Origin| format!("{name} {value} ({origin})");
            let pool = machine
                .pool
                .value
                .as_deref()
                .unwrap_or(cx.paths.default_pool());
            ok(
                "settings",
                [
                    of("storage", &machine.storage.value, &machine.storage.origin),
                    of("runtime", &machine.runtime.value, &machine.runtime.origin),
                    of("pool", &pool.display().to_string(), &machine.pool.origin),
                ]
                .join(", "),
            )
        }
        Err(e) => finding_of("settings", e.into()),
    });
    let location = match Location::discover(&cx.dir) {
        Ok(location) => location,
        Err(e) => {
            findings.push(Finding {
                level: Level::Warning,
                ..finding_of("repository", e.into())
            });
            return findings;
        }
    };
    let top = location.worktree.as_ref().unwrap_or(&location.git_dir);
    findings.push(ok("repository", top.display().to_string()));
    match context::config_file(&location) {
        Some(file) => findings.push(match ProjectConfig::load(&file) {
            Ok(config) => ok(
                "config",
                format!("{} (project `{}`)", file.display(), config.name),
            ),
            Err(e) => finding_of("config", e.into()),
        }),
        None => findings.push(Finding {
            what: "config".into(),
            level: Level::Warning,
            detail: "this repository is not a project yet".into(),
            fix: Some("make it one with `dbranch init`".into()),
        }),
    }
    findings.push(super::install_hooks::finding(&location));
    findings
}

fn ok(what: &str, detail: String) -> Finding {
    Finding {
        what: what.into(),
        level: Level::Ok,
        detail,
        fix: None,
    }
}

pub(super) fn finding_of(what: &str, report: Report) -> Finding {
    Finding {
        what: what.into(),
        level: Level::Problem,
        detail: format!("{:#}", report.error),
        fix: report.hint,
    }
}
