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
mod project;
mod recover;
mod relocate;
mod root;
mod usage;
mod view;
mod worktrees;

use std::collections::HashMap;
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
pub use project::Registered;
pub use recover::Reconciled;
pub use relocate::{MoveRequest, Moved, MovedBranch};
pub use root::InitRequest;
pub use usage::{PoolView, Sharer, UsageReport, UsageTotal, UsageView};
pub use view::{BranchView, Credentials};

use crate::config::{Machine, Paths, ProjectConfig};
use crate::postgres;
use crate::registry::{BranchRecord, Place, ProjectRecord, Registry, ServerRecord};
use crate::runtime::{Docker, Native, Runtime, Server, server_for};
use crate::storage::{self, StorageDriver};
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
    machine: Machine,
    registry: Registry,
    ports: Arc<dyn Ports>,
    owner: Owner,
    docker: OnceCell<Docker>,
    drivers: Mutex<HashMap<PathBuf, Vec<Arc<dyn StorageDriver>>>>,
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
            machine,
            registry,
            ports,
            owner,
            docker: OnceCell::new(),
            drivers: Mutex::default(),
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

    /// The driver of a branch's volume.
    async fn driver(&self, branch: &BranchRecord) -> Result<Arc<dyn StorageDriver>> {
        let place = branch.place();
        if !is_pool_there(&place) {
            let kind = kind_of(&place)?;
            return Err(EngineError::refused(format!(
                "the pool {} of branch `{}` is not there",
                place.pool.display(),
                branch.name
            ))
            .hint(format!(
                "{}, then dbranch sync; if that disk is lost for good: dbranch forget {}",
                kind.how_to_mount(),
                branch.name
            )));
        }
        self.driver_at(&place).await
    }

    /// The driver of a volume, whoever's it is.
    async fn driver_at(&self, place: &Place) -> Result<Arc<dyn StorageDriver>> {
        let kind = kind_of(place)?;
        if !is_pool_there(place) {
            return Err(EngineError::refused(format!(
                "the pool {} is not there",
                place.pool.display()
            ))
            .hint(format!("{}, then dbranch sync", kind.how_to_mount())));
        }
        self.open_pool(storage::Choice::Driver(kind), &place.pool)
            .await
    }

    /// Marks a folder as a pool in use, and tells people whose it is.
    fn mark_pool(&self, pool: &Path) -> Result<()> {
        let file = pool.join(POOL_MARK);
        if file.exists() {
            return Ok(());
        }
        let text = format!(
            "These folders are databases of dbranch. What they are is recorded in {}; `dbranch list` shows it.\n",
            self.0.paths.state_dir().display()
        );
        crate::fsx::write_atomic(&file, text.as_bytes(), 0o644, None)
            .map_err(|e| EngineError::io("write", &file, &e))
    }

    async fn open_pool(
        &self,
        choice: storage::Choice,
        pool: &Path,
    ) -> Result<Arc<dyn StorageDriver>> {
        let known = |drivers: &Vec<Arc<dyn StorageDriver>>| {
            drivers
                .iter()
                .find(|d| matches!(choice, storage::Choice::Driver(k) if k == d.kind()))
                .cloned()
        };
        if let Some(driver) = lock(&self.0.drivers).get(pool).and_then(known) {
            return Ok(driver);
        }
        let (path, owner) = (pool.to_owned(), self.0.owner);
        let driver = blocking(move || Ok(storage::open(choice, &path, owner)?)).await?;
        let mut drivers = lock(&self.0.drivers);
        let of_pool = drivers.entry(pool.to_owned()).or_default();
        if !of_pool.iter().any(|d| d.kind() == driver.kind()) {
            of_pool.push(driver.clone());
        }
        Ok(driver)
    }

    /// The owner to give files to; none where this process can't give any away.
    fn give_to(&self) -> Option<Owner> {
        nix::unistd::geteuid().is_root().then_some(self.0.owner)
    }

    /// The pool for new projects.
    fn pool(&self) -> PathBuf {
        self.0
            .machine
            .pool
            .value
            .clone()
            .unwrap_or_else(|| self.0.paths.default_pool().to_owned())
    }

    async fn data_dir(&self, branch: &BranchRecord) -> Result<PathBuf> {
        Ok(data_dir(
            &self.driver(branch).await?.volume_path(&branch.volume),
        ))
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

/// The driver that a record names.
fn kind_of(place: &Place) -> Result<storage::DriverKind> {
    place
        .driver
        .parse()
        .map_err(|e: crate::types::Invalid| EngineError::bug(e.to_string()))
}

/// Where a pool's file system is not mounted, an empty folder may stand in its place, and a
/// driver would take every volume for gone.
fn is_pool_there(place: &Place) -> bool {
    place.pool.join(POOL_MARK).exists() || place.pool.join(place.volume.as_str()).exists()
}

/// The file that tells a pool from the empty folder it is mounted on.
const POOL_MARK: &str = ".dbranch";

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
