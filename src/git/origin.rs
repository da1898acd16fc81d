//! What a branch was made from, as the reflogs tell.

use std::path::Path;

use super::reflog::{self, Entry};
use super::{GitError, Head, Location, Origin, head, refs, repo};
use crate::types::BranchName;

/// How long after a branch's reflog begins git may write the checkout into HEAD's.
const CHECKOUT_LAG_SECONDS: i64 = 2;

/// How far back in a log to look beyond a moment: clocks are set back sometimes.
const CLOCK_SLACK_SECONDS: i64 = 60;

/// Returns what the branch was made from, or last reset to with `checkout -B` or
/// `branch -f`; none where no reflog tells.
///
/// git notes the start point as it was typed ("branch: Created from X"), and HEAD
/// where nothing was typed. Then HEAD's own log says which branch was checked out:
/// that of the worktree in `location` is believed first, then the other ones'.
/// Names are those that the branches carry now, where a rename is on record.
pub fn origin(location: &Location, branch: &BranchName) -> Result<Option<Origin>, GitError> {
    let history = History { location, branch };
    // What the branch was called at the time of the entry under the eye.
    let mut name = branch.as_str().to_owned();
    for entry in reflog::of_branch(&location.common_dir, branch)? {
        let entry = entry?;
        if let Some((from, to)) = entry.rename() {
            if to == name {
                from.clone_into(&mut name);
            }
        } else if let Some((from, to)) = entry.copy()
            && to == name
        {
            return history.branch_then(from, &entry).map(Some);
        } else if let Some(start) = entry.start_point()
            && let Some(origin) = history.start_point(start, &name, &entry)?
        {
            return Ok(Some(origin));
        }
    }
    Ok(None)
}

/// The name the branch had before its last rename, where its reflog tells.
pub fn renamed_from(
    common_dir: &Path,
    branch: &BranchName,
) -> Result<Option<BranchName>, GitError> {
    for entry in reflog::of_branch(common_dir, branch)? {
        let entry = entry?;
        if let Some((from, to)) = entry.rename()
            && to == branch.as_str()
        {
            return Ok(BranchName::new(from).ok());
        }
    }
    Ok(None)
}

struct History<'a> {
    location: &'a Location,
    branch: &'a BranchName,
}

impl History<'_> {
    /// What a start point meant when `made` was written; none where it was the
    /// branch itself, called `name` then, which says nothing of its origin.
    fn start_point(
        &self,
        start: &str,
        name: &str,
        made: &Entry,
    ) -> Result<Option<Origin>, GitError> {
        // JGit (Eclipse, and others) writes "Created from branch X".
        if let Some(other) = ["commit ", "tag ", "remote branch "]
            .iter()
            .find_map(|kind| start.strip_prefix(kind))
        {
            return Ok(Some(Origin::Other(other.to_owned())));
        }
        let start = start.strip_prefix("branch ").unwrap_or(start);
        let plain = ["^0", "~0", "^{commit}", "^{}"]
            .iter()
            .find_map(|suffix| start.strip_suffix(suffix))
            .unwrap_or(start);
        let from = match plain {
            "HEAD" | "@" => return self.head_then(name, made),
            "-" => self.previous_then(1, name, made)?,
            _ => match previous_number(plain) {
                Some(number) => self.previous_then(number, name, made)?,
                None => Some(plain.to_owned()),
            },
        };
        match from {
            Some(from) if self.stands_for(&from, name)? => Ok(None),
            Some(from) => self.named_then(&from, made).map(Some),
            None => Ok(Some(Origin::Other(start.to_owned()))),
        }
    }

    fn stands_for(&self, typed: &str, name: &str) -> Result<bool, GitError> {
        Ok(typed.strip_prefix("refs/heads/") == Some(name)
            || typed == name && !self.exists("refs/tags/", typed)?)
    }

    fn exists(&self, prefix: &str, name: &str) -> Result<bool, GitError> {
        // Only a valid name may become a path.
        match BranchName::new(name) {
            Ok(name) => refs::exists(&self.location.common_dir, &format!("{prefix}{name}")),
            Err(_) => Ok(false),
        }
    }

    /// What a name that someone typed stands for: git's order (gitrevisions(7)) is
    /// the full name, a tag, a branch, a remote's branch. A name that is nothing
    /// any more was a branch, unless it looks like a commit's id.
    fn named_then(&self, typed: &str, made: &Entry) -> Result<Origin, GitError> {
        if let Some(name) = typed.strip_prefix("refs/heads/") {
            return self.branch_then(name, made);
        }
        let other = || Ok(Origin::Other(typed.to_owned()));
        let name = match typed.strip_prefix("heads/") {
            Some(name) if !self.exists("refs/heads/", typed)? => name,
            _ => typed,
        };
        if typed.starts_with("refs/") || refs::is_id(typed) || self.exists("refs/tags/", typed)? {
            return other();
        }
        if !self.exists("refs/heads/", name)? {
            let like_id = name.len() >= 4 && name.bytes().all(|b| b.is_ascii_hexdigit());
            if like_id || self.exists("refs/remotes/", typed)? {
                return other();
            }
        }
        self.branch_then(name, made)
    }

    /// The branch that was called `name` when `made` was written, by today's name.
    fn branch_then(&self, name: &str, made: &Entry) -> Result<Origin, GitError> {
        let Ok(mut branch) = BranchName::new(name) else {
            return Ok(Origin::Other(name.to_owned()));
        };
        let common_dir = &self.location.common_dir;
        let mut since = made.time;
        // A chain of renames is finite, a circle of them is not.
        for _ in 0..8 {
            if repo::branch_exists(common_dir, &branch)? {
                break;
            }
            match renamed_since(common_dir, &branch, since)? {
                Some((renamed, time)) => (branch, since) = (renamed, time),
                None => break,
            }
        }
        Ok(if branch == *self.branch {
            // Renamed to the name of its own child: nothing to go by.
            Origin::Other(made.new.clone())
        } else {
            Origin::Branch(branch)
        })
    }

    /// What HEAD was when `made` was written.
    fn head_then(&self, name: &str, made: &Entry) -> Result<Option<Origin>, GitError> {
        let git_dirs = self.git_dirs()?;
        for git_dir in &git_dirs {
            if let Some(from) = self.checkout_that_made(git_dir, name, made)? {
                if from == name {
                    return Ok(None);
                }
                return self.checked_out(&from, made).map(Some);
            }
        }
        // No checkout: `git branch` or `git worktree add`, run where HEAD was this
        // commit. The new branch's own worktree is not where it was run.
        for git_dir in &git_dirs {
            match self.head_at(git_dir, made)? {
                Some(from) if from != name => return self.checked_out(&from, made).map(Some),
                _ => {}
            }
        }
        Ok(Some(Origin::Other(made.new.clone())))
    }

    /// A branch's short name or a commit's id, as git puts it into HEAD's log.
    fn checked_out(&self, from: &str, made: &Entry) -> Result<Origin, GitError> {
        if refs::is_id(from) {
            Ok(Origin::Other(from.to_owned()))
        } else {
            self.branch_then(from, made)
        }
    }

    /// This worktree's git directory, the main one's, then the others'.
    fn git_dirs(&self) -> Result<Vec<std::path::PathBuf>, GitError> {
        let mut all = vec![self.location.git_dir.clone()];
        let mut linked = repo::linked_git_dirs(&self.location.common_dir)?;
        linked.sort();
        for git_dir in std::iter::once(self.location.common_dir.clone()).chain(linked) {
            if !all.contains(&git_dir) {
                all.push(git_dir);
            }
        }
        Ok(all)
    }

    /// Where the checkout that made the branch came from, if it was done in this
    /// worktree. The last one that fits counts: a name may have been used before.
    fn checkout_that_made(
        &self,
        git_dir: &Path,
        name: &str,
        made: &Entry,
    ) -> Result<Option<String>, GitError> {
        for entry in reflog::of_head(&self.location.common_dir, git_dir)? {
            let entry = entry?;
            if entry.time < made.time - CLOCK_SLACK_SECONDS {
                break;
            }
            let lag = entry.time - made.time;
            if let Some((from, to)) = entry.checkout()
                && to == name
                && entry.new == made.new
                && (0..=CHECKOUT_LAG_SECONDS).contains(&lag)
                // What does not exist yet can't be left.
                && (from != to || made.is_reset())
            {
                return Ok(Some(from.to_owned()));
            }
        }
        Ok(None)
    }

    /// What HEAD of a worktree was when `made` was written, if it was at the same
    /// commit: a branch's name or a commit's id.
    fn head_at(&self, git_dir: &Path, made: &Entry) -> Result<Option<String>, GitError> {
        let mut now = match head(git_dir) {
            Ok(Head::Branch(branch) | Head::Unborn(branch)) => branch.into(),
            Ok(Head::Detached(id)) => id,
            Err(_) => return Ok(None),
        };
        for entry in reflog::of_head(&self.location.common_dir, git_dir)? {
            let entry = entry?;
            if entry.time <= made.time {
                let in_rebase = entry.message.starts_with("rebase")
                    && !["(finish)", "(abort)"]
                        .iter()
                        .any(|end| entry.message.contains(end));
                let then = if in_rebase { &entry.new } else { &now };
                return Ok((entry.new == made.new).then(|| then.clone()));
            }
            if let Some((from, _)) = entry.checkout().or_else(|| entry.rename()) {
                from.clone_into(&mut now);
            }
        }
        Ok(None)
    }

    /// What `@{-number}` meant in this worktree when `made` was written.
    fn previous_then(
        &self,
        number: usize,
        name: &str,
        made: &Entry,
    ) -> Result<Option<String>, GitError> {
        let mut left = number;
        for entry in reflog::of_head(&self.location.common_dir, &self.location.git_dir)? {
            let entry = entry?;
            let Some((from, to)) = entry.checkout() else {
                continue;
            };
            // Neither what came after nor the checkout of the new branch itself.
            if entry.time > made.time || (to == name && entry.new == made.new) {
                continue;
            }
            left -= 1;
            if left == 0 {
                return Ok(Some(from.to_owned()));
            }
        }
        Ok(None)
    }
}

/// The N of `@{-N}`.
fn previous_number(start: &str) -> Option<usize> {
    let number = start.strip_prefix("@{-")?.strip_suffix('}')?;
    number.parse().ok().filter(|n| *n > 0)
}

/// The branch that carries, since a moment, the history of one that is gone; and
/// when it was renamed.
fn renamed_since(
    common_dir: &Path,
    gone: &BranchName,
    since: i64,
) -> Result<Option<(BranchName, i64)>, GitError> {
    for branch in repo::branches(common_dir)? {
        for entry in reflog::of_branch(common_dir, &branch)? {
            let entry = entry?;
            if entry.time < since - CLOCK_SLACK_SECONDS {
                break;
            }
            if entry.time >= since
                && let Some((from, to)) = entry.rename()
                && from == gone.as_str()
            {
                return Ok(BranchName::new(to).ok().map(|to| (to, entry.time)));
            }
        }
    }
    Ok(None)
}
