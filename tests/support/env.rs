//! One user's world: a home for dbranch, a git repository, ports, nothing inherited.

use std::ffi::OsStr;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use serde_json::{Value, json};
use tempfile::TempDir;

use super::leftovers::{containers_in, is_alive, kill_9, mounts_in, processes_in};
use super::ports::Ports;
use super::process::{self, Output};
use super::{Dataset, Image, Server, Session, Storage, required, wait_until};

/// How long one command may take. Far more than any should.
const COMMAND_LIMIT: Duration = Duration::from_secs(120);

/// An environment. Dropping it stops all that runs in it and asserts that nothing is left.
pub(crate) struct TestEnv {
    base: PathBuf,
    /// When the pool must lie on a file system of its own.
    pool: Option<PathBuf>,
    pub(crate) ports: Ports,
    pub(crate) storage: Storage,
    pub(crate) server: Server,
    image: Option<String>,
    bin_dir: Option<PathBuf>,
    vars: Vec<(String, String)>,
    /// Where the pool is, on ZFS.
    dataset: Option<Dataset>,
    /// Removed with the environment.
    _folders: Vec<TempDir>,
    /// Unmounted after them.
    file_system: Option<Image>,
}

impl TestEnv {
    /// An environment whose test makes no database.
    pub(crate) fn bare() -> Self {
        Self::make(Server::Native, Storage::Copy, None, None, None)
    }

    /// An environment with that server and storage, or nothing where they can't be had.
    pub(crate) fn with(server: Server, storage: Storage) -> Option<Self> {
        // psql and pgbench come from there for Docker too.
        let bin_dir = match server {
            Server::Native | Server::Native18 => required(server.bin_dir())?,
            Server::Docker | Server::Docker18 => required(Server::Native.bin_dir())?,
        };
        let image = match server {
            Server::Native | Server::Native18 => None,
            Server::Docker | Server::Docker18 => Some(required(server.image())?),
        };
        let pool = required(storage.folder())?;
        Some(Self::make(server, storage, Some(bin_dir), image, pool))
    }

    /// An environment whose pool lies on a small file system of its own.
    pub(crate) fn on(image: Image, storage: Storage) -> Option<Self> {
        let bin_dir = required(Server::Native.bin_dir())?;
        let pool = Some(image.point().to_owned());
        let mut env = Self::make(Server::Native, storage, Some(bin_dir), None, pool);
        env.file_system = Some(image);
        Some(env)
    }

    /// The file system of [`TestEnv::on`].
    pub(crate) fn image(&self) -> &Image {
        self.file_system.as_ref().expect("made with `on`")
    }

    /// The quickest environment that has a server, for tests to which the drivers don't matter.
    pub(crate) fn quick() -> Option<Self> {
        let storage = if Storage::Btrfs.folder().is_ok() {
            Storage::Btrfs
        } else {
            Storage::Copy
        };
        Self::with(Server::Native, storage)
    }

    /// [`TestEnv::quick`], with the first branch `main` made and the hooks installed.
    pub(crate) fn ready() -> Option<Self> {
        let env = Self::quick()?;
        env.set_up();
        Some(env)
    }

    fn make(
        server: Server,
        storage: Storage,
        bin_dir: Option<PathBuf>,
        image: Option<String>,
        pool_in: Option<PathBuf>,
    ) -> Self {
        // Short, because a Unix socket's path may have 107 bytes.
        let parent = std::env::var_os("DBRANCH_TEST_TMP").unwrap_or_else(|| "/tmp".into());
        let folder = make_folder(Path::new(&parent));
        let base = folder.path().canonicalize().expect("just made");
        let mut folders = vec![folder];
        let mut dataset = None;
        let pool = pool_in.map(|dir| {
            if storage == Storage::Zfs {
                let (made, pool) = Dataset::make(&dir);
                dataset = Some(made);
                return pool;
            }
            let folder = make_folder(&dir);
            let pool = folder.path().canonicalize().expect("just made");
            folders.push(folder);
            pool
        });
        for sub in ["home", "user", "repo", "elsewhere"] {
            let dir = base.join(sub);
            fs::create_dir(&dir).expect("the base folder is ours");
            set_mode(&dir, 0o711);
        }
        let env = Self {
            base,
            pool,
            ports: Ports::claim(),
            storage,
            server,
            image,
            bin_dir,
            vars: Vec::new(),
            dataset,
            _folders: folders,
            file_system: None,
        };
        env.init_repo(&env.repo());
        env
    }

    /// A folder of this environment: `home` is dbranch's, `user` is HOME, `repo` the
    /// repository, `elsewhere` none.
    pub(crate) fn path(&self, sub: &str) -> PathBuf {
        self.base.join(sub)
    }

    /// The folder that holds all of them.
    pub(crate) fn base(&self) -> &Path {
        &self.base
    }

    pub(crate) fn repo(&self) -> PathBuf {
        self.path("repo")
    }

    /// The folder that holds the volumes.
    pub(crate) fn pool(&self) -> PathBuf {
        self.pool.clone().unwrap_or_else(|| self.path("home/pool"))
    }

    /// The dataset of the pool.
    pub(crate) fn dataset(&self) -> &Dataset {
        self.dataset.as_ref().expect("the storage is ZFS")
    }

    /// Sets a variable for all programs that follow.
    pub(crate) fn set(&mut self, name: &str, value: impl AsRef<OsStr>) {
        let value = value.as_ref().to_str().expect("tests set text").to_owned();
        self.vars.retain(|(n, _)| n != name);
        self.vars.push((name.to_owned(), value));
    }

    pub(crate) fn unset(&mut self, name: &str) {
        self.vars.retain(|(n, _)| n != name);
    }

    // ---- programs ------------------------------------------------------------------------

    /// The folders of programs: the built `dbranch`, postgres, and the system's.
    pub(crate) fn search_path(&self) -> String {
        let built = Path::new(env!("CARGO_BIN_EXE_dbranch"));
        let mut path = vec![built.parent().expect("a file has a folder").to_owned()];
        path.extend(self.bin_dir.clone());
        path.extend(
            ["/usr/local/bin", "/usr/bin", "/bin", "/usr/sbin", "/sbin"].map(PathBuf::from),
        );
        let path = std::env::join_paths(path).expect("no colon in these");
        path.into_string().expect("tests set text")
    }

    /// A program in this environment, which inherits nothing from ours.
    pub(crate) fn command(&self, program: impl AsRef<OsStr>, dir: &Path) -> Command {
        let mut command = Command::new(program);
        command
            .current_dir(dir)
            .env_clear()
            .env("PATH", self.search_path())
            .env("HOME", self.path("user"))
            .env("LANG", "C.UTF-8")
            .env("TERM", "dumb")
            .env("RUST_BACKTRACE", "1")
            .env("GIT_CONFIG_NOSYSTEM", "1")
            .env("GIT_CONFIG_GLOBAL", "/dev/null")
            .env("DBRANCH_HOME", self.path("home"))
            .env("DBRANCH_RUNTIME", self.server.runtime())
            .env("DBRANCH_STORAGE", self.storage.name());
        for who in ["AUTHOR", "COMMITTER"] {
            command
                .env(format!("GIT_{who}_NAME"), "Ada")
                .env(format!("GIT_{who}_EMAIL"), "ada@example.com")
                .env(format!("GIT_{who}_DATE"), "2026-01-01T00:00:00Z");
        }
        if let Some(dir) = &self.bin_dir {
            command.env("DBRANCH_PG_BIN", dir);
        }
        if let Some(pool) = &self.pool {
            command.env("DBRANCH_POOL", pool);
        }
        if let Some(host) = std::env::var_os("DOCKER_HOST") {
            command.env("DOCKER_HOST", host);
        }
        command.envs(self.vars.iter().map(|(n, v)| (n, v)));
        command
    }

    #[track_caller]
    pub(crate) fn dbranch(&self, args: &[&str]) -> Output {
        self.dbranch_in(&self.repo(), args)
    }

    #[track_caller]
    pub(crate) fn dbranch_in(&self, dir: &Path, args: &[&str]) -> Output {
        let mut command = self.command("dbranch", dir);
        command.args(args);
        process::run(command, COMMAND_LIMIT)
    }

    #[track_caller]
    pub(crate) fn git(&self, args: &[&str]) -> Output {
        self.git_in(&self.repo(), args)
    }

    #[track_caller]
    pub(crate) fn git_in(&self, dir: &Path, args: &[&str]) -> Output {
        let mut command = self.command("git", dir);
        command.args(args);
        process::run(command, COMMAND_LIMIT)
    }

    #[track_caller]
    pub(crate) fn run(&self, program: &str, args: &[&str]) -> Output {
        let mut command = self.command(program, &self.path("elsewhere"));
        command.args(args);
        process::run(command, COMMAND_LIMIT)
    }

    /// Makes a git repository with one commit on `main`.
    pub(crate) fn init_repo(&self, dir: &Path) {
        fs::create_dir_all(dir).expect("the base folder is ours");
        let _ = self.git_in(dir, &["init", "-q", "-b", "main"]).ok();
        fs::write(dir.join("app.txt"), "app\n").expect("the base folder is ours");
        let _ = self.git_in(dir, &["add", "app.txt"]).ok();
        let _ = self.git_in(dir, &["commit", "-q", "-m", "first"]).ok();
    }

    // ---- dbranch -------------------------------------------------------------------------

    /// Writes a config as a team would have committed it.
    pub(crate) fn write_config(&self, dir: &Path, name: &str, proxy_port: u16) {
        let config = json!({ "name": name, "proxy_port": proxy_port });
        fs::write(dir.join(".dbranch.config.json"), config.to_string()).expect("writable");
        self.adapt_config(dir);
    }

    /// Puts this environment's ports and server into a config.
    pub(crate) fn adapt_config(&self, dir: &Path) {
        edit_config(dir, |config| {
            config["port_min"] = json!(self.ports.first + 4);
            config["port_max"] = json!(self.ports.last());
            if let Some(image) = &self.image {
                config["postgres"]["image"] = json!(image);
            }
        });
    }

    /// `init`, `init-postgres` and `install-hooks` in the repository.
    #[track_caller]
    pub(crate) fn set_up(&self) {
        self.write_config(&self.repo(), "shop", self.ports.first);
        let _ = self.dbranch(&["init", "--yes"]).ok();
        let _ = self.dbranch(&["init-postgres"]).ok();
        let _ = self.dbranch(&["install-hooks"]).ok();
    }

    #[track_caller]
    pub(crate) fn url(&self) -> String {
        self.dbranch(&["url"]).text()
    }

    /// The URL of a branch's own port, whatever is active.
    #[track_caller]
    pub(crate) fn url_of(&self, branch: &str) -> String {
        self.dbranch(&["url", branch]).text()
    }

    /// Runs SQL through the one URL and returns what it prints.
    #[track_caller]
    pub(crate) fn sql(&self, sql: &str) -> String {
        self.psql(&self.url(), sql).text()
    }

    /// Runs SQL on a branch through its own port.
    #[track_caller]
    pub(crate) fn sql_on(&self, branch: &str, sql: &str) -> String {
        self.psql(&self.url_of(branch), sql).text()
    }

    #[track_caller]
    pub(crate) fn psql(&self, url: &str, sql: &str) -> Output {
        self.psql_in(&self.path("elsewhere"), url, sql)
    }

    /// Runs psql in a folder.
    #[track_caller]
    pub(crate) fn psql_in(&self, dir: &Path, url: &str, sql: &str) -> Output {
        let mut psql = self.command("psql", dir);
        psql.args(["-X", "-q", "-A", "-t", "-v", "ON_ERROR_STOP=1"])
            .args(["-d", url, "-c", sql]);
        process::run(psql, COMMAND_LIMIT)
    }

    /// A psql that stays connected.
    pub(crate) fn session(&self, url: &str) -> Session {
        let mut psql = self.command("psql", &self.path("elsewhere"));
        psql.args(["-d", url]);
        Session::start(psql)
    }

    #[track_caller]
    pub(crate) fn show(&self, branch: &str) -> Value {
        self.dbranch(&["show", branch, "--json"]).json()
    }

    #[track_caller]
    pub(crate) fn state(&self, branch: &str) -> String {
        self.show(branch)["state"]
            .as_str()
            .expect("a text")
            .to_owned()
    }

    /// The names of the branches, sorted.
    #[track_caller]
    pub(crate) fn branches(&self) -> Vec<String> {
        let list = self.dbranch(&["list", "--json"]).json();
        let mut names: Vec<String> = list
            .as_array()
            .expect("an array")
            .iter()
            .map(|b| b["name"].as_str().expect("a text").to_owned())
            .collect();
        names.sort();
        names
    }

    /// The branch that the repository's endpoint shows.
    #[track_caller]
    pub(crate) fn active(&self) -> String {
        let status = self.dbranch(&["status", "--json"]).json();
        status["branch"].as_str().unwrap_or_default().to_owned()
    }

    #[track_caller]
    pub(crate) fn daemon_pid(&self) -> u32 {
        let status = self.dbranch(&["status", "--json"]).json();
        let pid = status["daemon"]["pid"].as_u64().expect("a number");
        u32::try_from(pid).expect("a pid")
    }

    /// Kills the daemon without giving it a chance, and waits until it is gone.
    #[track_caller]
    pub(crate) fn kill_daemon(&self) {
        let pid = self.daemon_pid();
        kill_9(pid);
        wait_until(super::LIMIT, "the killed daemon is gone", || !is_alive(pid));
    }

    /// The folders in the pool that may hold a volume.
    pub(crate) fn volumes(&self) -> Vec<PathBuf> {
        let mut found: Vec<PathBuf> = fs::read_dir(self.pool())
            .into_iter()
            .flatten()
            .flatten()
            .filter(|e| e.file_type().is_ok_and(|t| t.is_dir()))
            .map(|e| e.path())
            .collect();
        found.sort();
        found
    }

    /// The servers that run here: `postgres -D` processes, not their children, which bear the
    /// same name for a moment after their fork.
    pub(crate) fn servers(&self) -> usize {
        let found: Vec<_> = self
            .folders()
            .iter()
            .flat_map(|dir| processes_in(dir))
            .filter(|p| p.command.contains("postgres") && p.command.contains("-D"))
            .collect();
        let is_child = |pid: u32| {
            // The parent's pid is the second field behind the name (proc(5)).
            let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
            let parent = stat.rsplit(") ").next().and_then(|s| s.split(' ').nth(1));
            found
                .iter()
                .any(|p| parent == Some(p.pid.to_string().as_str()))
        };
        found.iter().filter(|p| !is_child(p.pid)).count()
    }

    /// [`TestEnv::servers`] by what they were started with: where their file system was unmounted, the
    /// folder that they work in has no place any more.
    pub(crate) fn servers_anywhere(&self) -> usize {
        let pool = self.pool().display().to_string();
        let commands = fs::read_dir("/proc").into_iter().flatten().flatten();
        commands
            .filter_map(|e| fs::read(e.path().join("cmdline")).ok())
            .map(|command| String::from_utf8_lossy(&command).into_owned())
            .filter(|command| command.contains("postgres\0-D\0") && command.contains(&pool))
            .count()
    }

    pub(crate) fn containers(&self) -> Vec<String> {
        if matches!(self.server, Server::Native | Server::Native18) {
            return Vec::new();
        }
        self.folders()
            .iter()
            .flat_map(|dir| containers_in(dir))
            .collect()
    }

    fn folders(&self) -> Vec<PathBuf> {
        std::iter::once(self.base.clone())
            .chain(self.pool.clone())
            .collect()
    }

    // ---- the end -------------------------------------------------------------------------

    /// Everything of this environment that still runs or is mounted.
    fn leftovers(&self) -> Vec<String> {
        let mut found: Vec<String> = self.containers();
        for dir in self.folders() {
            found.extend(processes_in(&dir).iter().map(|p| format!("{p:?}")));
            found.extend(self.mounts(&dir).iter().map(|m| m.display().to_string()));
        }
        found
    }

    /// The mounts in a folder of this environment, but for those that are volumes.
    fn mounts(&self, dir: &Path) -> Vec<PathBuf> {
        if self.dataset.is_some() && self.pool.as_deref() == Some(dir) {
            return Vec::new();
        }
        mounts_in(dir)
    }

    fn remove_by_force(&self) {
        for dir in self.folders() {
            for process in processes_in(&dir) {
                kill_9(process.pid);
            }
            for mount in self.mounts(&dir).iter().rev() {
                let _ = Command::new("umount").arg(mount).output();
            }
        }
        for id in self.containers() {
            let _ = Command::new("docker").args(["rm", "-fv", &id]).output();
        }
    }

    /// Shows the end of each log, for a test that failed.
    #[expect(
        clippy::print_stderr,
        reason = "the test runner shows it with the failure"
    )]
    fn show_logs(&self) {
        let mut folders = vec![self.path("home")];
        while let Some(dir) = folders.pop() {
            for entry in fs::read_dir(&dir).into_iter().flatten().flatten() {
                let path = entry.path();
                let is_folder = entry.file_type().is_ok_and(|t| t.is_dir());
                if is_folder && path.file_name() != Some("data".as_ref()) {
                    folders.push(path);
                } else if path.extension() == Some("log".as_ref()) {
                    let text = fs::read(&path).unwrap_or_default();
                    let text = String::from_utf8_lossy(&text);
                    let lines: Vec<&str> = text.lines().rev().take(40).collect();
                    let tail: Vec<&str> = lines.into_iter().rev().collect();
                    eprintln!("-- {}\n{}", path.display(), tail.join("\n"));
                }
            }
        }
    }
}

impl Drop for TestEnv {
    fn drop(&mut self) {
        // A test may have set faults or folders that are gone.
        self.vars.clear();
        if std::thread::panicking() {
            self.show_logs();
            self.remove_by_force();
            return;
        }
        if !self.leftovers().is_empty() {
            let mut shutdown = self.command("dbranch", &self.base);
            shutdown.args(["shutdown", "--stop-branches"]);
            let out = process::run(shutdown, COMMAND_LIMIT);
            let deadline = std::time::Instant::now() + Duration::from_secs(5);
            let mut left = self.leftovers();
            // The servers are gone by now; the daemon itself may be in its last breath.
            while self.servers() == 0 && !left.is_empty() && std::time::Instant::now() < deadline {
                std::thread::sleep(Duration::from_millis(5));
                left = self.leftovers();
            }
            if out.code != Some(0) || !left.is_empty() {
                self.show_logs();
                self.remove_by_force();
                panic!("left after `dbranch shutdown --stop-branches`: {left:#?}{out}");
            }
        }
    }
}

/// Changes a config as a person would, with an editor.
pub(crate) fn edit_config(dir: &Path, edit: impl FnOnce(&mut Value)) {
    let file = dir.join(".dbranch.config.json");
    let text = fs::read_to_string(&file).expect("the config file was written");
    let mut config = serde_json::from_str(&text).expect("the config file is JSON");
    edit(&mut config);
    fs::write(&file, format!("{config:#}\n")).expect("writable");
}

fn make_folder(parent: &Path) -> TempDir {
    let folder = tempfile::Builder::new()
        .prefix("dbt-")
        .rand_bytes(5)
        .tempdir_in(parent)
        .unwrap_or_else(|e| panic!("no folder can be made in {}: {e}", parent.display()));
    // The server's user passes through.
    set_mode(folder.path(), 0o711);
    folder
}

pub(super) fn set_mode(path: &Path, mode: u32) {
    fs::set_permissions(path, fs::Permissions::from_mode(mode)).expect("ours");
}
