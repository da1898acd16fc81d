//! Endpoints: which branch each shows, following git's HEAD or a word of the user.

use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::sync::{Mutex, watch};
use tracing::{debug, info};

use super::create::Created;
use super::{Active, EndpointKey, Engine, EngineError, Reporter, Result, lock};
use crate::git::{self, Head, Location};
use crate::registry::{BranchRecord, EndpointRecord, ProjectRecord, Stage};
use crate::types::{BranchId, BranchName};

/// The live side of an endpoint.
#[derive(Debug)]
pub(super) struct Endpoint {
    /// One switch at a time; hook and watcher may both report the same one.
    turn: Mutex<Option<Unreported>>,
    active: watch::Sender<Option<BranchId>>,
}

/// What a hint led to, kept for the hook that comes right after it, so that the user
/// is told even when the watcher was quicker.
#[derive(Debug)]
struct Unreported {
    head: String,
    outcome: Followed,
    since: Instant,
}

/// A hook is later than the watcher by less than this.
const REPORT_WITHIN: Duration = Duration::from_secs(30);

/// What an endpoint is to be turned to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Target {
    Branch(BranchName),
    Previous,
    Head,
}

/// An endpoint that was turned, or was right already.
#[derive(Debug, Clone)]
pub struct Switched {
    pub branch: BranchRecord,
    pub previous: Option<BranchName>,
    pub changed: bool,
    pub took: Duration,
}

/// What following HEAD came to.
#[derive(Debug, Clone, Default)]
pub struct Followed {
    pub created: Option<Created>,
    pub switched: Option<Switched>,
    pub renamed: Option<(BranchName, BranchName)>,
    pub notes: Vec<String>,
}

/// Whether HEAD is acted on when it is the same as last time.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Urge {
    /// Something moved, perhaps: a HEAD that was seen already changes nothing, so that `dbranch use` lasts.
    Hint,
    /// Git or the user says so.
    Word,
}

impl Endpoint {
    pub(super) fn set(&self, branch: Option<BranchId>) {
        self.active.send_replace(branch);
    }

    fn still_shows(&self, outcome: &Followed) -> bool {
        outcome
            .switched
            .as_ref()
            .is_none_or(|s| self.active.borrow().as_ref() == Some(&s.branch.id))
    }
}

impl Engine {
    pub(super) fn endpoint(&self, key: &EndpointKey) -> Arc<Endpoint> {
        lock(&self.0.endpoints)
            .entry(key.clone())
            .or_insert_with(|| {
                let active = match key {
                    EndpointKey::Pinned(id) => Some(id.clone()),
                    EndpointKey::Worktree { .. } => None,
                };
                Arc::new(Endpoint {
                    turn: Mutex::default(),
                    active: watch::Sender::new(active),
                })
            })
            .clone()
    }

    pub(super) fn forget_endpoint(&self, key: &EndpointKey) {
        lock(&self.0.endpoints).remove(key);
    }

    /// Shows which branch an endpoint leads to, now and later.
    pub fn active(&self, key: &EndpointKey) -> Active {
        self.endpoint(key).active.subscribe()
    }

    /// The endpoint that follows the main worktree.
    pub(super) fn main_endpoint(project: &ProjectRecord) -> EndpointKey {
        EndpointKey::Worktree {
            project: project.id.clone(),
            git_dir: project.common_dir.clone(),
        }
    }

    pub(super) fn endpoint_record(&self, key: &EndpointKey) -> Result<Option<EndpointRecord>> {
        let EndpointKey::Worktree { project, git_dir } = key else {
            return Ok(None);
        };
        Ok(self
            .0
            .registry
            .endpoints(project)?
            .into_iter()
            .find(|e| e.git_dir == *git_dir))
    }

    /// HEAD of a worktree may have moved: makes and shows the branch it names.
    pub async fn follow(&self, location: &Location, urge: Urge, to: Reporter) -> Result<Followed> {
        let (engine, location) = (self.clone(), location.clone());
        self.detached(async move { engine.follow_in_task(&location, urge, &to).await })
            .await
    }

    async fn follow_in_task(
        &self,
        location: &Location,
        urge: Urge,
        to: &Reporter,
    ) -> Result<Followed> {
        let begun = Instant::now();
        let mut outcome = Followed::default();
        // An app that goes on in the old branch does more harm than an old config.
        let (project, fault) = self.project_and_fault(location)?;
        outcome
            .notes
            .extend(fault.map(|e| format!("{}: the config as it was before is used", e.message)));
        let key = Self::endpoint_at(&project, location);
        let endpoint = self.endpoint(&key);
        let mut turn = endpoint.turn.lock().await;

        if let Some(operation) = git::operation(&location.git_dir) {
            debug!(
                ?operation,
                "git is in the middle of something: nothing follows HEAD"
            );
            return Ok(outcome);
        }
        let head = git::head(&location.git_dir)?;
        let record = self.endpoint_record(&key)?;
        let seen = head_word(&head);
        if urge == Urge::Hint
            && record
                .as_ref()
                .is_some_and(|r| r.head.as_deref() == Some(&seen))
        {
            return Ok(outcome);
        }
        // The watcher was quicker, and nothing has changed since: the hook only has to tell.
        if let Some(done) = turn.take()
            && done.head == seen
            && done.since.elapsed() < REPORT_WITHIN
            && endpoint.still_shows(&done.outcome)
        {
            return Ok(done.outcome);
        }
        let name = match head {
            Head::Branch(name) | Head::Unborn(name) => name,
            Head::Detached(_) => {
                if let Some(shown) = self.shown(record.as_ref())? {
                    outcome.notes.push(format!(
                        "HEAD is detached: the database stays on `{}`",
                        shown.name
                    ));
                }
                self.remember_head(&key, record, seen)?;
                return Ok(outcome);
            }
        };
        if !Self::config(&project)?.matches(&name) {
            if let Some(shown) = self.shown(record.as_ref())? {
                outcome.notes.push(format!(
                    "the config gives `{name}` no database of its own: it stays on `{}`",
                    shown.name
                ));
            }
            self.remember_head(&key, record, seen)?;
            return Ok(outcome);
        }
        let (branch, created, renamed) = self
            .branch_for(&project, location, &name, to)
            .await
            .map_err(|e| self.where_it_stays(record.as_ref(), e))?;
        let Some(branch) = branch else {
            outcome
                .notes
                .push("no database branch yet: run `dbranch init-postgres`".into());
            return Ok(outcome);
        };
        outcome.created = created;
        outcome.renamed = renamed;
        outcome.switched = Some(self.show(&key, &endpoint, &branch, Some(seen.clone()), begun)?);
        if location.is_linked_worktree()
            && let Err(e) = self.listen_for_worktree(&project, &location.git_dir).await
        {
            outcome.notes.push(e.message);
        }
        if outcome.created.is_none()
            && let Err(e) = self.branch_is_there(&branch).await
        {
            outcome.notes.push(e.in_one_line());
        }
        let note = self.run_commands(&project, location, &branch, &outcome);
        outcome.notes.extend(note);
        if urge == Urge::Hint {
            *turn = Some(Unreported {
                head: seen,
                outcome: outcome.clone(),
                since: Instant::now(),
            });
        }
        Ok(outcome)
    }

    /// Tells with a failure which branch the endpoint shows meanwhile: whoever writes now, writes there.
    fn where_it_stays(&self, record: Option<&EndpointRecord>, e: EngineError) -> EngineError {
        match self.shown(record) {
            Ok(Some(shown)) => EngineError {
                message: format!("{}; the database STAYS on `{}`", e.message, shown.name),
                ..e
            },
            _ => e,
        }
    }

    /// The branch of that name: found, renamed with git's branch, or made.
    async fn branch_for(
        &self,
        project: &ProjectRecord,
        location: &Location,
        name: &BranchName,
        to: &Reporter,
    ) -> Result<(
        Option<BranchRecord>,
        Option<Created>,
        Option<(BranchName, BranchName)>,
    )> {
        if let Some(found) = self.find_settled(project, name).await? {
            return Ok((Some(found), None, None));
        }
        if let Some(old) = git::renamed_from(&location.common_dir, name)?
            && !git::branch_exists(&location.common_dir, &old)?
            && let Some(branch) = self.find_settled(project, &old).await?
        {
            self.0.registry.rename_branch(&branch.id, name)?;
            info!(from = %old, to = %name, "renamed with git's branch");
            let branch = BranchRecord {
                name: name.clone(),
                ..branch
            };
            return Ok((Some(branch), None, Some((old, name.clone()))));
        }
        // Reads history, which may be long.
        let parent = tokio::task::block_in_place(|| self.find_parent(project, location, name))?;
        let Some(parent) = parent else {
            return Ok((None, None, None));
        };
        match self
            .create_in_task(project, name.clone(), &parent, to)
            .await
        {
            Ok(created) => Ok((Some(created.branch.clone()), Some(created), None)),
            // Somebody made it in the meantime.
            Err(e) => match self.find_settled(project, name).await? {
                Some(found) => Ok((Some(found), None, None)),
                None => Err(e),
            },
        }
    }

    /// A branch by name; one that is being made is waited for.
    pub(super) async fn find_settled(
        &self,
        project: &ProjectRecord,
        name: &BranchName,
    ) -> Result<Option<BranchRecord>> {
        let Some(found) = self.0.registry.branch_named(&project.id, name)? else {
            return Ok(None);
        };
        if found.stage == Stage::Ready {
            return Ok(Some(found));
        }
        drop(self.slot(&found.id).turn().await);
        Ok(self
            .0
            .registry
            .branch_named(&project.id, name)?
            .filter(|b| b.stage == Stage::Ready))
    }

    /// Turns the endpoint of a worktree by the user's word.
    pub async fn switch(
        &self,
        location: &Location,
        target: Target,
        to: Reporter,
    ) -> Result<Followed> {
        let begun = Instant::now();
        let project = self.project_at(location)?;
        let key = Self::endpoint_at(&project, location);
        let record = self.endpoint_record(&key)?;
        let branch = match target {
            Target::Head => {
                return self.follow(location, Urge::Word, to).await;
            }
            Target::Branch(name) => self.must_find(&project, &name).await?,
            Target::Previous => {
                let previous = record
                    .and_then(|r| r.previous)
                    .map(|id| self.0.registry.branch(&id))
                    .transpose()?;
                previous.flatten().ok_or_else(|| {
                    EngineError::refused("no other branch was shown before")
                        .hint("dbranch use NAME; dbranch list")
                })?
            }
        };
        let endpoint = self.endpoint(&key);
        let _turn = endpoint.turn.lock().await;
        let switched = self.show(&key, &endpoint, &branch, None, begun)?;
        let mut outcome = Followed {
            switched: Some(switched),
            ..Followed::default()
        };
        let note = self.run_commands(&project, location, &branch, &outcome);
        outcome.notes.extend(note);
        Ok(outcome)
    }

    /// After the first branch was made: shows it, if HEAD has its name or nothing else.
    pub(super) async fn show_where_head_is(
        &self,
        location: &Location,
        branch: &BranchRecord,
    ) -> Result<()> {
        let project = self.project_of(branch)?;
        let key = Self::main_endpoint(&project);
        let endpoint = self.endpoint(&key);
        let _turn = endpoint.turn.lock().await;
        let head = git::head(&location.common_dir).ok().map(|h| head_word(&h));
        self.show(&key, &endpoint, branch, head, Instant::now())?;
        Ok(())
    }

    /// Shows a branch. New sessions reach it from here on; old ones are told by the channel.
    fn show(
        &self,
        key: &EndpointKey,
        endpoint: &Endpoint,
        branch: &BranchRecord,
        head: Option<String>,
        begun: Instant,
    ) -> Result<Switched> {
        let EndpointKey::Worktree { project, git_dir } = key else {
            return Err(EngineError::bug("a pinned endpoint can't be turned"));
        };
        let old = self.endpoint_record(key)?;
        let old_branch = old.as_ref().and_then(|r| r.branch.clone());
        let changed = old_branch.as_ref() != Some(&branch.id);
        let previous = if changed {
            old_branch.clone()
        } else {
            old.as_ref().and_then(|r| r.previous.clone())
        };
        endpoint.active.send_if_modified(|active| {
            let differs = active.as_ref() != Some(&branch.id);
            *active = Some(branch.id.clone());
            differs
        });
        self.0.registry.put_endpoint(&EndpointRecord {
            project: project.clone(),
            git_dir: git_dir.clone(),
            branch: Some(branch.id.clone()),
            previous,
            head: head.or_else(|| old.and_then(|r| r.head)),
            port: None,
        })?;
        // Deleted meanwhile? Then this and the deletion's own look at the endpoints leave none that shows it.
        let current = self.0.registry.branch(&branch.id)?;
        if current.is_none_or(|b| b.stage == Stage::Deleting || b.trashed_at.is_some()) {
            self.hide(&branch.id);
            return Err(
                EngineError::refused(format!("branch `{}` has been deleted", branch.name))
                    .hint("dbranch list"),
            );
        }
        self.wake_in_background(&branch.id);
        let mut previous = None;
        if let (true, Some(old)) = (changed, old_branch) {
            previous = self.0.registry.branch(&old)?.map(|b| b.name);
        }
        if changed {
            info!(branch = %branch.name, from = previous.as_ref().map_or("nothing", BranchName::as_str), "switched");
        }
        Ok(Switched {
            branch: branch.clone(),
            previous,
            changed,
            took: begun.elapsed(),
        })
    }

    /// Makes every endpoint let go of a branch that is no more.
    pub(super) fn hide(&self, id: &BranchId) {
        for (key, endpoint) in lock(&self.0.endpoints).iter() {
            if matches!(key, EndpointKey::Worktree { .. }) {
                endpoint.active.send_if_modified(|active| {
                    let shown = active.as_ref() == Some(id);
                    if shown {
                        *active = None;
                    }
                    shown
                });
            }
        }
    }

    /// Whether an endpoint that follows a worktree shows the branch.
    pub(super) fn shown_anywhere(&self, id: &BranchId) -> bool {
        lock(&self.0.endpoints).iter().any(|(key, e)| {
            matches!(key, EndpointKey::Worktree { .. }) && e.active.borrow().as_ref() == Some(id)
        })
    }

    fn shown(&self, record: Option<&EndpointRecord>) -> Result<Option<BranchRecord>> {
        match record.and_then(|r| r.branch.as_ref()) {
            Some(id) => Ok(self.0.registry.branch(id)?),
            None => Ok(None),
        }
    }

    fn remember_head(
        &self,
        key: &EndpointKey,
        record: Option<EndpointRecord>,
        head: String,
    ) -> Result<()> {
        let EndpointKey::Worktree { project, git_dir } = key else {
            return Ok(());
        };
        let record = record.unwrap_or_else(|| EndpointRecord {
            project: project.clone(),
            git_dir: git_dir.clone(),
            branch: None,
            previous: None,
            head: None,
            port: None,
        });
        Ok(self.0.registry.put_endpoint(&EndpointRecord {
            head: Some(head),
            ..record
        })?)
    }

    pub(super) async fn must_find(
        &self,
        project: &ProjectRecord,
        name: &BranchName,
    ) -> Result<BranchRecord> {
        self.find_settled(project, name)
            .await?
            .ok_or_else(|| self.no_such_branch(project, name))
    }
}

/// HEAD in one word, to tell whether it is another one.
fn head_word(head: &Head) -> String {
    match head {
        Head::Branch(name) | Head::Unborn(name) => format!("branch {name}"),
        Head::Detached(id) => format!("commit {id}"),
    }
}
