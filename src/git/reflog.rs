//! Reads reflogs from their end: what is asked for is nearly always recent, and a
//! HEAD of some years has megabytes of log.

use std::fs::File;
use std::io::{ErrorKind, Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};

use super::refs;
use super::{GitError, program};
use crate::types::BranchName;

const BLOCK_BYTES: u64 = 16 * 1024;

/// One line of a reflog.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Entry {
    /// The commit after the event, full hexadecimal; zeros where the ref went away.
    pub(super) new: String,
    /// Seconds since 1970, as the one who did it had it on his clock.
    pub(super) time: i64,
    pub(super) message: String,
}

impl Entry {
    /// The names in "checkout: moving from A to B".
    pub(super) fn checkout(&self) -> Option<(&str, &str)> {
        self.message
            .strip_prefix("checkout: moving from ")?
            .split_once(" to ")
    }

    /// The names in "Branch: renamed refs/heads/A to refs/heads/B".
    pub(super) fn rename(&self) -> Option<(&str, &str)> {
        two_branches(self.message.strip_prefix("Branch: renamed ")?)
    }

    /// The names in "Branch: copied refs/heads/A to refs/heads/B".
    pub(super) fn copy(&self) -> Option<(&str, &str)> {
        two_branches(self.message.strip_prefix("Branch: copied ")?)
    }

    /// Whether a branch that was there before got another start point.
    pub(super) fn is_reset(&self) -> bool {
        self.message.starts_with("branch: Reset to ")
    }

    /// The start point in "branch: Created from X" or "branch: Reset to X".
    pub(super) fn start_point(&self) -> Option<&str> {
        let event = self.message.strip_prefix("branch: ")?;
        event
            .strip_prefix("Created from ")
            .or_else(|| event.strip_prefix("Reset to "))
    }
}

fn two_branches(text: &str) -> Option<(&str, &str)> {
    let (from, to) = text.split_once(" to ")?;
    Some((
        from.strip_prefix("refs/heads/")?,
        to.strip_prefix("refs/heads/")?,
    ))
}

/// A reflog's entries, the newest first. Lines that are no entries are passed over.
#[derive(Debug)]
pub(super) enum Reflog {
    File(Backwards),
    Listed(std::vec::IntoIter<Entry>),
}

/// The reflog of a branch; empty where none is kept.
pub(super) fn of_branch(common_dir: &Path, branch: &BranchName) -> Result<Reflog, GitError> {
    open(common_dir, common_dir, &refs::full_name(branch))
}

/// The reflog of a worktree's HEAD; empty where none is kept.
pub(super) fn of_head(common_dir: &Path, git_dir: &Path) -> Result<Reflog, GitError> {
    open(common_dir, git_dir, "HEAD")
}

fn open(common_dir: &Path, git_dir: &Path, name: &str) -> Result<Reflog, GitError> {
    if refs::is_reftable(common_dir) {
        return Ok(listed(git_dir, name));
    }
    let path = git_dir.join("logs").join(name);
    let absent = || Reflog::Listed(Vec::new().into_iter());
    let opened = match File::open(&path) {
        Ok(file) => file.metadata().map(|m| (file, m)),
        Err(e) if matches!(e.kind(), ErrorKind::NotFound | ErrorKind::NotADirectory) => {
            return Ok(absent());
        }
        Err(e) => Err(e),
    };
    match opened {
        Ok((_, metadata)) if metadata.is_dir() => Ok(absent()),
        Ok((file, metadata)) => Ok(Reflog::File(Backwards {
            path,
            file,
            unread: metadata.len(),
            rest: Vec::new(),
        })),
        Err(e) => Err(GitError::io("open", &path, e)),
    }
}

fn listed(git_dir: &Path, name: &str) -> Reflog {
    let format = "--format=%H%x09%gd%x09%gs";
    let arguments = ["log", "-g", "--date=raw", format, name, "--"];
    // git fails where there is no such ref, as for a branch without a commit.
    let answer = program::plumbing(git_dir, &arguments).unwrap_or_else(|reason| {
        tracing::debug!(%reason, "no reflog");
        None
    });
    let text = String::from_utf8_lossy(answer.as_deref().unwrap_or_default()).into_owned();
    let entries: Vec<_> = text.lines().filter_map(parse_listed).collect();
    Reflog::Listed(entries.into_iter())
}

/// Takes `<id> TAB <ref>@{<seconds> <zone>} TAB <message>` apart.
fn parse_listed(line: &str) -> Option<Entry> {
    let mut fields = line.splitn(3, '\t');
    let new = fields.next()?.to_owned();
    let (_, date) = fields.next()?.rsplit_once("@{")?;
    let time = date.split(' ').next()?.parse().ok()?;
    let message = fields.next().unwrap_or_default().to_owned();
    Some(Entry { new, time, message })
}

/// Takes `<old> <new> <name> <mail> <seconds> <zone> TAB <message>` apart.
fn parse_line(line: &[u8]) -> Option<Entry> {
    let line = String::from_utf8_lossy(line);
    let (head, message) = line.split_once('\t').unwrap_or((&line, ""));
    let mut from_left = head.splitn(3, ' ');
    let (_old, new) = (from_left.next()?, from_left.next()?);
    let mut from_right = head.rsplitn(3, ' ');
    let (_zone, time) = (from_right.next()?, from_right.next()?);
    refs::is_id(new).then_some(Entry {
        new: new.to_owned(),
        time: time.parse().ok()?,
        message: message.to_owned(),
    })
}

impl Iterator for Reflog {
    type Item = Result<Entry, GitError>;

    fn next(&mut self) -> Option<Self::Item> {
        match self {
            Self::Listed(entries) => entries.next().map(Ok),
            Self::File(lines) => loop {
                match lines.next_line() {
                    Ok(line) => {
                        if let Some(entry) = parse_line(&line?) {
                            return Some(Ok(entry));
                        }
                    }
                    Err(e) => return Some(Err(GitError::io("read", &lines.path, e))),
                }
            },
        }
    }
}

/// A file's lines from the last to the first.
#[derive(Debug)]
pub(super) struct Backwards {
    path: PathBuf,
    file: File,
    /// Bytes before those in `rest`.
    unread: u64,
    /// Read, not yet handed out.
    rest: Vec<u8>,
}

impl Backwards {
    fn next_line(&mut self) -> std::io::Result<Option<Vec<u8>>> {
        loop {
            if let Some(newline) = self.rest.iter().rposition(|b| *b == b'\n') {
                let line = self.rest.split_off(newline + 1);
                self.rest.truncate(newline);
                if !line.is_empty() {
                    return Ok(Some(line));
                }
            } else if self.unread == 0 {
                let line = std::mem::take(&mut self.rest);
                return Ok((!line.is_empty()).then_some(line));
            } else {
                let length = self.unread.min(BLOCK_BYTES);
                self.unread -= length;
                self.file.seek(SeekFrom::Start(self.unread))?;
                let mut block = Vec::new();
                (&mut self.file).take(length).read_to_end(&mut block)?;
                block.append(&mut self.rest);
                self.rest = block;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn entries_come_newest_first_across_blocks_and_garbage() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::create_dir(dir.path().join("logs")).unwrap();
        let mut text = String::new();
        for i in 0..3000 {
            let zeros = "0".repeat(40);
            let id = format!("{i:040x}");
            text += [&zeros, " ", &id, " A B <a@b> "].concat().as_str();
            text += format!("{i} +0100\tcommit: {i}\n").as_str();
            if i % 100 == 0 {
                text += "no entry at all\n\n";
            }
        }
        text += "cut off";
        std::fs::write(dir.path().join("logs/HEAD"), text).unwrap();
        let entries: Vec<_> = of_head(dir.path(), dir.path())
            .unwrap()
            .map(Result::unwrap)
            .collect();
        assert_eq!(entries.len(), 3000);
        for (entry, i) in entries.iter().zip((0..3000).rev()) {
            assert_eq!(entry.time, i);
            assert_eq!(entry.message, format!("commit: {i}"));
        }
    }

    #[test]
    fn an_entry_without_message_has_an_empty_one() {
        let line = format!("{} {} A <a@b> 5 +0000", "0".repeat(40), "a".repeat(40));
        assert_eq!(parse_line(line.as_bytes()).unwrap().message, "");
    }

    #[test]
    fn a_folder_in_the_place_of_a_reflog_is_none() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::create_dir_all(dir.path().join("logs/refs/heads/a/b")).unwrap();
        let log = of_branch(dir.path(), &BranchName::new("a").unwrap()).unwrap();
        assert_eq!(log.count(), 0);
    }
}
