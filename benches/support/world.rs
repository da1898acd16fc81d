//! dbranch as a user has it: a home with a daemon, a git repository, a pool.

use std::fs::{self, Permissions};
use std::net::TcpListener;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use dbranch::storage::{Choice, StorageDriver};
use serde_json::{Value, json};
use tempfile::TempDir;
use tokio_postgres::Config;

use crate::leftovers::{is_alive, kill_9, processes_in};
use crate::pool;
use crate::server::{self, Programs};

/// Above dbranch's own defaults and below the range of outgoing connections.
const PORTS: std::ops::Range<u16> = 19_000..32_000;

/// A running dbranch. Dropping it stops all it started and removes all it made.
pub(crate) struct World {
    base: PathBuf,
    pool: PathBuf,
    storage: String,
    bin_dir: PathBuf,
    _folders: [TempDir; 2],
}

impl World {
    /// Makes a project with a first branch `main`, whose volumes lie in `place`. `branches` is
    /// how many it shall have room for.
    pub(crate) fn set_up(
        place: &Path,
        storage: &str,
        programs: &Programs,
        branches: u16,
    ) -> Result<Self> {
        // Short: a Unix socket's path may have 107 bytes.
        let folder = pool::temp_folder(Path::new("/tmp"))?;
        let beside = pool::temp_folder(place)?;
        let world = Self {
            base: folder.path().canonicalize()?,
            // A pool that is a dataset of its own can't be a folder in one.
            pool: if storage == "zfs" {
                place.to_owned()
            } else {
                beside.path().canonicalize()?.join("pool")
            },
            storage: storage.to_owned(),
            bin_dir: programs.dir().to_owned(),
            _folders: [folder, beside],
        };
        for sub in ["home", "user", "repo"] {
            let dir = world.base.join(sub);
            fs::create_dir(&dir)?;
            fs::set_permissions(&dir, Permissions::from_mode(0o711))?;
        }
        world.git(&["init", "-q", "-b", "main"])?;
        world.git(&["commit", "-q", "--allow-empty", "-m", "first"])?;
        let first = free_ports(branches + 2)?;
        let config = json!({
            "name": "bench",
            "proxy_port": first,
            "port_min": first + 1,
            "port_max": first + branches + 1,
        });
        fs::write(
            world.base.join("repo/.dbranch.config.json"),
            config.to_string(),
        )?;
        world.dbranch(&["init", "--yes"])?;
        world.dbranch(&["init-postgres"])?;
        world.dbranch(&["install-hooks"])?;
        Ok(world)
    }

    pub(crate) fn base(&self) -> &Path {
        &self.base
    }

    pub(crate) fn pool(&self) -> &Path {
        &self.pool
    }

    /// The driver that dbranch uses, for what dbranch itself has no command.
    pub(crate) fn driver(&self) -> Result<std::sync::Arc<dyn StorageDriver>> {
        let choice: Choice = self.storage.parse()?;
        Ok(dbranch::storage::open(
            choice,
            &self.pool,
            server::owner()?,
        )?)
    }

    /// How to connect to a branch at its own port.
    pub(crate) fn url(&self, branch: &str) -> Result<Config> {
        let url = self.dbranch(&["url", branch])?;
        url.trim().parse().context("parse the URL")
    }

    pub(crate) fn show(&self, branch: &str) -> Result<Value> {
        Ok(serde_json::from_str(
            &self.dbranch(&["show", branch, "--json"])?,
        )?)
    }

    pub(crate) fn volume(&self, branch: &str) -> Result<PathBuf> {
        let show = self.show(branch)?;
        Ok(show["volume"].as_str().context("no volume")?.into())
    }

    pub(crate) fn dbranch(&self, args: &[&str]) -> Result<String> {
        pool::run(self.command("dbranch").args(args))
    }

    /// Runs dbranch and says how long that took.
    pub(crate) fn timed(&self, args: &[&str]) -> Result<Duration> {
        let begun = Instant::now();
        self.dbranch(args)?;
        Ok(begun.elapsed())
    }

    pub(crate) fn git(&self, args: &[&str]) -> Result<String> {
        pool::run(self.command("git").args(args))
    }

    /// A program that inherits nothing.
    fn command(&self, program: &str) -> Command {
        let built = Path::new(env!("CARGO_BIN_EXE_dbranch"));
        let mut path = vec![built.parent().expect("a file has a folder").to_owned()];
        path.extend(
            ["/usr/local/bin", "/usr/bin", "/bin", "/usr/sbin", "/sbin"].map(PathBuf::from),
        );
        let path = std::env::join_paths(path).expect("no colon in these");
        let mut command = Command::new(program);
        command
            .current_dir(self.base.join("repo"))
            .env_clear()
            .env("PATH", path)
            .env("HOME", self.base.join("user"))
            .env("LANG", "C.UTF-8")
            .env("GIT_CONFIG_NOSYSTEM", "1")
            .env("GIT_CONFIG_GLOBAL", "/dev/null")
            .env("DBRANCH_HOME", self.base.join("home"))
            .env("DBRANCH_RUNTIME", "native")
            .env("DBRANCH_STORAGE", &self.storage)
            .env("DBRANCH_POOL", &self.pool)
            .env("DBRANCH_PG_BIN", &self.bin_dir)
            .stdin(Stdio::null());
        for who in ["AUTHOR", "COMMITTER"] {
            command
                .env(format!("GIT_{who}_NAME"), "Ada")
                .env(format!("GIT_{who}_EMAIL"), "ada@example.com");
        }
        command
    }
}

/// The same user and database at another port of this machine.
pub(crate) fn at_port(url: &Config, port: u16) -> Config {
    let mut config = Config::new();
    config
        .host("127.0.0.1")
        .port(port)
        .user(url.get_user().unwrap_or_default())
        .password(url.get_password().unwrap_or_default())
        .dbname(url.get_dbname().unwrap_or_default());
    config
}

/// The first of so many ports in a row that are free now.
fn free_ports(count: u16) -> Result<u16> {
    let start = PORTS.start + u16::try_from(std::process::id() % 1000).unwrap_or_default();
    let mut first = start;
    for port in start..PORTS.end {
        if TcpListener::bind(("127.0.0.1", port)).is_err() {
            first = port + 1;
        } else if port - first >= count {
            return Ok(first);
        }
    }
    anyhow::bail!("no {count} free ports in a row")
}

impl Drop for World {
    fn drop(&mut self) {
        if let Err(e) = self.dbranch(&["shutdown", "--stop-branches"]) {
            eprintln!("{e:#}");
        }
        for dir in [&self.base, &self.pool] {
            for process in processes_in(dir) {
                if process.pid != std::process::id() {
                    kill_9(process.pid);
                    let limit = Instant::now() + Duration::from_secs(10);
                    while is_alive(process.pid) && Instant::now() < limit {
                        std::thread::sleep(Duration::from_millis(10));
                    }
                }
            }
        }
        let removed = self.driver().and_then(|driver| {
            driver.sweep()?;
            for volume in driver.list()? {
                driver.destroy(&volume)?;
            }
            Ok(())
        });
        if let Err(e) = removed {
            eprintln!("{e:#}");
        }
    }
}

/// Checks that a median can be made.
pub(crate) fn at_least_one(rounds: usize) -> Result<usize> {
    ensure!(rounds > 0, "there must be at least one round");
    Ok(rounds)
}
