//! Waits until a starting server accepts connections.

use std::io;
use std::path::Path;
use std::time::Duration;

use super::{PidFile, Status};

const SHORTEST: Duration = Duration::from_millis(1);
const LONGEST: Duration = Duration::from_millis(5);
/// Most servers are up by then, at one look a millisecond.
const QUICK_LOOKS: u32 = 100;

/// Returns when the server of this data directory says in `postmaster.pid` that
/// it is ready; it says so the moment it accepts connections.
///
/// The caller removes a stale file before it starts the server, and sees to it
/// that waiting ends when the server does: this waits without limit. Cancel-safe.
/// Fails only when the file can't be read.
pub async fn wait_ready(data_dir: &Path) -> io::Result<PidFile> {
    let mut pause = SHORTEST;
    let mut looks = 0;
    loop {
        // A file of 100 bytes in the cache: quicker read than handed to another thread.
        match PidFile::read(data_dir) {
            Ok(Some(file)) if matches!(file.status, Status::Ready | Status::Standby) => {
                return Ok(file);
            }
            Ok(_) => {}
            // Read in the middle of a write.
            Err(e) if e.kind() == io::ErrorKind::InvalidData => {}
            Err(e) => return Err(e),
        }
        tokio::time::sleep(pause).await;
        looks += 1;
        if looks > QUICK_LOOKS {
            pause = (pause * 2).min(LONGEST);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn write(dir: &Path, status: &str) {
        let text = format!(
            "1\n{}\n1700000000\n5432\n/run\n\n\n{status}\n",
            dir.display()
        );
        std::fs::write(dir.join("postmaster.pid"), text).unwrap();
    }

    #[tokio::test(start_paused = true)]
    async fn waiting_ends_when_the_server_is_ready_and_not_before() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().to_owned();
        let waiting = wait_ready(&path);
        tokio::pin!(waiting);
        let limit = Duration::from_secs(5);
        assert!(tokio::time::timeout(limit, &mut waiting).await.is_err());
        write(&path, "starting");
        assert!(tokio::time::timeout(limit, &mut waiting).await.is_err());
        write(&path, "ready   ");
        let file = tokio::time::timeout(limit, waiting).await.unwrap().unwrap();
        assert_eq!((file.pid, file.port), (1, Some(5432)));
    }

    #[tokio::test]
    async fn a_file_that_cannot_be_read_is_an_error() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::create_dir(dir.path().join("postmaster.pid")).unwrap();
        assert!(wait_ready(dir.path()).await.is_err());
    }
}
