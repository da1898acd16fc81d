//! One branch's way to another volume.

use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use tracing::{debug, info, warn};

use super::plan::shares_with;
use super::{MovedBranch, Mover};
use crate::engine::instances::{Live, Slot};
use crate::engine::{EngineError, Result, blocking, crash_point, data_dir};
use crate::postgres;
use crate::registry::{BranchRecord, MoveRecord, Place, Stage};
use crate::runtime::StopMode;
use crate::storage::{Mirror, Omit, Round, Source, StorageError};
use crate::types::{BranchName, VolumeId};

/// Rounds while the branch runs. Each brings over what was written during the one before.
const ROUNDS: usize = 4;
/// A round that was quicker, and wrote less, is the last one while the branch runs: what was
/// written meanwhile comes over while it stands still.
const QUICK: Duration = Duration::from_secs(2);
const SMALL_BYTES: u64 = 16 << 20;
/// After a round that took so long, there is much in memory again.
const LONG: Duration = Duration::from_secs(10);
/// How long a checkpoint may take that only makes the stop shorter.
const CHECKPOINT_LIMIT: Duration = Duration::from_secs(60);

/// What became of a branch's volume.
#[derive(Debug, Default)]
struct Carried {
    base: Option<BranchName>,
    bytes: u64,
    written_bytes: u64,
    stood_still: Option<Duration>,
}

impl Mover {
    /// Moves a branch. None if it was deleted meanwhile. What fails leaves it where it was.
    pub(super) async fn move_branch(
        &self,
        branch: &BranchRecord,
        what: &str,
    ) -> Result<Option<MovedBranch>> {
        let begun = Instant::now();
        let from = branch.place();
        let new = self.place(VolumeId::random());
        self.engine.0.registry.begin_move(&MoveRecord {
            branch: branch.id.clone(),
            remove: new.clone(),
        })?;
        crash_point("move:intent");
        let carried = match self.carry_over(branch, &new, what).await {
            Ok(Some(carried)) => carried,
            outcome => {
                if let Err(e) = self.engine.remove_moved(&new).await {
                    warn!(branch = %branch.name, "take back a move: {e}");
                }
                return match outcome {
                    // It failed because somebody deleted the branch.
                    Err(_) if !self.is_still_in(branch, &from)? => Ok(None),
                    other => other.map(|_| None),
                };
            }
        };
        if let Err(e) = self.engine.remove_moved(&from).await {
            self.to.notice(format!(
                "the old data of `{}` in {} could not be removed: {}; that is tried again at the daemon's start",
                branch.name,
                from.pool.display(),
                e.message
            ));
        }
        info!(branch = %branch.name, pool = %new.pool.display(), driver = new.driver, ms = begun.elapsed().as_millis(),
            "moved a branch");
        Ok(Some(MovedBranch {
            record: self
                .engine
                .0
                .registry
                .branch(&branch.id)?
                .unwrap_or_else(|| branch.clone()),
            from,
            bytes: carried.bytes,
            written_bytes: carried.written_bytes,
            base: carried.base,
            stood_still: carried.stood_still,
        }))
    }

    fn is_still_in(&self, branch: &BranchRecord, place: &Place) -> Result<bool> {
        let current = self.engine.0.registry.branch(&branch.id)?;
        Ok(current.is_some_and(|b| b.stage == Stage::Ready && b.place() == *place))
    }

    /// Makes the new volume, fills it and turns the branch to it. None if the branch was
    /// deleted meanwhile; then, and after an error, it is not turned.
    async fn carry_over(
        &self,
        branch: &BranchRecord,
        new: &Place,
        what: &str,
    ) -> Result<Option<Carried>> {
        let path = self.whole_source(branch).await?;
        let (target, from) = (self.target.clone(), path.clone());
        let shares = blocking(move || Ok(shares_with(&from, &target))).await?;
        let base = if shares || !self.target.shares_blocks() {
            None
        } else {
            self.clone_base(branch, new).await?
        };
        if base.is_none() {
            let (target, volume) = (self.target.clone(), new.volume.clone());
            blocking(move || Ok(target.create_volume(&volume)?)).await?;
        }
        crash_point("move:volume");
        let mut mirror = Mirror::new(path, self.target.volume_path(&new.volume), shares);
        let mut carried = Carried {
            base,
            ..Carried::default()
        };
        // What is in memory comes over with the rest, and old log needs not.
        self.checkpoint(branch).await;
        // Without the branch's turn: it goes on, and may be stopped, started, cloned and deleted.
        let done_before = self.done_bytes.load(Ordering::Relaxed);
        for n in 0..ROUNDS {
            let begun = Instant::now();
            let round;
            (mirror, round) = self
                .round(mirror, Source::InUse, (n == 0).then_some(what))
                .await?;
            carried.written_bytes += round.written_bytes;
            crash_point("move:copied");
            let took = begun.elapsed();
            if !self.engine.slot(&branch.id).is_running()
                || (took < QUICK && round.written_bytes < SMALL_BYTES)
            {
                break;
            }
            if took > LONG {
                self.checkpoint(branch).await;
            }
        }
        carried.bytes = self.done_bytes.load(Ordering::Relaxed) - done_before;
        let slot = self.engine.slot(&branch.id);
        let mut live = slot.turn().await;
        let old = branch.place();
        if !self.is_still_in(branch, &old)? {
            return Ok(None);
        }
        let asked = Instant::now();
        let ran = self.stop(branch, &slot, &mut live).await?;
        let finished = self
            .finish(branch, mirror, new, &slot, &mut live, ran)
            .await;
        match finished {
            Ok(round) => carried.written_bytes += round.written_bytes,
            Err(e) => {
                if ran && !self.engine.is_closing() {
                    let again = self
                        .engine
                        .start_in_turn(&slot, &mut live, &branch.id, Instant::now())
                        .await;
                    if let Err(e) = again {
                        warn!(branch = %branch.name, "start where it was: {e}");
                    }
                }
                return Err(e);
            }
        }
        carried.stood_still = ran.then(|| asked.elapsed());
        Ok(Some(carried))
    }

    /// Brings the last difference over, turns the branch, and starts it if it ran.
    async fn finish(
        &self,
        branch: &BranchRecord,
        mirror: Mirror,
        new: &Place,
        slot: &Slot,
        live: &mut Live,
        ran: bool,
    ) -> Result<Round> {
        let registry = &self.engine.0.registry;
        let old = branch.place();
        crash_point("move:stopped");
        let begun = Instant::now();
        let (_, round) = self.round(mirror, Source::AtRest, None).await?;
        crash_point("move:verified");
        // Equal to an empty folder, if a disk has just been unmounted, is not enough.
        postgres::major(&data_dir(&self.target.volume_path(&new.volume)))?;
        registry.turn_move(&branch.id, &old, new)?;
        crash_point("move:turned");
        debug!(branch = %branch.name, files = round.files, bytes = round.written_bytes,
            ms = begun.elapsed().as_millis(), "brought the last difference over");
        if !ran || self.engine.is_closing() {
            return Ok(round);
        }
        let started = self
            .engine
            .start_in_turn(slot, live, &branch.id, Instant::now())
            .await;
        crash_point("move:started");
        match started {
            Ok(_) => Ok(round),
            // Nobody has seen it in its new place: all is as it was in the old one.
            Err(e) => {
                registry.turn_move(&branch.id, new, &old)?;
                Err(e)
            }
        }
    }

    /// Makes the new volume a clone of the one there that has most in common with it. None
    /// where there is no such branch.
    async fn clone_base(&self, branch: &BranchRecord, new: &Place) -> Result<Option<BranchName>> {
        let all = self.branches()?;
        let Some(base) = self.base(branch, &all) else {
            return Ok(None);
        };
        let slot = self.engine.slot(&base.id);
        // So that it is not deleted meanwhile. What its server writes does no harm: the clone
        // is only where the new volume begins.
        let _turn = slot.turn().await;
        if !self.is_still_in(base, &base.place())? {
            return Ok(None);
        }
        let (target, from, to) = (self.target.clone(), base.volume.clone(), new.volume.clone());
        blocking(move || {
            target.clone_volume(&from, &to, Omit::NOTHING, &|_, _| {})?;
            Ok(())
        })
        .await?;
        Ok(Some(base.name.clone()))
    }

    async fn round(
        &self,
        mut mirror: Mirror,
        source: Source,
        shown: Option<&str>,
    ) -> Result<(Mirror, Round)> {
        let (this, shown) = (self.clone(), shown.map(str::to_owned));
        let result = tokio::task::spawn_blocking(move || {
            let step = |bytes| {
                if let Some(what) = &shown {
                    let done = this.done_bytes.fetch_add(bytes, Ordering::Relaxed) + bytes;
                    let total = this.total_bytes.load(Ordering::Relaxed).max(done);
                    this.to.progress(what, done, total);
                }
            };
            // What stands still is brought to its end, which is near.
            let go_on = || source == Source::AtRest || !this.engine.is_closing();
            let round = mirror.round(source, &step, &go_on)?;
            Ok((mirror, round))
        });
        match result.await {
            Ok(Err(StorageError::Interrupted)) => {
                Err(EngineError::refused("dbranch is shutting down")
                    .hint("dbranch storage move takes it up again"))
            }
            Ok(done) => Ok(done?),
            Err(e) => Err(EngineError::bug(format!("a move broke off: {e}"))),
        }
    }

    /// A checkpoint before the stop makes that shorter. Without one the move is right too.
    async fn checkpoint(&self, branch: &BranchRecord) {
        let slot = self.engine.slot(&branch.id);
        let live = slot.turn().await;
        if !live.is_running() {
            return;
        }
        let checkpoint = async {
            let admin = self.engine.admin(&live, branch).await?;
            Ok::<_, EngineError>(admin.checkpoint().await?)
        };
        match tokio::time::timeout(CHECKPOINT_LIMIT, checkpoint).await {
            Ok(Ok(())) => {}
            Ok(Err(e)) => warn!(branch = %branch.name, "checkpoint before a move: {e}"),
            Err(_) => warn!(branch = %branch.name, "checkpoint before a move: no answer"),
        }
    }

    /// Stops the branch's server, known or not. True if one ran.
    async fn stop(&self, branch: &BranchRecord, slot: &Slot, live: &mut Live) -> Result<bool> {
        if self.engine.stop_in_turn(slot, live, StopMode::Fast).await? {
            return Ok(true);
        }
        let (runtime, spec) = self.engine.instance_spec(&self.project, branch).await?;
        let Some(instance) = runtime.find(&spec).await? else {
            return Ok(false);
        };
        runtime.stop(&spec, &instance, StopMode::Fast).await?;
        Ok(true)
    }
}
