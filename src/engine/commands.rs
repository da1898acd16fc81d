//! Commands of the project's config, run after a branch was made or shown.
//!
//! They come from a repository, so they run only while the user has allowed that very content.

use std::os::unix::fs::OpenOptionsExt;
use std::process::Stdio;

use tracing::{info, warn};

use super::follow::Followed;
use super::{Engine, EngineError, Result};
use crate::git::Location;
use crate::registry::{BranchRecord, ProjectRecord};

/// What users are told of commands that wait.
pub(super) const NOT_ALLOWED: &str =
    "the config's commands are not allowed yet: review them with `dbranch allow`";

impl Engine {
    /// Allows the config's commands if their digest is still that of those shown; returns them.
    pub fn allow(&self, location: &Location, shown: &str) -> Result<(Vec<String>, Vec<String>)> {
        let project = self.project_at(location)?;
        let config = Self::config(&project)?;
        let digest = config.commands_digest();
        if digest != shown {
            return Err(
                EngineError::refused("the commands are not those that were shown")
                    .hint("look at them again: dbranch allow"),
            );
        }
        self.0
            .registry
            .change_project(&project.id, |p| p.allowed_commands = Some(digest))?;
        Ok((config.commands.after_create, config.commands.after_switch))
    }

    /// Runs what is due, in the background, in order. The note says that commands wait to be allowed.
    pub(super) fn run_commands(
        &self,
        project: &ProjectRecord,
        location: &Location,
        branch: &BranchRecord,
        outcome: &Followed,
    ) -> Option<String> {
        let config = Self::config(project).ok()?;
        let mut due = Vec::new();
        if outcome.created.is_some() {
            due.extend(config.commands.after_create.clone());
        }
        if outcome.switched.as_ref().is_some_and(|s| s.changed) {
            due.extend(config.commands.after_switch.clone());
        }
        if due.is_empty() {
            return None;
        }
        if !Self::are_allowed(project) {
            return Some(NOT_ALLOWED.into());
        }
        let parent = outcome
            .created
            .as_ref()
            .and_then(|c| c.parent.as_ref())
            .map(ToString::to_string);
        let (engine, branch, project) = (self.clone(), branch.clone(), project.clone());
        let dir = location
            .worktree
            .clone()
            .or_else(|| location.main_worktree.clone());
        self.0.tasks.spawn(async move {
            if let Err(e) = engine.run_all(&project, &branch, parent, dir, due).await {
                warn!(branch = %branch.name, "commands: {e}");
            }
        });
        None
    }

    /// Whether the config's commands, as they are now, may run. True where there are none.
    pub(super) fn are_allowed(project: &ProjectRecord) -> bool {
        Self::config(project).is_ok_and(|config| {
            (config.commands.after_create.is_empty() && config.commands.after_switch.is_empty())
                || project.allowed_commands.as_deref() == Some(config.commands_digest().as_str())
        })
    }

    async fn run_all(
        &self,
        project: &ProjectRecord,
        branch: &BranchRecord,
        parent: Option<String>,
        dir: Option<std::path::PathBuf>,
        commands: Vec<String>,
    ) -> Result<()> {
        self.wake(&branch.id).await?;
        let url = self.url_of(project, branch)?;
        let log = self.0.paths.commands_log(&branch.id);
        for command in commands {
            let file = std::fs::OpenOptions::new()
                .create(true)
                .append(true)
                .mode(0o600)
                .open(&log)
                .map_err(|e| EngineError::io("open", &log, &e))?;
            let errors = file
                .try_clone()
                .map_err(|e| EngineError::io("open", &log, &e))?;
            let mut process = tokio::process::Command::new("sh");
            process
                .args(["-c", &command])
                .env("DATABASE_URL", &url)
                .env("DBRANCH_BRANCH", branch.name.as_str())
                .env("DBRANCH_PARENT", parent.as_deref().unwrap_or_default())
                .env("DBRANCH_SKIP", "1")
                .stdin(Stdio::null())
                .stdout(file)
                .stderr(errors);
            if let Some(dir) = &dir {
                process.current_dir(dir);
            }
            let status = process
                .status()
                .await
                .map_err(|e| EngineError::refused(format!("run `{command}`: {e}")))?;
            if !status.success() {
                return Err(EngineError::refused(format!(
                    "`{command}` ended with {status}; see {}",
                    log.display()
                )));
            }
            info!(branch = %branch.name, command, "ran");
        }
        Ok(())
    }
}
