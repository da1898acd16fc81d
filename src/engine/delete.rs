//! Letting go of branches: into the trash, back out of it, or for good.

use std::path::PathBuf;
use std::time::{Duration, SystemTime};

use futures_util::future::join_all;
use tracing::{info, warn};

use super::instances::{InstanceState, Live, Slot};
use super::{EndpointKey, Engine, EngineError, Result, blocking, crash_point};
use crate::git::{self, Head, Location};
use crate::registry::{BranchRecord, ProjectRecord, Stage};
use crate::runtime::StopMode;
use crate::types::{BranchName, ProjectId};

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
            self.refuse_if_used(location, &branch)?;
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

    fn refuse_if_used(&self, location: &Location, branch: &BranchRecord) -> Result<()> {
        let sessions = self.slot(&branch.id).sessions();
        let why = if let Some(worktree) = linked_worktree_on(location, &branch.name) {
            format!("it is checked out in {}", worktree.display())
        } else if self.shown_anywhere(&branch.id) {
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
        let current = self.0.registry.branch(&branch.id)?;
        let Some(current) = current.filter(|b| b.stage == Stage::Ready) else {
            return Err(
                EngineError::refused(format!("branch `{}` is gone", branch.name))
                    .hint("dbranch list"),
            );
        };
        crash_point("trash:intent");
        let at = current.trashed_at.unwrap_or_else(SystemTime::now);
        self.0
            .registry
            .set_trashed(std::slice::from_ref(&branch.id), at)?;
        self.withdraw(branch);
        self.stop_in_turn(&slot, &mut live, StopMode::Fast).await?;
        info!(branch = %branch.name, "moved to the trash");
        Ok(DeletedBranch {
            name: branch.name.clone(),
            destroyed: false,
            expires_at: Some(at + TRASH_KEEPS),
        })
    }

    /// Destroys a branch on the user's explicit word.
    pub(super) async fn destroy(&self, branch: &BranchRecord) -> Result<DeletedBranch> {
        let slot = self.slot(&branch.id);
        let mut live = slot.turn().await;
        self.destroy_in_turn(&slot, &mut live, branch).await
    }

    /// Destroys a branch that the trash has kept long enough, unless it was taken out meanwhile.
    async fn destroy_if_old(&self, branch: &BranchRecord) -> Result<()> {
        let slot = self.slot(&branch.id);
        let mut live = slot.turn().await;
        if self
            .0
            .registry
            .branch(&branch.id)?
            .is_some_and(|b| is_old(&b))
        {
            self.destroy_in_turn(&slot, &mut live, branch).await?;
        }
        Ok(())
    }

    async fn destroy_in_turn(
        &self,
        slot: &Slot,
        live: &mut Live,
        branch: &BranchRecord,
    ) -> Result<DeletedBranch> {
        // It may have been moved since.
        let current = self.0.registry.branch(&branch.id)?;
        let branch = current.as_ref().unwrap_or(branch);
        // What can't be reached or destroyed now is refused before anything changes.
        let (driver, volume) = (self.driver(branch).await?, branch.volume.clone());
        blocking(move || Ok(driver.check_destroy(&volume)?)).await?;
        self.0.registry.set_stage(&branch.id, Stage::Deleting)?;
        crash_point("delete:intent");
        self.withdraw(branch);
        self.stop_in_turn(slot, live, StopMode::Immediate).await?;
        if let Err(e) = self.erase(branch).await {
            // A disk that lets nothing be destroyed: what is whole stays a branch.
            if self.volume(branch)?.exists() {
                self.0.registry.set_stage(&branch.id, Stage::Ready)?;
                if branch.trashed_at.is_none() {
                    self.publish(branch).await;
                }
            }
            return Err(e.about_pool(&branch.pool).or_hint("dbranch doctor"));
        }
        self.drop_slot(&branch.id);
        info!(branch = %branch.name, "destroyed");
        Ok(DeletedBranch {
            name: branch.name.clone(),
            destroyed: true,
            expires_at: None,
        })
    }

    /// Takes a branch off every endpoint.
    pub(super) fn withdraw(&self, branch: &BranchRecord) {
        self.hide(&branch.id);
        self.0.ports.close(&EndpointKey::Pinned(branch.id.clone()));
    }

    /// Removes what a branch left on disk, then its record. Its instance must not run.
    pub(super) async fn erase(&self, branch: &BranchRecord) -> Result<()> {
        let current = self.0.registry.branch(&branch.id)?;
        let branch = current.as_ref().unwrap_or(branch);
        let driver = self.driver(branch).await?;
        self.destroy_spares(&branch.id, &driver).await?;
        // Not the one that the caller saw: a fresh branch may have been given another since.
        let current = self.0.registry.branch(&branch.id)?;
        let volume = current.map_or_else(|| branch.volume.clone(), |b| b.volume);
        blocking(move || Ok(driver.destroy(&volume)?)).await?;
        crash_point("delete:destroyed");
        self.drop_record(branch)
    }

    /// Removes a branch's record, and what lies of it outside its volume.
    pub(super) fn drop_record(&self, branch: &BranchRecord) -> Result<()> {
        let socket_dir = self.0.paths.instance_socket_dir(&branch.id);
        if let Err(e) = std::fs::remove_dir_all(&socket_dir)
            && e.kind() != std::io::ErrorKind::NotFound
        {
            warn!("remove {}: {e}", socket_dir.display());
        }
        for log in [
            self.0.paths.instance_log(&branch.id),
            self.0.paths.commands_log(&branch.id),
        ] {
            let _ = std::fs::remove_file(log);
        }
        self.0.registry.remove_branch(&branch.id)?;
        Ok(())
    }

    /// The branch of that name (or id) that came into the trash last.
    pub(super) fn trashed(
        &self,
        project: &ProjectRecord,
        name: &BranchName,
    ) -> Result<Option<BranchRecord>> {
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
        let none = || {
            EngineError::refused(format!("no branch `{name}` lies in the trash"))
                .hint("dbranch list --trash")
        };
        let branch = self.trashed(&project, name)?.ok_or_else(none)?;
        let slot = self.slot(&branch.id);
        // It may be destroyed just now.
        let _live = slot.turn().await;
        let still = self.0.registry.branch(&branch.id)?;
        if !still.is_some_and(|b| b.stage == Stage::Ready && b.trashed_at.is_some()) {
            return Err(none());
        }
        let name = rename_to.unwrap_or(&branch.name);
        if self.0.registry.branch_named(&project.id, name)?.is_some() {
            return Err(
                EngineError::refused(format!("there is a branch `{name}` again"))
                    .hint(format!("dbranch undelete {} --as OTHER-NAME", branch.id)),
            );
        }
        self.0.registry.untrash(&branch.id, name)?;
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
        let project = self.project_at(location)?;
        let (engine, gone) = (self.clone(), project.clone());
        let names = self
            .detached(async move { engine.delete_project_in_task(&gone, now).await })
            .await?;
        Ok((project, names))
    }

    async fn delete_project_in_task(
        &self,
        project: &ProjectRecord,
        now: bool,
    ) -> Result<Vec<BranchName>> {
        // First of all, so that no branch is made behind our back.
        self.0
            .registry
            .change_project(&project.id, |p| p.deleted_at = Some(SystemTime::now()))?;
        self.close_endpoints(project);
        let mut names = Vec::new();
        for branch in self.0.registry.branches(&project.id)? {
            if now {
                self.destroy(&branch).await?;
            } else if branch.trashed_at.is_none() {
                self.trash(&branch).await?;
            } else {
                continue;
            }
            names.push(branch.name);
        }
        self.0.registry.remove_endpoints(&project.id)?;
        self.remove_if_empty(&project.id)?;
        Self::unmark(&project.common_dir);
        info!(project = %project.name, "project deleted");
        Ok(names)
    }

    fn remove_if_empty(&self, project: &ProjectId) -> Result<()> {
        if self.0.registry.remove_project(project)? {
            self.forget_secrets(project);
        }
        Ok(())
    }

    /// Destroys what the trash has kept long enough. Trouble with one branch keeps no other.
    pub async fn empty_trash(&self) -> Result<()> {
        for project in self.0.registry.projects()? {
            for branch in self.0.registry.branches(&project.id)? {
                if !is_old(&branch) {
                    continue;
                }
                let (engine, old) = (self.clone(), branch.clone());
                let destroyed = self.detached(async move { engine.destroy_if_old(&old).await });
                if let Err(e) = destroyed.await {
                    warn!(branch = %branch.name, "empty the trash: {e}");
                }
            }
            self.remove_if_empty(&project.id)?;
        }
        Ok(())
    }

    /// Stops all instances; the number that ran.
    pub async fn stop_all(&self) -> usize {
        let ids: Vec<_> = super::lock(&self.0.slots).keys().cloned().collect();
        let stopped = ids.iter().map(|id| async move {
            self.stop(id).await.unwrap_or_else(|e| {
                warn!(branch = %id, "stop: {e}");
                false
            })
        });
        let stopped = join_all(stopped).await;
        stopped.into_iter().filter(|ran| *ran).count()
    }

    /// How many instances run.
    pub fn running(&self) -> usize {
        super::lock(&self.0.slots)
            .values()
            .filter(|s| matches!(s.state(), InstanceState::Running(_)))
            .count()
    }
}

/// Whether the trash has kept a branch long enough. A clock that goes backwards makes nothing old.
fn is_old(branch: &BranchRecord) -> bool {
    branch
        .trashed_at
        .is_some_and(|at| at.elapsed().is_ok_and(|age| age > TRASH_KEEPS))
}

/// The linked worktree that has a branch checked out. Its connections reach that branch.
fn linked_worktree_on(location: &Location, name: &BranchName) -> Option<PathBuf> {
    let worktrees = git::worktrees(&location.common_dir).ok()?;
    worktrees
        .into_iter()
        .filter(Location::is_linked_worktree)
        .find(|w| git::head(&w.git_dir).ok() == Some(Head::Branch(name.clone())))?
        .worktree
}
