//! Reads git: HEAD, reflogs, ancestry; installs hooks; reports that HEAD moved.
//!
//! The only user of `git2` and `notify`, whose types don't leave this room. It
//! knows nothing of databases.

mod head;
mod hooks;
mod origin;
mod program;
mod reflog;
mod refs;
mod repo;
mod resolve;
#[cfg(test)]
mod testing;
mod watch;

use std::path::{Path, PathBuf};

use crate::types::{BranchName, Invalid};

pub use head::{head, operation};
pub use hooks::{HookState, HookStatus, Installation, Installed, Uninstalled};
pub use hooks::{install, status, uninstall};
pub use origin::{origin, renamed_from};
pub use repo::{branch_exists, branches, default_branch, worktree_top, worktrees};
pub use resolve::nearest;
pub use watch::{Change, Method, Watch, WatchEvent};

/// Where a path stands in git's world.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Location {
    /// The common git directory, canonical: what identifies a project.
    pub common_dir: PathBuf,
    /// The git directory of this worktree; equals `common_dir` in the main one.
    pub git_dir: PathBuf,
    /// The top of this worktree; none in a bare repository.
    pub worktree: Option<PathBuf>,
    /// The top of the main worktree; none where the repository is bare.
    pub main_worktree: Option<PathBuf>,
}

impl Location {
    pub fn is_linked_worktree(&self) -> bool {
        self.git_dir != self.common_dir
    }
}

/// What HEAD is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Head {
    Branch(BranchName),
    /// A commit, by its full hexadecimal id.
    Detached(String),
    /// A branch without a commit yet.
    Unborn(BranchName),
}

/// What git is in the middle of. While it is, HEAD says little.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Operation {
    Rebase,
    Bisect,
    CherryPick,
    Revert,
    Merge,
    Am,
}

/// What a new branch was made from, as the reflogs tell.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Origin {
    /// A branch by name: "Created from X", or HEAD while that branch was checked out.
    Branch(BranchName),
    /// Something else: a commit, a tag, a remote branch.
    Other(String),
}

#[derive(Debug, thiserror::Error)]
pub enum GitError {
    #[error("{} is not in a git repository", .0.display())]
    NotARepository(PathBuf),
    #[error("git can't open {}: {reason}", path.display())]
    Unreadable { path: PathBuf, reason: String },
    #[error("{action}: {reason}")]
    Failed { action: String, reason: String },
    #[error("{action} {}: {source}", path.display())]
    Io {
        action: &'static str,
        path: PathBuf,
        source: std::io::Error,
    },
    /// git allows the name, dbranch can't carry it (not UTF-8, or too long).
    #[error("git is on a branch dbranch can't follow: {0}")]
    BranchName(#[from] Invalid),
    /// `core.hooksPath` names a folder that other repositories use too.
    #[error(
        "git's hooks are in {}, set by core.hooksPath ({scope}): a hook there would run in other repositories too",
        path.display()
    )]
    SharedHooksPath { path: PathBuf, scope: String },
    /// `core.hooksPath` names no folder, which is how hooks are switched off.
    #[error("git's hooks are switched off: core.hooksPath is {}", .0.display())]
    HooksSwitchedOff(PathBuf),
    /// The markers around dbranch's lines are no pair any more.
    #[error("{} has dbranch's lines in pieces: {reason}", path.display())]
    DamagedHook { path: PathBuf, reason: &'static str },
}

impl GitError {
    fn io(action: &'static str, path: &Path, source: std::io::Error) -> Self {
        Self::Io {
            action,
            path: path.to_owned(),
            source,
        }
    }
}

#[cfg(test)]
mod tests;
