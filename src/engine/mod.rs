//! The life of a branch: made, started, shown, stopped, trashed, destroyed, recovered.
//!
//! ```text
//!              create                 start              delete          7 days, or --now
//!   (nothing) ───────> creating ───> stopped <──> running ────> trash ───────> deleting ───> (nothing)
//!                         │ daemon died            (failed)      │ undelete        │ daemon died
//!                         └──> rolled back                       └─> stopped       └──> finished
//! ```
//!
//! What is durable of this lies in the registry; whether an instance runs is
//! observed and kept in a `instances::Slot` per branch, whose lock admits one
//! operation at a time. A child's slot is locked before its parent's, so locks
//! can't form a circle. The engine knows storage and runtime through their
//! contracts only, and nothing of HTTP, terminals or the wire protocol.

mod commands;
mod create;
mod delete;
mod doctor;
mod error;
mod follow;
mod forget;
mod instances;
mod parent;
mod pools;
mod project;
mod reach;
mod recover;
mod recut;
mod relocate;
mod root;
mod trouble;
mod usage;
mod view;
mod worktrees;

use std::collections::{HashMap, HashSet};
use std::future::Future;
use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use tokio::sync::{OnceCell, watch};
use tokio_util::task::TaskTracker;

pub use create::Created;
pub use delete::{DeletedBranch, TRASH_KEEPS};
pub use doctor::{Check, Level};
pub use error::{EngineError, Kind};
pub use follow::{Followed, Switched, Target, Urge};
pub use instances::{InstanceState, Lease, Served};
pub use pools::{Adopted, BranchesInPool, PoolChange, PoolFile, PoolJob, PoolPlan, PoolStatus};
pub use project::Registered;
use reach::POOL_MARK;
pub use recover::Reconciled;
pub use relocate::{MoveRequest, Moved, MovedBranch};
pub use root::InitRequest;
pub use usage::{PoolView, Sharer, UsageReport, UsageTotal, UsageView};
pub use view::{BranchView, Credentials};

use crate::config::{Machine, Paths, ProjectConfig};
use crate::postgres;
use crate::registry::{BranchRecord, ProjectRecord, Registry, ServerRecord};
use crate::runtime::{Docker, Native, Runtime, Server, server_for};
use crate::storage::StorageDriver;
use crate::types::{BranchId, Owner, Password, ProjectId};

pub(crate) type Result<T, E = EngineError> = std::result::Result<T, E>;

/// Tells whoever asked how work goes on.
#[derive(Clone)]
pub struct Reporter(Arc<dyn Fn(Report) + Send + Sync>);

impl std::fmt::Debug for Reporter {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Reporter")
    }
}

/// One report.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Report {
    /// `done` and `total` in bytes; `total` 0 means unknown.
    Progress { what: String, done: u64, total: u64 },
    /// Something the user should know.
    Notice(String),
}

impl Reporter {
    pub fn new(tell: impl Fn(Report) + Send + Sync + 'static) -> Self {
        Self(Arc::new(tell))
    }

    /// Nobody asked: notices go to the log.
    pub fn log() -> Self {
        Self::new(|report| {
            if let Report::Notice(text) = report {
                tracing::info!("{text}");
            }
        })
    }

    pub fn notice(&self, text: impl Into<String>) {
        (self.0)(Report::Notice(text.into()));
    }

    fn progress(&self, what: &str, done: u64, total: u64) {
        (self.0)(Report::Progress {
            what: what.into(),
            done,
            total,
        });
    }
}

/// An address the proxy listens on.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum EndpointKey {
    /// Follows the HEAD of one worktree, named by its git directory.
    Worktree {
        project: ProjectId,
        git_dir: PathBuf,
    },
    /// Always shows one branch.
    Pinned(BranchId),
}

/// Opens and closes the proxy's listeners. Implemented by the daemon.
pub trait Ports: std::fmt::Debug + Send + Sync {
    /// Listens on a loopback port for an endpoint. One that listens already moves to the new port.
    /// The error says who holds the port.
    fn open(
        &self,
        endpoint: EndpointKey,
        port: u16,
    ) -> Pin<Box<dyn Future<Output = Result<(), String>> + Send + '_>>;

    /// Whether it listens on that port.
    fn listens(&self, endpoint: &EndpointKey, port: u16) -> bool;

    fn close(&self, endpoint: &EndpointKey);
}

/// The use cases. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Engine(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    paths: Paths,
    machine: Mutex<Machine>,
    registry: Registry,
    ports: Arc<dyn Ports>,
    owner: Owner,
    docker: OnceCell<Docker>,
    drivers: Mutex<HashMap<PathBuf, Vec<Arc<dyn StorageDriver>>>>,
    /// Pools that are swept just now.
    sweeping: watch::Sender<HashSet<PathBuf>>,
    slots: Mutex<HashMap<BranchId, Arc<instances::Slot>>>,
    endpoints: Mutex<HashMap<EndpointKey, Arc<follow::Endpoint>>>,
    /// Admits one registration of a project at a time.
    registering: tokio::sync::Mutex<()>,
    /// Admits one change of a project's place at a time.
    moving: Mutex<()>,
    /// Admits one look at what volumes take at a time.
    measuring: tokio::sync::Mutex<()>,
    /// Admits one move of volumes to another pool at a time.
    relocating: Arc<tokio::sync::Mutex<()>>,
    /// Set when the daemon is about to end: nothing is started any more.
    closing: AtomicBool,
    tasks: TaskTracker,
}

impl Engine {
    pub fn new(
        paths: Paths,
        machine: Machine,
        registry: Registry,
        ports: Arc<dyn Ports>,
    ) -> Result<Self> {
        let owner = owner_of_data()?;
        Ok(Self(Arc::new(Inner {
            paths,
            machine: Mutex::new(machine),
            registry,
            ports,
            owner,
            docker: OnceCell::new(),
            drivers: Mutex::default(),
            sweeping: watch::Sender::default(),
            slots: Mutex::default(),
            endpoints: Mutex::default(),
            registering: tokio::sync::Mutex::default(),
            moving: Mutex::default(),
            measuring: tokio::sync::Mutex::default(),
            relocating: Arc::default(),
            closing: AtomicBool::new(false),
            tasks: TaskTracker::new(),
        })))
    }

    /// From here on no instance is started.
    pub fn close(&self) {
        self.0.closing.store(true, Ordering::Relaxed);
    }

    fn is_closing(&self) -> bool {
        self.0.closing.load(Ordering::Relaxed)
    }

    /// Waits until no operation is under way. None may begin any more.
    pub async fn drain(&self) {
        self.0.tasks.close();
        self.0.tasks.wait().await;
    }

    /// Runs an operation to its end even if whoever asked goes away.
    async fn detached<T: Send + 'static>(
        &self,
        operation: impl Future<Output = Result<T>> + Send + 'static,
    ) -> Result<T> {
        self.0
            .tasks
            .spawn(operation)
            .await
            .unwrap_or_else(|e| Err(EngineError::bug(format!("an operation broke off: {e}"))))
    }

    /// The runtime that a branch recorded.
    async fn runtime(&self, record: &ServerRecord) -> Result<(Runtime, Server)> {
        if record.runtime == "docker" {
            let docker = self.docker().await?;
            Ok((
                Runtime::Docker(docker),
                Server::Docker {
                    image: record.programs.clone(),
                },
            ))
        } else {
            let mut bin_dir = PathBuf::from(&record.programs);
            if !bin_dir.join("postgres").exists() {
                // The package was moved or reinstalled elsewhere; the major version is what binds the data.
                let found = server_for(Some(record.major))?;
                if let (Server::Native { bin_dir: elsewhere }, _) = found {
                    bin_dir = elsewhere;
                }
            }
            Ok((Runtime::Native(Native), Server::Native { bin_dir }))
        }
    }

    async fn docker(&self) -> Result<Docker> {
        Ok(self
            .0
            .docker
            .get_or_try_init(Docker::connect)
            .await?
            .clone())
    }

    /// The owner to give files to; none where this process can't give any away.
    fn give_to(&self) -> Option<Owner> {
        nix::unistd::geteuid().is_root().then_some(self.0.owner)
    }

    /// The machine's settings as they are now.
    fn machine(&self) -> Machine {
        lock(&self.0.machine).clone()
    }

    /// Reads the machine's settings anew: from here on they hold for what is made.
    fn reload_machine(&self) -> Result<Machine> {
        let machine = Machine::load(&self.0.paths)?;
        *lock(&self.0.machine) = machine.clone();
        Ok(machine)
    }

    /// Where a branch's data lies, if its pool is there. The pool need not be in order: a server that
    /// runs is found on a full or read-only one too.
    async fn data_dir(&self, branch: &BranchRecord) -> Result<PathBuf> {
        self.branch_is_there(branch).await?;
        Ok(data_dir(&volume_path(branch)))
    }

    fn config(project: &ProjectRecord) -> Result<ProjectConfig> {
        Ok(ProjectConfig::parse(
            &project.config,
            "the recorded configuration",
        )?)
    }

    /// The password of a project's administrator or of its role, made at first need.
    fn password(&self, project: &ProjectId, of: Secret) -> Result<Password> {
        let dir = self.0.paths.secrets_dir();
        let file = dir.join(format!("{project}.{}", of.file_extension()));
        match std::fs::read_to_string(&file) {
            Ok(text) => Ok(Password::new(text.trim_end())),
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => {
                let password = Password::random();
                crate::fsx::write_atomic(&file, password.reveal().as_bytes(), 0o600, None)
                    .map_err(|e| EngineError::io("write", &file, &e))?;
                Ok(password)
            }
            Err(e) => Err(EngineError::io("read", &file, &e)),
        }
    }
}

/// Name of the superuser that the daemon itself logs in as.
pub(crate) const ADMIN: &str = "dbranch_admin";

#[derive(Debug, Clone, Copy)]
enum Secret {
    Admin,
    Role,
}

impl Secret {
    fn file_extension(self) -> &'static str {
        match self {
            Self::Admin => "admin",
            Self::Role => "role",
        }
    }
}

/// The folder of a branch's volume, whether it is there or not.
fn volume_path(branch: &BranchRecord) -> PathBuf {
    branch.pool.join(branch.volume.as_str())
}

/// Where the data directory lies in a volume.
fn data_dir(volume: &Path) -> PathBuf {
    volume.join(postgres::DATA_FOLDER)
}

/// Who owns data directories: the user, or for root, as whom postgres refuses to run, the system's `postgres`.
fn owner_of_data() -> Result<Owner> {
    let uid = nix::unistd::geteuid();
    if !uid.is_root() {
        return Ok(Owner {
            uid: uid.as_raw(),
            gid: nix::unistd::getegid().as_raw(),
        });
    }
    match nix::unistd::User::from_name("postgres") {
        Ok(Some(user)) => Ok(Owner {
            uid: user.uid.as_raw(),
            gid: user.gid.as_raw(),
        }),
        // What the official images use.
        Ok(None) => Ok(Owner { uid: 999, gid: 999 }),
        Err(e) => Err(EngineError::refused(format!(
            "can't look up the user postgres: {e}"
        ))),
    }
}

/// Runs what blocks outside the runtime's threads.
async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T> + Send + 'static,
) -> Result<T> {
    tokio::task::spawn_blocking(work)
        .await
        .unwrap_or_else(|e| Err(EngineError::bug(format!("an operation broke off: {e}"))))
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// For tests of recovery: the daemon dies at the step that `DBRANCH_TEST_CRASH_AT` names.
fn crash_point(step: &str) {
    if cfg!(debug_assertions)
        && std::env::var_os("DBRANCH_TEST_CRASH_AT").is_some_and(|at| at == step)
    {
        tracing::warn!(step, "dying as told");
        std::process::abort();
    }
}

/// A channel that shows which branch an endpoint leads to.
pub type Active = watch::Receiver<Option<BranchId>>;
