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
use super::copy::file::{self, Copied, Pair};
use super::copy::tree::Tree;
use super::{Omit, StorageError, copy, pool};
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
        let ours = Tree::read(&self.from, Path::new(""), Omit::NOTHING)?;
        let theirs = Tree::read(&self.to, Path::new(""), Omit::NOTHING)?;
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
        copy::sync(&self.to).map_err(|e| self.failed("sync", &self.to, e))?;
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
        let wanted: HashMap<&Path, Kind> = entries(ours).map(|(n, kind, _)| (n, kind)).collect();
        let all: Vec<_> = entries(theirs).collect();
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
        let from = match file::open_regular(&path) {
            Ok(from) => from,
            Err(e) if matches!(e.kind(), ErrorKind::NotFound | ErrorKind::InvalidInput) => {
                return Ok(None);
            }
            Err(e) => return Err(self.failed("open", &path, e)),
        };
        // Before it is read: what is written from here on shows.
        let meta = from.metadata().map_err(|e| self.failed("read", &path, e))?;
        let seen = Seen::at(&meta, SystemTime::now());
        let to = OpenOptions::new()
            .read(true)
            .write(true)
            .custom_flags(nix::fcntl::OFlag::O_NOFOLLOW.bits())
            .open(&to_path);
        let brought = match to {
            Ok(to) if !self.shares => diff::bring_over(&from, &to, step).and_then(|parts| {
                file::keep_attributes(&to, &meta)?;
                let written_bytes = parts.iter().map(|part| part.end - part.start).sum();
                Ok(Some((written_bytes, parts)))
            }),
            Err(e) if e.kind() != ErrorKind::NotFound => Err(e),
            found => found
                .map_or(Ok(()), |_| fs::remove_file(&to_path))
                .and_then(|()| {
                    let pair = Pair {
                        from: &path,
                        to: &to_path,
                    };
                    let all = Range {
                        start: 0,
                        end: meta.len(),
                    };
                    Ok(match file::copy(pair, true, step)? {
                        Copied::Shared(_) => Some((0, vec![all])),
                        Copied::Written(bytes) => Some((bytes, vec![all])),
                        Copied::Vanished => None,
                    })
                }),
        };
        let brought = brought.map_err(|e| self.failed("copy", &path, e))?;
        Ok(brought.map(|(written_bytes, parts)| Brought {
            seen,
            written_bytes,
            parts,
        }))
    }

    /// Compares the volumes: names, kinds, lengths, modes, owners and times of all there is, and
    /// what the last round wrote; what it looked at and did not write, it found equal.
    fn verify(
        &self,
        ours: &Tree,
        touched: &[(PathBuf, Vec<Range<u64>>)],
    ) -> Result<(), StorageError> {
        let theirs = Tree::read(&self.to, Path::new(""), Omit::NOTHING)?;
        let unequal = |name: &Path, what: &'static str| StorageError::Unequal {
            path: self.to.join(name),
            what,
        };
        let mut there: HashMap<&Path, (Kind, &Metadata)> =
            entries(&theirs).map(|(n, k, m)| (n, (k, m))).collect();
        let by_root = Uid::effective().is_root();
        for (name, kind, meta) in entries(ours) {
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
                return Err(unequal(name, "it has another time of change"));
            }
        }
        if let Some(name) = there.into_keys().next() {
            return Err(unequal(name, "there is no such file in the source"));
        }
        for (name, parts) in touched {
            let open = |root: &Path| {
                File::open(root.join(name)).map_err(|e| self.failed("open", &root.join(name), e))
            };
            let equal = diff::are_equal_in(&open(&self.from)?, &open(&self.to)?, parts)
                .map_err(|e| self.failed("read", &self.to.join(name), e))?;
            if !equal {
                return Err(unequal(name, "its content differs"));
            }
        }
        Ok(())
    }

    fn failed(&self, action: &'static str, path: &Path, source: io::Error) -> StorageError {
        match source.kind() {
            ErrorKind::StorageFull | ErrorKind::QuotaExceeded => {
                let pool = self.to.parent().unwrap_or(&self.to);
                StorageError::NoRoom {
                    path: pool.to_owned(),
                    needed_bytes: copy::MARGIN_BYTES,
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

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Folder,
    File,
    Link,
}

/// All of a tree, folders first and each before what is in it.
fn entries(tree: &Tree) -> impl DoubleEndedIterator<Item = (&Path, Kind, &Metadata)> {
    let folders = tree
        .folders
        .iter()
        .map(|(n, m)| (n.as_path(), Kind::Folder, m));
    let files = tree.files.iter().map(|(n, m)| (n.as_path(), Kind::File, m));
    let links = tree.links.iter().map(|(n, m)| (n.as_path(), Kind::Link, m));
    folders.chain(files).chain(links)
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

/// Whether files in the pool can share blocks with `file`, found by trying.
#[cfg(target_os = "linux")]
pub fn can_share(file: &Path, pool: &Path) -> bool {
    use std::os::fd::AsFd;
    let path = pool.join(format!(".{}{}", VolumeId::random(), copy::PROBE));
    let tried = File::open(file).and_then(|from| {
        let to = File::create_new(&path)?;
        Ok(super::btrfs::ioctl::share_file(from.as_fd(), to.as_fd()).is_ok())
    });
    let _ = fs::remove_file(&path);
    tried.unwrap_or(false)
}

/// Whether files in the pool can share blocks with `file`: on one volume of APFS.
#[cfg(not(target_os = "linux"))]
pub fn can_share(file: &Path, pool: &Path) -> bool {
    let device = |path: &Path| fs::metadata(path).map(|meta| meta.dev()).ok();
    pool::file_system_name(pool) == "apfs" && device(file) == device(pool)
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
        fs::write(bench.to("base/1/1259"), content).unwrap();
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
            .clone_volume(&base, &new, Omit::NOTHING, &|_, _| {})
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
