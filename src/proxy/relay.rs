//! The hot path: bytes in both directions, in one task, until one side or a switch ends it.
//!
//! A buffer is taken from the thread's spare ones for a read and given back once its
//! bytes went out, in the same poll as a rule: an idle session owns none. Each
//! direction holds at most one buffer and reads no more until that is written, so a
//! slow reader slows its writer down, and never the other direction.
//!
//! Bytes are read from the client only to be given to the backend they were read for;
//! a session is ended when [`Progress`] says that nothing is in flight. Hence what a
//! client sends around a switch is either answered by the old branch or not taken at
//! all, and then the error is what the client reads.

use std::cell::RefCell;
use std::future::Future;
use std::io;
use std::ops::Range;
use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::time::{Sleep, sleep};

use super::cancel::{Registration, Target};
use super::departure::{Departure, Reason};
use super::greeting::Greeting;
use super::session::Progress;

/// Bytes read at once: the low end of the 64 to 256 KiB that did best with copy loops,
/// as a slow reader makes its session keep one. Sizes were not compared here.
const BUFFER_BYTES: usize = 64 * 1024;

/// Spare buffers that a thread keeps.
const SPARE_BUFFERS: usize = 4;

/// After `grace` the client gets this long to take the rest of a message it was sent
/// the beginning of.
const LAST_MESSAGE: Duration = Duration::from_secs(2);

thread_local! {
    static SPARE: RefCell<Vec<Box<[u8]>>> = const { RefCell::new(Vec::new()) };
}

fn take_buffer() -> Box<[u8]> {
    SPARE
        .with_borrow_mut(Vec::pop)
        .unwrap_or_else(|| vec![0; BUFFER_BYTES].into_boxed_slice())
}

fn give_back(buffer: Box<[u8]>) {
    SPARE.with_borrow_mut(|spare| {
        if buffer.len() == BUFFER_BYTES && spare.len() < SPARE_BUFFERS {
            spare.push(buffer);
        }
    });
}

/// Returns if there is something to return.
macro_rules! ready_or_go_on {
    ($poll:expr) => {
        if let Poll::Ready(end) = $poll {
            return Poll::Ready(end);
        }
    };
}

/// Bytes read and not yet written.
struct Held {
    buffer: Box<[u8]>,
    rest: Range<usize>,
}

impl Held {
    fn of(bytes: Vec<u8>) -> Option<Self> {
        let rest = 0..bytes.len();
        (!bytes.is_empty()).then(|| Self {
            buffer: bytes.into_boxed_slice(),
            rest,
        })
    }
}

/// Why a session is over.
#[derive(Debug)]
pub(super) enum End {
    /// The client said goodbye, closed, or can't be reached any more.
    Client,
    /// The backend closed; with what the operating system said, if it did.
    Backend(Option<io::Error>),
    /// The endpoint shows another branch, and nothing was in flight.
    Left(Reason),
    /// The same, and the session did not become idle in time.
    Cut(Reason),
}

/// One session between its streams.
pub(super) struct Relay<'a, C, B> {
    client: &'a mut C,
    backend: &'a mut B,
    progress: Progress,
    /// Until the first ReadyForQuery.
    greeting: Option<Greeting>,
    /// The client's cancel key, from then on.
    registration: Option<Registration>,
    departure: &'a mut Departure,
    grace: Duration,
    to_backend: Option<Held>,
    to_client: Option<Held>,
    client_closed: bool,
    backend_told: bool,
    backend_deaf: bool,
    /// How the backend's stream ended.
    backend_closed: Option<io::Result<()>>,
    timer: Option<Pin<Box<Sleep>>>,
    cutting: Option<Reason>,
}

impl<'a, C, B> Relay<'a, C, B>
where
    C: AsyncRead + AsyncWrite + Unpin,
    B: AsyncRead + AsyncWrite + Unpin,
{
    /// A session that begins with `startup`, the startup packet, and `early`, what the
    /// client sent after it.
    pub(super) fn new(
        client: &'a mut C,
        backend: &'a mut B,
        greeting: Greeting,
        departure: &'a mut Departure,
        grace: Duration,
        startup: Vec<u8>,
        early: &[u8],
    ) -> Self {
        let mut progress = Progress::new();
        progress.client_sent(early);
        let mut first = startup;
        first.extend_from_slice(early);
        Self {
            client,
            backend,
            progress,
            greeting: Some(greeting),
            registration: None,
            departure,
            grace,
            to_backend: Held::of(first),
            to_client: None,
            client_closed: false,
            backend_told: false,
            backend_deaf: false,
            backend_closed: None,
            timer: None,
            cutting: None,
        }
    }

    /// Forwards until the session is over.
    ///
    /// Not cancel-safe: bytes that were read may be lost with the future.
    pub(super) async fn run(&mut self) -> End {
        std::future::poll_fn(|cx| self.poll(cx)).await
    }

    pub(super) fn progress(&self) -> &Progress {
        &self.progress
    }

    /// How to cancel what the backend runs, once it has said so.
    pub(super) fn cancel_target(&self) -> Option<Target> {
        self.registration.as_ref()?.target()
    }

    /// Whether everything read from the backend, up to the end of a message, went to the client.
    pub(super) fn client_at_boundary(&self) -> bool {
        self.to_client.is_none() && self.progress.client_at_boundary()
    }

    /// Whether everything read from the client, up to the end of a message, went to the backend.
    pub(super) fn backend_at_boundary(&self) -> bool {
        self.to_backend.is_none() && self.progress.backend_at_boundary() && !self.backend_told
    }

    fn poll(&mut self, cx: &mut Context<'_>) -> Poll<End> {
        let leaving = self.departure.poll(cx);
        ready_or_go_on!(self.poll_grace(cx, leaving));
        loop {
            let client_was_read = self.reads_client(leaving);
            ready_or_go_on!(self.poll_to_backend(cx, leaving));
            ready_or_go_on!(self.poll_to_client(cx, leaving));
            // What the backend has just said may make it the client's turn.
            if client_was_read || !self.reads_client(leaving) {
                return Poll::Pending;
            }
        }
    }

    /// Once a session that is to leave stays busy for longer than `grace`, begins to cut it.
    fn poll_grace(&mut self, cx: &mut Context<'_>, leaving: Option<Reason>) -> Poll<End> {
        if self.cutting.is_none() {
            let Some(reason) = leaving else {
                self.timer = None;
                return Poll::Pending;
            };
            let grace = self.grace;
            let timer = self.timer.get_or_insert_with(|| Box::pin(sleep(grace)));
            ready!(timer.as_mut().poll(cx));
            self.cutting = Some(reason);
            self.timer = Some(Box::pin(sleep(LAST_MESSAGE)));
        }
        match (self.cutting, &mut self.timer) {
            (Some(reason), Some(timer)) => timer.as_mut().poll(cx).map(|()| End::Cut(reason)),
            _ => Poll::Pending,
        }
    }

    /// Whether more may be taken from the client.
    fn reads_client(&self, leaving: Option<Reason>) -> bool {
        !self.client_closed
            && !self.backend_deaf
            && self.cutting.is_none()
            && (leaving.is_none() || self.progress.awaits_client())
    }

    /// Forwards what the client sends until one of them can't go on. Pending by then.
    fn poll_to_backend(&mut self, cx: &mut Context<'_>, leaving: Option<Reason>) -> Poll<End> {
        loop {
            // The backend may have said why it takes no more: that is still to be read.
            if ready!(poll_write_held(self.backend, &mut self.to_backend, cx)).is_err() {
                self.backend_deaf = true;
            }
            if self.client_closed && !self.backend_told && !self.backend_deaf {
                // As the client did: postgres finishes what it was sent, then leaves.
                self.backend_told = ready!(Pin::new(&mut *self.backend).poll_shutdown(cx)).is_ok();
                self.backend_deaf = !self.backend_told;
            }
            if !self.reads_client(leaving) {
                return Poll::Pending;
            }
            match ready!(poll_read_held(self.client, BUFFER_BYTES, cx)) {
                Ok(Some(held)) => {
                    self.progress.client_sent(&held.buffer[held.rest.clone()]);
                    self.to_backend = Some(held);
                }
                Ok(None) => self.client_closed = true,
                Err(_) => return Poll::Ready(End::Client),
            }
        }
    }

    /// Forwards what the backend sends until one of them can't go on. Pending by then.
    fn poll_to_client(&mut self, cx: &mut Context<'_>, leaving: Option<Reason>) -> Poll<End> {
        loop {
            if ready!(poll_write_held(self.client, &mut self.to_client, cx)).is_err() {
                return Poll::Ready(End::Client);
            }
            if let Some(how) = self.backend_closed.take() {
                let over = self.client_closed || self.progress.is_terminated();
                return Poll::Ready(if over {
                    End::Client
                } else {
                    End::Backend(how.err())
                });
            }
            let mut at_most = BUFFER_BYTES;
            if let Some(reason) = self.cutting {
                if self.progress.client_at_boundary() {
                    return Poll::Ready(End::Cut(reason));
                }
                at_most = match self.progress.bytes_to_boundary() {
                    0 => BUFFER_BYTES,
                    bytes => bytes.min(BUFFER_BYTES),
                };
            } else if let Some(reason) = leaving
                && self.progress.is_idle()
            {
                return Poll::Ready(End::Left(reason));
            }
            match ready!(poll_read_held(self.backend, at_most, cx)) {
                Ok(Some(held)) => self.to_client = self.answered(held),
                Ok(None) => self.backend_closed = Some(Ok(())),
                Err(e) => self.backend_closed = Some(Err(e)),
            }
        }
    }

    /// Takes note of what the backend said and returns what the client is told.
    #[inline]
    fn answered(&mut self, held: Held) -> Option<Held> {
        let Some(greeting) = &mut self.greeting else {
            self.progress.backend_sent(&held.buffer[held.rest.clone()]);
            return Some(held);
        };
        let mut told = Vec::new();
        greeting.translate(&held.buffer[held.rest.clone()], &mut told);
        give_back(held.buffer);
        if greeting.is_over() {
            self.registration = self.greeting.take().and_then(Greeting::into_registration);
        }
        self.progress.backend_sent(&told);
        Held::of(told)
    }
}

/// Writes all of `held`; then it is `None`. An error also drops it.
#[inline]
fn poll_write_held<W>(
    to: &mut W,
    held: &mut Option<Held>,
    cx: &mut Context<'_>,
) -> Poll<io::Result<()>>
where
    W: AsyncWrite + Unpin,
{
    while let Some(bytes) = held {
        let outcome =
            match ready!(Pin::new(&mut *to).poll_write(cx, &bytes.buffer[bytes.rest.clone()])) {
                Ok(0) => Err(io::ErrorKind::WriteZero.into()),
                Ok(n) => {
                    bytes.rest.start += n;
                    Ok(())
                }
                Err(e) => Err(e),
            };
        if (outcome.is_err() || bytes.rest.is_empty())
            && let Some(done) = held.take()
        {
            give_back(done.buffer);
        }
        outcome?;
    }
    Poll::Ready(Ok(()))
}

/// Reads at most `at_most` bytes; `None` at the end of the stream.
#[inline]
fn poll_read_held<R>(
    from: &mut R,
    at_most: usize,
    cx: &mut Context<'_>,
) -> Poll<io::Result<Option<Held>>>
where
    R: AsyncRead + Unpin,
{
    let mut buffer = take_buffer();
    let mut into = ReadBuf::new(&mut buffer[..at_most]);
    let outcome = Pin::new(from).poll_read(cx, &mut into);
    let rest = 0..into.filled().len();
    match outcome {
        Poll::Ready(Ok(())) if !rest.is_empty() => Poll::Ready(Ok(Some(Held { buffer, rest }))),
        other => {
            give_back(buffer);
            other.map_ok(|()| None)
        }
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream, duplex};
    use tokio::sync::watch;

    use super::*;
    use crate::proxy::cancel::CancelKeys;
    use crate::types::{BackendAddress, BranchId};

    fn message(kind: u8, payload: &[u8]) -> Vec<u8> {
        let mut bytes = vec![kind];
        bytes.extend(u32::try_from(4 + payload.len()).unwrap().to_be_bytes());
        bytes.extend(payload);
        bytes
    }

    fn greeting() -> Greeting {
        let backend = BackendAddress::Tcp {
            host: "127.0.0.1".into(),
            port: 1,
        };
        Greeting::new(CancelKeys::default(), backend, 0)
    }

    /// Both far ends of a session and what moves it.
    struct Ends {
        client: DuplexStream,
        backend: DuplexStream,
        show: watch::Sender<Option<BranchId>>,
        _running: watch::Sender<bool>,
    }

    const GRACE: Duration = Duration::from_secs(30);
    const SMALL_PIPE: usize = 512;

    /// A session on pipes that hold 512 bytes, past its greeting. The task's answer:
    /// why it ended, whether the client can be told something, what it left unread.
    async fn session() -> (Ends, tokio::task::JoinHandle<(End, bool, Vec<u8>)>) {
        let (client, mut near_client) = duplex(SMALL_PIPE);
        let (backend, mut near_backend) = duplex(SMALL_PIPE);
        let branch = BranchId::random();
        let (show, active) = watch::channel(Some(branch.clone()));
        let (running, shutdown) = watch::channel(false);
        let task = tokio::spawn(async move {
            let mut departure = Departure::new(branch, active, shutdown);
            let (mut relay_client, mut relay_backend) = (&mut near_client, &mut near_backend);
            let mut relay = Relay::new(
                &mut relay_client,
                &mut relay_backend,
                greeting(),
                &mut departure,
                GRACE,
                b"startup".to_vec(),
                b"",
            );
            let end = relay.run().await;
            let at_boundary = relay.client_at_boundary();
            drop(near_backend);
            let mut unread = Vec::new();
            let _ =
                tokio::time::timeout(Duration::ZERO, near_client.read_to_end(&mut unread)).await;
            (end, at_boundary, unread)
        });
        let mut ends = Ends {
            client,
            backend,
            show,
            _running: running,
        };
        let mut startup = [0; 7];
        ends.backend.read_exact(&mut startup).await.unwrap();
        assert_eq!(&startup, b"startup");
        ends.answer(&[message(b'R', &[0; 4]), message(b'Z', b"I")].concat())
            .await;
        (ends, task)
    }

    impl Ends {
        /// The client sends, the backend gets it.
        async fn ask(&mut self, bytes: &[u8]) {
            self.client.write_all(bytes).await.unwrap();
            let mut got = vec![0; bytes.len()];
            self.backend.read_exact(&mut got).await.unwrap();
            assert_eq!(got, bytes);
        }

        /// The backend sends, the client gets it.
        async fn answer(&mut self, bytes: &[u8]) {
            self.backend.write_all(bytes).await.unwrap();
            let mut got = vec![0; bytes.len()];
            self.client.read_exact(&mut got).await.unwrap();
            assert_eq!(got, bytes);
        }

        fn switch(&self) {
            self.show.send_replace(Some(BranchId::random()));
        }
    }

    #[tokio::test]
    async fn an_idle_session_leaves_and_takes_nothing_more_from_its_client() {
        let (mut ends, task) = session().await;
        ends.ask(&message(b'Q', b"select 1\0")).await;
        ends.answer(&message(b'Z', b"I")).await;
        // The relay runs after both, on this one thread.
        let late = message(b'Q', b"select 2\0");
        ends.switch();
        ends.client.write_all(&late).await.unwrap();
        let (end, may_speak, unread) = task.await.unwrap();
        assert!(matches!(end, End::Left(Reason::Switched)), "{end:?}");
        assert!(may_speak);
        assert_eq!(unread, late);
        let mut nothing = Vec::new();
        ends.backend.read_to_end(&mut nothing).await.unwrap();
        assert_eq!(nothing, b"");
    }

    #[tokio::test]
    async fn a_query_under_way_is_answered_before_the_session_leaves() {
        let (mut ends, task) = session().await;
        ends.ask(&message(b'Q', b"select 1\0")).await;
        ends.switch();
        // Not taken: the session is about to leave.
        let late = message(b'Q', b"select 2\0");
        ends.client.write_all(&late).await.unwrap();
        ends.answer(&message(b'C', b"SELECT 1\0")).await;
        ends.answer(&message(b'Z', b"I")).await;
        let (end, _, unread) = task.await.unwrap();
        assert!(matches!(end, End::Left(Reason::Switched)), "{end:?}");
        assert_eq!(unread, late);
    }

    #[tokio::test]
    async fn a_copy_that_was_begun_before_the_switch_gets_its_data() {
        let (mut ends, task) = session().await;
        ends.ask(&message(b'Q', b"copy t from stdin\0")).await;
        ends.switch();
        ends.answer(&message(b'G', &[0; 3])).await;
        ends.ask(&message(b'd', b"1\n")).await;
        ends.ask(&message(b'c', b"")).await;
        ends.answer(&message(b'Z', b"I")).await;
        assert!(matches!(task.await.unwrap().0, End::Left(Reason::Switched)));
    }

    #[tokio::test]
    async fn a_switch_taken_back_in_a_transaction_leaves_the_session_alone() {
        let (mut ends, task) = session().await;
        let here = ends.show.borrow().clone();
        ends.ask(&message(b'Q', b"begin\0")).await;
        ends.answer(&message(b'Z', b"T")).await;
        ends.switch();
        ends.ask(&message(b'Q', b"select\0")).await;
        ends.show.send_replace(here);
        ends.answer(&message(b'Z', b"T")).await;
        ends.ask(&message(b'Q', b"commit\0")).await;
        ends.answer(&message(b'Z', b"I")).await;
        ends.ask(&message(b'Q', b"select\0")).await;
        drop(ends.client);
        drop(ends.backend);
        assert!(matches!(task.await.unwrap().0, End::Client));
    }

    #[tokio::test(start_paused = true)]
    async fn after_its_grace_a_session_is_cut_at_the_end_of_a_message() {
        let (mut ends, task) = session().await;
        ends.ask(&message(b'Q', b"copy t to stdout\0")).await;
        let row = message(b'd', &[b'x'; 100]);
        ends.backend.write_all(&row[..60]).await.unwrap();
        let mut got = vec![0; 60];
        ends.client.read_exact(&mut got).await.unwrap();
        let before = tokio::time::Instant::now();
        ends.switch();
        tokio::time::sleep(GRACE + Duration::from_millis(1)).await;
        assert!(!task.is_finished());
        ends.backend
            .write_all(&[&row[60..], &row].concat())
            .await
            .unwrap();
        let (end, may_speak, _) = task.await.unwrap();
        assert!(matches!(end, End::Cut(Reason::Switched)), "{end:?}");
        assert!(may_speak);
        assert!(before.elapsed() < GRACE + LAST_MESSAGE);
        got.clear();
        ends.client.read_to_end(&mut got).await.unwrap();
        assert_eq!(got, row[60..]);
    }

    #[tokio::test(start_paused = true)]
    async fn a_message_that_never_ends_is_cut_too() {
        let (mut ends, task) = session().await;
        ends.ask(&message(b'Q', b"copy t to stdout\0")).await;
        ends.backend
            .write_all(&message(b'd', &[b'x'; 100])[..60])
            .await
            .unwrap();
        ends.switch();
        let (end, may_speak, _) = task.await.unwrap();
        assert!(matches!(end, End::Cut(Reason::Switched)), "{end:?}");
        assert!(!may_speak);
    }

    #[tokio::test]
    async fn a_client_that_does_not_read_can_still_be_read_from() {
        let (mut ends, task) = session().await;
        // More than all buffers on the way hold, and nobody reads it.
        let flood = message(b'N', &vec![b'n'; 4 * BUFFER_BYTES]);
        let (mut from_backend, mut to_backend) = tokio::io::split(ends.backend);
        let noise = tokio::spawn(async move { to_backend.write_all(&flood).await });
        let data = message(b'd', &vec![b'd'; 4 * BUFFER_BYTES]);
        let mut got = vec![0; data.len()];
        let (sent, read) = tokio::join!(
            ends.client.write_all(&data),
            from_backend.read_exact(&mut got)
        );
        sent.unwrap();
        read.unwrap();
        assert_eq!(got, data);
        assert!(!noise.is_finished());
        drop(ends.client);
        assert!(matches!(task.await.unwrap().0, End::Client));
        noise.abort();
    }

    #[tokio::test]
    async fn a_backend_that_does_not_read_can_still_be_read_from() {
        let (mut ends, task) = session().await;
        let data = message(b'd', &vec![b'd'; 4 * BUFFER_BYTES]);
        let (mut from_proxy, mut to_proxy) = tokio::io::split(ends.client);
        let upload = tokio::spawn(async move { to_proxy.write_all(&data).await });
        let flood = message(b'N', &vec![b'n'; 4 * BUFFER_BYTES]);
        let mut got = vec![0; flood.len()];
        let (sent, read) = tokio::join!(
            ends.backend.write_all(&flood),
            from_proxy.read_exact(&mut got)
        );
        sent.unwrap();
        read.unwrap();
        assert_eq!(got, flood);
        assert!(!upload.is_finished());
        drop(ends.backend);
        assert!(matches!(task.await.unwrap().0, End::Backend(_)));
        upload.abort();
    }

    #[tokio::test]
    async fn a_client_that_closes_its_half_still_gets_its_answer() {
        let (mut ends, task) = session().await;
        ends.ask(&message(b'Q', b"select 1\0")).await;
        ends.client.shutdown().await.unwrap();
        let mut rest = Vec::new();
        ends.backend.read_to_end(&mut rest).await.unwrap();
        assert!(rest.is_empty());
        ends.answer(&message(b'Z', b"I")).await;
        drop(ends.backend);
        assert!(matches!(task.await.unwrap().0, End::Client));
    }

    #[tokio::test]
    async fn a_backend_that_closes_ends_the_session_after_its_last_bytes() {
        for (last, speaks) in [
            (message(b'E', b"S\0\0"), true),
            (message(b'D', b"cut off")[..7].to_vec(), false),
        ] {
            let (mut ends, task) = session().await;
            ends.ask(&message(b'Q', b"select 1\0")).await;
            ends.backend.write_all(&last).await.unwrap();
            drop(ends.backend);
            let (end, may_speak, _) = task.await.unwrap();
            assert!(matches!(end, End::Backend(None)), "{end:?}");
            assert_eq!(may_speak, speaks);
            let mut got = Vec::new();
            ends.client.read_to_end(&mut got).await.unwrap();
            assert_eq!(got, last);
        }
    }

    #[tokio::test]
    async fn a_session_with_nothing_to_do_holds_no_buffer() {
        let (mut ends, task) = session().await;
        for _ in 0..100 {
            ends.ask(&message(b'Q', b"select 1\0")).await;
            ends.answer(&message(b'Z', b"I")).await;
        }
        SPARE.with_borrow(|spare| assert!(!spare.is_empty() && spare.len() <= SPARE_BUFFERS));
        assert!(size_of::<Relay<'_, DuplexStream, DuplexStream>>() < 512);
        drop(ends);
        task.await.unwrap();
    }
}
