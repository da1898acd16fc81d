//! What every black-box test stands on: an environment of its own, with a git
//! repository, a dbranch home, free ports, and nothing left of it afterwards.
//!
//! What a test needs and may lack is named by a capability. A missing one skips
//! the test aloud, or fails it when `DBRANCH_TEST_REQUIRE` names it.

mod env;
mod image;
mod leftovers;
mod ports;
pub(crate) mod process;
pub(crate) mod registry;
mod session;
mod zfs;

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

pub(crate) use env::{TestEnv, edit_config};
pub(crate) use image::{Fs, Image};
pub(crate) use leftovers::{is_alive, kill_9, processes_in};
pub(crate) use session::Session;
pub(crate) use zfs::{Dataset, zfs};

/// How long a test waits for something that should come at once. Generous,
/// because a busy machine is no failure.
pub(crate) const LIMIT: Duration = Duration::from_secs(30);

/// Waits until `condition` holds. Panics with `what` when it does not within `limit`.
#[track_caller]
pub(crate) fn wait_until(limit: Duration, what: &str, mut condition: impl FnMut() -> bool) {
    let start = Instant::now();
    while !condition() {
        assert!(
            start.elapsed() < limit,
            "waited {limit:?} in vain until {what}"
        );
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// Which postgres serves the branches of a test.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Server {
    /// The machine's own programs.
    Native,
    Native18,
    Docker,
    Docker18,
}

impl Server {
    pub(crate) fn runtime(self) -> &'static str {
        match self {
            Self::Native | Self::Native18 => "native",
            Self::Docker | Self::Docker18 => "docker",
        }
    }

    /// The folder of the server programs, or what is missing.
    fn bin_dir(self) -> Result<PathBuf, Missing> {
        let (var, capability) = match self {
            Self::Native | Self::Docker => ("DBRANCH_TEST_PG_BIN", "postgres"),
            Self::Native18 | Self::Docker18 => ("DBRANCH_TEST_PG_BIN_18", "postgres18"),
        };
        let dir = match std::env::var_os(var) {
            Some(dir) => PathBuf::from(dir),
            None if capability == "postgres" => newest_server(),
            None => return Err(Missing(capability, format!("{var} is not set"))),
        };
        if dir.join("postgres").is_file() && dir.join("initdb").is_file() {
            Ok(dir)
        } else {
            let reason = format!("no PostgreSQL server programs in `{}`", dir.display());
            Err(Missing(capability, reason))
        }
    }

    /// The image, or what is missing.
    fn image(self) -> Result<String, Missing> {
        let var = match self {
            Self::Docker18 | Self::Native18 => "DBRANCH_TEST_IMAGE_18",
            Self::Docker | Self::Native => "DBRANCH_TEST_IMAGE",
        };
        let image =
            std::env::var(var).map_err(|_| Missing("docker", format!("{var} is not set")))?;
        let found = std::process::Command::new("docker")
            .args(["image", "inspect", &image])
            .output()
            .is_ok_and(|out| out.status.success());
        if found {
            Ok(image)
        } else {
            Err(Missing(
                "docker",
                format!("no engine here, or no image {image}"),
            ))
        }
    }
}

fn newest_server() -> PathBuf {
    let mut found: Vec<(u32, PathBuf)> = std::fs::read_dir("/usr/lib/postgresql")
        .into_iter()
        .flatten()
        .flatten()
        .filter_map(|e| Some((e.file_name().to_str()?.parse().ok()?, e.path().join("bin"))))
        .collect();
    found.sort();
    found
        .pop()
        .map_or_else(|| "/usr/lib/postgresql".into(), |(_, dir)| dir)
}

/// Which storage driver keeps the branches of a test.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Storage {
    Btrfs,
    Zfs,
    /// On XFS.
    Reflink,
    /// On whatever file system the tests' own folder is.
    Copy,
}

impl Storage {
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Btrfs => "btrfs",
            Self::Zfs => "zfs",
            Self::Reflink => "reflink",
            Self::Copy => "copy",
        }
    }

    /// How a line that says a branch was made begins to say how.
    pub(crate) fn method(self) -> &'static str {
        match self {
            Self::Btrfs => "btrfs snapshot",
            Self::Zfs => "zfs clone",
            Self::Reflink => "reflink of ",
            Self::Copy => "copy of ",
        }
    }

    /// The folder for its pool, none where any will do, or what is missing.
    fn folder(self) -> Result<Option<PathBuf>, Missing> {
        let (var, capability) = match self {
            Self::Btrfs => ("DBRANCH_TEST_BTRFS", "btrfs"),
            Self::Zfs => ("DBRANCH_TEST_ZFS", "zfs"),
            Self::Reflink => ("DBRANCH_TEST_XFS", "xfs"),
            Self::Copy => return Ok(None),
        };
        match std::env::var_os(var) {
            Some(dir) if Path::new(&dir).is_dir() => Ok(Some(dir.into())),
            Some(dir) => Err(Missing(capability, format!("no folder {}", dir.display()))),
            None => Err(Missing(capability, format!("{var} is not set"))),
        }
    }
}

/// A capability that is not here, and why.
struct Missing(&'static str, String);

/// Passes what was found on; says aloud that the test is skipped when it was not,
/// and fails it when it may not be skipped.
#[expect(clippy::print_stderr, reason = "a skipped test says so")]
fn required<T>(found: Result<T, Missing>) -> Option<T> {
    match found {
        Ok(it) => Some(it),
        Err(Missing(capability, reason)) => {
            let required = std::env::var("DBRANCH_TEST_REQUIRE").unwrap_or_default();
            assert!(
                !required.split(',').any(|c| c == capability),
                "{capability} is required: {reason}"
            );
            let thread = std::thread::current();
            let test = thread.name().unwrap_or("a test").to_owned();
            eprintln!("skipped: {test}: {reason}");
            None
        }
    }
}

/// Whether the test runs as root.
pub(crate) fn is_root() -> bool {
    nix::unistd::geteuid().is_root()
}

/// For tests that mount file systems or need another user.
pub(crate) fn need_root() -> Option<()> {
    required(if is_root() {
        Ok(())
    } else {
        Err(Missing("root", "not root".into()))
    })
}
