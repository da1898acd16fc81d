//! The calls that make files share blocks and have no safe wrapper, and nothing else.
//!
//! Linux: `FICLONE` of `linux/fs.h`, see `ioctl_ficlone(2)` and `ioctl_iflags(2)`.
//! macOS: `clonefile(2)`. Elsewhere nothing is shared.
#![expect(
    unsafe_code,
    reason = "ioctl(2) is untyped and clonefile(2) has no wrapper"
)]

#[cfg(target_os = "macos")]
pub(super) use apple::{clone_file, clone_folder};
#[cfg(target_os = "linux")]
pub(in crate::storage) use linux::share;
#[cfg(target_os = "linux")]
pub(super) use linux::take_over_nocow;

#[cfg(target_os = "linux")]
mod linux {
    use std::os::fd::{AsRawFd, BorrowedFd};

    use nix::errno::Errno;
    use nix::libc::{c_int, c_ulong};

    /// `FS_NOCOW_FL`: written in place, without checksums (btrfs).
    const NOCOW: c_int = 0x0080_0000;

    mod raw {
        use nix::libc::{c_int, c_long};

        nix::ioctl_write_int!(ficlone, 0x94, 9);
        // The numbers were made with `long`, but an `int` is read and written (ioctl_iflags(2)).
        nix::ioctl_read_bad!(
            get_flags,
            nix::request_code_read!(b'f', 1, size_of::<c_long>()),
            c_int
        );
        nix::ioctl_write_ptr_bad!(
            set_flags,
            nix::request_code_write!(b'f', 2, size_of::<c_long>()),
            c_int
        );
    }

    /// Makes the empty file `to` share all blocks of `from`.
    pub(in crate::storage) fn share(from: BorrowedFd<'_>, to: BorrowedFd<'_>) -> Result<(), Errno> {
        let source = c_ulong::try_from(from.as_raw_fd()).map_err(|_| Errno::EBADF)?;
        // SAFETY: both descriptors are open for the call's time and no memory is passed.
        unsafe { raw::ficlone(to.as_raw_fd(), source as _) }.map(drop)
    }

    /// Makes the empty file `to` written in place if `from` is, or not if not: btrfs shares
    /// blocks only between files that are alike in this. Says whether they differed.
    pub(in crate::storage::files) fn take_over_nocow(
        from: BorrowedFd<'_>,
        to: BorrowedFd<'_>,
    ) -> Result<bool, Errno> {
        let flags = |file: BorrowedFd<'_>| {
            let mut flags = 0;
            // SAFETY: the descriptor is open for the call's time and `flags` is the int that is written.
            unsafe { raw::get_flags(file.as_raw_fd(), &raw mut flags) }.map(|_| flags)
        };
        let (wanted, found) = (flags(from)? & NOCOW, flags(to)?);
        if found & NOCOW == wanted {
            return Ok(false);
        }
        let flags = found & !NOCOW | wanted;
        // SAFETY: the descriptor is open for the call's time and `flags` is the int that is read.
        unsafe { raw::set_flags(to.as_raw_fd(), &raw const flags) }.map(|_| true)
    }
}

#[cfg(target_os = "macos")]
mod apple {
    use std::ffi::CStr;
    use std::os::fd::{AsRawFd, BorrowedFd};

    use nix::errno::Errno;
    use nix::libc;

    /// Makes `name` in `folder`, where nothing may lie yet, a clone of the open file `from`
    /// with all its attributes.
    pub(in crate::storage::files) fn clone_file(
        from: BorrowedFd<'_>,
        folder: BorrowedFd<'_>,
        name: &CStr,
    ) -> Result<(), Errno> {
        // SAFETY: both descriptors are open and the name ends with NUL for the call's time.
        let done =
            unsafe { libc::fclonefileat(from.as_raw_fd(), folder.as_raw_fd(), name.as_ptr(), 0) };
        Errno::result(done).map(drop)
    }

    /// Makes `to`, where nothing may lie yet, a clone of the folder `from` with all in it.
    pub(in crate::storage::files) fn clone_folder(from: &CStr, to: &CStr) -> Result<(), Errno> {
        // CLONE_NOFOLLOW of sys/clonefile.h.
        const NOFOLLOW: u32 = 1;
        // SAFETY: both paths end with NUL and live for the call's time.
        let done = unsafe { libc::clonefile(from.as_ptr(), to.as_ptr(), NOFOLLOW) };
        Errno::result(done).map(drop)
    }
}
