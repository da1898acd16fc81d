use std::env;
use std::ffi::{OsStr, OsString};
use std::fs::{self, OpenOptions};
use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::time::{Duration, Instant, SystemTime};

use clap::ColorChoice;

use super::how;
use crate::api::client::{self, CallError};
use crate::api::types::{HookOutcome, Request};
use crate::cli::context;
use crate::cli::render;
use crate::cli::report::{ExitStatus, Report};
use crate::cli::ui::Ui;
use crate::config::Paths;
use crate::git::Location;

/// How long git is kept waiting. The daemon goes on all the same.
const LIMIT: Duration = Duration::from_secs(5);
const LIMIT_VARIABLE: &str = "DBRANCH_HOOK_TIMEOUT";
/// The log of failed hooks begins anew beyond this.
const LOG_MAX_BYTES: u64 = 1 << 20;

/// Called by git's hooks
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Name of the hook
    event: OsString,
    /// What git told the hook
    #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
    args: Vec<OsString>,
}

pub(crate) fn run(args: &Args) -> ExitStatus {
    react(&args.event, &args.args)
}

/// Answers a hook's call without parsing the command line any further.
pub(crate) fn fast_path(args: &[OsString]) -> Option<ExitStatus> {
    match args {
        [_, hook, event, rest @ ..]
            if hook == "hook" && !event.to_string_lossy().starts_with('-') =>
        {
            Some(react(event, rest))
        }
        _ => None,
    }
}

/// Whatever happens, git goes on: the status is always 0. A hook this program does not know
/// was installed by a newer one.
fn react(event: &OsStr, args: &[OsString]) -> ExitStatus {
    // post-checkout <old> <new> <flag>; flag 0: only files (githooks(5)).
    if event == "post-checkout" && args.get(2).is_some_and(|flag| flag == "1") && !switched_off() {
        post_checkout();
    }
    ExitStatus::Done
}

fn switched_off() -> bool {
    env::var_os("DBRANCH_HOOKS").is_some_and(|v| v == "0")
        || env::var_os("DBRANCH_SKIP").is_some_and(|v| v == "1")
}

fn post_checkout() {
    let Some(location) = location() else {
        return;
    };
    // Not a project of this user's: nothing to say and no daemon to start.
    if !context::is_marked(&location) {
        return;
    }
    let ui = Ui::new(ColorChoice::Never, false, false);
    match report(&location) {
        Ok(Some(line)) => ui.err(format_args!("dbranch: {line}")),
        Ok(None) => {}
        Err(report) => {
            let hint = report
                .hint
                .map_or(String::new(), |hint| format!(" ({hint})"));
            let line = format!("{:#}{hint}", report.error);
            log(&location.common_dir, &line);
            let line = line.replace('\n', " ");
            ui.err(format_args!("dbranch: {line}"));
        }
    }
}

/// The repository git runs the hook for. Git starts it at the worktree's top; `GIT_DIR`
/// differs from what is found there with `git --git-dir`.
fn location() -> Option<Location> {
    let here = env::current_dir().ok()?;
    let found = Location::discover(&here).ok();
    let Some(git_dir) = env::var_os("GIT_DIR").filter(|dir| !dir.is_empty()) else {
        return found;
    };
    let git_dir = fs::canonicalize(here.join(git_dir)).ok()?;
    match found {
        Some(location) if location.git_dir == git_dir => Some(location),
        _ => Location::discover(&git_dir).ok(),
    }
}

fn report(location: &Location) -> Result<Option<String>, Report> {
    let limit = limit();
    let until = Instant::now() + limit;
    let paths = Paths::resolve()?;
    let request = Request::Hook {
        at: context::at(location),
    };
    let ask = || -> Result<_, Report> {
        let mut client = context::connect_or_start(&paths, limit)?;
        let left = until.saturating_duration_since(Instant::now());
        Ok(client.call_within(left, &request, drop))
    };
    let answer = match ask()? {
        // The daemon died under it: the next one takes up where it left off.
        Err(CallError::Broken(_)) => ask()?,
        answer => answer,
    };
    match answer {
        Ok(answer) => Ok(line(&client::decode(answer)?)),
        Err(CallError::Timeout(_)) => Ok(Some(format!(
            "not done after {limit:?}; it goes on in the background, see `dbranch status`"
        ))),
        Err(e) => Err(e.into()),
    }
}

fn limit() -> Duration {
    env::var(LIMIT_VARIABLE)
        .ok()
        .and_then(|text| parse_limit(&text))
        .unwrap_or(LIMIT)
}

/// `500ms`, `10s` or a number of seconds.
fn parse_limit(text: &str) -> Option<Duration> {
    let seconds = text.parse().ok().map(Duration::from_secs);
    seconds.or_else(|| humantime::parse_duration(text).ok())
}

/// What happened, in one line; nothing when nothing did.
fn line(outcome: &HookOutcome) -> Option<String> {
    let mut parts = Vec::new();
    match (&outcome.created, &outcome.switched) {
        (Some(created), _) => {
            let parent = created.branch.parent.as_ref();
            let from = parent.map_or(String::new(), |parent| format!(" <- {parent}"));
            parts.push(format!("{}{from} ({})", created.branch.name, how(created)));
        }
        (None, Some(switched)) if switched.changed => parts.push(format!(
            "switched to {} ({})",
            switched.branch,
            render::millis(switched.duration_ms)
        )),
        _ => {}
    }
    parts.extend(outcome.notes.iter().cloned());
    (!parts.is_empty()).then(|| parts.join("; "))
}

/// Keeps what a person may have missed in git's own output. That it can't be written is
/// no reason to fail.
fn log(common_dir: &Path, line: &str) {
    let Ok(paths) = Paths::resolve() else {
        return;
    };
    let path = paths.hook_log();
    let full = fs::metadata(&path).is_ok_and(|meta| meta.len() > LOG_MAX_BYTES);
    let file = OpenOptions::new()
        .create(true)
        .write(true)
        .append(!full)
        .truncate(full)
        .mode(0o600)
        .open(&path);
    if let Ok(mut file) = file {
        let now = humantime::format_rfc3339_seconds(SystemTime::now());
        let _ = writeln!(file, "{now} {}: {line}", common_dir.display());
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::api::types::{BranchInfo, BranchState, Created, Switched};
    use crate::types::{BranchId, BranchName};

    fn name(name: &str) -> BranchName {
        BranchName::new(name).unwrap()
    }

    fn switched(changed: bool) -> Switched {
        Switched {
            branch: name("main"),
            previous: Some(name("feature/login")),
            changed,
            duration_ms: 3.1,
        }
    }

    #[test]
    fn one_line_says_what_happened() {
        let branch = BranchInfo {
            id: BranchId::random(),
            name: name("feature/login"),
            parent: Some(name("main")),
            state: BranchState::Creating,
            active: true,
            port: 15501,
            created_at: String::new(),
            trashed_at: None,
            expires_at: None,
            failure: None,
            failure_hint: None,
        };
        let created = Created {
            branch,
            method: "btrfs snapshot".into(),
            storage: "btrfs".into(),
            runtime: "native".into(),
            postgres_version: 15,
            duration_ms: 12.2,
        };
        let mut outcome = HookOutcome {
            created: Some(created),
            switched: Some(switched(true)),
            notes: vec![],
        };
        let says = |outcome: &HookOutcome| line(outcome).unwrap_or_default();
        assert_eq!(
            says(&outcome),
            "feature/login <- main (btrfs snapshot, 12 ms)"
        );
        outcome.created = None;
        assert_eq!(says(&outcome), "switched to main (3 ms)");
        outcome.switched = Some(switched(false));
        assert_eq!(line(&outcome), None);
        outcome.notes = vec!["HEAD is detached: the database stays on main".into()];
        assert_eq!(
            says(&outcome),
            "HEAD is detached: the database stays on main"
        );
    }

    #[test]
    fn any_hook_is_answered_and_help_is_not_a_hook() {
        let args = |text: &str| text.split(' ').map(OsString::from).collect::<Vec<_>>();
        let done = Some(ExitStatus::Done);
        assert_eq!(fast_path(&args("dbranch hook post-checkout a b 0")), done);
        assert_eq!(fast_path(&args("dbranch hook post-rewrite x")), done);
        assert_eq!(fast_path(&args("dbranch hook --help")), None);
        assert_eq!(fast_path(&args("dbranch list")), None);
        assert_eq!(fast_path(&args("dbranch")), None);
    }

    #[test]
    fn the_limit_is_seconds_or_a_duration() {
        assert_eq!(parse_limit("2"), Some(Duration::from_secs(2)));
        assert_eq!(parse_limit("500ms"), Some(Duration::from_millis(500)));
        assert_eq!(parse_limit("soon"), None);
    }
}
