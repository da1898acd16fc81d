//! The life of one client connection: opening, route, session, farewell.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::runtime::Handle;
use tokio::sync::watch;
use tokio::time::timeout;
use tokio_util::task::AbortOnDropHandle;
use tracing::{debug, warn};

use super::backend;
use super::cancel::CancelKeys;
use super::departure::{Departure, Reason};
use super::greeting::Greeting;
use super::handshake::{self, HandshakeError, Opening};
use super::relay::{End, Relay};
use super::wire::{Fatal, StartupPacket, TERMINATE};
use super::{Route, RouteError, Router, Startup};
use crate::types::BranchName;

/// How long a last word to a client may take, and then how long its unread bytes are
/// waited for: closing on them would reset the connection, and the word be lost.
const FAREWELL_LIMIT: Duration = Duration::from_secs(1);

/// What a client may send ahead while its branch starts. PostgreSQL's clients send nothing.
const EARLY_MAX_BYTES: usize = 16 * 1024;

/// What all connections of a proxy share.
#[derive(Debug)]
pub(super) struct Shared {
    pub keys: CancelKeys,
    pub sessions: AtomicUsize,
    pub max_sessions: usize,
    pub handshake_limit: Duration,
}

/// What the connections of one endpoint share.
pub(super) struct Endpoint {
    pub shared: Arc<Shared>,
    pub router: Arc<dyn Router>,
    /// Where routes are asked for: the runtime that the router belongs to.
    pub home: Handle,
    /// True from when the endpoint stops.
    pub shutdown: watch::Receiver<bool>,
}

/// One of the sessions that are allowed at a time.
struct Seat(Arc<Shared>);

impl Seat {
    fn take(shared: &Arc<Shared>) -> Option<Self> {
        shared
            .sessions
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, |n| {
                (n < shared.max_sessions).then_some(n + 1)
            })
            .is_ok()
            .then(|| Self(shared.clone()))
    }
}

impl Drop for Seat {
    fn drop(&mut self) {
        self.0.sessions.fetch_sub(1, Ordering::Relaxed);
    }
}

/// Serves one client from its first byte to its last.
pub(super) async fn serve<C>(mut client: C, endpoint: Arc<Endpoint>)
where
    C: AsyncRead + AsyncWrite + Unpin,
{
    let shared = &endpoint.shared;
    match timeout(shared.handshake_limit, handshake::open(&mut client)).await {
        Ok(Ok(Opening::Session { packet, startup })) => {
            let last_word = match Seat::take(shared) {
                // Boxed: what a session takes need not be there before it, nor after.
                Some(_seat) => Box::pin(session(&mut client, &endpoint, packet, startup)).await,
                None => Some(
                    Fatal::new("53300", "sorry, too many clients already").detail(format!(
                        "dbranch serves {} sessions at a time.",
                        shared.max_sessions
                    )),
                ),
            };
            farewell(&mut client, last_word).await;
        }
        Ok(Ok(Opening::Cancel(key))) => {
            // Closing is the only answer, whether the key was good or not.
            if let Some(target) = shared.keys.target(&key)
                && let Err(error) = target.cancel().await
            {
                warn!(backend = %target.address, %error, "a cancel request was not delivered");
            }
        }
        Ok(Err(HandshakeError::Refused(fatal))) => farewell(&mut client, Some(fatal)).await,
        Ok(Err(HandshakeError::Silent(error))) => {
            debug!(%error, "a connection without a session");
            farewell(&mut client, None).await;
        }
        Err(_) => debug!("a client took too long to open a session"),
    }
}

/// Runs a session; returns what its client is yet to be told before it is closed.
async fn session<C>(
    client: &mut C,
    endpoint: &Endpoint,
    packet: StartupPacket,
    startup: Startup,
) -> Option<Fatal>
where
    C: AsyncRead + AsyncWrite + Unpin,
{
    let mut early = Vec::new();
    let route = match routed(client, endpoint, startup, &mut early).await {
        Ok(route) => route,
        Err(last_word) => return last_word,
    };
    let Route {
        branch,
        branch_name,
        backend,
        active,
        grace,
        lease,
    } = route;
    // Given back with the backend, at the end of this function.
    let _lease = lease;
    let mut stream = match backend::connect(&backend).await {
        Ok(stream) => stream,
        Err(error) => {
            warn!(branch = %branch_name, %backend, %error, "no connection to a branch's server");
            return Some(unreachable(&branch_name, &error));
        }
    };
    let mut departure = Departure::new(branch, active, endpoint.shutdown.clone());
    let greeting = Greeting::new(endpoint.shared.keys.clone(), backend, packet.minor);
    let mut relay = Relay::new(
        client,
        &mut stream,
        greeting,
        &mut departure,
        grace,
        packet.raw,
        &early,
    );
    drop(early);
    let end = relay.run().await;

    let may_speak = relay.client_at_boundary();
    match end {
        End::Client => {
            debug!(branch = %branch_name, "the client left");
            None
        }
        End::Backend(error) if relay.progress().is_explained() => {
            debug!(branch = %branch_name, ?error, "the server ended a session");
            None
        }
        End::Backend(error) => {
            warn!(branch = %branch_name, ?error, "the server closed a session without a word");
            may_speak.then(|| lost(&branch_name))
        }
        End::Left(reason) => {
            debug!(branch = %branch_name, ?reason, "a session left its branch");
            if relay.backend_at_boundary() {
                // Five bytes into an empty socket buffer: a backend that does not take
                // them learns the same from the closing.
                let _ = timeout(FAREWELL_LIMIT, stream.write_all(&TERMINATE)).await;
            }
            Some(parting(
                &departure,
                reason,
                &branch_name,
                endpoint.router.as_ref(),
            ))
        }
        End::Cut(reason) => {
            warn!(branch = %branch_name, ?reason, "a session was ended inside a transaction: its grace is over");
            // A backend that computes does not look whether its client is still there.
            if let Some(target) = relay.cancel_target()
                && let Err(error) = target.cancel().await
            {
                warn!(branch = %branch_name, %error, "the session's statement could not be cancelled");
            }
            may_speak.then(|| parting(&departure, reason, &branch_name, endpoint.router.as_ref()))
        }
    }
}

/// Asks where the session goes while the client waits; `early` gets what it sends meanwhile.
///
/// The error is what the client is told; none when it left.
async fn routed<C>(
    client: &mut C,
    endpoint: &Endpoint,
    startup: Startup,
    early: &mut Vec<u8>,
) -> Result<Route, Option<Fatal>>
where
    C: AsyncRead + Unpin,
{
    let router = endpoint.router.clone();
    // On the router's own runtime, where its sockets and tasks live.
    let asked = endpoint
        .home
        .spawn(async move { router.route(&startup).await });
    let mut asked = AbortOnDropHandle::new(asked);
    let mut shutdown = endpoint.shutdown.clone();
    loop {
        tokio::select! {
            biased;
            answer = &mut asked => return match answer {
                Ok(Ok(route)) => Ok(route),
                Ok(Err(refusal)) => Err(Some(refused(refusal))),
                Err(error) if error.is_panic() => Err(Some(Fatal::new("XX000", "dbranch failed to find the branch (a bug)"))),
                Err(_) => Err(Some(stopping())),
            },
            // A closed channel means the same.
            _ = shutdown.wait_for(|stops| *stops) => return Err(Some(stopping())),
            read = client.read_buf(early), if early.len() < EARLY_MAX_BYTES => match read {
                Ok(n) if n > 0 => {}
                _ => {
                    debug!("a client left before its branch was ready");
                    return Err(None);
                }
            },
        }
    }
}

fn refused(refusal: RouteError) -> Fatal {
    let RouteError {
        sqlstate,
        message,
        detail,
        hint,
    } = refusal;
    Fatal {
        sqlstate,
        message,
        detail,
        hint,
    }
}

fn stopping() -> Fatal {
    Fatal::new("57P01", "terminating connection: dbranch is shutting down")
        .hint("`dbranch start` starts it again")
}

fn unreachable(branch: &BranchName, error: &std::io::Error) -> Fatal {
    Fatal::new(
        "08006",
        format!("could not connect to the server of branch `{branch}`"),
    )
    .detail(error.to_string())
    .hint(format!("`dbranch logs {branch}` shows what it said"))
}

fn lost(branch: &BranchName) -> Fatal {
    Fatal::new(
        "08006",
        format!("terminating connection: the server of branch `{branch}` closed it unexpectedly"),
    )
    .hint(format!(
        "reconnect; `dbranch logs {branch}` shows what the server said"
    ))
}

/// What a session hears that has to leave `branch`.
fn parting(
    departure: &Departure,
    reason: Reason,
    branch: &BranchName,
    router: &dyn Router,
) -> Fatal {
    let showing = departure.showing().and_then(|id| router.branch_name(&id));
    let fatal = match (reason, showing) {
        (Reason::Shutdown, _) => return stopping(),
        (Reason::Switched, Some(name)) => Fatal::new(
            "57P01",
            format!("terminating connection: this endpoint now shows branch `{name}`"),
        )
        .hint(format!("reconnect to go on with branch `{name}`")),
        (Reason::Switched, None) => Fatal::new(
            "57P01",
            format!("terminating connection: this endpoint no longer shows branch `{branch}`"),
        )
        .hint("reconnect to go on with the branch it shows now"),
        (Reason::EndpointGone, _) => Fatal::new(
            "57P01",
            format!("terminating connection: this endpoint of branch `{branch}` was removed"),
        )
        .hint("`dbranch url` prints where a branch is to be found"),
    };
    fatal.detail(format!("The session was on branch `{branch}`."))
}

/// Tells the client its last word and closes so that it can read it.
async fn farewell<C>(client: &mut C, last_word: Option<Fatal>)
where
    C: AsyncRead + AsyncWrite + Unpin,
{
    let say = async {
        if let Some(fatal) = last_word {
            client.write_all(&fatal.encode()).await?;
        }
        client.shutdown().await
    };
    // Whoever can't be told is gone, or reads nothing.
    if !matches!(timeout(FAREWELL_LIMIT, say).await, Ok(Ok(()))) {
        return;
    }
    let drain = async {
        let mut unread = [0; 1024];
        while matches!(client.read(&mut unread).await, Ok(n) if n > 0) {}
    };
    let _ = timeout(FAREWELL_LIMIT, drain).await;
}
