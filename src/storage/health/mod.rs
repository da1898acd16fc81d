//! Looks a pool over: facts only, that whoever shows them puts into words.
//!
//! Nothing is changed but for one unnamed file that is written and gone again. Calls block, for
//! as long as the disk does.

#[cfg(target_os = "linux")]
pub(super) mod linux;

mod owners;

use std::path::{Path, PathBuf};

use super::mounts::{AfterBoot, Boot, Mount};
use super::{DriverKind, Space, StorageError, as_root, pool, shell_word};
use crate::types::{Owner, VolumeId};

/// Below this much free room postgres may stop at any moment.
pub const FULL_BYTES: u64 = 64 << 20;
/// Below this much free room, or a twentieth of the whole where that is less than
/// [`LOW_SHARE_MAX_BYTES`], people are warned.
const LOW_BYTES: u64 = 256 << 20;
const LOW_SHARE: u64 = 20;
const LOW_SHARE_MAX_BYTES: u64 = 10 << 30;
/// What btrfs wants free for metadata before it makes a subvolume, roughly, and when to warn.
pub const METADATA_FULL_BYTES: u64 = 16 << 20;
const METADATA_LOW_BYTES: u64 = 64 << 20;
/// The files of two small clusters.
const FEW_INODES: u64 = 5_000;

/// What to look over.
#[derive(Debug, Clone)]
pub struct Pool {
    pub path: PathBuf,
    /// The driver in use there, if any.
    pub driver: Option<DriverKind>,
    /// The volumes that branches know.
    pub volumes: Vec<VolumeId>,
    /// The data directory's name in a volume.
    pub data_folder: &'static str,
    /// Whom data belongs to.
    pub owner: Owner,
}

/// What was found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Examined {
    /// `btrfs`, `ext4`, `XFS`, ...
    pub file_system: String,
    pub mount: Option<Mount>,
    /// The file that the file system lies in, where it does.
    pub image: Option<PathBuf>,
    pub space: Space,
    pub findings: Vec<Finding>,
}

/// One fact that somebody should know. Bytes are bytes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Finding {
    /// The file system lies in memory.
    Volatile,
    ReadOnly,
    /// A file can't be made in the pool, for another reason than those below.
    NotWritable {
        reason: String,
        /// It bears the attribute i (`FS_IMMUTABLE_FL`).
        immutable: bool,
    },
    /// The pool belongs to somebody else, and this user may not write to it.
    PoolOf {
        uid: u32,
    },
    /// Whoever runs postgres can't get through this folder.
    Impassable {
        folder: PathBuf,
        uid: u32,
    },
    /// These belong to another user than data has to.
    Foreign {
        paths: Vec<PathBuf>,
        uid: u32,
    },
    /// A data directory that others may look into: postgres refuses it.
    LooseMode {
        path: PathBuf,
        mode: u32,
    },
    LittleRoom {
        full: bool,
    },
    FewInodes {
        free: u64,
    },
    /// btrfs: room for metadata, of which every branch needs some.
    LittleMetadata {
        free_bytes: u64,
        /// Chunks that data has and does not fill: a balance gives them back.
        idle_data_bytes: u64,
    },
    /// The image that the file system lies in may still grow by more than its own disk has free.
    ImageOutgrows {
        image: PathBuf,
        may_grow_bytes: u64,
        disk_free_bytes: u64,
    },
    /// The image was deleted while it is mounted.
    ImageDeleted {
        image: PathBuf,
        device: String,
    },
    /// btrfs is mounted so that new files are overwritten in place.
    NoDataCow,
    /// btrfs: who is not root can't destroy subvolumes at once.
    NoUnprivilegedDelete,
    /// These bear the attribute C (`FS_NOCOW_FL`): no checksums, and blocks that reflinks break up.
    NoCow {
        paths: Vec<PathBuf>,
    },
    /// btrfs keeps quota groups, which make every snapshot and deletion slower.
    Quota {
        mode: String,
    },
    /// A quota group is nearly used up.
    QuotaLimit {
        group: String,
        used_bytes: u64,
        limit_bytes: u64,
    },
    /// The mount is not there after the next start of the machine.
    NotAtBoot {
        /// A unit or an entry is there and not in force.
        disabled: bool,
        /// The line for fstab(5) that mounts it.
        fstab_line: String,
    },
}

/// Bytes free in the file system of a folder that must be written to, if they are too few.
pub fn too_little_room(folder: &Path) -> Result<Option<u64>, StorageError> {
    let space = pool::space_of(folder);
    let free_bytes = space
        .map_err(StorageError::io("read the free room of", folder))?
        .free_bytes;
    Ok((free_bytes < FULL_BYTES).then_some(free_bytes))
}

/// Looks a pool over that is there.
pub fn examine(pool: &Pool) -> Result<Examined, StorageError> {
    let mount = Mount::of(&pool.path);
    let space = pool::space_of(&pool.path)
        .map_err(StorageError::io("read the free room of", &pool.path))?;
    let mut findings = Vec::new();
    if mount.as_ref().is_some_and(|m| m.has("ro")) {
        findings.push(Finding::ReadOnly);
    }
    owners::examine(pool, &mut findings);
    if space.free_bytes < low_bytes(space.total_bytes) {
        findings.push(Finding::LittleRoom {
            full: space.free_bytes < FULL_BYTES,
        });
    }
    if let Some(free) = free_inodes(&pool.path).filter(|free| *free < FEW_INODES) {
        findings.push(Finding::FewInodes { free });
    }
    #[cfg(not(target_os = "linux"))]
    let image = None;
    #[cfg(target_os = "linux")]
    let image = mount
        .as_ref()
        .and_then(|mount| linux::examine(pool, mount, &mut findings));
    // Last, as what was found so far may be the reason.
    if findings.iter().all(Finding::lets_write)
        && let Err(e) = try_to_write(&pool.path)
    {
        #[cfg(target_os = "linux")]
        let immutable = linux::is_immutable(&pool.path);
        #[cfg(not(target_os = "linux"))]
        let immutable = false;
        findings.push(Finding::NotWritable {
            reason: e.to_string(),
            immutable,
        });
    }
    Ok(Examined {
        file_system: pool::file_system_name(&pool.path),
        mount,
        image,
        space,
        findings,
    })
}

/// Refuses data that a server of `owner` can't be started on because of who owns what, or who may pass.
pub fn must_serve(data_dir: &Path, owner: Owner) -> Result<(), StorageError> {
    let (path, reason, fix) = match owners::obstacle(data_dir, owner) {
        Some(Finding::Impassable { folder, uid }) => {
            let reason = format!("the user that runs postgres (uid {uid}) can't pass through it");
            let fix = format!("chmod o+x {}", shell_word(&folder));
            (folder, reason, fix)
        }
        Some(Finding::Foreign { uid, .. }) => (
            data_dir.to_owned(),
            format!("it does not belong to the user that runs postgres (uid {uid})"),
            format!("chown -R {uid}:{} {}", owner.gid, shell_word(data_dir)),
        ),
        Some(Finding::LooseMode { path, mode }) => {
            let reason =
                format!("postgres refuses its mode {mode:03o}, as others may look into it");
            let fix = format!("chmod 700 {}", shell_word(&path));
            (path, reason, fix)
        }
        _ => return Ok(()),
    };
    let fix = as_root(&fix);
    Err(StorageError::Obstacle { path, reason, fix })
}

impl Finding {
    fn lets_write(&self) -> bool {
        !matches!(
            self,
            Self::ReadOnly | Self::PoolOf { .. } | Self::LittleRoom { full: true }
        )
    }
}

fn low_bytes(total_bytes: u64) -> u64 {
    (total_bytes / LOW_SHARE).clamp(LOW_BYTES, LOW_SHARE_MAX_BYTES)
}

/// Files that can still be made; none where the file system has no such limit.
fn free_inodes(path: &Path) -> Option<u64> {
    let stat = nix::sys::statvfs::statvfs(path).ok()?;
    #[expect(
        clippy::useless_conversion,
        reason = "the counts have 32 bits on some systems"
    )]
    let (all, free) = (u64::from(stat.files()), u64::from(stat.files_available()));
    (all > 0).then_some(free)
}

/// Writes a file that has no name, where the file system can do that, else one that is removed.
fn try_to_write(pool: &Path) -> std::io::Result<()> {
    use std::fs::{self, OpenOptions};
    use std::io::Write;
    use std::os::unix::fs::OpenOptionsExt;
    #[cfg(target_os = "linux")]
    {
        let unnamed = OpenOptions::new()
            .write(true)
            .mode(0o600)
            .custom_flags(nix::fcntl::OFlag::O_TMPFILE.bits())
            .open(pool);
        match unnamed {
            Ok(mut file) => return file.write_all(&[0; 4096]),
            Err(e) if e.kind() == std::io::ErrorKind::Unsupported => {}
            Err(e) => return Err(e),
        }
    }
    let path = pool.join(format!(".{}.probe", VolumeId::random()));
    let written = OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(&path)
        .and_then(|mut file| file.write_all(&[0; 4096]));
    let _ = fs::remove_file(&path);
    written
}

/// What a mount needs in fstab(5) to come back, and whether it does.
fn after_boot(boot: &Boot, mount: &Mount, source: &str, options: &str) -> Option<Finding> {
    let disabled = match boot.mounts(&mount.point) {
        AfterBoot::Mounted | AfterBoot::Unknown => return None,
        AfterBoot::NotEnabled => true,
        AfterBoot::NotMounted => false,
    };
    let blank = |text: &str| text.replace('\\', "\\134").replace(' ', "\\040");
    Some(Finding::NotAtBoot {
        disabled,
        fstab_line: format!(
            "{} {} {} {options} 0 0",
            blank(source),
            blank(&mount.point.display().to_string()),
            mount.file_system
        ),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn little_room_is_said_early_on_disks_of_any_size() {
        assert_eq!(low_bytes(1 << 30), LOW_BYTES);
        assert_eq!(low_bytes(100 << 30), 5 << 30);
        assert_eq!(low_bytes(1 << 50), LOW_SHARE_MAX_BYTES);
    }
}
