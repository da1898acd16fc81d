//! The copy driver: a volume is a folder, a clone is made file by file.
//!
//! It works on any file system. Where the kernel shares blocks between files
//! (XFS, btrfs, APFS) a clone takes no room; elsewhere it costs a full copy.
//! A clone is made under a name that is no volume's and renamed when all of it is
//! on disk, and destroying begins with such a rename.

use std::ffi::OsString;
use std::fs::{self, DirBuilder, File};
use std::io::{self, ErrorKind};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, lchown, symlink};
use std::path::{Component, Path, PathBuf};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::thread;

use nix::unistd::Uid;

use self::file::{Copied, Pair};
use self::tree::Tree;
use super::pool::{self, DOOMED, PARTIAL, Pool};
use super::{
    CloneMethod, Consistency, DriverKind, Omit, Progress, Space, StorageDriver, StorageError,
    Usage, usage,
};
use crate::fsx;
use crate::types::VolumeId;

pub(super) mod file;
pub(super) mod tree;

/// The files that probing makes end so.
pub(super) const PROBE: &str = ".probe";

/// What must stay free after a full copy: postgres that finds a full disk stops.
pub(super) const MARGIN_BYTES: u64 = 64 << 20;

/// Up to this length a file is read whole when it is caught up with.
const SMALL_BYTES: u64 = 64 << 10;

#[derive(Debug)]
pub(super) struct Copy {
    pool: Pool,
    shares_blocks: bool,
    why_not_btrfs: Option<String>,
    margin_bytes: u64,
}

impl Copy {
    /// `why_not_btrfs` is told users when the better driver was tried in vain.
    pub(super) fn open(pool: Pool, why_not_btrfs: Option<String>) -> Result<Self, StorageError> {
        let shares_blocks = probe_sharing(&pool)?;
        Ok(Self {
            pool,
            shares_blocks,
            why_not_btrfs,
            margin_bytes: MARGIN_BYTES,
        })
    }

    fn must_have_room(&self, bytes: u64) -> Result<(), StorageError> {
        let needed_bytes = if self.shares_blocks { 0 } else { bytes }
            // Folders, block maps and the first steps of the new server.
            .saturating_add(bytes / 100)
            .saturating_add(self.margin_bytes);
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
        match source.kind() {
            ErrorKind::StorageFull | ErrorKind::QuotaExceeded => StorageError::NoRoom {
                path: self.pool.path().to_owned(),
                needed_bytes: self.margin_bytes,
                free_bytes: self.pool.space().map_or(0, |s| s.free_bytes),
            },
            ErrorKind::PermissionDenied => StorageError::Denied {
                action,
                path: path.to_owned(),
                hint: "volumes must belong to the user that dbranch runs as".into(),
            },
            _ => StorageError::io(action, path)(source),
        }
    }

    /// Copies all of `tree` from one folder into another that is empty but for
    /// the tree's own top. Says how many bytes were shared and how many written.
    fn copy_tree(
        &self,
        tree: &Tree,
        from: &Path,
        to: &Path,
        progress: Progress<'_>,
    ) -> Result<(u64, u64), StorageError> {
        for (name, _) in &tree.folders {
            let path = to.join(name);
            match DirBuilder::new().mode(0o700).create(&path) {
                Err(e) if e.kind() == ErrorKind::AlreadyExists && path.is_dir() => {}
                Err(e) => return Err(self.failed("create", &path, e)),
                Ok(()) => {}
            }
        }
        for (name, meta) in &tree.links {
            self.copy_link(&from.join(name), &to.join(name), meta)?;
        }
        let copied = self.copy_files(tree, from, to, progress)?;
        // Last and from the bottom up, as filling a folder changes its time.
        for (name, meta) in tree.folders.iter().rev() {
            let path = to.join(name);
            file::keep_attributes(&pool::open_folder(&path)?, meta)
                .map_err(|e| self.failed("set the mode of", &path, e))?;
        }
        Ok(copied)
    }

    fn copy_link(&self, from: &Path, to: &Path, meta: &fs::Metadata) -> Result<(), StorageError> {
        let target = match fs::read_link(from) {
            Ok(target) => target,
            Err(e) if e.kind() == ErrorKind::NotFound => return Ok(()),
            Err(e) => return Err(self.failed("read", from, e)),
        };
        let _ = fs::remove_file(to);
        symlink(target, to).map_err(|e| self.failed("create", to, e))?;
        if Uid::effective().is_root() {
            lchown(to, Some(meta.uid()), Some(meta.gid()))
                .map_err(|e| self.failed("set the owner of", to, e))?;
        }
        Ok(())
    }

    fn copy_files(
        &self,
        tree: &Tree,
        from: &Path,
        to: &Path,
        progress: Progress<'_>,
    ) -> Result<(u64, u64), StorageError> {
        let next = AtomicUsize::new(0);
        let (done, shared, written) = (AtomicU64::new(0), AtomicU64::new(0), AtomicU64::new(0));
        let failure = OnceLock::new();
        let step = |bytes| {
            let so_far = done.fetch_add(bytes, Ordering::Relaxed) + bytes;
            // Files may have grown since they were counted.
            progress(so_far.min(tree.bytes), tree.bytes);
        };
        let work = || {
            while failure.get().is_none() {
                let Some((name, _)) = tree.files.get(next.fetch_add(1, Ordering::Relaxed)) else {
                    return;
                };
                let (from, to) = (from.join(name), to.join(name));
                let pair = Pair {
                    from: &from,
                    to: &to,
                };
                match file::copy(pair, self.shares_blocks, &step) {
                    Ok(Copied::Shared(bytes)) => drop(shared.fetch_add(bytes, Ordering::Relaxed)),
                    Ok(Copied::Written(bytes)) => drop(written.fetch_add(bytes, Ordering::Relaxed)),
                    Ok(Copied::Vanished) => {}
                    Err(e) => {
                        // The first failure counts; later ones follow from it.
                        let _ = failure.set(self.failed("copy", &from, e));
                    }
                }
            }
        };
        thread::scope(|scope| {
            let threads = thread::available_parallelism().map_or(2, |n| n.get().clamp(2, 8));
            for _ in 1..threads.min(tree.files.len()) {
                scope.spawn(work);
            }
            work();
        });
        match failure.into_inner() {
            Some(error) => Err(error),
            None => Ok((shared.into_inner(), written.into_inner())),
        }
    }

    /// Puts a small file in place of another at once, as it was at one moment.
    fn replace_small(&self, from: &Path, to: &Path) -> Result<(), StorageError> {
        let (bytes, meta) = file::read_settled(from).map_err(|e| self.failed("read", from, e))?;
        fsx::write_atomic(to, &bytes, meta.mode() & 0o7777, None)
            .and_then(|()| file::keep_attributes(&File::open(to)?, &meta))
            .map_err(|e| self.failed("write", to, e))
    }

    /// Copies a file in place of another: beside it first, then renamed, durably.
    fn replace_file(&self, from: &Path, to: &Path) -> Result<(), StorageError> {
        let beside = with_ending(to, PARTIAL);
        let copied = fs::remove_file(&beside)
            .or_else(|e| {
                if e.kind() == ErrorKind::NotFound {
                    Ok(())
                } else {
                    Err(e)
                }
            })
            .and_then(|()| {
                let pair = Pair { from, to: &beside };
                match file::copy(pair, self.shares_blocks, &|_| {})? {
                    Copied::Vanished => Err(ErrorKind::NotFound.into()),
                    _ => File::open(&beside)?.sync_all(),
                }
            })
            .and_then(|()| fs::rename(&beside, to));
        if let Err(e) = copied {
            let _ = fs::remove_file(&beside);
            return Err(self.failed("copy", from, e));
        }
        let folder = to.parent().unwrap_or(to);
        fsx::sync_folder(folder).map_err(|e| self.failed("sync", folder, e))
    }

    fn remove(&self, name: &std::ffi::OsStr) -> Result<(), StorageError> {
        let Some(path) = self.pool.existing(name)? else {
            return Ok(());
        };
        fs::remove_dir_all(&path).map_err(|e| self.failed("destroy", &path, e))
    }
}

impl StorageDriver for Copy {
    fn kind(&self) -> DriverKind {
        DriverKind::Copy
    }

    fn pool(&self) -> &Path {
        self.pool.path()
    }

    fn consistency(&self) -> Consistency {
        Consistency::NeedsBackup
    }

    fn shares_blocks(&self) -> bool {
        self.shares_blocks
    }

    fn advice(&self) -> Option<String> {
        if self.shares_blocks {
            return None;
        }
        let name = pool::file_system_name(self.pool.path());
        let why = match &self.why_not_btrfs {
            Some(reason) => format!("btrfs can't be used: {reason}"),
            None => format!("the file system is {name}"),
        };
        Some(format!(
            "every branch is a full copy of its parent's data in {} ({why}); on btrfs a branch takes \
             milliseconds and next to no room, whatever the size: move the pool there",
            self.pool.path().display()
        ))
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
        self.must_have_room(tree.bytes)?;
        let made = self.volume_path(to);
        let partial = HalfMade::begin(with_ending(&made, PARTIAL))?;
        let (shared, written) = self.copy_tree(&tree, &source, &partial.0, progress)?;
        sync(&partial.0).map_err(|e| self.failed("sync", &partial.0, e))?;
        fs::rename(&partial.0, &made).map_err(|e| self.failed("create", &made, e))?;
        fsx::sync_folder(self.pool.path()).map_err(|e| self.failed("sync", self.pool.path(), e))?;
        let bytes = tree.bytes;
        progress(bytes, bytes);
        Ok(if shared > written {
            CloneMethod::SharedCopy { bytes }
        } else {
            CloneMethod::FullCopy { bytes }
        })
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
            self.must_have_room(usage::allocated_bytes(&meta))?;
            return self.replace_file(&from, &to);
        }
        let tree = Tree::read(&source, path, Omit::NOTHING)?;
        self.must_have_room(tree.bytes)?;
        for (name, _) in &tree.files {
            match fs::remove_file(made.join(name)) {
                Err(e) if e.kind() != ErrorKind::NotFound => {
                    return Err(self.failed("replace", &made.join(name), e));
                }
                _ => {}
            }
        }
        self.copy_tree(&tree, &source, &made, &|_, _| {})?;
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
        usage::measure(&self.pool.must_exist(id)?, self.shares_blocks)
    }

    fn space(&self) -> Result<Space, StorageError> {
        self.pool.space()
    }
}

/// A folder that is being filled. Once it was renamed there is nothing left to remove.
struct HalfMade(PathBuf);

impl HalfMade {
    fn begin(path: PathBuf) -> Result<Self, StorageError> {
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
            .map_err(StorageError::io("create", &path))?;
        Ok(Self(path))
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

fn ended(id: &VolumeId, ending: &str) -> OsString {
    format!("{id}{ending}").into()
}

fn with_ending(path: &Path, ending: &str) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(ending);
    name.into()
}

/// Makes all below `folder` durable: one call instead of one a file (syncfs(2)).
#[cfg(target_os = "linux")]
pub(super) fn sync(folder: &Path) -> io::Result<()> {
    Ok(nix::unistd::syncfs(File::open(folder)?)?)
}

/// Makes all below `folder` durable.
#[cfg(not(target_os = "linux"))]
pub(super) fn sync(folder: &Path) -> io::Result<()> {
    for entry in fs::read_dir(folder)? {
        let entry = entry?;
        match entry.file_type()? {
            kind if kind.is_dir() => sync(&entry.path())?,
            kind if kind.is_file() => File::open(entry.path())?.sync_all()?,
            _ => {}
        }
    }
    fsx::sync_folder(folder)
}

/// Whether two files in the pool can share blocks, found by trying.
#[cfg(target_os = "linux")]
fn probe_sharing(pool: &Pool) -> Result<bool, StorageError> {
    use std::io::Write;
    use std::os::fd::AsFd;
    let stem = VolumeId::random();
    let paths = [1, 2].map(|n| pool.path().join(format!(".{stem}-{n}{PROBE}")));
    let tried = (|| {
        let mut from =
            File::create_new(&paths[0]).map_err(StorageError::io("create", &paths[0]))?;
        let to = File::create_new(&paths[1]).map_err(StorageError::io("create", &paths[1]))?;
        from.write_all(&[1; 4096])
            .map_err(StorageError::io("write", &paths[0]))?;
        Ok(super::btrfs::ioctl::share_file(from.as_fd(), to.as_fd()).is_ok())
    })();
    for path in &paths {
        let _ = fs::remove_file(path);
    }
    tried
}

/// APFS always can, and no other file system of that system.
#[cfg(not(target_os = "linux"))]
#[expect(
    clippy::unnecessary_wraps,
    reason = "the same signature on every system"
)]
fn probe_sharing(pool: &Pool) -> Result<bool, StorageError> {
    Ok(pool::file_system_name(pool.path()) == "apfs")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::types::Owner;

    fn driver(folder: &Path) -> Copy {
        let owner = Owner {
            uid: Uid::effective().as_raw(),
            gid: nix::unistd::Gid::effective().as_raw(),
        };
        Copy::open(Pool::open(folder, owner).unwrap(), None).unwrap()
    }

    #[test]
    fn too_little_room_is_noticed_before_anything_is_made() {
        let folder = tempfile::tempdir().unwrap();
        let mut driver = driver(folder.path());
        let (from, to) = (VolumeId::random(), VolumeId::random());
        fs::write(driver.create_volume(&from).unwrap().join("x"), "x").unwrap();
        driver.margin_bytes = u64::MAX / 2;
        let error = driver
            .clone_volume(&from, &to, Omit::NOTHING, &|_, _| {})
            .unwrap_err();
        assert!(matches!(error, StorageError::NoRoom { .. }), "{error}");
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1);
    }

    #[test]
    fn a_clone_that_fails_half_way_leaves_nothing() {
        let folder = tempfile::tempdir().unwrap();
        let driver = driver(folder.path());
        let (from, to) = (VolumeId::random(), VolumeId::random());
        let volume = driver.create_volume(&from).unwrap();
        for n in 0..50 {
            fs::write(volume.join(n.to_string()), "data").unwrap();
        }
        // The half-made clone loses its name, as if the disk had failed: nothing more can be put in.
        let partial = with_ending(&driver.volume_path(&to), PARTIAL);
        let result = driver.clone_volume(&from, &to, Omit::NOTHING, &|_, _| {
            let _ = fs::remove_dir_all(&partial);
        });
        assert!(result.is_err());
        assert_eq!(driver.list().unwrap(), [from]);
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1);
    }

    #[test]
    fn what_interrupted_calls_left_is_no_volume_and_is_swept() {
        let folder = tempfile::tempdir().unwrap();
        let driver = driver(folder.path());
        let kept = VolumeId::random();
        driver.create_volume(&kept).unwrap();
        for name in ["abc.partial/data", "abd.doomed/data", "mine.backup"] {
            fs::create_dir_all(folder.path().join(name)).unwrap();
        }
        assert_eq!(driver.list().unwrap(), [kept]);
        assert_eq!(driver.sweep().unwrap(), 2);
        assert_eq!(driver.sweep().unwrap(), 0);
        assert!(folder.path().join("mine.backup").exists());
    }

    #[test]
    fn a_sweep_leaves_all_while_anybody_uses_the_pool() {
        let folder = tempfile::tempdir().unwrap();
        let (ours, theirs) = (driver(folder.path()), driver(folder.path()));
        fs::create_dir(folder.path().join("abc.partial")).unwrap();
        let (one, other) = (theirs.pool.in_use().unwrap(), ours.pool.in_use().unwrap());
        drop(other);
        assert_eq!(ours.sweep().unwrap(), 0);
        assert!(folder.path().join("abc.partial").exists());
        drop(one);
        assert_eq!(ours.sweep().unwrap(), 1);
    }

    #[test]
    fn a_pool_without_shared_blocks_says_what_it_costs() {
        let folder = tempfile::tempdir().unwrap();
        let mut driver = driver(folder.path());
        driver.shares_blocks = false;
        driver.why_not_btrfs = Some("the file system is ext4".into());
        let advice = driver.advice().unwrap();
        assert!(
            advice.contains("full copy") && advice.contains("ext4"),
            "{advice}"
        );
        driver.shares_blocks = true;
        assert_eq!(driver.advice(), None);
    }
}
