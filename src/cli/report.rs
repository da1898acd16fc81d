//! What a command ends with: a status, and where it went wrong an error with the next step.

use std::process::ExitCode;

use anyhow::anyhow;

use crate::api::client::{CallError, ConnectError};
use crate::api::types::{Failure, FailureKind};
use crate::config::ConfigError;
use crate::git::GitError;

/// How the process ends. `dbranch --help` documents the numbers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ExitStatus {
    /// Done, nothing to do, or the reader closed the pipe.
    Done = 0,
    /// Refused or failed.
    Refused = 1,
    /// The command line, a config file or a setting.
    Config = 2,
    /// The daemon can't be reached.
    Unreachable = 3,
    /// A bug in dbranch.
    Bug = 70,
    Interrupted = 130,
}

impl From<ExitStatus> for ExitCode {
    fn from(status: ExitStatus) -> Self {
        Self::from(status as u8)
    }
}

/// An error as the user sees it.
#[derive(Debug)]
pub struct Report {
    pub status: ExitStatus,
    pub error: anyhow::Error,
    /// The next command to run or the setting to change.
    pub hint: Option<String>,
}

impl Report {
    pub fn refused(error: impl Into<anyhow::Error>) -> Self {
        Self::new(ExitStatus::Refused, error)
    }

    pub fn new(status: ExitStatus, error: impl Into<anyhow::Error>) -> Self {
        Self {
            status,
            error: error.into(),
            hint: None,
        }
    }

    #[must_use]
    pub fn hint(mut self, hint: impl Into<String>) -> Self {
        self.hint = Some(hint.into());
        self
    }

    #[must_use]
    fn maybe_hint(mut self, hint: Option<String>) -> Self {
        self.hint = hint;
        self
    }
}

impl From<anyhow::Error> for Report {
    fn from(error: anyhow::Error) -> Self {
        Self::refused(error)
    }
}

impl From<ConfigError> for Report {
    fn from(error: ConfigError) -> Self {
        let hint = error.hint.clone();
        Self::new(ExitStatus::Config, error).maybe_hint(hint)
    }
}

impl From<GitError> for Report {
    fn from(error: GitError) -> Self {
        let hint = match &error {
            GitError::NotARepository(_) => {
                Some("go to your repository, or make one with `git init`".to_owned())
            }
            GitError::Unreadable { .. } => Some("see what `git status` says there".to_owned()),
            GitError::SharedHooksPath { .. } => Some(
                "give this repository hooks of its own with `git config --local core.hooksPath .git/hooks`, or call `dbranch hook post-checkout \"$@\"` from the shared hook"
                    .to_owned(),
            ),
            GitError::HooksSwitchedOff(_) => {
                Some("switch them on with `git config --local core.hooksPath .git/hooks`".to_owned())
            }
            GitError::DamagedHook { .. } => Some(
                "take the lines from `# >>> dbranch >>>` to `# <<< dbranch <<<` out by hand, then try again"
                    .to_owned(),
            ),
            _ => None,
        };
        Self::refused(error).maybe_hint(hint)
    }
}

impl From<Failure> for Report {
    fn from(failure: Failure) -> Self {
        let status = match failure.kind {
            FailureKind::Refused => ExitStatus::Refused,
            FailureKind::Config => ExitStatus::Config,
            FailureKind::Bug => ExitStatus::Bug,
        };
        Self::new(status, anyhow!(failure.message)).maybe_hint(failure.hint)
    }
}

impl From<CallError> for Report {
    fn from(error: CallError) -> Self {
        match error {
            CallError::Failed(failure) => failure.into(),
            CallError::Unclear(_) => Self::new(ExitStatus::Unreachable, error).hint(
                "it may be of another version: restart it with `dbranch shutdown` and `dbranch start --detach`",
            ),
            CallError::Broken(_) | CallError::Timeout(_) => {
                Self::new(ExitStatus::Unreachable, error)
                    .hint("see what became of it with `dbranch logs --daemon`, then try again")
            }
        }
    }
}

impl From<ConnectError> for Report {
    fn from(error: ConnectError) -> Self {
        match error {
            ConnectError::Place(error) => error.into(),
            ConnectError::Io { .. } => Self::new(ExitStatus::Unreachable, error)
                .hint("see `dbranch doctor`; the socket must belong to your user"),
        }
    }
}
