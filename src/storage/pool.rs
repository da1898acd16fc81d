//! The folder that holds the volumes, and the checks every driver makes in it.

use std::ffi::{OsStr, OsString};
use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, ErrorKind};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt, fchown};
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};
use nix::sys::statvfs::statvfs;
use nix::unistd::Uid;

use super::{Space, StorageError, image};
use crate::types::{Owner, VolumeId};

/// Ending of a clone that is being made, and of a volume that is being destroyed.
/// No id has a dot, so neither is taken for a volume.
pub(super) const PARTIAL: &str = ".partial";
pub(super) const DOOMED: &str = ".doomed";

/// An existing pool folder, by its canonical path.
#[derive(Debug, Clone)]
pub(super) struct Pool {
    path: PathBuf,
    owner: Owner,
}

impl Pool {
    /// Makes the folder when it is missing: mode 0711 as root, so that the owner of
    /// the volumes can pass through, else 0700.
    pub(super) fn open(path: &Path, owner: Owner) -> Result<Self, StorageError> {
        image::must_be_in_use(path)?;
        Self::make(path)?;
        let pool = Self::existing_at(path, owner)?;
        if Uid::effective().is_root() {
            pool.must_be_passable()?;
        }
        Ok(pool)
    }

    /// The pool in a folder that is one already, whatever state it is in.
    pub(super) fn existing_at(path: &Path, owner: Owner) -> Result<Self, StorageError> {
        let path = path
            .canonicalize()
            .map_err(StorageError::io("resolve", path))?;
        Ok(Self { path, owner })
    }

    fn make(path: &Path) -> Result<(), StorageError> {
        let root = Uid::effective().is_root();
        DirBuilder::new()
            .recursive(true)
            .mode(if root { 0o711 } else { 0o700 })
            .create(path)
            .map_err(|source| match source.kind() {
                ErrorKind::PermissionDenied => StorageError::Denied {
                    action: "create",
                    path: path.to_owned(),
                    hint: "choose a pool folder that you may write to".into(),
                },
                ErrorKind::ReadOnlyFilesystem => StorageError::ReadOnly {
                    path: path.to_owned(),
                },
                _ => StorageError::io("create", path)(source),
            })
    }

    /// Postgres runs as the owner and must get to its data directory.
    fn must_be_passable(&self) -> Result<(), StorageError> {
        for folder in self.path.ancestors() {
            let meta = fs::metadata(folder).map_err(StorageError::io("read", folder))?;
            let needed = if meta.uid() == self.owner.uid {
                0o100
            } else if meta.gid() == self.owner.gid {
                0o010
            } else {
                0o001
            };
            if meta.mode() & needed == 0 && self.owner.uid != 0 {
                return Err(StorageError::Denied {
                    action: "pass through",
                    path: folder.to_owned(),
                    hint: format!(
                        "the user that runs postgres (uid {}) must get to {}: choose another pool \
                         folder, or allow it with `chmod o+x {}`",
                        self.owner.uid,
                        self.path.display(),
                        folder.display()
                    ),
                });
            }
        }
        Ok(())
    }

    /// What a call that failed on a file or folder in the pool means. `needed_bytes` is what it
    /// wanted, where that is known.
    pub(super) fn failure(
        &self,
        action: &'static str,
        path: &Path,
        needed_bytes: u64,
        source: std::io::Error,
    ) -> StorageError {
        match source.kind() {
            ErrorKind::StorageFull | ErrorKind::QuotaExceeded => {
                self.no_room(action, path, needed_bytes)
            }
            ErrorKind::ReadOnlyFilesystem => StorageError::ReadOnly {
                path: self.path.clone(),
            },
            ErrorKind::PermissionDenied => self.denied(action, path),
            _ => StorageError::io(action, path)(source),
        }
    }

    fn no_room(&self, action: &'static str, path: &Path, needed_bytes: u64) -> StorageError {
        let free_bytes = self.space().map_or(0, |s| s.free_bytes);
        #[cfg(target_os = "linux")]
        if free_bytes >= needed_bytes.max(super::health::METADATA_FULL_BYTES)
            && let Some(room) = super::health::linux::MetadataRoom::of(&self.path)
        {
            return StorageError::NoMetadata {
                path: self.path.clone(),
                free_bytes: room.free_bytes,
                idle_data_bytes: room.idle_data_bytes,
            };
        }
        let _ = needed_bytes;
        StorageError::Full {
            action,
            path: path.to_owned(),
            pool: self.path.clone(),
            free_bytes,
        }
    }

    /// Only the pool's own user, and root, may change what is in it.
    fn denied(&self, action: &'static str, path: &Path) -> StorageError {
        let us = Uid::effective();
        let foreign = [self.path.as_path(), path].into_iter().find_map(|p| {
            let uid = fs::symlink_metadata(p).ok()?.uid();
            (uid != us.as_raw()).then_some((p, uid))
        });
        match foreign {
            Some((foreign, uid)) if !us.is_root() => StorageError::Obstacle {
                path: foreign.to_owned(),
                reason: format!("it belongs to uid {uid}, and dbranch runs as uid {us}"),
                fix: super::as_root(&format!(
                    "chown -R {us}:{} {}",
                    nix::unistd::Gid::effective(),
                    super::shell_word(foreign)
                )),
            },
            _ => StorageError::Denied {
                action,
                path: path.to_owned(),
                hint: "the pool and its volumes must belong to the user that dbranch runs as, and the \
                       system must allow that user to make them"
                    .into(),
            },
        }
    }

    /// To be held while something in the pool is half made or half destroyed. Other daemons may
    /// have volumes in the same pool: whoever sweeps waits for nobody, and leaves all as it is
    /// while this is held. A lock (flock(2)) on the folder itself, given up with the process.
    pub(super) fn in_use(&self) -> Result<Option<Flock<File>>, StorageError> {
        let mut folder = match open_folder(&self.path) {
            Ok(folder) => folder,
            // Whoever may not look into it can't make anything there either; what is tried next
            // says whose it is.
            Err(StorageError::Io { source, .. })
                if source.kind() == ErrorKind::PermissionDenied =>
            {
                return Ok(None);
            }
            Err(_) => self.folder()?,
        };
        loop {
            match Flock::lock(folder, FlockArg::LockShared) {
                Ok(held) => return Ok(Some(held)),
                Err((again, Errno::EINTR)) => folder = again,
                Err((_, e)) => return Err(StorageError::io("lock", &self.path)(e.into())),
            }
        }
    }

    /// To be held while sweeping: nobody else changes the pool meanwhile. None while
    /// anybody does.
    pub(super) fn alone(&self) -> Result<Option<Flock<File>>, StorageError> {
        Ok(Flock::lock(self.folder()?, FlockArg::LockExclusiveNonblock).ok())
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    #[cfg(target_os = "linux")]
    pub(super) fn folder(&self) -> Result<File, StorageError> {
        open_folder(&self.path).map_err(|e| match e {
            StorageError::Io { action, source, .. } => self.failure(action, &self.path, 0, source),
            e => e,
        })
    }

    /// The path of a name in the pool, if it is there. Whatever is about to be
    /// destroyed passes here: it must be a real folder right inside the pool.
    pub(super) fn existing(&self, name: &OsStr) -> Result<Option<PathBuf>, StorageError> {
        let path = self.path.join(name);
        debug_assert_eq!(path.parent(), Some(self.path.as_path()), "one component");
        match fs::symlink_metadata(&path) {
            Ok(meta) if meta.is_dir() => Ok(Some(path)),
            Ok(_) => Err(StorageError::Denied {
                action: "touch",
                hint: "it is no folder, so dbranch did not make it; move it out of the pool".into(),
                path,
            }),
            Err(e) if e.kind() == ErrorKind::NotFound => Ok(None),
            Err(e) => Err(StorageError::io("read", &path)(e)),
        }
    }

    pub(super) fn must_exist(&self, id: &VolumeId) -> Result<PathBuf, StorageError> {
        self.existing(OsStr::new(id.as_str()))?
            .ok_or_else(|| StorageError::Missing {
                id: id.clone(),
                pool: self.path.clone(),
            })
    }

    pub(super) fn must_be_free(&self, id: &VolumeId) -> Result<(), StorageError> {
        match self.existing(OsStr::new(id.as_str()))? {
            None => Ok(()),
            Some(_) => Err(StorageError::Exists {
                id: id.clone(),
                pool: self.path.clone(),
            }),
        }
    }

    /// Gives a new folder or file to the volumes' owner. Only root can, and only
    /// root has to.
    pub(super) fn give_to_owner(&self, file: &File, path: &Path) -> Result<(), StorageError> {
        if !Uid::effective().is_root() {
            return Ok(());
        }
        fchown(file, Some(self.owner.uid), Some(self.owner.gid))
            .map_err(StorageError::io("set the owner of", path))
    }

    /// Names of the folders in the pool that `wanted` accepts.
    pub(super) fn names(
        &self,
        wanted: impl Fn(&OsStr) -> bool,
    ) -> Result<Vec<OsString>, StorageError> {
        let io = |e| StorageError::io("list", &self.path)(e);
        let mut names = Vec::new();
        for entry in fs::read_dir(&self.path).map_err(io)? {
            let entry = entry.map_err(io)?;
            if wanted(&entry.file_name()) && entry.file_type().map_err(io)?.is_dir() {
                names.push(entry.file_name());
            }
        }
        Ok(names)
    }

    /// Names of what interrupted calls left of volumes.
    pub(super) fn remains(&self) -> Result<Vec<OsString>, StorageError> {
        self.names(|name| {
            let name = name.to_str().unwrap_or_default();
            [PARTIAL, DOOMED]
                .iter()
                .filter_map(|ending| name.strip_suffix(ending))
                .any(|id| VolumeId::new(id).is_ok())
        })
    }

    pub(super) fn volumes(&self) -> Result<Vec<VolumeId>, StorageError> {
        let id = |name: &OsStr| name.to_str().and_then(|n| VolumeId::new(n).ok());
        let names = self.names(|name| id(name).is_some())?;
        Ok(names.iter().filter_map(|name| id(name)).collect())
    }

    pub(super) fn space(&self) -> Result<Space, StorageError> {
        space_of(&self.path).map_err(StorageError::io("read the free room of", &self.path))
    }
}

/// Room in the file system that holds a path.
pub(super) fn space_of(path: &Path) -> io::Result<Space> {
    let stat = statvfs(path)?;
    #[expect(
        clippy::useless_conversion,
        reason = "the counts have 32 bits on some systems"
    )]
    let bytes = |blocks| u64::from(blocks).saturating_mul(u64::from(stat.fragment_size()));
    Ok(Space {
        total_bytes: bytes(stat.blocks()),
        free_bytes: bytes(stat.blocks_available()),
    })
}

/// Opens a folder, and no link to one.
pub(super) fn open_folder(path: &Path) -> Result<File, StorageError> {
    use nix::fcntl::OFlag;
    OpenOptions::new()
        .read(true)
        .custom_flags((OFlag::O_DIRECTORY | OFlag::O_NOFOLLOW).bits())
        .open(path)
        .map_err(StorageError::io("open", path))
}

/// The name of the file system that holds a folder, as users know it.
#[cfg(target_os = "linux")]
pub fn file_system_name(folder: &Path) -> String {
    use nix::sys::statfs as fs;
    let Ok(stat) = fs::statfs(folder) else {
        return "unknown".into();
    };
    match stat.filesystem_type() {
        fs::BTRFS_SUPER_MAGIC => "btrfs".into(),
        // ext2, ext3 and ext4 have one magic number; the first two are history.
        fs::EXT4_SUPER_MAGIC => "ext4".into(),
        fs::XFS_SUPER_MAGIC => "XFS".into(),
        fs::TMPFS_MAGIC => "tmpfs".into(),
        fs::OVERLAYFS_SUPER_MAGIC => "overlayfs".into(),
        fs::NFS_SUPER_MAGIC => "NFS".into(),
        fs::FUSE_SUPER_MAGIC => "FUSE".into(),
        // ZFS_SUPER_MAGIC of OpenZFS's sources.
        fs::FsType(0x2fc1_2fc1) => "ZFS".into(),
        other => format!("of type {:#x}", other.0),
    }
}

/// The name of the file system that holds a folder, as users know it.
#[cfg(not(target_os = "linux"))]
pub fn file_system_name(folder: &Path) -> String {
    nix::sys::statfs::statfs(folder).map_or_else(
        |_| "another one".into(),
        |stat| stat.filesystem_type_name().to_owned(),
    )
}
