//! Making branches as clones of their parents.

use std::future::Future;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use tracing::{debug, info, warn};

use super::instances::{Live, Slot};
use super::{EndpointKey, Engine, EngineError, Reporter, Result, blocking, crash_point, data_dir};
use crate::git::Location;
use crate::postgres::{self, CONTROL_FILE};
use crate::registry::{BranchRecord, ProjectRecord, RegistryError, Stage};
use crate::runtime::StopMode;
use crate::storage::{CloneMethod, Consistency, Omit, StorageDriver};
use crate::types::{BranchId, BranchName, VolumeId};

/// How long a server may take to begin or end backup mode, which writes a checkpoint.
const BACKUP_LIMIT: Duration = Duration::from_secs(300);

/// A branch that was made.
#[derive(Debug, Clone)]
pub struct Created {
    pub branch: BranchRecord,
    pub parent: Option<BranchName>,
    /// For users: "btrfs snapshot".
    pub method: String,
    /// Until the branch was there, without its first start.
    pub took: Duration,
}

impl Engine {
    /// Makes a branch as a clone of `parent`. The instance is started in the background.
    pub async fn create(
        &self,
        project: &ProjectRecord,
        name: BranchName,
        parent: &BranchRecord,
        to: Reporter,
    ) -> Result<Created> {
        let (engine, project, parent) = (self.clone(), project.clone(), parent.clone());
        self.detached(async move { engine.create_in_task(&project, name, &parent, &to).await })
            .await
    }

    /// Makes a branch without switching to it, from the parent named or the one that is shown.
    pub async fn create_by_word(
        &self,
        location: &Location,
        name: BranchName,
        from: Option<&BranchName>,
        to: Reporter,
    ) -> Result<Created> {
        let project = self.project_at(location)?;
        let parent = match from {
            Some(from) => self.must_find(&project, from).await?,
            None => match self.shown_at(&project, location)? {
                Some(shown) => shown,
                None => self
                    .find_parent(&project, location, &name)?
                    .ok_or_else(EngineError::no_root)?,
            },
        };
        let created = self.create(&project, name, &parent, to.clone()).await?;
        let outcome = super::Followed {
            created: Some(created.clone()),
            ..super::Followed::default()
        };
        if let Some(note) = self.run_commands(&project, location, &created.branch, &outcome) {
            to.notice(note);
        }
        Ok(created)
    }

    pub(super) async fn create_in_task(
        &self,
        project: &ProjectRecord,
        name: BranchName,
        parent: &BranchRecord,
        to: &Reporter,
    ) -> Result<Created> {
        let begun = Instant::now();
        let config = Self::config(project)?;
        // What can't be reached now would leave a record that can't be taken back now either.
        self.driver(parent).await?;
        let id = BranchId::random();
        let slot = self.slot(&id);
        let mut live = slot.turn().await;
        let added = self.0.registry.add_branch(
            &BranchRecord {
                id: id.clone(),
                project: project.id.clone(),
                name: name.clone(),
                parent: Some(parent.id.clone()),
                stage: Stage::Creating,
                volume: VolumeId::random(),
                driver: parent.driver.clone(),
                pool: parent.pool.clone(),
                server: parent.server.clone(),
                port: 0,
                started_once: false,
                created_at: SystemTime::now(),
                trashed_at: None,
            },
            (config.port_min, config.port_max),
            port_is_free,
        );
        let branch = match added {
            Ok(branch) => branch,
            Err(e) => {
                self.drop_slot(&id);
                return Err(self.explain_taken(project, e));
            }
        };
        crash_point("create:intent");
        let (cloned, branch) = match self.clone_data(parent, &branch, to).await {
            Ok(cloned) => cloned,
            Err(e) => {
                self.undo(&slot, &mut live, &branch).await;
                return Err(e.while_cloning(&parent.name));
            }
        };
        crash_point("create:cloned");
        if let Err(e) = self.0.registry.set_stage(&id, Stage::Ready) {
            self.undo(&slot, &mut live, &branch).await;
            return Err(e.into());
        }
        crash_point("create:recorded");
        drop(live);
        let took = begun.elapsed();
        let method = cloned.to_string();
        if let CloneMethod::FullCopy { .. } = cloned
            && let Ok(driver) = self.driver(&branch).await
            && let Some(advice) = driver.advice()
        {
            to.notice(advice);
        }
        info!(branch = %name, parent = %parent.name, method, ms = took.as_millis(), "made a branch");
        self.wake_in_background(&id);
        self.publish(&branch).await;
        let branch = BranchRecord {
            stage: Stage::Ready,
            ..branch
        };
        Ok(Created {
            branch,
            parent: Some(parent.name.clone()),
            method,
            took,
        })
    }

    /// A name may be taken by what an interrupted run left, and could not be taken back yet.
    fn explain_taken(&self, project: &ProjectRecord, e: RegistryError) -> EngineError {
        if let RegistryError::NameTaken(name) = &e
            && let Ok(Some(found)) = self.0.registry.branch_named(&project.id, name)
            && found.stage == Stage::Creating
        {
            return EngineError::refused(format!("branch `{name}` is being made"))
                .hint("dbranch list; if an interrupted run left it, dbranch sync takes it back");
        }
        e.into()
    }

    /// Clones the parent's data while the parent's slot keeps everyone else from stopping, starting
    /// or moving it. The child's record comes back, as it lies where the parent lies by then.
    async fn clone_data(
        &self,
        parent: &BranchRecord,
        child: &BranchRecord,
        to: &Reporter,
    ) -> Result<(CloneMethod, BranchRecord)> {
        let seen = parent;
        let slot = self.slot(&parent.id);
        let live = slot.turn().await;
        let parent = self
            .0
            .registry
            .branch(&parent.id)?
            .filter(|p| p.stage == Stage::Ready)
            .ok_or_else(|| EngineError::refused(format!("branch `{}` is gone", parent.name)))?;
        let driver = self.driver(&parent).await?;
        let child = &BranchRecord {
            driver: parent.driver.clone(),
            pool: parent.pool.clone(),
            ..child.clone()
        };
        if !seen.lies_in(&parent.pool, &parent.driver) {
            self.0.registry.set_place(&child.id, &child.place())?;
        }
        let (from, into) = (parent.volume.clone(), child.volume.clone());
        let what = format!("copying {}", parent.name);
        let reporter = to.clone();
        let cloner = driver.clone();
        let clone = move |omit: Omit| {
            blocking(move || {
                postgres::refuse_external(&data_dir(&cloner.volume_path(&from)))?;
                Ok(cloner.clone_volume(&from, &into, omit, &|done, total| {
                    reporter.progress(&what, done, total);
                })?)
            })
        };
        let method = match (live.is_running(), driver.consistency()) {
            (true, Consistency::Atomic) => {
                let method = clone(Omit::NOTHING).await?;
                self.recut_later(child, &parent).await;
                method
            }
            (true, Consistency::NeedsBackup) => {
                self.room_for_clone(&driver, &parent).await?;
                let admin = self.admin(&live, &parent).await?;
                let mut backup = answered(&parent, admin.start_backup()).await?;
                let method = clone(Omit(postgres::omit)).await?;
                self.catch_up(&driver, &parent, child, vec![CONTROL_FILE.into()])
                    .await?;
                let label = answered(&parent, backup.stop()).await?;
                let wal = label.wal_files().collect();
                let (data_dir, owner) =
                    (data_dir(&driver.volume_path(&child.volume)), self.give_to());
                // The label first: with it, a server refuses a copy that lacks the log.
                blocking(move || Ok(postgres::write_backup_label(&data_dir, &label, owner)?))
                    .await?;
                self.catch_up(&driver, &parent, child, wal).await?;
                drop(backup.end().await?);
                method
            }
            (false, _) => clone(Omit::NOTHING).await?,
        };
        Ok((method, child.clone()))
    }

    /// Refuses what won't fit before the parent is asked to begin a backup, which would itself fill
    /// the disk: a server that can't write its log any more stops.
    async fn room_for_clone(
        &self,
        driver: &Arc<dyn StorageDriver>,
        parent: &BranchRecord,
    ) -> Result<()> {
        let (driver, from) = (driver.clone(), parent.volume.clone());
        blocking(move || Ok(driver.must_have_room(&from, Omit(postgres::omit))?)).await
    }

    async fn catch_up(
        &self,
        driver: &Arc<dyn StorageDriver>,
        parent: &BranchRecord,
        child: &BranchRecord,
        files: Vec<PathBuf>,
    ) -> Result<()> {
        let (driver, from, into) = (driver.clone(), parent.volume.clone(), child.volume.clone());
        blocking(move || {
            for file in files {
                driver.catch_up(&from, &into, &file)?;
            }
            Ok(())
        })
        .await
    }

    /// Takes back a branch that could not be finished. False where something of it is left: its
    /// record then stays, and the daemon's next start or `sync` tries again.
    pub(super) async fn undo(&self, slot: &Slot, live: &mut Live, branch: &BranchRecord) -> bool {
        let undone = match self.stop_in_turn(slot, live, StopMode::Immediate).await {
            Ok(_) => self.erase(branch).await,
            Err(e) => Err(e),
        };
        if let Err(e) = undone {
            warn!(branch = %branch.name, "take back: {e}");
            return false;
        }
        self.drop_slot(&branch.id);
        true
    }

    /// Opens the branch's own port. Without it the branch still works through the project's port.
    pub(super) async fn publish(&self, branch: &BranchRecord) {
        if let Err(e) = self.try_publish(branch).await {
            debug!(branch = %branch.name, port = branch.port, "its own port can't be used: {e}");
        }
    }

    /// [`Engine::publish`] for whoever needs that port.
    pub(super) async fn try_publish(&self, branch: &BranchRecord) -> Result<()> {
        let key = EndpointKey::Pinned(branch.id.clone());
        let opened = self.0.ports.open(key.clone(), branch.port).await;
        let current = self.0.registry.branch(&branch.id)?;
        if current.is_none_or(|b| b.stage == Stage::Deleting || b.trashed_at.is_some()) {
            // Deleted meanwhile.
            self.0.ports.close(&key);
        }
        opened.map_err(|why| {
            let hint = format!(
                "end that program; until then `{}` answers at the project's port while it is active",
                branch.name
            );
            EngineError::refused(why).hint(hint)
        })
    }
}

/// An answer of a parent's administrator, who is given up in the end: a server that hangs must not
/// keep its branch for ever.
async fn answered<T>(
    parent: &BranchRecord,
    asked: impl Future<Output = Result<T, postgres::AdminError>>,
) -> Result<T> {
    match tokio::time::timeout(BACKUP_LIMIT, asked).await {
        Ok(answer) => Ok(answer?),
        Err(_) => Err(EngineError::refused(format!(
            "the server of branch `{}` did not answer within {} s",
            parent.name,
            BACKUP_LIMIT.as_secs()
        ))
        .hint(format!(
            "dbranch stop {0}, then try again; dbranch logs {0}",
            parent.name
        ))),
    }
}

/// Bytes for people: "1.2 GiB".
pub(crate) fn human_bytes(bytes: u64) -> String {
    let units = ["B", "KiB", "MiB", "GiB", "TiB"];
    #[expect(clippy::cast_precision_loss, reason = "one decimal is shown")]
    let mut value = bytes as f64;
    let mut unit = 0;
    while value >= 1024.0 && unit + 1 < units.len() {
        value /= 1024.0;
        unit += 1;
    }
    if unit == 0 {
        format!("{bytes} B")
    } else {
        format!("{value:.1} {}", units[unit])
    }
}

pub(super) fn port_is_free(port: u16) -> bool {
    std::net::TcpListener::bind(("127.0.0.1", port)).is_ok()
}
