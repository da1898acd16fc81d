//! What a server's last words and a failed call say of the disk, and what to do about it.

use std::path::Path;

use crate::fsx::{as_root, shell_word};
use crate::storage::Mount;
use crate::types::BranchName;

/// A disk that doesn't do what it should.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Trouble {
    Full,
    ReadOnly,
    Broken,
    NotOurs,
}

/// How the C library words it (strerror(3)): postgres with `LC_MESSAGES=C` and Rust say the same.
const WORDINGS: [(&str, Trouble); 8] = [
    ("No space left on device", Trouble::Full),
    ("Disk quota exceeded", Trouble::Full),
    ("Read-only file system", Trouble::ReadOnly),
    ("Input/output error", Trouble::Broken),
    ("Permission denied", Trouble::NotOurs),
    ("Operation not permitted", Trouble::NotOurs),
    ("has wrong ownership", Trouble::NotOurs),
    ("has invalid permissions", Trouble::NotOurs),
];

impl Trouble {
    pub(super) fn in_text(text: &str) -> Option<Self> {
        WORDINGS
            .iter()
            .find(|(wording, _)| text.contains(wording))
            .map(|(_, trouble)| *trouble)
    }

    /// What mends it, and how to go on where a branch is named.
    pub(super) fn hint(self, pool: &Path, branch: Option<&BranchName>) -> String {
        let point = Mount::of(pool).map_or_else(|| pool.to_owned(), |m| m.point);
        let at = shell_word(&point);
        let then = branch.map_or_else(String::new, |name| format!("; then dbranch resume {name}"));
        match self {
            Self::Full => format!(
                "make room in {}: dbranch usage, then dbranch delete --now what is not needed{then}",
                pool.display()
            ),
            Self::ReadOnly => {
                format!("{}{then}", as_root(&format!("mount -o remount,rw {at}")))
            }
            Self::Broken => {
                format!("see `dmesg` for what happened to the disk, then mount {at} again{then}")
            }
            Self::NotOurs => "dbranch doctor".to_owned(),
        }
    }
}

/// The line of a server's log that tells why it ended.
///
/// A disk in trouble explains all that follows, so its line counts before later ones; then what ended
/// the server itself (`PANIC`), then whatever came last.
pub(super) fn complaint(log: &str) -> Option<String> {
    const LEVELS: [&str; 3] = ["PANIC:", "FATAL:", "ERROR:"];
    let lines: Vec<&str> = log.lines().collect();
    let last_with = |wanted: &dyn Fn(&str) -> bool| lines.iter().rev().find(|line| wanted(line));
    let has_level = |line: &str| LEVELS.iter().any(|level| line.contains(level));
    let found = LEVELS
        .iter()
        .find_map(|level| {
            last_with(&|line: &str| line.contains(level) && Trouble::in_text(line).is_some())
        })
        .or_else(|| last_with(&|line: &str| line.contains("PANIC:")))
        .or_else(|| last_with(&has_level))
        .or_else(|| lines.last().filter(|line| !line.contains("LOG:")))?;
    let from = LEVELS
        .iter()
        .filter_map(|level| found.find(level))
        .min()
        .unwrap_or(0);
    let line = found[from..].trim();
    (!line.is_empty()).then(|| line.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_full_disk_explains_what_follows_it() {
        let log = "\
2026-01-01 LOG:  starting PostgreSQL 15.1
2026-01-01 ERROR:  could not extend file \"base/5/16384\": No space left on device
2026-01-01 HINT:  Check free disk space.
2026-01-01 PANIC:  could not write to file \"pg_wal/xlogtemp.77\": No space left on device
2026-01-01 FATAL:  the database system is in recovery mode
2026-01-01 LOG:  database system is shut down";
        let line = complaint(log).unwrap();
        assert!(line.starts_with("PANIC:  could not write"), "{line}");
        assert_eq!(Trouble::in_text(&line), Some(Trouble::Full));
    }

    #[test]
    fn without_trouble_the_servers_own_end_counts_then_the_last_word() {
        for (log, line) in [
            (
                "x PANIC:  a\nx FATAL:  the database system is in recovery mode",
                Some("PANIC:  a"),
            ),
            ("x ERROR:  a\nx FATAL:  b\nx LOG:  c", Some("FATAL:  b")),
            ("postgres: not found", Some("postgres: not found")),
            ("x LOG:  all is well", None),
            ("", None),
        ] {
            assert_eq!(complaint(log).as_deref(), line, "{log}");
        }
    }

    #[test]
    fn each_trouble_has_a_next_step() {
        let name = BranchName::new("b").unwrap();
        for (text, word) in [
            ("PANIC:  could not fsync: Input/output error", "dmesg"),
            (
                "write x: Read-only file system (os error 30)",
                "mount -o remount,rw",
            ),
            (
                "data directory \"/x\" has wrong ownership",
                "dbranch doctor",
            ),
            ("Disk quota exceeded", "dbranch resume b"),
        ] {
            let hint = Trouble::in_text(text)
                .unwrap()
                .hint(Path::new("/"), Some(&name));
            assert!(hint.contains(word), "{hint}");
        }
        assert_eq!(Trouble::in_text("all is well"), None);
    }
}
