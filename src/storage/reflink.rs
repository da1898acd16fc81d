//! The reflink driver: a clone is made file by file, each sharing its source's blocks.
//!
//! For XFS, bcachefs, btrfs where no subvolumes can be made, and APFS. A clone takes no room
//! to speak of and next to no time, but its files are not taken at one instant.

use super::files::{self, Done, FileByFile, Way};
use super::pool::Pool;
use super::{CloneMethod, DriverKind, StorageError};

#[derive(Debug)]
pub(super) struct Reflink {
    /// Told users when the better drivers were tried in vain where one should have worked.
    why_no_snapshots: Option<String>,
}

impl Way for Reflink {
    const KIND: DriverKind = DriverKind::Reflink;
    const SHARES: bool = true;

    fn method(done: Done) -> CloneMethod {
        CloneMethod::Reflink {
            files: done.files,
            shared_bytes: done.shared_bytes,
            written_bytes: done.written_bytes,
        }
    }

    fn advice(&self, pool: &Pool) -> Option<String> {
        self.why_no_snapshots.as_ref().map(|why| {
            format!(
                "branches in {} are made file by file, not as snapshots ({why}): that takes longer \
                 the more files there are",
                pool.path().display()
            )
        })
    }

    fn may_be_shared(&self) -> bool {
        true
    }
}

/// Tries in the pool itself whether files can share blocks; `Unsupported` says why not.
pub(super) fn open(
    pool: Pool,
    why_no_snapshots: Option<String>,
) -> Result<FileByFile<Reflink>, StorageError> {
    if let Some(reason) = files::why_not_shared(&pool)? {
        return Err(StorageError::Unsupported {
            driver: DriverKind::Reflink,
            path: pool.path().to_owned(),
            reason,
        });
    }
    Ok(FileByFile::new(pool, Reflink { why_no_snapshots }))
}

/// For a pool where such volumes lie already: nothing is tried, as it may be full or read-only.
pub(super) fn reopen(pool: Pool) -> FileByFile<Reflink> {
    let way = Reflink {
        why_no_snapshots: None,
    };
    FileByFile::new(pool, way)
}
