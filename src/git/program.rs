//! Runs the git program, for what its files don't tell: reftable, configuration.

use std::path::Path;
use std::process::{Command, Output, Stdio};

use super::GitError;

/// A git command that heeds the repository it is given and nothing around it.
///
/// Inherited `GIT_*` variables (hooks get `GIT_DIR` and friends) are dropped, and
/// so is what could make a reading command run a program of the repository's
/// choice: git itself refuses other people's repositories for fear of that.
fn command() -> Command {
    let mut command = Command::new("git");
    let kept = [
        "GIT_CONFIG_GLOBAL",
        "GIT_CONFIG_SYSTEM",
        "GIT_CONFIG_NOSYSTEM",
    ];
    for (name, _) in std::env::vars_os() {
        if let Some(name) = name.to_str()
            && name.starts_with("GIT_")
            && !kept.contains(&name)
        {
            command.env_remove(name);
        }
    }
    command
        .env("GIT_OPTIONAL_LOCKS", "0")
        .env("GIT_NO_LAZY_FETCH", "1")
        .env("GIT_TERMINAL_PROMPT", "0")
        .env("LC_ALL", "C")
        .args(["--no-pager", "-c", "core.fsmonitor=false"])
        .args(["-c", "protocol.allow=never"])
        .stdin(Stdio::null());
    command
}

/// Runs plumbing on a git directory. Returns nothing where git exits with 1,
/// its answer for "there is none".
///
/// A git directory named outright is exempt from git's ownership check
/// (git-config(1), `safe.directory`); the caller found it by its own means.
pub(super) fn plumbing(git_dir: &Path, arguments: &[&str]) -> Result<Option<Vec<u8>>, GitError> {
    let failed = |reason: String| GitError::Failed {
        action: format!("git {}", arguments.join(" ")),
        reason,
    };
    let Output {
        status,
        stdout,
        stderr,
    } = command()
        .arg("--git-dir")
        .arg(git_dir)
        .args(arguments)
        .output()
        .map_err(|e| failed(format!("the git program does not run: {e}")))?;
    match status.code() {
        Some(0) => Ok(Some(stdout)),
        Some(1) => Ok(None),
        _ => Err(failed(String::from_utf8_lossy(&stderr).trim().to_owned())),
    }
}

/// The first line of an answer, as text.
pub(super) fn first_line(answer: &[u8]) -> Option<String> {
    let line = answer.split(|b| *b == b'\n').next()?;
    (!line.is_empty()).then(|| String::from_utf8_lossy(line).into_owned())
}
