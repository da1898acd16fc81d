//! Processes that this program did not necessarily start: which postmaster
//! serves a data directory, who else uses it, signals, and word of the end.
//!
//! A pid alone proves nothing, since pids are used again. A postmaster is known
//! by its working directory, which is its data directory for as long as it runs
//! (`ChangeToDataDir` at its start), and on Linux it is held by a pidfd.

use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

/// How often the end of a process is looked for where the kernel does not report it.
const POLL: Duration = Duration::from_millis(250);

/// The pid that `postmaster.pid` in `data_dir` names, if there is such a file.
///
/// Its first line is the pid (PostgreSQL manual, section 73.1); a single-user
/// backend writes it negative, and that is no postmaster.
pub(super) fn recorded_pid(data_dir: &Path) -> Option<u32> {
    let text = std::fs::read_to_string(data_dir.join("postmaster.pid")).ok()?;
    text.lines().next()?.trim().parse().ok()
}

/// A running postmaster. Signals reach it or nobody.
#[derive(Debug)]
pub(super) struct Postmaster {
    pid: u32,
    data_dir: PathBuf,
    #[cfg(target_os = "linux")]
    pidfd: Option<std::os::fd::OwnedFd>,
}

impl Postmaster {
    /// The process `pid`, if it is the postmaster of `data_dir`.
    pub(super) fn open(pid: u32, data_dir: &Path) -> Option<Self> {
        // The pidfd comes first: what is checked afterwards is the process it pins.
        let found = Self {
            pid,
            data_dir: data_dir.into(),
            #[cfg(target_os = "linux")]
            pidfd: pidfd_open(pid),
        };
        is_postmaster_of(pid, data_dir).then_some(found)
    }

    /// The postmaster that serves `data_dir`, if one runs on this system (one in
    /// a container has its pid file written in other numbers and is not found).
    pub(super) fn of(data_dir: &Path) -> Option<Self> {
        Self::open(recorded_pid(data_dir)?, data_dir)
    }

    pub(super) fn pid(&self) -> u32 {
        self.pid
    }

    /// Sends `signal`; a process that has ended already is no error.
    pub(super) fn signal(&self, signal: Signal) -> io::Result<()> {
        #[cfg(target_os = "linux")]
        if let Some(pidfd) = &self.pidfd {
            let signal = match signal {
                Signal::SIGINT => rustix::process::Signal::INT,
                Signal::SIGQUIT => rustix::process::Signal::QUIT,
                _ => rustix::process::Signal::KILL,
            };
            return match rustix::process::pidfd_send_signal(pidfd, signal) {
                Ok(()) | Err(rustix::io::Errno::SRCH) => Ok(()),
                Err(e) => Err(e.into()),
            };
        }
        send(self.pid, signal)
    }

    /// Returns when the process has ended. Cancel-safe.
    pub(super) async fn ended(self) {
        #[cfg(target_os = "linux")]
        if let Some(pidfd) = self.pidfd {
            // A pidfd becomes readable when its process ends (pidfd_open(2)). That
            // it is no pipe does not matter, as nothing is read: this type is
            // tokio's only safe way to register a descriptor of any kind.
            match tokio::net::unix::pipe::Receiver::from_owned_fd_unchecked(pidfd) {
                Ok(fd) => {
                    if fd.readable().await.is_ok() {
                        return;
                    }
                }
                Err(e) => tracing::debug!("can't wait on the pidfd of {}: {e}", self.pid),
            }
        }
        // Not by its pid: that stays until its parent, which may never, asks for it.
        while is_postmaster_of(self.pid, &self.data_dir) {
            tokio::time::sleep(POLL).await;
        }
    }
}

#[cfg(target_os = "linux")]
fn pidfd_open(pid: u32) -> Option<std::os::fd::OwnedFd> {
    let pid = rustix::process::Pid::from_raw(i32::try_from(pid).ok()?)?;
    // Kernels before 5.10 have no such pidfd; the end is then polled for.
    rustix::process::pidfd_open(pid, rustix::process::PidfdFlags::NONBLOCK).ok()
}

fn as_pid(pid: u32) -> Option<Pid> {
    // 0 and below would address whole groups (kill(2)).
    i32::try_from(pid)
        .ok()
        .filter(|pid| *pid > 0)
        .map(Pid::from_raw)
}

/// Sends `signal` to `pid`; a process that has ended already is no error.
pub(super) fn send(pid: u32, signal: Signal) -> io::Result<()> {
    match as_pid(pid).map(|pid| kill(pid, signal)) {
        None | Some(Ok(()) | Err(nix::Error::ESRCH)) => Ok(()),
        Some(Err(e)) => Err(e.into()),
    }
}

/// Whether some process has that pid, a stranger's or a zombie included.
#[cfg(test)]
pub(super) fn exists(pid: u32) -> bool {
    as_pid(pid).is_some_and(|pid| !matches!(kill(pid, None), Err(nix::Error::ESRCH)))
}

#[cfg(target_os = "linux")]
use linux::{is_postmaster_of, users_of_dir};
#[cfg(not(target_os = "linux"))]
use portable::{is_postmaster_of, users_of_dir};

/// Pids of the postgres processes that use `data_dir`, in containers of this
/// system too. Reads all of the process table.
pub(super) fn users_of(data_dir: &Path) -> Vec<u32> {
    users_of_dir(data_dir)
}

#[cfg(target_os = "linux")]
mod linux {
    use std::os::unix::fs::MetadataExt as _;
    use std::path::Path;

    /// Device and inode: the same whatever name or mount leads there, in a
    /// container too.
    fn identity(path: &Path) -> Option<(u64, u64)> {
        let meta = std::fs::metadata(path).ok()?;
        Some((meta.dev(), meta.ino()))
    }

    fn is_postgres(proc_dir: &Path) -> bool {
        // Package wrappers rename it: `.postgres-wrapp` on NixOS.
        std::fs::read_to_string(proc_dir.join("comm"))
            .is_ok_and(|name| name.contains("postgres") || name.contains("postmaster"))
    }

    pub(super) fn is_postmaster_of(pid: u32, data_dir: &Path) -> bool {
        let proc_dir = Path::new("/proc").join(pid.to_string());
        // A zombie has no working directory, so it does not count.
        let cwd = proc_dir.join("cwd");
        let same = match (identity(&cwd), identity(data_dir)) {
            (Some(cwd), Some(data_dir)) => cwd == data_dir,
            // The file system was unmounted lazily (umount(8), `-l`) or has failed, and the server runs
            // on. The kernel still knows the folder's name, and a volume's is random.
            _ => std::fs::read_link(&cwd).is_ok_and(|cwd| ends_alike(&cwd, data_dir)),
        };
        same && is_postgres(&proc_dir)
    }

    /// Whether volume and data folder have the same names.
    fn ends_alike(a: &Path, b: &Path) -> bool {
        let end = |path: &Path| {
            let mut names = path.iter().rev().map(ToOwned::to_owned);
            (names.next(), names.next())
        };
        let (data, volume) = end(a);
        volume.is_some() && (data, volume) == end(b)
    }

    pub(super) fn users_of_dir(data_dir: &Path) -> Vec<u32> {
        let (Some(wanted), Ok(entries)) = (identity(data_dir), std::fs::read_dir("/proc")) else {
            return Vec::new();
        };
        entries
            .flatten()
            .filter_map(|entry| {
                let pid = entry.file_name().to_str()?.parse().ok()?;
                let path = entry.path();
                (identity(&path.join("cwd"))? == wanted && is_postgres(&path)).then_some(pid)
            })
            .collect()
    }
}

/// Without `/proc`: `ps` shows the `-D <data directory>` that we start postgres with.
#[cfg(any(not(target_os = "linux"), test))]
mod portable {
    use std::path::Path;
    use std::process::Command;

    fn ps(args: &[&str]) -> String {
        Command::new("/bin/ps").args(args).output().map_or_else(
            |_| String::new(),
            |output| String::from_utf8_lossy(&output.stdout).into_owned(),
        )
    }

    fn serves(command: &str, data_dir: &Path) -> bool {
        let wanted = format!("-D {}", data_dir.display());
        command.contains("postgres")
            && command.split_once(&wanted).is_some_and(|(_, after)| {
                // Not a folder whose name only begins like ours.
                after.is_empty() || after.starts_with(' ')
            })
    }

    pub(super) fn is_postmaster_of(pid: u32, data_dir: &Path) -> bool {
        serves(
            ps(&["-ww", "-o", "command=", "-p", &pid.to_string()]).trim_end(),
            data_dir,
        )
    }

    pub(super) fn users_of_dir(data_dir: &Path) -> Vec<u32> {
        ps(&["-axww", "-o", "pid=,command="])
            .lines()
            .filter_map(|line| {
                let (pid, command) = line.trim().split_once(' ')?;
                serves(command.trim_end(), data_dir)
                    .then(|| pid.parse().ok())
                    .flatten()
            })
            .collect()
    }

    #[cfg(test)]
    mod tests {
        use super::*;

        #[test]
        fn a_folder_that_begins_alike_is_another() {
            let data = Path::new("/pool/v1");
            assert!(serves("/bin/postgres -D /pool/v1 -p 5432", data));
            assert!(serves("/bin/postgres -D /pool/v1", data));
            assert!(!serves("/bin/postgres -D /pool/v12 -p 5432", data));
            assert!(!serves("vi -D /pool/v1", data));
        }

        #[test]
        fn strangers_are_no_postmaster() {
            assert!(!is_postmaster_of(std::process::id(), Path::new("/")));
            assert!(users_of_dir(Path::new("/nowhere/at/all")).is_empty());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_reused_pid_is_not_a_postmaster() {
        let dir = tempfile::tempdir().unwrap();
        // This test's own pid is alive and no postmaster.
        std::fs::write(
            dir.path().join("postmaster.pid"),
            format!("{}\n", std::process::id()),
        )
        .unwrap();
        assert_eq!(recorded_pid(dir.path()), Some(std::process::id()));
        assert!(Postmaster::of(dir.path()).is_none());
    }

    #[test]
    fn a_single_user_backend_and_rubbish_are_no_pid() {
        let dir = tempfile::tempdir().unwrap();
        for text in ["-17\n", "", "x\n", "99999999999\n"] {
            std::fs::write(dir.path().join("postmaster.pid"), text).unwrap();
            assert_eq!(recorded_pid(dir.path()), None, "{text:?}");
        }
    }

    #[test]
    fn groups_are_never_signalled() {
        assert!(!exists(0));
        assert!(send(0, Signal::SIGKILL).is_ok());
        assert!(send(u32::MAX, Signal::SIGKILL).is_ok());
    }

    #[tokio::test]
    async fn the_end_of_a_process_is_noticed() {
        let mut child = std::process::Command::new("sleep")
            .arg("600")
            .spawn()
            .unwrap();
        let watched = Postmaster {
            pid: child.id(),
            data_dir: "/".into(),
            #[cfg(target_os = "linux")]
            pidfd: pidfd_open(child.id()),
        };
        watched.signal(Signal::SIGKILL).unwrap();
        tokio::time::timeout(Duration::from_secs(10), watched.ended())
            .await
            .unwrap();
        child.wait().unwrap();
    }
}
