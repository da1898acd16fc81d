//! Starts, finds and stops instances: the postgres that serves a branch.
//!
//! Docker and native processes keep one contract. This room touches nothing of
//! a volume beyond the paths it is given, and keeps no record: whether an
//! instance runs is always observed.

mod choose;
#[cfg(test)]
mod contract;
pub mod discover;
mod docker;
mod native;
mod prepare;
mod process;

use std::collections::HashSet;
use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;
use std::time::Duration;

use tokio::sync::watch;

use crate::types::{BackendAddress, BranchId, BranchName, Invalid, Owner, ProjectId};

pub use choose::{Choice, DEFAULT_MAJOR, choose};
pub use discover::{Installed, server_for};
pub use docker::{Connect, Docker, PullProgress};
pub use native::Native;

/// Which runtime. The names are those of the settings and of `--json` output.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum RuntimeKind {
    Docker,
    Native,
}

impl RuntimeKind {
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Docker => "docker",
            Self::Native => "native",
        }
    }
}

impl fmt::Display for RuntimeKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl FromStr for RuntimeKind {
    type Err = Invalid;
    fn from_str(s: &str) -> Result<Self, Invalid> {
        match s {
            "docker" => Ok(Self::Docker),
            "native" => Ok(Self::Native),
            _ => Err(Invalid(format!(
                "`{s}` is no runtime; there are docker and native"
            ))),
        }
    }
}

/// The server programs of an instance.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Server {
    /// The folder that holds `postgres` and `initdb`.
    Native { bin_dir: PathBuf },
    /// An official-style image.
    Docker { image: String },
}

/// What one instance may use; nothing means no limit.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Limits {
    pub memory_bytes: Option<u64>,
    pub cpus: Option<f64>,
}

/// One instance to be run.
#[derive(Debug, Clone)]
pub struct InstanceSpec {
    pub project: ProjectId,
    pub project_name: String,
    pub branch: BranchId,
    pub branch_name: BranchName,
    pub server: Server,
    pub data_dir: PathBuf,
    /// Made by the runtime when it is missing; holds `.s.PGSQL.5432`.
    pub socket_dir: PathBuf,
    /// Where the server's output goes, appended.
    pub log_file: PathBuf,
    pub owner: Owner,
    pub limits: Limits,
}

/// A data directory to be made by `initdb`.
#[derive(Debug, Clone)]
pub struct InitSpec {
    pub server: Server,
    /// Exists and is empty.
    pub data_dir: PathBuf,
    pub owner: Owner,
    pub superuser: String,
    /// Mode 0600, readable by the owner; holds the superuser's password.
    pub password_file: PathBuf,
    /// A locale name such as `C.UTF-8`.
    pub locale: String,
}

/// How to end an instance (PostgreSQL manual, section 19.5).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum StopMode {
    /// Roll back what is open, write a checkpoint.
    Fast,
    /// Stop at once; the next start recovers.
    Immediate,
}

/// Why an instance ended, for messages: "exit status 1", "killed by signal 9".
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Exit {
    pub clean: bool,
    pub reason: String,
}

/// A running (or starting) instance.
#[derive(Debug, Clone)]
pub struct Instance {
    pub address: BackendAddress,
    pub handle: Handle,
    /// Becomes `Some` once, when the instance has ended for whatever reason.
    pub exit: watch::Receiver<Option<Exit>>,
}

/// What the runtime knows an instance by.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Handle {
    Container { id: String },
    Process { pid: u32 },
}

#[derive(Debug, thiserror::Error)]
pub enum RuntimeError {
    /// No runtime of that kind here. Under `auto` the next one is tried.
    #[error("{0}")]
    Unavailable(String),
    /// No server programs or image of the version asked for; says what was found.
    #[error("{message}")]
    NoServer { message: String, hint: String },
    #[error("{action}: {detail}")]
    Failed { action: String, detail: String },
}

impl RuntimeError {
    fn failed(action: impl Into<String>, detail: impl fmt::Display) -> Self {
        Self::Failed {
            action: action.into(),
            detail: detail.to_string(),
        }
    }

    /// What to do next, where this error knows.
    pub fn hint(&self) -> Option<&str> {
        match self {
            Self::NoServer { hint, .. } => Some(hint),
            Self::Unavailable(_) | Self::Failed { .. } => None,
        }
    }
}

/// Time an instance gets to stop by itself before it is killed.
pub const STOP_GRACE: Duration = Duration::from_secs(30);

/// Runs instances, in one of two ways with one contract.
///
/// Cheap to clone. Every call is idempotent: one that already took effect
/// succeeds. Dropping a call's future half-way leaves at most an instance that
/// [`Runtime::find`] finds or cleans up.
#[derive(Debug, Clone)]
pub enum Runtime {
    Docker(Docker),
    Native(Native),
}

impl Runtime {
    pub fn kind(&self) -> RuntimeKind {
        match self {
            Self::Docker(_) => RuntimeKind::Docker,
            Self::Native(_) => RuntimeKind::Native,
        }
    }

    /// Whether servers must accept TCP, because no Unix socket reaches them.
    pub fn needs_tcp(&self) -> bool {
        match self {
            Self::Docker(docker) => docker.connect == Connect::Tcp,
            Self::Native(_) => false,
        }
    }

    /// Makes a database cluster: UTF-8, checksums, SCRAM for every connection.
    /// It survives a power cut once this returns, as initdb syncs what it wrote.
    pub async fn init_cluster(&self, spec: &InitSpec) -> Result<(), RuntimeError> {
        match self {
            Self::Docker(docker) => docker.init_cluster(spec).await,
            Self::Native(native) => native.init_cluster(spec).await,
        }
    }

    /// Launches the server and returns; it accepts connections some time later
    /// (`postmaster.pid` tells). One that runs already is returned as it is. A
    /// server that fails at once shows by [`Instance::exit`], and says why in
    /// [`Runtime::log_tail`].
    pub async fn start(&self, spec: &InstanceSpec) -> Result<Instance, RuntimeError> {
        match self {
            Self::Docker(docker) => docker.start(spec).await,
            Self::Native(native) => native.start(spec).await,
        }
    }

    /// Finds the instance when it runs, whoever started it, and watches it.
    pub async fn find(&self, spec: &InstanceSpec) -> Result<Option<Instance>, RuntimeError> {
        match self {
            Self::Docker(docker) => docker.find(spec).await,
            Self::Native(native) => native.find(spec).await,
        }
    }

    /// The branches of a project that may run, by one question for all of them. None where to
    /// [`Runtime::find`] each costs next to nothing.
    pub async fn may_run(
        &self,
        project: &ProjectId,
    ) -> Result<Option<HashSet<BranchId>>, RuntimeError> {
        match self {
            Self::Docker(docker) => docker.may_run(project).await.map(Some),
            Self::Native(_) => Ok(None),
        }
    }

    /// Ends the instance and returns when nothing of it uses the data directory
    /// any more; by force when it does not end within [`STOP_GRACE`].
    pub async fn stop(
        &self,
        spec: &InstanceSpec,
        instance: &Instance,
        mode: StopMode,
    ) -> Result<(), RuntimeError> {
        match (self, &instance.handle) {
            (Self::Docker(docker), Handle::Container { id }) => {
                docker.stop(spec, id, &instance.exit, mode).await
            }
            (Self::Native(native), Handle::Process { pid }) => {
                native.stop(spec, *pid, &instance.exit, mode).await
            }
            (runtime, handle) => Err(RuntimeError::failed(
                format!("stop `{}`", spec.branch_name),
                format!(
                    "{handle:?} is no instance of the {} runtime",
                    runtime.kind()
                ),
            )),
        }
    }

    /// The last lines of the server's output, "" when there are none.
    pub async fn log_tail(&self, spec: &InstanceSpec, lines: usize) -> String {
        let log = spec.log_file.clone();
        blocking(move || Ok(prepare::tail(&log, lines)))
            .await
            .unwrap_or_default()
    }

    /// How long the server's log is now, in bytes: where what it says next begins.
    pub async fn log_end(&self, spec: &InstanceSpec) -> u64 {
        let log = spec.log_file.clone();
        let length = blocking(move || Ok(std::fs::metadata(log).map_or(0, |m| m.len())));
        length.await.unwrap_or(0)
    }

    /// What the server has said since its log was `start` bytes long; only the end of very much.
    pub async fn log_since(&self, spec: &InstanceSpec, start: u64) -> String {
        let log = spec.log_file.clone();
        blocking(move || Ok(prepare::tail_since(&log, start)))
            .await
            .unwrap_or_default()
    }
}

/// Runs what blocks beside the tasks.
async fn blocking<T, F>(work: F) -> Result<T, RuntimeError>
where
    T: Send + 'static,
    F: FnOnce() -> Result<T, RuntimeError> + Send + 'static,
{
    match tokio::task::spawn_blocking(work).await {
        Ok(result) => result,
        Err(e) => Err(RuntimeError::failed("run a blocking step", e)),
    }
}

/// Arguments of initdb, the paths as the server sees them.
fn initdb_args(spec: &InitSpec, major: u32, data_dir: &str, password_file: &str) -> Vec<String> {
    let mut args = vec![
        format!("--pgdata={data_dir}"),
        format!("--username={}", spec.superuser),
        format!("--pwfile={password_file}"),
        "--auth=scram-sha-256".into(),
        "--encoding=UTF8".into(),
        format!("--locale={}", spec.locale),
        "--data-checksums".into(),
    ];
    if major >= 15 {
        // The locale is one of the C library's, whatever the build's default is.
        args.push("--locale-provider=libc".into());
    }
    args
}

/// Arguments of postgres, the paths as the server sees them. `listen` is "" or
/// the addresses to accept TCP connections on.
///
/// Settings given here win over those of every file and of `ALTER SYSTEM`, so
/// they are only what the runtime depends on.
fn postgres_args(
    spec: &InstanceSpec,
    data_dir: &str,
    socket_dir: &str,
    listen: &str,
) -> Vec<String> {
    let settings = [
        ("unix_socket_directories", quoted(socket_dir)),
        ("listen_addresses", listen.to_owned()),
        ("log_destination", "stderr".to_owned()),
        ("logging_collector", "off".to_owned()),
        ("cluster_name", title(spec.branch_name.as_str())),
    ];
    let mut args = vec![
        "-D".into(),
        data_dir.into(),
        "-p".into(),
        prepare::PORT.to_string(),
    ];
    for (name, value) in settings {
        args.push("-c".into());
        args.push(format!("{name}={value}"));
    }
    args
}

/// One folder in a setting that holds a list of folders (`SplitDirectoriesString`).
fn quoted(dir: &str) -> String {
    format!("\"{}\"", dir.replace('"', "\"\""))
}

/// The branch's name as process listings show it: the setting takes printable
/// ASCII and less than 64 bytes (PostgreSQL manual, section 20.8).
fn title(branch: &str) -> String {
    branch
        .chars()
        .map(|c| if c.is_ascii_graphic() { c } else { '?' })
        .take(63)
        .collect()
}
