//! Projects: registered, found by where they stand, kept up with their config file.

use std::path::{Path, PathBuf};
use std::time::SystemTime;

use tracing::{info, warn};

use super::{EndpointKey, Engine, EngineError, Result, Secret, lock};
use crate::config::{self, ProjectConfig};
use crate::git::Location;
use crate::registry::{BranchRecord, EndpointRecord, ProjectRecord, RegistryError};
use crate::types::ProjectId;

/// A project that was registered.
#[derive(Debug, Clone)]
pub struct Registered {
    pub project: ProjectRecord,
    pub new: bool,
    pub moved_from: Option<PathBuf>,
    pub notes: Vec<String>,
}

impl Engine {
    /// Makes a repository with a config file a project, or renews what is known of it.
    pub async fn register(&self, location: &Location) -> Result<Registered> {
        // Two at a time could choose the same port.
        let _turn = self.0.registering.lock().await;
        let (text, config) = read_config(location)?.ok_or_else(|| no_config(location))?;
        let (known, moved_from) = self.locate(location)?;
        let new = known.as_ref().is_none_or(|p| p.deleted_at.is_some());
        let (proxy_port, note) = match &known {
            Some(known) if !new => self.port_by(known, &config)?,
            known => {
                let id = known.as_ref().map(|p| &p.id);
                self.free_proxy_port(id, &config)?
            }
        };
        let renew = |p: &mut ProjectRecord| {
            p.name.clone_from(&config.name);
            p.config.clone_from(&text);
            p.proxy_port = proxy_port;
            p.deleted_at = None;
        };
        let mut project = known.unwrap_or_else(|| ProjectRecord {
            id: ProjectId::random(),
            name: String::new(),
            common_dir: location.common_dir.clone(),
            config: String::new(),
            proxy_port,
            allowed_commands: None,
            created_at: SystemTime::now(),
            deleted_at: None,
        });
        renew(&mut project);
        self.listen(&project).await?;
        match self.0.registry.change_project(&project.id, renew)? {
            Some(renewed) => project = renewed,
            None => self.0.registry.put_project(&project)?,
        }
        mark(&project)?;
        if new {
            info!(project = %project.name, port = project.proxy_port, "registered");
        }
        Ok(Registered {
            project,
            new,
            moved_from,
            notes: note.into_iter().collect(),
        })
    }

    /// Opens the project's main port.
    pub(super) async fn listen(&self, project: &ProjectRecord) -> Result<()> {
        self.0.ports.open(Self::main_endpoint(project), project.proxy_port).await.map_err(|why| {
            EngineError::refused(why)
                .hint("choose another one with `dbranch init --proxy-port N`, or as proxy_port in .dbranch.config.json")
        })
    }

    /// The config's port, or the next one where another project of this user has it.
    fn free_proxy_port(
        &self,
        id: Option<&ProjectId>,
        config: &ProjectConfig,
    ) -> Result<(u16, Option<String>)> {
        let others = self.0.registry.projects()?;
        let taken = |port: u16| {
            others
                .iter()
                .find(|p| p.proxy_port == port && Some(&p.id) != id)
        };
        let Some(other) = taken(config.proxy_port) else {
            return Ok((config.proxy_port, None));
        };
        let port = (config.proxy_port..u16::MAX)
            .find(|port| {
                taken(*port).is_none()
                    && !(config.port_min..=config.port_max).contains(port)
                    && std::net::TcpListener::bind(("127.0.0.1", *port)).is_ok()
            })
            .ok_or_else(|| EngineError::refused("no free port for the project"))?;
        let note = format!(
            "port {} belongs to project `{}` in {}; this one listens on {port}",
            config.proxy_port,
            other.name,
            other.common_dir.display()
        );
        Ok((port, Some(note)))
    }

    /// The port of a known project under a new config: it changes when the config's wish does.
    fn port_by(
        &self,
        project: &ProjectRecord,
        config: &ProjectConfig,
    ) -> Result<(u16, Option<String>)> {
        if Self::config(project).is_ok_and(|before| before.proxy_port == config.proxy_port) {
            return Ok((project.proxy_port, None));
        }
        self.free_proxy_port(Some(&project.id), config)
    }

    /// The project of a place, with its config file's latest content.
    pub(super) fn project_at(&self, location: &Location) -> Result<ProjectRecord> {
        match self.project_and_fault(location)? {
            (project, None) => Ok(project),
            (_, Some(fault)) => Err(fault),
        }
    }

    /// The project of a place, and what is wrong with its config file: the project is then as its
    /// last good config has it.
    pub(super) fn project_and_fault(
        &self,
        location: &Location,
    ) -> Result<(ProjectRecord, Option<EngineError>)> {
        let (known, _) = self.locate(location)?;
        let Some(project) = known.filter(|p| p.deleted_at.is_none()) else {
            let has_config = config_file(location).is_some_and(|f| f.exists());
            let where_ = location
                .worktree
                .as_ref()
                .unwrap_or(&location.common_dir)
                .display()
                .to_string();
            return Err(if has_config {
                EngineError::config(format!(
                    "{where_} has a config file, but this machine doesn't know the project yet"
                ))
            } else {
                EngineError::config(format!("{where_} is no dbranch project yet"))
            }
            .hint("dbranch init"));
        };
        // A checkout of a commit from before the file existed must not take the database away.
        match read_config(location) {
            Ok(Some((text, config))) if text != project.config => {
                Ok((self.renew(&project, text, &config)?, None))
            }
            Ok(_) => Ok((project, None)),
            Err(fault) => Ok((project, Some(fault))),
        }
    }

    /// Records a config file that changed.
    fn renew(
        &self,
        project: &ProjectRecord,
        text: String,
        config: &ProjectConfig,
    ) -> Result<ProjectRecord> {
        let (proxy_port, note) = self.port_by(project, config)?;
        if let Some(note) = note {
            warn!(project = %project.name, "{note}");
        }
        let renewed = self.0.registry.change_project(&project.id, |p| {
            p.name.clone_from(&config.name);
            p.config = text;
            p.proxy_port = proxy_port;
        })?;
        let renewed = renewed.ok_or(RegistryError::ProjectGone)?;
        if proxy_port != project.proxy_port {
            self.listen_soon(&renewed);
        }
        Ok(renewed)
    }

    /// Opens a port that changed. Where that fails, [`Engine::listen_again`] goes on trying.
    fn listen_soon(&self, project: &ProjectRecord) {
        let (engine, project) = (self.clone(), project.clone());
        self.0.tasks.spawn(async move {
            if let Err(e) = engine.restore_endpoints(&project).await {
                warn!(project = %project.name, "{e}");
            }
            if let Err(e) = engine.listen(&project).await {
                warn!(project = %project.name, "{e}");
            }
        });
    }

    /// Opens what could not be opened before: whoever had the port may have let go of it.
    pub async fn listen_again(&self) {
        for project in self.projects().unwrap_or_default() {
            let key = Self::main_endpoint(&project);
            if !self.0.ports.listens(&key, project.proxy_port)
                && self.listen(&project).await.is_ok()
            {
                info!(project = %project.name, port = project.proxy_port, "the port was free again");
            }
            self.listen_again_for_worktrees(&project).await;
            for branch in self.live_branches(&project).unwrap_or_default() {
                let key = EndpointKey::Pinned(branch.id.clone());
                if !self.0.ports.listens(&key, branch.port) {
                    self.publish(&branch).await;
                }
            }
        }
    }

    /// Finds a project by its folder; where that is new, by the mark in it, for the repository may have moved.
    fn locate(&self, location: &Location) -> Result<(Option<ProjectRecord>, Option<PathBuf>)> {
        if let Some(found) = self.0.registry.project_at(&location.common_dir)? {
            return Ok((Some(found), None));
        }
        let marked = std::fs::read_to_string(mark_file(&location.common_dir))
            .ok()
            .and_then(|text| ProjectId::new(text.trim()).ok())
            .map(|id| self.0.registry.project(&id))
            .transpose()?
            .flatten();
        match marked {
            // Where the old place still is a repository, this one is a copy: a project of its own.
            Some(project) if !project.common_dir.join("HEAD").exists() => {
                let _turn = lock(&self.0.moving);
                if let Some(moved) = self.0.registry.project_at(&location.common_dir)? {
                    return Ok((Some(moved), None));
                }
                let from = project.common_dir.clone();
                info!(project = %project.name, from = %from.display(), to = %location.common_dir.display(), "moved");
                self.move_project(&project, location)
                    .map(|p| (Some(p), Some(from)))
            }
            _ => Ok((None, None)),
        }
    }

    fn move_project(&self, project: &ProjectRecord, location: &Location) -> Result<ProjectRecord> {
        let endpoints = self.0.registry.endpoints(&project.id)?;
        let moved = self
            .0
            .registry
            .change_project(&project.id, |p| {
                p.common_dir.clone_from(&location.common_dir);
            })?
            .ok_or(RegistryError::ProjectGone)?;
        self.0.registry.remove_endpoints(&moved.id)?;
        self.close_endpoints(project);
        for record in endpoints {
            // Those of linked worktrees lie in the common directory.
            let Ok(within) = record.git_dir.strip_prefix(&project.common_dir) else {
                continue;
            };
            let git_dir = moved.common_dir.join(within);
            self.0
                .registry
                .put_endpoint(&EndpointRecord { git_dir, ..record })?;
        }
        self.listen_soon(&moved);
        Ok(moved)
    }

    pub(super) fn unmark(common_dir: &Path) {
        let file = mark_file(common_dir);
        let _ = std::fs::remove_file(&file);
        if let Some(dir) = file.parent() {
            let _ = std::fs::remove_dir(dir);
        }
    }

    pub(super) fn forget_secrets(&self, project: &ProjectId) {
        for secret in [Secret::Admin, Secret::Role] {
            let file = self
                .0
                .paths
                .secrets_dir()
                .join(format!("{project}.{}", secret.file_extension()));
            let _ = std::fs::remove_file(file);
        }
    }

    /// The URL of a branch's own port.
    pub(super) fn url_of(&self, project: &ProjectRecord, branch: &BranchRecord) -> Result<String> {
        Ok(self.credentials(project, branch.port)?.url())
    }

    pub(super) fn credentials(
        &self,
        project: &ProjectRecord,
        port: u16,
    ) -> Result<super::view::Credentials> {
        let config = Self::config(project)?;
        Ok(super::view::Credentials {
            host: "127.0.0.1".into(),
            port,
            user: config.postgres.user,
            password: self.password(&project.id, Secret::Role)?,
            database: config.postgres.database,
        })
    }
}

/// The file that tells the git hook, without asking anybody, that a repository is a project.
pub(super) fn mark_file(common_dir: &Path) -> PathBuf {
    common_dir.join("dbranch").join("project")
}

fn mark(project: &ProjectRecord) -> Result<()> {
    let file = mark_file(&project.common_dir);
    if std::fs::read_to_string(&file).is_ok_and(|text| text.trim() == project.id.as_str()) {
        return Ok(());
    }
    let written = file
        .parent()
        .map_or(Ok(()), std::fs::create_dir_all)
        .and_then(|()| {
            crate::fsx::write_atomic(&file, format!("{}\n", project.id).as_bytes(), 0o644, None)
        });
    written.map_err(|e| EngineError::io("write", &file, &e))
}

fn config_file(location: &Location) -> Option<PathBuf> {
    let top = location
        .main_worktree
        .as_ref()
        .or(location.worktree.as_ref())?;
    Some(top.join(config::FILE_NAME))
}

/// The config file's text and meaning; none where there is no file.
fn read_config(location: &Location) -> Result<Option<(String, ProjectConfig)>> {
    let Some(file) = config_file(location) else {
        return Ok(None);
    };
    let text = match std::fs::read_to_string(&file) {
        Ok(text) => text,
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        Err(e) => return Err(EngineError::config(format!("read {}: {e}", file.display()))),
    };
    let parsed = ProjectConfig::parse(&text, &file.display().to_string())?;
    Ok(Some((text, parsed)))
}

fn no_config(location: &Location) -> EngineError {
    let place =
        config_file(location).unwrap_or_else(|| location.common_dir.join(config::FILE_NAME));
    EngineError::config(format!("there is no {}", place.display())).hint("dbranch init")
}
