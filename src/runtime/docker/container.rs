//! The container of an instance.

use std::collections::{HashMap, HashSet};
use std::path::Path;
use std::time::Duration;

use bollard::errors::Error as ApiError;
use bollard::models::{
    ContainerCreateBody, ContainerInspectResponse, ContainerSummary, ContainerSummaryStateEnum,
    HostConfig, HostConfigLogConfig, PortBinding,
};
use bollard::query_parameters::{
    CreateContainerOptionsBuilder, InspectContainerOptions, KillContainerOptionsBuilder,
    ListContainersOptionsBuilder, RemoveContainerOptionsBuilder, StartContainerOptions,
    WaitContainerOptions,
};
use futures_util::StreamExt as _;
use tokio::sync::watch;

use super::image::absent;
use super::{Connect, Docker, RuntimeError, failed, said, status_of};
use crate::runtime::prepare::{self, PORT};
use crate::runtime::{
    Exit, Handle, Instance, InstanceSpec, STOP_GRACE, Server, StopMode, blocking, postgres_args,
};
use crate::types::{BackendAddress, BranchId, Owner, ProjectId};

const PROJECT: &str = "dev.dbranch.project";
const BRANCH: &str = "dev.dbranch.branch";
/// The data directory on the host: a container is an instance's only if it serves that.
const DATA: &str = "dev.dbranch.data";
/// The socket's folder in the container is the image's default, so `docker exec
/// ... psql` finds the server.
const SOCKET_DIR: &str = "/var/run/postgresql";
const LOG_FILE: &str = "/var/log/dbranch.log";

/// Parallel queries share memory in /dev/shm, where Docker's 64 MiB are soon
/// full ("could not resize shared memory segment"). A bound, not a reservation.
const SHM_BYTES: i64 = 1 << 30;

/// How long a killed or removed container may take to disappear.
const KILL_GRACE: Duration = Duration::from_secs(20);

/// How soon a signal is repeated.
const SIGNAL_AGAIN: Duration = Duration::from_millis(500);

/// How often a lost engine is asked again.
const RETRY: Duration = Duration::from_secs(1);

/// A container that was made and not started within this time, or a leftover of
/// `run_once`, is nobody's.
const ABANDONED_SECONDS: i64 = 600;

impl Docker {
    pub(in crate::runtime) async fn start(
        &self,
        spec: &InstanceSpec,
    ) -> Result<Instance, RuntimeError> {
        // A clone comes without this file; the usual start makes two requests only.
        if spec.data_dir.join("postmaster.pid").exists()
            && let Some(instance) = self.find(spec).await?
        {
            return Ok(instance);
        }
        let image = image_of(&spec.server)?;
        let layout = self.layout_of(image).await?;
        let body = self.body(spec, image, layout)?;
        let prepared = spec.clone();
        blocking(move || prepare::prepare(&prepared)).await?;
        let name = container_name(spec);
        let action = format!("start `{}` in Docker", spec.branch_name);
        let id = match self.create(&name, body.clone()).await {
            Ok(id) => id,
            Err(e) if status_of(&e) == Some(409) => {
                // The name is taken: by our instance, or by what was left of one.
                if let Some(instance) = self.look(spec, true).await? {
                    return Ok(instance);
                }
                self.create(&name, body)
                    .await
                    .map_err(|e| failed(&action, &e))?
            }
            Err(e) if status_of(&e) == Some(404) => return Err(absent(image)),
            Err(e) => return Err(failed(&action, &e)),
        };
        if let Err(e) = self
            .api
            .start_container(&id, None::<StartContainerOptions>)
            .await
        {
            self.remove(&id).await?;
            return Err(failed(&action, &e));
        }
        self.instance(spec, id).await
    }

    pub(in crate::runtime) async fn find(
        &self,
        spec: &InstanceSpec,
    ) -> Result<Option<Instance>, RuntimeError> {
        self.look(spec, false).await
    }

    /// The branches of a project that have a container, in whatever state.
    pub(in crate::runtime) async fn may_run(
        &self,
        project: &ProjectId,
    ) -> Result<HashSet<BranchId>, RuntimeError> {
        let found = self.list(&[format!("{PROJECT}={project}")]).await?;
        Ok(found
            .into_iter()
            .filter_map(|container| BranchId::new(container.labels?.remove(BRANCH)?).ok())
            .collect())
    }

    /// Finds the instance and removes what is left of earlier ones. A container
    /// that was never started may be just about to be, by a start elsewhere: it
    /// is removed when `starting` (then that start is ours) or when it is old.
    async fn look(
        &self,
        spec: &InstanceSpec,
        starting: bool,
    ) -> Result<Option<Instance>, RuntimeError> {
        let data_dir = path_text(&spec.data_dir)?;
        for found in self
            .list(&[
                format!("{PROJECT}={}", spec.project),
                format!("{BRANCH}={}", spec.branch),
            ])
            .await?
        {
            let Some(id) = found.id.clone() else { continue };
            let ours = found
                .labels
                .as_ref()
                .and_then(|labels| labels.get(DATA))
                .is_some_and(|path| path == data_dir);
            match found.state {
                Some(
                    ContainerSummaryStateEnum::RUNNING
                    | ContainerSummaryStateEnum::RESTARTING
                    | ContainerSummaryStateEnum::STOPPING,
                ) if ours => return Ok(Some(self.instance(spec, id).await?)),
                Some(ContainerSummaryStateEnum::PAUSED) if ours => {
                    self.api
                        .unpause_container(&id)
                        .await
                        .map_err(|e| failed(format!("wake the container {id}"), &e))?;
                    return Ok(Some(self.instance(spec, id).await?));
                }
                Some(ContainerSummaryStateEnum::CREATED) if !starting && !is_abandoned(&found) => {}
                Some(
                    ContainerSummaryStateEnum::CREATED
                    | ContainerSummaryStateEnum::EXITED
                    | ContainerSummaryStateEnum::DEAD
                    | ContainerSummaryStateEnum::REMOVING,
                ) => self.remove(&id).await?,
                state => tracing::warn!(
                    "container {id} ({state:?}) of branch `{}` serves another data directory",
                    spec.branch_name
                ),
            }
        }
        Ok(None)
    }

    pub(in crate::runtime) async fn stop(
        &self,
        spec: &InstanceSpec,
        id: &str,
        exit: &watch::Receiver<Option<Exit>>,
        mode: StopMode,
    ) -> Result<(), RuntimeError> {
        let signal = match mode {
            StopMode::Fast => "SIGINT",
            StopMode::Immediate => "SIGQUIT",
        };
        for (signal, grace) in [(signal, STOP_GRACE), ("SIGKILL", KILL_GRACE)] {
            match self.signal_until_end(id, signal, grace, exit).await {
                Ok(true) => break,
                Ok(false) => tracing::warn!(
                    "container {id} of `{}` did not end {grace:?} after {signal}",
                    spec.branch_name
                ),
                Err(e) => return Err(failed(format!("stop `{}`", spec.branch_name), &e)),
            }
        }
        self.remove(id).await
    }

    /// Sends `signal` and waits; says whether the container ended within `grace`.
    ///
    /// The signal is repeated, as the first process of a container gets none that
    /// it has no handler for yet (`pid_namespaces(7)`): a stop soon after the start
    /// would be lost. To postgres it means the same once or many times.
    async fn signal_until_end(
        &self,
        id: &str,
        signal: &str,
        grace: Duration,
        exit: &watch::Receiver<Option<Exit>>,
    ) -> Result<bool, ApiError> {
        let mut exit = exit.clone();
        let limit = tokio::time::Instant::now() + grace;
        while exit.borrow().is_none() {
            if tokio::time::Instant::now() >= limit {
                return Ok(false);
            }
            let options = KillContainerOptionsBuilder::default()
                .signal(signal)
                .build();
            match self.api.kill_container(id, Some(options)).await {
                Ok(()) => {}
                // Not running, or gone.
                Err(e) if matches!(status_of(&e), Some(404 | 409)) => return Ok(true),
                Err(e) => return Err(e),
            }
            let ended = tokio::time::timeout(SIGNAL_AGAIN, exit.wait_for(Option::is_some)).await;
            // Done too when nobody watches any more: removing it ends it.
            if ended.is_ok() {
                return Ok(true);
            }
        }
        Ok(true)
    }

    fn body(
        &self,
        spec: &InstanceSpec,
        image: &str,
        layout: super::image::Layout,
    ) -> Result<ContainerCreateBody, RuntimeError> {
        let tcp = self.connect == Connect::Tcp;
        // The shell sends the output to the same file as a native server's, so
        // that it survives the container; then it becomes the server.
        let mut entrypoint = vec![
            "/bin/sh".to_owned(),
            "-c".to_owned(),
            format!("exec postgres \"$@\" >>{LOG_FILE} 2>&1"),
            "postgres".to_owned(),
        ];
        entrypoint.extend(postgres_args(
            spec,
            &layout.data_dir,
            SOCKET_DIR,
            if tcp { "*" } else { "" },
        ));
        let mut binds = vec![
            bind(&spec.data_dir, &layout.data_dir, "")?,
            bind(&spec.log_file, LOG_FILE, "")?,
        ];
        if !tcp {
            binds.push(bind(&spec.socket_dir, SOCKET_DIR, "")?);
        }
        let port = format!("{PORT}/tcp");
        Ok(ContainerCreateBody {
            image: Some(image.to_owned()),
            user: Some(user(spec.owner)),
            env: Some(vec!["LC_ALL=C".into()]),
            entrypoint: Some(entrypoint),
            cmd: Some(Vec::new()),
            stop_signal: Some("SIGINT".into()),
            stop_timeout: Some(i64::try_from(STOP_GRACE.as_secs()).unwrap_or(i64::MAX)),
            labels: Some(HashMap::from([
                (PROJECT.to_owned(), spec.project.to_string()),
                (BRANCH.to_owned(), spec.branch.to_string()),
                (DATA.to_owned(), path_text(&spec.data_dir)?.to_owned()),
            ])),
            exposed_ports: tcp.then(|| vec![port.clone()]),
            host_config: Some(HostConfig {
                binds: Some(binds),
                tmpfs: Some(covers(layout.to_cover)),
                network_mode: Some(if tcp { "bridge" } else { "none" }.into()),
                port_bindings: tcp.then(|| {
                    let any_port = PortBinding {
                        host_ip: Some("127.0.0.1".into()),
                        host_port: Some("0".into()),
                    };
                    HashMap::from([(port, Some(vec![any_port]))])
                }),
                memory: spec
                    .limits
                    .memory_bytes
                    .map(|bytes| i64::try_from(bytes).unwrap_or(i64::MAX)),
                nano_cpus: spec.limits.cpus.map(nano_cpus),
                ..self.host_config()
            }),
            ..ContainerCreateBody::default()
        })
    }

    /// What all our containers have in common: no rights, no network, no restart.
    pub(super) fn host_config(&self) -> HostConfig {
        HostConfig {
            userns_mode: self.maps_users.then(|| "host".into()),
            cap_drop: Some(vec!["ALL".into()]),
            security_opt: Some(vec!["no-new-privileges".into()]),
            shm_size: Some(SHM_BYTES),
            log_config: Some(HostConfigLogConfig {
                typ: Some("json-file".into()),
                config: Some(HashMap::from([("max-size".to_owned(), "1m".to_owned())])),
            }),
            ..HostConfig::default()
        }
    }

    async fn create(&self, name: &str, body: ContainerCreateBody) -> Result<String, ApiError> {
        let options = CreateContainerOptionsBuilder::default().name(name).build();
        Ok(self.api.create_container(Some(options), body).await?.id)
    }

    pub(super) async fn list(
        &self,
        labels: &[String],
    ) -> Result<Vec<ContainerSummary>, RuntimeError> {
        let filters = HashMap::from([("label".to_owned(), labels.to_vec())]);
        let options = ListContainersOptionsBuilder::default()
            .all(true)
            .filters(&filters)
            .build();
        self.api
            .list_containers(Some(options))
            .await
            .map_err(|e| failed("list containers", &e))
    }

    async fn inspect(&self, id: &str) -> Result<ContainerInspectResponse, ApiError> {
        self.api
            .inspect_container(id, None::<InspectContainerOptions>)
            .await
    }

    /// Removes a container, running or not, with its anonymous volumes; returns
    /// when it is gone.
    pub(super) async fn remove(&self, id: &str) -> Result<(), RuntimeError> {
        let limit = tokio::time::Instant::now() + KILL_GRACE;
        loop {
            let options = RemoveContainerOptionsBuilder::default()
                .force(true)
                .v(true)
                .build();
            match self.api.remove_container(id, Some(options)).await {
                Ok(()) => return Ok(()),
                Err(e) if status_of(&e) == Some(404) => return Ok(()),
                // Somebody else removes it just now.
                Err(e) if status_of(&e) == Some(409) && tokio::time::Instant::now() < limit => {
                    tokio::time::sleep(Duration::from_millis(50)).await;
                }
                Err(e) => return Err(failed(format!("remove the container {id}"), &e)),
            }
        }
    }

    /// The instance that a running container is, watched from now on.
    async fn instance(&self, spec: &InstanceSpec, id: String) -> Result<Instance, RuntimeError> {
        let address = match self.connect {
            Connect::Unix => BackendAddress::Unix {
                dir: spec.socket_dir.clone(),
                port: PORT,
            },
            Connect::Tcp => BackendAddress::Tcp {
                host: "127.0.0.1".into(),
                port: self.published_port(&id).await?,
            },
        };
        let (sender, exit) = watch::channel(None);
        let (docker, watched) = (self.clone(), id.clone());
        tokio::spawn(async move {
            let _ = sender.send(Some(docker.exit_of(&watched).await));
        });
        Ok(Instance {
            address,
            handle: Handle::Container { id },
            exit,
        })
    }

    async fn published_port(&self, id: &str) -> Result<u16, RuntimeError> {
        let action = format!("find the port of the container {id}");
        let inspected = self.inspect(id).await.map_err(|e| failed(&action, &e))?;
        inspected
            .network_settings
            .and_then(|net| net.ports)
            .and_then(|mut ports| ports.remove(&format!("{PORT}/tcp")).flatten())
            .and_then(|bindings| bindings.first()?.host_port.as_ref()?.parse().ok())
            .ok_or_else(|| RuntimeError::failed(action, "it has ended or publishes none"))
    }

    /// Waits till the container does not run, through restarts of the engine.
    async fn exit_of(&self, id: &str) -> Exit {
        loop {
            match self.code_at_end(id).await {
                Ok(code) => return self.describe(id, code).await,
                Err(e) if status_of(&e) == Some(404) => return removed(),
                Err(e) => tracing::debug!("waiting for container {id}: {}", said(&e)),
            }
            tokio::time::sleep(RETRY).await;
            // The engine is away or restarted; its containers may have gone on.
            if let Err(e) = self.inspect(id).await
                && status_of(&e) == Some(404)
            {
                return removed();
            }
        }
    }

    /// The exit status, once there is one.
    pub(super) async fn code_at_end(&self, id: &str) -> Result<i64, ApiError> {
        let mut wait = std::pin::pin!(self.api.wait_container(id, None::<WaitContainerOptions>));
        match wait.next().await {
            Some(Ok(answer)) => Ok(answer.status_code),
            // bollard's form of a status other than 0.
            Some(Err(ApiError::DockerContainerWaitError { code, .. })) => Ok(code),
            Some(Err(e)) => Err(e),
            None => Err(ApiError::DockerStreamError {
                error: "the engine ended the wait".into(),
            }),
        }
    }

    async fn describe(&self, id: &str, code: i64) -> Exit {
        let state = self.inspect(id).await.ok().and_then(|c| c.state);
        let out_of_memory = state.as_ref().is_some_and(|s| s.oom_killed == Some(true));
        let error = state.and_then(|s| s.error).unwrap_or_default();
        let reason = if out_of_memory {
            "killed: it used more memory than its limit".to_owned()
        } else if !error.is_empty() {
            error
        } else if code > 128 {
            format!("killed by signal {}", code - 128)
        } else {
            format!("exit status {code}")
        };
        Exit {
            clean: code == 0,
            reason,
        }
    }
}

pub(super) fn is_abandoned(container: &ContainerSummary) -> bool {
    let now = std::time::SystemTime::now()
        .duration_since(std::time::UNIX_EPOCH)
        .map_or(0, |d| i64::try_from(d.as_secs()).unwrap_or(i64::MAX));
    container
        .created
        .is_some_and(|at| now - at > ABANDONED_SECONDS)
}

fn removed() -> Exit {
    Exit {
        clean: false,
        reason: "its container was removed".into(),
    }
}

pub(super) fn image_of(server: &Server) -> Result<&str, RuntimeError> {
    match server {
        Server::Docker { image } => Ok(image),
        Server::Native { bin_dir } => Err(RuntimeError::failed(
            "run postgres in Docker",
            format!("the branch's server is in {}", bin_dir.display()),
        )),
    }
}

pub(super) fn user(owner: Owner) -> String {
    format!("{}:{}", owner.uid, owner.gid)
}

#[expect(
    clippy::cast_possible_truncation,
    reason = "a number of CPUs times 10^9 fits, and `as` saturates"
)]
fn nano_cpus(cpus: f64) -> i64 {
    (cpus * 1e9) as i64
}

/// Hides declared volumes, which would become anonymous ones, under empty
/// memory file systems; mounts inside them stay visible.
pub(super) fn covers(volumes: Vec<String>) -> HashMap<String, String> {
    volumes
        .into_iter()
        .map(|path| (path, "size=64k,mode=0755".to_owned()))
        .collect()
}

fn path_text(path: &Path) -> Result<&str, RuntimeError> {
    path.to_str().filter(|_| path.is_absolute()).ok_or_else(|| {
        RuntimeError::failed(
            format!("mount {}", path.display()),
            "the path is not absolute or not valid UTF-8",
        )
    })
}

pub(super) fn bind(from: &Path, to: &str, mode: &str) -> Result<String, RuntimeError> {
    let from = path_text(from)?;
    if from.contains(':') {
        // The engine splits there; it offers no way to write one.
        return Err(RuntimeError::failed(
            format!("mount {from}"),
            "Docker can't mount a path with a `:`",
        ));
    }
    Ok(format!("{from}:{to}{mode}"))
}

/// `dbranch-shop-4f9c0k2m7x1q`: the project for people, the id for us.
fn container_name(spec: &InstanceSpec) -> String {
    let mut slug: String = spec
        .project_name
        .to_lowercase()
        .chars()
        .map(|c| if c.is_ascii_alphanumeric() { c } else { '-' })
        .take(30)
        .collect();
    slug = slug.trim_matches('-').to_owned();
    if slug.is_empty() {
        "project".clone_into(&mut slug);
    }
    format!("dbranch-{slug}-{}", spec.branch)
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    /// What the contract's tests must see of a container.
    impl Docker {
        pub(in crate::runtime) async fn pid_of(&self, id: &str) -> u32 {
            let state = self.inspect(id).await.unwrap().state.unwrap();
            state.pid.unwrap().try_into().unwrap()
        }

        pub(in crate::runtime) async fn assert_confined(&self, id: &str, memory: i64, cpus: i64) {
            let inspected = self.inspect(id).await.unwrap();
            let mounts = inspected.mounts.unwrap();
            assert!(
                mounts.iter().all(|mount| mount.name.is_none()),
                "{mounts:?}"
            );
            let host = inspected.host_config.unwrap();
            assert_eq!(host.network_mode.as_deref(), Some("none"));
            assert_eq!(host.memory, Some(memory));
            assert_eq!(host.nano_cpus, Some(cpus));
            assert_eq!(host.cap_drop, Some(vec!["ALL".to_owned()]));
            let restart = host.restart_policy.and_then(|policy| policy.name);
            assert!(
                restart.is_none_or(|name| ["", "no"].contains(&name.to_string().as_str())),
                "no restart policy"
            );
            let status = fs::read_to_string(format!("/proc/{}/status", self.pid_of(id).await));
            assert!(
                status
                    .unwrap()
                    .lines()
                    .any(|l| l.starts_with("CapEff:") && l.ends_with("0000000000000000"))
            );
        }
    }

    #[test]
    fn a_path_with_a_colon_is_refused() {
        assert!(bind(Path::new("/a:b"), "/x", "").is_err());
        assert!(bind(Path::new("a"), "/x", "").is_err());
        assert_eq!(bind(Path::new("/a b"), "/x", ":ro").unwrap(), "/a b:/x:ro");
    }
}
