//! The file system calls of the floor, and nothing else: `linux/btrfs.h`.
#![expect(unsafe_code, reason = "ioctl(2) is untyped; its only callers are here")]

use std::ffi::OsStr;
use std::fs::{self, File};
use std::os::fd::AsRawFd as _;
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};

const BTRFS_MAGIC: u8 = 0x94;

/// Inode number of every subvolume's root folder (`BTRFS_FIRST_FREE_OBJECTID`).
const SUBVOLUME_INODE: u64 = 256;

/// `struct btrfs_ioctl_vol_args_v2`.
#[repr(C)]
struct VolArgsV2 {
    fd: i64,
    transid: u64,
    flags: u64,
    unused: [u64; 4],
    name: [u8; 4040],
}

/// `struct btrfs_ioctl_vol_args`.
#[repr(C)]
struct VolArgs {
    fd: i64,
    name: [u8; 4088],
}

mod raw {
    use super::{BTRFS_MAGIC, VolArgs, VolArgsV2};

    nix::ioctl_write_ptr!(snap_create_v2, BTRFS_MAGIC, 23, VolArgsV2);
    nix::ioctl_write_ptr!(snap_destroy, BTRFS_MAGIC, 15, VolArgs);
}

/// The name with the zero that ends it.
fn c_name<const N: usize>(name: &OsStr) -> Result<[u8; N]> {
    let bytes = name.as_bytes();
    ensure!(bytes.len() < N, "the name of a subvolume is too long");
    let mut out = [0; N];
    out[..bytes.len()].copy_from_slice(bytes);
    Ok(out)
}

/// Makes `name` in `folder` a writable snapshot of the subvolume at `source`. Returns
/// the time of the ioctl alone.
pub(crate) fn snapshot(source: &Path, folder: &File, name: &str) -> Result<Duration> {
    let source_dir = File::open(source).with_context(|| format!("open {}", source.display()))?;
    let args = VolArgsV2 {
        fd: i64::from(source_dir.as_raw_fd()),
        transid: 0,
        flags: 0,
        unused: [0; 4],
        name: c_name(name.as_ref())?,
    };
    let begun = Instant::now();
    // SAFETY: both descriptors are open for the call's time, `args` has the layout the
    // number promises and the kernel only reads it.
    unsafe { raw::snap_create_v2(folder.as_raw_fd(), &raw const args) }
        .with_context(|| format!("snapshot {}", source.display()))?;
    Ok(begun.elapsed())
}

/// Destroys what is at `path`: by ioctl a subvolume, by hand what that is refused for.
pub(crate) fn destroy(path: &Path) -> Result<()> {
    let is_subvolume = fs::symlink_metadata(path)
        .with_context(|| format!("read {}", path.display()))?
        .ino()
        == SUBVOLUME_INODE;
    if let (true, Some(folder), Some(name)) = (is_subvolume, path.parent(), path.file_name()) {
        let folder = File::open(folder).with_context(|| format!("open {}", folder.display()))?;
        let args = VolArgs {
            fd: 0,
            name: c_name(name)?,
        };
        // SAFETY: the descriptor is open for the call's time, `args` has the layout the
        // number promises and the kernel only reads it.
        if unsafe { raw::snap_destroy(folder.as_raw_fd(), &raw const args) }.is_ok() {
            return Ok(());
        }
    }
    fs::remove_dir_all(path).with_context(|| format!("remove {}", path.display()))
}
