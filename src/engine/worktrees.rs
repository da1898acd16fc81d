//! Linked worktrees: each has an endpoint of its own, on a port that stays its own.
//!
//! A worktree is known by its git directory, `<common dir>/worktrees/<name>`, which
//! `git worktree move` keeps and `git worktree remove` takes away.

use std::path::{Path, PathBuf};

use tracing::{info, warn};

use super::follow::Urge;
use super::{EndpointKey, Engine, EngineError, Reporter, Result};
use crate::git::{self, Location};
use crate::registry::{EndpointRecord, ProjectRecord};

impl Engine {
    /// The endpoint that follows a place's HEAD.
    pub(super) fn endpoint_at(project: &ProjectRecord, location: &Location) -> EndpointKey {
        EndpointKey::Worktree {
            project: project.id.clone(),
            git_dir: location.git_dir.clone(),
        }
    }

    /// Opens the port of a linked worktree's endpoint, given at first need, and returns it.
    pub(super) async fn listen_for_worktree(
        &self,
        project: &ProjectRecord,
        git_dir: &Path,
    ) -> Result<u16> {
        let config = Self::config(project)?;
        let port = self.0.registry.endpoint_port(
            &project.id,
            git_dir,
            (config.port_min, config.port_max),
            super::create::port_is_free,
        )?;
        let key = EndpointKey::Worktree {
            project: project.id.clone(),
            git_dir: git_dir.to_owned(),
        };
        self.0.ports.open(key, port).await.map_err(|why| {
            EngineError::refused(format!("the worktree's port: {why}"))
                .hint("end that process, then dbranch sync")
        })?;
        Ok(port)
    }

    /// The endpoint of a linked worktree, made by following its HEAD where it has none yet.
    pub(super) async fn worktree_endpoint(
        &self,
        project: &ProjectRecord,
        location: &Location,
    ) -> Result<EndpointRecord> {
        let key = Self::endpoint_at(project, location);
        if self.endpoint_record(&key)?.is_none() {
            self.follow(location, Urge::Hint, Reporter::log()).await?;
        }
        let port = self.listen_for_worktree(project, &location.git_dir).await?;
        let record = self.endpoint_record(&key)?;
        Ok(EndpointRecord {
            port: Some(port),
            ..record.ok_or_else(|| EngineError::refused("this worktree was removed meanwhile"))?
        })
    }

    /// The port that shows a place's branch, as far as it was given one.
    pub fn worktree_port(&self, project: &ProjectRecord, location: &Location) -> Result<u16> {
        let record = self.endpoint_record(&Self::endpoint_at(project, location))?;
        Ok(record.and_then(|r| r.port).unwrap_or(project.proxy_port))
    }

    /// What people should know of connections from a linked worktree.
    pub(super) fn worktree_note(
        &self,
        project: &ProjectRecord,
        location: &Location,
    ) -> Option<String> {
        if !location.is_linked_worktree() {
            return None;
        }
        let top = location.worktree.as_ref()?.display();
        let main = project.proxy_port;
        let port = self.worktree_port(project, location).ok()?;
        if port == main {
            return Some(format!(
                "this worktree shows nothing of its own yet: port {main} is the main worktree's"
            ));
        }
        let routed = self.routed_by_process(&Self::main_endpoint(project));
        if routed
            .iter()
            .any(|(_, key)| *key == Self::endpoint_at(project, location))
        {
            return Some(format!(
                "programs that run in {top} reach it on the main port, {main}, too"
            ));
        }
        Some(format!("port {main} is the main worktree's"))
    }

    /// Lets go of the worktrees that are gone and follows the others, new ones included.
    /// Returns the git directories of all linked worktrees that are there.
    pub async fn follow_worktrees(&self, common_dir: &Path) -> Result<Vec<PathBuf>> {
        let Some(project) = self.0.registry.project_at(common_dir)? else {
            return Ok(Vec::new());
        };
        let worktrees = git::worktrees(common_dir)?;
        self.release_worktrees(&project)?;
        let mut linked = Vec::new();
        for location in worktrees.into_iter().filter(Location::is_linked_worktree) {
            if let Err(e) = self.follow(&location, Urge::Hint, Reporter::log()).await {
                warn!(git_dir = %location.git_dir.display(), "follow HEAD: {e}");
            }
            linked.push(location.git_dir);
        }
        Ok(linked)
    }

    /// Takes the endpoints of removed worktrees away. Their databases stay.
    fn release_worktrees(&self, project: &ProjectRecord) -> Result<()> {
        for record in self.0.registry.endpoints(&project.id)? {
            // Where all of the repository is out of sight, nothing was removed.
            if record.git_dir.join("HEAD").exists() || !project.common_dir.join("HEAD").exists() {
                continue;
            }
            let key = EndpointKey::Worktree {
                project: project.id.clone(),
                git_dir: record.git_dir.clone(),
            };
            self.0.ports.close(&key);
            self.forget_endpoint(&key);
            self.0
                .registry
                .remove_endpoint(&project.id, &record.git_dir)?;
            info!(git_dir = %record.git_dir.display(), "the worktree is gone: its port is free");
        }
        Ok(())
    }

    /// Shows again what a project's endpoints showed when the last daemon ended, and opens their ports.
    pub(super) async fn restore_endpoints(&self, project: &ProjectRecord) -> Result<()> {
        self.release_worktrees(project)?;
        for record in self.0.registry.endpoints(&project.id)? {
            let key = EndpointKey::Worktree {
                project: project.id.clone(),
                git_dir: record.git_dir.clone(),
            };
            self.endpoint(&key).set(record.branch);
            if record.port.is_some()
                && let Err(e) = self.listen_for_worktree(project, &record.git_dir).await
            {
                warn!(git_dir = %record.git_dir.display(), "{e}");
            }
        }
        Ok(())
    }

    /// Opens the ports of worktrees that are not open; see [`Engine::listen_again`].
    pub(super) async fn listen_again_for_worktrees(&self, project: &ProjectRecord) {
        for record in self.0.registry.endpoints(&project.id).unwrap_or_default() {
            let key = EndpointKey::Worktree {
                project: project.id.clone(),
                git_dir: record.git_dir.clone(),
            };
            if let Some(port) = record.port
                && !self.0.ports.listens(&key, port)
                && self
                    .listen_for_worktree(project, &record.git_dir)
                    .await
                    .is_ok()
            {
                info!(git_dir = %record.git_dir.display(), port, "the worktree's port was free again");
            }
        }
    }

    /// Closes and forgets all endpoints of a project that follow a worktree.
    pub(super) fn close_endpoints(&self, project: &ProjectRecord) {
        let keys: Vec<_> = super::lock(&self.0.endpoints)
            .keys()
            .filter(
                |key| matches!(key, EndpointKey::Worktree { project: id, .. } if *id == project.id),
            )
            .cloned()
            .collect();
        for key in keys {
            self.0.ports.close(&key);
            self.forget_endpoint(&key);
        }
    }

    /// The linked worktrees whose processes an endpoint serves by where they run: their tops, with
    /// their own endpoints. None but for a project's main endpoint, and where the config forbids it.
    pub fn routed_by_process(&self, key: &EndpointKey) -> Vec<(PathBuf, EndpointKey)> {
        let EndpointKey::Worktree { project, git_dir } = key else {
            return Vec::new();
        };
        let endpoints = self.0.registry.endpoints(project).unwrap_or_default();
        let linked: Vec<_> = endpoints.into_iter().filter(|e| e.port.is_some()).collect();
        if linked.is_empty() || linked.iter().any(|e| e.git_dir == *git_dir) {
            return Vec::new();
        }
        let allowed = self.0.registry.project(project).ok().flatten();
        if !allowed.is_some_and(|p| Self::config(&p).is_ok_and(|c| c.route_by_process)) {
            return Vec::new();
        }
        linked
            .into_iter()
            .filter_map(|record| {
                let top = git::worktree_top(&record.git_dir)?;
                let key = EndpointKey::Worktree {
                    project: project.clone(),
                    git_dir: record.git_dir,
                };
                Some((top, key))
            })
            .collect()
    }
}
