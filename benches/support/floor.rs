//! The floor of each driver: the least that makes and removes a clone, done by hand.

use std::fs::File;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};

use crate::ioctl;
use crate::pool;

const BUSY_LIMIT: Duration = Duration::from_secs(10);

/// How a file system is asked for a clone without dbranch.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Floor {
    /// The ioctl alone.
    Btrfs,
    /// `zfs snapshot`, `zfs clone`.
    Zfs,
    /// `cp -a --reflink=always`, then syncfs(2): a clone that is there survives a power loss,
    /// with the file systems above as with this.
    Reflink,
    /// `cp -a --reflink=never`, then syncfs(2).
    Copy,
}

impl Floor {
    pub(crate) fn of(storage: &str) -> Result<Self> {
        Ok(match storage {
            "btrfs" => Self::Btrfs,
            "zfs" => Self::Zfs,
            "reflink" => Self::Reflink,
            "copy" => Self::Copy,
            other => bail!("no floor is known for the driver {other}"),
        })
    }

    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Btrfs => "the ioctl",
            Self::Zfs => "`zfs snapshot` + `zfs clone`",
            Self::Reflink => "`cp -a --reflink=always`, syncfs",
            Self::Copy => "`cp -a --reflink=never`, syncfs",
        }
    }

    pub(crate) fn removal(self) -> &'static str {
        match self {
            Self::Btrfs => "the ioctl",
            Self::Zfs => "`zfs destroy`, twice",
            Self::Reflink | Self::Copy => "`rm -rf`",
        }
    }

    /// Clones a volume to a name beside it.
    pub(crate) fn clone_volume(self, from: &Path, to: &Path) -> Result<Duration> {
        let name = to.file_name().and_then(|n| n.to_str()).context("no name")?;
        let folder = to.parent().context("no folder")?;
        let mut cp = Command::new("cp");
        match self {
            Self::Btrfs => return ioctl::snapshot(from, &File::open(folder)?, name),
            Self::Zfs => {
                let (snapshot, clone) = (format!("{}@{name}", dataset(from)?), dataset(to)?);
                let begun = Instant::now();
                zfs(&["snapshot", &snapshot])?;
                zfs(&["clone", &snapshot, &clone])?;
                return Ok(begun.elapsed());
            }
            Self::Reflink => cp.args(["-a", "--reflink=always"]),
            Self::Copy => cp.args(["-a", "--reflink=never"]),
        };
        let begun = Instant::now();
        pool::run(cp.arg(from).arg(to))?;
        nix::unistd::syncfs(&File::open(folder)?)?;
        Ok(begun.elapsed())
    }

    /// Removes what [`Floor::clone_volume`] made of `from`.
    pub(crate) fn destroy(self, from: &Path, made: &Path) -> Result<Duration> {
        let begun;
        match self {
            Self::Btrfs => {
                begun = Instant::now();
                ioctl::destroy(made)?;
            }
            Self::Zfs => {
                let name = made
                    .file_name()
                    .and_then(|n| n.to_str())
                    .context("no name")?;
                let (source, clone) = (dataset(from)?, dataset(made)?);
                begun = Instant::now();
                // A moment after its server has ended it may still be busy.
                let limit = begun + BUSY_LIMIT;
                while let Err(e) = zfs(&["destroy", &clone]) {
                    if Instant::now() > limit {
                        return Err(e);
                    }
                    std::thread::sleep(Duration::from_millis(5));
                }
                zfs(&["destroy", &format!("{source}@{name}")])?;
            }
            Self::Reflink | Self::Copy => {
                begun = Instant::now();
                pool::run(Command::new("rm").arg("-rf").arg(made))?;
            }
        }
        Ok(begun.elapsed())
    }
}

/// The dataset of a volume: a child of the pool's, named as its folder is.
fn dataset(volume: &Path) -> Result<String> {
    let pool = volume.parent().context("no folder")?;
    let name = volume
        .file_name()
        .and_then(|n| n.to_str())
        .context("no name")?;
    let mut list = Command::new("zfs");
    list.args(["list", "-H", "-o", "name"]).arg(pool);
    Ok(format!("{}/{name}", pool::run(&mut list)?.trim()))
}

fn zfs(args: &[&str]) -> Result<()> {
    pool::run(Command::new("zfs").args(args)).map(drop)
}
