//! Runs the `zfs` program, and tells its refusals apart.

use std::ffi::OsStr;
use std::fmt;
use std::io;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Instant;

use nix::unistd::Uid;

/// Where the program lies when PATH, a user's, has no system programs.
const USUAL_PLACES: [&str; 3] = ["/usr/sbin", "/sbin", "/usr/local/sbin"];

/// The program of this machine.
#[derive(Debug, Clone)]
pub(super) struct Program {
    path: PathBuf,
}

/// A call that failed: what was asked, and what the program said.
#[derive(Debug)]
pub(super) struct Failure {
    pub(super) kind: Kind,
    call: String,
    status: String,
    said: String,
}

/// Why a call failed, as far as callers must choose. libzfs has no codes, but its English
/// messages have been the same in zfs-fuse and in every OpenZFS.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    /// Mounted or held by somebody.
    Busy,
    NoSuchDataset,
    Exists,
    Denied,
    NoRoom,
    ReadOnly,
    /// Snapshots or datasets below it.
    HasChildren,
    /// Clones of a snapshot.
    HasClones,
    NotMounted,
    AlreadyMounted,
    /// Of a mount: no folder could be made for it, and why is not said.
    NoMountPoint,
    /// The dataset was made, but could not be mounted.
    MadeUnmounted,
    Other,
}

impl Program {
    /// Looks for it, in PATH first.
    pub(super) fn find() -> Option<Self> {
        let path = std::env::var_os("PATH").unwrap_or_default();
        std::env::split_paths(&path)
            .chain(USUAL_PLACES.map(PathBuf::from))
            .filter(|dir| dir.is_absolute())
            .map(|dir| dir.join("zfs"))
            .find(|file| file.is_file())
            .map(|path| Self { path })
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// Runs `zfs` with these arguments and returns what it prints.
    pub(super) fn run(&self, args: &[&str]) -> Result<String, Failure> {
        run(Command::new(&self.path), "zfs", args)
    }

    /// The same for what only root may do on Linux, mount and unmount: by sudo when this
    /// process is not root. It never asks for a password.
    pub(super) fn run_as_root(&self, args: &[&str]) -> Result<String, Failure> {
        if Uid::effective().is_root() {
            return self.run(args);
        }
        let mut sudo = Command::new("sudo");
        sudo.arg("-n").arg(&self.path);
        run(sudo, "sudo -n zfs", args).map_err(|mut failure| {
            if failure.kind == Kind::Other && failure.said.starts_with("sudo:") {
                failure.kind = Kind::Denied;
            }
            failure
        })
    }
}

/// Runs one call and logs it.
fn run(mut command: Command, shown: &str, args: &[&str]) -> Result<String, Failure> {
    let call = format!("{shown} {}", args.join(" "));
    let started = Instant::now();
    let outcome = command
        .args(args.iter().map(OsStr::new))
        // Its messages are read, and a working folder in a dataset would keep it mounted.
        .env("LC_ALL", "C")
        .current_dir("/")
        .stdin(Stdio::null())
        .output();
    let (status, said, printed) = match outcome {
        Ok(out) => (
            out.status.to_string(),
            String::from_utf8_lossy(&out.stderr).trim().to_owned(),
            out.status.success().then_some(out.stdout),
        ),
        Err(e) => ("not started".into(), e.to_string(), None),
    };
    let ms = started.elapsed().as_millis();
    tracing::debug!(call, status, stderr = said, ms, "zfs");
    match printed {
        Some(printed) => Ok(String::from_utf8_lossy(&printed).into_owned()),
        None => Err(Failure {
            kind: Kind::of(&said),
            call,
            status,
            said,
        }),
    }
}

impl Kind {
    fn of(said: &str) -> Self {
        const MEANINGS: [(&str, Kind); 18] = [
            // Before the refusals it may be followed by.
            ("successfully created, but", Kind::MadeUnmounted),
            ("failed to create mountpoint", Kind::NoMountPoint),
            ("is busy", Kind::Busy),
            ("resource busy", Kind::Busy),
            ("dataset does not exist", Kind::NoSuchDataset),
            ("could not find any snapshots", Kind::NoSuchDataset),
            ("already exists", Kind::Exists),
            ("out of space", Kind::NoRoom),
            ("quota exceeded", Kind::NoRoom),
            ("read-only", Kind::ReadOnly),
            ("has children", Kind::HasChildren),
            ("has dependent clones", Kind::HasClones),
            ("not currently mounted", Kind::NotMounted),
            ("already mounted", Kind::AlreadyMounted),
            ("permission denied", Kind::Denied),
            ("Permission denied", Kind::Denied),
            ("nsufficient privileges", Kind::Denied),
            ("must be superuser", Kind::Denied),
        ];
        MEANINGS
            .into_iter()
            .find_map(|(text, kind)| said.contains(text).then_some(kind))
            .unwrap_or(Kind::Other)
    }
}

impl Failure {
    /// What the program said, in one line.
    pub(super) fn said(&self) -> String {
        let lines: Vec<&str> = self.said.lines().map(str::trim).collect();
        lines.join("; ")
    }

    /// The datasets that its message lists, those that stand in the way.
    pub(super) fn named(&self) -> Vec<String> {
        let listed = self.said.lines().skip_while(|l| !l.starts_with("use '-"));
        listed.skip(1).map(str::to_owned).collect()
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "`{}` ({}): {}", self.call, self.status, self.said())
    }
}

impl From<Failure> for io::Error {
    fn from(failure: Failure) -> Self {
        Self::other(failure.to_string())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn refusals_are_told_apart_by_what_is_said() {
        for (said, kind) in [
            ("cannot destroy 'p/v': dataset is busy", Kind::Busy),
            (
                "umount: /p/v: target is busy.\ncannot unmount '/p/v': umount failed",
                Kind::Busy,
            ),
            (
                "cannot open 'p/v': dataset does not exist",
                Kind::NoSuchDataset,
            ),
            ("cannot create 'p/v': dataset already exists", Kind::Exists),
            ("cannot create 'p/v': out of space", Kind::NoRoom),
            ("cannot create 'p/v': permission denied", Kind::Denied),
            (
                "connect: Permission denied\ninternal error: failed to initialize ZFS library",
                Kind::Denied,
            ),
            (
                "filesystem successfully created, but it may only be mounted by root",
                Kind::MadeUnmounted,
            ),
            (
                "cannot unmount 'p/v': not currently mounted",
                Kind::NotMounted,
            ),
            ("internal error: strange", Kind::Other),
        ] {
            assert_eq!(Kind::of(said), kind, "{said}");
        }
    }

    #[test]
    fn what_stands_in_the_way_is_named() {
        let failure = Failure {
            kind: Kind::HasClones,
            call: "zfs destroy p/a@s".into(),
            status: "exit status: 1".into(),
            said: "cannot destroy 'p/a@s': snapshot has dependent clones\n\
                   use '-R' to destroy the following datasets:\np/b\np/c"
                .into(),
        };
        assert_eq!(failure.named(), ["p/b", "p/c"]);
        assert_eq!(failure.to_string().lines().count(), 1);
    }

    #[test]
    fn a_program_that_can_not_be_run_is_a_failure_that_says_so() {
        let program = Program {
            path: "/nonexistent/zfs".into(),
        };
        let failure = program.run(&["list"]).unwrap_err();
        assert_eq!(failure.kind, Kind::Other);
        assert!(failure.to_string().contains("`zfs list`"), "{failure}");
    }
}
