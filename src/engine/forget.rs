//! Dropping the record of a branch whose data is lost.

use tracing::info;

use super::{Engine, EngineError, Result};
use crate::git::Location;
use crate::registry::BranchRecord;
use crate::runtime::StopMode;
use crate::types::BranchName;

impl Engine {
    /// Forgets a branch, live or in the trash, whose pool is gone for good. Touches nothing in
    /// any pool. One whose pool is there is refused: it can be deleted.
    pub async fn forget(&self, location: &Location, name: &BranchName) -> Result<BranchRecord> {
        let project = self.project_at(location)?;
        let found = match self.0.registry.branch_named(&project.id, name)? {
            Some(branch) => Some(branch),
            None => self.trashed(&project, name)?,
        };
        let branch = found.ok_or_else(|| self.no_such_branch(&project, name))?;
        let engine = self.clone();
        self.detached(async move { engine.forget_in_task(branch).await })
            .await
    }

    async fn forget_in_task(&self, branch: BranchRecord) -> Result<BranchRecord> {
        let slot = self.slot(&branch.id);
        let mut live = slot.turn().await;
        let branch = self.0.registry.branch(&branch.id)?.unwrap_or(branch);
        let volumes = std::slice::from_ref(&branch.volume);
        let there = self
            .pool_is_there(&branch.pool, volumes, branch.driver.parse().ok())
            .await;
        if there.is_ok() {
            return Err(EngineError::refused(format!(
                "branch `{}` is not lost: its pool {} is there",
                branch.name,
                branch.pool.display()
            ))
            .hint(format!("dbranch delete --now {}", branch.name)));
        }
        self.withdraw(&branch);
        // What still runs of it can't write any more, but holds its socket.
        self.stop_in_turn(&slot, &mut live, StopMode::Immediate)
            .await?;
        self.0.registry.remove_spare_volumes_of(&branch.id)?;
        self.drop_record(&branch)?;
        self.drop_slot(&branch.id);
        info!(branch = %branch.name, pool = %branch.pool.display(), "forgotten: its pool is lost");
        Ok(branch)
    }
}
