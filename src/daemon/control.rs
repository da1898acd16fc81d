//! The daemon's own socket: made, served, and made again when somebody sweeps it away.

use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::os::unix::net::UnixStream;

use anyhow::{Context, bail};
use axum::Router;
use tokio::net::UnixListener;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tracing::{info, warn};

use crate::config::Paths;

/// Serves the api on the daemon's socket.
#[derive(Debug)]
pub(super) struct Control {
    paths: Paths,
    routes: Router,
    serving: TaskTracker,
    stop: CancellationToken,
    /// Inode of the socket's file.
    file: Option<u64>,
}

/// Takes the daemon's socket, mode 0600. The caller holds the daemon's lock, so whatever lies there is
/// dead; one that answers all the same belongs to a daemon whose lock file was deleted.
pub(super) fn listen(paths: &Paths) -> anyhow::Result<UnixListener> {
    let socket = paths.daemon_socket();
    if UnixStream::connect(&socket).is_ok() {
        bail!(
            "another daemon answers at {}, though its lock file is gone: end it first",
            socket.display()
        );
    }
    let _ = std::fs::remove_file(&socket);
    let listener =
        UnixListener::bind(&socket).with_context(|| format!("listen on {}", socket.display()))?;
    std::fs::set_permissions(&socket, std::fs::Permissions::from_mode(0o600))
        .with_context(|| format!("restrict {}", socket.display()))?;
    Ok(listener)
}

impl Control {
    /// Serves until `stop`; `serving` then waits for the requests under way.
    pub(super) fn serve(
        paths: &Paths,
        listener: UnixListener,
        routes: Router,
        serving: &TaskTracker,
        stop: &CancellationToken,
    ) -> Self {
        let mut control = Self {
            paths: paths.clone(),
            routes,
            serving: serving.clone(),
            stop: stop.clone(),
            file: None,
        };
        control.begin(listener);
        control
    }

    fn begin(&mut self, listener: UnixListener) {
        self.file = self.found();
        let (routes, stop) = (self.routes.clone(), self.stop.clone());
        self.serving.spawn(async move {
            let served =
                axum::serve(listener, routes).with_graceful_shutdown(stop.cancelled_owned());
            if let Err(e) = served.await {
                warn!("api: {e}");
            }
        });
    }

    fn found(&self) -> Option<u64> {
        let meta = std::fs::symlink_metadata(self.paths.daemon_socket()).ok()?;
        Some(meta.ino())
    }

    /// Makes the socket again where its file is gone: no client would ever reach this daemon, and
    /// none could start another.
    pub(super) fn mend(&mut self) {
        if self.found().is_some() && self.found() == self.file {
            return;
        }
        let made = self.paths.create().map_err(Into::into);
        match made.and_then(|()| listen(&self.paths)) {
            Ok(listener) => {
                info!("the socket was gone: made it again");
                self.begin(listener);
            }
            Err(e) => warn!("make the socket again: {e:#}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_socket_that_was_swept_away_is_made_again() {
        let home = tempfile::tempdir().unwrap();
        let paths = Paths::under(home.path());
        paths.create().unwrap();
        let listener = listen(&paths).unwrap();
        let (serving, stop) = (TaskTracker::new(), CancellationToken::new());
        let mut control = Control::serve(&paths, listener, Router::new(), &serving, &stop);
        control.mend();
        assert_eq!(serving.len(), 1);
        assert!(
            listen(&paths).is_err(),
            "it answers, so it is not taken over"
        );

        std::fs::remove_dir_all(paths.run_dir()).unwrap();
        control.mend();
        assert!(UnixStream::connect(paths.daemon_socket()).is_ok());
        stop.cancel();
        serving.close();
        serving.wait().await;
    }
}
