//! Starts, finds and stops instances: the postgres that serves a branch.
//!
//! Docker and native processes keep one contract. This room touches nothing of
//! a volume beyond the paths it is given, and keeps no record: whether an
//! instance runs is always observed.

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;
use std::time::Duration;

use tokio::sync::watch;

use crate::types::{BackendAddress, BranchId, BranchName, Invalid, Owner, ProjectId};

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

/// Time an instance gets to stop by itself before it is killed.
pub const STOP_GRACE: Duration = Duration::from_secs(30);
