//! Servers started by hand: what dbranch does too, without dbranch.

use std::fs::{self, OpenOptions};
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _, chown};
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use dbranch::postgres::wait_ready;
use dbranch::types::{BackendAddress, Owner};
use nix::sys::signal::{Signal, kill};
use nix::unistd::{Pid, User};
use tokio_postgres::Config;

use crate::pool;

pub(crate) const SUPERUSER: &str = "postgres";
pub(crate) const PASSWORD: &str = "bench";
const PORT: u16 = 5432;

const READY_LIMIT: Duration = Duration::from_secs(300);

/// The programs of one PostgreSQL version.
#[derive(Debug, Clone)]
pub(crate) struct Programs {
    dir: PathBuf,
    pub(crate) major: u32,
}

impl Programs {
    pub(crate) fn in_folder(dir: PathBuf) -> Result<Self> {
        let said = pool::run(Command::new(dir.join("postgres")).arg("--version"))?;
        // postgres (PostgreSQL) 15.14 (Debian ...)
        let major = said
            .split_whitespace()
            .nth(2)
            .and_then(|v| v.split('.').next()?.parse().ok());
        Ok(Self {
            major: major.with_context(|| format!("no version: {said}"))?,
            dir,
        })
    }

    /// Those of `DBRANCH_TEST_PG_BIN`, else the newest of `/usr/lib/postgresql`.
    pub(crate) fn find() -> Result<Self> {
        let newest = || {
            fs::read_dir("/usr/lib/postgresql")
                .ok()?
                .flatten()
                .filter_map(|e| Some((e.file_name().to_str()?.parse::<u32>().ok()?, e.path())))
                .max()
                .map(|(_, dir)| dir.join("bin"))
        };
        let dir = std::env::var_os("DBRANCH_TEST_PG_BIN")
            .map(PathBuf::from)
            .or_else(newest)
            .context("no PostgreSQL server programs; name their folder with DBRANCH_TEST_PG_BIN")?;
        Self::in_folder(dir)
    }

    pub(crate) fn dir(&self) -> &Path {
        &self.dir
    }

    /// A program that runs as the servers' user, with nothing inherited.
    pub(crate) fn command(&self, program: &str) -> Result<Command> {
        // Tools that a server's package may lack, such as pgbench, come from the PATH.
        let here = self.dir.join(program);
        let mut command = if here.is_file() {
            Command::new(here)
        } else {
            Command::new(program)
        };
        command
            .env_clear()
            .env("PATH", std::env::var_os("PATH").unwrap_or_default())
            .env("LC_ALL", "C")
            .env("PGPASSWORD", PASSWORD)
            .current_dir("/")
            .stdin(Stdio::null());
        if nix::unistd::geteuid().is_root() {
            let owner = owner()?;
            command.uid(owner.uid).gid(owner.gid);
        }
        Ok(command)
    }

    /// Makes a cluster, as dbranch does. `scratch` takes the file with the password.
    pub(crate) fn initdb(&self, data_dir: &Path, scratch: &Path, more: &[&str]) -> Result<()> {
        let password = scratch.join("password");
        fs::write(&password, PASSWORD)?;
        give(&password)?;
        let mut initdb = self.command("initdb")?;
        initdb
            .arg("--pgdata")
            .arg(data_dir)
            .arg("--pwfile")
            .arg(&password)
            .args([
                "--auth=scram-sha-256",
                "--encoding=UTF8",
                "--locale=C.UTF-8",
            ])
            .arg(format!("--username={SUPERUSER}"))
            .args(more);
        pool::run(&mut initdb)?;
        Ok(())
    }
}

/// Who runs the servers: as root the user `postgres`, else we.
pub(crate) fn owner() -> Result<Owner> {
    if !nix::unistd::geteuid().is_root() {
        return Ok(Owner {
            uid: nix::unistd::geteuid().as_raw(),
            gid: nix::unistd::getegid().as_raw(),
        });
    }
    let user = User::from_name("postgres")?.context("there is no user `postgres`")?;
    Ok(Owner {
        uid: user.uid.as_raw(),
        gid: user.gid.as_raw(),
    })
}

/// Gives a file or folder to whom the servers run as.
pub(crate) fn give(path: &Path) -> Result<()> {
    let owner = owner()?;
    chown(path, Some(owner.uid), Some(owner.gid))
        .with_context(|| format!("give {} away", path.display()))
}

/// A running server. Dropping it ends it at once, as a crash would.
pub(crate) struct Server {
    child: Child,
    socket_dir: PathBuf,
    pub(crate) data_dir: PathBuf,
}

impl Server {
    /// Starts a server and returns when it is ready. Socket and log go into `scratch`.
    pub(crate) async fn start(
        programs: &Programs,
        data_dir: &Path,
        scratch: &Path,
        name: &str,
    ) -> Result<Self> {
        let socket_dir = scratch.join(name);
        match fs::DirBuilder::new().mode(0o700).create(&socket_dir) {
            Err(e) if e.kind() != std::io::ErrorKind::AlreadyExists => return Err(e.into()),
            _ => give(&socket_dir)?,
        }
        let log_file = socket_dir.with_extension("log");
        let log = OpenOptions::new()
            .append(true)
            .create(true)
            .mode(0o600)
            .open(&log_file)?;
        let mut postgres = programs.command("postgres")?;
        postgres
            .arg("-D")
            .arg(data_dir)
            .arg("-k")
            .arg(&socket_dir)
            .args(["-p", &PORT.to_string()])
            .args(["-c", "listen_addresses=", "-c", "log_destination=stderr"])
            .args(["-c", "logging_collector=off"])
            .process_group(0)
            .stdout(log.try_clone()?)
            .stderr(log);
        let child = postgres.spawn().context("run postgres")?;
        let mut server = Self {
            child,
            socket_dir,
            data_dir: data_dir.to_owned(),
        };
        let ready = tokio::time::timeout(READY_LIMIT, async {
            loop {
                let waited =
                    tokio::time::timeout(Duration::from_millis(500), wait_ready(data_dir)).await;
                if let Ok(ready) = waited {
                    return Ok(ready.map(drop)?);
                }
                if let Some(status) = server.child.try_wait()? {
                    bail!("the server ended: {status}");
                }
            }
        });
        match ready.await {
            Ok(Ok(())) => Ok(server),
            Ok(Err(e)) => Err(e.context(fs::read_to_string(&log_file).unwrap_or_default())),
            Err(_) => bail!("the server did not become ready"),
        }
    }

    pub(crate) fn address(&self) -> BackendAddress {
        BackendAddress::Unix {
            dir: self.socket_dir.clone(),
            port: PORT,
        }
    }

    /// Processor time of its sessions that have ended, in ticks: what the postmaster has waited
    /// for (`cutime` and `cstime`, proc(5)). Where a machine is busy this tells more than a clock.
    pub(crate) fn ticks_of_children(&self) -> Result<u64> {
        let stat = fs::read_to_string(format!("/proc/{}/stat", self.child.id()))?;
        let after_name = stat.rsplit(") ").next().unwrap_or_default();
        let field = |n: usize| after_name.split(' ').nth(n)?.parse::<u64>().ok();
        field(13)
            .zip(field(14))
            .map(|(user, system)| user + system)
            .context("no ticks")
    }

    /// How to connect to it.
    pub(crate) fn config(&self) -> Config {
        let mut config = Config::new();
        config
            .host_path(&self.socket_dir)
            .port(PORT)
            .user(SUPERUSER)
            .password(PASSWORD)
            .dbname("postgres");
        config
    }

    /// How to connect to it as whom another address is for.
    pub(crate) fn config_as(&self, other: &Config) -> Config {
        crate::client::at_socket(other, &self.socket_dir, PORT)
    }

    /// Arguments for PostgreSQL's client programs.
    pub(crate) fn client_args(&self) -> Vec<String> {
        let dir = self.socket_dir.display();
        vec![
            format!("--host={dir}"),
            format!("--port={PORT}"),
            format!("--username={SUPERUSER}"),
        ]
    }

    /// Stops it as an administrator would, so that its data needs no recovery.
    pub(crate) fn stop(mut self) -> Result<()> {
        self.signal(Signal::SIGINT);
        let status = self.child.wait()?;
        anyhow::ensure!(status.success(), "the server ended: {status}");
        Ok(())
    }

    fn signal(&self, signal: Signal) {
        if let Ok(pid) = i32::try_from(self.child.id()) {
            let _ = kill(Pid::from_raw(pid), signal);
        }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        if let Ok(None) = self.child.try_wait() {
            self.signal(Signal::SIGQUIT);
        }
        let _ = self.child.wait();
    }
}
