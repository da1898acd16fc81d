//! Makes, clones and destroys volumes; one volume holds one data directory.
//!
//! A pool is a folder; a volume is the folder of its id inside it. This room is
//! the only home of file system ioctls. It runs no postgres and keeps no record.

use std::fmt;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use crate::types::{Invalid, VolumeId};

#[cfg(target_os = "linux")]
mod btrfs;
#[cfg(test)]
mod contract;
mod copy;
mod detect;
mod files;
pub mod health;
pub mod image;
#[cfg(test)]
mod many_tests;
mod mirror;
mod mounts;
mod pool;
mod reflink;
mod usage;
#[cfg(target_os = "linux")]
mod zfs;

pub use detect::{command_to_mount, open, reopen};
pub use mirror::{Estimate, Mirror, Round, Source, can_share, estimate};
pub use mounts::{AfterBoot, Boot, Mount, unit_name};
pub use pool::file_system_name as file_system_of;

use crate::fsx::{as_root, shell_word};

/// Reports work done: bytes so far, bytes in all. Called from several threads.
pub type Progress<'a> = &'a (dyn Fn(u64, u64) + Sync);

/// Which driver. The names are those of the settings and of `--json` output.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum DriverKind {
    Btrfs,
    Zfs,
    Reflink,
    Copy,
}

impl DriverKind {
    /// The best first: so `auto` tries them.
    pub const ALL: [Self; 4] = [Self::Btrfs, Self::Zfs, Self::Reflink, Self::Copy];

    pub fn as_str(self) -> &'static str {
        match self {
            Self::Btrfs => "btrfs",
            Self::Zfs => "zfs",
            Self::Reflink => "reflink",
            Self::Copy => "copy",
        }
    }

    /// The command for a pool that is not there, where all such pools have the same.
    fn how_to_mount(self) -> Option<&'static str> {
        match self {
            Self::Zfs => Some("zpool import -a; zfs mount -a"),
            Self::Btrfs | Self::Reflink | Self::Copy => None,
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
                let names = Self::ALL.map(Self::as_str).join(", ");
                Invalid(format!("`{s}` is no storage driver; there are {names}"))
            })
    }
}

/// Which driver a user wants: `auto`, or one by its name.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Choice {
    /// The best one that the pool's file system really offers.
    Auto,
    /// This one or an error.
    Driver(DriverKind),
}

impl Choice {
    /// All that can be chosen, for messages: `auto, btrfs, copy`.
    pub fn names() -> String {
        let drivers = DriverKind::ALL.map(DriverKind::as_str);
        format!("auto, {}", drivers.join(", "))
    }
}

impl FromStr for Choice {
    type Err = Invalid;
    fn from_str(s: &str) -> Result<Self, Invalid> {
        match s {
            "auto" => Ok(Self::Auto),
            name => name
                .parse()
                .map(Self::Driver)
                .map_err(|Invalid(why)| Invalid(format!("{why}, or auto to choose"))),
        }
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

/// How a clone was made, for messages: "btrfs snapshot", "reflink of 1,302 files, 1.2 GiB shared".
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum CloneMethod {
    BtrfsSnapshot,
    ZfsClone,
    /// Every byte was written again.
    FullCopy {
        bytes: u64,
    },
    /// File by file, sharing blocks.
    Reflink {
        files: u64,
        shared_bytes: u64,
        /// Of files for which the file system refused to share.
        written_bytes: u64,
    },
}

impl fmt::Display for CloneMethod {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::BtrfsSnapshot => f.write_str("btrfs snapshot"),
            Self::ZfsClone => f.write_str("zfs clone"),
            Self::FullCopy { bytes } => write!(f, "copy of {}", Bytes(*bytes)),
            Self::Reflink {
                files,
                shared_bytes,
                written_bytes,
            } => {
                let noun = if *files == 1 { "file" } else { "files" };
                write!(f, "reflink of {} {noun}, ", Thousands(*files))?;
                write!(f, "{} shared", Bytes(*shared_bytes))?;
                if *written_bytes > 0 {
                    write!(f, ", {} copied", Bytes(*written_bytes))?;
                }
                Ok(())
            }
        }
    }
}

/// A number for messages: `1,302`.
struct Thousands(u64);

impl fmt::Display for Thousands {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.0 < 1000 {
            return write!(f, "{}", self.0);
        }
        write!(f, "{},{:03}", Self(self.0 / 1000), self.0 % 1000)
    }
}

/// A size for messages: `812 B`, `1.2 GiB`.
struct Bytes(u64);

impl fmt::Display for Bytes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        const UNITS: [&str; 5] = ["KiB", "MiB", "GiB", "TiB", "PiB"];
        if self.0 < 1024 {
            return write!(f, "{} B", self.0);
        }
        // Tenths, in integers: the last digit is cut, not rounded.
        let (mut tenths, mut unit) = (u128::from(self.0) * 10 / 1024, 0);
        while tenths >= 10_240 && unit + 1 < UNITS.len() {
            tenths /= 1024;
            unit += 1;
        }
        write!(f, "{}.{} {}", tenths / 10, tenths % 10, UNITS[unit])
    }
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

/// Who holds blocks of a pool.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Holder {
    Volume(VolumeId),
    /// A snapshot of a volume that somebody made and keeps, by its name.
    Other(String),
}

/// What is held by all of some holders, and by nobody else.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Share {
    /// Indices into [`Usages::holders`], ascending.
    pub by: Vec<usize>,
    /// On disk.
    pub bytes: u64,
}

/// Bytes of one volume among others.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VolumeUsage {
    pub id: VolumeId,
    /// Sum of the files' sizes as allocated, shared or not.
    pub logical_bytes: u64,
    /// The part of its data that nobody shares.
    pub exclusive_bytes: u64,
    /// What destroying it would free, but for the file system's own records. More than
    /// `exclusive_bytes` where the file system keeps all of an extent while a part is used.
    pub freed_bytes: u64,
}

impl VolumeUsage {
    fn new(id: VolumeId, usage: Usage) -> Self {
        Self {
            id,
            logical_bytes: usage.logical_bytes,
            exclusive_bytes: usage.exclusive_bytes,
            freed_bytes: usage.exclusive_bytes,
        }
    }
}

/// Bytes of a pool's volumes, and who shares them. What was written within the last half
/// minute may have no place on disk yet, and isn't counted then.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Usages {
    pub volumes: Vec<VolumeUsage>,
    /// All who hold something; those of `volumes` are among them.
    pub holders: Vec<Holder>,
    /// Every set of holders once. None where the file system doesn't tell who shares with whom.
    pub shares: Option<Vec<Share>>,
    /// What keeps the numbers from being exact, for users.
    pub notes: Vec<String>,
}

#[cfg(target_os = "linux")]
impl Usages {
    /// The same with only these volumes; the holders stay.
    fn only(mut self, ids: &[VolumeId]) -> Self {
        self.volumes.retain(|volume| ids.contains(&volume.id));
        self
    }
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
    #[error("not enough room in {}: {} needed, {} free", path.display(), Bytes(*needed_bytes), Bytes(*free_bytes))]
    NoRoom {
        path: PathBuf,
        needed_bytes: u64,
        free_bytes: u64,
    },
    /// The file system was full in the middle of it.
    #[error("no room left in {} ({} free) to {action} {}", pool.display(), Bytes(*free_bytes), path.display())]
    Full {
        action: &'static str,
        path: PathBuf,
        pool: PathBuf,
        free_bytes: u64,
    },
    #[error("no permission to {action} {}: {hint}", path.display())]
    Denied {
        action: &'static str,
        path: PathBuf,
        hint: String,
    },
    /// The pool's file system is not mounted now, or the pool is about to go.
    #[error("the pool {} {why}", path.display())]
    OutOfUse {
        path: PathBuf,
        why: &'static str,
        hint: String,
    },
    #[error("the file system of {} is mounted read-only", path.display())]
    ReadOnly { path: PathBuf },
    /// btrfs keeps its trees apart from data, and each can be full alone.
    #[error("btrfs in {} has no room left for metadata ({} of it free), of which a branch needs some", path.display(), Bytes(*free_bytes))]
    NoMetadata {
        path: PathBuf,
        free_bytes: u64,
        /// In chunks of data that hold nothing, which a balance gives back.
        idle_data_bytes: u64,
    },
    /// Owners or modes stand in the way; `fix` is the command that mends it.
    #[error("{} can't be used: {reason}", path.display())]
    Obstacle {
        path: PathBuf,
        reason: String,
        fix: String,
    },
    #[error("volume {id} already exists in {}", pool.display())]
    Exists { id: VolumeId, pool: PathBuf },
    #[error("volume {id} is not in {}", pool.display())]
    Missing { id: VolumeId, pool: PathBuf },
    /// A copy is not what it should be.
    #[error("{} is not as in the volume it was copied from: {what}", path.display())]
    Unequal { path: PathBuf, what: &'static str },
    /// Whoever asked said no more.
    #[error("it was told to stop")]
    Interrupted,
    #[error("{action} {}: {source}", path.display())]
    Io {
        action: &'static str,
        path: PathBuf,
        source: std::io::Error,
    },
}

impl StorageError {
    /// What to do next, where that is known.
    pub fn hint(&self) -> Option<String> {
        match self {
            Self::Unsupported { .. } => Some(
                "choose the storage driver `auto` or `copy`, or a pool on btrfs, ZFS or XFS".into(),
            ),
            Self::NoRoom { path, .. } | Self::Full { pool: path, .. } if image::is_set_up(path) => {
                Some("delete branches (`dbranch usage`), or give the pool more: `dbranch storage grow --size SIZE`".into())
            }
            Self::NoRoom { path, .. } => Some(format!(
                "make room in {} (dbranch usage shows what branches take), or move the pool to a file \
                 system that shares blocks (btrfs, ZFS, XFS)",
                path.display()
            )),
            Self::Full { pool, .. } => Some(format!(
                "make room in {}: dbranch usage, then dbranch delete --now what is not needed",
                pool.display()
            )),
            Self::Denied { hint, .. } | Self::OutOfUse { hint, .. } => Some(hint.clone()),
            Self::Obstacle { fix, .. } => Some(fix.clone()),
            Self::ReadOnly { path } => Some(as_root(&format!(
                "mount -o remount,rw {}",
                mount_point_word(path)
            ))),
            Self::NoMetadata {
                path,
                idle_data_bytes,
                ..
            } => Some(if *idle_data_bytes > health::METADATA_FULL_BYTES {
                as_root(&format!(
                    "btrfs balance start -dusage=50 {}",
                    mount_point_word(path)
                ))
            } else {
                "dbranch usage, then dbranch delete --now what is not needed".into()
            }),
            Self::Unequal { .. } => Some("look for faults of the disk, then try again".into()),
            Self::Exists { .. } | Self::Missing { .. } | Self::Interrupted | Self::Io { .. } => {
                None
            }
        }
    }

    fn io(action: &'static str, path: &Path) -> impl FnOnce(std::io::Error) -> Self {
        move |source| Self::Io {
            action,
            path: path.to_owned(),
            source,
        }
    }
}

/// The mount point above a path, as a word of a command.
fn mount_point_word(path: &Path) -> String {
    let mount = Mount::of(path);
    shell_word(mount.as_ref().map_or(path, |m| &m.point))
}

/// Makes, clones and destroys the volumes of one pool.
///
/// Calls block, so async callers run them under `spawn_blocking`. A call that
/// fails leaves nothing half made; what a killed process left half made never
/// bears a volume's name and goes with the next `sweep`. `destroy` of a volume
/// that is gone succeeds. A volume and all in it belong to the pool's owner (see
/// [`open`]). What a call has reported done survives a power loss.
pub trait StorageDriver: fmt::Debug + Send + Sync {
    fn kind(&self) -> DriverKind;
    fn pool(&self) -> &Path;
    fn consistency(&self) -> Consistency;

    /// Whether a clone shares its source's blocks until one of the two changes,
    /// so that making one costs no room to speak of.
    fn shares_blocks(&self) -> bool;

    /// A notice for users when a better choice of pool exists: what clones cost here,
    /// why, and what would be better.
    fn advice(&self) -> Option<String> {
        None
    }

    /// The folder of a volume, whether it exists or not.
    fn volume_path(&self, id: &VolumeId) -> PathBuf {
        self.pool().join(id.as_str())
    }

    /// Makes an empty volume, mode 0700.
    fn create_volume(&self, id: &VolumeId) -> Result<PathBuf, StorageError>;

    /// Whether there is room for a clone of `from`, asked before a running source is put into
    /// backup mode: beginning that takes room too, and a server that finds none stops.
    fn must_have_room(&self, _from: &VolumeId, _omit: Omit) -> Result<(), StorageError> {
        Ok(())
    }

    /// Sees to it that a volume's folder shows what is in it, before an instance starts:
    /// mounts it where a volume is a mount of its own. Nothing is said of one that is gone.
    fn make_reachable(&self, _id: &VolumeId) -> Result<(), StorageError> {
        Ok(())
    }

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

    /// Copies one folder or file (relative to the volume) again from `from` into
    /// the existing `to`: the control file last of all, and the write-ahead log once
    /// backup mode has ended. A file must exist and is replaced; a small one is read
    /// until two readings agree, so that it isn't torn by a writer. From a folder all
    /// files are taken except those that vanish meanwhile. Drivers whose clone is
    /// atomic have nothing to do.
    fn catch_up(&self, from: &VolumeId, to: &VolumeId, path: &Path) -> Result<(), StorageError>;

    /// Fails where `destroy` would be refused because of what others made of the volume, so
    /// that nothing has changed yet when it is said.
    fn check_destroy(&self, _id: &VolumeId) -> Result<(), StorageError> {
        Ok(())
    }

    /// Destroys a volume with all in it.
    fn destroy(&self, id: &VolumeId) -> Result<(), StorageError>;

    /// The volumes that lie in the pool.
    fn list(&self) -> Result<Vec<VolumeId>, StorageError>;

    /// Removes what interrupted calls left half made or half destroyed, and says
    /// how many that were. Removes nothing while any call is under way in this pool, of
    /// this process or another one's.
    fn sweep(&self) -> Result<usize, StorageError>;

    fn usage(&self, id: &VolumeId) -> Result<Usage, StorageError>;

    /// Bytes of several volumes, and who shares them. Volumes that aren't there are left
    /// out. Drivers that can tell who shares with whom do; they remember what they
    /// saw, so that later calls take a fraction of the first one's time.
    fn usage_of_all(&self, ids: &[VolumeId]) -> Result<Usages, StorageError> {
        let mut usages = Usages::default();
        for id in ids {
            match self.usage(id) {
                Ok(usage) => usages.volumes.push(VolumeUsage::new(id.clone(), usage)),
                Err(StorageError::Missing { .. }) => {}
                // Destroyed meanwhile.
                Err(_) if !self.volume_path(id).exists() => {}
                Err(e) => return Err(e),
            }
        }
        Ok(usages)
    }

    fn space(&self) -> Result<Space, StorageError>;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn methods_read_as_messages() {
        let text = |method: CloneMethod| method.to_string();
        assert_eq!(text(CloneMethod::BtrfsSnapshot), "btrfs snapshot");
        assert_eq!(text(CloneMethod::FullCopy { bytes: 812 }), "copy of 812 B");
        let reflink = |files, written_bytes| {
            text(CloneMethod::Reflink {
                files,
                shared_bytes: 1_288_490_189,
                written_bytes,
            })
        };
        assert_eq!(reflink(1302, 0), "reflink of 1,302 files, 1.2 GiB shared");
        assert_eq!(
            reflink(1, 4096),
            "reflink of 1 file, 1.2 GiB shared, 4.0 KiB copied"
        );
        assert_eq!(Thousands(1_000_007).to_string(), "1,000,007");
        assert_eq!(Bytes(u64::MAX).to_string(), "16383.9 PiB");
    }

    #[test]
    fn a_choice_is_auto_or_a_driver() {
        assert_eq!("auto".parse(), Ok(Choice::Auto));
        assert_eq!("copy".parse(), Ok(Choice::Driver(DriverKind::Copy)));
        let Invalid(why) = "ntfs".parse::<Choice>().unwrap_err();
        assert!(
            why.contains("ntfs") && why.contains("btrfs") && why.contains("auto"),
            "{why}"
        );
    }
}
