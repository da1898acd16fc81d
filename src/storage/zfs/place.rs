//! Finds the dataset that a pool folder belongs to.

use std::ffi::OsString;
use std::fs;
use std::io;
use std::os::unix::ffi::OsStringExt;
use std::path::{Path, PathBuf};

use nix::sys::statfs::{FUSE_SUPER_MAGIC, FsType, statfs};

use super::program::Program;

/// Of OpenZFS (`ZFS_SUPER_MAGIC` in its sources; statfs(2) does not list it). zfs-fuse has FUSE's.
const ZFS_SUPER_MAGIC: FsType = FsType(0x2fc1_2fc1);

#[derive(Debug, PartialEq, Eq)]
pub(super) enum Place {
    /// The folder is where this dataset is mounted.
    Root(String),
    /// The folder lies somewhere in this dataset.
    Inside(String),
    NotZfs,
}

/// Looks where the folder lies. Costs one system call where no ZFS is.
pub(super) fn of(folder: &Path) -> io::Result<Place> {
    let kind = statfs(folder)?.filesystem_type();
    if kind != ZFS_SUPER_MAGIC && kind != FUSE_SUPER_MAGIC {
        return Ok(Place::NotZfs);
    }
    Ok(find(&fs::read("/proc/self/mountinfo")?, folder))
}

/// Reads the mounts (`proc_pid_mountinfo(5)`): the innermost mount that holds the folder, and of several at one
/// place the last, which hides the others.
fn find(mountinfo: &[u8], folder: &Path) -> Place {
    let mut found: Option<(PathBuf, Place)> = None;
    for line in mountinfo.split(|b| *b == b'\n') {
        let mut fields = line.split(|b| *b == b' ');
        let (Some(root), Some(point)) = (fields.nth(3), fields.next()) else {
            continue;
        };
        let mut after = fields.skip_while(|f| *f != b"-").skip(1);
        let (Some(kind), Some(source)) = (after.next(), after.next()) else {
            continue;
        };
        let point = unescape(point);
        let outer = found
            .as_ref()
            .is_some_and(|(inner, _)| inner.components().count() > point.components().count());
        if !folder.starts_with(&point) || outer {
            continue;
        }
        let dataset = || unescape(source).to_string_lossy().into_owned();
        let place = match kind {
            // A bind mount of a folder shows that folder as its root.
            b"zfs" | b"fuse.zfs" if folder == point && root == b"/" => Place::Root(dataset()),
            b"zfs" | b"fuse.zfs" => Place::Inside(dataset()),
            _ => Place::NotZfs,
        };
        found = Some((point, place));
    }
    found.map_or(Place::NotZfs, |(_, place)| place)
}

/// Space, tab, newline and backslash stand there as `\040` and so on.
fn unescape(field: &[u8]) -> PathBuf {
    let mut bytes = Vec::with_capacity(field.len());
    let mut rest = field;
    while let Some((first, tail)) = rest.split_first() {
        let octal = (*first == b'\\').then(|| tail.get(..3)).flatten();
        let code = octal
            .and_then(|digits| std::str::from_utf8(digits).ok())
            .and_then(|digits| u8::from_str_radix(digits, 8).ok());
        bytes.push(code.unwrap_or(*first));
        rest = if code.is_some() { &tail[3..] } else { tail };
    }
    PathBuf::from(OsString::from_vec(bytes))
}

/// The dataset that should be mounted at the folder and is not, as after a restart. Asks only
/// where ZFS is at work.
pub(super) fn unmounted_at(program: &Program, folder: &Path) -> Option<String> {
    let at_work = ["/dev/zfs", "/var/run/zfs"]
        .iter()
        .any(|p| Path::new(p).exists());
    if !at_work {
        return None;
    }
    let args = [
        "list",
        "-H",
        "-t",
        "filesystem",
        "-o",
        "name,mounted,mountpoint",
    ];
    let listed = program.run(&args).ok()?;
    listed.lines().find_map(|line| {
        let mut fields = line.splitn(3, '\t');
        let (name, mounted, point) = (fields.next()?, fields.next()?, fields.next()?);
        (mounted == "no" && Path::new(point) == folder).then(|| name.to_owned())
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const MOUNTS: &[u8] = b"27 1 0:5 / / rw - ext4 /dev/vda rw\n\
        45 27 0:41 / /tank rw,relatime shared:9 - zfs tank rw,xattr\n\
        46 45 0:42 / /tank/my\\040pool rw - fuse.zfs tank/my\\040pool rw\n\
        47 46 0:43 / /tank/my\\040pool/vol rw - zfs tank/my\\040pool/vol rw\n\
        48 27 0:41 /sub /bound rw - zfs tank rw\n\
        49 27 0:50 / /both rw - zfs tank/under rw\n\
        50 49 0:51 / /both rw - tmpfs tmpfs rw\n";

    #[test]
    fn the_dataset_of_a_folder_is_the_innermost_mount() {
        let at = |path: &str| find(MOUNTS, Path::new(path));
        assert_eq!(at("/tank"), Place::Root("tank".into()));
        assert_eq!(at("/tank/other"), Place::Inside("tank".into()));
        assert_eq!(at("/tank/my pool"), Place::Root("tank/my pool".into()));
        assert_eq!(
            at("/tank/my pool/x/y"),
            Place::Inside("tank/my pool".into())
        );
        assert_eq!(at("/tanker"), Place::NotZfs);
        assert_eq!(at("/bound"), Place::Inside("tank".into()));
        assert_eq!(at("/both"), Place::NotZfs);
        assert_eq!(find(b"", Path::new("/tank")), Place::NotZfs);
    }

    #[test]
    fn other_file_systems_are_told_by_one_look() {
        assert_eq!(of(Path::new("/proc")).unwrap(), Place::NotZfs);
    }
}
