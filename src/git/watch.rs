//! Reports that HEAD, or the set of branches or worktrees, may have changed.
//!
//! git replaces HEAD by rename at every switch, so the folder is watched and not
//! the file. Events are hints: whoever gets one reads what HEAD is now.
//!
//! ```text
//!   system's events ─┐  names that matter    quiet for 10 ms,
//!                    ├────────────────────>  at most 100 ms  ──> receiver
//!   look every 2 s ──┘  (see `Change`)       per git directory
//! ```
//!
//! The look, every 2 s, is only for folders whose file system may be changed
//! elsewhere (NFS, shared folders of virtual machines), or where the system's
//! watches are used up. Whether a git directory is still where it was is looked at
//! every 15 s: a move of a folder above it sends no event.

use std::collections::{BTreeMap, HashMap};
use std::ffi::OsStr;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use notify::event::{AccessKind, EventKind};
use notify::{RecommendedWatcher, RecursiveMode, Watcher};
use tokio::sync::mpsc;

use super::GitError;

/// No event for this long ends a burst.
const QUIET: Duration = Duration::from_millis(10);

/// A burst is reported after this long even if it goes on.
const LONGEST_BURST: Duration = Duration::from_millis(100);

/// Between two looks where the file system sends no events.
const POLL_INTERVAL: Duration = Duration::from_secs(2);

/// Between two looks whether git directories are still there.
const PRESENCE_INTERVAL: Duration = Duration::from_secs(15);

/// Reports waiting for the receiver. What comes while it is full is merged.
const CHANNEL_CAPACITY: usize = 64;

/// Files and folders whose coming and going means that HEAD changed, or that what
/// it says counts again (the end of a rebase or bisect).
const HEAD_NAMES: [&str; 7] = [
    "HEAD",
    "rebase-merge",
    "rebase-apply",
    "BISECT_LOG",
    "CHERRY_PICK_HEAD",
    "MERGE_HEAD",
    "REVERT_HEAD",
];

/// What may have changed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Change {
    /// HEAD of this git directory, or what git is in the middle of there.
    Head,
    /// Branches of this common git directory came, went or moved.
    Branches,
    /// Linked worktrees of this common git directory came or went.
    Worktrees,
    /// The git directory is gone: deleted or moved. It is watched no longer.
    Gone,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct WatchEvent {
    /// As it was given to [`Watch::add`].
    pub git_dir: PathBuf,
    pub change: Change,
}

/// How changes are noticed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Method {
    /// By events of the system.
    Events,
    /// By looking every two seconds, besides events where there are any. The
    /// reason is fit for users.
    Polling { reason: String },
}

/// Watches git directories until dropped.
#[derive(Debug)]
pub struct Watch {
    shared: Arc<Shared>,
}

impl Watch {
    /// Starts watching nothing yet. The receiver ends when the watch is dropped.
    pub fn new() -> Result<(Self, mpsc::Receiver<WatchEvent>), GitError> {
        let (sender, receiver) = mpsc::channel(CHANNEL_CAPACITY);
        let shared = Arc::new(Shared {
            state: Mutex::default(),
            wake: Condvar::new(),
            watcher: Mutex::new(Err("not started".to_owned())),
        });
        let for_events = Arc::clone(&shared);
        let made = notify::recommended_watcher(move |event| for_events.note(event));
        *lock(&shared.watcher) = made.map_err(|e| e.to_string());
        let for_thread = Arc::clone(&shared);
        std::thread::Builder::new()
            .name("git-watch".to_owned())
            .spawn(move || for_thread.report(&sender))
            .map_err(|e| GitError::Failed {
                action: "start a thread to watch git".to_owned(),
                reason: e.to_string(),
            })?;
        Ok((Self { shared }, receiver))
    }

    /// Watches a worktree's git directory; with the common one, its branches and
    /// linked worktrees too. Adding one again changes nothing.
    ///
    /// Read HEAD after this and not before, so that no change falls between.
    pub fn add(&self, git_dir: &Path) -> Result<Method, GitError> {
        let identity =
            identity(git_dir).ok_or_else(|| GitError::NotARepository(git_dir.to_owned()))?;
        let known = lock(&self.shared.state).dirs.get(git_dir).map(Dir::facts);
        match known {
            Some((as_before, method)) if as_before == identity => return Ok(method),
            // Another directory at the same path.
            Some(_) => self.remove(git_dir),
            None => {}
        }
        let is_common = !git_dir.join("commondir").exists();
        let folders = folders(git_dir, is_common);
        // Known before it is watched, so that no event is without an owner.
        let dir = Dir {
            identity,
            is_common,
            folders: folders.clone(),
            method: Method::Events,
            seen: Vec::new(),
        };
        lock(&self.shared.state)
            .dirs
            .insert(git_dir.to_owned(), dir);
        let method = match self.shared.watch_folders(&folders) {
            Ok(()) => remote_file_system(git_dir).map_or(Method::Events, |kind| Method::Polling {
                reason: format!("{kind} sends no events for changes made elsewhere"),
            }),
            Err(reason) => Method::Polling { reason },
        };
        let mut state = lock(&self.shared.state);
        if let Some(dir) = state.dirs.get_mut(git_dir) {
            dir.method = method.clone();
            dir.seen = dir.look(git_dir);
        }
        self.shared.wake.notify_one();
        Ok(method)
    }

    /// Watches a common git directory and its linked worktrees no longer.
    pub fn remove_below(&self, common_dir: &Path) {
        let worktrees = common_dir.join("worktrees");
        let known: Vec<_> = lock(&self.shared.state)
            .dirs
            .keys()
            .filter(|dir| *dir == common_dir || dir.parent() == Some(&worktrees))
            .cloned()
            .collect();
        for git_dir in known {
            self.remove(&git_dir);
        }
    }

    /// Watches a git directory no longer.
    pub fn remove(&self, git_dir: &Path) {
        let removed = {
            let mut state = lock(&self.shared.state);
            state.pending.retain(|(dir, _), _| dir != git_dir);
            state.dirs.remove(git_dir)
        };
        if let Some(dir) = removed {
            self.shared.unwatch_folders(&dir.folders);
        }
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        lock(&self.shared.state).is_over = true;
        self.shared.wake.notify_one();
        // The watcher's handler and the watcher hold each other up until now.
        *lock(&self.shared.watcher) = Err("the watch is over".to_owned());
    }
}

/// A panic elsewhere leaves nothing half done under these locks.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The folders to watch for a git directory.
fn folders(git_dir: &Path, is_common: bool) -> Vec<(PathBuf, RecursiveMode)> {
    let mut folders = vec![(git_dir.to_owned(), RecursiveMode::NonRecursive)];
    let mut add = |name: &str, mode| {
        let folder = git_dir.join(name);
        if folder.is_dir() {
            folders.push((folder, mode));
        }
    };
    add("reftable", RecursiveMode::NonRecursive);
    if is_common {
        add("refs/heads", RecursiveMode::Recursive);
        add("worktrees", RecursiveMode::NonRecursive);
    }
    folders
}

/// What tells a folder from another at the same path.
#[cfg(unix)]
fn identity(git_dir: &Path) -> Option<(u64, u64)> {
    use std::os::unix::fs::MetadataExt;
    let metadata = fs::metadata(git_dir).ok()?;
    metadata.is_dir().then(|| (metadata.dev(), metadata.ino()))
}

#[cfg(not(unix))]
fn identity(git_dir: &Path) -> Option<(u64, u64)> {
    git_dir.is_dir().then_some((0, 0))
}

/// The kind of a file system that others may change without our kernel knowing.
#[cfg(target_os = "linux")]
fn remote_file_system(path: &Path) -> Option<&'static str> {
    // The numbers of statfs(2) and of the kernel's linux/magic.h; its type has
    // another width on every platform, the numbers have 32 bits.
    let kind = nix::sys::statfs::statfs(path).ok()?.filesystem_type().0;
    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "only the low 32 bits are the number"
    )]
    match kind as u32 {
        0x6969 => Some("NFS"),
        0x517b | 0xff53_4d42 | 0xfe53_4d42 => Some("SMB"),
        0x0102_1997 => Some("a shared folder (9p)"),
        0x786f_4256 => Some("a shared folder (vboxsf)"),
        0x6573_5546 => Some("FUSE"),
        _ => None,
    }
}

#[cfg(not(target_os = "linux"))]
fn remote_file_system(_: &Path) -> Option<&'static str> {
    None
}

#[derive(Debug)]
struct Dir {
    identity: (u64, u64),
    is_common: bool,
    folders: Vec<(PathBuf, RecursiveMode)>,
    method: Method,
    /// What the last look saw, where it is polled.
    seen: Vec<(Change, Traces)>,
}

/// Of each file that matters: when it was changed, and its number and length.
type Traces = Vec<Option<(Option<std::time::SystemTime>, u64, u64)>>;

impl Dir {
    fn facts(&self) -> ((u64, u64), Method) {
        (self.identity, self.method.clone())
    }

    /// What an event at this path says of this git directory.
    fn meaning(&self, git_dir: &Path, path: &Path) -> &'static [Change] {
        let Ok(within) = path.strip_prefix(git_dir) else {
            return &[];
        };
        let mut parts = within.iter().filter_map(OsStr::to_str);
        match (parts.next(), parts.next(), parts.next()) {
            // The folder itself: deleted, moved, or only its attributes changed.
            (None, ..) if identity(git_dir) == Some(self.identity) => &[],
            (None, ..) => &[Change::Gone],
            (Some("reftable"), Some("tables.list"), None) => {
                if self.is_common {
                    &[Change::Head, Change::Branches]
                } else {
                    &[Change::Head]
                }
            }
            (Some(name), None, None) if HEAD_NAMES.contains(&name) => &[Change::Head],
            _ if !self.is_common => &[],
            (Some("packed-refs"), None, None) => &[Change::Branches],
            (Some("refs"), Some("heads"), Some(_)) => {
                let is_lock = path.extension().is_some_and(|e| e == "lock");
                if is_lock { &[] } else { &[Change::Branches] }
            }
            (Some("worktrees"), _, None) => &[Change::Worktrees],
            _ => &[],
        }
    }

    fn look(&self, git_dir: &Path) -> Vec<(Change, Traces)> {
        if self.method == Method::Events {
            return Vec::new();
        }
        let traces = |names: &[&str]| names.iter().map(|n| trace(&git_dir.join(n))).collect();
        let mut seen = vec![
            (Change::Head, traces(&HEAD_NAMES)),
            (Change::Head, traces(&["reftable/tables.list"])),
        ];
        if self.is_common {
            let heads = ["packed-refs", "refs/heads", "reftable/tables.list"];
            seen.push((Change::Branches, traces(&heads)));
            seen.push((Change::Worktrees, traces(&["worktrees"])));
        }
        seen
    }
}

#[cfg(unix)]
fn trace(path: &Path) -> Option<(Option<std::time::SystemTime>, u64, u64)> {
    use std::os::unix::fs::MetadataExt;
    let metadata = fs::symlink_metadata(path).ok()?;
    Some((metadata.modified().ok(), metadata.ino(), metadata.len()))
}

#[cfg(not(unix))]
fn trace(path: &Path) -> Option<(Option<std::time::SystemTime>, u64, u64)> {
    let metadata = fs::symlink_metadata(path).ok()?;
    Some((metadata.modified().ok(), 0, metadata.len()))
}

/// A burst of events of one kind.
#[derive(Debug, Clone, Copy)]
struct Burst {
    first: Instant,
    last: Instant,
}

impl Burst {
    fn due(self) -> Instant {
        (self.last + QUIET).min(self.first + LONGEST_BURST)
    }
}

#[derive(Debug, Default)]
struct State {
    dirs: HashMap<PathBuf, Dir>,
    /// Bounded by the directories watched.
    pending: BTreeMap<(PathBuf, Change), Burst>,
    is_over: bool,
}

impl State {
    fn note(&mut self, git_dir: &Path, change: Change, now: Instant) {
        self.pending
            .entry((git_dir.to_owned(), change))
            .and_modify(|burst| burst.last = now)
            .or_insert(Burst {
                first: now,
                last: now,
            });
    }

    /// After events were lost: anything may have changed.
    fn note_all(&mut self, now: Instant) {
        let dirs: Vec<_> = self
            .dirs
            .iter()
            .map(|(p, d)| (p.clone(), d.is_common))
            .collect();
        for (git_dir, is_common) in dirs {
            self.note(&git_dir, Change::Head, now);
            if is_common {
                self.note(&git_dir, Change::Branches, now);
                self.note(&git_dir, Change::Worktrees, now);
            }
        }
    }

    /// Takes out what is to be reported now, and the directories that are gone.
    fn take_due(&mut self, now: Instant) -> (Vec<WatchEvent>, Vec<Dir>) {
        let is_due = |burst: &Burst| burst.due() <= now;
        let due: Vec<_> = self
            .pending
            .iter()
            .filter(|(_, burst)| is_due(burst))
            .map(|((git_dir, change), _)| WatchEvent {
                git_dir: git_dir.clone(),
                change: *change,
            })
            .collect();
        self.pending.retain(|_, burst| !is_due(burst));
        let mut gone = Vec::new();
        for event in &due {
            if event.change == Change::Gone {
                gone.extend(self.dirs.remove(&event.git_dir));
                self.pending.retain(|(dir, _), _| *dir != event.git_dir);
            }
        }
        (due, gone)
    }

    fn look_for_presence(&mut self, now: Instant) {
        let gone: Vec<_> = self
            .dirs
            .iter()
            .filter(|(path, dir)| identity(path) != Some(dir.identity))
            .map(|(path, _)| path.clone())
            .collect();
        for git_dir in gone {
            self.note(&git_dir, Change::Gone, now);
        }
    }

    fn poll(&mut self, now: Instant) {
        let mut changes = Vec::new();
        for (path, dir) in &mut self.dirs {
            let seen = dir.look(path);
            for (old, new) in dir.seen.iter().zip(&seen) {
                if old != new {
                    changes.push((path.clone(), new.0));
                }
            }
            dir.seen = seen;
        }
        for (git_dir, change) in changes {
            self.note(&git_dir, change, now);
        }
    }
}

#[derive(Debug)]
struct Shared {
    state: Mutex<State>,
    wake: Condvar,
    /// Or why there is none; all is polled then. Never used under `state`: it
    /// waits for its own thread, which may be waiting for `state` in `note`.
    watcher: Mutex<Result<RecommendedWatcher, String>>,
}

impl Shared {
    fn watch_folders(&self, folders: &[(PathBuf, RecursiveMode)]) -> Result<(), String> {
        let mut watcher = lock(&self.watcher);
        let watcher = watcher.as_mut().map_err(|reason| reason.clone())?;
        for (folder, mode) in folders {
            watcher.watch(folder, *mode).map_err(|e| e.to_string())?;
        }
        Ok(())
    }

    fn unwatch_folders(&self, folders: &[(PathBuf, RecursiveMode)]) {
        if let Ok(watcher) = lock(&self.watcher).as_mut() {
            for (folder, _) in folders {
                // The system lets go of deleted folders by itself.
                let _ = watcher.unwatch(folder);
            }
        }
    }

    /// The folder of linked worktrees is made with the first of them.
    fn follow_worktrees(&self, common_dir: &Path) {
        let folder = (common_dir.join("worktrees"), RecursiveMode::NonRecursive);
        {
            let mut state = lock(&self.state);
            let Some(dir) = state.dirs.get_mut(common_dir) else {
                return;
            };
            let is_there = folder.0.is_dir();
            let known = dir.folders.iter().position(|(path, _)| *path == folder.0);
            match known {
                Some(known) if !is_there => {
                    dir.folders.remove(known);
                    return;
                }
                None if is_there => dir.folders.push(folder.clone()),
                _ => return,
            }
        }
        if let Err(reason) = self.watch_folders(&[folder]) {
            tracing::warn!(%reason, "new worktrees are noticed late");
        }
    }

    /// Takes an event of the system in. Reading counts for nothing, or our own
    /// look at HEAD would be the next event.
    fn note(&self, event: notify::Result<notify::Event>) {
        let now = Instant::now();
        let mut state = lock(&self.state);
        let before = state.pending.len();
        match event {
            Err(reason) => {
                tracing::debug!(%reason, "events of the file system were lost");
                state.note_all(now);
            }
            Ok(event) if event.need_rescan() => state.note_all(now),
            Ok(event) if matches!(event.kind, EventKind::Access(AccessKind::Open(_))) => {}
            Ok(event) => {
                for path in &event.paths {
                    let found: Vec<_> = state
                        .dirs
                        .iter()
                        .map(|(dir, d)| (dir.clone(), d.meaning(dir, path)))
                        .filter(|(_, changes)| !changes.is_empty())
                        .collect();
                    for (git_dir, changes) in found {
                        for change in changes {
                            state.note(&git_dir, *change, now);
                        }
                    }
                }
            }
        }
        if state.pending.len() > before {
            self.wake.notify_one();
        }
    }

    /// Sends what is due, until the watch or the receiver is dropped. Sleeps
    /// without a limit but the next look where nothing is pending.
    fn report(&self, sender: &mpsc::Sender<WatchEvent>) {
        let mut next_presence = Instant::now() + PRESENCE_INTERVAL;
        let mut next_poll = Instant::now() + POLL_INTERVAL;
        let mut state = lock(&self.state);
        while !state.is_over {
            let now = Instant::now();
            if now >= next_presence {
                state.look_for_presence(now);
                next_presence = now + PRESENCE_INTERVAL;
            }
            let polls = state.dirs.values().any(|d| d.method != Method::Events);
            if polls && now >= next_poll {
                state.poll(now);
                next_poll = now + POLL_INTERVAL;
            }
            let (due, gone) = state.take_due(now);
            if !due.is_empty() {
                drop(state);
                for dir in gone {
                    self.unwatch_folders(&dir.folders);
                }
                for event in due {
                    if event.change == Change::Worktrees {
                        self.follow_worktrees(&event.git_dir);
                    }
                    if sender.blocking_send(event).is_err() {
                        return;
                    }
                }
                state = lock(&self.state);
                continue;
            }
            let mut until = state.pending.values().map(|b| b.due()).min();
            if polls {
                until = Some(until.map_or(next_poll, |u| u.min(next_poll)));
            }
            if !state.dirs.is_empty() {
                until = Some(until.map_or(next_presence, |u| u.min(next_presence)));
            }
            state = match until {
                Some(until) => {
                    let wait = until.saturating_duration_since(Instant::now());
                    let waited = self.wake.wait_timeout(state, wait);
                    waited.unwrap_or_else(PoisonError::into_inner).0
                }
                None => self
                    .wake
                    .wait(state)
                    .unwrap_or_else(PoisonError::into_inner),
            };
        }
    }
}

#[cfg(test)]
mod tests;
