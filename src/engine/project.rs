//! Projects: registered, found by where they stand, kept up with their config file.

use std::path::{Path, PathBuf};
use std::time::SystemTime;

use tracing::{info, warn};

use super::{Engine, EngineError, Result, Secret};
use crate::config::{self, ProjectConfig};
use crate::git::Location;
use crate::registry::{BranchRecord, ProjectRecord};
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
        let (text, config) = read_config(location)?.ok_or_else(|| no_config(location))?;
        let mut notes = Vec::new();
        let (known, moved_from) = self.locate(location)?;
        let new = known.as_ref().is_none_or(|p| p.deleted_at.is_some());
        let project = match known {
            Some(known) if known.deleted_at.is_none() => ProjectRecord {
                name: config.name.clone(),
                config: text,
                ..known
            },
            known => {
                let (id, created_at) = match known {
                    Some(old) => (old.id, old.created_at),
                    None => (ProjectId::random(), SystemTime::now()),
                };
                let (proxy_port, note) = self.free_proxy_port(&id, &config)?;
                notes.extend(note);
                ProjectRecord {
                    id,
                    name: config.name.clone(),
                    common_dir: location.common_dir.clone(),
                    config: text,
                    proxy_port,
                    allowed_commands: None,
                    created_at,
                    deleted_at: None,
                }
            }
        };
        self.listen(&project).await?;
        self.0.registry.put_project(&project)?;
        mark(&project)?;
        if new {
            info!(project = %project.name, port = project.proxy_port, "registered");
        }
        Ok(Registered {
            project,
            new,
            moved_from,
            notes,
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
        id: &ProjectId,
        config: &ProjectConfig,
    ) -> Result<(u16, Option<String>)> {
        let others = self.0.registry.projects()?;
        let taken = |port: u16| others.iter().find(|p| p.proxy_port == port && p.id != *id);
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

    /// The project of a place, with its config file's latest content.
    pub(super) fn project_at(&self, location: &Location) -> Result<ProjectRecord> {
        let (known, _) = self.locate(location)?;
        let Some(mut project) = known.filter(|p| p.deleted_at.is_none()) else {
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
        if let Some((text, config)) = read_config(location)?
            && text != project.config
        {
            let before = Self::config(&project).ok();
            project.name.clone_from(&config.name);
            project.config = text;
            if before.is_some_and(|b| b.proxy_port != config.proxy_port) {
                project.proxy_port = config.proxy_port;
                let (engine, moved) = (self.clone(), project.clone());
                self.0.tasks.spawn(async move {
                    if let Err(e) = engine.listen(&moved).await {
                        warn!(project = %moved.name, "listen on the new port: {e}");
                    }
                });
            }
            self.0.registry.put_project(&project)?;
        }
        Ok(project)
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
                let from = project.common_dir.clone();
                info!(project = %project.name, from = %from.display(), to = %location.common_dir.display(), "moved");
                self.move_project(project, location)
                    .map(|p| (Some(p), Some(from)))
            }
            _ => Ok((None, None)),
        }
    }

    fn move_project(&self, project: ProjectRecord, location: &Location) -> Result<ProjectRecord> {
        let old_key = Self::main_endpoint(&project);
        let shown = self.endpoint_record(&old_key)?;
        let moved = ProjectRecord {
            common_dir: location.common_dir.clone(),
            ..project
        };
        self.0.registry.put_project(&moved)?;
        self.0.registry.remove_endpoints(&moved.id)?;
        self.0.ports.close(&old_key);
        let key = Self::main_endpoint(&moved);
        if let Some(record) = shown {
            self.restore_active(&key, record.branch.clone());
            self.0
                .registry
                .put_endpoint(&crate::registry::EndpointRecord {
                    git_dir: moved.common_dir.clone(),
                    ..record
                })?;
        }
        let (engine, project) = (self.clone(), moved.clone());
        self.0.tasks.spawn(async move {
            if let Err(e) = engine.listen(&project).await {
                warn!(project = %project.name, "listen after a move: {e}");
            }
        });
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
