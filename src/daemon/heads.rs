//! Watches the HEAD of every project's main worktree, for what hooks miss.

use std::path::Path;
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
        let task = tokio::spawn(follow(engine.clone(), events));
        Ok(Self {
            engine,
            watch: Arc::new(watch),
            task: Arc::new(task),
        })
    }

    pub(super) fn watch_all(&self) {
        for project in self.engine.projects().unwrap_or_default() {
            self.watch(&project.common_dir);
        }
    }

    pub(super) fn watch(&self, common_dir: &Path) {
        match self.watch.add(common_dir) {
            Ok(Method::Events) => {}
            Ok(Method::Polling { reason }) => {
                info!(git_dir = %common_dir.display(), "HEAD is looked at every two seconds: {reason}");
            }
            Err(e) => warn!(git_dir = %common_dir.display(), "HEAD is not watched: {e}"),
        }
    }

    pub(super) fn forget(&self, common_dir: &Path) {
        self.watch.remove(common_dir);
    }

    pub(super) fn stop(&self) {
        self.task.abort();
    }
}

/// Events are hints: what HEAD is now is asked of git.
async fn follow(engine: Engine, mut events: mpsc::Receiver<WatchEvent>) {
    while let Some(event) = events.recv().await {
        match event.change {
            Change::Head => {}
            Change::Gone => {
                info!(git_dir = %event.git_dir.display(), "the repository is gone from there; its databases stay");
                continue;
            }
            Change::Branches | Change::Worktrees => continue,
        }
        let location = match Location::from_common_dir(&event.git_dir) {
            Ok(location) => location,
            Err(e) => {
                warn!(git_dir = %event.git_dir.display(), "{e}");
                continue;
            }
        };
        // Beside the loop, so that a long copy for one project keeps no other waiting.
        let engine = engine.clone();
        tokio::spawn(async move {
            match engine.follow(&location, Urge::Hint, Reporter::log()).await {
                Ok(followed) => {
                    for note in followed.notes {
                        info!(git_dir = %event.git_dir.display(), "{note}");
                    }
                }
                Err(e) => warn!(git_dir = %event.git_dir.display(), "follow HEAD: {e}"),
            }
        });
    }
}
