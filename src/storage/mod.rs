//! Makes, clones and destroys volumes; one volume holds one data directory.
//!
//! A pool is a folder; a volume is the folder of its id inside it. This room is
//! the only home of file system ioctls. It runs no postgres and keeps no record.

use std::fmt;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use crate::types::{Invalid, VolumeId};

/// Reports work done: bytes so far, bytes in all. Called from several threads.
pub type Progress<'a> = &'a (dyn Fn(u64, u64) + Sync);

/// Which driver. The names are those of the settings and of `--json` output.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum DriverKind {
    Btrfs,
    Copy,
}

impl DriverKind {
    pub const ALL: [Self; 2] = [Self::Btrfs, Self::Copy];

    pub fn as_str(self) -> &'static str {
        match self {
            Self::Btrfs => "btrfs",
            Self::Copy => "copy",
        }
    }
}

impl fmt::Display for DriverKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl FromStr for DriverKind {
    type Err = Invalid;
    fn from_str(s: &str) -> Result<Self, Invalid> {
        Self::ALL
            .into_iter()
            .find(|k| k.as_str() == s)
            .ok_or_else(|| {
                Invalid(format!(
                    "`{s}` is no storage driver; there are btrfs and copy"
                ))
            })
    }
}

/// What a clone of a volume in use is worth.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Consistency {
    /// All files at one instant: a running source is fine.
    Atomic,
    /// File by file: a running source must be in backup mode meanwhile.
    NeedsBackup,
}

/// How a clone was made, for messages: "btrfs snapshot", "copy of 1.2 GiB (blocks shared)".
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum CloneMethod {
    BtrfsSnapshot,
    /// Every byte was written again.
    FullCopy {
        bytes: u64,
    },
    /// File by file, but the file system shares the blocks.
    SharedCopy {
        bytes: u64,
    },
}

/// What a clone leaves out. Paths are relative to the volume. Drivers whose
/// clone is atomic take everything and ignore this.
#[derive(Debug, Clone, Copy)]
pub struct Omit(pub fn(&Path) -> bool);

impl Omit {
    pub const NOTHING: Self = Self(|_| false);
}

/// Bytes of one volume.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Usage {
    /// Sum of the files' sizes as allocated, shared or not.
    pub logical_bytes: u64,
    /// What no other volume shares, so what destroying it would free.
    pub exclusive_bytes: u64,
}

/// Room in the pool's file system.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Space {
    pub total_bytes: u64,
    pub free_bytes: u64,
}

#[derive(Debug, thiserror::Error)]
pub enum StorageError {
    /// The file system can't do what this driver needs. Probing goes on to the next driver.
    #[error("{driver} can't be used in {}: {reason}", path.display())]
    Unsupported {
        driver: DriverKind,
        path: PathBuf,
        reason: String,
    },
    #[error("not enough room in {}: {needed_bytes} bytes needed, {free_bytes} free", path.display())]
    NoRoom {
        path: PathBuf,
        needed_bytes: u64,
        free_bytes: u64,
    },
    #[error("no permission to {action} {}: {hint}", path.display())]
    Denied {
        action: &'static str,
        path: PathBuf,
        hint: String,
    },
    #[error("volume {id} already exists in {}", pool.display())]
    Exists { id: VolumeId, pool: PathBuf },
    #[error("volume {id} is not in {}", pool.display())]
    Missing { id: VolumeId, pool: PathBuf },
    #[error("{action} {}: {source}", path.display())]
    Io {
        action: &'static str,
        path: PathBuf,
        source: std::io::Error,
    },
}

/// Makes, clones and destroys the volumes of one pool.
///
/// Calls block, so async callers run them under `spawn_blocking`. A call that
/// fails leaves nothing half made. `destroy` of a volume that is gone succeeds.
/// A volume and all in it belong to the pool's owner (see [`open`]).
pub trait StorageDriver: fmt::Debug + Send + Sync {
    fn kind(&self) -> DriverKind;
    fn pool(&self) -> &Path;
    fn consistency(&self) -> Consistency;

    /// The folder of a volume, whether it exists or not.
    fn volume_path(&self, id: &VolumeId) -> PathBuf {
        self.pool().join(id.as_str())
    }

    /// Makes an empty volume, mode 0700.
    fn create_volume(&self, id: &VolumeId) -> Result<PathBuf, StorageError>;

    /// Makes `to` a writable clone of `from`. Checks the room first where the
    /// clone takes any. With `Consistency::NeedsBackup`, files that vanish
    /// meanwhile are passed over.
    fn clone_volume(
        &self,
        from: &VolumeId,
        to: &VolumeId,
        omit: Omit,
        progress: Progress<'_>,
    ) -> Result<CloneMethod, StorageError>;

    /// Copies one folder (relative to the volume) again from `from` into the
    /// existing `to`: the write-ahead log, once backup mode has ended. Drivers whose
    /// clone is atomic have nothing to do.
    fn catch_up(&self, from: &VolumeId, to: &VolumeId, folder: &Path) -> Result<(), StorageError>;

    /// Destroys a volume with all in it.
    fn destroy(&self, id: &VolumeId) -> Result<(), StorageError>;

    /// The volumes that lie in the pool, finished or not.
    fn list(&self) -> Result<Vec<VolumeId>, StorageError>;

    fn usage(&self, id: &VolumeId) -> Result<Usage, StorageError>;

    fn space(&self) -> Result<Space, StorageError>;
}
