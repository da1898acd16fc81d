//! What is measured: a user's home with a daemon, a git repository with dbranch's hook,
//! and beside it the same repository without one and with one that does nothing.

use std::fs::{self, Permissions};
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use serde_json::{Value, json};
use tempfile::TempDir;
use tokio_postgres::{Client, Config};

use crate::client;
use crate::leftovers::{containers_in, is_alive, kill_9, mounts_in, processes_in};
use crate::pool::{self, Pool};
use crate::ports::Ports;

/// What runs the servers.
#[derive(Debug, Clone)]
pub(crate) enum Runtime {
    Native { bin_dir: PathBuf },
    Docker { image: String },
}

impl Runtime {
    pub(crate) fn name(&self) -> &'static str {
        match self {
            Self::Native { .. } => "native",
            Self::Docker { .. } => "docker",
        }
    }
}

/// One of the three repositories.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Repo {
    Ours,
    /// No hook at all.
    Plain,
    /// A hook that does nothing: what git pays for starting a shell.
    Idle,
}

/// A running dbranch. Dropping it stops all it started and removes all it made.
pub(crate) struct World<'a> {
    pub(crate) runtime: Runtime,
    pub(crate) pool: &'a Pool,
    base: PathBuf,
    _folder: TempDir,
    ports: Ports,
    url: Option<Config>,
}

impl<'a> World<'a> {
    pub(crate) fn set_up(pool: &'a Pool, runtime: Runtime) -> Result<Self> {
        // Short: a Unix socket's path may have 107 bytes.
        let parent = std::env::var_os("DBRANCH_TEST_TMP").unwrap_or_else(|| "/tmp".into());
        let folder = pool::temp_folder(Path::new(&parent))?;
        let ports = Ports::claim();
        let mut world = Self {
            runtime,
            pool,
            base: folder.path().canonicalize()?,
            _folder: folder,
            ports,
            url: None,
        };
        for sub in ["home", "user", "ours", "plain", "idle", "floor"] {
            let dir = world.path(sub);
            fs::create_dir(&dir)?;
            fs::set_permissions(&dir, Permissions::from_mode(0o711))?;
        }
        for repo in [Repo::Ours, Repo::Plain, Repo::Idle] {
            world.git(repo, &["init", "-q", "-b", "main"])?;
            fs::write(world.dir(repo).join("app.txt"), "app\n")?;
            world.git(repo, &["add", "app.txt"])?;
            world.git(repo, &["commit", "-q", "-m", "first"])?;
            // git's own samples would do no harm, but one repository shall be as the other.
            let hooks = world.dir(repo).join(".git/hooks");
            fs::remove_dir_all(&hooks).or_else(|e| match e.kind() {
                std::io::ErrorKind::NotFound => Ok(()),
                _ => Err(e),
            })?;
            fs::create_dir(&hooks)?;
        }
        let hook = world.dir(Repo::Idle).join(".git/hooks/post-checkout");
        fs::write(&hook, "#!/bin/sh\nexit 0\n")?;
        fs::set_permissions(&hook, Permissions::from_mode(0o755))?;

        let first = world.ports.first;
        let mut config = json!({
            "name": "bench",
            "proxy_port": first,
            "port_min": first + 4,
            "port_max": world.ports.last(),
        });
        if let Runtime::Docker { image } = &world.runtime {
            config["postgres"]["image"] = json!(image);
        }
        fs::write(
            world.dir(Repo::Ours).join(".dbranch.config.json"),
            config.to_string(),
        )?;
        world.dbranch(&["init", "--yes"])?;
        world.dbranch(&["init-postgres"])?;
        world.dbranch(&["install-hooks"])?;
        let url = world.dbranch(&["url"])?;
        world.url = Some(url.trim().parse().context("parse the URL")?);
        Ok(world)
    }

    pub(crate) fn path(&self, sub: &str) -> PathBuf {
        self.base.join(sub)
    }

    pub(crate) fn dir(&self, repo: Repo) -> PathBuf {
        self.path(match repo {
            Repo::Ours => "ours",
            Repo::Plain => "plain",
            Repo::Idle => "idle",
        })
    }

    /// The one address, through the proxy.
    pub(crate) fn url(&self) -> &Config {
        self.url.as_ref().expect("set when the world is")
    }

    /// The address of a branch's instance, past the proxy.
    pub(crate) fn instance(&self, branch: &str) -> Result<Config> {
        let backend = &self.show(branch)?["backend"];
        let dir = backend["unix"].as_str().context("no Unix socket")?;
        let port = backend["port"].as_u64().context("no port")?;
        Ok(client::at_socket(
            self.url(),
            Path::new(dir),
            u16::try_from(port)?,
        ))
    }

    /// A session at a branch's instance, past the proxy.
    pub(crate) async fn session(&self, branch: &str) -> Result<Client> {
        client::connect(&self.instance(branch)?).await
    }

    pub(crate) fn volume(&self, branch: &str) -> Result<PathBuf> {
        let show = self.show(branch)?;
        let volume = show["volume"].as_str().context("no volume")?;
        Ok(volume.into())
    }

    pub(crate) fn show(&self, branch: &str) -> Result<Value> {
        self.ask(&["show", branch, "--json"])
    }

    /// `exclusive_bytes` of `dbranch usage`.
    pub(crate) fn exclusive_bytes(&self, branch: &str) -> Result<u64> {
        let usage = self.ask(&["usage", "--json"])?;
        let all = usage["branches"].as_array().context("no branches")?;
        let ours = all.iter().find(|b| b["name"] == branch);
        ours.and_then(|b| b["exclusive_bytes"].as_u64())
            .with_context(|| format!("no exclusive_bytes of {branch}"))
    }

    fn ask(&self, args: &[&str]) -> Result<Value> {
        Ok(serde_json::from_str(&self.dbranch(args)?)?)
    }

    pub(crate) fn dbranch(&self, args: &[&str]) -> Result<String> {
        pool::run(self.command("dbranch", Repo::Ours).args(args))
    }

    pub(crate) fn git(&self, repo: Repo, args: &[&str]) -> Result<String> {
        pool::run(self.command("git", repo).args(args))
    }

    /// Runs git and says when it began, how long it took and what its hook said.
    pub(crate) fn timed_git(&self, repo: Repo, args: &[&str]) -> Result<TimedGit> {
        let mut git = self.command("git", repo);
        git.args(args)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::piped());
        let begun = Instant::now();
        let out = git.spawn().context("run git")?.wait_with_output()?;
        let took = begun.elapsed();
        let said = String::from_utf8_lossy(&out.stderr).into_owned();
        ensure!(out.status.success(), "git {args:?}: {said}");
        Ok(TimedGit { begun, took, said })
    }

    /// A program that inherits nothing.
    fn command(&self, program: &str, repo: Repo) -> Command {
        let built = Path::new(env!("CARGO_BIN_EXE_dbranch"));
        let mut path = vec![built.parent().expect("a file has a folder").to_owned()];
        path.extend(
            ["/usr/local/bin", "/usr/bin", "/bin", "/usr/sbin", "/sbin"].map(PathBuf::from),
        );
        let path = std::env::join_paths(path).expect("no colon in these");
        let mut command = Command::new(program);
        command
            .current_dir(self.dir(repo))
            .env_clear()
            .env("PATH", path)
            .env("HOME", self.path("user"))
            .env("LANG", "C.UTF-8")
            .env("GIT_CONFIG_NOSYSTEM", "1")
            .env("GIT_CONFIG_GLOBAL", "/dev/null")
            .env("DBRANCH_HOME", self.path("home"))
            .env("DBRANCH_RUNTIME", self.runtime.name())
            .env("DBRANCH_STORAGE", "btrfs")
            .env("DBRANCH_POOL", self.pool.volumes());
        for who in ["AUTHOR", "COMMITTER"] {
            command
                .env(format!("GIT_{who}_NAME"), "Ada")
                .env(format!("GIT_{who}_EMAIL"), "ada@example.com");
        }
        if let Runtime::Native { bin_dir } = &self.runtime {
            command.env("DBRANCH_PG_BIN", bin_dir);
        }
        if let Some(host) = std::env::var_os("DOCKER_HOST") {
            command.env("DOCKER_HOST", host);
        }
        command
    }

    /// Where the daemon writes its log.
    pub(crate) fn logs(&self) -> Vec<PathBuf> {
        let mut found = Vec::new();
        let mut folders = vec![self.path("home")];
        while let Some(dir) = folders.pop() {
            for entry in fs::read_dir(&dir).into_iter().flatten().flatten() {
                let path = entry.path();
                if entry.file_type().is_ok_and(|t| t.is_dir()) {
                    folders.push(path);
                } else if path.extension() == Some("log".as_ref()) {
                    found.push(path);
                }
            }
        }
        found
    }

    fn show_logs(&self) {
        for log in self.logs() {
            let text = fs::read(&log).unwrap_or_default();
            let text = String::from_utf8_lossy(&text);
            let lines: Vec<&str> = text.lines().collect();
            let tail = &lines[lines.len().saturating_sub(20)..];
            eprintln!("-- {}\n{}", log.display(), tail.join("\n"));
        }
    }
}

/// A git command that has ended.
pub(crate) struct TimedGit {
    pub(crate) begun: Instant,
    pub(crate) took: Duration,
    /// Its standard error, where hooks speak.
    pub(crate) said: String,
}

impl Drop for World<'_> {
    fn drop(&mut self) {
        let asked = self.dbranch(&["shutdown", "--stop-branches"]);
        if asked.is_err() || std::thread::panicking() {
            self.show_logs();
        }
        // Docker's containers know the data by its path, so the pool comes last.
        for dir in [&self.base, self.pool.dir()] {
            let left: Vec<u32> = processes_in(dir)
                .into_iter()
                .filter(|p| p.pid != std::process::id())
                .map(|p| p.pid)
                .collect();
            for pid in &left {
                kill_9(*pid);
            }
            let limit = Instant::now() + Duration::from_secs(10);
            while left.iter().any(|pid| is_alive(*pid)) && Instant::now() < limit {
                std::thread::sleep(Duration::from_millis(10));
            }
            for id in containers_in(dir) {
                let _ = pool::run(Command::new("docker").args(["rm", "-fv", &id]));
            }
            for mount in mounts_in(dir).iter().rev() {
                let _ = pool::run(Command::new("umount").arg(mount));
            }
        }
        self.pool.clear();
    }
}
