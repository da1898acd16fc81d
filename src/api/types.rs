//! The contract between the daemon and its clients.
//!
//! A request is `POST /v1/<op>` with the request's other fields as a JSON body.
//! The answer is a stream of JSON lines, each one [`Message`]; the last one is
//! `done` or `failed`. Shapes only grow.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::types::{BranchId, BranchName, ProjectId};

/// Where the client stands: which project, and which worktree of it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct At {
    /// The common git directory, canonical.
    pub common_dir: PathBuf,
    /// The git directory of the worktree the client stands in.
    pub git_dir: PathBuf,
    /// The top of that worktree.
    pub worktree: Option<PathBuf>,
}

/// One thing asked of the daemon.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "op", rename_all = "kebab-case")]
pub enum Request {
    /// Answer: [`DaemonInfo`].
    Ping,
    /// Answer: [`Stopped`]. The daemon ends after it has answered.
    Shutdown { stop_branches: bool },
    /// Makes the repository a project, or renews what is known of it. The config file lies
    /// in the worktree already. Answer: [`ProjectInfo`].
    Register { at: At },
    /// Answer: array of [`ProjectInfo`].
    Projects,
    /// Makes the first branch. Answer: [`Created`].
    InitPostgres {
        at: At,
        /// Default: the git branch that is checked out.
        branch: Option<BranchName>,
        /// `auto`, or a driver's name. Default: the machine's settings.
        storage: Option<String>,
        /// `auto`, `docker` or `native`. Default: the machine's settings.
        runtime: Option<String>,
        pool: Option<PathBuf>,
    },
    /// Answer: [`Created`].
    Create {
        at: At,
        name: BranchName,
        from: Option<BranchName>,
    },
    /// Turns the worktree's endpoint to a branch. Answer: [`Switched`].
    Use { at: At, to: UseTarget },
    /// Answer: array of [`BranchInfo`]; with `trash` those in the trash.
    List { at: At, trash: bool },
    /// Answer: [`BranchDetails`].
    Show { at: At, name: BranchName },
    /// Answer: [`StatusInfo`].
    Status { at: At },
    /// Answer: [`UsageInfo`].
    Usage { at: At },
    /// Moves a branch to the trash, or destroys it. Answer: [`Deleted`].
    Delete {
        at: At,
        name: BranchName,
        now: bool,
        force: bool,
    },
    /// Answer: [`BranchInfo`].
    Undelete {
        at: At,
        name: BranchName,
        /// Another name, where its own is in use again.
        #[serde(default)]
        rename_to: Option<BranchName>,
    },
    /// Forgets a project and moves its branches to the trash, or destroys them. Answer: [`ProjectDeleted`].
    DeleteProject { at: At, now: bool },
    /// Moves all branches of a project to another pool or driver. Answer: [`StorageMoved`].
    StorageMove {
        at: At,
        /// Default: the machine's settings.
        pool: Option<PathBuf>,
        /// `auto`, or a driver's name. Default: the machine's settings.
        driver: Option<String>,
        dry_run: bool,
    },
    /// Drops the record of a branch whose pool is lost. Answer: [`Forgotten`].
    Forget { at: At, name: BranchName },
    /// Stops instances; none named: the active branch's. Answer: array of [`BranchInfo`].
    Stop {
        at: At,
        name: Option<BranchName>,
        all: bool,
    },
    /// Starts an instance and waits until it answers. Answer: [`BranchInfo`].
    Resume { at: At, name: Option<BranchName> },
    /// Reconciles with git, storage and runtime. Answer: [`Synced`].
    Sync { at: At, dry_run: bool },
    /// Answer: [`UrlInfo`].
    Url { at: At, name: Option<BranchName> },
    /// Answer: [`LogInfo`].
    Logs { at: At, name: Option<BranchName> },
    /// Lets the config's commands run, if they still have this digest: what the user was shown
    /// is what is allowed. Answer: [`Allowed`].
    Allow { at: At, digest: String },
    /// From a git hook: HEAD of the worktree may have moved. Answer: [`HookOutcome`].
    Hook { at: At },
    /// Answer: array of [`Finding`].
    Doctor { at: Option<At> },
    /// What is still to be done to a set-up pool; changes nothing. Answer: [`PoolPlan`].
    PoolPlan { job: PoolJob, at: Option<At> },
    /// Runs as root, by a container, the next group of the job's plan, if that still is `script`.
    /// Answer: what it said, a string.
    PoolRun {
        job: PoolJob,
        script: String,
        at: Option<At>,
    },
    /// New projects use this set-up pool from now on. Answer: [`PoolAdopted`].
    PoolAdopt { path: PathBuf },
    /// New projects use it no more. Answer: whether they did.
    PoolForget { path: PathBuf },
    /// Answer: array of [`PoolInfo`].
    Pools {
        #[serde(default)]
        unit_dir: Option<PathBuf>,
        #[serde(default)]
        fstab: Option<PathBuf>,
    },
}

impl Request {
    /// Whether asking twice does no more than asking once, so that a request that met a dying
    /// daemon may be put to the next one.
    pub fn is_repeatable(&self) -> bool {
        match self {
            Self::Ping
            | Self::Register { .. }
            | Self::Projects
            | Self::List { .. }
            | Self::Show { .. }
            | Self::Status { .. }
            | Self::Usage { .. }
            | Self::Stop { .. }
            | Self::Resume { .. }
            | Self::Sync { .. }
            | Self::Url { .. }
            | Self::Logs { .. }
            | Self::Allow { .. }
            | Self::Hook { .. }
            | Self::Doctor { .. }
            | Self::PoolPlan { .. }
            | Self::PoolAdopt { .. }
            | Self::PoolForget { .. }
            | Self::Pools { .. } => true,
            // The second `-` would go back.
            Self::Use { to, .. } => *to != UseTarget::Previous,
            Self::Shutdown { .. }
            | Self::InitPostgres { .. }
            | Self::Create { .. }
            | Self::Delete { .. }
            | Self::Undelete { .. }
            | Self::StorageMove { .. }
            | Self::Forget { .. }
            | Self::DeleteProject { .. }
            | Self::PoolRun { .. } => false,
        }
    }
}

/// What is to become of a pool that dbranch sets up itself.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PoolJob {
    /// The mount point. Default: the pool of the settings where it is such a one, else the usual
    /// place.
    pub path: Option<PathBuf>,
    pub change: PoolChange,
    /// Do it although the room is not there, or although it is not needed.
    pub force: bool,
    /// Where systemd's units lie, or fstab, if not where this machine has them.
    #[serde(default)]
    pub unit_dir: Option<PathBuf>,
    #[serde(default)]
    pub fstab: Option<PathBuf>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum PoolChange {
    SetUp {
        size_bytes: Option<u64>,
        /// `btrfs` or `xfs`.
        file_system: Option<String>,
    },
    Grow {
        size_bytes: u64,
    },
    Remove,
}

/// What `use` turns to.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum UseTarget {
    Branch(BranchName),
    /// The branch that was active before, `-`.
    Previous,
    /// Whatever git's HEAD says.
    Head,
}

/// One line of an answer.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Message {
    /// Work in bytes; `total` 0 means unknown.
    Progress {
        what: String,
        done: u64,
        total: u64,
    },
    /// Something the user should know: "full copy of 1.2 GiB; a pool on btrfs makes this instant".
    Notice(String),
    Done(serde_json::Value),
    Failed(Failure),
}

/// Why a request was not done.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Failure {
    pub kind: FailureKind,
    /// What happened and why, lower case, no period.
    pub message: String,
    /// The next thing to do.
    pub hint: Option<String>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum FailureKind {
    /// The state forbids it, or it went wrong. Exit status 1.
    Refused,
    /// The config file or a setting. Exit status 2.
    Config,
    /// A bug. Exit status 70.
    Bug,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DaemonInfo {
    pub pid: u32,
    pub version: String,
    /// Where the daemon writes its log when detached.
    pub log_file: PathBuf,
    pub projects: usize,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Stopped {
    pub instances_stopped: usize,
    pub instances_left: usize,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProjectInfo {
    pub id: ProjectId,
    pub name: String,
    pub common_dir: PathBuf,
    pub proxy_port: u16,
    pub branches: usize,
    /// The project was known under another path and has moved here.
    pub moved_from: Option<PathBuf>,
    /// Whether this very call registered it.
    pub new: bool,
}

/// The state scripts see.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum BranchState {
    /// Being made, or starting for the first time.
    Creating,
    Running,
    Stopped,
    /// Its instance ended by itself or can't be started; `show` tells why.
    Failed,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct BranchInfo {
    pub id: BranchId,
    pub name: BranchName,
    pub parent: Option<BranchName>,
    pub state: BranchState,
    /// Whether the endpoint of the asking worktree shows it.
    pub active: bool,
    /// Its own port, served by the proxy.
    pub port: u16,
    /// RFC 3339, UTC.
    pub created_at: String,
    /// RFC 3339, UTC; when it was moved to the trash.
    pub trashed_at: Option<String>,
    /// RFC 3339, UTC; when the trash will destroy it.
    pub expires_at: Option<String>,
    /// Why it failed, when it did.
    #[serde(default)]
    pub failure: Option<String>,
    /// What to do about that.
    #[serde(default)]
    pub failure_hint: Option<String>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct BranchDetails {
    #[serde(flatten)]
    pub info: BranchInfo,
    /// The storage driver's name.
    pub storage: String,
    pub runtime: String,
    /// To the branch's own port, whatever is active.
    pub url: String,
    pub volume: PathBuf,
    pub backend: Backend,
    pub postgres_version: u32,
    pub log_file: PathBuf,
    pub children: Vec<BranchName>,
    /// Client sessions right now.
    pub sessions: usize,
    pub logical_bytes: Option<u64>,
    pub exclusive_bytes: Option<u64>,
}

/// Where the instance itself listens (or would, when stopped).
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum Backend {
    Unix { unix: PathBuf, port: u16 },
    Tcp { tcp: String, port: u16 },
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Created {
    pub branch: BranchInfo,
    /// How the data got there: "btrfs snapshot", "full copy of 1.2 GiB", "initdb".
    pub method: String,
    pub storage: String,
    pub runtime: String,
    pub postgres_version: u32,
    /// Until the branch was there, without its first start.
    pub duration_ms: f64,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Switched {
    pub branch: BranchName,
    pub previous: Option<BranchName>,
    /// False when it was the active one already.
    pub changed: bool,
    pub duration_ms: f64,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct StatusInfo {
    pub project: String,
    /// What the endpoint shows; none before `init-postgres`.
    pub branch: Option<BranchName>,
    /// What git has checked out here; none when detached.
    pub git_branch: Option<String>,
    /// Where this worktree's connections go.
    pub proxy_port: u16,
    /// The linked worktree that was asked from; none in the main one.
    #[serde(default)]
    pub worktree: Option<PathBuf>,
    pub daemon: DaemonRef,
    pub state: Option<BranchState>,
    pub branches: usize,
    pub running: usize,
    pub sessions: usize,
    pub storage: Option<String>,
    pub runtime: Option<String>,
    /// Things worth knowing: "HEAD is detached: the database stays on `main`".
    pub notes: Vec<String>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DaemonRef {
    pub pid: u32,
    pub version: String,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct UsageInfo {
    pub branches: Vec<BranchUsage>,
    pub total: UsageTotal,
    pub trash: TrashUsage,
    pub pool: PoolUsage,
    /// What keeps the numbers from being exact.
    pub notes: Vec<String>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct BranchUsage {
    pub name: BranchName,
    /// All files of the branch, shared or not.
    pub logical_bytes: u64,
    /// Data that only this branch has.
    pub exclusive_bytes: u64,
    /// What others hold too, on disk.
    pub shared_bytes: u64,
    /// What destroying it would free: more than `exclusive_bytes` where the file system keeps all
    /// of an extent while a part of it is used.
    pub freed_by_delete_bytes: u64,
    /// The most first. Null where the file system doesn't tell.
    pub shared_with: Option<Vec<SharedWith>>,
    /// How many more there are than `shared_with` lists.
    pub shared_with_more: usize,
    /// In the trash.
    pub trashed: bool,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SharedWith {
    pub name: String,
    pub kind: SharerKind,
    /// On disk.
    pub bytes: u64,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum SharerKind {
    Branch,
    /// A branch in the trash.
    Trash,
    /// No branch of this project.
    Other,
}

/// All branches together, those in the trash too. Null where the file system doesn't tell.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct UsageTotal {
    /// What they would take if they shared nothing.
    pub logical_bytes: u64,
    pub exclusive_bytes: u64,
    /// What at least two hold, counted once.
    pub shared_bytes: Option<u64>,
    /// What destroying all of them would free.
    pub freed_by_delete_bytes: Option<u64>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct TrashUsage {
    pub branches: usize,
    /// What destroying all of them would free. Null where the file system doesn't tell.
    pub freed_by_delete_bytes: Option<u64>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PoolUsage {
    pub driver: String,
    pub path: PathBuf,
    pub total_bytes: u64,
    pub free_bytes: u64,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Deleted {
    pub name: BranchName,
    /// False when it lies in the trash.
    pub destroyed: bool,
    /// RFC 3339, UTC.
    pub expires_at: Option<String>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProjectDeleted {
    pub name: String,
    pub branches: Vec<BranchName>,
    pub destroyed: bool,
}

/// What `storage move` did, or with `dry_run` would do.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct StorageMoved {
    pub pool: PathBuf,
    /// The storage driver's name.
    pub driver: String,
    /// In order. Those that are there already are not among them.
    pub branches: Vec<MovedBranch>,
    /// Those that can't be reached, and why.
    pub left: Vec<LeftBranch>,
    /// Room that the move is likely to take, and what was free before it.
    pub needed_bytes: u64,
    pub free_bytes: u64,
    pub dry_run: bool,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct MovedBranch {
    pub id: BranchId,
    pub name: BranchName,
    /// In the trash.
    pub trashed: bool,
    pub from_pool: PathBuf,
    pub from_driver: String,
    /// All files of the branch, shared or not.
    pub logical_bytes: u64,
    /// What had to be written, or is likely to.
    pub written_bytes: u64,
    /// The branch whose blocks it shares in its new place.
    pub shares_with: Option<BranchName>,
    /// How long its server stood still; none if it didn't run.
    pub stood_still_ms: Option<f64>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct LeftBranch {
    pub name: BranchName,
    pub why: String,
}

/// A branch whose record was dropped.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Forgotten {
    pub name: BranchName,
    /// Where its data was.
    pub volume: PathBuf,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Synced {
    /// What was done, or with `dry_run` would be: "create branch `x` from `main`".
    pub actions: Vec<String>,
    /// What was found and left alone.
    pub notes: Vec<String>,
    pub dry_run: bool,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct UrlInfo {
    /// With password: `postgresql://user:password@127.0.0.1:port/database`.
    pub url: String,
    pub host: String,
    pub port: u16,
    pub user: String,
    pub password: String,
    pub database: String,
    pub branch: Option<BranchName>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct LogInfo {
    pub branch: BranchName,
    pub log_file: PathBuf,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Allowed {
    pub after_create: Vec<String>,
    pub after_switch: Vec<String>,
}

/// What became of a hook's report.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct HookOutcome {
    pub created: Option<Created>,
    pub switched: Option<Switched>,
    /// For the user, when there is something to say: why nothing was done.
    pub notes: Vec<String>,
}

/// One thing `doctor` looked at.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Finding {
    pub what: String,
    pub level: Level,
    pub detail: String,
    /// The command or setting that mends it.
    pub fix: Option<String>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Level {
    Ok,
    Warning,
    Problem,
}

/// What is still to be done to a set-up pool.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PoolPlan {
    pub path: PathBuf,
    /// The file that holds its file system.
    pub image: PathBuf,
    pub file_system: Option<String>,
    /// What the file has or will have.
    pub size_bytes: u64,
    /// Free on the disk that the file lies on.
    pub host_free_bytes: u64,
    /// In this order; none when all is done.
    pub groups: Vec<PoolScript>,
    /// Things worth knowing before it is done.
    pub notes: Vec<String>,
    /// Why there is no need for it.
    pub not_needed: Option<String>,
    /// Whether new projects use it already.
    pub is_in_use: bool,
    /// The image whose container could run what needs root.
    pub container_image: Option<String>,
}

/// Commands for sh(1).
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PoolScript {
    pub as_root: bool,
    pub script: String,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PoolAdopted {
    pub path: PathBuf,
    pub driver: String,
    /// False when new projects used it already.
    pub is_new: bool,
    pub settings_file: PathBuf,
    /// A variable that says otherwise to the daemon.
    pub overridden_by: Option<String>,
    /// Projects with branches elsewhere, which stay there.
    pub projects_elsewhere: Vec<String>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PoolInfo {
    pub path: PathBuf,
    /// The storage drivers of its branches, or of those to be made there.
    pub driver: Option<String>,
    pub file_system: Option<String>,
    pub mount_options: Option<String>,
    pub total_bytes: Option<u64>,
    pub free_bytes: Option<u64>,
    /// The file it lies in, where `dbranch storage setup` made it.
    pub image: Option<PoolImage>,
    /// The file that has it mounted when the machine starts.
    pub mounted_by: Option<PathBuf>,
    pub for_new_projects: bool,
    pub branches: Vec<PoolBranches>,
    pub problem: Option<String>,
    /// The command that mends the problem.
    pub fix: Option<String>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PoolImage {
    pub path: PathBuf,
    pub size_bytes: u64,
    /// What it takes on the disk below.
    pub allocated_bytes: u64,
    /// Free on that disk.
    pub host_free_bytes: Option<u64>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PoolBranches {
    pub project: String,
    pub branches: usize,
    /// More, in the trash.
    pub trashed: usize,
}
