//! Copies one file: by sharing its blocks if it can be, else its data without its holes.

use std::fs::{self, File, FileTimes, Metadata, OpenOptions, Permissions};
use std::io::{self, ErrorKind, Read, Seek, SeekFrom};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt, PermissionsExt, fchown};
use std::path::Path;

use nix::unistd::Uid;

use super::super::usage::allocated_bytes;

/// How a file came over, with the bytes it has on disk.
#[derive(Debug, PartialEq, Eq)]
pub(in crate::storage) enum Copied {
    Shared(u64),
    Written(u64),
    /// The source is gone.
    Vanished,
}

/// The file that is to be copied and the one that is to be made.
#[derive(Debug, Clone, Copy)]
pub(in crate::storage) struct Pair<'a> {
    pub(in crate::storage) from: &'a Path,
    pub(in crate::storage) to: &'a Path,
}

/// Bytes copied by one call; progress is told after each.
const STEP: u64 = 8 << 20;

/// Copies a regular file with mode, times and owner to where none is.
///
/// The source may change meanwhile: the copy is then of the length it had when it
/// was opened or less, its content as torn as any reader's. `step` gets the bytes done.
pub(in crate::storage) fn copy(
    pair: Pair<'_>,
    share: bool,
    step: &dyn Fn(u64),
) -> io::Result<Copied> {
    let from = match open_regular(pair.from) {
        Ok(from) => from,
        Err(e) if e.kind() == ErrorKind::NotFound => return Ok(Copied::Vanished),
        Err(e) => return Err(e),
    };
    let meta = from.metadata()?;
    let allocated = allocated_bytes(&meta);
    #[cfg(not(target_os = "linux"))]
    if share && fs::copy(pair.from, pair.to).is_ok() {
        // Apple's fclonefileat(2), which std tries first.
        let to = OpenOptions::new().write(true).open(pair.to)?;
        keep_attributes(&to, &meta)?;
        step(allocated);
        return Ok(Copied::Shared(allocated));
    }
    let to = OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(pair.to)?;
    #[cfg(target_os = "linux")]
    if share && meta.len() > 0 {
        use super::super::btrfs::ioctl;
        use std::os::fd::AsFd;
        // A file may refuse (no checksums on one side, for example): its data is copied then.
        if ioctl::share_file(from.as_fd(), to.as_fd()).is_ok() {
            keep_attributes(&to, &meta)?;
            step(allocated);
            return Ok(Copied::Shared(allocated));
        }
    }
    copy_data(&from, &to, meta.len(), allocated < meta.len(), step)?;
    keep_attributes(&to, &meta)?;
    Ok(Copied::Written(allocated))
}

/// Opens for reading, and nothing but a regular file.
pub(in crate::storage) fn open_regular(path: &Path) -> io::Result<File> {
    let file = OpenOptions::new()
        .read(true)
        .custom_flags((nix::fcntl::OFlag::O_NOFOLLOW | nix::fcntl::OFlag::O_NONBLOCK).bits())
        .open(path)?;
    if file.metadata()?.is_file() {
        Ok(file)
    } else {
        Err(io::Error::new(
            ErrorKind::InvalidInput,
            "not a regular file",
        ))
    }
}

/// Gives a copy the mode, times and owner of its source.
pub(in crate::storage) fn keep_attributes(to: &File, meta: &Metadata) -> io::Result<()> {
    // Before the mode: changing the owner clears setuid bits (chown(2)).
    keep_owner(to, meta)?;
    to.set_permissions(Permissions::from_mode(meta.mode() & 0o7777))?;
    to.set_times(FileTimes::new().set_modified(meta.modified()?))
}

fn keep_owner(to: &File, meta: &Metadata) -> io::Result<()> {
    let made = to.metadata()?;
    if (made.uid(), made.gid()) == (meta.uid(), meta.gid()) {
        return Ok(());
    }
    match fchown(to, Some(meta.uid()), Some(meta.gid())) {
        // Who is not root can only own its copies itself, and does.
        Err(_) if !Uid::effective().is_root() => Ok(()),
        done => done,
    }
}

/// Copies `len` bytes, or fewer if the source shrinks. With `holes`, unwritten
/// parts are left unwritten.
fn copy_data(from: &File, to: &File, len: u64, holes: bool, step: &dyn Fn(u64)) -> io::Result<()> {
    let mut at = 0;
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
            let done = copy_range(from, to, at, (end - at).min(STEP))?;
            if done == 0 {
                // The source has shrunk below `at`.
                return to.set_len(at.min(from.metadata()?.len()));
            }
            at += done;
            step(done);
        }
    }
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

/// Copies up to `len` bytes at `at`; 0 is the source's end. On Linux std does it in
/// the kernel (`copy_file_range(2)`) and falls back to a buffer by itself.
fn copy_range(mut from: &File, mut to: &File, at: u64, len: u64) -> io::Result<u64> {
    from.seek(SeekFrom::Start(at))?;
    to.seek(SeekFrom::Start(at))?;
    io::copy(&mut from.take(len), &mut to)
}

/// Readings of a small file before its writer is said to be too quick.
const READINGS: usize = 100;

/// Reads a small file that is being rewritten in place until two readings agree.
pub(super) fn read_settled(path: &Path) -> io::Result<(Vec<u8>, Metadata)> {
    let read = || fs::read(path);
    let mut last = read()?;
    for _ in 0..READINGS {
        let again = read()?;
        if again == last {
            return Ok((again, open_regular(path)?.metadata()?));
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
    use std::os::unix::fs::{FileExt, symlink};

    fn copied(from: &Path, to: &Path) -> Copied {
        copy(Pair { from, to }, false, &|_| {}).unwrap()
    }

    #[test]
    fn data_mode_and_time_come_over() {
        let folder = tempfile::tempdir().unwrap();
        let (from, to) = (folder.path().join("a"), folder.path().join("b"));
        let content: Vec<u8> = (0..3_000_000u32).map(|i| (i % 251) as u8).collect();
        fs::write(&from, &content).unwrap();
        fs::set_permissions(&from, Permissions::from_mode(0o640)).unwrap();
        let old = std::time::UNIX_EPOCH + std::time::Duration::from_secs(1_000_000);
        let source = File::options().write(true).open(&from).unwrap();
        source.set_modified(old).unwrap();
        copied(&from, &to);
        let meta = fs::metadata(&to).unwrap();
        assert_eq!(fs::read(&to).unwrap(), content);
        assert_eq!(meta.mode() & 0o7777, 0o640);
        assert_eq!(meta.modified().unwrap(), old);
    }

    #[cfg(target_os = "linux")]
    #[test]
    fn holes_stay_holes_and_the_length_stays() {
        let folder = tempfile::tempdir().unwrap();
        let (from, to) = (folder.path().join("a"), folder.path().join("b"));
        let file = File::create(&from).unwrap();
        file.set_len(64 << 20).unwrap();
        file.write_all_at(b"here", 32 << 20).unwrap();
        file.sync_all().unwrap();
        copied(&from, &to);
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
        let folder = tempfile::tempdir().unwrap();
        let (from, to) = (folder.path().join("a"), folder.path().join("b"));
        fs::write(&from, b"four").unwrap();
        let (from, made) = (File::open(&from).unwrap(), File::create(&to).unwrap());
        copy_data(&from, &made, 1 << 20, false, &|_| {}).unwrap();
        assert_eq!(fs::read(&to).unwrap(), b"four");
    }

    #[test]
    fn a_file_that_is_gone_is_passed_over_and_a_link_is_not_followed() {
        let folder = tempfile::tempdir().unwrap();
        let (gone, to) = (folder.path().join("gone"), folder.path().join("to"));
        assert_eq!(copied(&gone, &to), Copied::Vanished);
        assert!(!to.exists());
        fs::write(&gone, "secret").unwrap();
        let from = folder.path().join("link");
        symlink(&gone, &from).unwrap();
        let pair = Pair {
            from: &from,
            to: &to,
        };
        assert!(copy(pair, false, &|_| {}).is_err());
    }
}
