//! Reads refs from git's own files (gitrepository-layout(5), git-pack-refs(1)).
//!
//! Opening a repository with a library costs more than the few reads a switch
//! needs, and fails on formats the library does not know. Reftables alone are
//! left to the git program.

use std::collections::HashMap;
use std::fs;
use std::io::ErrorKind;
use std::path::Path;

use super::{GitError, program};
use crate::types::BranchName;

const HEADS: &str = "refs/heads/";

/// How often one symbolic ref may lead to another, as in git (`SYMREF_MAXDEPTH`).
const SYMREF_DEPTH: usize = 5;

/// What a ref file holds.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Value {
    /// An object's full hexadecimal id.
    Id(String),
    /// Another ref's full name.
    Symbolic(String),
}

/// Whether refs lie in reftables, where `HEAD` is a stub for ever.
pub(super) fn is_reftable(common_dir: &Path) -> bool {
    common_dir.join("reftable").is_dir()
}

/// Reads a ref's file, or `HEAD`. Nothing where there is no such file.
pub(super) fn read_loose(path: &Path) -> Result<Option<Value>, GitError> {
    // HEAD was a symbolic link in git's first years (`core.preferSymlinkRefs`).
    if let Ok(target) = fs::read_link(path)
        && let Some(target) = target.to_str()
        && target.starts_with("refs/")
    {
        return Ok(Some(Value::Symbolic(target.to_owned())));
    }
    let bytes = match fs::read(path) {
        Ok(bytes) => bytes,
        Err(e) if is_absence(e.kind()) => return Ok(None),
        Err(e) => return Err(GitError::io("read", path, e)),
    };
    let Ok(text) = std::str::from_utf8(&bytes) else {
        return Err(unreadable(path, "it is not UTF-8"));
    };
    let text = text.trim_end();
    match text.strip_prefix("ref:") {
        Some(target) => Ok(Some(Value::Symbolic(target.trim_start().to_owned()))),
        None if is_id(text) => Ok(Some(Value::Id(text.to_owned()))),
        None => Err(unreadable(path, "it holds neither a ref nor a commit id")),
    }
}

fn unreadable(path: &Path, reason: &str) -> GitError {
    GitError::Unreadable {
        path: path.to_owned(),
        reason: reason.to_owned(),
    }
}

/// A folder of the name, or a file where a folder would be, is as good as absence:
/// `a` and `a/b` can't both be branches.
fn is_absence(kind: ErrorKind) -> bool {
    matches!(
        kind,
        ErrorKind::NotFound | ErrorKind::NotADirectory | ErrorKind::IsADirectory
    )
}

/// Whether the text is a full object id (SHA-1 or SHA-256).
pub(super) fn is_id(text: &str) -> bool {
    matches!(text.len(), 40 | 64) && text.bytes().all(|b| b.is_ascii_hexdigit())
}

pub(super) fn full_name(branch: &BranchName) -> String {
    format!("{HEADS}{branch}")
}

/// The branch a full ref name stands for, if it is one.
pub(super) fn branch_of(full_name: &str) -> Option<Result<BranchName, GitError>> {
    let name = full_name.strip_prefix(HEADS)?;
    Some(BranchName::new(name).map_err(GitError::from))
}

/// The ref that a symbolic ref of the repository leads to.
pub(super) fn symbolic_target(
    common_dir: &Path,
    full_name: &str,
) -> Result<Option<String>, GitError> {
    if is_reftable(common_dir) {
        let answer = program::plumbing(common_dir, &["symbolic-ref", "-q", full_name])?;
        return Ok(answer.as_deref().and_then(program::first_line));
    }
    match read_loose(&common_dir.join(full_name))? {
        Some(Value::Symbolic(target)) => Ok(Some(target)),
        Some(Value::Id(_)) | None => Ok(None),
    }
}

/// The object a shared ref leads to, symbolic refs followed.
pub(super) fn resolve(common_dir: &Path, full_name: &str) -> Result<Option<String>, GitError> {
    if is_reftable(common_dir) {
        let answer = program::plumbing(common_dir, &["rev-parse", "-q", "--verify", full_name])?;
        return Ok(answer.as_deref().and_then(program::first_line));
    }
    let mut name = full_name.to_owned();
    for _ in 0..SYMREF_DEPTH {
        match read_loose(&common_dir.join(&name))? {
            Some(Value::Id(id)) => return Ok(Some(id)),
            Some(Value::Symbolic(target)) => name = target,
            None => return Ok(find_packed(&packed(common_dir)?, &name)),
        }
    }
    Ok(None)
}

/// The commits that branches are at, none for those that don't exist.
///
/// `packed-refs` is read once for all of them; with reftables the program runs once.
pub(super) fn tips(
    common_dir: &Path,
    branches: &[&BranchName],
) -> Result<Vec<Option<String>>, GitError> {
    if is_reftable(common_dir) {
        let arguments = ["for-each-ref", "--format=%(objectname) %(refname)", HEADS];
        let all = program::plumbing(common_dir, &arguments)?.unwrap_or_default();
        let all: HashMap<_, _> = packed_records(&all).collect();
        let tip = |branch: &&BranchName| {
            let id = all.get(full_name(branch).as_bytes())?;
            String::from_utf8(id.to_vec()).ok()
        };
        return Ok(branches.iter().map(tip).collect());
    }
    let mut packed_refs = None;
    let mut tips = Vec::with_capacity(branches.len());
    for branch in branches {
        let name = full_name(branch);
        tips.push(match read_loose(&common_dir.join(&name))? {
            Some(Value::Id(id)) => Some(id),
            Some(Value::Symbolic(target)) => resolve(common_dir, &target)?,
            None => {
                if packed_refs.is_none() {
                    packed_refs = Some(packed(common_dir)?);
                }
                find_packed(packed_refs.as_deref().unwrap_or_default(), &name)
            }
        });
    }
    Ok(tips)
}

pub(super) fn exists(common_dir: &Path, full_name: &str) -> Result<bool, GitError> {
    Ok(resolve(common_dir, full_name)?.is_some())
}

fn packed(common_dir: &Path) -> Result<Vec<u8>, GitError> {
    let path = common_dir.join("packed-refs");
    match fs::read(&path) {
        Ok(bytes) => Ok(bytes),
        Err(e) if e.kind() == ErrorKind::NotFound => Ok(Vec::new()),
        Err(e) => Err(GitError::io("read", &path, e)),
    }
}

/// Finds a name in `packed-refs`: by halves where the header says `sorted`, as git
/// writes it, so that a hundred thousand refs cost no more than ten.
fn find_packed(data: &[u8], name: &str) -> Option<String> {
    let header = data.split(|b| *b == b'\n').next().unwrap_or_default();
    if !(header.starts_with(b"#") && header.windows(7).any(|w| w == b" sorted")) {
        return packed_records(data)
            .find(|(found, _)| *found == name.as_bytes())
            .and_then(|(_, id)| String::from_utf8(id.to_vec()).ok());
    }
    let (mut low, mut high) = (header.len() + 1, data.len());
    while low < high {
        let middle = low + (high - low) / 2;
        let mut start = line_start(data, low, middle);
        // A peeled tag's line belongs to the record before it.
        while data[start] == b'^' && start > low {
            start = line_start(data, low, start - 1);
        }
        let mut end = line_end(data, middle, high);
        while end < high && data[end] == b'^' {
            end = line_end(data, end, high);
        }
        let (found, id) = packed_records(&data[start..end]).next()?;
        match found.cmp(name.as_bytes()) {
            std::cmp::Ordering::Equal => return String::from_utf8(id.to_vec()).ok(),
            std::cmp::Ordering::Less => low = end,
            std::cmp::Ordering::Greater => high = start,
        }
    }
    None
}

fn line_start(data: &[u8], low: usize, at: usize) -> usize {
    data[low..at]
        .iter()
        .rposition(|b| *b == b'\n')
        .map_or(low, |i| low + i + 1)
}

fn line_end(data: &[u8], at: usize, high: usize) -> usize {
    data[at..high]
        .iter()
        .position(|b| *b == b'\n')
        .map_or(high, |i| at + i + 1)
}

/// The records of `packed-refs` as name and id; comments and peeled ids left out.
fn packed_records(data: &[u8]) -> impl Iterator<Item = (&[u8], &[u8])> {
    data.split(|b| *b == b'\n').filter_map(|line| {
        let space = line.iter().position(|b| *b == b' ')?;
        let (id, name) = (&line[..space], &line[space + 1..]);
        let is_record = matches!(id.len(), 40 | 64) && id.iter().all(u8::is_ascii_hexdigit);
        is_record.then_some((name, id))
    })
}

/// All branches, sorted by name. Names that dbranch can't carry are left out.
pub(super) fn branch_names(common_dir: &Path) -> Result<Vec<BranchName>, GitError> {
    let mut names = Vec::new();
    if is_reftable(common_dir) {
        let arguments = ["for-each-ref", "--format=%(refname)", HEADS];
        let answer = program::plumbing(common_dir, &arguments)?.unwrap_or_default();
        for line in answer.split(|b| *b == b'\n') {
            push_branch(&mut names, line);
        }
    } else {
        for (name, _) in packed_records(&packed(common_dir)?) {
            push_branch(&mut names, name);
        }
        collect_loose(&common_dir.join("refs/heads"), HEADS, &mut names)?;
    }
    names.sort();
    names.dedup();
    Ok(names)
}

fn push_branch(names: &mut Vec<BranchName>, full_name: &[u8]) {
    let Ok(full_name) = std::str::from_utf8(full_name) else {
        tracing::debug!("a branch whose name is not UTF-8 is left out");
        return;
    };
    match branch_of(full_name) {
        Some(Ok(name)) => names.push(name),
        Some(Err(reason)) => tracing::debug!(%reason, "a branch is left out"),
        None => {}
    }
}

fn collect_loose(dir: &Path, prefix: &str, names: &mut Vec<BranchName>) -> Result<(), GitError> {
    let entries = match fs::read_dir(dir) {
        Ok(entries) => entries,
        Err(e) if is_absence(e.kind()) => return Ok(()),
        Err(e) => return Err(GitError::io("list", dir, e)),
    };
    for entry in entries {
        let entry = entry.map_err(|e| GitError::io("list", dir, e))?;
        let name = entry.file_name();
        let Some(name) = name.to_str() else {
            tracing::debug!("a branch whose name is not UTF-8 is left out");
            continue;
        };
        // git writes `<ref>.lock` beside a ref that it is about to replace.
        if Path::new(name).extension().is_some_and(|e| e == "lock") {
            continue;
        }
        let full_name = format!("{prefix}{name}");
        if entry.path().is_dir() {
            collect_loose(&entry.path(), &format!("{full_name}/"), names)?;
        } else {
            push_branch(names, full_name.as_bytes());
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn packed_file(count: usize) -> Vec<u8> {
        let mut data = b"# pack-refs with: peeled fully-peeled sorted \n".to_vec();
        for i in 0..count {
            data.extend(format!("{i:040x} refs/heads/b{i:05}\n").bytes());
            if i % 3 == 0 {
                data.extend(format!("^{:040x}\n", i + 1).bytes());
            }
        }
        data
    }

    #[test]
    fn every_packed_ref_is_found_and_no_other() {
        for count in [0, 1, 2, 3, 50] {
            let data = packed_file(count);
            for i in 0..count {
                let found = find_packed(&data, &format!("refs/heads/b{i:05}"));
                assert_eq!(found, Some(format!("{i:040x}")), "{i} of {count}");
            }
            for absent in ["refs/heads/a", "refs/heads/b00000x", "refs/heads/z"] {
                assert_eq!(find_packed(&data, absent), None, "{absent} of {count}");
            }
        }
    }

    #[test]
    fn packed_refs_without_order_are_searched_through() {
        let data = format!("{:040x} refs/heads/z\n{:040x} refs/heads/a\n", 1, 2);
        assert_eq!(
            find_packed(data.as_bytes(), "refs/heads/a"),
            Some(format!("{:040x}", 2))
        );
    }
}
