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

/// Bytes read at once. Larger ones win nothing: postgres sends 8 KiB at a time, and
/// what a Unix socket holds is about 200 KiB.
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
