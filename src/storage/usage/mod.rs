//! Counts what volumes take and share, by what the file system says of each block.
//!
//! For every volume of a pool it knows where on the file system its data lies, and lays
//! these maps over each other: what is in one map only is that volume's own, whatever
//! shared it once. On btrfs the maps come from the subvolumes' trees ([`tree`]), elsewhere,
//! and without privileges, file by file ([`files`]). They are kept, so that the next look
//! reads only what changed.

use std::fs::{self, Metadata};
use std::io::ErrorKind;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use super::{StorageError, Usage};

#[cfg(target_os = "linux")]
mod files;
#[cfg(target_os = "linux")]
mod ioctl;
#[cfg(test)]
mod live_tests;
#[cfg(target_os = "linux")]
mod look;
#[cfg(target_os = "linux")]
mod pieces;
#[cfg(target_os = "linux")]
mod shares;
#[cfg(target_os = "linux")]
mod subvolumes;
mod survey;
#[cfg(target_os = "linux")]
mod tree;

pub(super) use survey::Survey;

/// Counts the files below `root`, all of them as its own.
fn measure(root: &Path) -> Result<Usage, StorageError> {
    let mut bytes = 0;
    walk(root, |_, meta| {
        bytes += allocated_bytes(meta);
        Ok(())
    })?;
    Ok(Usage {
        logical_bytes: bytes,
        exclusive_bytes: bytes,
    })
}

/// Shows `each` file below `root`. What vanishes meanwhile is passed over.
fn walk(
    root: &Path,
    mut each: impl FnMut(&Path, &Metadata) -> Result<(), StorageError>,
) -> Result<(), StorageError> {
    let mut folders = vec![root.to_owned()];
    while let Some(folder) = folders.pop() {
        let entries = match fs::read_dir(&folder) {
            Ok(entries) => entries,
            Err(e) if e.kind() == ErrorKind::NotFound && folder != root => continue,
            Err(e) => return Err(StorageError::io("list", &folder)(e)),
        };
        for entry in entries {
            let entry = entry.map_err(StorageError::io("list", &folder))?;
            let meta = match entry.metadata() {
                Ok(meta) => meta,
                Err(e) if e.kind() == ErrorKind::NotFound => continue,
                Err(e) => return Err(StorageError::io("read", &entry.path())(e)),
            };
            if meta.is_dir() {
                folders.push(entry.path());
            } else if meta.is_file() {
                each(&entry.path(), &meta)?;
            }
        }
    }
    Ok(())
}

/// What a file has on disk. `st_blocks` counts 512 bytes whatever the block size (inode(7)).
pub(super) fn allocated_bytes(meta: &Metadata) -> u64 {
    meta.blocks() * 512
}
