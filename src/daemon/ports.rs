//! Endpoints of the engine as listeners of the proxy.

use std::collections::HashMap;
use std::future::Future;
use std::net::{Ipv4Addr, SocketAddr};
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::Duration;

use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::engine::{EndpointKey, Engine, EngineError, Ports};
use crate::proxy::{
    ClientFolders, Listener, Proxy, ProxySettings, Route, RouteError, Router, Startup,
};
use crate::types::{BranchId, BranchName};

/// SQLSTATE for a branch that can't serve now: `cannot_connect_now`.
const CANNOT_CONNECT_NOW: &str = "57P03";
/// SQLSTATE where there is no branch to serve: `invalid_catalog_name`.
const NO_BRANCH: &str = "3D000";

/// The proxy's listeners, one an endpoint.
#[derive(Debug)]
pub(super) struct ProxyPorts {
    proxy: Proxy,
    engine: OnceLock<Engine>,
    clients: Arc<ClientFolders>,
    open: Mutex<HashMap<EndpointKey, Open>>,
    /// Listeners told to end, by port: each has its port a moment longer.
    ending: Mutex<HashMap<u16, JoinHandle<()>>>,
    stop: CancellationToken,
    sessions: TaskTracker,
}

#[derive(Debug)]
struct Open {
    port: u16,
    stop: CancellationToken,
    task: JoinHandle<()>,
}

impl ProxyPorts {
    pub(super) fn new(stop: CancellationToken) -> std::io::Result<Self> {
        Ok(Self {
            proxy: Proxy::start(&ProxySettings::default())?,
            engine: OnceLock::new(),
            clients: Arc::default(),
            open: Mutex::default(),
            ending: Mutex::default(),
            stop,
            sessions: TaskTracker::new(),
        })
    }

    /// Names the engine that routes are asked of. Before it, no port can be opened.
    pub(super) fn serve_for(&self, engine: &Engine) {
        let _ = self.engine.set(engine.clone());
    }

    /// Waits until the last session has ended.
    pub(super) async fn drain(&self) {
        self.sessions.close();
        self.sessions.wait().await;
    }

    async fn listen(&self, key: EndpointKey, port: u16) -> Result<(), String> {
        if self.listens(&key, port) {
            return Ok(());
        }
        let before_us = lock(&self.ending).remove(&port);
        if let Some(task) = before_us {
            let _ = task.await;
        }
        let engine = self.engine.get().ok_or("the daemon is not up yet")?.clone();
        let mut open = lock(&self.open);
        if open.get(&key).is_some_and(|o| o.port == port) {
            return Ok(());
        }
        let listener = Listener::bind(SocketAddr::from((Ipv4Addr::LOCALHOST, port)))
            .map_err(|e| e.to_string())?;
        let stop = self.stop.child_token();
        let router = Arc::new(EndpointRouter {
            engine,
            clients: Arc::clone(&self.clients),
            key: key.clone(),
        });
        let task =
            tokio::spawn(
                self.proxy
                    .serve(listener, router, stop.clone(), self.sessions.clone()),
            );
        if let Some(before) = open.insert(key, Open { port, stop, task }) {
            self.end(before);
        }
        Ok(())
    }

    fn end(&self, open: Open) {
        open.stop.cancel();
        lock(&self.ending).insert(open.port, open.task);
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Ports for ProxyPorts {
    fn open(
        &self,
        endpoint: EndpointKey,
        port: u16,
    ) -> Pin<Box<dyn Future<Output = Result<(), String>> + Send + '_>> {
        Box::pin(self.listen(endpoint, port))
    }

    fn listens(&self, endpoint: &EndpointKey, port: u16) -> bool {
        lock(&self.open)
            .get(endpoint)
            .is_some_and(|o| o.port == port)
    }

    fn close(&self, endpoint: &EndpointKey) {
        let open = lock(&self.open).remove(endpoint);
        if let Some(open) = open {
            self.end(open);
        }
    }
}

struct EndpointRouter {
    engine: Engine,
    clients: Arc<ClientFolders>,
    key: EndpointKey,
}

/// Processor time that the look for a client's process may take.
const PROCESS_LIMIT: Duration = Duration::from_millis(5);

impl EndpointRouter {
    async fn find(&self, startup: &Startup) -> Result<Route, RouteError> {
        let of_process = self.of_process(startup).await;
        let active = self.engine.active(of_process.as_ref().unwrap_or(&self.key));
        let branch = active.borrow().clone().ok_or_else(nothing_shown)?;
        let lease = self.engine.lease(&branch);
        let served = self.engine.serve(&branch).await.map_err(|e| refusal(&e))?;
        Ok(Route {
            branch,
            branch_name: served.name,
            backend: served.address,
            active,
            grace: served.grace,
            lease: Box::new(lease),
        })
    }
}

impl EndpointRouter {
    /// The endpoint of the linked worktree that the client's process works in.
    async fn of_process(&self, startup: &Startup) -> Option<EndpointKey> {
        let ends = startup.ends?;
        let (tops, keys): (Vec<_>, Vec<_>) =
            self.engine.routed_by_process(&self.key).into_iter().unzip();
        if keys.is_empty() {
            return None;
        }
        let clients = Arc::clone(&self.clients);
        let find = move || clients.folder_of(ends, &tops, PROCESS_LIMIT);
        let found = tokio::task::spawn_blocking(find).await;
        keys.into_iter().nth(found.ok()??)
    }
}

impl Router for EndpointRouter {
    fn route<'a>(
        &'a self,
        startup: &'a Startup,
    ) -> Pin<Box<dyn Future<Output = Result<Route, RouteError>> + Send + 'a>> {
        Box::pin(self.find(startup))
    }

    fn branch_name(&self, branch: &BranchId) -> Option<BranchName> {
        self.engine.name_of(branch)
    }
}

fn nothing_shown() -> RouteError {
    RouteError {
        sqlstate: NO_BRANCH,
        message: "no database branch is active here".into(),
        detail: Some("The project has none yet, or the active one was deleted.".into()),
        hint: Some("Run \"dbranch status\"; then \"dbranch init-postgres\", \"git switch\" or \"dbranch use\".".into()),
    }
}

/// Engine errors are written for users, so they may be shown to a client.
fn refusal(e: &EngineError) -> RouteError {
    RouteError {
        sqlstate: CANNOT_CONNECT_NOW,
        message: e.message.clone(),
        detail: None,
        hint: e.hint.as_ref().map(|hint| match hint.split(' ').next() {
            Some(
                "dbranch" | "git" | "sudo" | "mount" | "chmod" | "chown" | "fsfreeze" | "systemctl",
            ) => {
                format!("Run \"{hint}\".")
            }
            _ => hint.clone(),
        }),
    }
}
