//! Moving a project's branches to another pool or driver.
//!
//! ```text
//!   record the new volume ─> make it ─> bring the data over ─> stop ─> bring the rest over,
//!        │                             while the branch runs              compare, sync
//!        │                                                                    │
//!        └── whatever fails until here: the new volume is removed <───────────┤
//!                                                                   turn: one transaction
//!        ┌── from here on: the old volume is removed <────────────────────────┤
//!        v                                                                  start
//!   (the record of the volume to be removed goes last)
//! ```
//!
//! The registry names, for each branch under way, the one volume that is not to stay. Whenever
//! the daemon dies, removing that volume is all there is to mend. Parents go before children, so
//! that a child's new volume can be a clone of its parent's and only what differs is written.

mod branch;
mod plan;

use std::collections::HashSet;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::time::Duration;

use tracing::{info, warn};

use self::plan::Plan;
use super::{Engine, EngineError, Reporter, Result, blocking};
use crate::git::Location;
use crate::registry::{BranchRecord, Place, ProjectRecord, Stage};
use crate::storage::{self, Choice, StorageDriver};
use crate::types::{BranchId, BranchName, Invalid, VolumeId};

/// Where to. What is `None` comes from the machine's settings as they are now.
#[derive(Debug, Clone, Default)]
pub struct MoveRequest {
    pub pool: Option<PathBuf>,
    /// `auto`, or a driver's name.
    pub driver: Option<String>,
    /// Only tell what would be done.
    pub dry_run: bool,
}

/// What was moved, or would be.
#[derive(Debug, Clone)]
pub struct Moved {
    pub pool: PathBuf,
    /// The storage driver's name.
    pub driver: String,
    pub branches: Vec<MovedBranch>,
    /// Branches that could not be reached, and why.
    pub left: Vec<(BranchRecord, String)>,
    /// Room that the move is likely to take, and what was free before it.
    pub needed_bytes: u64,
    pub free_bytes: u64,
    pub dry_run: bool,
}

/// A branch that was moved, or would be.
#[derive(Debug, Clone)]
pub struct MovedBranch {
    pub record: BranchRecord,
    /// Where it was before.
    pub from: Place,
    /// All it has, shared or not.
    pub bytes: u64,
    /// What had to be written, or is likely to.
    pub written_bytes: u64,
    /// The branch whose blocks it shares in its new place.
    pub base: Option<BranchName>,
    /// How long it was not served. None if it didn't run.
    pub stood_still: Option<Duration>,
}

/// One move of a project.
#[derive(Debug, Clone)]
struct Mover {
    engine: Engine,
    project: ProjectRecord,
    target: Arc<dyn StorageDriver>,
    to: Reporter,
    done_bytes: Arc<AtomicU64>,
    total_bytes: Arc<AtomicU64>,
}

impl Engine {
    /// Moves all branches of a project, those in its trash too, and ends when all are moved.
    /// Broken off, it is taken up by the next call.
    pub async fn move_storage(
        &self,
        location: &Location,
        request: MoveRequest,
        to: Reporter,
    ) -> Result<Moved> {
        let project = self.project_at(location)?;
        let engine = self.clone();
        self.detached(async move { engine.move_in_task(project, &request, to).await })
            .await
    }

    async fn move_in_task(
        &self,
        project: ProjectRecord,
        request: &MoveRequest,
        to: Reporter,
    ) -> Result<Moved> {
        let turn = self.0.relocating.clone();
        let _turn = match turn.clone().try_lock_owned() {
            Ok(turn) => Some(turn),
            // Looking disturbs nobody.
            Err(_) if request.dry_run => None,
            Err(_) => {
                to.notice("branches are being moved already: waiting for that");
                Some(turn.lock_owned().await)
            }
        };
        let (target, is_new) = self.target(request).await?;
        let mover = Mover {
            engine: self.clone(),
            project,
            target,
            to,
            done_bytes: Arc::default(),
            total_bytes: Arc::default(),
        };
        if request.dry_run {
            let plan = mover.plan().await;
            if is_new {
                // Without a trace. A folder that has something in it stays.
                let _ = std::fs::remove_dir(mover.target.pool());
            }
            return Ok(plan?.into_answer(&mover, true));
        }
        for action in self.finish_moves_in_turn().await {
            mover.to.notice(action);
        }
        self.refuse_to_move_into_a_volume(mover.target.pool())?;
        let plan = mover.plan().await?;
        plan.must_fit(&mover)?;
        if plan.branches.is_empty() {
            return Ok(plan.into_answer(&mover, false));
        }
        self.mark_pool(mover.target.pool()).await?;
        if let Some(advice) = mover.target.advice() {
            mover.to.notice(advice);
        }
        mover.run(plan).await
    }

    /// Opens the pool to move to; true if its folder was made for that.
    async fn target(&self, request: &MoveRequest) -> Result<(Arc<dyn StorageDriver>, bool)> {
        // As the settings are by now, not as they were at the daemon's start.
        let machine = self.reload_machine()?;
        let word = request.driver.as_ref().unwrap_or(&machine.storage.value);
        let choice: Choice = word
            .parse()
            .map_err(|e: Invalid| EngineError::config(e.to_string()).hint("--driver auto"))?;
        let pool = request
            .pool
            .clone()
            .or(machine.pool.value)
            .unwrap_or_else(|| self.0.paths.default_pool().to_owned());
        self.may_become_a_pool(&pool)?;
        let is_new = !pool.exists();
        let opened = if request.dry_run {
            // Not kept: its folder may go again.
            let owner = self.0.owner;
            blocking(move || Ok(storage::open(choice, &pool, owner)?)).await
        } else {
            self.open_pool(choice, &pool).await
        };
        match opened {
            Ok(driver) => Ok((driver, is_new)),
            Err(mut e) => {
                e.message = format!("nothing was moved: {}", e.message);
                e.hint
                    .get_or_insert_with(|| "name another folder with --to DIR".into());
                Err(e)
            }
        }
    }

    /// What lies in a volume goes with it.
    fn refuse_to_move_into_a_volume(&self, pool: &Path) -> Result<()> {
        for project in self.0.registry.projects()? {
            for branch in self.0.registry.branches(&project.id)? {
                if pool.starts_with(branch.pool.join(branch.volume.as_str())) {
                    return Err(EngineError::refused(format!(
                        "nothing was moved: {} lies in the data of branch `{}`",
                        pool.display(),
                        branch.name
                    ))
                    .hint("name another folder with --to DIR"));
                }
            }
        }
        Ok(())
    }

    /// Removes the volumes that moves which were cut short have left, and says which.
    pub(super) async fn finish_moves(&self) -> Vec<String> {
        // A move under way looks after its own.
        match self.0.relocating.clone().try_lock_owned() {
            Ok(_turn) => self.finish_moves_in_turn().await,
            Err(_) => Vec::new(),
        }
    }

    async fn finish_moves_in_turn(&self) -> Vec<String> {
        let mut actions = Vec::new();
        for left in self.0.registry.moves().unwrap_or_default() {
            let branch = self.0.registry.branch(&left.branch).ok().flatten();
            let pool = left.remove.pool.display().to_string();
            let action = match &branch {
                Some(b) => format!("removed what a move of `{}` had left in {pool}", b.name),
                None => format!("removed what a move had left in {pool}"),
            };
            match self.remove_moved(&left.remove).await {
                Ok(()) => {
                    info!("{action}");
                    actions.push(action);
                }
                Err(e) => warn!(pool, volume = %left.remove.volume, "finish a move: {e}"),
            }
        }
        actions
    }

    /// Removes the volume that a move has left over, then its record.
    async fn remove_moved(&self, place: &Place) -> Result<()> {
        if self.0.registry.holds_data(&place.volume)? {
            return Err(EngineError::bug(format!(
                "volume {} holds a branch's data and is not removed",
                place.volume
            )));
        }
        let driver = self.driver_at(place).await?;
        let volume = place.volume.clone();
        blocking(move || Ok(driver.destroy(&volume)?)).await?;
        super::crash_point("move:removed");
        self.0.registry.end_move(&place.volume)?;
        Ok(())
    }
}

impl Mover {
    /// Where a volume of the target would lie.
    fn place(&self, volume: VolumeId) -> Place {
        Place {
            volume,
            driver: self.target.kind().to_string(),
            pool: self.target.pool().to_owned(),
        }
    }

    fn has(&self, branch: &BranchRecord) -> bool {
        branch.lies_in(self.target.pool(), self.target.kind().as_str())
    }

    /// Moves one branch after the other, until none is left elsewhere.
    async fn run(&self, plan: Plan) -> Result<Moved> {
        let all = plan.branches.len();
        let mut answer = plan.into_answer(self, false);
        let mut tried: HashSet<_> = answer.left.iter().map(|(b, _)| b.id.clone()).collect();
        answer.branches.clear();
        while let Some(branch) = self.next(&tried)? {
            if branch.stage != Stage::Ready {
                // Made from a parent that was not moved yet. What nobody is making any more is
                // not looked at twice.
                drop(self.engine.slot(&branch.id).turn().await);
                let now = self.engine.0.registry.branch(&branch.id)?;
                if now.is_some_and(|b| b.stage != Stage::Ready) {
                    tried.insert(branch.id);
                }
                continue;
            }
            tried.insert(branch.id.clone());
            let what = format!(
                "moving {} ({} of {})",
                branch.name,
                answer.branches.len() + 1,
                all.max(answer.branches.len() + 1)
            );
            match self.move_branch(&branch, &what).await {
                Ok(Some(moved)) => answer.branches.push(moved),
                // It is gone, or was cut again meanwhile.
                Ok(None) => drop(tried.remove(&branch.id)),
                Err(mut e) => {
                    e.message = format!(
                        "branch `{}` was not moved: {} ({} of {all} branches are in {})",
                        branch.name,
                        e.message,
                        answer.branches.len(),
                        self.target.pool().display()
                    );
                    e.hint
                        .get_or_insert_with(|| "dbranch storage move takes it up again".into());
                    return Err(e);
                }
            }
        }
        info!(project = %self.project.name, pool = %answer.pool.display(), driver = answer.driver,
            branches = answer.branches.len(), "moved");
        Ok(answer)
    }

    fn branches(&self) -> Result<Vec<BranchRecord>> {
        Ok(self.engine.0.registry.branches(&self.project.id)?)
    }

    /// The oldest branch that is not there yet: parents are older than their children.
    fn next(&self, tried: &HashSet<BranchId>) -> Result<Option<BranchRecord>> {
        Ok(self
            .branches()?
            .into_iter()
            .find(|b| b.stage != Stage::Deleting && !self.has(b) && !tried.contains(&b.id)))
    }

    /// The branch there that a branch has most in common with: its nearest ancestor, else the
    /// youngest, as all branches of a project have one root.
    fn base<'a>(&self, branch: &BranchRecord, all: &'a [BranchRecord]) -> Option<&'a BranchRecord> {
        nearest(branch, all, |b| self.has(b))
    }
}

/// The branch among those that are `usable` which a branch has most in common with.
fn nearest<'a>(
    branch: &BranchRecord,
    all: &'a [BranchRecord],
    usable: impl Fn(&BranchRecord) -> bool,
) -> Option<&'a BranchRecord> {
    let usable = |b: &BranchRecord| b.stage == Stage::Ready && b.id != branch.id && usable(b);
    let mut ancestor = branch.parent.as_ref();
    // No further than there are branches, whatever the record says.
    for _ in 0..all.len() {
        let Some(found) = ancestor.and_then(|id| all.iter().find(|b| b.id == *id)) else {
            break;
        };
        if usable(found) {
            return Some(found);
        }
        ancestor = found.parent.as_ref();
    }
    all.iter().rev().find(|b| usable(b))
}
