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
use super::{Ends, Route, RouteError, Router, Startup};
use crate::types::BranchName;

/// How long a last word to a client may take, and then how long its unread bytes are
/// waited for: closing on them would reset the connection, and the word be lost.
const FAREWELL_LIMIT: Duration = Duration::from_secs(1);

/// What a client may send ahead while its branch starts. PostgreSQL's clients send nothing.
const EARLY_MAX_BYTES: usize = 16 * 1024;

/// How often a session's route is asked for where nobody listens at its end, and the pause between.
const ATTEMPTS_MAX: u32 = 4;
const ATTEMPT_PAUSE: Duration = Duration::from_millis(50);

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

/// Serves one client from its first byte to its last. `ends` are known of a TCP connection.
pub(super) async fn serve<C>(mut client: C, ends: Option<Ends>, endpoint: Arc<Endpoint>)
where
    C: AsyncRead + AsyncWrite + Unpin,
{
    let shared = &endpoint.shared;
    match timeout(shared.handshake_limit, handshake::open(&mut client)).await {
        Ok(Ok(Opening::Session { packet, startup })) => {
            let startup = Startup { ends, ..startup };
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
    let mut attempt = 1;
    let (route, mut stream) = loop {
        let route = match routed(client, endpoint, startup.clone(), &mut early).await {
            Ok(route) => route,
            Err(last_word) => return last_word,
        };
        match backend::connect(&route.backend).await {
            Ok(stream) => break (route, stream),
            // It ended this moment and the router has yet to hear of it.
            Err(error) if is_gone(&error) && attempt < ATTEMPTS_MAX => attempt += 1,
            Err(error) => {
                warn!(branch = %route.branch_name, backend = %route.backend, %error, "no connection to a branch's server");
                return Some(unreachable(&route.branch_name, &error));
            }
        }
        tokio::time::sleep(ATTEMPT_PAUSE).await;
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

/// Nobody listens there (any more).
fn is_gone(error: &std::io::Error) -> bool {
    use std::io::ErrorKind::{ConnectionRefused, NotFound};
    matches!(error.kind(), ConnectionRefused | NotFound)
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

#[cfg(test)]
mod tests {
    use std::future::Future;
    use std::pin::Pin;
    use std::sync::Mutex;

    use tokio::io::{DuplexStream, duplex};
    use tokio::net::TcpListener;
    use tokio::sync::oneshot;
    use tokio::task::JoinHandle;

    use super::*;
    use crate::proxy::wire::{CancelKey, backend_key_data, cancel_request};
    use crate::types::{BackendAddress, BranchId};

    type Answer = Pin<Box<dyn Future<Output = Result<Route, RouteError>> + Send>>;

    /// Gives prepared answers, the last one first.
    struct Prepared(Mutex<Vec<Answer>>);

    impl Router for Prepared {
        fn route<'a>(
            &'a self,
            _startup: &'a Startup,
        ) -> Pin<Box<dyn Future<Output = Result<Route, RouteError>> + Send + 'a>> {
            self.0.lock().unwrap().pop().expect("asked no more often")
        }
    }

    struct Fixture {
        shared: Arc<Shared>,
        _running: watch::Sender<bool>,
        shutdown: watch::Receiver<bool>,
    }

    impl Fixture {
        fn new() -> Self {
            let (running, shutdown) = watch::channel(false);
            let shared = Arc::new(Shared {
                keys: CancelKeys::default(),
                sessions: AtomicUsize::new(0),
                max_sessions: 1,
                handshake_limit: Duration::from_secs(30),
            });
            Self {
                shared,
                _running: running,
                shutdown,
            }
        }

        /// A client's end of a connection that is routed by `answer`.
        fn connect(&self, answer: Answer) -> (DuplexStream, JoinHandle<()>) {
            self.connect_by(vec![answer])
        }

        fn connect_by(&self, answers: Vec<Answer>) -> (DuplexStream, JoinHandle<()>) {
            let (client, near) = duplex(4096);
            let endpoint = Arc::new(Endpoint {
                shared: self.shared.clone(),
                router: Arc::new(Prepared(Mutex::new(answers))),
                home: Handle::current(),
                shutdown: self.shutdown.clone(),
            });
            (client, tokio::spawn(serve(near, None, endpoint)))
        }
    }

    fn never() -> Answer {
        Box::pin(std::future::pending())
    }

    fn startup(minor: u8) -> Vec<u8> {
        let body = b"user\0me\0\0";
        let mut packet = vec![
            0,
            0,
            0,
            8 + u8::try_from(body.len()).unwrap(),
            0,
            3,
            0,
            minor,
        ];
        packet.extend(body);
        packet
    }

    /// Everything the proxy says to a client that sends `bytes` and waits.
    async fn conversation(fixture: &Fixture, answer: Answer, bytes: &[u8]) -> String {
        conversation_by(fixture, vec![answer], bytes).await
    }

    async fn conversation_by(fixture: &Fixture, answers: Vec<Answer>, bytes: &[u8]) -> String {
        let (mut client, task) = fixture.connect_by(answers);
        client.write_all(bytes).await.unwrap();
        let mut said = Vec::new();
        client.read_to_end(&mut said).await.unwrap();
        drop(client);
        task.await.unwrap();
        assert_eq!(fixture.shared.sessions.load(Ordering::Relaxed), 0);
        String::from_utf8_lossy(&said).into_owned()
    }

    /// A server's socket and a route to it. Dropping the sender removes the endpoint.
    async fn server() -> (TcpListener, watch::Sender<Option<BranchId>>, Answer) {
        let socket = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let branch = BranchId::random();
        let show = watch::Sender::new(Some(branch.clone()));
        let route = Route {
            branch,
            branch_name: BranchName::new("feature/x").unwrap(),
            backend: BackendAddress::Tcp {
                host: "127.0.0.1".into(),
                port: socket.local_addr().unwrap().port(),
            },
            active: show.subscribe(),
            grace: Duration::from_secs(30),
            lease: Box::new(()),
        };
        (socket, show, Box::pin(async { Ok(route) }))
    }

    #[tokio::test]
    async fn a_refusal_is_told_in_full() {
        let refusal = RouteError {
            sqlstate: "57P03",
            message: "branch `x` did not start".into(),
            detail: Some("why".into()),
            hint: Some("what to do".into()),
        };
        let answer = Box::pin(async { Err(refusal) });
        let said = conversation(&Fixture::new(), answer, &startup(0)).await;
        let fields = "SFATAL\0VFATAL\0C57P03\0Mbranch `x` did not start\0Dwhy\0Hwhat to do\0\0";
        assert!(said.starts_with('E') && said.ends_with(fields), "{said:?}");
    }

    #[tokio::test]
    async fn a_server_that_is_not_there_is_told() {
        let mut shown = Vec::new();
        let mut answers = Vec::new();
        for _ in 0..ATTEMPTS_MAX {
            let (_, show, answer) = server().await;
            shown.push(show);
            answers.push(answer);
        }
        let said = conversation_by(&Fixture::new(), answers, &startup(0)).await;
        assert!(
            said.contains("C08006\0Mcould not connect to the server of branch `feature/x`\0"),
            "{said:?}"
        );
        assert!(said.contains("dbranch logs feature/x"), "{said:?}");
    }

    #[tokio::test]
    async fn a_server_that_ended_this_moment_is_asked_for_again() {
        let (ended, _show, stale) = server().await;
        drop(ended);
        let (socket, _shown, fresh) = server().await;
        let fixture = Fixture::new();
        let (mut client, task) = fixture.connect_by(vec![fresh, stale]);
        client.write_all(&startup(0)).await.unwrap();
        let (mut backend, _) = socket.accept().await.unwrap();
        let mut got = vec![0; startup(0).len()];
        backend.read_exact(&mut got).await.unwrap();
        assert_eq!(got, startup(0), "the session began, and nothing was lost");
        drop((client, backend));
        task.await.unwrap();
    }

    #[tokio::test]
    async fn a_server_that_vanishes_is_told() {
        let (socket, _show, answer) = server().await;
        let accept = tokio::spawn(async move { drop(socket.accept().await.unwrap()) });
        let said = conversation(&Fixture::new(), answer, &startup(0)).await;
        accept.await.unwrap();
        assert!(said.contains("C08006\0"), "{said:?}");
    }

    #[tokio::test]
    async fn one_session_too_many_is_told() {
        let fixture = Fixture::new();
        let (mut first, task) = fixture.connect(never());
        first.write_all(&startup(0)).await.unwrap();
        while fixture.shared.sessions.load(Ordering::Relaxed) == 0 {
            tokio::task::yield_now().await;
        }
        let (mut second, _task) = fixture.connect(never());
        second.write_all(&startup(0)).await.unwrap();
        let mut said = Vec::new();
        second.read_to_end(&mut said).await.unwrap();
        assert!(String::from_utf8_lossy(&said).contains("C53300\0"));
        drop(first);
        task.await.unwrap();
        assert_eq!(fixture.shared.sessions.load(Ordering::Relaxed), 0);
    }

    #[tokio::test]
    async fn who_leaves_before_the_branch_is_ready_is_not_waited_for() {
        let (dropped, route_was_dropped) = oneshot::channel::<()>();
        let answer = Box::pin(async move {
            let _held = dropped;
            std::future::pending().await
        });
        let fixture = Fixture::new();
        let (mut client, task) = fixture.connect(answer);
        client.write_all(&startup(0)).await.unwrap();
        drop(client);
        task.await.unwrap();
        assert!(route_was_dropped.await.is_err());
    }

    #[tokio::test]
    async fn what_does_not_speak_the_protocol_gets_no_answer() {
        for bytes in [
            &b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03"[..],
            b"GET / HTTP/1.1\r\n\r\n",
        ] {
            assert_eq!(conversation(&Fixture::new(), never(), bytes).await, "");
        }
        let protocol_2 = [&[0, 0, 0, 8, 0, 2, 0, 0][..]].concat();
        assert!(
            conversation(&Fixture::new(), never(), &protocol_2)
                .await
                .contains("C0A000\0")
        );
        let unterminated = [&[0, 0, 0, 13, 0, 3, 0, 0][..], b"user\0"].concat();
        assert!(
            conversation(&Fixture::new(), never(), &unterminated)
                .await
                .contains("C08P01\0")
        );
    }

    #[tokio::test(start_paused = true)]
    async fn a_client_that_sends_too_slowly_is_closed() {
        let (mut client, task) = Fixture::new().connect(never());
        client.write_all(&startup(0)[..9]).await.unwrap();
        assert_eq!(client.read(&mut [0; 1]).await.unwrap(), 0);
        task.await.unwrap();
    }

    #[tokio::test]
    async fn a_long_cancel_key_of_ours_leads_to_the_backends_own() {
        let fixture = Fixture::new();
        let (socket, show, answer) = server().await;
        let (mut client, task) = fixture.connect(answer);
        // Sent ahead, though no client does: it reaches the backend all the same.
        let ahead = b"p\0\0\0\x08pass";
        client
            .write_all(&[&startup(2), &ahead[..]].concat())
            .await
            .unwrap();
        let (mut backend, _) = socket.accept().await.unwrap();
        let mut got = vec![0; startup(2).len() + ahead.len()];
        backend.read_exact(&mut got).await.unwrap();
        assert_eq!(got, [&startup(2), &ahead[..]].concat());

        let theirs = CancelKey {
            pid: 4711,
            secret: vec![7; 200].into(),
        };
        let ready = b"Z\0\0\0\x05I";
        backend
            .write_all(&[&backend_key_data(&theirs), &ready[..]].concat())
            .await
            .unwrap();
        let mut told = vec![0; 9 + 32 + ready.len()];
        client.read_exact(&mut told).await.unwrap();
        let ours = CancelKey {
            pid: 4711,
            secret: told[9..41].into(),
        };
        assert_eq!(told, [&backend_key_data(&ours), &ready[..]].concat());

        let (mut canceller, cancel_task) = fixture.connect(never());
        canceller.write_all(&cancel_request(&ours)).await.unwrap();
        let (mut at_backend, _) = socket.accept().await.unwrap();
        let mut request = vec![0; cancel_request(&theirs).len()];
        at_backend.read_exact(&mut request).await.unwrap();
        assert_eq!(request, cancel_request(&theirs));
        // The client's closing tells that the backend has heard.
        assert!(!cancel_task.is_finished());
        drop(at_backend);
        assert_eq!(canceller.read(&mut [0; 1]).await.unwrap(), 0);
        cancel_task.await.unwrap();

        // The endpoint goes: the client is told, the backend gets its Terminate.
        drop(show);
        let mut said = Vec::new();
        client.read_to_end(&mut said).await.unwrap();
        assert!(String::from_utf8_lossy(&said).contains("C57P01\0"));
        let mut last = Vec::new();
        backend.read_to_end(&mut last).await.unwrap();
        assert_eq!(last, TERMINATE);
        drop(client);
        task.await.unwrap();
        assert!(fixture.shared.keys.target(&ours).is_none());
    }
}
