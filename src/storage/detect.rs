//! Chooses the driver of a pool by trying what its file system can do.

use std::path::Path;
use std::sync::Arc;

#[cfg(target_os = "linux")]
use super::btrfs::Btrfs;
use super::copy::Copy;
use super::pool::Pool;
#[cfg(target_os = "linux")]
use super::zfs::Zfs;
use super::{Choice, DriverKind, StorageDriver, StorageError};
use crate::types::Owner;

/// Opens the pool at `path`, made when it is missing, with the driver chosen.
///
/// `owner` is whom volumes are given to when this process is root; otherwise
/// they belong to its user. `Auto` takes the best driver that works there, and the
/// driver's `advice` says what a better pool would give. A driver asked for by
/// name that can't be used is the error `Unsupported`.
pub fn open(
    choice: Choice,
    path: &Path,
    owner: Owner,
) -> Result<Arc<dyn StorageDriver>, StorageError> {
    let pool = Pool::open(path, owner)?;
    let mut why_not = None;
    match choice {
        Choice::Driver(DriverKind::Btrfs) => return btrfs(pool),
        Choice::Driver(DriverKind::Zfs) => return zfs(pool),
        Choice::Driver(DriverKind::Copy) => {}
        Choice::Auto => {
            for kind in in_order(pool.path()) {
                let tried = match kind {
                    DriverKind::Zfs => zfs(pool.clone()),
                    _ => btrfs(pool.clone()),
                };
                match tried {
                    // The first one's is told: it is the one that comes closest.
                    Err(StorageError::Unsupported { reason, .. }) => {
                        why_not.get_or_insert_with(|| format!("{kind} can't be used: {reason}"));
                    }
                    other => return other,
                }
            }
        }
    }
    Ok(Arc::new(Copy::open(pool, why_not)?))
}

/// The drivers better than a copy, the one made for the file system first.
fn in_order(pool: &Path) -> [DriverKind; 2] {
    if is_on_zfs(pool) {
        [DriverKind::Zfs, DriverKind::Btrfs]
    } else {
        [DriverKind::Btrfs, DriverKind::Zfs]
    }
}

#[cfg(target_os = "linux")]
fn btrfs(pool: Pool) -> Result<Arc<dyn StorageDriver>, StorageError> {
    Ok(Arc::new(Btrfs::open(pool)?))
}

#[cfg(not(target_os = "linux"))]
fn btrfs(pool: Pool) -> Result<Arc<dyn StorageDriver>, StorageError> {
    Err(StorageError::Unsupported {
        driver: DriverKind::Btrfs,
        path: pool.path().to_owned(),
        reason: "btrfs is a file system of Linux".into(),
    })
}

#[cfg(target_os = "linux")]
fn zfs(pool: Pool) -> Result<Arc<dyn StorageDriver>, StorageError> {
    Ok(Arc::new(Zfs::open(pool)?))
}

#[cfg(target_os = "linux")]
fn is_on_zfs(pool: &Path) -> bool {
    Zfs::is_at(pool)
}

#[cfg(not(target_os = "linux"))]
fn zfs(pool: Pool) -> Result<Arc<dyn StorageDriver>, StorageError> {
    Err(StorageError::Unsupported {
        driver: DriverKind::Zfs,
        path: pool.path().to_owned(),
        reason: "ZFS is supported on Linux only so far".into(),
    })
}

#[cfg(not(target_os = "linux"))]
fn is_on_zfs(_pool: &Path) -> bool {
    false
}
