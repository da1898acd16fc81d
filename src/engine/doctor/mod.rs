//! Looks everything over and says what would mend it.

mod pools;

use std::collections::HashSet;
use std::path::{Path, PathBuf};

use super::instances::InstanceState;
use super::{Engine, Result, blocking, data_dir};
use crate::fsx::shell_word;
use crate::git::Location;
use crate::postgres::{self, ClusterError};
use crate::registry::{BranchRecord, ProjectRecord, Stage};

pub(super) use pools::hangs;

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
    /// A word that scripts may rely on: `storage`, `read-only`, `nocow`.
    pub what: String,
    pub level: Level,
    pub detail: String,
    /// The command that mends it.
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

    fn new(what: &str, level: Level, detail: impl Into<String>, fix: impl Into<String>) -> Self {
        Self {
            what: what.into(),
            level,
            detail: detail.into(),
            fix: Some(fix.into()),
        }
    }

    fn warning(what: &str, detail: impl Into<String>, fix: impl Into<String>) -> Self {
        Self::new(what, Level::Warning, detail, fix)
    }

    fn problem(what: &str, detail: impl Into<String>, fix: impl Into<String>) -> Self {
        Self::new(what, Level::Problem, detail, fix)
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
        checks.extend(self.check_state_room());
        checks.extend(self.check_pools().await?);
        checks.extend(self.check_strangers().await?);
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
        for branch in branches.iter().filter(|b| b.stage == Stage::Ready) {
            if let InstanceState::Failed { error, .. } = self.slot(&branch.id).state() {
                let fix = error
                    .hint
                    .unwrap_or_else(|| format!("dbranch logs {}", branch.name));
                checks.push(Check::problem("branch", error.message, fix));
            }
            // A pool that is not there has a line of its own.
            if self.branch_is_there(branch).await.is_ok() {
                checks.extend(check_data(branch, data_dir(&self.volume(branch)?)).await?);
            }
        }
        if !branches.is_empty() && checks.is_empty() {
            checks.push(Check::ok(
                "branches",
                format!("{} in order", branches.len()),
            ));
        }
        Ok(checks)
    }

    /// Where the registry lies, which no branch does without.
    fn check_state_room(&self) -> Option<Check> {
        let dir = self.0.paths.state_dir();
        let free = crate::storage::health::too_little_room(dir).ok()??;
        Some(Check::problem(
            "state-room",
            format!(
                "{} are free where dbranch keeps its records, in {}",
                super::create::human_bytes(free),
                dir.display()
            ),
            format!("df -h {}", shell_word(dir)),
        ))
    }

    /// Volumes that no record knows, in every pool of this user.
    async fn check_strangers(&self) -> Result<Vec<Check>> {
        let mut checks = Vec::new();
        let mut seen = HashSet::new();
        for project in self.0.registry.projects()? {
            // A pool that can't be looked into is told of elsewhere.
            for stranger in self.strangers_in_pools(&project).await.unwrap_or_default() {
                if !seen.insert(stranger.clone()) {
                    continue;
                }
                let shown = stranger.display();
                checks.push(Check::warning(
                    "stranger",
                    format!(
                        "no branch knows the volume {shown}; unless it is another dbranch's, look at it, and remove it"
                    ),
                    remove_by_hand(&stranger),
                ));
            }
        }
        Ok(checks)
    }
}

/// Looks at a branch's data: whether it is there, and whole within its volume.
async fn check_data(branch: &BranchRecord, data: PathBuf) -> Result<Option<Check>> {
    let name = branch.name.clone();
    blocking(move || {
        let shown = shell_word(&data);
        if !data.join("PG_VERSION").exists() {
            return Ok(Some(Check::problem(
                "volume",
                format!("branch `{name}` has no data in {}", data.display()),
                format!("dbranch show {name}"),
            )));
        }
        let (what, target) = match postgres::refuse_external(&data) {
            Ok(()) => return Ok(None),
            Err(ClusterError::External { what, target }) => (what, target),
            Err(e) => {
                let fix = format!("dbranch logs {name}");
                return Ok(Some(Check::problem("volume", e.to_string(), fix)));
            }
        };
        let detail = format!(
            "branch `{name}` can't be cloned: {what} leads out of its volume, to {}",
            target.display()
        );
        let fix = match what.strip_prefix("pg_tblspc/") {
            Some(oid) => format!(
                "echo \"select format('alter table all in tablespace %I set tablespace pg_default', spcname), \
                 format('alter index all in tablespace %I set tablespace pg_default', spcname), \
                 format('drop tablespace %I', spcname) from pg_tablespace where oid = {oid} \\gexec\" \
                 | dbranch psql {name}"
            ),
            None => format!(
                "dbranch stop {name} && cp -a {}/. {shown}/{what}.new && rm {shown}/{what} && mv {shown}/{what}.new {shown}/{what}",
                shell_word(&target)
            ),
        };
        Ok(Some(Check::problem("external", detail, fix)))
    })
    .await
}

fn remove_by_hand(volume: &Path) -> String {
    let path = shell_word(volume);
    crate::fsx::as_root(&format!("rm -r {path}"))
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
