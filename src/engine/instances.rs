//! Instances: started on demand, watched, stopped.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use tokio::sync::{Mutex, OwnedMutexGuard, watch};
use tracing::{info, warn};

use super::recut::Origin;
use super::trouble::complaint;
use super::{ADMIN, Engine, EngineError, Result, Secret, blocking, data_dir, lock};
use crate::postgres::{self, Admin, Conf, Listen};
use crate::registry::{BranchRecord, ProjectRecord, Stage};
use crate::runtime::{Instance, InstanceSpec, Limits, Runtime, StopMode};
use crate::types::{BackendAddress, BranchId, BranchName};

/// How long a start may take. It is generous: recovery after a crash replays up to `max_wal_size` of
/// log, and one that is cut off begins anew.
const START_LIMIT: Duration = Duration::from_secs(30 * 60);
/// How long the daemon's own start waits for an instance that it found starting.
const ADOPT_LIMIT: Duration = Duration::from_secs(5);

/// What is known of a branch's instance.
#[derive(Debug, Clone)]
pub enum InstanceState {
    Stopped,
    Starting,
    Running(BackendAddress),
    /// It ended by itself, or could not be started.
    Failed {
        error: EngineError,
        since: Instant,
    },
}

/// The live side of one branch. Cheap to clone.
#[derive(Debug, Clone)]
pub(super) struct Slot {
    /// Admits one operation at a time: a start, a stop, a clone, a deletion.
    live: Arc<Mutex<Live>>,
    state: watch::Sender<InstanceState>,
    sessions: Arc<AtomicUsize>,
    /// Where a clone comes from that is to be made small before its first start. Whoever does so
    /// holds the lock.
    pub(super) fresh: Arc<Mutex<Option<Origin>>>,
    /// How often the user has stopped it: a start in the background that came before is void.
    stops: Arc<AtomicUsize>,
}

/// What belongs to a running instance.
#[derive(Debug, Default)]
pub(super) struct Live {
    instance: Option<(Runtime, InstanceSpec, Instance)>,
}

impl Live {
    pub(super) fn is_running(&self) -> bool {
        self.instance.is_some()
    }
}

/// Where a session of a branch goes.
#[derive(Debug, Clone)]
pub struct Served {
    pub name: BranchName,
    pub address: BackendAddress,
    /// How long a transaction may go on after a switch.
    pub grace: Duration,
}

/// Counts a session of a branch as long as it is held.
#[derive(Debug)]
pub struct Lease(Arc<AtomicUsize>);

impl Drop for Lease {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

impl Slot {
    fn new() -> Self {
        Self {
            live: Arc::default(),
            state: watch::Sender::new(InstanceState::Stopped),
            sessions: Arc::default(),
            fresh: Arc::default(),
            stops: Arc::default(),
        }
    }

    /// Waits for the branch's turn.
    pub(super) async fn turn(&self) -> OwnedMutexGuard<Live> {
        self.live.clone().lock_owned().await
    }

    pub(super) fn state(&self) -> InstanceState {
        self.state.borrow().clone()
    }

    pub(super) fn is_running(&self) -> bool {
        self.address().is_some()
    }

    pub(super) fn sessions(&self) -> usize {
        self.sessions.load(Ordering::Relaxed)
    }

    pub(super) fn address(&self) -> Option<BackendAddress> {
        match &*self.state.borrow() {
            InstanceState::Running(address) => Some(address.clone()),
            _ => None,
        }
    }
}

impl Engine {
    pub(super) fn slot(&self, id: &BranchId) -> Arc<Slot> {
        lock(&self.0.slots)
            .entry(id.clone())
            .or_insert_with(|| Arc::new(Slot::new()))
            .clone()
    }

    pub(super) fn drop_slot(&self, id: &BranchId) {
        lock(&self.0.slots).remove(id);
    }

    /// Registers a session of a branch.
    pub fn lease(&self, id: &BranchId) -> Lease {
        let sessions = self.slot(id).sessions.clone();
        sessions.fetch_add(1, Ordering::Relaxed);
        Lease(sessions)
    }

    /// The address of a branch's instance, which is started first when it does not run.
    pub async fn wake(&self, id: &BranchId) -> Result<BackendAddress> {
        let slot = self.slot(id);
        if let Some(address) = slot.address().filter(is_there) {
            return Ok(address);
        }
        let (engine, id, asked) = (self.clone(), id.clone(), Instant::now());
        self.detached(async move {
            engine.recut(&slot, &id).await;
            let mut live = slot.turn().await;
            engine.wake_in_turn(&slot, &mut live, &id, asked).await
        })
        .await
    }

    async fn wake_in_turn(
        &self,
        slot: &Slot,
        live: &mut Live,
        id: &BranchId,
        asked: Instant,
    ) -> Result<BackendAddress> {
        if slot.address().is_some_and(|address| !is_there(&address)) {
            warn!(branch = %id, "its instance has lost its socket: starting it again");
            self.stop_in_turn(slot, live, StopMode::Fast).await?;
        }
        self.start_in_turn(slot, live, id, asked).await
    }

    /// What a session of a branch needs: its instance, started when it does not run.
    pub async fn serve(&self, id: &BranchId) -> Result<Served> {
        let address = self.wake(id).await?;
        let branch = self
            .0
            .registry
            .branch(id)?
            .ok_or_else(|| EngineError::refused("the branch is gone"))?;
        let grace = Self::config(&self.project_of(&branch)?)?.switch_grace;
        Ok(Served {
            name: branch.name,
            address,
            grace,
        })
    }

    pub fn name_of(&self, id: &BranchId) -> Option<BranchName> {
        self.0.registry.branch(id).ok().flatten().map(|b| b.name)
    }

    /// Starts a branch's instance without anybody waiting, unless it is stopped by the user before its
    /// turn has come.
    pub(super) fn wake_in_background(&self, id: &BranchId) {
        let (engine, id, slot) = (self.clone(), id.clone(), self.slot(id));
        let (asked, stops) = (Instant::now(), slot.stops.load(Ordering::Relaxed));
        self.0.tasks.spawn(async move {
            engine.recut(&slot, &id).await;
            let mut live = slot.turn().await;
            if slot.stops.load(Ordering::Relaxed) != stops {
                return;
            }
            if let Err(e) = engine.wake_in_turn(&slot, &mut live, &id, asked).await {
                warn!(branch = %id, "start: {e}");
            }
        });
    }

    pub(super) async fn start_in_turn(
        &self,
        slot: &Slot,
        live: &mut Live,
        id: &BranchId,
        asked: Instant,
    ) -> Result<BackendAddress> {
        if let Some(address) = slot.address() {
            return Ok(address);
        }
        // Whoever waited while a start failed shares its failure: a pool's many clients
        // cause one attempt, not one each.
        if let InstanceState::Failed { error, since } = slot.state()
            && since > asked
        {
            return Err(error);
        }
        if self.is_closing() {
            return Err(EngineError::refused("dbranch is shutting down").hint("dbranch start"));
        }
        let branch = self
            .0
            .registry
            .branch(id)?
            .ok_or_else(|| EngineError::refused("the branch is gone"))?;
        if branch.trashed_at.is_some() || branch.stage != Stage::Ready {
            return Err(
                EngineError::refused(format!("branch `{}` has been deleted", branch.name))
                    .hint(format!("dbranch undelete {}", branch.name)),
            );
        }
        slot.state.send_replace(InstanceState::Starting);
        match self.launch(slot, live, &branch).await {
            Ok(address) => {
                if !branch.started_once {
                    self.0.registry.set_started(id)?;
                }
                Ok(address)
            }
            Err(e) => {
                let error = e.about_disk_of(&branch).about_branch(&branch.name);
                slot.state.send_replace(InstanceState::Failed {
                    error: error.clone(),
                    since: Instant::now(),
                });
                Err(error)
            }
        }
    }

    /// Starts the instance of a branch whose record need not be finished yet, and waits until it answers.
    pub(super) async fn launch(
        &self,
        slot: &Slot,
        live: &mut Live,
        branch: &BranchRecord,
    ) -> Result<BackendAddress> {
        let begun = Instant::now();
        let project = self.project_of(branch)?;
        let (driver, volume) = (self.driver(branch).await?, branch.volume.clone());
        super::blocking(move || Ok(driver.make_reachable(&volume)?)).await?;
        let (runtime, spec) = self.instance_spec(&project, branch).await?;
        let (data_dir, owner) = (spec.data_dir.clone(), spec.owner);
        blocking(move || Ok(crate::storage::health::must_serve(&data_dir, owner)?)).await?;
        Self::refuse_other_major(branch, &spec.data_dir)?;
        // Not while git waited for the clone: unlinking right after a snapshot may stall.
        if !branch.started_once && runtime.find(&spec).await?.is_none() {
            let data_dir = spec.data_dir.clone();
            blocking(move || Ok(postgres::shed(&data_dir)?)).await?;
        }
        self.write_conf(&project, branch, &runtime).await?;
        let said_before = runtime.log_end(&spec).await;
        let instance = runtime.start(&spec).await?;
        let mut exit = instance.exit.clone();
        let ready = tokio::select! {
            ready = tokio::time::timeout(START_LIMIT, postgres::wait_ready(&spec.data_dir)) => match ready {
                Ok(Ok(_)) => Ok(()),
                Ok(Err(e)) => Err(format!("its lock file can't be read: {e}")),
                Err(_) => Err(format!("it did not become ready within {} s", START_LIMIT.as_secs())),
            },
            ended = exit.wait_for(Option::is_some) => Err(match ended.as_deref() {
                Ok(Some(exit)) => exit.reason.clone(),
                _ => "it ended".into(),
            }),
        };
        if let Err(why) = ready {
            let said = runtime.log_since(&spec, said_before).await;
            let _ = runtime.stop(&spec, &instance, StopMode::Immediate).await;
            return Err(EngineError::refused(format!(
                "postgres of branch `{}` did not start: {why}{}",
                branch.name,
                complaint(&said)
                    .map(|line| format!(" ({line})"))
                    .unwrap_or_default()
            )));
        }
        let address = instance.address.clone();
        info!(branch = %branch.name, runtime = %runtime.kind(), ms = begun.elapsed().as_millis(), "instance is ready");
        live.instance = Some((runtime, spec, instance.clone()));
        slot.state
            .send_replace(InstanceState::Running(address.clone()));
        Self::watch_exit(slot, branch, &instance, said_before);
        Ok(address)
    }

    fn refuse_other_major(branch: &BranchRecord, data_dir: &Path) -> Result<()> {
        let (found, ours) = (postgres::major(data_dir)?, branch.server.major);
        if found == ours {
            return Ok(());
        }
        Err(EngineError::refused(format!(
            "the data of branch `{}` is PostgreSQL {found}'s, and its server is {ours}",
            branch.name
        ))
        .hint(format!(
            "see what became of it: dbranch show {}",
            branch.name
        )))
    }

    /// Notices when an instance ends by itself. Its log begins at `said_before`.
    fn watch_exit(slot: &Slot, branch: &BranchRecord, instance: &Instance, said_before: u64) {
        let begun = Instant::now();
        let (slot, branch, handle, mut exit) = (
            slot.clone(),
            branch.clone(),
            instance.handle.clone(),
            instance.exit.clone(),
        );
        tokio::spawn(async move {
            let Ok(reason) = exit.wait_for(Option::is_some).await.map(|e| e.clone()) else {
                return;
            };
            let mut live = slot.turn().await;
            // Whoever stopped it on purpose took it out already.
            if !live
                .instance
                .as_ref()
                .is_some_and(|(_, _, i)| i.handle == handle)
            {
                return;
            }
            let Some((runtime, spec, _)) = live.instance.take() else {
                return;
            };
            let said = runtime.log_since(&spec, said_before).await;
            let reason = format!(
                "postgres of branch `{}` ended: {}{}",
                branch.name,
                reason.map_or_else(String::new, |r| r.reason),
                complaint(&said)
                    .map(|line| format!(" ({line})"))
                    .unwrap_or_default()
            );
            warn!("{reason}");
            slot.state.send_replace(InstanceState::Failed {
                error: EngineError::refused(reason)
                    .about_disk_of(&branch)
                    .about_branch(&branch.name),
                // Its start had not failed: who has asked for it since then starts it again.
                since: begun,
            });
        });
    }

    /// Stops the instance, if there is one, and keeps the volume. True if one ran.
    pub(super) async fn stop_in_turn(
        &self,
        slot: &Slot,
        live: &mut Live,
        mode: StopMode,
    ) -> Result<bool> {
        let Some((runtime, spec, instance)) = live.instance.take() else {
            slot.state.send_replace(InstanceState::Stopped);
            return Ok(false);
        };
        slot.state.send_replace(InstanceState::Stopped);
        if let Err(e) = runtime.stop(&spec, &instance, mode).await {
            live.instance = Some((runtime, spec, instance.clone()));
            slot.state
                .send_replace(InstanceState::Running(instance.address));
            return Err(e.into());
        }
        info!(branch = %spec.branch_name, "instance stopped");
        Ok(true)
    }

    /// Stops a branch's instance. True if one ran.
    pub async fn stop(&self, id: &BranchId) -> Result<bool> {
        let (engine, id) = (self.clone(), id.clone());
        self.detached(async move {
            let slot = engine.slot(&id);
            slot.stops.fetch_add(1, Ordering::Relaxed);
            let mut live = slot.turn().await;
            engine.stop_in_turn(&slot, &mut live, StopMode::Fast).await
        })
        .await
    }

    /// Finds an instance that an earlier daemon left running. True if there is one.
    pub(super) async fn adopt(&self, branch: &BranchRecord) -> Result<bool> {
        let slot = self.slot(&branch.id);
        let mut live = slot.turn().await;
        if live.is_running() {
            return Ok(true);
        }
        let project = self.project_of(branch)?;
        let (runtime, spec) = self.instance_spec(&project, branch).await?;
        let Some(instance) = runtime.find(&spec).await? else {
            return Ok(false);
        };
        let mut exit = instance.exit.clone();
        tokio::select! {
            ready = tokio::time::timeout(ADOPT_LIMIT, postgres::wait_ready(&spec.data_dir)) => {
                if ready.is_err() {
                    // In recovery, perhaps: whoever needs the branch waits for it, not the daemon.
                    self.wake_in_background(&branch.id);
                    return Ok(false);
                }
            }
            _ = exit.wait_for(Option::is_some) => return Ok(false),
        }
        slot.state
            .send_replace(InstanceState::Running(instance.address.clone()));
        live.instance = Some((runtime, spec, instance.clone()));
        Self::watch_exit(&slot, branch, &instance, 0);
        info!(branch = %branch.name, "found its instance running");
        Ok(true)
    }

    /// Logs in to a running instance as administrator. Not kept: an idle session would cost
    /// the instance a process and the branch the relation cache of one more database.
    pub(super) async fn admin(&self, live: &Live, branch: &BranchRecord) -> Result<Admin> {
        let (_, _, instance) = live
            .instance
            .as_ref()
            .ok_or_else(|| EngineError::bug(format!("branch `{}` does not run", branch.name)))?;
        self.admin_at(&instance.address, branch).await
    }

    pub(super) async fn admin_at(
        &self,
        address: &BackendAddress,
        branch: &BranchRecord,
    ) -> Result<Admin> {
        let password = self.password(&branch.project, Secret::Admin)?;
        Ok(Admin::connect(address, ADMIN, "postgres", &password).await?)
    }

    pub(super) async fn instance_spec(
        &self,
        project: &ProjectRecord,
        branch: &BranchRecord,
    ) -> Result<(Runtime, InstanceSpec)> {
        let config = Self::config(project)?;
        let (runtime, server) = self.runtime(&branch.server).await?;
        let spec = InstanceSpec {
            project: project.id.clone(),
            project_name: project.name.clone(),
            branch: branch.id.clone(),
            branch_name: branch.name.clone(),
            server,
            data_dir: self.data_dir(branch).await?,
            socket_dir: self.0.paths.instance_socket_dir(&branch.id),
            log_file: self.0.paths.instance_log(&branch.id),
            owner: self.0.owner,
            limits: Limits {
                memory_bytes: config.postgres.memory_bytes,
                cpus: config.postgres.cpus,
            },
        };
        Ok((runtime, spec))
    }

    /// Where a branch's instance listens, or would if it ran.
    pub(super) fn backend_of(&self, id: &BranchId) -> BackendAddress {
        let slot = self.slot(id);
        slot.address().unwrap_or_else(|| BackendAddress::Unix {
            dir: self.0.paths.instance_socket_dir(id),
            port: 5432,
        })
    }

    /// Brings the included settings file up to what the config says now.
    pub(super) async fn write_conf(
        &self,
        project: &ProjectRecord,
        branch: &BranchRecord,
        runtime: &Runtime,
    ) -> Result<()> {
        let settings = Self::config(project)?.postgres.settings;
        postgres::check_settings(&settings)?;
        let driver = self.driver(branch).await?;
        let conf = Conf {
            listen: if runtime.needs_tcp() {
                Listen::Container
            } else {
                Listen::SocketOnly
            },
            settings,
            copy_on_write: driver.shares_blocks(),
            ..Conf::default()
        };
        let dir = data_dir(&driver.volume_path(&branch.volume));
        let owner = self.give_to();
        blocking(move || Ok(conf.write(&dir, owner)?)).await?;
        Ok(())
    }

    pub(super) fn project_of(&self, branch: &BranchRecord) -> Result<ProjectRecord> {
        self.0.registry.project(&branch.project)?.ok_or_else(|| {
            EngineError::bug(format!("branch `{}` belongs to no project", branch.name))
        })
    }
}

/// Whether an instance can be reached at all: folders for what runs are swept away now and then, as
/// at a logout. A server never makes its socket again.
fn is_there(address: &BackendAddress) -> bool {
    address.socket_path().is_none_or(|path| path.exists())
}
