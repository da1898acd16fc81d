//! What HEAD is, and what git is in the middle of.

use std::path::Path;

use super::refs::{self, Value};
use super::{GitError, Head, Operation, program, repo};

/// Reads HEAD of one worktree, by its git directory.
///
/// One or two small file reads; with reftables, where `HEAD` is a stub, two runs
/// of the git program. `NotARepository` when the git directory is gone.
pub fn head(git_dir: &Path) -> Result<Head, GitError> {
    let path = git_dir.join("HEAD");
    let Some(value) = refs::read_loose(&path)? else {
        return Err(GitError::NotARepository(git_dir.to_owned()));
    };
    match value {
        Value::Id(id) => Ok(Head::Detached(id)),
        Value::Symbolic(target) if target == "refs/heads/.invalid" => head_by_program(git_dir),
        Value::Symbolic(target) => {
            let common_dir = repo::common_dir(git_dir)?;
            let id = refs::resolve(&common_dir, &target)?;
            from_target(git_dir, &target, id)
        }
    }
}

fn head_by_program(git_dir: &Path) -> Result<Head, GitError> {
    let line = |arguments: &[&str]| -> Result<Option<String>, GitError> {
        let answer = program::plumbing(git_dir, arguments)?;
        Ok(answer.as_deref().and_then(program::first_line))
    };
    let id = line(&["rev-parse", "-q", "--verify", "HEAD"])?;
    match (line(&["symbolic-ref", "-q", "HEAD"])?, id) {
        (Some(target), id) => from_target(git_dir, &target, id),
        (None, Some(id)) => Ok(Head::Detached(id)),
        (None, None) => Err(no_head(git_dir, "it leads nowhere")),
    }
}

fn from_target(git_dir: &Path, target: &str, id: Option<String>) -> Result<Head, GitError> {
    match (refs::branch_of(target), id) {
        (Some(branch), Some(_)) => Ok(Head::Branch(branch?)),
        (Some(branch), None) => Ok(Head::Unborn(branch?)),
        // `git symbolic-ref HEAD refs/something` is possible, and no branch.
        (None, Some(id)) => Ok(Head::Detached(id)),
        (None, None) => Err(no_head(git_dir, "it leads to no branch and no commit")),
    }
}

fn no_head(git_dir: &Path, reason: &str) -> GitError {
    GitError::Unreadable {
        path: git_dir.join("HEAD"),
        reason: reason.to_owned(),
    }
}

/// What git is in the middle of in this worktree, by the files it keeps meanwhile
/// (the list is that of git's `wt-status.c`).
///
/// A rebase counts first: it cherry-picks and merges on its way.
pub fn operation(git_dir: &Path) -> Option<Operation> {
    let has = |name: &str| git_dir.join(name).exists();
    if has("rebase-merge") {
        Some(Operation::Rebase)
    } else if has("rebase-apply") {
        Some(if has("rebase-apply/applying") {
            Operation::Am
        } else {
            Operation::Rebase
        })
    } else if has("CHERRY_PICK_HEAD") {
        Some(Operation::CherryPick)
    } else if has("REVERT_HEAD") {
        Some(Operation::Revert)
    } else if has("MERGE_HEAD") {
        Some(Operation::Merge)
    } else if has("BISECT_LOG") {
        Some(Operation::Bisect)
    } else {
        None
    }
}
