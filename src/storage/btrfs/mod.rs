//! The btrfs driver: a volume is a subvolume, a clone is a snapshot.
//!
//! It speaks to the kernel and needs no btrfs program. A clone is one ioctl at
//! any size: git waits for it, so nothing here walks folders or syncs on that path.

use std::ffi::{OsStr, OsString};
use std::fs::{self, Permissions};
use std::os::fd::AsFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::sys::statfs::{BTRFS_SUPER_MAGIC, statfs};

use super::pool::{self, DOOMED, Pool};
use super::usage::Survey;
use super::{
    CloneMethod, Consistency, DriverKind, Omit, Progress, Space, StorageDriver, StorageError,
    Usage, Usages,
};
use crate::types::VolumeId;

pub(super) mod ioctl;

/// Prefix of the volumes that probing makes; no id begins like it.
const PROBE: &str = ".probe-";

/// What btrfs wants free before it makes a subvolume, roughly: it says only that it hasn't got it.
const METADATA_BYTES: u64 = 16 << 20;

#[derive(Debug)]
pub(super) struct Btrfs {
    pool: Pool,
    survey: Survey,
}

impl Btrfs {
    /// Tries in the pool itself whether subvolumes can be made, snapshotted and
    /// destroyed. `Unsupported` says why not; a full or a read-only pool is another error, as no other
    /// driver could do better there.
    pub(super) fn open(pool: Pool) -> Result<Self, StorageError> {
        let driver = Self::reopen(pool)?;
        driver.probe().map_err(|e| match e {
            StorageError::Full { .. }
            | StorageError::NoMetadata { .. }
            | StorageError::ReadOnly { .. }
            | StorageError::Obstacle { .. } => e,
            e => StorageError::Unsupported {
                driver: DriverKind::Btrfs,
                path: driver.pool.path().to_owned(),
                reason: e.to_string(),
            },
        })?;
        Ok(driver)
    }

    /// For a pool that was opened before: nothing is written to it, as it may be full.
    pub(super) fn reopen(pool: Pool) -> Result<Self, StorageError> {
        let driver = Self {
            pool,
            survey: Survey::default(),
        };
        let unsupported = |reason: String| StorageError::Unsupported {
            driver: DriverKind::Btrfs,
            path: driver.pool.path().to_owned(),
            reason,
        };
        let found = statfs(driver.pool.path())
            .map_err(|e| StorageError::io("read the file system of", driver.pool.path())(e.into()))?
            .filesystem_type();
        if found != BTRFS_SUPER_MAGIC {
            let name = pool::file_system_name(driver.pool.path());
            return Err(unsupported(format!("the file system is {name}")));
        }
        Ok(driver)
    }

    fn probe(&self) -> Result<(), StorageError> {
        let _in_use = self.pool.in_use()?;
        let stem = VolumeId::random();
        let first = OsString::from(format!("{PROBE}{stem}-1"));
        let second = OsString::from(format!("{PROBE}{stem}-2"));
        let tried = self
            .create(&first)
            .and_then(|_| self.snapshot(&first, &second));
        let swept = [first, second].map(|name| self.remove(&name));
        tried?;
        swept.into_iter().collect()
    }

    fn create(&self, name: &OsStr) -> Result<PathBuf, StorageError> {
        let path = self.pool.path().join(name);
        let pool = self.pool.folder()?;
        ioctl::create_subvolume(pool.as_fd(), name)
            .map_err(|e| self.refusal("create", &path, e))?;
        let finish = || {
            let folder = pool::open_folder(&path)?;
            folder
                .set_permissions(Permissions::from_mode(0o700))
                .map_err(StorageError::io("set the mode of", &path))?;
            self.pool.give_to_owner(&folder, &path)
        };
        if let Err(error) = finish() {
            let _ = self.remove(name);
            return Err(error);
        }
        Ok(path)
    }

    fn snapshot(&self, from: &OsStr, to: &OsStr) -> Result<(), StorageError> {
        let source_path = self.pool.path().join(from);
        let source = pool::open_folder(&source_path)?;
        let pool = self.pool.folder()?;
        ioctl::snapshot(pool.as_fd(), to, source.as_fd())
            .map_err(|e| self.refusal("snapshot", &source_path, e))
    }

    /// Destroys a subvolume, or whatever else folder of that name is in the pool.
    fn remove(&self, name: &OsStr) -> Result<(), StorageError> {
        let Some(path) = self.pool.existing(name)? else {
            return Ok(());
        };
        let pool = self.pool.folder()?;
        match ioctl::destroy_subvolume(pool.as_fd(), name) {
            Ok(()) | Err(Errno::ENOENT) => return Ok(()),
            // Without privileges the ioctl needs the mount option user_subvol_rm_allowed. A plain
            // folder, or a subvolume that holds others, is no case for it either. Since Linux 4.18
            // rmdir(2) removes an empty subvolume, so emptying it first always works.
            Err(e) => {
                tracing::debug!(volume = %path.display(), error = %e, "emptying the volume by hand");
            }
        }
        // Out of the volumes first: what is interrupted now must not look whole.
        let path = self.doom(name, path)?;
        fs::remove_dir_all(&path).map_err(|source| match source.kind() {
            std::io::ErrorKind::PermissionDenied => StorageError::Denied {
                action: "destroy",
                path: path.clone(),
                hint: format!(
                    "mount the file system with user_subvol_rm_allowed, or remove it as root: \
                     btrfs subvolume delete {}",
                    path.display()
                ),
            },
            _ => StorageError::io("destroy", &path)(source),
        })
    }

    /// Renames a volume to what a sweep removes; other folders keep their names.
    fn doom(&self, name: &OsStr, path: PathBuf) -> Result<PathBuf, StorageError> {
        let Some(id) = name.to_str().filter(|n| VolumeId::new(*n).is_ok()) else {
            return Ok(path);
        };
        let doomed = OsString::from(format!("{id}{DOOMED}"));
        self.remove(&doomed)?;
        let to = self.pool.path().join(doomed);
        fs::rename(&path, &to).map_err(StorageError::io("destroy", &path))?;
        Ok(to)
    }

    /// What a failed ioctl means.
    fn refusal(&self, action: &'static str, path: &Path, errno: Errno) -> StorageError {
        self.pool
            .failure(action, path, METADATA_BYTES, errno.into())
    }
}

impl StorageDriver for Btrfs {
    fn kind(&self) -> DriverKind {
        DriverKind::Btrfs
    }

    fn pool(&self) -> &Path {
        self.pool.path()
    }

    fn consistency(&self) -> Consistency {
        Consistency::Atomic
    }

    fn shares_blocks(&self) -> bool {
        true
    }

    fn create_volume(&self, id: &VolumeId) -> Result<PathBuf, StorageError> {
        let _in_use = self.pool.in_use()?;
        self.pool.must_be_free(id)?;
        self.create(OsStr::new(id.as_str()))
    }

    fn clone_volume(
        &self,
        from: &VolumeId,
        to: &VolumeId,
        _omit: Omit,
        _progress: Progress<'_>,
    ) -> Result<CloneMethod, StorageError> {
        let source = self.pool.must_exist(from)?;
        self.pool.must_be_free(to)?;
        let inode = fs::symlink_metadata(&source)
            .map_err(StorageError::io("read", &source))?
            .ino();
        if inode != ioctl::SUBVOLUME_INODE {
            return Err(StorageError::Unsupported {
                driver: DriverKind::Btrfs,
                path: source,
                reason: "this volume is a plain folder, made file by file by another driver".into(),
            });
        }
        self.snapshot(OsStr::new(from.as_str()), OsStr::new(to.as_str()))?;
        Ok(CloneMethod::BtrfsSnapshot)
    }

    fn catch_up(&self, _from: &VolumeId, _to: &VolumeId, _path: &Path) -> Result<(), StorageError> {
        Ok(())
    }

    fn destroy(&self, id: &VolumeId) -> Result<(), StorageError> {
        let _in_use = self.pool.in_use()?;
        self.remove(OsStr::new(id.as_str()))?;
        self.remove(OsStr::new(&format!("{id}{DOOMED}")))
    }

    fn list(&self) -> Result<Vec<VolumeId>, StorageError> {
        self.pool.volumes()
    }

    fn sweep(&self) -> Result<usize, StorageError> {
        let Some(_alone) = self.pool.alone()? else {
            return Ok(0);
        };
        let mut left = self.pool.remains()?;
        left.extend(
            self.pool
                .names(|name| name.as_bytes().starts_with(PROBE.as_bytes()))?,
        );
        left.iter().try_for_each(|name| self.remove(name))?;
        Ok(left.len())
    }

    fn usage(&self, id: &VolumeId) -> Result<Usage, StorageError> {
        self.survey.usage(&self.pool, id, true)
    }

    fn usage_of_all(&self, ids: &[VolumeId]) -> Result<Usages, StorageError> {
        self.survey.look(&self.pool, ids, true)
    }

    fn space(&self) -> Result<Space, StorageError> {
        self.pool.space()
    }
}
