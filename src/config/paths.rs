//! Where things lie on this machine.

use std::ffi::OsString;
use std::fs::{self, DirBuilder, Permissions};
use std::io::ErrorKind;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};

use sha2::{Digest, Sha256};

use super::ConfigError;
use crate::types::BranchId;

/// Longest path of a Unix socket, in bytes: `sun_path` less its final NUL
/// (unix(7); <sys/un.h> on macOS).
const SOCKET_PATH_MAX_BYTES: usize = if cfg!(target_os = "macos") { 103 } else { 107 };

/// What follows the run folder in an instance's socket, for its length only.
const LONGEST_SOCKET: &str = "/i/123456789012/.s.PGSQL.5432";

/// Where root keeps everything: the `postgres` user must get there, so not under `/root`.
const ROOT_HOME: &str = "/var/lib/dbranch";

/// Others may pass through but not look around.
const TRAVERSABLE: u32 = 0o711;
const PRIVATE: u32 = 0o700;

/// Every folder and file of one user of dbranch.
///
/// ```text
///   config/config.json
///   state/registry.db  daemon.lock  secrets/
///   run/daemon.sock  i/<branch id>/.s.PGSQL.5432
///   log/daemon.log  <branch id>.log
///   pool/                        (the default one)
///   cow-pool/  cow-pool.img      (set up by `dbranch storage setup`)
/// ```
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Paths {
    config: PathBuf,
    state: PathBuf,
    run: PathBuf,
    log: PathBuf,
    pool: PathBuf,
    /// The folder in `/tmp` that `run` lies in, where the socket paths were too long otherwise.
    run_parent: Option<PathBuf>,
    uid: u32,
}

impl Paths {
    /// Finds the places from the environment: `DBRANCH_HOME`, else `/var/lib/dbranch`
    /// for root, else the XDG folders (macOS: `~/Library`). Touches no file.
    pub fn resolve() -> Result<Self, ConfigError> {
        let home = std::env::var_os("DBRANCH_HOME").filter(|home| !home.is_empty());
        let uid = nix::unistd::geteuid().as_raw();
        match home {
            Some(home) => Self::from_variable(&home, uid),
            None if uid == 0 => Ok(Self::new(Path::new(ROOT_HOME), uid)),
            None => Self::of_user(uid),
        }
    }

    /// Everything under one folder, an absolute one.
    pub fn under(home: impl AsRef<Path>) -> Self {
        Self::new(home.as_ref(), nix::unistd::geteuid().as_raw())
    }

    fn from_variable(home: &OsString, uid: u32) -> Result<Self, ConfigError> {
        let path = Path::new(home);
        if !path.is_absolute() {
            return Err(ConfigError::invalid(format!(
                "DBRANCH_HOME is `{}`, which is not an absolute path",
                path.display()
            ))
            .with_hint("set DBRANCH_HOME to a folder's full path, or unset it"));
        }
        Ok(Self::new(path, uid))
    }

    fn new(home: &Path, uid: u32) -> Self {
        Self {
            config: home.join("config"),
            state: home.join("state"),
            run: home.join("run"),
            log: home.join("log"),
            pool: home.join("pool"),
            run_parent: None,
            uid,
        }
        .with_short_run(home)
    }

    fn of_user(uid: u32) -> Result<Self, ConfigError> {
        let (Some(config), Some(data)) = (dirs::config_dir(), dirs::data_local_dir()) else {
            return Err(
                ConfigError::invalid("there is no home folder to keep dbranch's data in")
                    .with_hint("set HOME, or DBRANCH_HOME to a folder of its own"),
            );
        };
        let data = data.join("dbranch");
        let state = dirs::state_dir().map_or_else(|| data.clone(), |dir| dir.join("dbranch"));
        let paths = Self {
            config: config.join("dbranch"),
            run: state.join("run"),
            log: state.join("log"),
            pool: data.join("pool"),
            run_parent: None,
            state: state.clone(),
            uid,
        };
        Ok(paths.with_short_run(&state))
    }

    /// Moves `run` into `/tmp` where a socket's path would be longer than the system allows.
    fn with_short_run(mut self, home: &Path) -> Self {
        if self.run.as_os_str().len() + LONGEST_SOCKET.len() > SOCKET_PATH_MAX_BYTES {
            let digest = Sha256::digest(home.as_os_str().as_bytes());
            let parent = PathBuf::from(format!("/tmp/dbranch-{}", self.uid));
            self.run = parent.join(super::values::hex(&digest[..4]));
            self.run_parent = Some(parent);
        }
        self
    }

    pub fn config_dir(&self) -> &Path {
        &self.config
    }

    pub fn state_dir(&self) -> &Path {
        &self.state
    }

    pub fn run_dir(&self) -> &Path {
        &self.run
    }

    pub fn log_dir(&self) -> &Path {
        &self.log
    }

    /// The SQLite registry.
    pub fn registry_file(&self) -> PathBuf {
        self.state.join("registry.db")
    }

    /// Locked by the daemon as long as it runs; never deleted.
    pub fn lock_file(&self) -> PathBuf {
        self.state.join("daemon.lock")
    }

    /// Locked while a command sets up, grows or removes a pool; never deleted.
    pub fn storage_lock(&self) -> PathBuf {
        self.state.join("storage.lock")
    }

    /// The Unix socket of the api.
    pub fn daemon_socket(&self) -> PathBuf {
        self.run.join("daemon.sock")
    }

    pub fn daemon_log(&self) -> PathBuf {
        self.log.join("daemon.log")
    }

    /// What git hooks could not tell the user in one line.
    pub fn hook_log(&self) -> PathBuf {
        self.log.join("hook.log")
    }

    /// The folder for the socket of one branch's instance.
    pub fn instance_socket_dir(&self, branch: &BranchId) -> PathBuf {
        self.run.join("i").join(branch.as_str())
    }

    /// What the instance of one branch writes.
    pub fn instance_log(&self, branch: &BranchId) -> PathBuf {
        self.log.join(format!("{branch}.log"))
    }

    /// Output of the config's commands for one branch.
    pub fn commands_log(&self, branch: &BranchId) -> PathBuf {
        self.log_dir().join(format!("{branch}.commands.log"))
    }

    /// Passwords and tokens; mode 0700.
    pub fn secrets_dir(&self) -> PathBuf {
        self.state.join("secrets")
    }

    /// The pool where the machine's settings name no other.
    pub fn default_pool(&self) -> &Path {
        &self.pool
    }

    /// Where `dbranch storage setup` mounts a pool when nobody names another place.
    pub fn cow_pool(&self) -> PathBuf {
        self.pool.with_file_name("cow-pool")
    }

    /// The machine's settings.
    pub fn machine_file(&self) -> PathBuf {
        self.config.join("config.json")
    }

    /// Makes the folders that are missing and sets their modes: 0700, but where
    /// root's server programs run as `postgres` 0711 on the way to them. The pool's own folder
    /// is left to the storage driver.
    pub fn create(&self) -> Result<(), ConfigError> {
        let on_the_way = if self.uid == 0 { TRAVERSABLE } else { PRIVATE };
        if let Some(parent) = &self.run_parent {
            ensure(parent, on_the_way)?;
        }
        self.verify_run_dir()?;
        for dir in [&self.config, &self.state, &self.log, &self.run] {
            if let Some(parent) = dir.parent() {
                create_all(parent, on_the_way)?;
            }
        }
        ensure(&self.config, PRIVATE)?;
        ensure(&self.state, on_the_way)?;
        ensure(&self.secrets_dir(), PRIVATE)?;
        ensure(&self.log, on_the_way)?;
        ensure(&self.run, on_the_way)?;
        self.verify_run_dir()?;
        ensure(&self.run.join("i"), on_the_way)
    }

    /// Refuses a run folder in `/tmp` that another user has planted. One that is missing is fine.
    pub fn verify_run_dir(&self) -> Result<(), ConfigError> {
        let Some(parent) = &self.run_parent else {
            return Ok(());
        };
        for dir in [parent, &self.run] {
            let meta = match fs::symlink_metadata(dir) {
                Ok(meta) => meta,
                Err(e) if e.kind() == ErrorKind::NotFound => return Ok(()),
                Err(e) => return Err(ConfigError::io("look at", dir, &e)),
            };
            if !meta.is_dir() || meta.uid() != self.uid || meta.mode() & 0o022 != 0 {
                return Err(ConfigError::invalid(format!(
                    "{} is not a folder that only this user can write to",
                    dir.display()
                ))
                .with_hint("remove it, or set DBRANCH_HOME to a folder with a shorter path"));
            }
        }
        Ok(())
    }
}

/// Makes a folder and its missing parents, each with `mode`.
fn create_all(dir: &Path, mode: u32) -> Result<(), ConfigError> {
    DirBuilder::new()
        .recursive(true)
        .mode(mode)
        .create(dir)
        .map_err(|e| {
            ConfigError::io("make the folder", dir, &e)
                .with_hint("make it by hand, or set DBRANCH_HOME to a folder you may write to")
        })
}

/// Makes one folder that is ours, and gives it its mode whatever it had.
fn ensure(dir: &Path, mode: u32) -> Result<(), ConfigError> {
    create_all(dir, mode)?;
    let meta =
        fs::symlink_metadata(dir).map_err(|e| ConfigError::io("look at the folder", dir, &e))?;
    if meta.is_dir() && meta.mode() & 0o777 != mode {
        fs::set_permissions(dir, Permissions::from_mode(mode))
            .map_err(|e| ConfigError::io("set the mode of", dir, &e))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mode(path: impl AsRef<Path>) -> u32 {
        fs::symlink_metadata(path).unwrap().mode() & 0o777
    }

    #[test]
    fn everything_lies_under_the_home() {
        let paths = Paths::under("/x");
        assert_eq!(paths.registry_file(), Path::new("/x/state/registry.db"));
        assert_eq!(paths.daemon_socket(), Path::new("/x/run/daemon.sock"));
        assert_eq!(paths.machine_file(), Path::new("/x/config/config.json"));
        assert_eq!(paths.default_pool(), Path::new("/x/pool"));
        let id = BranchId::new("abc").unwrap();
        assert_eq!(paths.instance_socket_dir(&id), Path::new("/x/run/i/abc"));
        assert_eq!(paths.instance_log(&id), Path::new("/x/log/abc.log"));
    }

    #[test]
    fn folders_are_made_with_their_modes_and_making_them_again_is_fine() {
        let home = tempfile::tempdir().unwrap();
        let paths = Paths::under(home.path().join("h"));
        paths.create().unwrap();
        paths.create().unwrap();
        let on_the_way = if paths.uid == 0 { 0o711 } else { 0o700 };
        assert_eq!(mode(paths.secrets_dir()), 0o700);
        assert_eq!(mode(paths.config_dir()), 0o700);
        assert_eq!(mode(home.path().join("h")), on_the_way);
        assert_eq!(mode(paths.run_dir().join("i")), on_the_way);
    }

    #[test]
    fn socket_paths_always_fit() {
        let id = BranchId::random();
        for len in 1..200 {
            let paths = Paths::under(format!("/{}", "h".repeat(len)));
            let socket = paths.instance_socket_dir(&id).join(".s.PGSQL.5432");
            assert!(socket.as_os_str().len() <= SOCKET_PATH_MAX_BYTES, "{len}");
        }
        let far = |c: &str| Paths::under(format!("/{}", c.repeat(150))).run;
        assert_ne!(far("a"), far("b"));
        assert_eq!(far("a"), far("a"));
    }

    #[test]
    fn a_planted_run_folder_is_refused() {
        let tmp = tempfile::tempdir().unwrap();
        let mut paths = Paths::under(tmp.path().join("h"));
        let parent = tmp.path().join("dbranch-0");
        paths.run = parent.join("12345678");
        paths.run_parent = Some(parent.clone());
        paths.verify_run_dir().unwrap();
        paths.create().unwrap();
        paths.verify_run_dir().unwrap();

        fs::set_permissions(&parent, Permissions::from_mode(0o777)).unwrap();
        assert!(paths.verify_run_dir().is_err());
        fs::remove_dir_all(&parent).unwrap();
        std::os::unix::fs::symlink(tmp.path(), &parent).unwrap();
        assert!(paths.verify_run_dir().is_err());
        assert!(paths.create().is_err());
    }

    #[test]
    fn a_relative_home_is_refused() {
        let e = Paths::from_variable(&"here".into(), 1).unwrap_err();
        assert!(e.message.contains("DBRANCH_HOME"), "{e}");
    }
}
