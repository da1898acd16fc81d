//! Which branch a new branch is cut from.

use super::{Engine, EngineError, Result};
use crate::git::{self, Location, Origin};
use crate::registry::{BranchRecord, ProjectRecord, Stage};
use crate::types::BranchName;

impl Engine {
    /// The parent of a branch that is to be made for a git branch: what git says it was
    /// created from, else the nearest in history, else the default branch, else the oldest.
    /// None where the project has no branch at all.
    pub(super) fn find_parent(
        &self,
        project: &ProjectRecord,
        location: &Location,
        name: &BranchName,
    ) -> Result<Option<BranchRecord>> {
        // Git waits for this: with a thousand branches, the one that git names is asked for alone.
        if self.0.registry.live_count(&project.id)? > 1
            && let Some(Origin::Branch(origin)) = quietly(git::origin(location, name))
            && let Some(found) = self.0.registry.branch_named(&project.id, &origin)?
            && found.stage == Stage::Ready
        {
            return Ok(Some(found));
        }
        let branches = self.live_branches(project)?;
        if branches.len() <= 1 {
            return Ok(branches.into_iter().next());
        }
        let named = |name: &BranchName| branches.iter().find(|b| b.name == *name).cloned();
        let candidates: Vec<_> = branches.iter().map(|b| b.name.clone()).collect();
        if let Some(found) =
            quietly(git::nearest(location, name, &candidates)).and_then(|n| named(&n))
        {
            return Ok(Some(found));
        }
        if let Some(found) =
            quietly(git::default_branch(&location.common_dir)).and_then(|n| named(&n))
        {
            return Ok(Some(found));
        }
        Ok(branches
            .iter()
            .find(|b| b.parent.is_none())
            .or(branches.first())
            .cloned())
    }

    /// A project's branches that can be used, oldest first.
    pub(super) fn live_branches(&self, project: &ProjectRecord) -> Result<Vec<BranchRecord>> {
        let mut branches = self.0.registry.branches(&project.id)?;
        branches.retain(|b| b.stage == Stage::Ready && b.trashed_at.is_none());
        Ok(branches)
    }

    pub(super) fn no_such_branch(&self, project: &ProjectRecord, name: &BranchName) -> EngineError {
        let all = self.0.registry.branches(&project.id).unwrap_or_default();
        if all
            .iter()
            .any(|b| b.name == *name && b.trashed_at.is_some())
        {
            return EngineError::refused(format!("branch `{name}` lies in the trash"))
                .hint(format!("dbranch undelete {name}"));
        }
        let live: Vec<_> = all
            .iter()
            .filter(|b| b.trashed_at.is_none())
            .map(|b| b.name.as_str())
            .collect();
        if live.is_empty() {
            return EngineError::no_root();
        }
        let error = EngineError::refused(format!("there is no database branch `{name}`"));
        match crate::config::nearest_word(name.as_str(), &live) {
            Some(near) => error.hint(format!("did you mean `{near}`? `dbranch list` shows all")),
            None => error.hint(format!("dbranch list, or dbranch create {name}")),
        }
    }
}

/// History that can't be read is no reason to give a branch no database.
fn quietly<T>(answer: Result<Option<T>, git::GitError>) -> Option<T> {
    answer.unwrap_or_else(|e| {
        tracing::warn!("look for the parent: {e}");
        None
    })
}
