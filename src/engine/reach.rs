//! Pools: whether one is there, opened with its driver, marked as one in use.
//!
//! A pool whose file system is not mounted looks like an empty folder. Nothing may be concluded from
//! that, nothing written to it, and no disk that hangs may keep the daemon from answering.

use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use super::{Engine, EngineError, Result, blocking, doctor, lock};
use crate::registry::{BranchRecord, Place};
use crate::storage::{self, Boot, DriverKind, StorageDriver};
use crate::types::VolumeId;

/// The file that tells a pool from the empty folder it is mounted on.
pub(super) const POOL_MARK: &str = ".dbranch";
/// How long a disk may take to say whether a pool is there.
const LOOK_LIMIT: Duration = Duration::from_secs(10);

impl Engine {
    /// The driver of a branch's volume. Right after the daemon's start it waits until its pool is swept.
    pub(super) async fn driver(&self, branch: &BranchRecord) -> Result<Arc<dyn StorageDriver>> {
        let mut sweeping = self.0.sweeping.subscribe();
        let _ = sweeping
            .wait_for(|pools| !pools.contains(&branch.pool))
            .await;
        self.driver_unswept(branch).await
    }

    pub(super) async fn driver_unswept(
        &self,
        branch: &BranchRecord,
    ) -> Result<Arc<dyn StorageDriver>> {
        self.branch_is_there(branch).await?;
        self.driver_at(&branch.place()).await
    }

    /// The driver of a volume, whoever's it is.
    pub(super) async fn driver_at(&self, place: &Place) -> Result<Arc<dyn StorageDriver>> {
        let kind = place
            .driver
            .parse()
            .map_err(|e: crate::types::Invalid| EngineError::bug(e.to_string()))?;
        self.is_there(place).await?;
        if let Some(driver) = self.opened(kind, &place.pool) {
            return Ok(driver);
        }
        let (path, owner) = (place.pool.clone(), self.0.owner);
        let driver = blocking(move || Ok(storage::reopen(kind, &path, owner)?)).await?;
        Ok(self.keep(&place.pool, driver))
    }

    /// Refuses a branch whose pool is not there.
    pub(super) async fn branch_is_there(&self, branch: &BranchRecord) -> Result<()> {
        self.is_there(&branch.place())
            .await
            .map_err(|e| or_forget(branch, e))
    }

    async fn is_there(&self, place: &Place) -> Result<()> {
        let volumes = std::slice::from_ref(&place.volume);
        self.pool_is_there(&place.pool, volumes, place.driver.parse().ok())
            .await
    }

    fn opened(&self, kind: DriverKind, pool: &Path) -> Option<Arc<dyn StorageDriver>> {
        let drivers = lock(&self.0.drivers);
        let of_pool = drivers.get(pool)?;
        of_pool.iter().find(|d| d.kind() == kind).cloned()
    }

    fn keep(&self, pool: &Path, driver: Arc<dyn StorageDriver>) -> Arc<dyn StorageDriver> {
        let mut drivers = lock(&self.0.drivers);
        let of_pool = drivers.entry(pool.to_owned()).or_default();
        // Opened by somebody else meanwhile: one driver a pool knows what was measured before.
        if let Some(kept) = of_pool.iter().find(|d| d.kind() == driver.kind()) {
            return kept.clone();
        }
        of_pool.push(driver.clone());
        driver
    }

    /// Refuses a pool that is not there now: one that bears no mark, and none of these volumes
    /// either. Nothing is opened or changed.
    pub(super) async fn pool_is_there(
        &self,
        pool: &Path,
        volumes: &[VolumeId],
        kind: Option<DriverKind>,
    ) -> Result<()> {
        let (path, volumes) = (pool.to_owned(), volumes.to_vec());
        let look = blocking(move || {
            let mut names = std::iter::once(POOL_MARK).chain(volumes.iter().map(VolumeId::as_str));
            let found = names.find_map(|name| match path.join(name).try_exists() {
                Ok(false) => None,
                found => Some(found),
            });
            match found.unwrap_or(Ok(false)) {
                Ok(true) => Ok(()),
                Ok(false) => {
                    storage::image::must_be_in_use(&path)?;
                    Err(not_there(&path, kind))
                }
                Err(e) => Err(EngineError::io("look into the pool", &path, &e)),
            }
        });
        match tokio::time::timeout(LOOK_LIMIT, look).await {
            Ok(found) => found,
            Err(_) => Err(doctor::hangs(pool)),
        }
    }

    /// Refuses to begin a pool where one is known that is not there, or where a file system should be
    /// mounted first: what is written beneath a mount point is hidden by the next mount.
    pub(super) fn may_become_a_pool(&self, path: &Path) -> Result<()> {
        let wanted = resolved(path);
        for project in self.0.registry.projects()? {
            let branches = self.0.registry.branches(&project.id)?;
            if let Some(branch) = branches.iter().find(|b| b.pool == wanted)
                && !wanted.join(POOL_MARK).exists()
                && !wanted.join(branch.volume.as_str()).exists()
            {
                return Err(not_there(&wanted, branch.driver.parse().ok()));
            }
        }
        match Boot::here().command_to_mount(&wanted) {
            Some(command) if !wanted.join(POOL_MARK).exists() => {
                Err(EngineError::refused(format!(
                    "the file system of the pool {} is not mounted",
                    wanted.display()
                ))
                .hint(command))
            }
            _ => Ok(()),
        }
    }

    /// Marks a folder as a pool in use, and tells people whose it is.
    pub(super) async fn mark_pool(&self, pool: &Path) -> Result<()> {
        let file = pool.join(POOL_MARK);
        let text = format!(
            "These folders are databases of dbranch. What they are is recorded in {}; `dbranch list` shows it.\n",
            self.0.paths.state_dir().display()
        );
        blocking(move || {
            if file.exists() {
                return Ok(());
            }
            crate::fsx::write_atomic(&file, text.as_bytes(), 0o644, None)
                .map_err(|e| EngineError::io("write", &file, &e))
        })
        .await
    }

    /// Opens a pool for new volumes, trying what its file system can do.
    pub(super) async fn open_pool(
        &self,
        choice: storage::Choice,
        pool: &Path,
    ) -> Result<Arc<dyn StorageDriver>> {
        let (path, owner) = (pool.to_owned(), self.0.owner);
        let driver = blocking(move || Ok(storage::open(choice, &path, owner)?)).await?;
        self.keep(pool, driver.clone());
        Ok(driver)
    }

    /// The pool for new projects.
    pub(super) fn pool(&self) -> PathBuf {
        self.machine()
            .pool
            .value
            .unwrap_or_else(|| self.0.paths.default_pool().to_owned())
    }
}

/// Tells what to do if what is not there now never will be again.
fn or_forget(branch: &BranchRecord, e: EngineError) -> EngineError {
    EngineError {
        message: format!(
            "{}; if its disk is lost for good, `dbranch forget {}` lets go of it",
            e.message, branch.name
        ),
        ..e
    }
}

fn not_there(pool: &Path, kind: Option<DriverKind>) -> EngineError {
    let hint = storage::command_to_mount(pool, kind)
        .unwrap_or_else(|| format!("mount the file system that holds {}", pool.display()));
    EngineError::refused(format!(
        "the pool {} is not there: its file system is not mounted, or another one is mounted over it",
        pool.display()
    ))
    .hint(hint)
}

/// The path without links, as far as it exists.
fn resolved(path: &Path) -> PathBuf {
    for ancestor in path.ancestors() {
        match ancestor.canonicalize() {
            Ok(found) => {
                let rest = path.strip_prefix(ancestor).unwrap_or(Path::new(""));
                return if rest.as_os_str().is_empty() {
                    found
                } else {
                    found.join(rest)
                };
            }
            Err(e) if e.kind() == ErrorKind::NotFound => {}
            Err(_) => break,
        }
    }
    path.to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_path_is_resolved_as_far_as_it_exists() {
        let dir = tempfile::tempdir().unwrap();
        let real = dir.path().canonicalize().unwrap().join("real");
        std::fs::create_dir(&real).unwrap();
        let link = dir.path().join("link");
        std::os::unix::fs::symlink(&real, &link).unwrap();
        assert_eq!(resolved(&link.join("a/b")), real.join("a/b"));
        assert_eq!(resolved(&link), real);
    }
}
