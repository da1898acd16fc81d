//! What a move would do, and whether there is room for it.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use super::{Moved, MovedBranch, Mover, nearest};
use crate::engine::create::human_bytes;
use crate::engine::{EngineError, Result, blocking};
use crate::postgres;
use crate::registry::{BranchRecord, Stage};
use crate::storage::{self, Estimate, StorageDriver};
use crate::types::BranchName;

/// What must stay free: postgres that finds a full disk stops.
const MARGIN_BYTES: u64 = 64 << 20;

/// The branches to be moved, in order.
#[derive(Debug)]
pub(super) struct Plan {
    pub(super) branches: Vec<Planned>,
    left: Vec<(BranchRecord, String)>,
    free_bytes: u64,
}

#[derive(Debug)]
pub(super) struct Planned {
    record: BranchRecord,
    base: Option<BranchName>,
    estimate: Estimate,
}

impl Mover {
    /// Looks at all branches that are not where they shall be.
    pub(super) async fn plan(&self) -> Result<Plan> {
        let all = self.branches()?;
        let mut plan = Plan {
            branches: Vec::new(),
            left: Vec::new(),
            free_bytes: 0,
        };
        for branch in &all {
            if branch.stage != Stage::Ready || self.has(branch) {
                continue;
            }
            match self.look_at(branch, &all).await {
                Ok(planned) => plan.branches.push(planned),
                Err(e) => plan.left.push((branch.clone(), e.message)),
            }
        }
        let total = plan.branches.iter().map(|p| p.estimate.all_bytes).sum();
        self.total_bytes.store(total, Ordering::Relaxed);
        let target = self.target.clone();
        plan.free_bytes = blocking(move || Ok(target.space()?)).await?.free_bytes;
        Ok(plan)
    }

    /// The volume of a branch, with all that is in it: where volumes are mounts, an empty folder
    /// may stand in the place of one.
    pub(super) async fn whole_source(&self, branch: &BranchRecord) -> Result<PathBuf> {
        let (driver, volume) = (self.engine.driver(branch).await?, branch.volume.clone());
        blocking(move || {
            driver.make_reachable(&volume)?;
            let path = driver.volume_path(&volume);
            let data_dir = crate::engine::data_dir(&path);
            postgres::major(&data_dir)?;
            postgres::refuse_external(&data_dir)?;
            Ok(path)
        })
        .await
    }

    async fn look_at(&self, branch: &BranchRecord, all: &[BranchRecord]) -> Result<Planned> {
        let path = self.whole_source(branch).await?;
        // Those that are there by then: all that are older, and what is there already.
        let base = nearest(branch, all, |b| self.has(b) || is_older(b, branch))
            .filter(|_| self.target.shares_blocks());
        let base_path = match base {
            Some(base) => self
                .engine
                .driver(base)
                .await
                .ok()
                .map(|driver| driver.volume_path(&base.volume)),
            None => None,
        };
        let (target, from) = (self.target.clone(), path.clone());
        let estimate = blocking(move || {
            if shares_with(&from, &target) {
                let all = storage::estimate(&from, None)?;
                return Ok(Estimate {
                    own_bytes: 0,
                    ..all
                });
            }
            Ok(storage::estimate(&from, base_path.as_deref())?)
        })
        .await?;
        Ok(Planned {
            record: branch.clone(),
            base: base.map(|b| b.name.clone()),
            estimate,
        })
    }
}

fn is_older(one: &BranchRecord, other: &BranchRecord) -> bool {
    (one.created_at, &one.id) < (other.created_at, &other.id)
}

/// Whether files of a volume can share their blocks with files of the target, as both lie in one
/// file system. No clone is needed then, nor any room.
pub(super) fn shares_with(volume: &std::path::Path, target: &Arc<dyn StorageDriver>) -> bool {
    let version: PathBuf = crate::engine::data_dir(volume).join("PG_VERSION");
    storage::can_share(&version, target.pool())
}

impl Plan {
    fn needed_bytes(&self) -> u64 {
        self.branches.iter().map(|p| p.estimate.own_bytes).sum()
    }

    /// Refuses a move that there is likely no room for.
    pub(super) fn must_fit(&self, mover: &Mover) -> Result<()> {
        let needed = self.needed_bytes();
        // Folders and block maps beside the data.
        let with_margin = needed
            .saturating_add(needed / 100)
            .saturating_add(MARGIN_BYTES);
        if self.branches.is_empty() || with_margin <= self.free_bytes {
            return Ok(());
        }
        Err(EngineError::refused(format!(
            "not enough room in {}: about {} needed, {} free; nothing was moved",
            mover.target.pool().display(),
            human_bytes(with_margin),
            human_bytes(self.free_bytes)
        ))
        .hint(
            "free some room there, delete branches that are not needed (dbranch usage), or name \
             another folder with --to DIR",
        ))
    }

    pub(super) fn into_answer(self, mover: &Mover, dry_run: bool) -> Moved {
        Moved {
            needed_bytes: self.needed_bytes(),
            pool: mover.target.pool().to_owned(),
            driver: mover.target.kind().to_string(),
            branches: self
                .branches
                .into_iter()
                .map(|planned| MovedBranch {
                    from: planned.record.place(),
                    record: planned.record,
                    bytes: planned.estimate.all_bytes,
                    written_bytes: planned.estimate.own_bytes,
                    base: planned.base,
                    stood_still: None,
                })
                .collect(),
            left: self.left,
            free_bytes: self.free_bytes,
            dry_run,
        }
    }
}
