//! What the user and the team have set, and where things lie on this machine.
//!
//! [`Paths`] knows every folder and file of one user, [`ProjectConfig`] is the
//! file a team commits, [`Machine`] what only this machine decides. A wrong value
//! is an error that names the key, its place and what is allowed. The only user
//! of `dirs`.

mod json;
mod machine;
mod paths;
mod project;
mod rules;
mod values;

use std::path::PathBuf;

pub use json::nearest as nearest_word;
pub use machine::{Machine, Origin, Setting};
pub use paths::Paths;
pub use project::{Commands, DetachedHead, FILE_NAME, GitConfig, PostgresConfig, ProjectConfig};
pub use rules::name_from;

/// A setting, a config file or a place that can't be used. The text is fit for users.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub struct ConfigError {
    pub kind: ConfigErrorKind,
    pub message: String,
    /// The setting to change or the command to run.
    pub hint: Option<String>,
}

/// What callers may want to tell apart.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ConfigErrorKind {
    /// The file does not exist.
    Missing(PathBuf),
    /// It exists, or should be made, and the system said no.
    Io,
    /// Its content, or a variable's, is not allowed.
    Invalid,
}

impl ConfigError {
    fn invalid(message: impl Into<String>) -> Self {
        Self {
            kind: ConfigErrorKind::Invalid,
            message: message.into(),
            hint: None,
        }
    }

    fn io(action: &str, path: &std::path::Path, source: &std::io::Error) -> Self {
        Self {
            kind: ConfigErrorKind::Io,
            message: format!("{action} {}: {source}", path.display()),
            hint: None,
        }
    }

    fn with_hint(mut self, hint: impl Into<String>) -> Self {
        self.hint = Some(hint.into());
        self
    }

    /// Whether the file simply isn't there.
    pub fn is_missing(&self) -> bool {
        matches!(self.kind, ConfigErrorKind::Missing(_))
    }
}
