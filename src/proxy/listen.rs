//! Listening: ports, the threads that sessions run on, accepting.

use std::future::Future;
use std::io;
use std::net::SocketAddr;
use std::num::NonZero;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use tokio::net::{TcpListener, TcpSocket, TcpStream};
use tokio::runtime::{Builder, Handle};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tracing::{debug, info, warn};

use super::cancel::CancelKeys;
use super::connection::{self, Endpoint, Shared};
use super::holder::{PortHolder, port_holder};
use super::{Ends, Router};

/// Connections the kernel keeps ready for us.
const BACKLOG: u32 = 1024;

/// Connections that may be opening beside the sessions allowed.
const OPENING_MAX: usize = 256;

/// First and longest pause after a failed accept, as when out of file descriptors.
const ACCEPT_PAUSE: (Duration, Duration) = (Duration::from_millis(10), Duration::from_secs(1));

/// Why an address can't be listened on.
#[derive(Debug, thiserror::Error)]
pub enum BindError {
    #[error("port {} is taken{}", .address.port(), by(.holder.as_ref()))]
    InUse {
        address: SocketAddr,
        /// Where the system tells.
        holder: Option<PortHolder>,
    },
    #[error("no permission to listen on {address}")]
    Permission { address: SocketAddr },
    #[error("cannot listen on {address}: {source}")]
    Other {
        address: SocketAddr,
        source: io::Error,
    },
}

fn by(holder: Option<&PortHolder>) -> String {
    holder
        .map(|holder| format!(" by {holder}"))
        .unwrap_or_default()
}

/// A port that is held, and not served yet: clients that connect wait.
#[derive(Debug)]
pub struct Listener {
    socket: TcpListener,
    address: SocketAddr,
}

impl Listener {
    /// Takes `address`; port 0 takes any that is free. Needs a tokio runtime around it.
    pub fn bind(address: SocketAddr) -> Result<Self, BindError> {
        let bind = || {
            let socket = if address.is_ipv4() {
                TcpSocket::new_v4()
            } else {
                TcpSocket::new_v6()
            }?;
            // On Windows this option would let two programs share the port.
            #[cfg(unix)]
            socket.set_reuseaddr(true)?;
            socket.bind(address)?;
            let socket = socket.listen(BACKLOG)?;
            let address = socket.local_addr()?;
            Ok(Self { socket, address })
        };
        bind().map_err(|source: io::Error| match source.kind() {
            io::ErrorKind::AddrInUse => BindError::InUse {
                address,
                holder: port_holder(address.port()),
            },
            io::ErrorKind::PermissionDenied => BindError::Permission { address },
            _ => BindError::Other { address, source },
        })
    }

    /// The address taken, with the real port.
    pub fn address(&self) -> SocketAddr {
        self.address
    }
}

/// How much a proxy may take.
#[derive(Debug, Clone)]
pub struct ProxySettings {
    /// Threads that sessions run on.
    pub threads: NonZero<usize>,
    /// Sessions at a time, over all endpoints; further ones get 53300.
    pub max_sessions: usize,
    /// From a connection's first byte to its startup packet.
    pub handshake_limit: Duration,
}

impl Default for ProxySettings {
    fn default() -> Self {
        let cores = std::thread::available_parallelism().map_or(1, NonZero::get);
        Self {
            threads: NonZero::new(cores.clamp(1, 4)).expect("at least 1"),
            max_sessions: 4000,
            handshake_limit: Duration::from_secs(30),
        }
    }
}

/// The threads and the bookkeeping behind all endpoints. Clones share them; when the
/// last one is dropped, the sessions that are left are cut.
///
/// A session's two sockets and its one task stay on one thread with a runtime of its
/// own: a message then costs no wake-up of another thread (measured: a quarter less
/// processor time than on the multi-threaded runtime).
#[derive(Debug, Clone)]
pub struct Proxy {
    shared: Arc<Shared>,
    threads: Arc<[Thread]>,
}

#[derive(Debug)]
struct Thread {
    runtime: Handle,
    connections: Arc<AtomicUsize>,
    stop: CancellationToken,
}

impl Drop for Thread {
    fn drop(&mut self) {
        self.stop.cancel();
    }
}

impl Thread {
    fn start(number: usize) -> io::Result<Self> {
        let runtime = Builder::new_current_thread().enable_all().build()?;
        let handle = runtime.handle().clone();
        let stop = CancellationToken::new();
        let stopped = stop.clone();
        std::thread::Builder::new()
            .name(format!("proxy-{number}"))
            .spawn(move || runtime.block_on(stopped.cancelled()))?;
        Ok(Self {
            runtime: handle,
            connections: Arc::default(),
            stop,
        })
    }
}

/// Counts a connection on its thread as long as it lives.
struct Counted(Arc<AtomicUsize>);

impl Drop for Counted {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

impl Proxy {
    /// Starts the threads. They serve nothing until [`Proxy::serve`].
    pub fn start(settings: &ProxySettings) -> io::Result<Self> {
        let threads: io::Result<Vec<_>> = (0..settings.threads.get()).map(Thread::start).collect();
        Ok(Self {
            shared: Arc::new(Shared {
                keys: CancelKeys::default(),
                sessions: AtomicUsize::new(0),
                max_sessions: settings.max_sessions,
                handshake_limit: settings.handshake_limit,
            }),
            threads: threads?.into(),
        })
    }

    /// Sessions at this moment, over all endpoints.
    pub fn sessions(&self) -> usize {
        self.shared.sessions.load(Ordering::Relaxed)
    }

    /// Serves an endpoint until `stop`: then accepts no more and ends its sessions as
    /// after a switch (outside a transaction at once, else after their grace at most).
    ///
    /// Sessions are tracked by `tracker`, so that whoever stops can wait for them. The
    /// router is asked on the runtime that this future runs on.
    pub fn serve(
        &self,
        listener: Listener,
        router: Arc<dyn Router>,
        stop: CancellationToken,
        tracker: TaskTracker,
    ) -> impl Future<Output = ()> + Send + use<> {
        let proxy = self.clone();
        async move {
            let (tell_stop, shutdown) = watch::channel(false);
            let endpoint = Arc::new(Endpoint {
                shared: proxy.shared.clone(),
                router,
                home: Handle::current(),
                shutdown,
            });
            info!(address = %listener.address, "the proxy listens");
            let mut pause = ACCEPT_PAUSE.0;
            loop {
                let accepted = tokio::select! {
                    () = stop.cancelled() => break,
                    accepted = listener.socket.accept() => accepted,
                };
                match accepted {
                    Ok((client, _)) => {
                        pause = ACCEPT_PAUSE.0;
                        proxy.begin(client, &endpoint, &tracker);
                    }
                    // The client's affair (accept(2)): it left before its turn.
                    Err(error) if is_of_one_connection(&error) => {}
                    Err(error) => {
                        warn!(address = %listener.address, %error, "cannot accept a connection");
                        tokio::select! {
                            () = stop.cancelled() => break,
                            () = tokio::time::sleep(pause) => {}
                        }
                        pause = (pause * 2).min(ACCEPT_PAUSE.1);
                    }
                }
            }
            drop(listener);
            tell_stop.send_replace(true);
        }
    }

    /// Hands a connection to the thread that has fewest.
    fn begin(&self, client: TcpStream, endpoint: &Arc<Endpoint>, tracker: &TaskTracker) {
        let load = |thread: &Thread| thread.connections.load(Ordering::Relaxed);
        if self.threads.iter().map(load).sum::<usize>() >= self.shared.max_sessions + OPENING_MAX {
            warn!("too many connections: one was closed before it said what it wants");
            return;
        }
        let Some(thread) = self.threads.iter().min_by_key(|thread| load(thread)) else {
            return;
        };
        // Out of this runtime's poller, into the other's.
        let client = match client.into_std() {
            Ok(client) => client,
            Err(error) => return warn!(%error, "a connection was lost on its way"),
        };
        thread.connections.fetch_add(1, Ordering::Relaxed);
        let counted = Counted(thread.connections.clone());
        let endpoint = endpoint.clone();
        thread.runtime.spawn(tracker.track_future(async move {
            let _counted = counted;
            match prepared(client) {
                Ok(client) => {
                    let ends = ends_of(&client);
                    connection::serve(client, ends, endpoint).await;
                }
                Err(error) => debug!(%error, "a connection was lost on its way"),
            }
        }));
    }
}

fn ends_of(client: &TcpStream) -> Option<Ends> {
    Some(Ends {
        client: client.peer_addr().ok()?,
        proxy: client.local_addr().ok()?,
    })
}

fn is_of_one_connection(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::ConnectionAborted
            | io::ErrorKind::ConnectionReset
            | io::ErrorKind::ConnectionRefused
            | io::ErrorKind::Interrupted
    )
}

fn prepared(client: std::net::TcpStream) -> io::Result<TcpStream> {
    client.set_nodelay(true)?;
    // As postgres does itself (`StreamConnection`): clients that vanish are noticed in time.
    #[cfg(unix)]
    nix::sys::socket::setsockopt(&client, nix::sys::socket::sockopt::KeepAlive, &true)?;
    TcpStream::from_std(client)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_taken_port_names_its_holder() {
        let first = Listener::bind("127.0.0.1:0".parse().unwrap()).unwrap();
        let error = Listener::bind(first.address()).unwrap_err();
        let BindError::InUse { address, holder } = &error else {
            panic!("{error:?}")
        };
        assert_eq!(*address, first.address());
        if cfg!(target_os = "linux") {
            assert_eq!(holder.as_ref().unwrap().pid, std::process::id());
            assert!(error.to_string().contains(" by process "), "{error}");
        }
    }
}
