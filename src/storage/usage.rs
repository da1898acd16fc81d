//! Counts what a volume takes, asking the file system which blocks it shares.

use std::fs::{self, Metadata};
use std::io::ErrorKind;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use super::{StorageError, Usage};

/// Counts the files below `root`. Where the file system `shares_blocks`, each
/// file's extents are looked at, else everything is exclusive. Files that vanish
/// meanwhile are passed over.
pub(super) fn measure(root: &Path, shares_blocks: bool) -> Result<Usage, StorageError> {
    let mut usage = Usage::default();
    let mut folders = vec![root.to_owned()];
    while let Some(folder) = folders.pop() {
        let entries = match fs::read_dir(&folder) {
            Ok(entries) => entries,
            Err(e) if e.kind() == ErrorKind::NotFound && folder != root => continue,
            Err(e) => return Err(StorageError::io("list", &folder)(e)),
        };
        for entry in entries {
            let entry = entry.map_err(StorageError::io("list", &folder))?;
            let path = entry.path();
            let meta = match entry.metadata() {
                Ok(meta) => meta,
                Err(e) if e.kind() == ErrorKind::NotFound => continue,
                Err(e) => return Err(StorageError::io("read", &path)(e)),
            };
            if meta.is_dir() {
                folders.push(path);
            } else if meta.is_file() {
                let allocated = allocated_bytes(&meta);
                usage.logical_bytes += allocated;
                usage.exclusive_bytes += if shares_blocks && allocated > 0 {
                    exclusive_bytes(&path, allocated)?
                } else {
                    allocated
                };
            }
        }
    }
    Ok(usage)
}

/// What a file has on disk. `st_blocks` counts 512 bytes whatever the block size (inode(7)).
pub(super) fn allocated_bytes(meta: &Metadata) -> u64 {
    meta.blocks() * 512
}

#[cfg(target_os = "linux")]
fn exclusive_bytes(path: &Path, allocated: u64) -> Result<u64, StorageError> {
    use std::os::fd::AsFd;
    let file = match fs::File::open(path) {
        Ok(file) => file,
        Err(e) if e.kind() == ErrorKind::NotFound => return Ok(0),
        Err(e) => return Err(StorageError::io("open", path)(e)),
    };
    match super::btrfs::ioctl::unshared_bytes(file.as_fd()) {
        // Extents of a compressed file are longer than what they take.
        Ok(bytes) => Ok(bytes.min(allocated)),
        Err(nix::errno::Errno::EOPNOTSUPP | nix::errno::Errno::ENOTTY) => Ok(allocated),
        Err(e) => Err(StorageError::io("read the extents of", path)(e.into())),
    }
}

/// APFS tells nobody which blocks are shared.
#[cfg(not(target_os = "linux"))]
#[expect(
    clippy::unnecessary_wraps,
    reason = "the same signature on every system"
)]
fn exclusive_bytes(_path: &Path, allocated: u64) -> Result<u64, StorageError> {
    Ok(allocated)
}
