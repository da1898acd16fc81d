//! Why the engine did not do a thing.

use std::path::Path;

use super::trouble::Trouble;
use crate::config::ConfigError;
use crate::git::GitError;
use crate::postgres::{AdminError, BadSetting, ClusterError};
use crate::registry::{BranchRecord, RegistryError};
use crate::runtime::RuntimeError;
use crate::storage::StorageError;
use crate::types::BranchName;

/// What kind of failure: it decides the exit status.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// The state forbids it, or the world did not play along.
    Refused,
    /// The configuration is at fault.
    Config,
    /// dbranch is at fault.
    Bug,
}

/// A failure that a user can read: what and why, and the next thing to do.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub struct EngineError {
    pub kind: Kind,
    pub message: String,
    pub hint: Option<String>,
}

impl EngineError {
    pub(crate) fn refused(message: impl Into<String>) -> Self {
        Self {
            kind: Kind::Refused,
            message: message.into(),
            hint: None,
        }
    }

    pub(crate) fn config(message: impl Into<String>) -> Self {
        Self {
            kind: Kind::Config,
            message: message.into(),
            hint: None,
        }
    }

    /// A word that stands for nothing known; the message says what there is.
    pub(crate) fn unknown_word(message: impl Into<String>) -> Self {
        Self::refused(message).hint("see the command's `--help`")
    }

    pub(crate) fn bug(message: impl Into<String>) -> Self {
        Self {
            kind: Kind::Bug,
            message: message.into(),
            hint: Some("please report this, with `dbranch logs --daemon`".into()),
        }
    }

    #[must_use]
    pub(crate) fn hint(mut self, hint: impl Into<String>) -> Self {
        self.hint = Some(hint.into());
        self
    }

    /// Names the branch it happened to, and where to read on, unless it does already.
    #[must_use]
    pub(crate) fn about_branch(mut self, name: &BranchName) -> Self {
        if !self.message.contains(name.as_str()) {
            self.message = format!("branch `{name}` can't be started: {}", self.message);
        }
        self.hint
            .get_or_insert_with(|| format!("dbranch logs {name}"));
        self
    }

    /// Message and next step, for where there is one line.
    pub(crate) fn in_one_line(&self) -> String {
        match &self.hint {
            Some(hint) => format!("{} ({hint})", self.message),
            None => self.message.clone(),
        }
    }

    /// Where a disk is at fault, says what mends it.
    #[must_use]
    pub(crate) fn about_pool(mut self, pool: &Path) -> Self {
        self.hint = self.hint.or_else(|| disk_hint(&self.message, pool));
        self
    }

    /// [`EngineError::about_pool`] of a branch that can be started again then.
    #[must_use]
    pub(crate) fn about_disk_of(mut self, branch: &BranchRecord) -> Self {
        if self.hint.is_none()
            && let Some(trouble) = Trouble::in_text(&self.message)
        {
            self.hint = Some(trouble.hint(&branch.pool, Some(&branch.name)));
        }
        self
    }

    /// Says what to look at where nothing better is known.
    #[must_use]
    pub(crate) fn or_hint(mut self, hint: &str) -> Self {
        self.hint.get_or_insert_with(|| hint.into());
        self
    }

    /// Names the parent whose clone failed, and what to look at.
    #[must_use]
    pub(crate) fn while_cloning(mut self, parent: &BranchName) -> Self {
        self.message = format!("`{parent}` can't be cloned: {}", self.message);
        self.hint.get_or_insert_with(|| "dbranch doctor".into());
        self
    }

    pub(crate) fn io(action: &str, path: &Path, e: &std::io::Error) -> Self {
        let message = format!("{action} {}: {e}", path.display());
        Self {
            kind: Kind::Refused,
            hint: disk_hint(&message, path),
            message,
        }
    }

    pub(crate) fn no_root() -> Self {
        Self::refused("this project has no database branch yet").hint("dbranch init-postgres")
    }
}

impl From<ConfigError> for EngineError {
    fn from(e: ConfigError) -> Self {
        Self {
            kind: Kind::Config,
            message: e.to_string(),
            hint: e.hint,
        }
    }
}

impl From<RegistryError> for EngineError {
    fn from(e: RegistryError) -> Self {
        let hint = match &e {
            RegistryError::NameTaken(name) => Some(format!("dbranch use {name}")),
            RegistryError::NoPort { .. } => Some(
                "widen port_min and port_max in .dbranch.config.json, or destroy branches (those in the trash \
                 keep their ports): dbranch delete --now NAME"
                    .into(),
            ),
            RegistryError::Newer { .. } => Some("use the newer dbranch".into()),
            RegistryError::ProjectGone => Some("dbranch init".into()),
            RegistryError::Sqlite(_) if e.is_out_of_room() => {
                Some("free some room where dbranch keeps its state; `dbranch doctor` names the folder".into())
            }
            RegistryError::Elsewhere => Some("dbranch list".into()),
            RegistryError::Sqlite(_) | RegistryError::Open { .. } => None,
        };
        Self {
            kind: Kind::Refused,
            message: e.to_string(),
            hint,
        }
    }
}

impl From<StorageError> for EngineError {
    fn from(e: StorageError) -> Self {
        let message = e.to_string();
        let hint = e.hint().or_else(|| match &e {
            StorageError::Io { path, .. } => disk_hint(&message, path),
            _ => None,
        });
        Self {
            kind: Kind::Refused,
            message,
            hint,
        }
    }
}

impl From<crate::storage::image::Refused> for EngineError {
    fn from(e: crate::storage::image::Refused) -> Self {
        Self::refused(e.message).hint(e.hint)
    }
}

/// What mends a disk that a message complains of.
fn disk_hint(message: &str, path: &Path) -> Option<String> {
    Some(Trouble::in_text(message)?.hint(path, None))
}

impl From<RuntimeError> for EngineError {
    fn from(e: RuntimeError) -> Self {
        let hint = match &e {
            RuntimeError::Unavailable(_) => {
                Some("start Docker, or use this machine's postgres: DBRANCH_RUNTIME=native")
            }
            other => other.hint(),
        };
        Self {
            kind: Kind::Refused,
            hint: hint.map(Into::into),
            message: e.to_string(),
        }
    }
}

impl From<ClusterError> for EngineError {
    fn from(e: ClusterError) -> Self {
        let message = e.to_string();
        let hint = e.hint().or_else(|| match &e {
            ClusterError::Io { path, .. } => disk_hint(&message, path),
            _ => None,
        });
        Self {
            kind: Kind::Refused,
            message,
            hint,
        }
    }
}

impl From<AdminError> for EngineError {
    fn from(e: AdminError) -> Self {
        let refused = Self::refused(e.to_string());
        // SQLSTATE disk_full.
        if refused.message.contains("[53100]") {
            return refused.hint("free some room in the pool; dbranch usage");
        }
        refused
    }
}

impl From<BadSetting> for EngineError {
    fn from(e: BadSetting) -> Self {
        Self::config(e.to_string())
            .hint("change it under postgres.settings in .dbranch.config.json")
    }
}

impl From<GitError> for EngineError {
    fn from(e: GitError) -> Self {
        Self::refused(e.to_string())
    }
}
