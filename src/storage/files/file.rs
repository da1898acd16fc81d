//! Brings one file over: by sharing its blocks, or its data without its holes.

use std::ffi::OsStr;
use std::fs::{File, FileTimes, Metadata, OpenOptions, Permissions};
use std::io::{self, ErrorKind, Read, Seek};
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt, PermissionsExt, fchown};
use std::path::Path;

use nix::errno::Errno;
use nix::fcntl::{OFlag, openat};
use nix::sys::stat::Mode;
use nix::unistd::Uid;

use super::super::usage::allocated_bytes;
#[cfg(any(target_os = "linux", target_os = "macos"))]
use super::ioctl;

/// A name in an open folder: cheaper than a path, and it stays in that folder.
#[derive(Debug, Clone, Copy)]
pub(in crate::storage) struct At<'a> {
    pub(in crate::storage) folder: &'a File,
    pub(in crate::storage) name: &'a OsStr,
}

impl At<'_> {
    fn open(self, flags: OFlag, mode: u32) -> io::Result<File> {
        let flags = flags | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
        #[allow(clippy::useless_conversion, reason = "mode_t has 16 bits on macOS")]
        let mode = Mode::from_bits_truncate((mode & 0o777).try_into().unwrap_or(0o600));
        Ok(openat(self.folder, self.name, flags, mode)?.into())
    }

    /// Makes a file where none is.
    fn create(self, mode: u32) -> io::Result<File> {
        self.open(OFlag::O_WRONLY | OFlag::O_CREAT | OFlag::O_EXCL, mode)
    }

    pub(in crate::storage) fn remove(self) -> io::Result<()> {
        use nix::unistd::{UnlinkatFlags, unlinkat};
        match unlinkat(self.folder, self.name, UnlinkatFlags::NoRemoveDir) {
            Ok(()) | Err(Errno::ENOENT) => Ok(()),
            Err(e) => Err(e.into()),
        }
    }
}

/// Bytes written before progress is told.
const STEP: u64 = 8 << 20;
/// Bytes read at a time.
const BUFFER: usize = 256 << 10;

/// A regular file that is to be brought over. It may change meanwhile: the copy is then of
/// the length it had when it was opened or less, its content as torn as any reader's.
#[derive(Debug)]
pub(in crate::storage) struct Source {
    file: File,
    meta: Metadata,
}

impl Source {
    /// Opens a file, and nothing but a regular one; none if it is gone.
    pub(in crate::storage) fn open(at: At<'_>) -> io::Result<Option<Self>> {
        // A pipe would make an open without O_NONBLOCK wait.
        let file = match at.open(OFlag::O_RDONLY | OFlag::O_NONBLOCK, 0) {
            Err(e) if e.kind() == ErrorKind::NotFound => return Ok(None),
            opened => opened?,
        };
        let meta = file.metadata()?;
        if !meta.is_file() {
            let what = "not a regular file";
            return Err(io::Error::new(ErrorKind::InvalidInput, what));
        }
        Ok(Some(Self { file, meta }))
    }

    pub(in crate::storage) fn file(&self) -> &File {
        &self.file
    }

    /// As it was when it was opened.
    pub(in crate::storage) fn meta(&self) -> &Metadata {
        &self.meta
    }

    /// What the file has on disk.
    pub(in crate::storage) fn allocated_bytes(&self) -> u64 {
        allocated_bytes(&self.meta)
    }

    /// Makes `to`, where no file may be, share all blocks of this one. False where the file
    /// system refuses that for this file; nothing is left then.
    #[cfg(target_os = "linux")]
    pub(in crate::storage) fn share(&self, to: At<'_>) -> io::Result<bool> {
        use std::os::fd::AsFd;
        let made = to.create(self.meta.mode())?;
        if self.meta.len() > 0 {
            let (from, into) = (self.file.as_fd(), made.as_fd());
            let shared = match ioctl::share(from, into) {
                Err(Errno::EINVAL) if ioctl::take_over_nocow(from, into) == Ok(true) => {
                    ioctl::share(from, into)
                }
                other => other,
            };
            match shared {
                Ok(()) => {}
                Err(e) if is_refusal(e) => {
                    to.remove()?;
                    return Ok(false);
                }
                Err(e) => return Err(e.into()),
            }
        }
        keep_attributes(&made, &self.meta)?;
        Ok(true)
    }

    /// Makes `to`, where no file may be, share all blocks of this one. False where the file
    /// system refuses that for this file; nothing is left then.
    #[cfg(target_os = "macos")]
    pub(in crate::storage) fn share(&self, to: At<'_>) -> io::Result<bool> {
        use std::os::fd::AsFd;
        use std::os::unix::ffi::OsStrExt;
        let name = std::ffi::CString::new(to.name.as_bytes())?;
        match ioctl::clone_file(self.file.as_fd(), to.folder.as_fd(), &name) {
            Ok(()) => Ok(true),
            Err(e) if is_refusal(e) => Ok(false),
            Err(e) => Err(e.into()),
        }
    }

    /// No other system shares blocks.
    #[cfg(not(any(target_os = "linux", target_os = "macos")))]
    pub(in crate::storage) fn share(&self, _to: At<'_>) -> io::Result<bool> {
        Ok(false)
    }

    /// Writes this file's data into `to`, where no file may be. `step` gets the bytes done, and may say
    /// that no more is to be written.
    pub(in crate::storage) fn write(
        &self,
        to: At<'_>,
        step: &dyn Fn(u64) -> io::Result<()>,
    ) -> io::Result<()> {
        let made = to.create(self.meta.mode())?;
        let holes = self.allocated_bytes() < self.meta.len();
        write_data(&self.file, &made, self.meta.len(), holes, step)?;
        keep_attributes(&made, &self.meta)
    }
}

/// Whether an error says that blocks can't be shared (for this file), and not that
/// something is wrong (`ioctl_ficlone(2)`, `clonefile(2)`).
#[cfg(any(target_os = "linux", target_os = "macos"))]
fn is_refusal(e: Errno) -> bool {
    // One number on Linux, two on macOS.
    e == Errno::ENOTSUP
        || matches!(
            e,
            Errno::EOPNOTSUPP
            | Errno::ENOTTY
            | Errno::ENOSYS
            | Errno::EINVAL
            | Errno::EXDEV
            // ZFS: the data is not on disk yet.
            | Errno::EAGAIN
        )
}

/// Gives a file or folder made for it the mode, times and owner of another.
pub(in crate::storage) fn keep_attributes(to: &File, meta: &Metadata) -> io::Result<()> {
    let made = to.metadata()?;
    let other_owner = (made.uid(), made.gid()) != (meta.uid(), meta.gid());
    if other_owner {
        match fchown(to, Some(meta.uid()), Some(meta.gid())) {
            // Who is not root can only own its copies itself, and does.
            Err(_) if !Uid::effective().is_root() => {}
            done => done?,
        }
    }
    let wanted = meta.mode() & 0o7777;
    // After the owner, as changing that clears setuid bits (chown(2)).
    if made.mode() & 0o7777 != wanted || (other_owner && wanted & 0o7000 != 0) {
        to.set_permissions(Permissions::from_mode(wanted))?;
    }
    to.set_times(FileTimes::new().set_modified(meta.modified()?))
}

/// Writes `len` bytes, or fewer if the source shrinks. With `holes`, unwritten
/// parts are left unwritten. Through a buffer, because `copy_file_range(2)` may share
/// blocks instead of writing them.
fn write_data(
    from: &File,
    to: &File,
    len: u64,
    holes: bool,
    step: &dyn Fn(u64) -> io::Result<()>,
) -> io::Result<()> {
    let room = usize::try_from(len).map_or(BUFFER, |len| len.min(BUFFER));
    let mut buffer = vec![0; room];
    let (mut at, mut untold) = (0, 0);
    while at < len {
        let (start, end) = if holes {
            match next_data(from, at, len)? {
                Some(data) => data,
                None => break,
            }
        } else {
            (at, len)
        };
        at = start;
        while at < end {
            let wanted = usize::try_from(end - at).map_or(room, |left| left.min(room));
            let read = match from.read_at(&mut buffer[..wanted], at) {
                Err(e) if e.kind() == ErrorKind::Interrupted => continue,
                read => read?,
            };
            if read == 0 {
                // The source has shrunk below `at`.
                step(untold)?;
                return to.set_len(at.min(from.metadata()?.len()));
            }
            to.write_all_at(&buffer[..read], at)?;
            at += read as u64;
            untold += read as u64;
            if untold >= STEP {
                step(std::mem::take(&mut untold))?;
            }
        }
    }
    step(untold)?;
    to.set_len(len)
}

/// Where the next data lies in `at..len`; none if only holes are left (lseek(2)).
#[cfg(target_os = "linux")]
pub(in crate::storage) fn next_data(
    from: &File,
    at: u64,
    len: u64,
) -> io::Result<Option<(u64, u64)>> {
    use nix::errno::Errno;
    use nix::unistd::{Whence, lseek};
    let seek = |at: u64, whence| {
        let at = i64::try_from(at).map_err(|_| Errno::EOVERFLOW)?;
        match lseek(from, at, whence) {
            Ok(found) => Ok(Some(u64::try_from(found).unwrap_or(0))),
            Err(Errno::ENXIO) => Ok(None),
            Err(e) => Err(e),
        }
    };
    match seek(at, Whence::SeekData) {
        Ok(Some(start)) if start < len => {
            let end = seek(start, Whence::SeekHole)?.unwrap_or(len);
            Ok(Some((start, end.min(len))))
        }
        Ok(_) => Ok(None),
        // A file system that knows no holes.
        Err(Errno::EINVAL) => Ok(Some((at, len))),
        Err(e) => Err(e.into()),
    }
}

#[cfg(not(target_os = "linux"))]
#[expect(
    clippy::unnecessary_wraps,
    reason = "the same signature on every system"
)]
pub(in crate::storage) fn next_data(
    _from: &File,
    at: u64,
    len: u64,
) -> io::Result<Option<(u64, u64)>> {
    Ok(Some((at, len)))
}

/// Readings of a small file before its writer is said to be too quick.
const READINGS: usize = 100;

/// Reads a small file that is being rewritten in place until two readings agree.
pub(super) fn read_settled(path: &Path) -> io::Result<(Vec<u8>, Metadata)> {
    let mut file = OpenOptions::new()
        .read(true)
        .custom_flags((OFlag::O_NOFOLLOW | OFlag::O_NONBLOCK).bits())
        .open(path)?;
    let mut read = || {
        let mut bytes = Vec::new();
        file.rewind()?;
        file.read_to_end(&mut bytes)?;
        Ok::<_, io::Error>((bytes, file.metadata()?))
    };
    let mut last = read()?;
    for _ in 0..READINGS {
        let again = read()?;
        if again.0 == last.0 {
            return Ok(again);
        }
        last = again;
    }
    Err(io::Error::new(
        ErrorKind::ResourceBusy,
        "it changes faster than it can be read",
    ))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;
    use std::os::unix::fs::symlink;

    /// A folder to try things in, and its handle.
    fn folder() -> (tempfile::TempDir, File) {
        let folder = tempfile::tempdir().unwrap();
        let handle = File::open(folder.path()).unwrap();
        (folder, handle)
    }

    fn at<'a>(folder: &'a File, name: &'a str) -> At<'a> {
        let name = OsStr::new(name);
        At { folder, name }
    }

    fn write(folder: &File, from: &str, to: &str) {
        let source = Source::open(at(folder, from)).unwrap().unwrap();
        source.write(at(folder, to), &|_| Ok(())).unwrap();
    }

    #[test]
    fn data_mode_and_time_come_over() {
        let (folder, handle) = folder();
        let (from, to) = (folder.path().join("a"), folder.path().join("b"));
        let content: Vec<u8> = (0..3_000_000u32).map(|i| (i % 251) as u8).collect();
        fs::write(&from, &content).unwrap();
        fs::set_permissions(&from, Permissions::from_mode(0o640)).unwrap();
        let old = std::time::UNIX_EPOCH + std::time::Duration::from_secs(1_000_000);
        let source = File::options().write(true).open(&from).unwrap();
        source.set_modified(old).unwrap();
        write(&handle, "a", "b");
        let meta = fs::metadata(&to).unwrap();
        assert_eq!(fs::read(&to).unwrap(), content);
        assert_eq!(meta.mode() & 0o7777, 0o640);
        assert_eq!(meta.modified().unwrap(), old);
    }

    #[test]
    fn all_bytes_are_told_as_progress() {
        let (folder, handle) = folder();
        fs::write(folder.path().join("a"), vec![1; 20 << 20]).unwrap();
        let source = Source::open(at(&handle, "a")).unwrap().unwrap();
        let told = std::cell::RefCell::new(Vec::new());
        let step = |bytes| {
            told.borrow_mut().push(bytes);
            Ok(())
        };
        source.write(at(&handle, "b"), &step).unwrap();
        assert_eq!(told.into_inner(), [8 << 20, 8 << 20, 4 << 20]);
    }

    #[cfg(target_os = "linux")]
    #[test]
    fn holes_stay_holes_and_the_length_stays() {
        let (folder, handle) = folder();
        let file = File::create(folder.path().join("a")).unwrap();
        file.set_len(64 << 20).unwrap();
        file.write_all_at(b"here", 32 << 20).unwrap();
        file.sync_all().unwrap();
        write(&handle, "a", "b");
        let to = folder.path().join("b");
        let meta = fs::metadata(&to).unwrap();
        assert_eq!(meta.len(), 64 << 20);
        assert!(allocated_bytes(&meta) < 1 << 20, "{}", meta.blocks());
        let mut found = [0; 4];
        let made = File::open(&to).unwrap();
        made.read_exact_at(&mut found, 32 << 20).unwrap();
        assert_eq!(&found, b"here");
    }

    #[test]
    fn a_source_that_shrank_gives_a_shorter_copy() {
        let (folder, _) = folder();
        let (from, to) = (folder.path().join("a"), folder.path().join("b"));
        fs::write(&from, b"four").unwrap();
        let (from, made) = (File::open(&from).unwrap(), File::create(&to).unwrap());
        write_data(&from, &made, 1 << 20, false, &|_| Ok(())).unwrap();
        assert_eq!(fs::read(&to).unwrap(), b"four");
    }

    #[test]
    fn a_file_that_is_gone_is_passed_over_and_a_link_is_not_followed() {
        let (folder, handle) = folder();
        assert!(Source::open(at(&handle, "gone")).unwrap().is_none());
        fs::write(folder.path().join("secret"), "secret").unwrap();
        symlink("secret", folder.path().join("link")).unwrap();
        fs::create_dir(folder.path().join("folder")).unwrap();
        for bad in ["link", "folder"] {
            assert!(Source::open(at(&handle, bad)).is_err(), "{bad}");
        }
    }

    #[test]
    fn a_refused_share_leaves_nothing_and_a_granted_one_all() {
        let (folder, handle) = folder();
        let content = vec![3; 100_000];
        fs::write(folder.path().join("a"), &content).unwrap();
        let source = Source::open(at(&handle, "a")).unwrap().unwrap();
        if source.share(at(&handle, "b")).unwrap() {
            assert_eq!(fs::read(folder.path().join("b")).unwrap(), content);
        } else {
            assert!(!folder.path().join("b").exists());
        }
        // Never in place of a file that is there.
        #[cfg(any(target_os = "linux", target_os = "macos"))]
        source.share(at(&handle, "a")).unwrap_err();
    }
}
