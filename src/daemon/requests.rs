//! Turns requests of the api into calls of the engine, and what comes back into answers.

use serde::Serialize;
use serde_json::Value;
use tokio_util::sync::CancellationToken;

use super::answers;
use super::heads::Heads;
use super::pools;
use super::tcp::TcpApi;
use crate::api::serve::{Handler, Tell};
use crate::api::types::{
    Allowed, At, DaemonInfo, DaemonRef, Failure, FailureKind, HookOutcome, LogInfo, Message,
    ProjectDeleted, ProjectInfo, Request, StatusInfo, Stopped, Synced, UseTarget,
};
use crate::config::Paths;
use crate::engine::{
    Engine, EngineError, InitRequest, InstanceState, Kind, MoveRequest, Report, Reporter, Target,
    Urge,
};
use crate::git::Location;
use crate::types::BranchName;

#[derive(Debug, Clone)]
pub(super) struct Requests {
    engine: Engine,
    paths: Paths,
    heads: Heads,
    stop: CancellationToken,
    tcp: Option<TcpApi>,
}

type Answer = Result<Value, EngineError>;

impl Handler for Requests {
    async fn handle(&self, request: Request, tell: Tell) -> Result<Value, Failure> {
        self.answer(request, tell).await.map_err(failure)
    }
}

impl Requests {
    pub(super) fn new(engine: Engine, paths: Paths, heads: Heads, stop: CancellationToken) -> Self {
        Self {
            engine,
            paths,
            heads,
            stop,
            tcp: None,
        }
    }

    /// The api's ports follow what these requests change.
    pub(super) fn with_tcp(self, tcp: TcpApi) -> Self {
        Self {
            tcp: Some(tcp),
            ..self
        }
    }

    #[expect(clippy::too_many_lines, reason = "one arm a request, each a few lines")]
    async fn answer(&self, request: Request, tell: Tell) -> Answer {
        let engine = &self.engine;
        let to = Reporter::new(move |report| {
            tell.say(match report {
                Report::Progress { what, done, total } => Message::Progress { what, done, total },
                Report::Notice(text) => Message::Notice(text),
            });
        });
        match request {
            Request::Ping => json(DaemonInfo {
                pid: std::process::id(),
                version: env!("CARGO_PKG_VERSION").into(),
                log_file: self.paths.daemon_log(),
                projects: engine.projects()?.len(),
            }),
            Request::Shutdown { stop_branches } => {
                // First of all, so that no client that reconnects starts an instance again.
                engine.close();
                let stopped = if stop_branches {
                    engine.stop_all().await
                } else {
                    0
                };
                self.stop.cancel();
                json(Stopped {
                    instances_stopped: stopped,
                    instances_left: engine.running(),
                })
            }
            Request::Register { at } => {
                let registered = engine.register(&place(at)).await?;
                for note in registered.notes {
                    to.notice(note);
                }
                self.heads.watch(&registered.project.common_dir);
                self.renew_api_ports();
                json(self.project_info(
                    &registered.project,
                    registered.new,
                    registered.moved_from,
                )?)
            }
            Request::Projects => {
                let all: Result<Vec<_>, _> = engine
                    .projects()?
                    .iter()
                    .map(|p| self.project_info(p, false, None))
                    .collect();
                json(all?)
            }
            Request::InitPostgres {
                at,
                branch,
                storage,
                runtime,
                pool,
            } => {
                let at = place(at);
                let created = engine
                    .init_postgres(
                        &at,
                        InitRequest {
                            name: branch,
                            storage,
                            runtime,
                            pool,
                        },
                        to,
                    )
                    .await?;
                json(answers::created(engine, &at, &created)?)
            }
            Request::Create { at, name, from } => {
                let at = place(at);
                let created = engine.create_by_word(&at, name, from.as_ref(), to).await?;
                json(answers::created(engine, &at, &created)?)
            }
            Request::Use { at, to: target } => {
                let target = match target {
                    UseTarget::Branch(name) => Target::Branch(name),
                    UseTarget::Previous => Target::Previous,
                    UseTarget::Head => Target::Head,
                };
                let followed = engine.switch(&place(at), target, to.clone()).await?;
                for note in &followed.notes {
                    to.notice(note.clone());
                }
                let switched = followed.switched.as_ref().ok_or_else(|| {
                    EngineError::refused(
                        followed
                            .notes
                            .first()
                            .cloned()
                            .unwrap_or_else(|| "there was nothing to switch to".into()),
                    )
                    .hint("dbranch list, then dbranch use NAME")
                })?;
                json(answers::switched(switched))
            }
            Request::List { at, trash } => {
                let views = engine.list(&place(at), trash)?;
                json(views.iter().map(answers::branch).collect::<Vec<_>>())
            }
            Request::Show { at, name } => {
                let at = place(at);
                let branch = engine.find(&at, &name).await?;
                json(answers::details(engine, &at, &branch).await?)
            }
            Request::Status { at } => json(self.status(&place(at)).await?),
            Request::Usage { at } => json(answers::usage(engine.usage(&place(at)).await?)?),
            Request::Delete {
                at,
                name,
                now,
                force,
            } => {
                let deleted = engine.delete(&place(at), &name, now, force).await?;
                json(answers::deleted(deleted))
            }
            Request::Undelete {
                at,
                name,
                rename_to,
            } => {
                let at = place(at);
                let branch = engine.undelete(&at, &name, rename_to.as_ref()).await?;
                json(answers::branch(&engine.view_of(&at, &branch)?))
            }
            Request::DeleteProject { at, now } => {
                let (project, branches) = engine.delete_project(&place(at), now).await?;
                self.heads.forget(&project.common_dir);
                self.renew_api_ports();
                json(ProjectDeleted {
                    name: project.name,
                    branches,
                    destroyed: now,
                })
            }
            Request::StorageMove {
                at,
                pool,
                driver,
                dry_run,
            } => {
                let request = MoveRequest {
                    pool,
                    driver,
                    dry_run,
                };
                let moved = engine.move_storage(&place(at), request, to).await?;
                json(answers::moved(moved))
            }
            Request::Forget { at, name } => {
                let forgotten = engine.forget(&place(at), &name).await?;
                json(answers::forgotten(forgotten))
            }
            Request::Stop { at, name, all } => self.stop_branches(&place(at), name, all).await,
            Request::Resume { at, name } => {
                let at = place(at);
                let branch = self.named_or_shown(&at, name).await?;
                engine.wake(&branch.id).await?;
                json(answers::branch(&engine.view_of(&at, &branch)?))
            }
            Request::Sync { at, dry_run } => {
                let found = engine.sync(&place(at), dry_run, to).await?;
                self.renew_api_ports();
                json(Synced {
                    actions: found.actions,
                    notes: found.notes,
                    dry_run,
                })
            }
            Request::Url { at, name } => {
                let (credentials, branch) = engine.reachable(&place(at), name.as_ref()).await?;
                json(answers::url(&credentials, branch))
            }
            Request::Logs { at, name } => {
                let branch = self.named_or_shown(&place(at), name).await?;
                json(LogInfo {
                    log_file: engine.log_file(&branch),
                    branch: branch.name,
                })
            }
            Request::Allow { at, digest } => {
                let (after_create, after_switch) = engine.allow(&place(at), &digest)?;
                json(Allowed {
                    after_create,
                    after_switch,
                })
            }
            Request::Hook { at } => self.hook(place(at), to).await,
            Request::Doctor { at } => {
                let location = at.map(place);
                let checks = engine.doctor(location.as_ref()).await?;
                json(checks.into_iter().map(answers::finding).collect::<Vec<_>>())
            }
            Request::PoolPlan { job, at } => {
                let at = at.map(place);
                let plan = engine.plan_pool(&pools::job(job)?, at.as_ref()).await?;
                json(pools::plan(plan))
            }
            Request::PoolRun { job, script, at } => {
                let at = at.map(place);
                let job = pools::job(job)?;
                json(engine.run_pool_plan(&job, &script, at.as_ref()).await?)
            }
            Request::PoolAdopt { path } => json(pools::adopted(engine.adopt_pool(&path).await?)),
            Request::PoolForget { path } => json(engine.forget_pool(&path)?),
            Request::Pools { unit_dir, fstab } => {
                let all = engine.pools(unit_dir, fstab).await?;
                json(all.into_iter().map(pools::info).collect::<Vec<_>>())
            }
        }
    }

    fn renew_api_ports(&self) {
        if let Some(tcp) = &self.tcp {
            tcp.listen_on(&self.engine.api_ports());
        }
    }

    async fn hook(&self, at: Location, to: Reporter) -> Answer {
        let followed = self.engine.follow(&at, Urge::Word, to).await?;
        // The repository may have been moved here.
        self.heads.watch(&at.common_dir);
        json(HookOutcome {
            created: followed
                .created
                .as_ref()
                .map(|c| answers::created(&self.engine, &at, c))
                .transpose()?,
            switched: followed.switched.as_ref().map(answers::switched),
            notes: followed.notes,
        })
    }

    async fn stop_branches(&self, at: &Location, name: Option<BranchName>, all: bool) -> Answer {
        let branches = if all {
            self.engine
                .list(at, false)?
                .into_iter()
                .map(|view| view.record)
                .collect()
        } else {
            vec![self.named_or_shown(at, name).await?]
        };
        let mut answer = Vec::new();
        for branch in branches {
            self.engine.stop(&branch.id).await?;
            answer.push(answers::branch(&self.engine.view_of(at, &branch)?));
        }
        json(answer)
    }

    async fn named_or_shown(
        &self,
        at: &Location,
        name: Option<BranchName>,
    ) -> Result<crate::registry::BranchRecord, EngineError> {
        if let Some(name) = name {
            return self.engine.find(at, &name).await;
        }
        let project = self.engine.project(at)?;
        self.engine.shown_at(&project, at)?.ok_or_else(|| {
            EngineError::refused("no branch is active here")
                .hint("name one; `dbranch list` shows them")
        })
    }

    async fn status(&self, at: &Location) -> Result<StatusInfo, EngineError> {
        let project = self.engine.project(at)?;
        let views = self.engine.list(at, false)?;
        let shown = self.engine.shown_at(&project, at)?;
        let view = shown
            .as_ref()
            .and_then(|s| views.iter().find(|v| v.record.id == s.id));
        Ok(StatusInfo {
            branch: shown.as_ref().map(|b| b.name.clone()),
            git_branch: Engine::git_branch(at).map(Into::into),
            proxy_port: self.engine.worktree_port(&project, at)?,
            worktree: at.worktree.clone().filter(|_| at.is_linked_worktree()),
            daemon: DaemonRef {
                pid: std::process::id(),
                version: env!("CARGO_PKG_VERSION").into(),
            },
            state: view.map(|v| answers::state(&v.state, &v.record)),
            branches: views.len(),
            running: views
                .iter()
                .filter(|v| matches!(v.state, InstanceState::Running(_)))
                .count(),
            sessions: views.iter().map(|v| v.sessions).sum(),
            storage: shown.as_ref().map(|b| b.driver.clone()),
            runtime: shown.map(|b| b.server.runtime),
            notes: self.engine.notes(&project, at).await?,
            project: project.name,
        })
    }

    fn project_info(
        &self,
        project: &crate::registry::ProjectRecord,
        new: bool,
        moved_from: Option<std::path::PathBuf>,
    ) -> Result<ProjectInfo, EngineError> {
        Ok(ProjectInfo {
            id: project.id.clone(),
            name: project.name.clone(),
            common_dir: project.common_dir.clone(),
            proxy_port: project.proxy_port,
            branches: self.engine.branch_count(project)?,
            moved_from,
            new,
        })
    }
}

/// The api's place as git's. The main worktree is asked of git: clients only know their own.
fn place(at: At) -> Location {
    if at.git_dir == at.common_dir {
        return Location {
            common_dir: at.common_dir,
            git_dir: at.git_dir,
            main_worktree: at.worktree.clone(),
            worktree: at.worktree,
        };
    }
    let main_worktree = Location::from_git_dir(&at.common_dir)
        .ok()
        .and_then(|main| main.worktree);
    Location {
        common_dir: at.common_dir,
        git_dir: at.git_dir,
        worktree: at.worktree,
        main_worktree,
    }
}

fn json(answer: impl Serialize) -> Answer {
    serde_json::to_value(answer)
        .map_err(|e| EngineError::refused(format!("an answer could not be written: {e}")))
}

fn failure(e: EngineError) -> Failure {
    let kind = match e.kind {
        Kind::Refused => FailureKind::Refused,
        Kind::Config => FailureKind::Config,
        Kind::Bug => FailureKind::Bug,
    };
    Failure {
        kind,
        message: e.message,
        hint: e.hint,
    }
}
