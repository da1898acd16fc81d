//! Tells what a file holds by its first block, without privileges.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use super::FileSystem;

/// Offset of btrfs' first superblock, and in it of its magic and of the bytes of the file system
/// (`struct btrfs_super_block`, `linux/btrfs_tree.h`).
const BTRFS_SUPER: u64 = 0x1_0000;
const BTRFS_MAGIC: (u64, &[u8; 8]) = (BTRFS_SUPER + 0x40, b"_BHRfS_M");

/// XFS begins with its superblock, in big-endian numbers: block size, and blocks of the log, which
/// statvfs(3) leaves out (`struct xfs_dsb`, `fs/xfs/libxfs/xfs_format.h`).
const XFS_MAGIC: &[u8; 4] = b"XFSB";
const XFS_BLOCK_SIZE: u64 = 4;
const XFS_LOG_BLOCKS: u64 = 96;

/// The file system that a file holds, if it is one of ours.
pub(super) fn file_system(file: &File) -> io::Result<Option<FileSystem>> {
    if read::<8>(file, BTRFS_MAGIC.0)?.as_ref() == Some(BTRFS_MAGIC.1) {
        return Ok(Some(FileSystem::Btrfs));
    }
    let xfs = read::<4>(file, 0)?.as_ref() == Some(XFS_MAGIC);
    Ok(xfs.then_some(FileSystem::Xfs))
}

/// Bytes of an XFS file system that statvfs(3) doesn't count: its log.
pub(super) fn xfs_log_bytes(file: &File) -> io::Result<u64> {
    let number = |at| -> io::Result<u64> {
        let bytes = read::<4>(file, at)?.unwrap_or_default();
        Ok(u64::from(u32::from_be_bytes(bytes)))
    };
    Ok(number(XFS_LOG_BLOCKS)? * number(XFS_BLOCK_SIZE)?)
}

/// Bytes at an offset; none where the file ends before.
fn read<const N: usize>(file: &File, at: u64) -> io::Result<Option<[u8; N]>> {
    let mut bytes = [0; N];
    match file.read_exact_at(&mut bytes, at) {
        Ok(()) => Ok(Some(bytes)),
        Err(e) if e.kind() == io::ErrorKind::UnexpectedEof => Ok(None),
        Err(e) => Err(e),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn file_systems_are_told_by_their_magic() {
        let file = tempfile::tempfile().unwrap();
        assert_eq!(file_system(&file).unwrap(), None);
        file.set_len(1 << 20).unwrap();
        assert_eq!(file_system(&file).unwrap(), None);
        file.write_all_at(b"_BHRfS_M", 0x1_0040).unwrap();
        assert_eq!(file_system(&file).unwrap(), Some(FileSystem::Btrfs));

        let file = tempfile::tempfile().unwrap();
        file.write_all_at(b"XFSB\0\0\x10\0", 0).unwrap();
        file.write_all_at(&[0, 0, 0x40, 0], 96).unwrap();
        assert_eq!(file_system(&file).unwrap(), Some(FileSystem::Xfs));
        assert_eq!(xfs_log_bytes(&file).unwrap(), 64 << 20);
    }
}
