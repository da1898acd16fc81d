//! The floor: the least that has to be done for a branch, done by hand.

use std::fs::{self, File, OpenOptions};
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _, chown};
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use bollard::models::{ContainerCreateBody, HostConfig};
use bollard::query_parameters::{CreateContainerOptions, StartContainerOptions};
use nix::sys::signal::{Signal, kill};
use nix::unistd::{Pid, User};
use tokio_postgres::Config;

use crate::client;
use crate::ioctl;
use crate::pool;
use crate::world::{Runtime, World};

/// Where a server's data lies in a volume.
const DATA: &str = "data";

/// How often `postmaster.pid` is looked at while a server starts.
const LOOK: Duration = Duration::from_micros(500);
const READY_LIMIT: Duration = Duration::from_secs(120);

/// Makes branches by hand for one world.
pub(crate) struct Floor<'a> {
    world: &'a World<'a>,
    /// As whom the servers run; none where that is us.
    owner: Option<(u32, u32)>,
    docker: Option<(bollard::Docker, String, String)>,
    folder: File,
}

impl<'a> Floor<'a> {
    pub(crate) async fn new(world: &'a World<'a>) -> Result<Self> {
        let owner = if nix::unistd::geteuid().is_root() {
            let user = User::from_name("postgres")?.context("there is no user `postgres`")?;
            Some((user.uid.as_raw(), user.gid.as_raw()))
        } else {
            None
        };
        let docker = match &world.runtime {
            Runtime::Native { .. } => None,
            Runtime::Docker { image } => {
                let api = bollard::Docker::connect_with_defaults().context("reach Docker")?;
                let pgdata = pgdata_of(&api, image).await?;
                Some((api, image.clone(), pgdata))
            }
        };
        Ok(Self {
            world,
            owner,
            docker,
            folder: File::open(world.pool.floor())?,
        })
    }

    /// Snapshots the volume at `source`. Returns the time of the ioctl alone.
    pub(crate) fn snapshot(&self, source: &Path, name: &str) -> Result<(Snapshot, Duration)> {
        let took = ioctl::snapshot(source, &self.folder, name)?;
        let path = self.world.pool.floor().join(name);
        Ok((Snapshot { path }, took))
    }

    /// Makes the folder for the socket of a server, ahead of the measurement.
    pub(crate) fn socket_dir(&self, name: &str) -> Result<PathBuf> {
        let dir = self.world.path("floor").join(name);
        fs::DirBuilder::new().mode(0o700).create(&dir)?;
        if let Some((uid, gid)) = self.owner {
            chown(&dir, Some(uid), Some(gid))?;
        }
        Ok(dir)
    }

    /// Starts a server on a snapshot of a running one and returns when it is ready.
    pub(crate) async fn start(
        &self,
        snapshot: Snapshot,
        name: &str,
        socket_dir: &Path,
    ) -> Result<Server> {
        let data = snapshot.path.join(DATA);
        for left in ["postmaster.pid", "postmaster.opts"] {
            fs::remove_file(data.join(left)).or_else(|e| match e.kind() {
                std::io::ErrorKind::NotFound => Ok(()),
                _ => Err(e),
            })?;
        }
        let mut server = match &self.docker {
            None => self.fork(snapshot, name, socket_dir)?,
            Some((api, image, pgdata)) => {
                let bind = |from: &Path, to: &str| format!("{}:{to}", from.display());
                let inside = "/var/run/postgresql";
                let body = ContainerCreateBody {
                    image: Some(image.clone()),
                    user: self.owner.map(|(uid, gid)| format!("{uid}:{gid}")),
                    entrypoint: Some(vec!["postgres".into()]),
                    cmd: Some(args(pgdata, inside, name)),
                    host_config: Some(HostConfig {
                        binds: Some(vec![bind(&data, pgdata), bind(socket_dir, inside)]),
                        network_mode: Some("none".into()),
                        ..HostConfig::default()
                    }),
                    ..ContainerCreateBody::default()
                };
                let id = api
                    .create_container(None::<CreateContainerOptions>, body)
                    .await
                    .context("create a container")?
                    .id;
                let server = Server {
                    runs: Runs::Container(id.clone()),
                    snapshot,
                };
                api.start_container(&id, None::<StartContainerOptions>)
                    .await
                    .context("start a container")?;
                server
            }
        };
        server.wait_ready(&data).await?;
        Ok(server)
    }

    fn fork(&self, snapshot: Snapshot, name: &str, socket_dir: &Path) -> Result<Server> {
        let Runtime::Native { bin_dir } = &self.world.runtime else {
            unreachable!("only the native runtime has no Docker");
        };
        let data = snapshot.path.join(DATA);
        let log = OpenOptions::new()
            .append(true)
            .create(true)
            .mode(0o600)
            .open(socket_dir.with_extension("log"))?;
        let text = |path: &Path| path.to_str().context("no UTF-8").map(str::to_owned);
        let mut postgres = Command::new(bin_dir.join("postgres"));
        postgres
            .args(args(&text(&data)?, &text(socket_dir)?, name))
            .env_clear()
            .env("LC_ALL", "C")
            .current_dir(&data)
            .process_group(0)
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log);
        if let Some((uid, gid)) = self.owner {
            postgres.uid(uid).gid(gid);
        }
        Ok(Server {
            runs: Runs::Process(postgres.spawn().context("run postgres")?),
            snapshot,
        })
    }

    /// The address of a server by its socket's folder.
    pub(crate) fn address(&self, socket_dir: &Path) -> Config {
        client::at_socket(self.world.url(), socket_dir, 5432)
    }
}

/// The arguments that dbranch gives too: nothing else of the settings differs, since
/// the file with them is in the snapshot.
fn args(data: &str, socket_dir: &str, name: &str) -> Vec<String> {
    let mut args = vec!["-D".into(), data.into(), "-p".into(), "5432".into()];
    for setting in [
        &format!("unix_socket_directories={socket_dir}"),
        "listen_addresses=",
        "log_destination=stderr",
        "logging_collector=off",
        &format!("cluster_name={name}"),
    ] {
        args.push("-c".into());
        args.push(setting.to_owned());
    }
    args
}

async fn pgdata_of(api: &bollard::Docker, image: &str) -> Result<String> {
    let image = api
        .inspect_image(image)
        .await
        .with_context(|| format!("inspect the image {image}"))?;
    let env = image.config.and_then(|c| c.env).unwrap_or_default();
    env.iter()
        .find_map(|var| var.strip_prefix("PGDATA="))
        .map(str::to_owned)
        .context("the image sets no PGDATA")
}

/// A snapshot. Dropping it destroys it.
pub(crate) struct Snapshot {
    pub(crate) path: PathBuf,
}

impl Drop for Snapshot {
    fn drop(&mut self) {
        if let Err(e) = ioctl::destroy(&self.path) {
            eprintln!("branching: {e:#}");
        }
    }
}

/// A server on a snapshot. Dropping it ends it and destroys the snapshot.
pub(crate) struct Server {
    runs: Runs,
    pub(crate) snapshot: Snapshot,
}

enum Runs {
    Process(Child),
    Container(String),
}

impl Server {
    async fn wait_ready(&mut self, data: &Path) -> Result<()> {
        let file = data.join("postmaster.pid");
        let limit = Instant::now() + READY_LIMIT;
        loop {
            // Its eighth line says so (PostgreSQL manual, section 73.1).
            let ready = fs::read_to_string(&file)
                .is_ok_and(|text| text.lines().nth(7).is_some_and(|s| s.trim() == "ready"));
            if ready {
                return Ok(());
            }
            ensure!(Instant::now() < limit, "the server did not become ready");
            if let Runs::Process(child) = &mut self.runs {
                let ended = child.try_wait()?;
                ensure!(ended.is_none(), "the server ended: {ended:?}");
            }
            tokio::time::sleep(LOOK).await;
        }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        match &mut self.runs {
            Runs::Process(child) => {
                if let Ok(pid) = i32::try_from(child.id()) {
                    let _ = kill(Pid::from_raw(pid), Signal::SIGQUIT);
                }
                let _ = child.wait();
            }
            Runs::Container(id) => {
                let _ = pool::run(Command::new("docker").args(["rm", "-fv", id]));
            }
        }
    }
}
