//! What there is to see: branches, their sizes, how to connect.

use std::path::PathBuf;
use std::time::{Duration, SystemTime};

use super::instances::InstanceState;
use super::{Engine, EngineError, Result};
use crate::git::{self, Head, Location};
use crate::registry::{BranchRecord, ProjectRecord, Stage};
use crate::storage::Usage;
use crate::types::{BackendAddress, BranchName, Password};

/// How long somebody who only wants to see how things stand waits for a disk.
const DISK_LIMIT: Duration = Duration::from_secs(2);

/// A branch and what is observed of it.
#[derive(Debug, Clone)]
pub struct BranchView {
    pub record: BranchRecord,
    pub parent: Option<BranchName>,
    pub state: InstanceState,
    /// Whether the project's endpoint shows it.
    pub active: bool,
    pub sessions: usize,
}

/// How to connect.
#[derive(Debug, Clone)]
pub struct Credentials {
    pub host: String,
    pub port: u16,
    pub user: String,
    pub password: Password,
    pub database: String,
}

impl Credentials {
    /// As a connection URI (PostgreSQL manual, section 34.1.1.2).
    pub fn url(&self) -> String {
        format!(
            "postgresql://{}:{}@{}:{}/{}",
            percent_encoded(&self.user),
            percent_encoded(self.password.reveal()),
            self.host,
            self.port,
            percent_encoded(&self.database)
        )
    }
}

fn percent_encoded(text: &str) -> String {
    use std::fmt::Write;
    text.bytes().fold(String::new(), |mut out, byte| {
        if byte.is_ascii_alphanumeric() || b"-._~".contains(&byte) {
            out.push(char::from(byte));
        } else {
            let _ = write!(out, "%{byte:02X}");
        }
        out
    })
}

impl Engine {
    /// The project of a place.
    pub fn project(&self, location: &Location) -> Result<ProjectRecord> {
        self.project_at(location)
    }

    pub fn projects(&self) -> Result<Vec<ProjectRecord>> {
        let mut projects = self.0.registry.projects()?;
        projects.retain(|p| p.deleted_at.is_none());
        Ok(projects)
    }

    /// Ports on which the configs want the api to be served, beside the daemon's socket.
    pub fn api_ports(&self) -> Vec<u16> {
        let mut ports: Vec<_> = self
            .projects()
            .unwrap_or_default()
            .iter()
            .filter_map(|project| Self::config(project).ok()?.api_port)
            .collect();
        ports.sort_unstable();
        ports.dedup();
        ports
    }

    pub fn branch_count(&self, project: &ProjectRecord) -> Result<usize> {
        Ok(self.0.registry.live_count(&project.id)?)
    }

    /// A project's branches, or those in its trash, oldest first.
    pub fn list(&self, location: &Location, trash: bool) -> Result<Vec<BranchView>> {
        let project = self.project_at(location)?;
        let all = self.0.registry.branches(&project.id)?;
        let shown = self.shown_at(&project, location)?;
        Ok(all
            .iter()
            .filter(|b| b.trashed_at.is_some() == trash && b.stage != Stage::Deleting)
            .map(|b| self.view(b, &all, shown.as_ref()))
            .collect())
    }

    pub async fn find(&self, location: &Location, name: &BranchName) -> Result<BranchRecord> {
        let project = self.project_at(location)?;
        self.must_find(&project, name).await
    }

    pub fn view_of(&self, location: &Location, branch: &BranchRecord) -> Result<BranchView> {
        let project = self.project_of(branch)?;
        let all = self.0.registry.branches(&project.id)?;
        let record = all.iter().find(|b| b.id == branch.id).unwrap_or(branch);
        Ok(self.view(record, &all, self.shown_at(&project, location)?.as_ref()))
    }

    fn view(
        &self,
        b: &BranchRecord,
        all: &[BranchRecord],
        shown: Option<&BranchRecord>,
    ) -> BranchView {
        let slot = self.slot(&b.id);
        BranchView {
            parent: b
                .parent
                .as_ref()
                .and_then(|id| all.iter().find(|p| p.id == *id))
                .map(|p| p.name.clone()),
            state: slot.state(),
            active: shown.is_some_and(|s| s.id == b.id),
            sessions: slot.sessions(),
            record: b.clone(),
        }
    }

    /// The branch that a place's connections reach: what its worktree's endpoint shows.
    pub fn shown_at(
        &self,
        project: &ProjectRecord,
        location: &Location,
    ) -> Result<Option<BranchRecord>> {
        match self
            .endpoint_record(&Self::endpoint_at(project, location))?
            .and_then(|r| r.branch)
        {
            Some(id) => Ok(self.0.registry.branch(&id)?),
            None => Ok(None),
        }
    }

    /// How to connect to a branch, or with none named to whatever this place shows.
    pub async fn connect_info(
        &self,
        location: &Location,
        name: Option<&BranchName>,
    ) -> Result<(Credentials, Option<BranchRecord>)> {
        let project = self.project_at(location)?;
        if let Some(name) = name {
            let branch = self.must_find(&project, name).await?;
            return Ok((self.credentials(&project, branch.port)?, Some(branch)));
        }
        if self.branch_count(&project)? == 0 {
            return Err(EngineError::no_root());
        }
        let port = self.port_at(&project, location).await?;
        let shown = self.shown_at(&project, location)?;
        Ok((self.credentials(&project, port)?, shown))
    }

    /// The port that shows what a place's worktree has checked out.
    pub async fn port_at(&self, project: &ProjectRecord, location: &Location) -> Result<u16> {
        if !location.is_linked_worktree() {
            return Ok(project.proxy_port);
        }
        let endpoint = self.worktree_endpoint(project, location).await?;
        endpoint
            .port
            .ok_or_else(|| EngineError::bug("an endpoint without a port"))
    }

    /// [`Engine::connect_info`] of an address that really listens; the error says who else has the port.
    pub async fn reachable(
        &self,
        location: &Location,
        name: Option<&BranchName>,
    ) -> Result<(Credentials, Option<BranchRecord>)> {
        let (credentials, branch) = self.connect_info(location, name).await?;
        match &branch {
            Some(branch) if branch.port == credentials.port => self.try_publish(branch).await?,
            // Opened by asking for its port.
            _ if location.is_linked_worktree() => {}
            _ => self.listen(&self.project_at(location)?).await?,
        }
        Ok((credentials, branch))
    }

    pub fn backend(&self, branch: &BranchRecord) -> BackendAddress {
        self.backend_of(&branch.id)
    }

    /// Where a branch's volume lies, whether its pool is there or not.
    pub fn volume(&self, branch: &BranchRecord) -> Result<PathBuf> {
        // Not as the caller saw it: a fresh branch may be given another one before its first start.
        let current = self.0.registry.branch(&branch.id)?;
        Ok(super::volume_path(current.as_ref().unwrap_or(branch)))
    }

    pub fn children(&self, branch: &BranchRecord) -> Result<Vec<BranchName>> {
        let all = self.0.registry.branches(&branch.project)?;
        Ok(all
            .into_iter()
            .filter(|b| b.parent.as_ref() == Some(&branch.id) && b.trashed_at.is_none())
            .map(|b| b.name)
            .collect())
    }

    /// Bytes of one branch for somebody who wants to see more than that: not of a disk that hangs.
    pub async fn usage_if_quick(&self, branch: &BranchRecord) -> Option<Usage> {
        let usage = tokio::time::timeout(DISK_LIMIT, self.usage_of(branch)).await;
        usage.ok()?.ok()
    }

    /// Things worth knowing about where a place stands.
    pub async fn notes(&self, project: &ProjectRecord, location: &Location) -> Result<Vec<String>> {
        let mut notes = Vec::new();
        if let Err(e) = self.listen(project).await {
            notes.push(e.message);
        }
        notes.extend(self.worktree_note(project, location));
        let shown = self.shown_at(project, location)?;
        if let Some(branch) = &shown {
            let there = tokio::time::timeout(DISK_LIMIT, self.branch_is_there(branch)).await;
            let trouble = there.unwrap_or_else(|_| Err(super::doctor::hangs(&branch.pool)));
            notes.extend(trouble.err().map(|e| e.in_one_line()));
        }
        match git::head(&location.git_dir)? {
            Head::Detached(_) => {
                if let Some(shown) = &shown {
                    notes.push(format!(
                        "HEAD is detached: the database stays on `{}`",
                        shown.name
                    ));
                }
            }
            Head::Branch(name) | Head::Unborn(name) => {
                if let Some(shown) = shown.as_ref().filter(|s| s.name != name) {
                    notes.push(format!(
                        "the database shows `{}`, git is on `{name}`; `dbranch use` follows git again",
                        shown.name
                    ));
                }
            }
        }
        if !Self::are_allowed(project) {
            notes.push(super::commands::NOT_ALLOWED.into());
        }
        if let Some(operation) = git::operation(&location.git_dir) {
            notes.push(format!("git is in the middle of a {operation:?}"));
        }
        Ok(notes)
    }

    pub fn git_branch(location: &Location) -> Option<BranchName> {
        match git::head(&location.git_dir).ok()? {
            Head::Branch(name) | Head::Unborn(name) => Some(name),
            Head::Detached(_) => None,
        }
    }

    pub fn log_file(&self, branch: &BranchRecord) -> PathBuf {
        self.0.paths.instance_log(&branch.id)
    }

    /// When the trash will destroy a branch.
    pub fn expiry(branch: &BranchRecord) -> Option<SystemTime> {
        branch.trashed_at.map(|at| at + super::TRASH_KEEPS)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_url_escapes_what_a_uri_reserves() {
        let credentials = Credentials {
            host: "127.0.0.1".into(),
            port: 15432,
            user: "me@home".into(),
            password: Password::new("a/b:c"),
            database: "app db".into(),
        };
        assert_eq!(
            credentials.url(),
            "postgresql://me%40home:a%2Fb%3Ac@127.0.0.1:15432/app%20db"
        );
    }
}
