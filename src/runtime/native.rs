//! Instances as processes of this system.
//!
//! A server gets a process group of its own and a log file for its output, and
//! nothing else ties it to the daemon: it outlives it, and the next daemon finds
//! it by its `postmaster.pid`. Limits are not enforced here.

use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use nix::sys::signal::Signal;
use tokio::process::{Child, Command};
use tokio::sync::watch;

use super::prepare::{self, PORT};
use super::process::{self, Postmaster};
use super::{
    Exit, Handle, InitSpec, Instance, InstanceSpec, RuntimeError, STOP_GRACE, Server, StopMode,
    blocking, discover,
};
use crate::types::{BackendAddress, Owner};

/// How long a killed process may take to disappear.
const KILL_GRACE: Duration = Duration::from_secs(10);

/// Variables of ours that a server may need; it gets no others.
const PASSED_ON: &[&str] = &["PATH", "TZ", "TMPDIR", "LD_LIBRARY_PATH"];

/// Runs postgres as a process. Holds nothing: what runs is observed.
#[derive(Debug, Clone, Copy, Default)]
pub struct Native;

impl Native {
    pub(super) async fn init_cluster(self, spec: &InitSpec) -> Result<(), RuntimeError> {
        prepare::check_owner(spec.owner)?;
        let bin_dir = bin_dir_of(&spec.server)?;
        let version = Command::new(bin_dir.join("postgres"))
            .arg("--version")
            .stdin(Stdio::null())
            .output()
            .await
            .map_err(|e| not_run(bin_dir, "postgres", &e))?;
        let major = discover::version_in(&String::from_utf8_lossy(&version.stdout))
            .and_then(|version| discover::major_in(&version))
            .ok_or_else(|| {
                RuntimeError::failed(
                    format!("run {}", bin_dir.join("postgres").display()),
                    String::from_utf8_lossy(&version.stderr).trim(),
                )
            })?;
        let data_dir = path_text(&spec.data_dir)?;
        let password_file = path_text(&spec.password_file)?;
        let output = command(bin_dir, "initdb", spec.owner)
            .args(super::initdb_args(spec, major, data_dir, password_file))
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .kill_on_drop(true)
            .output()
            .await
            .map_err(|e| not_run(bin_dir, "initdb", &e))?;
        if output.status.success() {
            return Ok(());
        }
        Err(RuntimeError::failed(
            "make the database cluster (initdb)",
            String::from_utf8_lossy(&output.stderr).trim(),
        ))
    }

    pub(super) async fn start(self, spec: &InstanceSpec) -> Result<Instance, RuntimeError> {
        if let Some(instance) = self.find(spec).await? {
            return Ok(instance);
        }
        let spec = spec.clone();
        let (child, address) = blocking(move || {
            let log = prepare::prepare(&spec)?;
            Ok((spawn(&spec, log)?, address(&spec)))
        })
        .await?;
        let pid = child.id().expect("a child that was never waited for");
        let (sender, exit) = watch::channel(None);
        tokio::spawn(report_child(child, sender));
        Ok(Instance {
            address,
            handle: Handle::Process { pid },
            exit,
        })
    }

    pub(super) async fn find(self, spec: &InstanceSpec) -> Result<Option<Instance>, RuntimeError> {
        let data_dir = spec.data_dir.clone();
        let found = blocking(move || {
            Ok(Postmaster::of(&data_dir).map(|found| (found, recorded_address(&data_dir))))
        });
        let Some((postmaster, recorded)) = found.await? else {
            return Ok(None);
        };
        let pid = postmaster.pid();
        let (sender, exit) = watch::channel(None);
        let data_dir = spec.data_dir.clone();
        tokio::spawn(async move {
            postmaster.ended().await;
            // Only its parent learns the status of a process. A postmaster that
            // ends in order removes its pid file.
            let clean = process::recorded_pid(&data_dir) != Some(pid);
            let reason = if clean {
                "it was shut down"
            } else {
                "it was killed or crashed"
            };
            let _ = sender.send(Some(Exit {
                clean,
                reason: reason.into(),
            }));
        });
        Ok(Some(Instance {
            address: recorded.unwrap_or_else(|| address(spec)),
            handle: Handle::Process { pid },
            exit,
        }))
    }

    pub(super) async fn stop(
        self,
        spec: &InstanceSpec,
        pid: u32,
        exit: &watch::Receiver<Option<Exit>>,
        mode: StopMode,
    ) -> Result<(), RuntimeError> {
        // The pid file comes late in a start, so this looks at the process alone.
        let data_dir = spec.data_dir.clone();
        let found = blocking(move || Ok(Postmaster::open(pid, &data_dir))).await?;
        if let Some(postmaster) = found {
            let steps = match mode {
                StopMode::Fast => [(Signal::SIGINT, STOP_GRACE), (Signal::SIGQUIT, KILL_GRACE)],
                StopMode::Immediate => {
                    [(Signal::SIGQUIT, STOP_GRACE), (Signal::SIGKILL, KILL_GRACE)]
                }
            };
            end(postmaster, &steps, spec).await?;
        }
        // A child is gone when it was waited for; that its end is known elsewhere
        // must hold before the caller acts on it.
        let mut exit = exit.clone();
        let has_ended = tokio::time::timeout(KILL_GRACE, exit.wait_for(Option::is_some))
            .await
            .is_ok();
        if !has_ended {
            // Not to be told from a stranger that was given its pid: it is known by its folder.
            return Err(RuntimeError::failed(
                format!("stop `{}`", spec.branch_name),
                format!(
                    "process {pid} runs on, and {} is not there any more",
                    spec.data_dir.display()
                ),
            ));
        }
        let data_dir = spec.data_dir.clone();
        blocking(move || {
            end_orphans(&data_dir).map_err(|detail| RuntimeError::failed("stop the server", detail))
        })
        .await
    }
}

fn address(spec: &InstanceSpec) -> BackendAddress {
    BackendAddress::Unix {
        dir: spec.socket_dir.clone(),
        port: PORT,
    }
}

/// Where the server that wrote `postmaster.pid` listens: its lines 4 and 5 are
/// port and socket folder, once it has them (pidfile.h). An earlier daemon may
/// have chosen another folder than this one would.
fn recorded_address(data_dir: &Path) -> Option<BackendAddress> {
    let text = std::fs::read_to_string(data_dir.join("postmaster.pid")).ok()?;
    let mut lines = text.lines().skip(3);
    let port = lines.next()?.trim().parse().ok()?;
    let dir = PathBuf::from(lines.next()?.trim());
    dir.is_absolute()
        .then_some(BackendAddress::Unix { dir, port })
}

fn bin_dir_of(server: &Server) -> Result<&Path, RuntimeError> {
    match server {
        Server::Native { bin_dir } => Ok(bin_dir),
        Server::Docker { image } => Err(RuntimeError::failed(
            "run postgres natively",
            format!("the branch's server is the image {image}"),
        )),
    }
}

fn path_text(path: &Path) -> Result<&str, RuntimeError> {
    path.to_str().ok_or_else(|| {
        RuntimeError::failed(
            format!("use {}", path.display()),
            "the path is not valid UTF-8",
        )
    })
}

fn not_run(bin_dir: &Path, program: &str, error: &std::io::Error) -> RuntimeError {
    let path: PathBuf = bin_dir.join(program);
    RuntimeError::failed(format!("run {}", path.display()), error)
}

/// A server program run as `owner`, with a clean environment: PG* variables
/// would reach into it.
fn command(bin_dir: &Path, program: &str, owner: Owner) -> Command {
    let mut command = Command::new(bin_dir.join(program));
    command
        .env_clear()
        .envs(
            PASSED_ON
                .iter()
                .filter_map(|key| Some((key, std::env::var_os(key)?))),
        )
        // Without it macOS makes the postmaster multithreaded, and it refuses to
        // start; settings of the cluster take its place early (main.c).
        .env("LC_ALL", "C")
        .current_dir("/")
        .stdin(Stdio::null());
    if nix::unistd::geteuid().is_root() {
        // This gives up root's supplementary groups too.
        command.gid(owner.gid).uid(owner.uid);
    }
    command
}

fn spawn(spec: &InstanceSpec, log: std::fs::File) -> Result<Child, RuntimeError> {
    let bin_dir = bin_dir_of(&spec.server)?;
    let failed = |e: &dyn std::fmt::Display| {
        RuntimeError::failed(format!("start `{}`", spec.branch_name), e)
    };
    let stdout = log.try_clone().map_err(|e| failed(&e))?;
    let mut log_note = log.try_clone().map_err(|e| failed(&e))?;
    let child = command(bin_dir, "postgres", spec.owner)
        .args(super::postgres_args(
            spec,
            path_text(&spec.data_dir)?,
            path_text(&spec.socket_dir)?,
            "",
        ))
        // From its first moment on it is known by this folder.
        .current_dir(&spec.data_dir)
        // A terminal's Ctrl-C goes to the daemon's group alone.
        .process_group(0)
        .stdout(stdout)
        .stderr(log)
        .kill_on_drop(false)
        .spawn();
    child.map_err(|e| {
        let error = not_run(bin_dir, "postgres", &e);
        let _ = writeln!(log_note, "dbranch: {error}");
        error
    })
}

/// Waits for our child, which leaves no zombie, and passes on how it ended.
async fn report_child(mut child: Child, sender: watch::Sender<Option<Exit>>) {
    use std::os::unix::process::ExitStatusExt as _;
    let exit = match child.wait().await {
        Ok(status) => Exit {
            clean: status.success(),
            reason: match (status.code(), status.signal()) {
                (Some(code), _) => format!("exit status {code}"),
                (None, Some(signal)) => format!("killed by signal {signal}"),
                (None, None) => status.to_string(),
            },
        },
        Err(e) => Exit {
            clean: false,
            reason: format!("its end is unknown: {e}"),
        },
    };
    let _ = sender.send(Some(exit));
}

/// Sends one signal after the other, each with its time, until the process ends.
async fn end(
    postmaster: Postmaster,
    steps: &[(Signal, Duration)],
    spec: &InstanceSpec,
) -> Result<(), RuntimeError> {
    let action = || format!("stop `{}`", spec.branch_name);
    let pid = postmaster.pid();
    for (signal, grace) in steps.iter().copied().chain([(Signal::SIGKILL, KILL_GRACE)]) {
        // Opened again each time: waiting uses the handle up.
        let Some(current) = Postmaster::open(pid, &spec.data_dir) else {
            return Ok(());
        };
        current
            .signal(signal)
            .map_err(|e| RuntimeError::failed(action(), format!("{signal} to {pid}: {e}")))?;
        if tokio::time::timeout(grace, current.ended()).await.is_ok() {
            return Ok(());
        }
        tracing::warn!(
            "postgres {pid} of `{}` did not end {grace:?} after {signal}",
            spec.branch_name
        );
    }
    Err(RuntimeError::failed(
        action(),
        format!("process {pid} does not end, not even by SIGKILL"),
    ))
}

/// Sees to it that no process of a server that ended still writes its files.
/// Blocks. Usually there is none.
fn end_orphans(data_dir: &Path) -> Result<(), String> {
    if Postmaster::of(data_dir).is_some() {
        return Err(format!(
            "another server was started on {}",
            data_dir.display()
        ));
    }
    // Backends of a killed postmaster end by themselves unless they are busy.
    for user in process::users_of(data_dir) {
        let _ = process::send(user, Signal::SIGQUIT);
    }
    prepare::wait_for_orphans(data_dir).or_else(|_| {
        for user in process::users_of(data_dir) {
            let _ = process::send(user, Signal::SIGKILL);
        }
        prepare::wait_for_orphans(data_dir)
    })
}
