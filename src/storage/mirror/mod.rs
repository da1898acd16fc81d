//! Makes one volume like another, of whatever driver and pool, writing only what differs.
//!
//! ```text
//!   round(InUse)    the source is read while its server writes: what comes over may be torn
//!   round(InUse)    again, only what changed since: the difference gets small
//!   (the server is stopped)
//!   round(AtRest)   what changed since; then they are equal, which is verified, and on disk
//! ```
//!
//! The target may be empty, or a clone of something alike: it then goes on sharing
//! with that what the two have in common.
//!
//! A file is passed over without reading it only where it can't have changed since it was
//! read: device, inode, length, mtime and ctime are as they were, and the ctime had then been over
//! for a second. The kernel stamps the ctime at every write, to the tick (some milliseconds), and no
//! program can set it. That holds for file systems of this machine whose clock wasn't set back
//! in between; where either isn't known, bytes are compared. Writes through a
//! shared mapping may escape it; PostgreSQL makes none but in `pg_dynshmem`, which means nothing
//! to a server that was stopped.

mod diff;
mod estimate;
mod tree;

use std::collections::HashMap;
use std::fs::{self, DirBuilder, File, Metadata, OpenOptions};
use std::io::{self, ErrorKind};
use std::ops::Range;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt, lchown, symlink};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, OnceLock, PoisonError};
use std::thread;
use std::time::{Duration, Instant, SystemTime};

use nix::unistd::Uid;

pub use self::estimate::{Estimate, estimate};
use self::tree::{Kind, Tree};
use super::files::file::{self, At};
use super::{StorageError, files, pool};
use crate::types::VolumeId;

/// How long before its reading a file must have been left alone, so that its times tell
/// of every later change. Kernels stamp to the tick, 10 ms at most.
const SETTLED: Duration = Duration::from_secs(1);

/// How much the clock may lose before it counts as set back.
const CLOCK_SLACK: Duration = Duration::from_millis(500);

/// Whether anybody writes to the source during a round.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Source {
    /// Files may change, appear and vanish: the round makes no promise.
    InUse,
    /// Nothing changes: when the round is done, the volumes are equal.
    AtRest,
}

/// What a round did.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Round {
    /// Bytes written to the target. What shares blocks with the source wasn't written.
    pub written_bytes: u64,
    /// Files that were looked into.
    pub files: usize,
}

/// A volume on its way to another place.
#[derive(Debug)]
pub struct Mirror {
    from: PathBuf,
    to: PathBuf,
    /// Files of the two can share blocks, so that copying takes no room.
    shares: bool,
    seen: HashMap<PathBuf, Seen>,
    clock: Clock,
    /// The source's files bear this machine's time.
    has_our_clock: bool,
}

/// What tells whether a file has changed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Signature {
    device: u64,
    inode: u64,
    len: u64,
    mtime: (i64, i64),
    ctime: (i64, i64),
}

/// A file as it was when it came over.
#[derive(Debug, Clone, Copy)]
struct Seen {
    signature: Signature,
    settled: bool,
}

impl Seen {
    fn at(meta: &Metadata, read_from: SystemTime) -> Self {
        let changed = u64::try_from(meta.ctime()).ok().and_then(|seconds| {
            let nanos = u32::try_from(meta.ctime_nsec()).ok()?;
            SystemTime::UNIX_EPOCH.checked_add(Duration::new(seconds, nanos))
        });
        Self {
            signature: Signature {
                device: meta.dev(),
                inode: meta.ino(),
                len: meta.len(),
                mtime: (meta.mtime(), meta.mtime_nsec()),
                ctime: (meta.ctime(), meta.ctime_nsec()),
            },
            settled: changed
                .and_then(|at| read_from.duration_since(at).ok())
                .is_some_and(|age| age >= SETTLED),
        }
    }
}

/// Notices a clock that was set back.
#[derive(Debug, Clone, Copy)]
struct Clock {
    wall: SystemTime,
    monotonic: Instant,
}

impl Clock {
    fn start() -> Self {
        Self {
            wall: SystemTime::now(),
            monotonic: Instant::now(),
        }
    }

    fn was_set_back(&self) -> bool {
        SystemTime::now() + CLOCK_SLACK < self.wall + self.monotonic.elapsed()
    }
}

impl Mirror {
    /// From one existing volume to another, which nobody else uses.
    pub fn new(from: PathBuf, to: PathBuf, shares: bool) -> Self {
        Self {
            has_our_clock: has_our_clock(&from),
            from,
            to,
            shares,
            seen: HashMap::new(),
            clock: Clock::start(),
        }
    }

    /// Brings over what changed since the last round, durably. `step` gets the bytes looked
    /// at; when `go_on` says no, the round ends with `Interrupted`. After a round
    /// that failed another one may be tried.
    pub fn round(
        &mut self,
        source: Source,
        step: &(dyn Fn(u64) + Sync),
        go_on: &(dyn Fn() -> bool + Sync),
    ) -> Result<Round, StorageError> {
        if self.clock.was_set_back() || !self.has_our_clock {
            self.seen.clear();
        }
        let ours = Tree::read(&self.from)?;
        let theirs = Tree::read(&self.to)?;
        self.remove_what_is_not_wanted(&ours, &theirs)?;
        for (name, _) in &ours.folders {
            let path = self.to.join(name);
            match DirBuilder::new().mode(0o700).create(&path) {
                Err(e) if e.kind() != ErrorKind::AlreadyExists => {
                    return Err(self.failed("create", &path, e));
                }
                _ => {}
            }
        }
        for (name, meta) in &ours.links {
            self.bring_link(source, name, meta)?;
        }
        let touched = self.bring_files(source, &ours, step, go_on)?;
        // From the bottom up, as filling a folder changes its time.
        for (name, meta) in ours.folders.iter().rev() {
            let path = self.to.join(name);
            let folder = pool::open_folder(&path)?;
            file::keep_attributes(&folder, meta)
                .map_err(|e| self.failed("set the mode of", &path, e))?;
        }
        files::sync(&self.to).map_err(|e| self.failed("sync", &self.to, e))?;
        if source == Source::AtRest {
            self.verify(&ours, &touched.files)?;
        }
        Ok(Round {
            written_bytes: touched.written_bytes,
            files: touched.files.len(),
        })
    }

    /// Removes from the target what the source has not, or has as something else.
    fn remove_what_is_not_wanted(&self, ours: &Tree, theirs: &Tree) -> Result<(), StorageError> {
        let wanted: HashMap<&Path, Kind> = ours.entries().map(|(n, kind, _)| (n, kind)).collect();
        let all: Vec<_> = theirs.entries().collect();
        // Folders come first and each before what is in it, so backwards they are empty.
        for (name, kind, _) in all.into_iter().rev() {
            if wanted.get(name) == Some(&kind) {
                continue;
            }
            let path = self.to.join(name);
            let removed = match kind {
                // Sockets and pipes, which a tree leaves out, may be in it.
                Kind::Folder => fs::remove_dir_all(&path),
                Kind::File | Kind::Link => fs::remove_file(&path),
            };
            removed.map_err(|e| self.failed("remove", &path, e))?;
        }
        Ok(())
    }

    fn bring_link(&self, source: Source, name: &Path, meta: &Metadata) -> Result<(), StorageError> {
        let (from, to) = (self.from.join(name), self.to.join(name));
        let target = match fs::read_link(&from) {
            Ok(target) => target,
            Err(_) if source == Source::InUse => return Ok(()),
            Err(e) => return Err(self.failed("read", &from, e)),
        };
        match fs::read_link(&to) {
            Ok(there) if there == target => return Ok(()),
            Ok(_) => fs::remove_file(&to).map_err(|e| self.failed("replace", &to, e))?,
            Err(_) => {}
        }
        symlink(target, &to).map_err(|e| self.failed("create", &to, e))?;
        if Uid::effective().is_root() {
            lchown(&to, Some(meta.uid()), Some(meta.gid()))
                .map_err(|e| self.failed("set the owner of", &to, e))?;
        }
        Ok(())
    }

    fn bring_files(
        &mut self,
        source: Source,
        ours: &Tree,
        step: &(dyn Fn(u64) + Sync),
        go_on: &(dyn Fn() -> bool + Sync),
    ) -> Result<Touched, StorageError> {
        let next = AtomicUsize::new(0);
        let failure = OnceLock::new();
        let all_brought = Mutex::new(Vec::new());
        let this = &*self;
        let work = || {
            while failure.get().is_none() {
                let Some((name, meta)) = ours.files.get(next.fetch_add(1, Ordering::Relaxed))
                else {
                    return;
                };
                if this.is_unchanged(name, meta) {
                    continue;
                }
                if !go_on() {
                    let _ = failure.set(StorageError::Interrupted);
                    return;
                }
                match this.bring_file(name, step) {
                    Ok(Some(brought)) => {
                        let mut all = all_brought.lock().unwrap_or_else(PoisonError::into_inner);
                        all.push((name.clone(), brought));
                    }
                    Ok(None) if source == Source::InUse => {}
                    Ok(None) => {
                        let gone = io::Error::from(ErrorKind::NotFound);
                        let _ = failure.set(this.failed("read", &this.from.join(name), gone));
                    }
                    // The first failure counts; later ones follow from it.
                    Err(e) => drop(failure.set(e)),
                }
            }
        };
        thread::scope(|scope| {
            let threads = thread::available_parallelism().map_or(2, |n| n.get().clamp(2, 8));
            for _ in 1..threads.min(ours.files.len()) {
                scope.spawn(work);
            }
            work();
        });
        if let Some(error) = failure.into_inner() {
            return Err(error);
        }
        let mut touched = Touched::default();
        let all_brought = all_brought
            .into_inner()
            .unwrap_or_else(PoisonError::into_inner);
        for (name, brought) in all_brought {
            touched.written_bytes += brought.written_bytes;
            touched.files.push((name.clone(), brought.parts));
            self.seen.insert(name, brought.seen);
        }
        Ok(touched)
    }

    /// Whether a file is for certain as it was when it came over.
    fn is_unchanged(&self, name: &Path, meta: &Metadata) -> bool {
        let now = Seen::at(meta, SystemTime::now());
        self.seen
            .get(name)
            .is_some_and(|seen| seen.settled && seen.signature == now.signature)
    }

    /// Brings one file over; nothing if it is gone.
    fn bring_file(&self, name: &Path, step: &dyn Fn(u64)) -> Result<Option<Brought>, StorageError> {
        let (path, to_path) = (self.from.join(name), self.to.join(name));
        let from = match open_source(&path) {
            Ok(Some(from)) => from,
            Ok(None) => return Ok(None),
            // It has become something else.
            Err(e) if e.kind() == ErrorKind::InvalidInput => return Ok(None),
            Err(e) => return Err(self.failed("open", &path, e)),
        };
        // Opened, but not read yet: what is written from here on shows.
        let seen = Seen::at(from.meta(), SystemTime::now());
        let (written_bytes, parts) = self
            .put(&from, &to_path, step)
            .map_err(|e| self.failed("copy", &path, e))?;
        Ok(Some(Brought {
            seen,
            written_bytes,
            parts,
        }))
    }

    /// Makes the file at `to_path` like `from`; says how many bytes that took, and of which parts it
    /// isn't known from comparing that they are equal.
    fn put(
        &self,
        from: &file::Source,
        to_path: &Path,
        step: &dyn Fn(u64),
    ) -> io::Result<(u64, Vec<Range<u64>>)> {
        if !self.shares {
            let there = OpenOptions::new()
                .read(true)
                .write(true)
                .custom_flags(nix::fcntl::OFlag::O_NOFOLLOW.bits())
                .open(to_path);
            match there {
                Ok(to) => {
                    let parts = diff::bring_over(from.file(), &to, step)?;
                    file::keep_attributes(&to, from.meta())?;
                    let written_bytes = parts.iter().map(|part| part.end - part.start).sum();
                    return Ok((written_bytes, parts));
                }
                Err(e) if e.kind() == ErrorKind::NotFound => {}
                Err(e) => return Err(e),
            }
        }
        let folder = File::open(to_path.parent().unwrap_or(to_path))?;
        let to = At {
            folder: &folder,
            name: to_path.file_name().unwrap_or_default(),
        };
        to.remove()?;
        let all = whole(from.meta());
        if self.shares && from.share(to)? {
            step(from.allocated_bytes());
            return Ok((0, vec![all]));
        }
        from.write(to, &|bytes| {
            step(bytes);
            Ok(())
        })?;
        Ok((from.allocated_bytes(), vec![all]))
    }

    /// Compares the volumes: names, kinds, lengths, modes, owners and times of all there is, and
    /// what the last round wrote; what it looked at and did not write, it found equal.
    fn verify(
        &self,
        ours: &Tree,
        touched: &[(PathBuf, Vec<Range<u64>>)],
    ) -> Result<(), StorageError> {
        let theirs = Tree::read(&self.to)?;
        let unequal = |name: &Path, what: &'static str| StorageError::Unequal {
            path: self.to.join(name),
            what,
        };
        let mut there: HashMap<&Path, (Kind, &Metadata)> =
            theirs.entries().map(|(n, k, m)| (n, (k, m))).collect();
        let by_root = Uid::effective().is_root();
        for (name, kind, meta) in ours.entries() {
            let (found, its) = there
                .remove(name)
                .ok_or_else(|| unequal(name, "it is missing"))?;
            if found != kind {
                return Err(unequal(name, "it is of another kind"));
            }
            if by_root && (meta.uid(), meta.gid()) != (its.uid(), its.gid()) {
                return Err(unequal(name, "it belongs to another user"));
            }
            if kind == Kind::Link {
                if fs::read_link(self.from.join(name)).ok()
                    != fs::read_link(self.to.join(name)).ok()
                {
                    return Err(unequal(name, "it leads elsewhere"));
                }
                continue;
            }
            if meta.mode() & 0o7777 != its.mode() & 0o7777 {
                return Err(unequal(name, "it has another mode"));
            }
            if kind == Kind::File && meta.len() != its.len() {
                return Err(unequal(name, "it has another length"));
            }
            if kind == Kind::File && meta.modified().ok() != its.modified().ok() {
                // Somebody wrote to it, or the file system took its time to write (FUSE does).
                self.verify_parts(name, &[whole(meta)])?;
                self.set_time(name, meta)?;
            }
        }
        if let Some(name) = there.into_keys().next() {
            return Err(unequal(name, "there is no such file in the source"));
        }
        for (name, parts) in touched {
            self.verify_parts(name, parts)?;
        }
        Ok(())
    }

    /// Compares some parts of a file.
    fn verify_parts(&self, name: &Path, parts: &[Range<u64>]) -> Result<(), StorageError> {
        let open = |root: &Path| {
            File::open(root.join(name)).map_err(|e| self.failed("open", &root.join(name), e))
        };
        let equal = diff::are_equal_in(&open(&self.from)?, &open(&self.to)?, parts)
            .map_err(|e| self.failed("read", &self.to.join(name), e))?;
        if equal {
            return Ok(());
        }
        Err(StorageError::Unequal {
            path: self.to.join(name),
            what: "its content differs",
        })
    }

    fn set_time(&self, name: &Path, meta: &Metadata) -> Result<(), StorageError> {
        let path = self.to.join(name);
        OpenOptions::new()
            .write(true)
            .open(&path)
            .and_then(|file| file.set_modified(meta.modified()?))
            .map_err(|e| self.failed("set the time of", &path, e))
    }

    fn failed(&self, action: &'static str, path: &Path, source: io::Error) -> StorageError {
        match source.kind() {
            ErrorKind::StorageFull | ErrorKind::QuotaExceeded => {
                let pool = self.to.parent().unwrap_or(&self.to);
                StorageError::Full {
                    action,
                    path: path.to_owned(),
                    pool: pool.to_owned(),
                    free_bytes: pool::space_of(pool).map_or(0, |s| s.free_bytes),
                }
            }
            ErrorKind::PermissionDenied => StorageError::Denied {
                action,
                path: path.to_owned(),
                hint: "volumes must belong to the user that dbranch runs as".into(),
            },
            _ => StorageError::io(action, path)(source),
        }
    }
}

/// A file that came over.
struct Brought {
    seen: Seen,
    written_bytes: u64,
    /// What of it was not compared but written, or shared.
    parts: Vec<Range<u64>>,
}

/// The files that a round looked into, and what of them it wrote.
#[derive(Default)]
struct Touched {
    written_bytes: u64,
    files: Vec<(PathBuf, Vec<Range<u64>>)>,
}

/// Whether the kernel stamps the files in a folder by this machine's clock, at every write.
#[cfg(target_os = "linux")]
fn has_our_clock(folder: &Path) -> bool {
    use nix::sys::statfs as fs;
    // From the sources of OpenZFS and bcachefs; nix doesn't name them.
    const ZFS: fs::FsType = fs::FsType(0x2fc1_2fc1);
    const BCACHEFS: fs::FsType = fs::FsType(0xca45_1a4e);
    let known = [
        fs::BTRFS_SUPER_MAGIC,
        fs::EXT4_SUPER_MAGIC,
        fs::XFS_SUPER_MAGIC,
        fs::TMPFS_MAGIC,
        ZFS,
        BCACHEFS,
    ];
    fs::statfs(folder).is_ok_and(|stat| known.contains(&stat.filesystem_type()))
}

#[cfg(not(target_os = "linux"))]
fn has_our_clock(folder: &Path) -> bool {
    pool::file_system_name(folder) == "apfs"
}

/// All of a file.
fn whole(meta: &Metadata) -> Range<u64> {
    0..meta.len()
}

/// Opens a file to be brought over; none if it is gone.
fn open_source(path: &Path) -> io::Result<Option<file::Source>> {
    let folder = match File::open(path.parent().unwrap_or(path)) {
        Err(e) if e.kind() == ErrorKind::NotFound => return Ok(None),
        opened => opened?,
    };
    file::Source::open(At {
        folder: &folder,
        name: path.file_name().unwrap_or_default(),
    })
}

/// Whether files in the pool can share blocks with `file`, found by trying.
pub fn can_share(file: &Path, pool: &Path) -> bool {
    // Named as what is half made, so that it goes with a sweep if this is its last moment.
    let folder = pool.join(format!("{}{}", VolumeId::random(), pool::PARTIAL));
    let tried = || {
        let Some(from) = open_source(file)? else {
            return Ok(false);
        };
        DirBuilder::new().mode(0o700).create(&folder)?;
        from.share(At {
            folder: &File::open(&folder)?,
            name: "probe".as_ref(),
        })
    };
    let shared: io::Result<bool> = tried();
    let _ = fs::remove_dir_all(&folder);
    shared.unwrap_or(false)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    const ALL: &(dyn Fn() -> bool + Sync) = &|| true;
    const QUIET: &(dyn Fn(u64) + Sync) = &|_| {};

    struct Bench {
        folder: tempfile::TempDir,
        mirror: Mirror,
    }

    impl Bench {
        fn new() -> Self {
            let folder = tempfile::tempdir().unwrap();
            let (from, to) = (folder.path().join("from"), folder.path().join("to"));
            fs::create_dir_all(from.join("base/1")).unwrap();
            fs::create_dir(&to).unwrap();
            fs::write(from.join("base/1/1259"), vec![7; 300_000]).unwrap();
            fs::write(from.join("base/1/empty"), "").unwrap();
            fs::write(from.join("PG_VERSION"), "15\n").unwrap();
            symlink("PG_VERSION", from.join("link")).unwrap();
            let mut mirror = Mirror::new(from, to, false);
            // Whatever file system the tests run on, it is one of this machine.
            mirror.has_our_clock = true;
            Self { folder, mirror }
        }

        fn from(&self, name: &str) -> PathBuf {
            self.folder.path().join("from").join(name)
        }

        fn to(&self, name: &str) -> PathBuf {
            self.folder.path().join("to").join(name)
        }

        fn round(&mut self, source: Source) -> Round {
            self.mirror.round(source, QUIET, ALL).unwrap()
        }

        /// Waits until the times of the source's files tell of changes.
        fn age(&self) {
            let newest = fs::metadata(self.from("link")).unwrap();
            while !Seen::at(&newest, SystemTime::now()).settled {
                thread::sleep(Duration::from_millis(20));
            }
        }
    }

    #[test]
    fn an_empty_target_becomes_equal_with_modes_times_and_links() {
        let mut bench = Bench::new();
        fs::set_permissions(bench.from("base"), fs::Permissions::from_mode(0o750)).unwrap();
        let old = SystemTime::UNIX_EPOCH + Duration::from_secs(1_000_000);
        let file = File::options().write(true).open(bench.from("PG_VERSION"));
        file.unwrap().set_modified(old).unwrap();
        bench.round(Source::AtRest);
        assert_eq!(fs::read(bench.to("base/1/1259")).unwrap(), vec![7; 300_000]);
        assert_eq!(
            fs::metadata(bench.to("base")).unwrap().mode() & 0o777,
            0o750
        );
        let meta = fs::metadata(bench.to("PG_VERSION")).unwrap();
        assert_eq!(meta.modified().unwrap(), old);
        assert_eq!(
            fs::read_link(bench.to("link")).unwrap(),
            Path::new("PG_VERSION")
        );
    }

    #[test]
    fn what_vanished_goes_and_what_became_something_else_is_that() {
        let mut bench = Bench::new();
        bench.round(Source::InUse);
        fs::remove_dir_all(bench.from("base")).unwrap();
        fs::write(bench.from("base"), "a file now").unwrap();
        fs::remove_file(bench.from("link")).unwrap();
        fs::create_dir(bench.from("link")).unwrap();
        bench.round(Source::AtRest);
        assert_eq!(fs::read_to_string(bench.to("base")).unwrap(), "a file now");
        assert!(bench.to("link").is_dir());
        assert_eq!(fs::read_dir(bench.to("")).unwrap().count(), 3);
    }

    #[test]
    fn a_later_round_reads_only_what_may_have_changed() {
        let mut bench = Bench::new();
        // Just written: their times can't tell yet.
        bench.round(Source::InUse);
        assert_eq!(bench.round(Source::InUse).files, 3);
        bench.age();
        bench.round(Source::InUse);
        assert_eq!(bench.round(Source::InUse).files, 0);
        // As long as before, and with the time it had.
        let meta = fs::metadata(bench.from("base/1/1259")).unwrap();
        let mut content = vec![7; 300_000];
        content[100_000] = 8;
        fs::write(bench.from("base/1/1259"), &content).unwrap();
        let file = File::options().write(true).open(bench.from("base/1/1259"));
        file.unwrap()
            .set_modified(meta.modified().unwrap())
            .unwrap();
        let round = bench.round(Source::AtRest);
        assert_eq!((round.files, round.written_bytes), (1, diff::BLOCK as u64));
        assert_eq!(fs::read(bench.to("base/1/1259")).unwrap(), content);
    }

    #[test]
    fn a_clock_that_was_set_back_makes_every_file_be_read() {
        let mut bench = Bench::new();
        bench.age();
        bench.round(Source::InUse);
        bench.mirror.clock.wall += Duration::from_secs(60);
        assert_eq!(bench.round(Source::InUse).files, 3);
    }

    #[test]
    fn a_target_that_is_not_equal_is_noticed() {
        let mut bench = Bench::new();
        bench.age();
        bench.round(Source::InUse);
        let content = fs::read(bench.to("base/1/1259")).unwrap();
        let old = fs::metadata(bench.to("base/1/1259")).unwrap().modified();
        // Touched, but as it was: that is put right.
        fs::write(bench.to("base/1/1259"), &content).unwrap();
        bench.round(Source::AtRest);
        let now = fs::metadata(bench.to("base/1/1259")).unwrap().modified();
        assert_eq!(now.unwrap(), old.unwrap());
        fs::write(bench.to("base/1/1259"), vec![0; content.len()]).unwrap();
        let error = bench.mirror.round(Source::AtRest, QUIET, ALL).unwrap_err();
        assert!(
            matches!(&error, StorageError::Unequal { path, .. } if path.ends_with("1259")),
            "{error}"
        );
    }

    #[test]
    fn a_round_that_is_told_to_end_can_be_taken_up_again() {
        let mut bench = Bench::new();
        let error = bench
            .mirror
            .round(Source::InUse, QUIET, &|| false)
            .unwrap_err();
        assert!(matches!(error, StorageError::Interrupted), "{error}");
        bench.round(Source::AtRest);
        assert!(bench.to("base/1/1259").exists());
    }

    #[test]
    fn a_source_that_is_written_to_is_equal_once_it_rests() {
        let mut bench = Bench::new();
        let stop = std::sync::atomic::AtomicBool::new(false);
        thread::scope(|scope| {
            let folder = bench.from("base/1");
            let stop = &stop;
            scope.spawn(move || {
                for n in 0u32.. {
                    let path = folder.join((n % 50).to_string());
                    if n % 3 == 0 {
                        let _ = fs::remove_file(&path);
                    } else {
                        fs::write(
                            &path,
                            n.to_string().repeat(usize::try_from(n % 5000).unwrap()),
                        )
                        .unwrap();
                    }
                    if stop.load(Ordering::Relaxed) {
                        return;
                    }
                }
            });
            for _ in 0..20 {
                bench.mirror.round(Source::InUse, QUIET, ALL).unwrap();
            }
            stop.store(true, Ordering::Relaxed);
        });
        bench.round(Source::AtRest);
        for entry in fs::read_dir(bench.from("base/1")).unwrap().flatten() {
            let there = bench.to("base/1").join(entry.file_name());
            assert_eq!(fs::read(entry.path()).unwrap(), fs::read(there).unwrap());
        }
    }

    #[cfg(target_os = "linux")]
    #[test]
    fn a_clone_goes_on_sharing_what_the_source_has_too() {
        use crate::storage::{Choice, DriverKind, open};
        use crate::types::Owner;
        let Some(btrfs) = std::env::var_os("DBRANCH_TEST_BTRFS") else {
            return;
        };
        let pool = tempfile::tempdir_in(btrfs).unwrap();
        let owner = Owner {
            uid: Uid::effective().as_raw(),
            gid: nix::unistd::Gid::effective().as_raw(),
        };
        let driver = open(Choice::Driver(DriverKind::Btrfs), pool.path(), owner).unwrap();
        let (base, new) = (VolumeId::random(), VolumeId::random());
        let common: Vec<u8> = (0..4_000_000u32).map(|i| (i % 251) as u8).collect();
        fs::write(driver.create_volume(&base).unwrap().join("1"), &common).unwrap();
        driver
            .clone_volume(&base, &new, crate::storage::Omit::NOTHING, &|_, _| {})
            .unwrap();
        let source = tempfile::tempdir().unwrap();
        let mut content = common;
        content[1_000_000] ^= 1;
        fs::write(source.path().join("1"), &content).unwrap();
        let mut mirror = Mirror::new(source.path().into(), driver.volume_path(&new), false);
        let round = mirror.round(Source::AtRest, QUIET, ALL).unwrap();
        assert_eq!(round.written_bytes, diff::BLOCK as u64);
        let usage = driver.usage(&new).unwrap();
        assert!(usage.exclusive_bytes < 100_000, "{usage:?}");
        for id in [base, new] {
            driver.destroy(&id).unwrap();
        }
    }
}
