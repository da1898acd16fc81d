//! Making a fresh clone small: it is cut again behind a checkpoint of its parent.
//!
//! Git waits for the first cut only. Before the clone's first start, in the background:
//!
//! ```text
//!   first cut, shown ──> parent: CHECKPOINT ──> second cut ──> the same data? ──> takes its place
//!                  \── the parent writes on, stops, is busy ──────────\── no ──> starts as it is
//! ```
//!
//! Both are right; the first would replay what its parent wrote since its last checkpoint, and
//! own that. What "the same" rests on stands in `postgres/twin.rs`. The volume that
//! loses is recorded as a spare before it is made, and destroyed whatever happens.

use std::sync::Arc;
use std::time::Duration;

use tracing::{debug, info, warn};

use super::instances::Slot;
use super::{Engine, EngineError, Result, blocking, crash_point, data_dir};
use crate::postgres::{self, Cut};
use crate::registry::{BranchRecord, Stage};
use crate::storage::{Omit, StorageDriver};
use crate::types::{BranchId, VolumeId};

/// How long a checkpoint may keep a start waiting that is right without it.
const CHECKPOINT_LIMIT: Duration = Duration::from_secs(10);

/// What a fresh clone was cut from.
#[derive(Debug)]
pub(super) struct Origin {
    parent: BranchId,
    volume: VolumeId,
}

impl Engine {
    /// Remembers that a clone of a running parent may be cut again before its first start.
    pub(super) async fn recut_later(&self, child: &BranchRecord, parent: &BranchRecord) {
        *self.slot(&child.id).fresh.lock().await = Some(Origin {
            parent: parent.id.clone(),
            volume: parent.volume.clone(),
        });
    }

    /// Cuts a fresh clone again if that pays and the outcome is the same. Every start comes through
    /// here, so whoever needs the branch meanwhile waits as for a start.
    pub(super) async fn recut(&self, slot: &Slot, id: &BranchId) {
        let mut fresh = slot.fresh.lock().await;
        let Some(origin) = fresh.take() else {
            return;
        };
        match self.try_recut(slot, id, &origin).await {
            Ok(None) => {}
            Ok(Some(why)) => debug!(branch = %id, "not cut again: {why}"),
            Err(e) => warn!(branch = %id, "cut again behind a checkpoint: {e}"),
        }
    }

    /// None when it was done, else why it was not.
    async fn try_recut(
        &self,
        slot: &Slot,
        id: &BranchId,
        origin: &Origin,
    ) -> Result<Option<String>> {
        let Some((child, parent)) = self.still_fresh(id, origin)? else {
            return Ok(Some("it or its parent has changed".into()));
        };
        let driver = self.driver(&child).await?;
        let first = data_dir(&driver.volume_path(&child.volume));
        let cut = match blocking(move || Ok(Cut::of(&first))).await? {
            Ok(cut) if cut.checkpoint_pays() => cut,
            Ok(_) => return Ok(Some("little to replay".into())),
            Err(e) => return Ok(Some(e.to_string())),
        };
        // No lock is held meanwhile: it may take long, and other branches be cut from either.
        let checkpoint = self.checkpoint_if_quiet(&parent, &cut);
        match tokio::time::timeout(CHECKPOINT_LIMIT, checkpoint).await {
            Ok(Ok(true)) => {}
            Ok(Ok(false)) => return Ok(Some("its parent writes on".into())),
            Ok(Err(e)) => return Ok(Some(e.message)),
            Err(_) => return Ok(Some("the checkpoint takes too long".into())),
        }
        let live = slot.turn().await;
        let Some((child, _)) = self.still_fresh(id, origin)?.filter(|_| !live.is_running()) else {
            return Ok(Some("it or its parent has changed".into()));
        };
        let spare = VolumeId::random();
        self.0.registry.add_spare_volume(&spare, id)?;
        crash_point("recut:intent");
        let outcome = self.cut_again(&child, origin, &driver, cut, &spare).await;
        crash_point("recut:decided");
        // The one or the other.
        self.destroy_spares(id, &driver).await?;
        outcome
    }

    async fn cut_again(
        &self,
        child: &BranchRecord,
        origin: &Origin,
        driver: &Arc<dyn StorageDriver>,
        cut: Cut,
        spare: &VolumeId,
    ) -> Result<Option<String>> {
        {
            // Nobody stops it or starts it anew while it is cut.
            let slot = self.slot(&origin.parent);
            let live = slot.turn().await;
            let as_before = live.is_running() && self.still_fresh(&child.id, origin)?.is_some();
            if !as_before {
                return Ok(Some("its parent has stopped".into()));
            }
            let (driver, from, into) = (driver.clone(), origin.volume.clone(), spare.clone());
            blocking(move || {
                postgres::refuse_external(&data_dir(&driver.volume_path(&from)))?;
                Ok(driver.clone_volume(&from, &into, Omit::NOTHING, &|_, _| ())?)
            })
            .await?;
        }
        crash_point("recut:cloned");
        let second = data_dir(&driver.volume_path(spare));
        match blocking(move || Ok(cut.holds_what(&second))).await? {
            Ok(true) => {}
            Ok(false) => return Ok(Some("its parent wrote on".into())),
            Err(e) => return Ok(Some(format!("its parent wrote on: {e}"))),
        }
        self.0.registry.take_spare_volume(spare, &child.id)?;
        crash_point("recut:taken");
        info!(branch = %child.name, "cut again behind a checkpoint");
        Ok(None)
    }

    /// Has the parent make a checkpoint, unless it has gone on writing since the first cut.
    async fn checkpoint_if_quiet(&self, parent: &BranchRecord, cut: &Cut) -> Result<bool> {
        let Some(address) = self.slot(&parent.id).address() else {
            return Ok(false);
        };
        let admin = self.admin_at(&address, parent).await?;
        if !cut.is_recent(admin.insert_position().await?) {
            return Ok(false);
        }
        admin.checkpoint().await?;
        Ok(true)
    }

    /// The clone and its parent, if the one was never started and both are what they were.
    fn still_fresh(
        &self,
        id: &BranchId,
        origin: &Origin,
    ) -> Result<Option<(BranchRecord, BranchRecord)>> {
        let usable = |b: &BranchRecord| b.stage == Stage::Ready && b.trashed_at.is_none();
        let child = self.0.registry.branch(id)?;
        let parent = self.0.registry.branch(&origin.parent)?;
        Ok(child
            .filter(|b| usable(b) && !b.started_once && !self.is_closing())
            .zip(parent.filter(|b| usable(b) && b.volume == origin.volume))
            // One of them may have been moved.
            .filter(|(child, parent)| child.lies_in(&parent.pool, &parent.driver)))
    }

    /// Destroys what an interrupted daemon left of cutting a branch again.
    pub(super) async fn drop_spares(&self, branch: &BranchRecord) {
        let slot = self.slot(&branch.id);
        let _live = slot.turn().await;
        let dropped = match self.driver(branch).await {
            Ok(driver) => self.destroy_spares(&branch.id, &driver).await,
            Err(e) => Err(e),
        };
        if let Err(e) = dropped {
            warn!(branch = %branch.name, "destroy a spare volume: {e}");
        }
    }

    /// Destroys a branch's spare volumes. Its turn must be held.
    pub(super) async fn destroy_spares(
        &self,
        id: &BranchId,
        driver: &Arc<dyn StorageDriver>,
    ) -> Result<()> {
        for (volume, _) in self
            .0
            .registry
            .spare_volumes()?
            .into_iter()
            .filter(|(_, branch)| branch == id)
        {
            let (driver, gone) = (driver.clone(), volume.clone());
            blocking(move || Ok(driver.destroy(&gone)?)).await?;
            self.0.registry.remove_spare_volume(&volume)?;
        }
        Ok::<_, EngineError>(())
    }
}
