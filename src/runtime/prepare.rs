//! What both runtimes do before an instance starts, and with its log.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read as _, Seek as _, SeekFrom};
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _, PermissionsExt, chown};
use std::path::Path;
use std::time::{Duration, Instant};

use super::{InstanceSpec, Limits, RuntimeError, process};
use crate::types::Owner;

/// The port in the name of every instance's socket; nothing listens on it.
pub(super) const PORT: u16 = 5432;

/// Longest path of a socket: `sun_path` holds 108 bytes on Linux (unix(7)), 104
/// on macOS, with the closing zero.
const SOCKET_PATH_MAX: usize = if cfg!(target_os = "linux") { 107 } else { 103 };

/// How long backends get to notice that their postmaster is gone.
const ORPHANS_GRACE: Duration = Duration::from_secs(5);

/// How much of a log's end is read for its last lines.
const TAIL_BYTES: u64 = 64 * 1024;

/// Refuses what can't work, and makes the socket folder and the log file.
/// Blocks. No instance of `spec` may run.
pub(super) fn prepare(spec: &InstanceSpec) -> Result<File, RuntimeError> {
    let action = || format!("prepare the start of `{}`", spec.branch_name);
    let failed = |detail: String| RuntimeError::failed(action(), detail);
    check_owner(spec.owner)?;
    check_limits(spec.limits)?;
    let socket = spec.socket_dir.join(format!(".s.PGSQL.{PORT}"));
    let length = socket.as_os_str().len();
    if length > SOCKET_PATH_MAX {
        return Err(failed(format!(
            "the socket's path {} has {length} bytes, the system allows {SOCKET_PATH_MAX}; \
             choose a shorter folder with DBRANCH_HOME",
            socket.display()
        )));
    }
    if !spec.data_dir.join("PG_VERSION").exists() {
        return Err(failed(format!(
            "{} holds no database cluster",
            spec.data_dir.display()
        )));
    }
    settle_old_postmaster(&spec.data_dir).map_err(failed)?;
    make_private_dir(&spec.socket_dir, spec.owner)
        .map_err(|e| failed(format!("{}: {e}", spec.socket_dir.display())))?;
    // Left by a server that was killed. Its lock would stop the next server once
    // its pid belongs to another process of the same user.
    for stale in [&socket, &spec.socket_dir.join(".s.PGSQL.5432.lock")] {
        remove_if_there(stale).map_err(|e| failed(format!("{}: {e}", stale.display())))?;
    }
    open_log(&spec.log_file, spec.owner)
        .map_err(|e| failed(format!("{}: {e}", spec.log_file.display())))
}

/// PostgreSQL never runs as root, and only root can run it as someone else.
pub(super) fn check_owner(owner: Owner) -> Result<(), RuntimeError> {
    let refuse = |detail: String| Err(RuntimeError::failed("choose postgres' user", detail));
    let own = nix::unistd::geteuid();
    if owner.uid == 0 {
        return refuse(
            "PostgreSQL does not run as root; give the data to another user, such as `postgres`"
                .into(),
        );
    }
    if !own.is_root() && owner.uid != own.as_raw() {
        return refuse(format!(
            "user {own} can't run a server as user {}",
            owner.uid
        ));
    }
    Ok(())
}

fn check_limits(limits: Limits) -> Result<(), RuntimeError> {
    if limits
        .cpus
        .is_some_and(|cpus| !(cpus.is_finite() && cpus > 0.0))
    {
        return Err(RuntimeError::failed(
            "apply the limits",
            "cpus must be a number above 0",
        ));
    }
    Ok(())
}

/// Makes sure that no server uses the data directory, and that a
/// `postmaster.pid` left there misleads nobody.
///
/// postgres itself settles one whose process is gone: it looks for backends that
/// outlived it by their shared memory (`CreateLockFile` in miscinit.c). What it
/// can't see is a server in a container, which has other pids and other shared
/// memory; two servers would write one data directory. Where the pid is another
/// process by now it refuses to start for ever. And who waits for the new server
/// would read in the old file that it is ready.
fn settle_old_postmaster(data_dir: &Path) -> Result<(), String> {
    let file = data_dir.join("postmaster.pid");
    let text = match fs::read_to_string(&file) {
        Ok(text) => text,
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(e) => return Err(format!("read {}: {e}", file.display())),
    };
    wait_for_orphans(data_dir)?;
    let meta = fs::metadata(&file).map_err(|e| format!("{}: {e}", file.display()))?;
    let new = data_dir.join("postmaster.pid.dbranch");
    fs::write(&new, disarmed(&text))
        .and_then(|()| fs::set_permissions(&new, meta.permissions()))
        .and_then(|()| own_as(&new, &meta))
        .and_then(|()| fs::rename(&new, &file))
        .map_err(|e| format!("rewrite {}: {e}", file.display()))
}

/// A pid file that no living process matches, still with the shared memory in
/// its line 7, for postgres' own check, but not with the state in line 8.
fn disarmed(pid_file: &str) -> String {
    let mut text = format!("{}\n", i32::MAX);
    for line in pid_file.lines().take(7).skip(1) {
        text.push_str(line);
        text.push('\n');
    }
    text
}

fn own_as(path: &Path, like: &fs::Metadata) -> io::Result<()> {
    use std::os::unix::fs::MetadataExt as _;
    if nix::unistd::geteuid().is_root() {
        chown(path, Some(like.uid()), Some(like.gid()))?;
    }
    Ok(())
}

/// Waits till no postgres process uses `data_dir`. Blocks.
pub(super) fn wait_for_orphans(data_dir: &Path) -> Result<(), String> {
    let limit = Instant::now() + ORPHANS_GRACE;
    loop {
        let users = process::users_of(data_dir);
        let Some(first) = users.first() else {
            return Ok(());
        };
        if Instant::now() > limit {
            return Err(format!(
                "{} is used by another server: process {first}{}; stop it first",
                data_dir.display(),
                if users.len() > 1 { " and others" } else { "" },
            ));
        }
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// Makes a folder that only `owner` (and root) may enter.
fn make_private_dir(dir: &Path, owner: Owner) -> io::Result<()> {
    if let Some(parent) = dir.parent() {
        fs::create_dir_all(parent)?;
    }
    match fs::DirBuilder::new().mode(0o700).create(dir) {
        Err(e) if e.kind() != io::ErrorKind::AlreadyExists => return Err(e),
        _ => {}
    }
    give_to(dir, owner)?;
    fs::set_permissions(dir, PermissionsExt::from_mode(0o700))
}

/// Changes the owner if we are root; else it is us already (`check_owner`).
fn give_to(path: &Path, owner: Owner) -> io::Result<()> {
    if nix::unistd::geteuid().is_root() {
        chown(path, Some(owner.uid), Some(owner.gid))?;
    }
    Ok(())
}

pub(super) fn remove_if_there(path: &Path) -> io::Result<()> {
    match fs::remove_file(path) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => Err(e),
        _ => Ok(()),
    }
}

fn open_log(path: &Path, owner: Owner) -> io::Result<File> {
    if let Some(parent) = path.parent() {
        fs::create_dir_all(parent)?;
    }
    let file = OpenOptions::new()
        .append(true)
        .create(true)
        .mode(0o600)
        .open(path)?;
    // A container's server opens the file itself, as the owner.
    give_to(path, owner)?;
    Ok(file)
}

/// The last `lines` lines of a log, "" when there is none. Blocks.
pub(super) fn tail(path: &Path, lines: usize) -> String {
    let text = tail_since(path, 0);
    let all: Vec<&str> = text.lines().collect();
    all[all.len().saturating_sub(lines)..].join("\n")
}

/// The end of a log, from `start` on at most. One that is shorter was begun anew. Blocks.
pub(super) fn tail_since(path: &Path, start: u64) -> String {
    let read = || -> io::Result<Vec<u8>> {
        let mut file = File::open(path)?;
        let length = file.metadata()?.len();
        let start = if start > length { 0 } else { start };
        file.seek(SeekFrom::Start(
            start.max(length.saturating_sub(TAIL_BYTES)),
        ))?;
        let mut bytes = Vec::new();
        file.take(TAIL_BYTES).read_to_end(&mut bytes)?;
        Ok(bytes)
    };
    String::from_utf8_lossy(&read().unwrap_or_default()).into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tail_returns_the_last_lines_only() {
        let dir = tempfile::tempdir().unwrap();
        let log = dir.path().join("log");
        assert_eq!(tail(&log, 3), "");
        fs::write(&log, "a\nb\nc\n").unwrap();
        assert_eq!(tail(&log, 2), "b\nc");
        assert_eq!(tail(&log, 9), "a\nb\nc");
        let much = "x".repeat(200_000) + "\nend\n";
        fs::write(&log, much).unwrap();
        assert_eq!(tail(&log, 1), "end");
    }

    #[test]
    fn what_an_earlier_server_said_is_left_out() {
        let dir = tempfile::tempdir().unwrap();
        let log = dir.path().join("log");
        assert_eq!(tail_since(&log, 0), "");
        fs::write(&log, "old\nnew\n").unwrap();
        assert_eq!(tail_since(&log, 4), "new\n");
        assert_eq!(tail_since(&log, 8), "");
        assert_eq!(tail_since(&log, 99), "old\nnew\n", "begun anew");
    }

    #[test]
    fn an_old_pid_file_names_nobody_and_no_state_any_more() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("postmaster.pid");
        let own = std::process::id();
        fs::write(
            &file,
            format!("{own}\n/data\n99\n5432\n/s\n\n 12 3\nready   \n"),
        )
        .unwrap();
        let settled = "2147483647\n/data\n99\n5432\n/s\n\n 12 3\n";
        for _ in 0..2 {
            settle_old_postmaster(dir.path()).unwrap();
            assert_eq!(fs::read_to_string(&file).unwrap(), settled);
        }
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
    }

    #[test]
    fn root_never_owns_a_server() {
        let root = Owner { uid: 0, gid: 0 };
        let error = check_owner(root).unwrap_err().to_string();
        assert!(error.contains("does not run as root"), "{error}");
    }
}
