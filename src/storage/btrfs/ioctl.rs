//! The file system calls that have no safe wrapper, and nothing else.
//!
//! Numbers and layouts are those of `linux/btrfs.h`.
#![expect(unsafe_code, reason = "ioctl(2) is untyped; its only callers are here")]

use std::ffi::OsStr;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::os::unix::ffi::OsStrExt;

use nix::errno::Errno;

const BTRFS_MAGIC: u8 = 0x94;

/// Inode number of every subvolume's root folder (`BTRFS_FIRST_FREE_OBJECTID`).
pub(super) const SUBVOLUME_INODE: u64 = 256;

/// `struct btrfs_ioctl_vol_args_v2`.
#[repr(C)]
struct VolArgsV2 {
    fd: i64,
    transid: u64,
    flags: u64,
    unused: [u64; 4],
    /// Ends with a NUL byte.
    name: [u8; 4040],
}

/// `struct btrfs_ioctl_vol_args`.
#[repr(C)]
struct VolArgs {
    fd: i64,
    /// Ends with a NUL byte.
    name: [u8; 4088],
}

mod raw {
    use super::{BTRFS_MAGIC, VolArgs, VolArgsV2};

    nix::ioctl_write_ptr!(subvol_create_v2, BTRFS_MAGIC, 24, VolArgsV2);
    nix::ioctl_write_ptr!(snap_create_v2, BTRFS_MAGIC, 23, VolArgsV2);
    nix::ioctl_write_ptr!(snap_destroy, BTRFS_MAGIC, 15, VolArgs);
}

/// The name as the kernel wants it. Names come from ids and so are short; a
/// longer one is refused here rather than cut.
fn c_name<const N: usize>(name: &OsStr) -> Result<[u8; N], Errno> {
    let bytes = name.as_bytes();
    if bytes.len() >= N {
        return Err(Errno::ENAMETOOLONG);
    }
    let mut out = [0; N];
    out[..bytes.len()].copy_from_slice(bytes);
    Ok(out)
}

fn args_v2(fd: i64, name: &OsStr) -> Result<VolArgsV2, Errno> {
    Ok(VolArgsV2 {
        fd,
        transid: 0,
        flags: 0,
        unused: [0; 4],
        name: c_name(name)?,
    })
}

/// Makes an empty subvolume called `name` in `folder` (`BTRFS_IOC_SUBVOL_CREATE_V2`).
pub(super) fn create_subvolume(folder: BorrowedFd<'_>, name: &OsStr) -> Result<(), Errno> {
    let args = args_v2(0, name)?;
    // SAFETY: the descriptor is open for the call's time, `args` has the layout the
    // number promises and the kernel only reads it.
    unsafe { raw::subvol_create_v2(folder.as_raw_fd(), &raw const args) }.map(drop)
}

/// Makes `name` in `folder` a writable snapshot of `source` (`BTRFS_IOC_SNAP_CREATE_V2`).
pub(super) fn snapshot(
    folder: BorrowedFd<'_>,
    name: &OsStr,
    source: BorrowedFd<'_>,
) -> Result<(), Errno> {
    let args = args_v2(i64::from(source.as_raw_fd()), name)?;
    // SAFETY: both descriptors are open for the call's time, `args` has the layout the
    // number promises and the kernel only reads it.
    unsafe { raw::snap_create_v2(folder.as_raw_fd(), &raw const args) }.map(drop)
}

/// Destroys the subvolume `name` in `folder` (`BTRFS_IOC_SNAP_DESTROY`).
pub(super) fn destroy_subvolume(folder: BorrowedFd<'_>, name: &OsStr) -> Result<(), Errno> {
    let args = VolArgs {
        fd: 0,
        name: c_name(name)?,
    };
    // SAFETY: the descriptor is open for the call's time, `args` has the layout the
    // number promises and the kernel only reads it.
    unsafe { raw::snap_destroy(folder.as_raw_fd(), &raw const args) }.map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn structures_have_the_kernels_sizes() {
        assert_eq!(size_of::<VolArgsV2>(), 4096);
        assert_eq!(size_of::<VolArgs>(), 4096);
    }

    #[test]
    fn a_name_too_long_is_refused() {
        let long = "x".repeat(4088);
        assert_eq!(c_name::<4088>(OsStr::new(&long)), Err(Errno::ENAMETOOLONG));
    }
}
