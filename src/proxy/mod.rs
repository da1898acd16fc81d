//! The switching proxy: one address, and behind it whichever branch is active.
//!
//! It speaks as much of PostgreSQL's frontend/backend protocol (manual, chapter
//! "Frontend/Backend Protocol") as its job needs and forwards the rest. It knows
//! branches only through its own [`Router`].
//!
//! ```text
//!   listen ─ accepts, hands to a thread      holder ─ who has a port; process ─ who a client is
//!      └─> connection ─ one client: opening, route, session, farewell
//!             ├─ handshake ─ to the startup packet ──┐
//!             ├─ backend ─ to an instance            ├─ wire ─ bytes, no sockets
//!             ├─ cancel ─ keys of our own ───────────┤
//!             └─ relay ─ the hot path                │
//!                  ├─ greeting ─ to the first ReadyForQuery
//!                  ├─ session ─ where a session stands: idle or not
//!                  └─ departure ─ when it has to leave
//! ```
//!
//! It never imports the engine, never reads what passes beyond message headers, and
//! never logs any of it.

mod backend;
mod cancel;
mod connection;
mod departure;
mod greeting;
mod handshake;
mod holder;
mod listen;
#[cfg(test)]
mod live_tests;
mod process;
mod relay;
mod session;
mod wire;

use std::any::Any;
use std::future::Future;
use std::pin::Pin;
use std::time::Duration;

use tokio::sync::watch;

pub use self::holder::{PortHolder, port_holder};
pub use self::listen::{BindError, Listener, Proxy, ProxySettings};
pub use self::process::{ClientFolders, Ends};
use crate::types::{BackendAddress, BranchId, BranchName};

/// What a client asks for in its startup packet.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Startup {
    pub user: String,
    /// As sent; the user's name where the client sent none.
    pub database: String,
    pub application_name: Option<String>,
    /// Over which connection, where it is one of TCP.
    pub ends: Option<Ends>,
}

/// Where a session goes.
pub struct Route {
    pub branch: BranchId,
    pub branch_name: BranchName,
    /// Accepts connections now.
    pub backend: BackendAddress,
    /// The branch the endpoint shows at any time. When it differs from `branch`
    /// the session is ended: as soon as it is outside a transaction, at the latest
    /// after `grace`. A closed channel means the endpoint is gone: the same.
    pub active: watch::Receiver<Option<BranchId>>,
    pub grace: Duration,
    /// Held as long as the session lives.
    pub lease: Box<dyn Any + Send>,
}

/// A refusal, as the client is told: an ErrorResponse with these fields.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub struct RouteError {
    /// Five characters, PostgreSQL manual, appendix A.
    pub sqlstate: &'static str,
    pub message: String,
    pub detail: Option<String>,
    pub hint: Option<String>,
}

/// Tells the proxy where a session goes. One router stands behind one endpoint.
pub trait Router: Send + Sync + 'static {
    /// Waits until the branch accepts connections: starts it when it is stopped.
    fn route<'a>(
        &'a self,
        startup: &'a Startup,
    ) -> Pin<Box<dyn Future<Output = Result<Route, RouteError>> + Send + 'a>>;

    /// The name of a branch that the endpoint shows, for the message that ends a
    /// session. Must not block; without it the message names no branch.
    fn branch_name(&self, _branch: &BranchId) -> Option<BranchName> {
        None
    }
}
