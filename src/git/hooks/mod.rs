//! Puts dbranch's lines into git's hooks, and takes them out again.
//!
//! What was there before stays in force, and comes back to the byte. Nothing is
//! recorded outside the hook file, except that a hook which can't hold shell lines
//! is moved into `dbranch-chained` beside it:
//!
//! ```text
//!   no hook                    our file; removed at the end, with its folder if ours
//!   a shell script             our lines right after its first, so that no `exit` cuts them off
//!   a link, not executable,    moved to dbranch-chained/post-checkout, which our file runs;
//!   python, ruby, binary       its own name, as some look at what they are called
//! ```

mod script;

use std::fs::{self, OpenOptions, Permissions};
use std::io::{ErrorKind, Write};
use std::path::{Component, Path, PathBuf};

use super::{GitError, Location, program};
use script::{Content, Rest};

const HOOK: &str = "post-checkout";
const CHAIN_FOLDER: &str = "dbranch-chained";

/// What an installation did.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Installation {
    /// There was no hook.
    Created,
    /// Our lines went into the shell script that was there.
    Added,
    /// The hook that was there runs after ours.
    Chained,
    /// Our lines were there in another wording, or for another program file.
    Updated,
    Unchanged,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Installed {
    /// The hook file.
    pub path: PathBuf,
    pub installation: Installation,
    /// Whether git will run it. Not if someone took the file's executable bit away.
    pub is_active: bool,
    /// The hook manager that writes this file too, and may overwrite it: husky,
    /// lefthook, pre-commit or overcommit.
    pub manager: Option<&'static str>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Uninstalled {
    /// The hook files that held our lines; empty where there was nothing to do.
    pub paths: Vec<PathBuf>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum HookState {
    /// There is no hook.
    Absent,
    /// There is a hook, without our lines.
    Foreign,
    /// Our lines are there, but git does not run the file, for it is not executable.
    Inactive,
    Active,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HookStatus {
    pub path: PathBuf,
    pub state: HookState,
    pub manager: Option<&'static str>,
}

/// Installs the hook for the repository, for all its worktrees at once (but a
/// relative `core.hooksPath` leads to another folder in each).
///
/// `dbranch` is called by name, and by `program` where PATH does not have it.
/// A second run changes nothing. `SharedHooksPath` and `HooksSwitchedOff` say
/// that `core.hooksPath` leaves no place for it.
pub fn install(location: &Location, program: Option<&Path>) -> Result<Installed, GitError> {
    let folder = hooks_folder(location)?;
    let path = folder.join(HOOK);
    let block = script::block(program);
    let found = Found::read(&path)?;
    let manager = manager(&path, &found);
    let (installation, is_active) = match &found {
        Found::Nothing => {
            let made_folder = create_folder(&folder)?;
            write(&path, &script::own_file(&block, made_folder), None)?;
            (Installation::Created, true)
        }
        Found::File { bytes, permissions } => {
            match script::parse(bytes).map_err(|reason| damaged(&path, reason))? {
                Content::Ours { range, rest } => {
                    let mut new = bytes.clone();
                    new.splice(range, script::fit(&block, bytes));
                    let is_active = !matches!(rest, Rest::Foreign(_)) || is_executable(permissions);
                    let keep = matches!(rest, Rest::Foreign(_)).then_some(permissions);
                    if new == *bytes && (keep.is_some() || is_executable(permissions)) {
                        (Installation::Unchanged, is_active)
                    } else {
                        write(&path, &new, keep)?;
                        (Installation::Updated, is_active)
                    }
                }
                Content::Shell if is_executable(permissions) => {
                    write(&path, &script::insert(bytes, &block), Some(permissions))?;
                    (Installation::Added, true)
                }
                Content::Shell | Content::Other => {
                    chain(&folder, &path, &found, &block)?;
                    (Installation::Chained, true)
                }
            }
        }
        Found::Link { .. } => {
            chain(&folder, &path, &found, &block)?;
            (Installation::Chained, true)
        }
    };
    Ok(Installed {
        path,
        installation,
        is_active,
        manager,
    })
}

/// Takes our lines out, and leaves what was there before, byte for byte.
///
/// Looks in the folder that `core.hooksPath` names and in git's own, for the
/// setting may have come after the installation.
pub fn uninstall(location: &Location) -> Result<Uninstalled, GitError> {
    let mut folders = vec![location.common_dir.join("hooks")];
    match hooks_folder(location) {
        Ok(folder) => folders.push(folder),
        Err(GitError::SharedHooksPath { .. } | GitError::HooksSwitchedOff(_)) => {}
        Err(e) => return Err(e),
    }
    folders.dedup();
    let mut paths = Vec::new();
    for folder in folders {
        let path = folder.join(HOOK);
        if uninstall_from(&folder, &path)? {
            paths.push(path);
        }
    }
    Ok(Uninstalled { paths })
}

fn uninstall_from(folder: &Path, path: &Path) -> Result<bool, GitError> {
    let Found::File { bytes, permissions } = Found::read(path)? else {
        return Ok(false);
    };
    let parsed = script::parse(&bytes).map_err(|reason| damaged(path, reason))?;
    let Content::Ours { rest, .. } = parsed else {
        return Ok(false);
    };
    match rest {
        Rest::Foreign(before) => write(path, &before, Some(&permissions))?,
        Rest::Nothing { made_folder } => {
            remove(path)?;
            if made_folder {
                // Stays if something else has come to lie in it.
                let _ = fs::remove_dir(folder);
            }
        }
        Rest::Chain => unchain(folder, path)?,
    }
    Ok(true)
}

/// Returns whether our lines are where git looks for the hook.
pub fn status(location: &Location) -> Result<HookStatus, GitError> {
    let path = hooks_folder(location)?.join(HOOK);
    let found = Found::read(&path)?;
    let state = match &found {
        Found::Nothing => HookState::Absent,
        Found::Link { .. } => HookState::Foreign,
        Found::File { bytes, permissions } => {
            match script::parse(bytes).map_err(|reason| damaged(&path, reason))? {
                Content::Ours { .. } if is_executable(permissions) => HookState::Active,
                Content::Ours { .. } => HookState::Inactive,
                Content::Shell | Content::Other => HookState::Foreign,
            }
        }
    };
    Ok(HookStatus {
        manager: manager(&path, &found),
        path,
        state,
    })
}

/// The folder where git looks for this repository's hooks (githooks(5)).
///
/// Only one that belongs to the repository: inside a worktree of it or its git
/// directory, whatever scope the setting has.
fn hooks_folder(location: &Location) -> Result<PathBuf, GitError> {
    let standing = location.worktree.as_ref().unwrap_or(&location.git_dir);
    let arguments = ["config", "--show-scope", "--type=path", "core.hooksPath"];
    let answer = program::plumbing(&location.git_dir, &arguments)?;
    let Some(line) = answer.as_deref().and_then(program::first_line) else {
        return Ok(location.common_dir.join("hooks"));
    };
    let (scope, value) = line.split_once('\t').unwrap_or(("", &line));
    let path = standing.join(value);
    if fs::metadata(&path).is_ok_and(|m| !m.is_dir()) {
        return Err(GitError::HooksSwitchedOff(PathBuf::from(value)));
    }
    let real = real_path(&path);
    let tops = [
        location.worktree.as_ref(),
        location.main_worktree.as_ref(),
        Some(&location.common_dir),
    ];
    if tops.into_iter().flatten().any(|top| real.starts_with(top)) {
        Ok(real)
    } else {
        Err(GitError::SharedHooksPath {
            path: real,
            scope: scope.to_owned(),
        })
    }
}

/// Resolves links in what exists of a path, and `..` in the rest.
fn real_path(path: &Path) -> PathBuf {
    let existing = path.ancestors().find(|p| p.exists()).unwrap_or(path);
    let mut real = fs::canonicalize(existing).unwrap_or_else(|_| existing.to_owned());
    for part in path.strip_prefix(existing).unwrap_or(path).components() {
        match part {
            Component::ParentDir => {
                real.pop();
            }
            Component::CurDir => {}
            part => real.push(part),
        }
    }
    real
}

/// What lies in the hook's place.
enum Found {
    Nothing,
    Link {
        target: PathBuf,
    },
    File {
        bytes: Vec<u8>,
        permissions: Permissions,
    },
}

impl Found {
    fn read(path: &Path) -> Result<Self, GitError> {
        let failed = |e| GitError::io("read", path, e);
        let metadata = match fs::symlink_metadata(path) {
            Ok(metadata) => metadata,
            Err(e) if matches!(e.kind(), ErrorKind::NotFound | ErrorKind::NotADirectory) => {
                return Ok(Self::Nothing);
            }
            Err(e) => return Err(failed(e)),
        };
        if metadata.is_symlink() {
            let target = fs::read_link(path).map_err(failed)?;
            return Ok(Self::Link { target });
        }
        Ok(Self::File {
            bytes: fs::read(path).map_err(failed)?,
            permissions: metadata.permissions(),
        })
    }
}

fn damaged(path: &Path, reason: &'static str) -> GitError {
    GitError::DamagedHook {
        path: path.to_owned(),
        reason,
    }
}

/// Which hook manager writes this file, by the marks it leaves.
fn manager(path: &Path, found: &Found) -> Option<&'static str> {
    if path.components().any(|part| part.as_os_str() == ".husky") {
        return Some("husky");
    }
    let bytes = match found {
        Found::File { bytes, .. } => bytes.clone(),
        Found::Link { target } if target.to_string_lossy().contains("overcommit") => {
            return Some("overcommit");
        }
        Found::Link { .. } | Found::Nothing => return None,
    };
    let text = String::from_utf8_lossy(&bytes).to_lowercase();
    [
        ("lefthook", "lefthook"),
        ("generated by pre-commit", "pre-commit"),
        ("overcommit", "overcommit"),
    ]
    .into_iter()
    .find_map(|(mark, name)| text.contains(mark).then_some(name))
}

/// Moves the hook into the chain folder and puts ours in its place.
fn chain(folder: &Path, path: &Path, found: &Found, block: &[u8]) -> Result<(), GitError> {
    let chain_folder = folder.join(CHAIN_FOLDER);
    let chained = chain_folder.join(HOOK);
    if fs::symlink_metadata(&chained).is_ok() {
        let reason = "dbranch-chained beside it holds an older hook; move one of them away";
        return Err(damaged(path, reason));
    }
    create_folder(&chain_folder)?;
    // The old hook is never missing: first a second name for it, then our file takes
    // its place by rename. Where it can have no second name it is moved.
    let moved = match found {
        Found::Link { target } => link(&inner_target(target), &chained),
        _ if fs::hard_link(path, &chained).is_ok() => Ok(()),
        _ => fs::rename(path, &chained).map_err(|e| GitError::io("move", path, e)),
    };
    let written = moved.and_then(|()| write(path, &script::chaining_file(block), None));
    if written.is_err() {
        if fs::symlink_metadata(path).is_ok() {
            let _ = fs::remove_file(&chained);
        } else {
            let _ = fs::rename(&chained, path);
        }
        let _ = fs::remove_dir(&chain_folder);
    }
    written
}

/// Puts the chained hook back in its place.
fn unchain(folder: &Path, path: &Path) -> Result<(), GitError> {
    let chain_folder = folder.join(CHAIN_FOLDER);
    let chained = chain_folder.join(HOOK);
    match Found::read(&chained)? {
        Found::Nothing => remove(path)?,
        Found::Link { target } => {
            let restored = folder.join(format!(".{HOOK}.dbranch"));
            let _ = fs::remove_file(&restored);
            link(&outer_target(&target), &restored)?;
            fs::rename(&restored, path).map_err(|e| GitError::io("write", path, e))?;
            remove(&chained)?;
        }
        Found::File { .. } => {
            fs::rename(&chained, path).map_err(|e| GitError::io("write", path, e))?;
        }
    }
    // Stays if something else has come to lie in it.
    let _ = fs::remove_dir(&chain_folder);
    Ok(())
}

/// A link's target as it is called one folder further in.
fn inner_target(target: &Path) -> PathBuf {
    if target.is_absolute() {
        target.to_owned()
    } else {
        Path::new("..").join(target)
    }
}

fn outer_target(target: &Path) -> PathBuf {
    match target.as_os_str().as_encoded_bytes() {
        [b'.', b'.', b'/', ..] => {
            let text = target.to_string_lossy();
            PathBuf::from(&text[3..])
        }
        _ => target.to_owned(),
    }
}

#[cfg(unix)]
fn link(target: &Path, path: &Path) -> Result<(), GitError> {
    std::os::unix::fs::symlink(target, path).map_err(|e| GitError::io("link", path, e))
}

#[cfg(not(unix))]
fn link(target: &Path, path: &Path) -> Result<(), GitError> {
    fs::copy(target, path)
        .map(drop)
        .map_err(|e| GitError::io("copy", path, e))
}

fn remove(path: &Path) -> Result<(), GitError> {
    fs::remove_file(path).map_err(|e| GitError::io("remove", path, e))
}

/// Makes a folder. Returns whether it was missing.
fn create_folder(folder: &Path) -> Result<bool, GitError> {
    match fs::create_dir(folder) {
        Ok(()) => Ok(true),
        Err(e) if e.kind() == ErrorKind::AlreadyExists && folder.is_dir() => Ok(false),
        Err(e) => Err(GitError::io("create", folder, e)),
    }
}

#[cfg(unix)]
fn is_executable(permissions: &Permissions) -> bool {
    use std::os::unix::fs::PermissionsExt;
    permissions.mode() & 0o111 != 0
}

#[cfg(not(unix))]
fn is_executable(_: &Permissions) -> bool {
    true
}

/// Replaces the hook at one stroke, for git may run it at any time. Without
/// permissions to keep it becomes executable for all who may read it.
fn write(path: &Path, bytes: &[u8], keep: Option<&Permissions>) -> Result<(), GitError> {
    let temporary = path.with_file_name(format!(".{HOOK}.dbranch-{}", std::process::id()));
    let failed = |e| GitError::io("write", path, e);
    let mut options = OpenOptions::new();
    // Never through a link that someone put there.
    let _ = fs::remove_file(&temporary);
    options.write(true).create_new(true);
    #[cfg(unix)]
    std::os::unix::fs::OpenOptionsExt::mode(&mut options, 0o777);
    let written = (|| {
        let mut file = options.open(&temporary)?;
        file.write_all(bytes)?;
        keep_owner(path, &file);
        if let Some(permissions) = keep {
            file.set_permissions(permissions.clone())?;
        }
        file.sync_all()?;
        fs::rename(&temporary, path)
    })();
    if written.is_err() {
        let _ = fs::remove_file(&temporary);
    }
    written.map_err(failed)
}

/// A hook that root edits stays its owner's.
#[cfg(unix)]
fn keep_owner(path: &Path, file: &fs::File) {
    use std::os::unix::fs::MetadataExt;
    let of = fs::symlink_metadata(path).or_else(|_| fs::metadata(path.parent().unwrap_or(path)));
    if let Ok(metadata) = of {
        let _ = std::os::unix::fs::fchown(file, Some(metadata.uid()), Some(metadata.gid()));
    }
}

#[cfg(not(unix))]
fn keep_owner(_: &Path, _: &fs::File) {}

#[cfg(test)]
#[cfg(unix)]
mod tests;
