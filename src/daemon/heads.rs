//! Watches the HEAD of every worktree of every project, for what hooks miss.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use tokio::sync::mpsc;
use tokio::task::JoinHandle;
use tracing::{info, warn};

use crate::engine::{Engine, Reporter, Urge};
use crate::git::{Change, GitError, Location, Method, Watch, WatchEvent};

/// The watches. Cheap to clone.
#[derive(Debug, Clone)]
pub(super) struct Heads {
    engine: Engine,
    watch: Arc<Watch>,
    task: Arc<JoinHandle<()>>,
}

impl Heads {
    pub(super) fn new(engine: Engine) -> Result<Self, GitError> {
        let (watch, events) = Watch::new()?;
        let watch = Arc::new(watch);
        let task = tokio::spawn(follow(engine.clone(), Arc::clone(&watch), events));
        Ok(Self {
            engine,
            watch,
            task: Arc::new(task),
        })
    }

    pub(super) fn watch_all(&self) {
        for project in self.engine.projects().unwrap_or_default() {
            self.watch(&project.common_dir);
        }
    }

    /// Watches a repository and all its worktrees.
    pub(super) fn watch(&self, common_dir: &Path) {
        watch_all_of(&self.watch, common_dir);
    }

    pub(super) fn forget(&self, common_dir: &Path) {
        self.watch.remove_below(common_dir);
    }

    pub(super) fn stop(&self) {
        self.task.abort();
    }
}

fn watch_all_of(watch: &Watch, common_dir: &Path) {
    let worktrees = crate::git::worktrees(common_dir).unwrap_or_default();
    let linked = worktrees
        .into_iter()
        .filter(Location::is_linked_worktree)
        .map(|w| w.git_dir);
    for git_dir in std::iter::once(common_dir.to_owned()).chain(linked) {
        match watch.add(&git_dir) {
            Ok(Method::Events) => {}
            Ok(Method::Polling { reason }) => {
                info!(git_dir = %git_dir.display(), "HEAD is looked at every two seconds: {reason}");
            }
            Err(e) => warn!(git_dir = %git_dir.display(), "HEAD is not watched: {e}"),
        }
    }
}

/// Events are hints: what HEAD is now is asked of git. What follows from one is done beside the
/// loop, so that a long copy for one project keeps no other waiting.
async fn follow(engine: Engine, watch: Arc<Watch>, mut events: mpsc::Receiver<WatchEvent>) {
    while let Some(WatchEvent { git_dir, change }) = events.recv().await {
        match change {
            Change::Head => drop(tokio::spawn(follow_head(engine.clone(), git_dir))),
            Change::Worktrees => {
                // Before they are followed, so that no change falls between.
                watch_all_of(&watch, &git_dir);
                let engine = engine.clone();
                tokio::spawn(async move {
                    if let Err(e) = engine.follow_worktrees(&git_dir).await {
                        warn!(git_dir = %git_dir.display(), "follow worktrees: {e}");
                    }
                });
            }
            Change::Gone => {
                info!(git_dir = %git_dir.display(), "it is gone from there; its databases stay");
            }
            Change::Branches => {}
        }
    }
}

async fn follow_head(engine: Engine, git_dir: PathBuf) {
    let location = match Location::from_git_dir(&git_dir) {
        Ok(location) => location,
        Err(e) => return warn!(git_dir = %git_dir.display(), "{e}"),
    };
    match engine.follow(&location, Urge::Hint, Reporter::log()).await {
        Ok(followed) => {
            for note in followed.notes {
                info!(git_dir = %git_dir.display(), "{note}");
            }
        }
        Err(e) => warn!(git_dir = %git_dir.display(), "follow HEAD: {e}"),
    }
}
