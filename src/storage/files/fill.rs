//! Fills a folder with what a tree holds, several files at a time.

use std::fs::{self, DirBuilder, File};
use std::io::{self, ErrorKind};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, lchown, symlink};
use std::path::{Path, PathBuf};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::thread;

use nix::unistd::Uid;

use super::super::{Progress, StorageError, pool};
use super::file::{At, Source, keep_attributes};
use super::tree::{Batch, Tree};
use super::{FileByFile, Way};

/// What was brought over.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(in crate::storage) struct Done {
    pub(in crate::storage) files: u64,
    pub(in crate::storage) shared_bytes: u64,
    pub(in crate::storage) written_bytes: u64,
}

/// [`Done`] while several threads count.
#[derive(Debug, Default)]
struct Counters {
    files: AtomicU64,
    shared_bytes: AtomicU64,
    written_bytes: AtomicU64,
}

/// From one folder to another.
#[derive(Debug, Clone, Copy)]
struct Route<'a> {
    from: &'a Path,
    to: &'a Path,
}

impl<W: Way> FileByFile<W> {
    /// Brings all of `tree` from one folder into another that is empty but for
    /// the tree's own top.
    pub(super) fn fill(
        &self,
        tree: &Tree,
        from: &Path,
        to: &Path,
        progress: Progress<'_>,
    ) -> Result<Done, StorageError> {
        for (name, _) in &tree.folders {
            let path = to.join(name);
            match DirBuilder::new().mode(0o700).create(&path) {
                Err(e) if e.kind() == ErrorKind::AlreadyExists && path.is_dir() => {}
                Err(e) => return Err(self.failed("create", &path, e)),
                Ok(()) => {}
            }
        }
        for (name, meta) in &tree.links {
            self.fill_link(&from.join(name), &to.join(name), meta)?;
        }
        let done = self.fill_files(tree, Route { from, to }, progress)?;
        // Last and from the bottom up, as filling a folder changes its time.
        for (name, meta) in tree.folders.iter().rev() {
            let path = to.join(name);
            keep_attributes(&pool::open_folder(&path)?, meta)
                .map_err(|e| self.failed("set the mode of", &path, e))?;
        }
        Ok(done)
    }

    fn fill_link(&self, from: &Path, to: &Path, meta: &fs::Metadata) -> Result<(), StorageError> {
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

    fn fill_files(
        &self,
        tree: &Tree,
        route: Route<'_>,
        progress: Progress<'_>,
    ) -> Result<Done, StorageError> {
        let batches = tree.batches();
        let (next, so_far) = (AtomicUsize::new(0), AtomicU64::new(0));
        let (counters, failure) = (Counters::default(), OnceLock::new());
        let step = |bytes| {
            let done = so_far.fetch_add(bytes, Ordering::Relaxed) + bytes;
            // Files may have grown since they were counted.
            progress(done.min(tree.bytes), tree.bytes);
        };
        let work = || {
            while failure.get().is_none() {
                let Some(batch) = batches.get(next.fetch_add(1, Ordering::Relaxed)) else {
                    return;
                };
                if let Err(e) = self.fill_batch(tree, batch, route, &counters, &step) {
                    // The first failure counts; later ones follow from it.
                    let _ = failure.set(e);
                }
            }
        };
        thread::scope(|scope| {
            let threads = thread::available_parallelism().map_or(2, |n| n.get().clamp(2, 8));
            for _ in 1..threads.min(batches.len()) {
                scope.spawn(work);
            }
            work();
        });
        match failure.into_inner() {
            Some(error) => Err(error),
            None => Ok(Done {
                files: counters.files.into_inner(),
                shared_bytes: counters.shared_bytes.into_inner(),
                written_bytes: counters.written_bytes.into_inner(),
            }),
        }
    }

    fn fill_batch(
        &self,
        tree: &Tree,
        batch: &Batch,
        route: Route<'_>,
        counters: &Counters,
        step: &dyn Fn(u64),
    ) -> Result<(), StorageError> {
        let folder = &tree.folders[batch.folder].0;
        let (from_path, to_path) = (route.from.join(folder), route.to.join(folder));
        let from = match pool::open_folder(&from_path) {
            // A database that was dropped meanwhile.
            Err(StorageError::Io { source, .. }) if source.kind() == ErrorKind::NotFound => {
                return Ok(());
            }
            opened => opened?,
        };
        let to = pool::open_folder(&to_path)?;
        let mut shared = 0;
        for entry in &tree.files[batch.files.clone()] {
            let name = &entry.name;
            let (from, to) = (
                At {
                    folder: &from,
                    name,
                },
                At { folder: &to, name },
            );
            let brought = self
                .bring(from, to, step)
                .map_err(|e| e.into_error(self, || from_path.join(name)))?;
            let counted = match brought {
                Brought::Shared(bytes) => {
                    shared += bytes;
                    &counters.shared_bytes
                }
                Brought::Written(_) => &counters.written_bytes,
                Brought::Vanished => continue,
            };
            counted.fetch_add(brought.bytes(), Ordering::Relaxed);
            counters.files.fetch_add(1, Ordering::Relaxed);
        }
        // Sharing is quick: a report for each file would cost more than the work.
        step(shared);
        Ok(())
    }

    /// Brings one file to where none is. Only what is written is told to `step`.
    pub(super) fn bring(
        &self,
        from: At<'_>,
        to: At<'_>,
        step: &dyn Fn(u64),
    ) -> Result<Brought, Failure> {
        let Some(source) = Source::open(from)? else {
            return Ok(Brought::Vanished);
        };
        let bytes = source.allocated_bytes();
        if W::SHARES {
            if source.share(to)? {
                return Ok(Brought::Shared(bytes));
            }
            // Room for that was not asked for in the beginning.
            self.must_have_room_for(bytes).map_err(Failure::Storage)?;
        }
        let step = |bytes| {
            step(bytes);
            self.leave_room_for_servers()
        };
        source.write(to, &step)?;
        Ok(Brought::Written(bytes))
    }

    /// Others fill the disk too while a copy is made. It gives up before servers find none left to
    /// write their log to, at which they would stop.
    fn leave_room_for_servers(&self) -> io::Result<()> {
        match self.pool.space() {
            Ok(space) if space.free_bytes < self.margin_bytes / 2 => {
                Err(ErrorKind::StorageFull.into())
            }
            _ => Ok(()),
        }
    }
}

/// How a file came over, with the bytes it has on disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Brought {
    Shared(u64),
    Written(u64),
    /// The source is gone.
    Vanished,
}

impl Brought {
    fn bytes(self) -> u64 {
        match self {
            Self::Shared(bytes) | Self::Written(bytes) => bytes,
            Self::Vanished => 0,
        }
    }
}

/// Why a file could not be brought over: its path is put in by the caller, who knows it.
#[derive(Debug)]
pub(super) enum Failure {
    Io(io::Error),
    Storage(StorageError),
}

impl From<io::Error> for Failure {
    fn from(e: io::Error) -> Self {
        Self::Io(e)
    }
}

impl Failure {
    pub(super) fn into_error<W: Way>(
        self,
        driver: &FileByFile<W>,
        path: impl FnOnce() -> PathBuf,
    ) -> StorageError {
        match self {
            Self::Io(e) => driver.failed("copy", &path(), e),
            Self::Storage(e) => e,
        }
    }
}

/// Makes all below `folder` durable: one call instead of one a file (syncfs(2)).
#[cfg(target_os = "linux")]
pub(in crate::storage) fn sync(folder: &Path) -> io::Result<()> {
    Ok(nix::unistd::syncfs(File::open(folder)?)?)
}

/// Makes all below `folder` durable. fsync(2) of this system hands a file to the disk, and
/// only the last one, which std makes `F_FULLFSYNC`, waits until the disk has written all.
#[cfg(not(target_os = "linux"))]
pub(in crate::storage) fn sync(folder: &Path) -> io::Result<()> {
    fn hand_over(folder: &Path) -> io::Result<()> {
        for entry in fs::read_dir(folder)? {
            let entry = entry?;
            match entry.file_type()? {
                kind if kind.is_dir() => hand_over(&entry.path())?,
                kind if kind.is_file() => nix::unistd::fsync(File::open(entry.path())?)?,
                _ => {}
            }
        }
        Ok(nix::unistd::fsync(File::open(folder)?)?)
    }
    hand_over(folder)?;
    crate::fsx::sync_folder(folder)
}
