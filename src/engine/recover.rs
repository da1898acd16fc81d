//! Reconciling the record with what is found: at the daemon's start, and by `dbranch sync`.
//!
//! A branch that was being made is rolled back: nobody had seen it. One that was
//! being destroyed on the user's word is destroyed. Nothing else is ever deleted.

use std::collections::{HashMap, HashSet};
use std::path::PathBuf;
use std::time::{Duration, SystemTime};

use futures_util::future::join_all;
use tracing::{info, warn};

use super::follow::{Followed, Urge};
use super::{Engine, EngineError, Reporter, Result, blocking};
use crate::git::{self, Head, Location};
use crate::registry::{BranchRecord, ProjectRecord, Stage};
use crate::runtime::StopMode;
use crate::types::BranchId;

/// How long the daemon's start waits for what is recovered: less than a git hook waits for it.
const RECOVER_LIMIT: Duration = Duration::from_secs(4);

/// What reconciling did, or would do.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Reconciled {
    pub actions: Vec<String>,
    pub notes: Vec<String>,
}

impl Engine {
    /// Takes up where an earlier daemon left off. Trouble with one branch or project stops no other, and
    /// a disk that hangs holds the daemon up no longer than `RECOVER_LIMIT`: what was begun there is
    /// finished when it answers.
    pub async fn recover(&self) -> Result<()> {
        self.begin_sweeps()?;
        let engine = self.clone();
        let work = self.0.tasks.spawn(async move {
            let projects = engine.0.registry.projects()?;
            let recovered = projects
                .iter()
                .map(|project| engine.recover_project(project));
            join_all(recovered).await.into_iter().collect()
        });
        // Nobody waits for it, and removing a large volume takes its time.
        let engine = self.clone();
        self.0
            .tasks
            .spawn(async move { engine.finish_moves().await });
        let Ok(done) = tokio::time::timeout(RECOVER_LIMIT, work).await else {
            warn!("recovery goes on in the background: a disk is slow, or does not answer");
            return Ok(());
        };
        done.unwrap_or_else(|e| Err(EngineError::bug(format!("recovery broke off: {e}"))))
    }

    async fn recover_project(&self, project: &ProjectRecord) -> Result<()> {
        // First what needs no disk.
        if project.deleted_at.is_none() {
            self.restore_endpoints(project).await?;
            if let Err(e) = self.listen(project).await {
                warn!(project = %project.name, "{e}");
            }
        }
        for action in self.finish_what_was_begun(project, false).await? {
            info!("{action}");
        }
        if project.deleted_at.is_some() {
            // The daemon died while it deleted the project.
            let left: Vec<_> = self
                .live_branches(project)?
                .into_iter()
                .map(|b| b.id)
                .collect();
            self.0.registry.set_trashed(&left, SystemTime::now())?;
        }
        let branches = self.0.registry.branches(&project.id)?;
        let may_run = self.containers_of(project, &branches).await;
        join_all(branches.iter().map(|branch| {
            let is_docker = branch.server.runtime == "docker";
            let stopped = is_docker && may_run.as_ref().is_some_and(|m| !m.contains(&branch.id));
            self.take_up(branch, stopped)
        }))
        .await;
        Ok(())
    }

    /// Removes what interrupted calls of the drivers left half made or half destroyed. Nothing else is
    /// done in a pool before that is over.
    fn begin_sweeps(&self) -> Result<()> {
        let mut pools = HashMap::new();
        for project in self.0.registry.projects()? {
            for branch in self.0.registry.branches(&project.id)? {
                let drivers: &mut Vec<BranchRecord> = pools.entry(branch.pool.clone()).or_default();
                if !drivers.iter().any(|b| b.driver == branch.driver) {
                    drivers.push(branch);
                }
            }
        }
        self.0
            .sweeping
            .send_replace(pools.keys().cloned().collect());
        for (pool, drivers) in pools {
            let engine = self.clone();
            self.0.tasks.spawn(async move {
                for branch in drivers {
                    let swept = match engine.driver_unswept(&branch).await {
                        Ok(driver) => blocking(move || Ok(driver.sweep()?)).await,
                        Err(e) => Err(e),
                    };
                    match swept {
                        Ok(0) => {}
                        Ok(n) => info!(pool = %pool.display(), n, "removed half-made volumes"),
                        Err(e) => warn!(pool = %pool.display(), "sweep: {e}"),
                    }
                }
                engine.0.sweeping.send_modify(|pools| {
                    pools.remove(&pool);
                });
            });
        }
        Ok(())
    }

    /// Follows the HEAD of every project, in case it moved while no daemon ran.
    pub async fn follow_all(&self) {
        for project in self.0.registry.projects().unwrap_or_default() {
            if project.deleted_at.is_some() {
                continue;
            }
            match Location::from_git_dir(&project.common_dir) {
                Ok(location) => {
                    if let Err(e) = self.follow(&location, Urge::Hint, Reporter::log()).await {
                        warn!(project = %project.name, "follow HEAD: {e}");
                    }
                    if let Err(e) = self.follow_worktrees(&location.common_dir).await {
                        warn!(project = %project.name, "follow worktrees: {e}");
                    }
                }
                Err(e) => warn!(project = %project.name, "{e}"),
            }
        }
    }

    /// The branches that have a container: one question to Docker instead of one for each branch,
    /// of which there may be a thousand. None where each must be looked at.
    async fn containers_of(
        &self,
        project: &ProjectRecord,
        branches: &[BranchRecord],
    ) -> Option<HashSet<BranchId>> {
        let docker = branches.iter().find(|b| b.server.runtime == "docker")?;
        let (runtime, _) = self.runtime(&docker.server).await.ok()?;
        runtime.may_run(&project.id).await.ok()?
    }

    /// Finds a branch's instance, unless it is known to be `stopped`, and opens its port.
    async fn take_up(&self, branch: &BranchRecord, stopped: bool) {
        if branch.stage != Stage::Ready {
            return;
        }
        let adopted = if stopped {
            Ok(false)
        } else {
            self.adopt(branch).await
        };
        match adopted {
            // It was trashed, and the daemon died before its instance had stopped.
            Ok(true) if branch.trashed_at.is_some() => {
                if let Err(e) = self.stop(&branch.id).await {
                    warn!(branch = %branch.name, "stop: {e}");
                }
            }
            Ok(_) => {}
            Err(e) => warn!(branch = %branch.name, "look for its instance: {e}"),
        }
        if branch.trashed_at.is_none() {
            self.publish(branch).await;
        }
    }

    /// Rolls back what was being made, finishes what was being destroyed; says what.
    async fn finish_what_was_begun(
        &self,
        project: &ProjectRecord,
        dry_run: bool,
    ) -> Result<Vec<String>> {
        let mut actions = Vec::new();
        for branch in self.0.registry.branches(&project.id)? {
            let action = match branch.stage {
                Stage::Ready if dry_run => continue,
                Stage::Ready => {
                    self.drop_spares(&branch).await;
                    continue;
                }
                Stage::Creating => format!("roll back the half-made branch `{}`", branch.name),
                Stage::Deleting => format!("finish deleting branch `{}`", branch.name),
            };
            let slot = self.slot(&branch.id);
            if !dry_run {
                // Whoever is making it right now holds its turn, and leaves it finished.
                let mut live = slot.turn().await;
                let still = self
                    .0
                    .registry
                    .branch(&branch.id)?
                    .is_some_and(|b| b.stage == branch.stage);
                if !still {
                    continue;
                }
                if let Err(e) = self.find_and_stop(&branch, &slot, &mut live).await {
                    warn!(branch = %branch.name, "{action}: {e}");
                    continue;
                }
                if !self.undo(&slot, &mut live, &branch).await {
                    continue;
                }
            }
            actions.push(action);
        }
        Ok(actions)
    }

    async fn find_and_stop(
        &self,
        branch: &BranchRecord,
        slot: &super::instances::Slot,
        live: &mut super::instances::Live,
    ) -> Result<()> {
        if !live.is_running() {
            let project = self.project_of(branch)?;
            let (runtime, spec) = self.instance_spec(&project, branch).await?;
            if let Some(instance) = runtime.find(&spec).await? {
                runtime.stop(&spec, &instance, StopMode::Immediate).await?;
            }
        }
        self.stop_in_turn(slot, live, StopMode::Immediate).await?;
        Ok(())
    }

    /// Reconciles a project with git, storage and runtime by the user's word.
    pub async fn sync(
        &self,
        location: &Location,
        dry_run: bool,
        to: Reporter,
    ) -> Result<Reconciled> {
        let project = self.project_at(location)?;
        let mut found = Reconciled {
            actions: self.finish_what_was_begun(&project, dry_run).await?,
            notes: Vec::new(),
        };
        if dry_run {
            self.foresee(&project, location, &mut found)?;
        } else {
            self.listen(&project).await?;
            let followed = self.follow(location, Urge::Word, to).await?;
            found.actions.extend(say(&followed));
            found.notes.extend(followed.notes);
        }
        if !dry_run {
            found.actions.extend(self.finish_moves().await);
        }
        let live = self.live_branches(&project)?;
        for branch in &live {
            if !git::branch_exists(&location.common_dir, &branch.name)?
                && git::head(&location.git_dir).ok() != Some(Head::Unborn(branch.name.clone()))
            {
                found.notes.push(format!(
                    "git has no branch `{0}` (any more); its database stays until `dbranch delete {0}`",
                    branch.name
                ));
            }
        }
        for stranger in self.strangers_in_pools(&project).await? {
            found.notes.push(format!(
                "{} is a volume that no branch knows; it is left alone",
                stranger.display()
            ));
        }
        Ok(found)
    }

    fn foresee(
        &self,
        project: &ProjectRecord,
        location: &Location,
        found: &mut Reconciled,
    ) -> Result<()> {
        if let Some(operation) = git::operation(&location.git_dir) {
            found.notes.push(format!(
                "git is in the middle of a {operation:?}: HEAD is not followed"
            ));
            return Ok(());
        }
        let name = match git::head(&location.git_dir)? {
            Head::Branch(name) | Head::Unborn(name) => name,
            Head::Detached(_) => {
                found
                    .notes
                    .push("HEAD is detached: the database stays where it is".into());
                return Ok(());
            }
        };
        if !Self::config(project)?.matches(&name) {
            return Ok(());
        }
        match self.0.registry.branch_named(&project.id, &name)? {
            None => match self.find_parent(project, location, &name)? {
                Some(parent) => {
                    found
                        .actions
                        .push(format!("create branch `{name}` from `{}`", parent.name));
                    found.actions.push(format!("switch to `{name}`"));
                }
                None => found
                    .notes
                    .push("no database branch yet: run `dbranch init-postgres`".into()),
            },
            Some(branch) => {
                let shown = self
                    .endpoint_record(&Self::endpoint_at(project, location))?
                    .and_then(|r| r.branch);
                if shown.as_ref() != Some(&branch.id) {
                    found.actions.push(format!("switch to `{name}`"));
                }
            }
        }
        Ok(())
    }

    /// Volumes that no record knows. They may be somebody's data, so they are only named.
    pub(super) async fn strangers_in_pools(&self, project: &ProjectRecord) -> Result<Vec<PathBuf>> {
        let mut found = Vec::new();
        let mut pools = HashSet::new();
        for branch in self.0.registry.branches(&project.id)? {
            if !pools.insert(branch.pool.clone()) {
                continue;
            }
            let driver = self.driver(&branch).await?;
            let listed = blocking(move || Ok(driver.list()?)).await?;
            found.extend(listed.into_iter().map(|v| (branch.pool.clone(), v)));
        }
        // After the volumes: one that was made meanwhile was recorded before.
        let mut known = HashSet::new();
        for other in self.0.registry.projects()? {
            let branches = self.0.registry.branches(&other.id)?;
            known.extend(branches.into_iter().map(|b| b.volume));
        }
        let spares = self.0.registry.spare_volumes()?;
        known.extend(spares.into_iter().map(|(volume, _)| volume));
        let moves = self.0.registry.moves()?;
        known.extend(moves.into_iter().map(|m| m.remove.volume));
        found.retain(|(_, volume)| !known.contains(volume));
        Ok(found
            .into_iter()
            .map(|(pool, volume)| pool.join(volume.as_str()))
            // One that was destroyed meanwhile is gone from both.
            .filter(|path| path.exists())
            .collect())
    }
}

fn say(followed: &Followed) -> Vec<String> {
    let mut actions = Vec::new();
    if let Some((old, new)) = &followed.renamed {
        actions.push(format!("renamed branch `{old}` to `{new}`"));
    }
    if let Some(created) = &followed.created {
        actions.push(match &created.parent {
            Some(parent) => format!(
                "created branch `{}` from `{parent}` ({})",
                created.branch.name, created.method
            ),
            None => format!(
                "created branch `{}` ({})",
                created.branch.name, created.method
            ),
        });
    }
    if let Some(switched) = followed.switched.as_ref().filter(|s| s.changed) {
        actions.push(format!("switched to `{}`", switched.branch.name));
    }
    actions
}
