//! Reads `postmaster.pid`, the lock file of a data directory's server.

use std::io::{self, ErrorKind};
use std::path::{Path, PathBuf};

/// What the server says of itself on the file's eighth line
/// (`PM_STATUS_*` in PostgreSQL's `utils/pidfile.h`).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Status {
    Starting,
    Stopping,
    /// Accepts connections.
    Ready,
    /// In recovery, and refuses connections as `hot_standby` is off.
    Standby,
    /// Not written yet, or not known to us.
    Unknown,
}

/// The content of a `postmaster.pid`. The server writes it line by line while it
/// starts, so later lines may be missing.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PidFile {
    /// In the server's own pid namespace: a container's is not ours.
    pub pid: u32,
    /// As the server sees the path.
    pub data_dir: PathBuf,
    /// Seconds since 1970.
    pub started_at: Option<u64>,
    pub port: Option<u16>,
    /// As the server sees the path; none when it has no Unix socket.
    pub socket_dir: Option<PathBuf>,
    pub status: Status,
}

impl PidFile {
    /// Reads the file of a data directory. None when there is none, or when it
    /// hasn't got its first lines yet.
    pub fn read(data_dir: &Path) -> io::Result<Option<Self>> {
        match std::fs::read_to_string(data_dir.join("postmaster.pid")) {
            Ok(text) => Ok(Self::parse(&text)),
            Err(e) if e.kind() == ErrorKind::NotFound => Ok(None),
            Err(e) => Err(e),
        }
    }

    /// Reads the file's text. None when it names no process. A server without a
    /// postmaster (single-user mode) writes its pid negative; it counts alike.
    pub fn parse(text: &str) -> Option<Self> {
        let mut lines = text.lines().map(str::trim);
        let pid = lines.next()?;
        let pid = pid.strip_prefix('-').unwrap_or(pid).parse().ok()?;
        let data_dir = PathBuf::from(lines.next()?);
        let started_at = lines.next().and_then(|line| line.parse().ok());
        let port = lines.next().and_then(|line| line.parse().ok());
        let socket_dir = lines.next().filter(|line| !line.is_empty());
        // Then the address listened on and the shared memory's key.
        let status = match lines.nth(2) {
            Some("starting") => Status::Starting,
            Some("stopping") => Status::Stopping,
            Some("ready") => Status::Ready,
            Some("standby") => Status::Standby,
            _ => Status::Unknown,
        };
        Some(Self {
            pid,
            data_dir,
            started_at,
            port,
            socket_dir: socket_dir.map(PathBuf::from),
            status,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const FULL: &str =
        "4711\n/v/data\n1700000000\n5432\n/run/x\n*\n  1310722    262145\nready   \n";

    #[test]
    fn a_full_file_is_read() {
        let file = PidFile::parse(FULL).unwrap();
        assert_eq!(file.pid, 4711);
        assert_eq!(file.data_dir, Path::new("/v/data"));
        assert_eq!(file.started_at, Some(1_700_000_000));
        assert_eq!(file.port, Some(5432));
        assert_eq!(file.socket_dir.as_deref(), Some(Path::new("/run/x")));
        assert_eq!(file.status, Status::Ready);
    }

    #[test]
    fn every_beginning_of_a_file_is_understood_or_none() {
        for end in 0..FULL.len() {
            if let Some(file) = PidFile::parse(&FULL[..end]) {
                assert!("4711".starts_with(&file.pid.to_string()));
                let whole = end >= FULL.len() - "   \n".len();
                assert_eq!(file.status == Status::Ready, whole, "{:?}", &FULL[..end]);
            }
        }
    }

    #[test]
    fn states_and_odd_files_are_told_apart() {
        let with = |status: &str| PidFile::parse(&FULL.replace("ready   ", status)).unwrap();
        assert_eq!(with("starting").status, Status::Starting);
        assert_eq!(with("stopping").status, Status::Stopping);
        assert_eq!(with("standby ").status, Status::Standby);
        assert_eq!(with("").status, Status::Unknown);
        assert_eq!(PidFile::parse("-12\n/d\n").unwrap().pid, 12);
        assert_eq!(PidFile::parse(""), None);
        assert_eq!(PidFile::parse("x\n/d\n"), None);
        let no_socket = FULL.replace("/run/x", "");
        assert_eq!(PidFile::parse(&no_socket).unwrap().socket_dir, None);
    }
}
