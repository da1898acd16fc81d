//! Chooses the driver of a pool by trying what its file system can do.

use std::path::Path;
use std::sync::Arc;

#[cfg(target_os = "linux")]
use super::btrfs::Btrfs;
use super::copy::Copy;
use super::pool::Pool;
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
    let why_not_btrfs = match choice {
        Choice::Driver(DriverKind::Btrfs) => return btrfs(pool),
        Choice::Driver(DriverKind::Copy) => None,
        Choice::Auto => match btrfs(pool.clone()) {
            Err(StorageError::Unsupported { reason, .. }) => Some(reason),
            other => return other,
        },
    };
    let driver = Copy::open(pool, why_not_btrfs)?;
    Ok(Arc::new(driver))
}

/// Opens a pool where volumes of that driver lie already. It may be full or read-only: nothing is made
/// or tried there.
pub fn reopen(
    kind: DriverKind,
    path: &Path,
    owner: Owner,
) -> Result<Arc<dyn StorageDriver>, StorageError> {
    let pool = Pool::existing_at(path, owner)?;
    match kind {
        #[cfg(target_os = "linux")]
        DriverKind::Btrfs => Ok(Arc::new(Btrfs::reopen(pool)?)),
        #[cfg(not(target_os = "linux"))]
        DriverKind::Btrfs => btrfs(pool),
        DriverKind::Copy => Ok(Arc::new(Copy::reopen(pool))),
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
