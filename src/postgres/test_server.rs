//! A real server for the tests of this room.

use std::fs;
use std::io::Write;
use std::os::unix::fs::{PermissionsExt, chown};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use nix::unistd::{Gid, Pid, Uid, User};

use super::{Admin, Conf, wait_ready};
use crate::types::{BackendAddress, Owner, Password};

pub(super) const ROLE: &str = "a tester";
pub(super) const LIMIT: Duration = Duration::from_secs(60);

/// Says aloud that a test was skipped, or fails it when the capability is required.
pub(super) fn skip(test: &str, capability: &str, reason: &str) {
    let required = std::env::var("DBRANCH_TEST_REQUIRE").unwrap_or_default();
    assert!(
        !required.split(',').any(|name| name == capability),
        "{test} needs {capability}: {reason}"
    );
    let _ = writeln!(std::io::stderr(), "skipped: {test}: {reason}");
}

/// The server programs and the user to run them as; none skips the test.
#[derive(Debug, Clone)]
pub(super) struct Programs {
    bin: PathBuf,
    pub(super) owner: Owner,
}

pub(super) fn programs(test: &str) -> Option<Programs> {
    let named = std::env::var_os("DBRANCH_TEST_PG_BIN").map(PathBuf::from);
    let bin = named.or_else(newest_installed);
    programs_in(test, "postgres", "DBRANCH_TEST_PG_BIN", bin)
}

/// [`programs`] of PostgreSQL 18.
pub(super) fn programs_18(test: &str) -> Option<Programs> {
    let bin = std::env::var_os("DBRANCH_TEST_PG_BIN_18").map(PathBuf::from);
    programs_in(test, "postgres18", "DBRANCH_TEST_PG_BIN_18", bin)
}

fn programs_in(
    test: &str,
    capability: &str,
    variable: &str,
    bin: Option<PathBuf>,
) -> Option<Programs> {
    let Some(bin) = bin.filter(|bin| bin.join("initdb").exists()) else {
        let reason = format!("no server programs; set {variable}");
        skip(test, capability, &reason);
        return None;
    };
    let owner = if Uid::effective().is_root() {
        let Ok(Some(user)) = User::from_name("postgres") else {
            skip(
                test,
                "postgres",
                "root can't run a server, and there is no user postgres",
            );
            return None;
        };
        Owner {
            uid: user.uid.as_raw(),
            gid: user.gid.as_raw(),
        }
    } else {
        Owner {
            uid: Uid::effective().as_raw(),
            gid: Gid::effective().as_raw(),
        }
    };
    Some(Programs { bin, owner })
}

fn newest_installed() -> Option<PathBuf> {
    glob::glob("/usr/lib/postgresql/*/bin")
        .ok()?
        .flatten()
        .max_by_key(|bin| {
            let version = bin.parent().and_then(Path::file_name);
            version.and_then(|v| v.to_str()?.parse::<u32>().ok())
        })
}

impl Programs {
    fn command(&self, program: &str) -> Command {
        let mut command = Command::new(self.bin.join(program));
        command
            .env_clear()
            .env("LC_ALL", "C")
            .env("PATH", "/usr/bin:/bin")
            .current_dir("/")
            .stdin(Stdio::null());
        if let Some(path) = std::env::var_os("LD_LIBRARY_PATH") {
            command.env("LD_LIBRARY_PATH", path);
        }
        if Uid::effective().is_root() {
            command.uid(self.owner.uid).gid(self.owner.gid);
        }
        command
    }

    /// A folder that the server may use, removed with the guard.
    pub(super) fn folder(&self, parent: Option<&Path>) -> tempfile::TempDir {
        let folder = match parent {
            Some(parent) => tempfile::tempdir_in(parent),
            None => tempfile::tempdir(),
        }
        .unwrap();
        fs::set_permissions(folder.path(), fs::Permissions::from_mode(0o755)).unwrap();
        self.give(folder.path());
        folder
    }

    fn give(&self, path: &Path) {
        if Uid::effective().is_root() {
            chown(path, Some(self.owner.uid), Some(self.owner.gid)).unwrap();
        }
    }

    /// Makes a data directory, as the runtime would.
    pub(super) fn init(&self, data: &Path, password: &Password) {
        fs::create_dir_all(data).unwrap();
        self.give(data);
        let secret = data.with_file_name("password");
        fs::write(&secret, password.reveal()).unwrap();
        self.give(&secret);
        let done = self
            .command("initdb")
            .arg("-D")
            .arg(data)
            .args(["-U", ROLE, "-A", "scram-sha-256", "-E", "UTF8", "-N", "-k"])
            .args(["--locale", "C"])
            .arg("--pwfile")
            .arg(&secret)
            .output()
            .unwrap();
        assert!(done.status.success(), "{done:?}");
        fs::remove_file(secret).unwrap();
        Conf::default().write(data, Some(self.owner)).unwrap();
    }

    /// Starts the server of a data directory and waits until it is ready.
    pub(super) async fn start(&self, data: &Path) -> Server {
        let sockets = self.folder(None);
        let log = sockets.path().join("log");
        let child = self
            .command("postgres")
            .arg("-D")
            .arg(data)
            .arg("-c")
            .arg(format!(
                "unix_socket_directories={}",
                sockets.path().display()
            ))
            .stdout(Stdio::null())
            .stderr(fs::File::create(&log).unwrap())
            .spawn()
            .unwrap();
        let mut server = Server { child, sockets };
        tokio::select! {
            ready = wait_ready(data) => drop(ready.unwrap()),
            () = server.ended() => panic!("{}", fs::read_to_string(&log).unwrap()),
            () = tokio::time::sleep(LIMIT) => panic!("not ready: {}", fs::read_to_string(&log).unwrap()),
        }
        server
    }
}

/// A running server, killed when dropped.
pub(super) struct Server {
    child: Child,
    sockets: tempfile::TempDir,
}

impl Server {
    pub(super) fn address(&self) -> BackendAddress {
        BackendAddress::Unix {
            dir: self.sockets.path().to_owned(),
            port: 5432,
        }
    }

    pub(super) async fn admin(&self, password: &Password) -> Admin {
        Admin::connect(&self.address(), ROLE, "postgres", password)
            .await
            .unwrap()
    }

    pub(super) fn log(&self) -> String {
        fs::read_to_string(self.sockets.path().join("log")).unwrap()
    }

    /// Ends the server in the way of the signal and waits until it is gone.
    pub(super) fn stop(mut self, signal: Signal) {
        self.signal(signal);
        self.child.wait().unwrap();
    }

    fn signal(&self, signal: Signal) {
        let pid = i32::try_from(self.child.id()).unwrap();
        let _ = kill(Pid::from_raw(pid), signal);
    }

    async fn ended(&mut self) {
        while self.child.try_wait().unwrap().is_none() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        if matches!(self.child.try_wait(), Ok(None)) {
            self.signal(Signal::SIGQUIT);
            let _ = self.child.wait();
        }
    }
}
