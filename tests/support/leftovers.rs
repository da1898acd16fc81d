//! Finds what an environment left behind: processes, containers, mounts.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

/// A process, by pid, with its command line for messages.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Process {
    pub(crate) pid: u32,
    pub(crate) command: String,
}

/// The processes that work for the environment in `dir`: servers, whose working folder is
/// their data directory, and daemons, by their `DBRANCH_HOME`. Nothing where there is no /proc.
pub(crate) fn processes_in(dir: &Path) -> Vec<Process> {
    // Without a slash at its end, which `path("")` has.
    let dir = dir.components().as_path();
    let home = [b"DBRANCH_HOME=", dir.as_os_str().as_encoded_bytes(), b"/"].concat();
    let works_here = |proc: &Path| {
        fs::read_link(proc.join("cwd")).is_ok_and(|cwd| cwd.starts_with(dir))
            || fs::read(proc.join("environ"))
                .is_ok_and(|env| env.split(|b| *b == 0).any(|var| var.starts_with(&home)))
    };
    fs::read_dir("/proc")
        .into_iter()
        .flatten()
        .flatten()
        .filter_map(|entry| {
            let pid = entry.file_name().to_str()?.parse().ok()?;
            let command = fs::read(entry.path().join("cmdline")).ok()?;
            // A process that has ended and was not waited for has no command line.
            (!command.is_empty() && works_here(&entry.path())).then(|| Process {
                pid,
                command: String::from_utf8_lossy(&command).replace('\0', " "),
            })
        })
        .collect()
}

/// The containers that mount something of the environment in `dir`.
pub(crate) fn containers_in(dir: &Path) -> Vec<String> {
    let docker = |args: &[&str]| {
        let out = Command::new("docker").args(args).output().ok()?;
        out.status
            .success()
            .then(|| String::from_utf8_lossy(&out.stdout).into_owned())
    };
    let ids = docker(&["ps", "-aq", "--no-trunc"]).unwrap_or_default();
    ids.lines()
        .filter(|id| {
            // One that vanishes meanwhile belongs to another test.
            let format = "{{range .Mounts}}{{println .Source}}{{end}}";
            docker(&["inspect", "-f", format, id])
                .is_some_and(|mounts| mounts.lines().any(|m| Path::new(m).starts_with(dir)))
        })
        .map(str::to_owned)
        .collect()
}

/// The mount points below `dir`, innermost last.
pub(crate) fn mounts_in(dir: &Path) -> Vec<PathBuf> {
    fs::read_to_string("/proc/mounts")
        .unwrap_or_default()
        .lines()
        .filter_map(|line| line.split(' ').nth(1))
        .map(PathBuf::from)
        .filter(|mount| mount.starts_with(dir))
        .collect()
}

/// Whether a process still runs, or any thread of it, which keeps its files and sockets open.
/// One that has ended and was not waited for is a lone zombie.
pub(crate) fn is_alive(pid: u32) -> bool {
    fs::read_dir(format!("/proc/{pid}/task"))
        .into_iter()
        .flatten()
        .flatten()
        .any(|thread| {
            fs::read_to_string(thread.path().join("stat")).is_ok_and(|stat| {
                !stat
                    .rsplit(')')
                    .next()
                    .unwrap_or_default()
                    .starts_with(" Z")
            })
        })
}

/// Kills a process without giving it a chance.
pub(crate) fn kill_9(pid: u32) {
    let pid = i32::try_from(pid).expect("pids are below 2^22");
    let _ = kill(Pid::from_raw(pid), Signal::SIGKILL);
}
