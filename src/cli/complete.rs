//! Completions, asked for by the shell while the user types.

use std::ffi::OsStr;
use std::time::Duration;

use clap_complete::CompletionCandidate;
use clap_complete::env::CompleteEnv;

use super::context;
use crate::api::client::{self, Client};
use crate::api::types::{BranchInfo, Request};
use crate::config::Paths;
use crate::git::Location;

/// The variable by which a shell's completion script asks.
pub(super) const VARIABLE: &str = "COMPLETE";
/// Nobody waits longer for a completion.
const LIMIT: Duration = Duration::from_millis(300);

/// Answers a shell that asks for completions; false when none does.
pub(super) fn answer() -> clap::error::Result<bool> {
    if std::env::var_os(VARIABLE).is_none() {
        return Ok(false);
    }
    let here = std::env::current_dir().ok();
    CompleteEnv::with_factory(super::command)
        .var(VARIABLE)
        .try_complete(std::env::args_os(), here.as_deref())
}

/// Branches whose names begin with what is typed. Starts no daemon.
pub(super) fn branches(typed: &OsStr) -> Vec<CompletionCandidate> {
    candidates(typed, false)
}

/// As [`branches`], in the trash.
pub(super) fn trashed(typed: &OsStr) -> Vec<CompletionCandidate> {
    candidates(typed, true)
}

fn candidates(typed: &OsStr, trash: bool) -> Vec<CompletionCandidate> {
    let typed = typed.to_string_lossy();
    list(trash)
        .unwrap_or_default()
        .into_iter()
        .filter(|branch| branch.name.as_str().starts_with(&*typed))
        .map(|branch| CompletionCandidate::new(branch.name.as_str()))
        .collect()
}

fn list(trash: bool) -> Option<Vec<BranchInfo>> {
    let here = std::env::current_dir().ok()?;
    let at = context::at(&Location::discover(&here).ok()?);
    let mut client = Client::connect(&Paths::resolve().ok()?).ok()??;
    let answer = client.call_within(LIMIT, &Request::List { at, trash }, drop);
    client::decode(answer.ok()?).ok()
}
