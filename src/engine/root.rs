//! The first branch of a project: made by initdb.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Instant, SystemTime};

use tracing::info;

use super::create::{Created, port_is_free};
use super::instances::{Live, Slot};
use super::{
    ADMIN, Engine, EngineError, Reporter, Result, Secret, blocking, crash_point, data_dir,
};
use crate::config::ProjectConfig;
use crate::git::Location;
use crate::registry::{BranchRecord, ProjectRecord, ServerRecord, Stage};
use crate::runtime::{InitSpec, RuntimeKind, Server, choose};
use crate::storage::{Choice, StorageDriver};
use crate::types::{BranchId, BranchName, Invalid, VolumeId};

/// How the first branch is to be made. What is `None` comes from the machine's settings.
#[derive(Debug, Clone, Default)]
pub struct InitRequest {
    pub name: Option<BranchName>,
    pub storage: Option<String>,
    pub runtime: Option<String>,
    pub pool: Option<PathBuf>,
}

impl Engine {
    /// Makes a project's first branch with a new, empty database.
    pub async fn init_postgres(
        &self,
        location: &Location,
        request: InitRequest,
        to: Reporter,
    ) -> Result<Created> {
        let (engine, location) = (self.clone(), location.clone());
        self.detached(async move { engine.init_in_task(&location, request, &to).await })
            .await
    }

    async fn init_in_task(
        &self,
        location: &Location,
        request: InitRequest,
        to: &Reporter,
    ) -> Result<Created> {
        let begun = Instant::now();
        let project = self.project_at(location)?;
        let config = Self::config(&project)?;
        self.refuse_a_second_root(&project)?;
        let name = match &request.name {
            Some(name) => name.clone(),
            None => Self::first_name(location)?,
        };
        let driver = self.choose_driver(&request, to).await?;
        let server = self.choose_server(&request, &config, to).await?;

        let id = BranchId::random();
        let slot = self.slot(&id);
        let mut live = slot.turn().await;
        let record = BranchRecord {
            id: id.clone(),
            project: project.id.clone(),
            name: name.clone(),
            parent: None,
            stage: Stage::Creating,
            volume: VolumeId::random(),
            driver: driver.kind().to_string(),
            pool: driver.pool().to_owned(),
            server,
            port: 0,
            started_once: false,
            created_at: SystemTime::now(),
            trashed_at: None,
        };
        let added = {
            let _turn = self.0.registering.lock().await;
            self.refuse_a_second_root(&project).and_then(|()| {
                let ports = (config.port_min, config.port_max);
                Ok(self.0.registry.add_branch(&record, ports, port_is_free)?)
            })
        };
        let branch = match added {
            Ok(branch) => branch,
            Err(e) => {
                self.drop_slot(&id);
                return Err(e);
            }
        };
        crash_point("init:intent");
        if let Err(e) = self.make_root(&slot, &mut live, &config, &branch).await {
            self.undo(&slot, &mut live, &branch).await;
            // Its log went with it.
            return Err(e.about_pool(&branch.pool).or_hint("dbranch doctor"));
        }
        drop(live);
        self.publish(&branch).await;
        self.show_where_head_is(location, &branch).await?;
        info!(branch = %name, storage = %branch.driver, runtime = %branch.server.runtime, "made the first branch");
        Ok(Created {
            branch,
            parent: None,
            method: "initdb".into(),
            took: begun.elapsed(),
        })
    }

    fn refuse_a_second_root(&self, project: &ProjectRecord) -> Result<()> {
        let branches = self.0.registry.branches(&project.id)?;
        let Some(first) = branches.iter().find(|b| b.trashed_at.is_none()) else {
            return Ok(());
        };
        let (what, hint) = match first.stage {
            Stage::Creating => ("is being made", "dbranch list"),
            Stage::Deleting => ("is being deleted", "dbranch sync"),
            Stage::Ready => (
                "exists already",
                "dbranch list, or git checkout -b NAME for another branch",
            ),
        };
        let message = format!("this project's first branch `{}` {what}", first.name);
        Err(EngineError::refused(message).hint(hint))
    }

    async fn choose_driver(
        &self,
        request: &InitRequest,
        to: &Reporter,
    ) -> Result<Arc<dyn StorageDriver>> {
        let set = self.machine().storage.value;
        let word = request.storage.as_ref().unwrap_or(&set);
        let choice: Choice = word.parse().map_err(|e: Invalid| {
            EngineError::config(e.to_string())
                .hint(format!("set DBRANCH_STORAGE to one of {}", Choice::names()))
        })?;
        let pool = request.pool.clone().unwrap_or_else(|| self.pool());
        self.may_become_a_pool(&pool)?;
        let driver = self.open_pool(choice, &pool).await?;
        self.mark_pool(driver.pool()).await?;
        if let Some(advice) = driver.advice() {
            to.notice(advice);
        }
        Ok(driver)
    }

    async fn choose_server(
        &self,
        request: &InitRequest,
        config: &ProjectConfig,
        to: &Reporter,
    ) -> Result<ServerRecord> {
        let set = self.machine().runtime.value;
        let word = request.runtime.as_ref().unwrap_or(&set);
        let kind = match word.as_str() {
            "auto" => None,
            name => Some(name.parse::<RuntimeKind>().map_err(|e| {
                EngineError::config(e.to_string())
                    .hint("set DBRANCH_RUNTIME to auto, docker or native")
            })?),
        };
        let chosen = choose(
            kind,
            config.postgres.version,
            config.postgres.image.as_deref(),
            &mut |pull| {
                let what = format!("pulling the image: {}", pull.status.to_lowercase());
                to.progress(&what, pull.done_bytes, pull.total_bytes);
            },
        )
        .await?;
        if let Some(why) = &chosen.notice {
            to.notice(format!("native postgres is used: {why}"));
        }
        Ok(ServerRecord {
            runtime: chosen.runtime.kind().to_string(),
            programs: match chosen.server {
                Server::Native { bin_dir } => bin_dir.display().to_string(),
                Server::Docker { image } => image,
            },
            major: chosen.major,
        })
    }

    async fn make_root(
        &self,
        slot: &Slot,
        live: &mut Live,
        config: &ProjectConfig,
        branch: &BranchRecord,
    ) -> Result<()> {
        let driver = self.driver(branch).await?;
        let (runtime, server) = self.runtime(&branch.server).await?;
        let (volume_id, owner) = (branch.volume.clone(), self.give_to());
        let maker = driver.clone();
        let data_dir = blocking(move || {
            let dir = data_dir(&maker.create_volume(&volume_id)?);
            crate::fsx::make_folder(&dir, 0o700, owner)
                .map_err(|e| EngineError::io("make", &dir, &e))?;
            Ok(dir)
        })
        .await?;

        // initdb reads the password as the owner of the data, who can't read our secrets.
        let admin_password = self.password(&branch.project, Secret::Admin)?;
        let password_file = driver.volume_path(&branch.volume).join("password");
        let (file, owner) = (password_file.clone(), self.give_to());
        blocking(move || {
            crate::fsx::write_atomic(&file, admin_password.reveal().as_bytes(), 0o600, owner)
                .map_err(|e| EngineError::io("write", &file, &e))
        })
        .await?;
        let made = runtime
            .init_cluster(&InitSpec {
                server,
                data_dir,
                owner: self.0.owner,
                superuser: ADMIN.into(),
                password_file: password_file.clone(),
                locale: config.postgres.locale.clone(),
            })
            .await;
        let removed = blocking(move || {
            std::fs::remove_file(&password_file)
                .map_err(|e| EngineError::io("remove", &password_file, &e))
        });
        let removed = removed.await;
        made?;
        removed?;
        crash_point("init:cluster");

        self.launch(slot, live, branch).await?;
        let role_password = self.password(&branch.project, Secret::Role)?;
        let admin = self.admin(live, branch).await?;
        admin
            .set_up(
                &config.postgres.user,
                &role_password,
                &config.postgres.database,
                None,
            )
            .await?;
        admin.checkpoint().await?;
        self.0.registry.set_stage(&branch.id, Stage::Ready)?;
        self.0.registry.set_started(&branch.id)?;
        Ok(())
    }

    fn first_name(location: &Location) -> Result<BranchName> {
        use crate::git::Head;
        match crate::git::head(&location.git_dir)? {
            Head::Branch(name) | Head::Unborn(name) => Ok(name),
            Head::Detached(_) => {
                crate::git::default_branch(&location.common_dir)?.ok_or_else(|| {
                    EngineError::refused(
                        "HEAD is detached, so there is no branch to name the database after",
                    )
                    .hint("git switch main, then dbranch init-postgres")
                })
            }
        }
    }
}
