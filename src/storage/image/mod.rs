//! Pools that dbranch sets up itself: a file system that can clone, in a sparse file.
//!
//! ```text
//!   DIR.img                    the file, taking room as it is filled; the user's
//!   DIR                        where it is mounted: the pool
//!   DIR/.dbranch-not-mounted   seen only while it is not mounted
//!   DIR.img.part  DIR.img.removed        a set-up, a removal under way
//!   a systemd mount unit, or a line in /etc/fstab, mounts it at every start
//! ```
//!
//! Nothing of this is recorded anywhere else: [`observe()`] looks what is there and
//! [`plan`] says, as shell commands that people can read, what is still to be done.
//! So whatever was interrupted is completed by asking again. This room runs none of
//! the commands; most need root.

mod boot;
pub mod host;
mod observe;
pub mod plan;
mod superblock;

use std::fmt;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use super::StorageError;
use crate::types::Invalid;

pub use boot::{AtBoot, BootPlaces, set_up_pools};
pub use observe::{Image, Mount, MountPoint, Mounted, Observed, mount_of, observe};
pub use plan::{Group, Plan};

/// Bytes of a new pool when nobody asks for a size. The file is sparse.
pub const DEFAULT_SIZE_BYTES: u64 = 50 << 30;
/// Less is no use: an empty cluster takes 40 MB, and mkfs.xfs refuses below 300 MB.
pub const SMALLEST_BYTES: u64 = 512 << 20;

/// The file that lies below the mount point, so that an empty folder isn't taken for a pool.
pub const NOT_MOUNTED: &str = ".dbranch-not-mounted";

/// Options of every mount. The file belongs to a user, who could write a set-uid program or a
/// device into it: root, who mounts it, believes in neither (mount(8)).
const SAFE: &str = "nosuid,nodev,noatime";
/// What btrfs gets besides (btrfs(5)). Without `user_subvol_rm_allowed` a user may snapshot but not
/// delete. `discard=async` gives what was deleted back to the disk below; newer kernels do so by
/// themselves, Linux before 5.6 doesn't know it.
const BTRFS_OPTIONS: &str = "user_subvol_rm_allowed,discard=async";
/// What XFS gets besides (xfs(5)): what was deleted goes back to the disk below.
const XFS_OPTIONS: &str = "discard";

/// A file system that can be made in a file and that can clone.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FileSystem {
    Btrfs,
    Xfs,
}

impl FileSystem {
    pub const ALL: [Self; 2] = [Self::Btrfs, Self::Xfs];

    pub fn as_str(self) -> &'static str {
        match self {
            Self::Btrfs => "btrfs",
            Self::Xfs => "xfs",
        }
    }

    /// The options it is mounted with.
    pub fn mount_options(self) -> String {
        match self {
            Self::Btrfs => format!("{SAFE},{BTRFS_OPTIONS}"),
            Self::Xfs => format!("{SAFE},{XFS_OPTIONS}"),
        }
    }

    /// The program that makes one.
    pub fn mkfs(self) -> &'static str {
        match self {
            Self::Btrfs => "mkfs.btrfs",
            Self::Xfs => "mkfs.xfs",
        }
    }

    /// The package that holds it, by the same name on Debian, Fedora, SUSE, Arch and Alpine.
    pub fn package(self) -> &'static str {
        match self {
            Self::Btrfs => "btrfs-progs",
            Self::Xfs => "xfsprogs",
        }
    }

    /// How it is made in a file. Never by force: both programs then refuse what holds a file
    /// system already. btrfs keeps its metadata once, as the disk below may keep copies, and
    /// spends no items on holes; XFS shares blocks.
    fn mkfs_options(self) -> &'static str {
        match self {
            Self::Btrfs => "-q -L dbranch -m single -O no-holes",
            Self::Xfs => "-q -L dbranch -m reflink=1",
        }
    }
}

impl fmt::Display for FileSystem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl FromStr for FileSystem {
    type Err = Invalid;
    fn from_str(s: &str) -> Result<Self, Invalid> {
        Self::ALL
            .into_iter()
            .find(|fs| fs.as_str() == s)
            .ok_or_else(|| Invalid(format!("`{s}` is not btrfs or xfs")))
    }
}

/// Where the parts of one pool lie, all by its mount point.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Places {
    mount: PathBuf,
}

impl Places {
    /// Of a mount point, by a full path. Links on the way are resolved, as the kernel names a
    /// mount by where it really is.
    pub fn of(mount: &Path) -> Result<Self, Refused> {
        let refused = |why: &str| {
            Err(Refused::new(
                format!("{} can't be a pool's place: {why}", mount.display()),
                "give `--path` the full path of a folder of its own",
            ))
        };
        let Some(text) = mount.to_str() else {
            return refused("its name is not text");
        };
        // They would need escapes that fstab(5), systemd and the shell each have their own of.
        if text.chars().any(|c| c.is_control() || c == '\\') {
            return refused("its name has a control character or a backslash");
        }
        if !mount.is_absolute() || mount.file_name().is_none() || text.contains("/../") {
            return refused("it is not a full path");
        }
        let (mut there, mut missing) = (mount, Vec::new());
        let resolved = loop {
            if let Ok(resolved) = there.canonicalize() {
                break resolved;
            }
            missing.extend(there.file_name());
            there = there.parent().unwrap_or(Path::new("/"));
        };
        let mount = missing.into_iter().rev().fold(resolved, |p, n| p.join(n));
        Ok(Self { mount })
    }

    /// The pool's folder.
    pub fn mount(&self) -> &Path {
        &self.mount
    }

    /// The file that holds the file system.
    pub fn image(&self) -> PathBuf {
        self.beside(".img")
    }

    /// The file while it is being formatted: whatever bears this name is ours and unfinished.
    fn partial(&self) -> PathBuf {
        self.beside(".img.part")
    }

    /// The file once its removal has begun. The pool is empty then, and stays so.
    fn removed(&self) -> PathBuf {
        self.beside(".img.removed")
    }

    fn parent(&self) -> &Path {
        self.mount.parent().unwrap_or(Path::new("/"))
    }

    fn beside(&self, ending: &str) -> PathBuf {
        let mut path = self.mount.clone().into_os_string();
        path.push(ending);
        path.into()
    }
}

/// Whether a pool is one that dbranch has set up.
pub(super) fn is_set_up(pool: &Path) -> bool {
    let mount = pool.to_owned();
    Places { mount }.image().exists()
}

/// Refuses the mount point of a pool that is not mounted now, or is being removed: what was
/// written into it would be hidden by the next mount, or lost.
pub fn must_be_in_use(pool: &Path) -> Result<(), StorageError> {
    let removed = Places {
        mount: pool.to_owned(),
    }
    .removed();
    let (why, then) = if removed.exists() {
        ("is being removed", "storage remove --path")
    } else if pool.join(NOT_MOUNTED).exists() {
        ("is not mounted", "storage setup --path")
    } else {
        return Ok(());
    };
    Err(StorageError::OutOfUse {
        path: pool.to_owned(),
        why,
        hint: format!("dbranch {then} {}", plan::quoted_path(pool)),
    })
}

/// Why a pool can't be set up, grown or removed, and what to do about it.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub struct Refused {
    pub message: String,
    pub hint: String,
}

impl Refused {
    pub fn new(message: impl Into<String>, hint: impl Into<String>) -> Self {
        Self {
            message: message.into(),
            hint: hint.into(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_parts_lie_beside_the_mount_point() {
        let dir = tempfile::tempdir().unwrap();
        let real = dir.path().canonicalize().unwrap();
        std::os::unix::fs::symlink(&real, real.join("link")).unwrap();
        let places = Places::of(&real.join("link/a b/pool")).unwrap();
        assert_eq!(places.mount(), real.join("a b/pool"));
        assert_eq!(places.image(), real.join("a b/pool.img"));
    }

    #[test]
    fn a_place_that_can_not_be_written_into_system_files_is_refused() {
        for bad in ["pool", "/", "/a\nb", "/a\\b", "/a/../b"] {
            assert!(Places::of(Path::new(bad)).is_err(), "{bad:?}");
        }
    }
}
