//! What every command needs: where it stands, and the daemon.

use std::cell::RefCell;
use std::env;
use std::fs::{File, OpenOptions};
use std::io::{Read, Seek, SeekFrom};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, anyhow};
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::Value;

use super::report::{ExitStatus, Report};
use super::ui::Ui;
use crate::api::client::{self, CallError, Client};
use crate::api::types::{At, Request};
use crate::config::{FILE_NAME, Machine, Paths, ProjectConfig};
use crate::git::Location;

/// How long a new daemon may take until it answers.
pub(super) const START_LIMIT: Duration = Duration::from_secs(10);
/// How long to wait for another daemon once ours gave up: it lost a race, or failed.
const WINNER_LIMIT: Duration = Duration::from_millis(1500);
const LOG_LINES: usize = 8;

/// The version of this program.
pub(super) const VERSION: &str = env!("CARGO_PKG_VERSION");

/// Where a command stands and whom it talks to.
pub(super) struct Context {
    pub(super) ui: Ui,
    pub(super) paths: Paths,
    /// Where the user stands, or what `-C` says.
    pub(super) dir: PathBuf,
    client: RefCell<Option<Client>>,
}

impl Context {
    pub(super) fn new(ui: Ui, dir: Option<PathBuf>) -> Result<Self, Report> {
        let here = env::current_dir()
            .context("find the current folder")
            .map_err(|e| Report::refused(e).hint("go to a folder that exists"))?;
        let dir = match dir {
            Some(dir) => here.join(dir),
            None => here,
        };
        Ok(Self {
            ui,
            paths: Paths::resolve()?,
            dir,
            client: RefCell::new(None),
        })
    }

    /// The repository the user stands in.
    pub(super) fn location(&self) -> Result<Location, Report> {
        Ok(Location::discover(&self.dir)?)
    }

    /// The project the user stands in. Only the daemon knows for sure; this keeps it asleep
    /// where nothing hints at a project.
    pub(super) fn at(&self) -> Result<At, Report> {
        let location = self.location()?;
        if is_marked(&location) {
            return Ok(at(&location));
        }
        if let Some(file) = config_file(&location) {
            // The daemon has not seen it yet, so its faults are told here.
            ProjectConfig::load(&file)?;
            return Ok(at(&location));
        }
        let top = location.worktree.as_deref().unwrap_or(&location.git_dir);
        Err(Report::new(
            ExitStatus::Config,
            anyhow!("{} has no {FILE_NAME}", top.display()),
        )
        .hint("make this repository a project with `dbranch init`"))
    }

    /// Asks the daemon, starting it when none runs, and shows what it says meanwhile.
    pub(super) fn call(&self, request: &Request) -> Result<Value, Report> {
        let mut slot = self.client.borrow_mut();
        let client = match &mut *slot {
            Some(client) => client,
            empty => empty.insert(connect_or_start(&self.paths, START_LIMIT)?),
        };
        let mut progress = self.ui.progress();
        let mut answer = client.call(request, |message| progress.show(message));
        if matches!(answer, Err(CallError::Broken(_))) && request.is_repeatable() {
            // The daemon died under it: the next one takes up where it left off.
            *client = connect_or_start(&self.paths, START_LIMIT)?;
            answer = client.call(request, |message| progress.show(message));
        }
        drop(progress);
        if let Some(version) = client.daemon_version().filter(|v| *v != VERSION) {
            self.ui.warn(format_args!(
                "the daemon is dbranch {version}, this is {VERSION}; restart it with `dbranch shutdown` and `dbranch start --detach`"
            ));
        }
        Ok(answer?)
    }

    pub(super) fn call_as<T: DeserializeOwned>(&self, request: &Request) -> Result<T, Report> {
        Ok(client::decode(self.call(request)?)?)
    }

    /// Asks, then shows the answer: as it came with `--json`, else by `show`.
    pub(super) fn answer<T: DeserializeOwned>(
        &self,
        request: &Request,
        show: impl FnOnce(Ui, &T) -> Result<(), Report>,
    ) -> Result<T, Report> {
        let value = self.call(request)?;
        if self.ui.json {
            self.ui.answer_json(&value)?;
        }
        let answer = client::decode(value)?;
        if !self.ui.json {
            show(self.ui, &answer)?;
        }
        Ok(answer)
    }

    /// Answers of several requests, as one array.
    pub(super) fn json_array(&self, values: &[impl Serialize]) -> Result<(), Report> {
        if self.ui.json {
            self.ui.answer_json(&values)?;
        }
        Ok(())
    }
}

/// Where a location stands, for the daemon.
pub(super) fn at(location: &Location) -> At {
    At {
        common_dir: location.common_dir.clone(),
        git_dir: location.git_dir.clone(),
        worktree: location.worktree.clone(),
    }
}

/// Whether the daemon has left its mark: the project's id in `<common dir>/dbranch/project`.
pub(super) fn is_marked(location: &Location) -> bool {
    location.common_dir.join("dbranch/project").is_file()
}

/// The project's file: the main worktree's, as for the daemon, else this one's.
pub(super) fn config_file(location: &Location) -> Option<PathBuf> {
    [&location.main_worktree, &location.worktree]
        .into_iter()
        .flatten()
        .map(|top| top.join(FILE_NAME))
        .find(|file| file.exists())
}

/// Connects to the daemon, or starts one and waits until it answers, `limit` at most.
pub(super) fn connect_or_start(paths: &Paths, limit: Duration) -> Result<Client, Report> {
    match Client::connect(paths)? {
        Some(client) => Ok(client),
        None => start(paths, limit),
    }
}

/// Starts a daemon in the background. Losing a race against another start is fine.
pub(super) fn start(paths: &Paths, limit: Duration) -> Result<Client, Report> {
    // What is wrong with the settings is told here, not by way of the daemon's log.
    Machine::load(paths)?;
    paths.create()?;
    let log_file = paths.daemon_log();
    let mut log = open_log(&log_file)?;
    let log_start = log.seek(SeekFrom::End(0)).unwrap_or(0);
    let mut child = spawn(&log)?;
    let started = Instant::now();
    let mut ended = None;
    let mut pause = Duration::from_millis(1);
    loop {
        if let Some(mut client) = Client::connect(paths)? {
            // The socket is there before the daemon is done with what it found.
            let left = limit.saturating_sub(started.elapsed());
            if client.call_within(left, &Request::Ping, drop).is_ok() {
                return Ok(client);
            }
        }
        if ended.is_none() {
            ended = child
                .try_wait()
                .ok()
                .flatten()
                .map(|status| (status, Instant::now()));
        }
        let why = match ended {
            Some((status, since)) if since.elapsed() >= WINNER_LIMIT => {
                format!("it ended with {status}")
            }
            _ if started.elapsed() >= limit => format!("no answer within {limit:?}"),
            _ => {
                std::thread::sleep(pause);
                pause = (pause * 2).min(Duration::from_millis(20));
                continue;
            }
        };
        let said = last_lines(&log_file, log_start);
        let said = if said.is_empty() {
            said
        } else {
            format!("\n{said}")
        };
        return Err(Report::new(
            ExitStatus::Unreachable,
            anyhow!("the daemon did not start: {why}{said}"),
        )
        .hint("see what it says in the foreground with `dbranch start`"));
    }
}

fn open_log(path: &Path) -> Result<File, Report> {
    let log = OpenOptions::new()
        .create(true)
        .append(true)
        .read(true)
        .mode(0o600)
        .open(path)
        .with_context(|| format!("open {}", path.display()))?;
    Ok(log)
}

/// Runs this program as a daemon that keeps nothing of ours: no terminal, no folder that could
/// not be unmounted, no git variables of the hook that may have called us.
fn spawn(log: &File) -> Result<Child, Report> {
    let exe = env::current_exe().context("find the dbranch program")?;
    let (out, err) = (log.try_clone(), log.try_clone());
    let mut command = Command::new(&exe);
    command
        .args(["start", "--detached"])
        .current_dir("/")
        .stdin(Stdio::null())
        .stdout(out.context("share the log file")?)
        .stderr(err.context("share the log file")?);
    for (name, _) in env::vars_os() {
        if name.to_string_lossy().starts_with("GIT_") {
            command.env_remove(&name);
        }
    }
    let child = command
        .spawn()
        .with_context(|| format!("start {}", exe.display()))?;
    Ok(child)
}

/// The last lines that a file has got since `start`.
fn last_lines(path: &Path, start: u64) -> String {
    let mut text = Vec::new();
    let read = File::open(path).and_then(|mut file| {
        file.seek(SeekFrom::Start(start))?;
        file.take(1 << 20).read_to_end(&mut text)
    });
    if read.is_err() {
        return String::new();
    }
    let text = String::from_utf8_lossy(&text);
    let lines: Vec<&str> = text.lines().collect();
    let lines = &lines[lines.len().saturating_sub(LOG_LINES)..];
    lines
        .iter()
        .map(|line| format!("  {line}"))
        .collect::<Vec<_>>()
        .join("\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_lines_are_those_of_this_start() {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), "old\na\nb\n").unwrap();
        assert_eq!(last_lines(file.path(), 4), "  a\n  b");
        assert_eq!(last_lines(file.path(), 8), "");
        assert_eq!(last_lines(Path::new("/nowhere"), 0), "");
    }

    #[test]
    fn a_project_is_hinted_at_by_its_mark_or_its_file() {
        let dir = tempfile::tempdir().unwrap();
        let location = Location {
            common_dir: dir.path().join(".git"),
            git_dir: dir.path().join(".git"),
            worktree: Some(dir.path().into()),
            main_worktree: Some(dir.path().into()),
        };
        assert!(!is_marked(&location) && config_file(&location).is_none());
        std::fs::create_dir_all(location.common_dir.join("dbranch")).unwrap();
        std::fs::write(location.common_dir.join("dbranch/project"), "x").unwrap();
        assert!(is_marked(&location));
        std::fs::write(dir.path().join(FILE_NAME), "{}").unwrap();
        assert_eq!(config_file(&location), Some(dir.path().join(FILE_NAME)));
    }
}
