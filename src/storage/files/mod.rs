//! Volumes that are plain folders, cloned file by file: what the drivers `reflink` and
//! `copy` have in common.
//!
//! A clone is made under a name that is no volume's and renamed when all of it is
//! on disk, and destroying begins with such a rename. Volumes of the two drivers are
//! alike; how a file comes over is all that differs.

use std::ffi::{OsStr, OsString};
use std::fmt;
use std::fs::{self, DirBuilder, File};
use std::io::{self, ErrorKind, Write};
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::path::{Component, Path, PathBuf};

use self::file::{At, Source};
use self::fill::Brought;
use self::tree::Tree;
use super::pool::{self, DOOMED, PARTIAL, Pool};
use super::usage::Survey;
use super::{
    CloneMethod, Consistency, DriverKind, Omit, Progress, Space, StorageDriver, StorageError,
    Usage, Usages, usage,
};
use crate::fsx;
use crate::types::VolumeId;

pub(super) mod file;
mod fill;
pub(super) mod ioctl;
mod tree;

pub(super) use fill::{Done, sync};

/// What must stay free after a clone: postgres that finds a full disk stops.
const MARGIN_BYTES: u64 = 64 << 20;

/// Up to this length a file is read whole when it is caught up with.
const SMALL_BYTES: u64 = 64 << 10;

/// How files come over, and what there is to say about it.
pub(super) trait Way: fmt::Debug + Send + Sync {
    const KIND: DriverKind;
    /// Whether a clone shares its source's blocks. A file for which the file system refuses
    /// that is written again.
    const SHARES: bool;

    fn method(done: Done) -> CloneMethod;

    /// See [`StorageDriver::advice`].
    fn advice(&self, pool: &Pool) -> Option<String>;

    /// Whether volumes may share blocks, however they were made.
    fn may_be_shared(&self) -> bool;
}

/// A driver whose clones are made file by file.
#[derive(Debug)]
pub(super) struct FileByFile<W> {
    pool: Pool,
    survey: Survey,
    way: W,
    margin_bytes: u64,
}

impl<W: Way> FileByFile<W> {
    pub(super) fn new(pool: Pool, way: W) -> Self {
        Self {
            pool,
            survey: Survey::default(),
            way,
            margin_bytes: MARGIN_BYTES,
        }
    }

    /// Whether there is room for a clone of so many bytes.
    fn must_have_room_for_clone(&self, bytes: u64) -> Result<(), StorageError> {
        let own = if W::SHARES { 0 } else { bytes };
        // Folders, block maps and the first steps of the new server.
        self.must_have_room_for(own.saturating_add(bytes / 100))
    }

    fn must_have_room_for(&self, bytes: u64) -> Result<(), StorageError> {
        let needed_bytes = bytes.saturating_add(self.margin_bytes);
        let free_bytes = self.pool.space()?.free_bytes;
        if needed_bytes > free_bytes {
            return Err(StorageError::NoRoom {
                path: self.pool.path().to_owned(),
                needed_bytes,
                free_bytes,
            });
        }
        Ok(())
    }

    fn failed(&self, action: &'static str, path: &Path, source: io::Error) -> StorageError {
        failed(&self.pool, action, path, source)
    }

    /// Puts a small file in place of another at once, as it was at one moment.
    fn replace_small(&self, from: &Path, to: &Path) -> Result<(), StorageError> {
        let (bytes, meta) = file::read_settled(from).map_err(|e| self.failed("read", from, e))?;
        fsx::write_atomic(to, &bytes, meta.mode() & 0o7777, None)
            .and_then(|()| file::keep_attributes(&File::open(to)?, &meta))
            .map_err(|e| self.failed("write", to, e))
    }

    /// Brings a file over in place of another: beside it first, then renamed, durably.
    fn replace_file(&self, from: &Path, to: &Path) -> Result<(), StorageError> {
        let (source, from_folder) = split(from)?;
        let (made, to_folder) = split(to)?;
        let (beside, beside_name) = (
            with_ending(to, PARTIAL),
            with_ending(made.as_ref(), PARTIAL),
        );
        let at = |folder, name| At { folder, name };
        let target = at(&to_folder, beside_name.as_os_str());
        target
            .remove()
            .map_err(|e| self.failed("remove", &beside, e))?;
        let gone = || io::Error::from(ErrorKind::NotFound);
        let put = self
            .bring(at(&from_folder, source), target, &|_| {})
            .map_err(|e| e.into_error(self, || from.to_owned()))
            .and_then(|brought| match brought {
                Brought::Vanished => Err(self.failed("copy", from, gone())),
                _ => File::open(&beside)
                    .and_then(|made| made.sync_all())
                    .and_then(|()| fs::rename(&beside, to))
                    .and_then(|()| to_folder.sync_all())
                    .map_err(|e| self.failed("write", to, e)),
            });
        if put.is_err() {
            let _ = target.remove();
        }
        put
    }

    fn remove(&self, name: &OsStr) -> Result<(), StorageError> {
        let Some(path) = self.pool.existing(name)? else {
            return Ok(());
        };
        fs::remove_dir_all(&path).map_err(|e| self.failed("destroy", &path, e))
    }
}

impl<W: Way> StorageDriver for FileByFile<W> {
    fn kind(&self) -> DriverKind {
        W::KIND
    }

    fn pool(&self) -> &Path {
        self.pool.path()
    }

    fn consistency(&self) -> Consistency {
        Consistency::NeedsBackup
    }

    fn shares_blocks(&self) -> bool {
        W::SHARES
    }

    fn advice(&self) -> Option<String> {
        self.way.advice(&self.pool)
    }

    fn create_volume(&self, id: &VolumeId) -> Result<PathBuf, StorageError> {
        let _in_use = self.pool.in_use()?;
        self.pool.must_be_free(id)?;
        let path = self.volume_path(id);
        DirBuilder::new()
            .mode(0o700)
            .create(&path)
            .map_err(|e| self.failed("create", &path, e))?;
        let given = pool::open_folder(&path).and_then(|f| self.pool.give_to_owner(&f, &path));
        if let Err(error) = given {
            let _ = fs::remove_dir(&path);
            return Err(error);
        }
        Ok(path)
    }

    fn must_have_room(&self, from: &VolumeId, omit: Omit) -> Result<(), StorageError> {
        let source = self.pool.must_exist(from)?;
        if W::SHARES {
            // What little it takes besides is asked for when the clone is made.
            return self.must_have_room_for(0);
        }
        let tree = Tree::read(&source, Path::new(""), omit)?;
        self.must_have_room_for_clone(tree.bytes)
    }

    fn clone_volume(
        &self,
        from: &VolumeId,
        to: &VolumeId,
        omit: Omit,
        progress: Progress<'_>,
    ) -> Result<CloneMethod, StorageError> {
        let _in_use = self.pool.in_use()?;
        let source = self.pool.must_exist(from)?;
        self.pool.must_be_free(to)?;
        let tree = Tree::read(&source, Path::new(""), omit)?;
        self.must_have_room_for_clone(tree.bytes)?;
        let made = self.volume_path(to);
        let partial = HalfMade::begin(&self.pool, with_ending(&made, PARTIAL))?;
        let done = if W::SHARES && tree.is_whole && partial.become_clone_of(&source)? {
            Done {
                files: tree.files.len() as u64,
                shared_bytes: tree.bytes,
                written_bytes: 0,
            }
        } else {
            self.fill(&tree, &source, &partial.0, progress)?
        };
        sync(&partial.0).map_err(|e| self.failed("sync", &partial.0, e))?;
        fs::rename(&partial.0, &made).map_err(|e| self.failed("create", &made, e))?;
        fsx::sync_folder(self.pool.path()).map_err(|e| self.failed("sync", self.pool.path(), e))?;
        progress(tree.bytes, tree.bytes);
        Ok(W::method(done))
    }

    fn catch_up(&self, from: &VolumeId, to: &VolumeId, path: &Path) -> Result<(), StorageError> {
        let (source, made) = (self.pool.must_exist(from)?, self.pool.must_exist(to)?);
        let inside = path.components().all(|c| matches!(c, Component::Normal(_)));
        if !inside || path.as_os_str().is_empty() {
            let outside = io::Error::new(ErrorKind::InvalidInput, "it leads out of the volume");
            return Err(StorageError::io("copy", path)(outside));
        }
        let (from, to) = (source.join(path), made.join(path));
        let meta = fs::symlink_metadata(&from).map_err(|e| self.failed("read", &from, e))?;
        if meta.is_file() && meta.len() <= SMALL_BYTES {
            return self.replace_small(&from, &to);
        }
        if meta.is_file() {
            self.must_have_room_for_clone(usage::allocated_bytes(&meta))?;
            return self.replace_file(&from, &to);
        }
        let tree = Tree::read(&source, path, Omit::NOTHING)?;
        self.must_have_room_for_clone(tree.bytes)?;
        for name in tree.file_names() {
            match fs::remove_file(made.join(&name)) {
                Err(e) if e.kind() != ErrorKind::NotFound => {
                    return Err(self.failed("replace", &made.join(name), e));
                }
                _ => {}
            }
        }
        self.fill(&tree, &source, &made, &|_, _| {})?;
        sync(&to).map_err(|e| self.failed("sync", &to, e))
    }

    fn destroy(&self, id: &VolumeId) -> Result<(), StorageError> {
        let _in_use = self.pool.in_use()?;
        let path = self.volume_path(id);
        let doomed = with_ending(&path, DOOMED);
        if self.pool.existing(id.as_str().as_ref())?.is_some() {
            // Left by a destroy that was interrupted, and in the way of the next.
            self.remove(&ended(id, DOOMED))?;
            fs::rename(&path, &doomed).map_err(|e| self.failed("destroy", &path, e))?;
        }
        self.remove(&ended(id, PARTIAL))?;
        self.remove(&ended(id, DOOMED))
    }

    fn list(&self) -> Result<Vec<VolumeId>, StorageError> {
        self.pool.volumes()
    }

    fn sweep(&self) -> Result<usize, StorageError> {
        let Some(_alone) = self.pool.alone()? else {
            return Ok(0);
        };
        let left = self.pool.remains()?;
        left.iter().try_for_each(|name| self.remove(name))?;
        Ok(left.len())
    }

    fn usage(&self, id: &VolumeId) -> Result<Usage, StorageError> {
        self.survey.usage(&self.pool, id, self.way.may_be_shared())
    }

    fn usage_of_all(&self, ids: &[VolumeId]) -> Result<Usages, StorageError> {
        self.survey.look(&self.pool, ids, self.way.may_be_shared())
    }

    fn space(&self) -> Result<Space, StorageError> {
        self.pool.space()
    }
}

/// A folder that is being filled. Once it was renamed there is nothing left to remove.
struct HalfMade(PathBuf);

impl HalfMade {
    fn begin(pool: &Pool, path: PathBuf) -> Result<Self, StorageError> {
        // Of a process that died; ids are random, so nobody else is making this one.
        match fs::remove_dir_all(&path) {
            Err(e) if e.kind() != ErrorKind::NotFound => {
                return Err(StorageError::io("remove", &path)(e));
            }
            _ => {}
        }
        DirBuilder::new()
            .mode(0o700)
            .create(&path)
            .map_err(|e| failed(pool, "create", &path, e))?;
        Ok(Self(path))
    }

    /// Becomes a clone of a whole folder by one call. False where there is no such call, or it
    /// fails; the folder is empty then.
    #[cfg(target_os = "macos")]
    fn become_clone_of(&self, source: &Path) -> Result<bool, StorageError> {
        use std::ffi::CString;
        use std::os::unix::ffi::OsStrExt;
        let name = |path: &Path| CString::new(path.as_os_str().as_bytes());
        let (Ok(from), Ok(to)) = (name(source), name(&self.0)) else {
            return Ok(false);
        };
        fs::remove_dir(&self.0).map_err(StorageError::io("remove", &self.0))?;
        if let Err(e) = ioctl::clone_folder(&from, &to) {
            tracing::debug!(folder = %source.display(), error = %e, "no clone at once, but file by file");
            let _ = fs::remove_dir_all(&self.0);
            DirBuilder::new()
                .mode(0o700)
                .create(&self.0)
                .map_err(StorageError::io("create", &self.0))?;
            return Ok(false);
        }
        Ok(true)
    }

    /// No other system clones a folder at once.
    #[cfg(not(target_os = "macos"))]
    #[expect(
        clippy::unused_self,
        clippy::unnecessary_wraps,
        reason = "the same signature on every system"
    )]
    fn become_clone_of(&self, _source: &Path) -> Result<bool, StorageError> {
        Ok(false)
    }
}

impl Drop for HalfMade {
    fn drop(&mut self) {
        match fs::remove_dir_all(&self.0) {
            Err(e) if e.kind() != ErrorKind::NotFound => {
                tracing::warn!(folder = %self.0.display(), error = %e, "a half-made volume is left");
            }
            _ => {}
        }
    }
}

/// Why files of the pool can't share blocks, found by trying; none if they can.
pub(super) fn why_not_shared(pool: &Pool) -> Result<Option<String>, StorageError> {
    // Swept like any other half-made volume if this process dies.
    let _in_use = pool.in_use()?;
    let id = VolumeId::random();
    let folder = HalfMade::begin(pool, pool.path().join(ended(&id, PARTIAL)))?;
    let tried = || {
        let mut from = File::create_new(folder.0.join("from"))?;
        from.write_all(&[1; 4096])?;
        // ZFS shares only what is on disk.
        from.sync_all()?;
        let folder = File::open(&folder.0)?;
        let at = |name| At {
            folder: &folder,
            name: OsStr::new(name),
        };
        match Source::open(at("from"))? {
            Some(source) => source.share(at("to")),
            None => Err(ErrorKind::NotFound.into()),
        }
    };
    let shared = tried().map_err(|e| failed(pool, "try to share blocks in", pool.path(), e))?;
    Ok(
        (!shared).then(|| match pool::file_system_name(pool.path()) {
            name if name == "XFS" => {
                "this XFS file system was made without reflink (mkfs.xfs -m reflink=1)".into()
            }
            name => format!("the file system is {name}, whose files can't share blocks"),
        }),
    )
}

/// What a failed call means.
fn failed(pool: &Pool, action: &'static str, path: &Path, source: io::Error) -> StorageError {
    pool.failure(action, path, 0, source)
}

fn ended(id: &VolumeId, ending: &str) -> OsString {
    format!("{id}{ending}").into()
}

fn with_ending(path: &Path, ending: &str) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(ending);
    name.into()
}

/// A file's name, and its folder opened.
fn split(path: &Path) -> Result<(&OsStr, File), StorageError> {
    let folder = path.parent().unwrap_or(path);
    let name = path.file_name().unwrap_or_default();
    Ok((name, pool::open_folder(folder)?))
}

#[cfg(test)]
mod tests;
