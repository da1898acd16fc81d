//! Chooses the driver of a pool by trying what its file system can do.

use std::path::Path;
use std::sync::Arc;

#[cfg(target_os = "linux")]
use super::btrfs::Btrfs;
use super::pool::{self, Pool};
#[cfg(target_os = "linux")]
use super::zfs::Zfs;
use super::{Choice, DriverKind, StorageDriver, StorageError, copy, reflink};
use crate::types::Owner;

type Opened = Result<Arc<dyn StorageDriver>, StorageError>;

/// Opens the pool at `path`, made when it is missing, with the driver chosen.
///
/// `owner` is whom volumes are given to when this process is root; otherwise
/// they belong to its user. `Auto` takes the best driver that works there, and the
/// driver's `advice` says what a better pool would give. A driver asked for by
/// name that can't be used is the error `Unsupported`.
pub fn open(choice: Choice, path: &Path, owner: Owner) -> Opened {
    let pool = Pool::open(path, owner)?;
    match choice {
        Choice::Auto => open_best(&pool),
        Choice::Driver(DriverKind::Btrfs) => open_btrfs(pool),
        Choice::Driver(DriverKind::Zfs) => open_zfs(pool),
        Choice::Driver(DriverKind::Reflink) => Ok(Arc::new(reflink::open(pool, None)?)),
        Choice::Driver(DriverKind::Copy) => Ok(Arc::new(copy::open(pool, None))),
    }
}

/// Tries the drivers in the order of [`DriverKind::ALL`].
fn open_best(pool: &Pool) -> Opened {
    let mut refusals = Refusals {
        file_system: file_system_name(pool.path()),
        all: Vec::new(),
    };
    for kind in DriverKind::ALL {
        let pool = pool.clone();
        let opened: Opened = match kind {
            DriverKind::Btrfs => open_btrfs(pool),
            DriverKind::Zfs => open_zfs(pool),
            DriverKind::Reflink => reflink::open(pool, refusals.of_the_one_made_for_it())
                .map(|driver| Arc::new(driver) as Arc<dyn StorageDriver>),
            DriverKind::Copy => Ok(Arc::new(copy::open(pool, refusals.worst()))),
        };
        match opened {
            Err(StorageError::Unsupported { reason, .. }) => refusals.all.push((kind, reason)),
            other => return other,
        }
    }
    unreachable!("`copy` comes last and works anywhere")
}

/// Which drivers were tried in vain, and why they can't be used.
struct Refusals {
    file_system: String,
    all: Vec<(DriverKind, String)>,
}

impl Refusals {
    /// Why the driver that bears the file system's own name can't be used: that comes unexpected.
    fn of_the_one_made_for_it(&self) -> Option<String> {
        self.all
            .iter()
            .find(|(kind, _)| kind.as_str() == self.file_system)
            .map(|(kind, reason)| format!("{kind} can't be used: {reason}"))
    }

    /// What to tell those who get full copies.
    fn worst(&self) -> Option<String> {
        self.of_the_one_made_for_it()
            .or_else(|| self.all.last().map(|(_, reason)| reason.clone()))
    }
}

/// Opens a pool where volumes of that driver lie already. It may be full or read-only: a branch must be
/// shown and deleted there too, so nothing has to be tried.
pub fn reopen(kind: DriverKind, path: &Path, owner: Owner) -> Opened {
    let pool = Pool::existing_at(path, owner)?;
    match kind {
        #[cfg(target_os = "linux")]
        DriverKind::Btrfs => Ok(Arc::new(Btrfs::reopen(pool)?)),
        #[cfg(not(target_os = "linux"))]
        DriverKind::Btrfs => open_btrfs(pool),
        DriverKind::Zfs => open_zfs(pool),
        DriverKind::Reflink => Ok(Arc::new(reflink::reopen(pool))),
        DriverKind::Copy => Ok(Arc::new(copy::open(pool, None))),
    }
}

/// The command that mounts the file system that a pool should lie in and does not, where it is known.
pub fn command_to_mount(pool: &Path, kind: Option<DriverKind>) -> Option<String> {
    let configured = super::Boot::here().command_to_mount(pool);
    #[cfg(target_os = "linux")]
    let configured = configured
        .or_else(|| (kind == Some(DriverKind::Zfs)).then(|| Zfs::command_to_mount(pool))?);
    configured.or_else(|| kind?.how_to_mount().map(str::to_owned))
}

#[cfg(target_os = "linux")]
fn open_btrfs(pool: Pool) -> Opened {
    Ok(Arc::new(Btrfs::open(pool)?))
}

#[cfg(not(target_os = "linux"))]
fn open_btrfs(pool: Pool) -> Opened {
    Err(StorageError::Unsupported {
        driver: DriverKind::Btrfs,
        path: pool.path().to_owned(),
        reason: "btrfs is a file system of Linux".into(),
    })
}

#[cfg(target_os = "linux")]
fn open_zfs(pool: Pool) -> Opened {
    Ok(Arc::new(Zfs::open(pool)?))
}

#[cfg(not(target_os = "linux"))]
fn open_zfs(pool: Pool) -> Opened {
    Err(StorageError::Unsupported {
        driver: DriverKind::Zfs,
        path: pool.path().to_owned(),
        reason: "ZFS is used on Linux only so far".into(),
    })
}

/// As [`pool::file_system_name`], but for zfs-fuse, which the kernel calls FUSE.
fn file_system_name(folder: &Path) -> String {
    #[cfg(target_os = "linux")]
    if Zfs::is_at(folder) {
        return DriverKind::Zfs.to_string();
    }
    pool::file_system_name(folder)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn refusals_name_the_driver_that_should_have_worked() {
        let mut refusals = Refusals {
            file_system: "btrfs".into(),
            all: vec![(DriverKind::Btrfs, "not allowed".into())],
        };
        let why = refusals.of_the_one_made_for_it().unwrap();
        assert_eq!(why, "btrfs can't be used: not allowed");
        refusals.all.push((DriverKind::Reflink, "odd".into()));
        assert_eq!(refusals.worst().unwrap(), why);
        refusals.file_system = "ext4".into();
        assert_eq!(refusals.of_the_one_made_for_it(), None);
        assert_eq!(refusals.worst().unwrap(), "odd");
    }
}
