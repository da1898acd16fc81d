//! What is recorded: projects, branches, endpoints. SQLite, written by the daemon only.
//!
//! Holds nothing that can be observed instead: whether an instance runs, what
//! HEAD is, how large a volume is. A change of several steps is recorded here
//! before it begins (`creating`, `deleting`, a move), so that the next start of the
//! daemon can finish it or undo it.

mod migrations;
mod store;

use std::path::{Path, PathBuf};
use std::time::SystemTime;

pub use store::{Durability, Registry, RegistryError};

use crate::types::{BranchId, BranchName, ProjectId, VolumeId};

/// A project as recorded.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ProjectRecord {
    pub id: ProjectId,
    pub name: String,
    /// The common git directory, canonical.
    pub common_dir: PathBuf,
    /// The config file's text when it was last read without error.
    pub config: String,
    /// The port in use; another than the config's where that one was taken by another project.
    pub proxy_port: u16,
    /// Digest of the config's commands that the user allowed.
    pub allowed_commands: Option<String>,
    pub created_at: SystemTime,
    /// Set by `delete-project`, until the last branch has left the trash.
    pub deleted_at: Option<SystemTime>,
}

/// What a branch's instance runs on, as its parent's did. It is never changed silently: another C
/// library sorts text differently and would break indexes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ServerRecord {
    /// The runtime's name.
    pub runtime: String,
    /// The image, or the folder of the server programs.
    pub programs: String,
    /// PostgreSQL's major version.
    pub major: u32,
}

/// How far a branch's life has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stage {
    /// Being made. Rolled back if the daemon dies: nobody has seen it yet.
    Creating,
    Ready,
    /// Being destroyed on the user's word. Finished if the daemon dies.
    Deleting,
}

/// A branch as recorded.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BranchRecord {
    pub id: BranchId,
    pub project: ProjectId,
    pub name: BranchName,
    /// None for a root, and once the parent was destroyed.
    pub parent: Option<BranchId>,
    pub stage: Stage,
    pub volume: VolumeId,
    /// The storage driver's name.
    pub driver: String,
    pub pool: PathBuf,
    pub server: ServerRecord,
    /// Its own port, served by the proxy.
    pub port: u16,
    /// Whether an instance of it ever was ready.
    pub started_once: bool,
    pub created_at: SystemTime,
    pub trashed_at: Option<SystemTime>,
}

impl BranchRecord {
    /// Where the branch's data lies.
    pub fn place(&self) -> Place {
        Place {
            volume: self.volume.clone(),
            driver: self.driver.clone(),
            pool: self.pool.clone(),
        }
    }

    /// Whether the branch's volume is one of that pool and driver.
    pub fn lies_in(&self, pool: &Path, driver: &str) -> bool {
        self.pool == pool && self.driver == driver
    }
}

/// Where a volume lies.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Place {
    pub volume: VolumeId,
    /// The storage driver's name.
    pub driver: String,
    pub pool: PathBuf,
}

/// A branch that is being moved. Its own record says where its data is at this moment;
/// this one names the other volume, which is to be removed: the new one until all of
/// it is there, from then on the old one.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MoveRecord {
    pub branch: BranchId,
    pub remove: Place,
}

/// An endpoint that follows a worktree's HEAD, as recorded.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EndpointRecord {
    pub project: ProjectId,
    /// The git directory of the worktree it follows.
    pub git_dir: PathBuf,
    pub branch: Option<BranchId>,
    pub previous: Option<BranchId>,
    /// The HEAD that was last acted on, so that the same HEAD is not acted on twice.
    pub head: Option<String>,
    /// Where a linked worktree's endpoint listens; the main worktree's has the project's own port.
    /// Given by [`Registry::endpoint_port`] and kept by whatever else is recorded.
    pub port: Option<u16>,
}
