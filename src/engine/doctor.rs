//! Looks everything over and says what would mend it.

use super::instances::InstanceState;
use super::{Engine, Result, blocking};
use crate::git::Location;
use crate::registry::ProjectRecord;

/// How good or bad.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Level {
    Ok,
    Warning,
    Problem,
}

/// One thing looked at.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Check {
    pub what: String,
    pub level: Level,
    pub detail: String,
    pub fix: Option<String>,
}

impl Check {
    fn ok(what: &str, detail: impl Into<String>) -> Self {
        Self {
            what: what.into(),
            level: Level::Ok,
            detail: detail.into(),
            fix: None,
        }
    }

    fn warning(what: &str, detail: impl Into<String>, fix: impl Into<String>) -> Self {
        Self {
            what: what.into(),
            level: Level::Warning,
            detail: detail.into(),
            fix: Some(fix.into()),
        }
    }

    fn problem(what: &str, detail: impl Into<String>, fix: impl Into<String>) -> Self {
        Self {
            what: what.into(),
            level: Level::Problem,
            detail: detail.into(),
            fix: Some(fix.into()),
        }
    }
}

impl Engine {
    /// Checks the machine and, where one is given, a project.
    pub async fn doctor(&self, location: Option<&Location>) -> Result<Vec<Check>> {
        let mut checks = vec![Check::ok(
            "daemon",
            format!("runs as pid {}", std::process::id()),
        )];
        checks.push(check_servers());
        checks.push(match self.docker().await {
            Ok(_) => Check::ok("docker", "the engine answers"),
            Err(e) => Check {
                level: Level::Ok,
                fix: e.hint.clone(),
                ..Check::ok("docker", format!("not used: {e}"))
            },
        });
        checks.push(self.check_pool().await);
        let Some(location) = location else {
            return Ok(checks);
        };
        let project = match self.project_at(location) {
            Ok(project) => project,
            Err(e) => {
                checks.push(Check::problem(
                    "project",
                    e.message,
                    e.hint.unwrap_or_else(|| "dbranch init".into()),
                ));
                return Ok(checks);
            }
        };
        checks.push(Check::ok(
            "project",
            format!("`{}`, port {}", project.name, project.proxy_port),
        ));
        if let Err(e) = self.listen(&project).await {
            checks.push(Check::problem(
                "port",
                e.message,
                e.hint.unwrap_or_default(),
            ));
        }
        checks.extend(self.check_branches(&project).await?);
        if !Self::are_allowed(&project) {
            checks.push(Check::warning(
                "commands",
                "the config's commands are not allowed yet",
                "dbranch allow",
            ));
        }
        Ok(checks)
    }

    async fn check_pool(&self) -> Check {
        let choice = match self
            .0
            .machine
            .storage
            .value
            .parse::<crate::storage::Choice>()
        {
            Ok(choice) => choice,
            Err(e) => {
                return Check::problem(
                    "storage",
                    e.to_string(),
                    format!(
                        "set DBRANCH_STORAGE to one of {}",
                        crate::storage::Choice::names()
                    ),
                );
            }
        };
        let pool = self.pool();
        let driver = match self.open_pool(choice, &pool).await {
            Ok(driver) => driver,
            Err(e) => return Check::problem("storage", e.message, e.hint.unwrap_or_default()),
        };
        let (kind, advice) = (driver.kind(), driver.advice());
        let free = blocking(move || Ok(driver.space()?))
            .await
            .map_or(0, |s| s.free_bytes);
        let detail = format!(
            "{kind} in {}, {} free",
            pool.display(),
            super::create::human_bytes(free)
        );
        match advice {
            Some(advice) => Check::warning("storage", detail, advice),
            None => Check::ok("storage", detail),
        }
    }

    async fn check_branches(&self, project: &ProjectRecord) -> Result<Vec<Check>> {
        let mut checks = Vec::new();
        let branches = self.live_branches(project)?;
        if branches.is_empty() {
            checks.push(Check::warning(
                "branches",
                "there is none yet",
                "dbranch init-postgres",
            ));
        }
        for branch in &branches {
            if let InstanceState::Failed { error, .. } = self.slot(&branch.id).state() {
                checks.push(Check::problem(
                    "branch",
                    error.message,
                    format!("dbranch logs {}", branch.name),
                ));
            }
            match self.volume(branch).await {
                Ok(volume) if volume.join("data/PG_VERSION").exists() => {}
                Ok(volume) => checks.push(Check::problem(
                    "volume",
                    format!(
                        "branch `{}` has no data in {}",
                        branch.name,
                        volume.display()
                    ),
                    "mount the pool again; dbranch sync",
                )),
                Err(e) => checks.push(Check::problem(
                    "volume",
                    e.message,
                    e.hint.unwrap_or_default(),
                )),
            }
        }
        if !branches.is_empty() && checks.is_empty() {
            checks.push(Check::ok(
                "branches",
                format!("{} in order", branches.len()),
            ));
        }
        for stranger in self.strangers_in_pools(project).await.unwrap_or_default() {
            checks.push(Check::warning(
                "volume",
                stranger,
                "unless it belongs to another DBRANCH_HOME: look at it, then remove it by hand",
            ));
        }
        Ok(checks)
    }
}

fn check_servers() -> Check {
    let found = crate::runtime::discover::installed();
    if found.is_empty() {
        return Check::warning(
            "postgres",
            "no PostgreSQL server programs (13 to 18) found",
            "install postgresql, or use Docker",
        );
    }
    let list: Vec<_> = found
        .iter()
        .map(|f| format!("{} in {}", f.version_text, f.bin_dir.display()))
        .collect();
    Check::ok("postgres", list.join(", "))
}
