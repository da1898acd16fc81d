//! Letting go of branches: into the trash, back out of it, or for good.

use std::time::{Duration, SystemTime};

use tracing::{info, warn};

use super::instances::InstanceState;
use super::{EndpointKey, Engine, EngineError, Result, blocking, crash_point};
use crate::git::Location;
use crate::registry::{BranchRecord, ProjectRecord, Stage};
use crate::runtime::StopMode;
use crate::types::BranchName;

/// How long the trash keeps a branch.
pub const TRASH_KEEPS: Duration = Duration::from_secs(7 * 24 * 60 * 60);

/// A branch that was deleted.
#[derive(Debug, Clone)]
pub struct DeletedBranch {
    pub name: BranchName,
    /// None when it lies in the trash.
    pub destroyed: bool,
    pub expires_at: Option<SystemTime>,
}

impl Engine {
    /// Moves a branch to the trash, or with `now` destroys it. One that is in use is spared without `force`.
    pub async fn delete(
        &self,
        location: &Location,
        name: &BranchName,
        now: bool,
        force: bool,
    ) -> Result<DeletedBranch> {
        let project = self.project_at(location)?;
        let branch = match self.find_settled(&project, name).await? {
            Some(branch) => branch,
            // `delete --now` of what lies in the trash already empties the trash of it.
            None if now => self
                .trashed(&project, name)?
                .ok_or_else(|| self.no_such_branch(&project, name))?,
            None => return Err(self.no_such_branch(&project, name)),
        };
        if !force {
            self.refuse_if_used(&branch)?;
        }
        let engine = self.clone();
        self.detached(async move {
            if now {
                engine.destroy(&branch).await
            } else {
                engine.trash(&branch).await
            }
        })
        .await
    }

    fn refuse_if_used(&self, branch: &BranchRecord) -> Result<()> {
        let sessions = self.slot(&branch.id).sessions();
        let why = if self.shown_anywhere(&branch.id) {
            "it is the active one".to_owned()
        } else if sessions > 0 {
            format!(
                "it has {sessions} open {}",
                if sessions == 1 { "session" } else { "sessions" }
            )
        } else {
            return Ok(());
        };
        Err(
            EngineError::refused(format!("branch `{}` is in use: {why}", branch.name)).hint(
                format!(
                    "git switch to another branch first, or dbranch delete --force {}",
                    branch.name
                ),
            ),
        )
    }

    async fn trash(&self, branch: &BranchRecord) -> Result<DeletedBranch> {
        let slot = self.slot(&branch.id);
        let mut live = slot.turn().await;
        crash_point("trash:intent");
        let at = SystemTime::now();
        self.0
            .registry
            .set_trashed(std::slice::from_ref(&branch.id), Some(at))?;
        self.withdraw(branch);
        self.stop_in_turn(&slot, &mut live, StopMode::Fast).await?;
        info!(branch = %branch.name, "moved to the trash");
        Ok(DeletedBranch {
            name: branch.name.clone(),
            destroyed: false,
            expires_at: Some(at + TRASH_KEEPS),
        })
    }

    /// Destroys a branch on the user's explicit word, or when the trash has kept it long enough.
    pub(super) async fn destroy(&self, branch: &BranchRecord) -> Result<DeletedBranch> {
        let slot = self.slot(&branch.id);
        let mut live = slot.turn().await;
        self.0.registry.set_stage(&branch.id, Stage::Deleting)?;
        crash_point("delete:intent");
        self.withdraw(branch);
        self.stop_in_turn(&slot, &mut live, StopMode::Immediate)
            .await?;
        self.erase(branch).await?;
        drop(live);
        self.drop_slot(&branch.id);
        info!(branch = %branch.name, "destroyed");
        Ok(DeletedBranch {
            name: branch.name.clone(),
            destroyed: true,
            expires_at: None,
        })
    }

    /// Takes a branch off every endpoint.
    fn withdraw(&self, branch: &BranchRecord) {
        self.hide(&branch.id);
        self.0.ports.close(&EndpointKey::Pinned(branch.id.clone()));
    }

    /// Removes what a branch left on disk, then its record. Its instance must not run.
    pub(super) async fn erase(&self, branch: &BranchRecord) -> Result<()> {
        let driver = self.driver(branch).await?;
        let volume = branch.volume.clone();
        blocking(move || Ok(driver.destroy(&volume)?)).await?;
        crash_point("delete:destroyed");
        let socket_dir = self.0.paths.instance_socket_dir(&branch.id);
        if let Err(e) = std::fs::remove_dir_all(&socket_dir)
            && e.kind() != std::io::ErrorKind::NotFound
        {
            warn!("remove {}: {e}", socket_dir.display());
        }
        let _ = std::fs::remove_file(self.0.paths.instance_log(&branch.id));
        self.0.registry.remove_branch(&branch.id)?;
        Ok(())
    }

    /// The branch of that name (or id) that came into the trash last.
    fn trashed(&self, project: &ProjectRecord, name: &BranchName) -> Result<Option<BranchRecord>> {
        let mut branches = self.0.registry.branches(&project.id)?;
        branches.retain(|b| {
            b.trashed_at.is_some()
                && b.stage == Stage::Ready
                && (b.name == *name || b.id.as_str() == name.as_str())
        });
        Ok(branches.into_iter().max_by_key(|b| b.trashed_at))
    }

    /// Brings a branch back from the trash, under another name if `rename_to` says so.
    pub async fn undelete(
        &self,
        location: &Location,
        name: &BranchName,
        rename_to: Option<&BranchName>,
    ) -> Result<BranchRecord> {
        let project = self.project_at(location)?;
        let branch = self.trashed(&project, name)?.ok_or_else(|| {
            EngineError::refused(format!("no branch `{name}` lies in the trash"))
                .hint("dbranch list --trash")
        })?;
        let name = rename_to.unwrap_or(&branch.name);
        if self.0.registry.branch_named(&project.id, name)?.is_some() {
            return Err(
                EngineError::refused(format!("there is a branch `{name}` again"))
                    .hint(format!("dbranch undelete {} --as OTHER-NAME", branch.id)),
            );
        }
        if *name != branch.name {
            self.0.registry.rename_branch(&branch.id, name)?;
        }
        self.0
            .registry
            .set_trashed(std::slice::from_ref(&branch.id), None)?;
        let branch = BranchRecord {
            name: name.clone(),
            trashed_at: None,
            ..branch
        };
        self.publish(&branch).await;
        info!(branch = %branch.name, "back from the trash");
        Ok(branch)
    }

    /// Forgets a project. Its branches go to the trash, or with `now` are destroyed.
    pub async fn delete_project(
        &self,
        location: &Location,
        now: bool,
    ) -> Result<(ProjectRecord, Vec<BranchName>)> {
        let mut project = self.project_at(location)?;
        let mut names = Vec::new();
        for branch in self.0.registry.branches(&project.id)? {
            if now || branch.trashed_at.is_none() {
                names.push(branch.name.clone());
                let engine = self.clone();
                self.detached(async move {
                    if now {
                        engine.destroy(&branch).await
                    } else {
                        engine.trash(&branch).await
                    }
                })
                .await?;
            }
        }
        self.0.ports.close(&Self::main_endpoint(&project));
        project.deleted_at = Some(SystemTime::now());
        self.0.registry.remove_endpoints(&project.id)?;
        self.0.registry.put_project(&project)?;
        self.remove_if_empty(&project)?;
        Self::unmark(&project.common_dir);
        info!(project = %project.name, "project deleted");
        Ok((project, names))
    }

    fn remove_if_empty(&self, project: &ProjectRecord) -> Result<()> {
        if project.deleted_at.is_some() && self.0.registry.branches(&project.id)?.is_empty() {
            self.0.registry.remove_project(&project.id)?;
            self.forget_secrets(&project.id);
        }
        Ok(())
    }

    /// Destroys what the trash has kept long enough.
    pub async fn empty_trash(&self) -> Result<()> {
        for project in self.0.registry.projects()? {
            for branch in self.0.registry.branches(&project.id)? {
                let old = branch
                    .trashed_at
                    .is_some_and(|at| at.elapsed().is_ok_and(|age| age > TRASH_KEEPS));
                if old {
                    let engine = self.clone();
                    self.detached(async move { engine.destroy(&branch).await })
                        .await?;
                }
            }
            self.remove_if_empty(&project)?;
        }
        Ok(())
    }

    /// Stops all instances; the number that ran.
    pub async fn stop_all(&self) -> Result<usize> {
        let mut stopped = 0;
        let ids: Vec<_> = super::lock(&self.0.slots).keys().cloned().collect();
        for id in ids {
            stopped += usize::from(self.stop(&id).await?);
        }
        Ok(stopped)
    }

    /// How many instances run.
    pub fn running(&self) -> usize {
        super::lock(&self.0.slots)
            .values()
            .filter(|s| matches!(s.state(), InstanceState::Running(_)))
            .count()
    }
}
