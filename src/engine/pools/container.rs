//! What needs root, done by a container of Docker's: for users who have those rights and no sudo.

use std::os::unix::fs::MetadataExt;

use tracing::{info, warn};

use super::PoolJob;
use crate::engine::{Engine, EngineError, Result};
use crate::git::Location;
use crate::storage::image::plan::quoted_path;

impl Engine {
    /// The local images whose containers could do it, the project's own first. None where Docker
    /// can't be used, or runs in a virtual machine.
    pub(super) async fn container_images(&self, at: Option<&Location>) -> Vec<String> {
        let Ok(docker) = self.docker().await else {
            return Vec::new();
        };
        if !docker.is_on_this_machine() {
            return Vec::new();
        }
        let mut wished = Vec::new();
        if let Some(project) = at.and_then(|at| self.project_at(at).ok())
            && let Ok(config) = Self::config(&project)
        {
            wished.extend(config.postgres.image);
        }
        for project in self.projects().unwrap_or_default() {
            let branches = self.0.registry.branches(&project.id).unwrap_or_default();
            let docker = branches
                .into_iter()
                .filter(|b| b.server.runtime == "docker");
            wished.extend(docker.map(|b| b.server.programs));
        }
        docker
            .images_with_a_shell(&wished)
            .await
            .unwrap_or_else(|e| {
                warn!("{e}");
                Vec::new()
            })
    }

    /// Runs as root, by a container, the next group of a job's plan, which must still be `script`:
    /// what the user was shown is what is run. Returns what it said.
    pub async fn run_pool_plan(
        &self,
        job: &PoolJob,
        script: &str,
        at: Option<&Location>,
    ) -> Result<String> {
        let plan = self.plan_pool(job, at).await?;
        let next = plan.groups.first().filter(|g| g.as_root);
        if next.is_none_or(|g| g.script != script) {
            return Err(EngineError::refused(
                "what is to be done as root has changed since it was shown",
            )
            .hint("look at it again: the same command once more"));
        }
        // An engine may be reached from a container, whose files are not those of its machine.
        let state = self.0.paths.state_dir();
        let meta = std::fs::metadata(state).map_err(|e| EngineError::io("look at", state, &e))?;
        let guarded = format!(
            "[ \"$(stat -c %d:%i {})\" = {}:{} ] || {{\n\
             echo \"the machine of Docker's engine is not this one\" >&2; exit 1; }}\n{script}",
            quoted_path(state),
            meta.dev(),
            meta.ino()
        );
        let docker = self.docker().await?;
        for image in self.container_images(at).await {
            let Some((code, output)) = docker.run_on_host(&image, &guarded).await? else {
                continue;
            };
            if code == 0 {
                info!(%image, "ran a script as root by a container");
                return Ok(output);
            }
            return Err(EngineError::refused(format!(
                "the script ended with {code}: {}",
                output.trim()
            ))
            .hint(
                "dbranch storage status shows how far it came; the same command goes on from there",
            ));
        }
        Err(
            EngineError::refused("no local image has a shell and nsenter")
                .hint("run the script as root by hand: add `--dry-run` to see it"),
        )
    }
}
