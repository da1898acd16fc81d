//! A connection to an instance.

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;
#[cfg(unix)]
use tokio::net::UnixStream;

use crate::types::BackendAddress;

/// How long an instance that accepts connections may take to accept one.
const CONNECT_LIMIT: Duration = Duration::from_secs(10);

/// The backend's end of a session.
#[derive(Debug)]
pub(super) enum BackendStream {
    #[cfg(unix)]
    Unix(UnixStream),
    Tcp(TcpStream),
}

/// Connects within ten seconds. Cancel-safe: dropping it abandons the connection.
pub(super) async fn connect(address: &BackendAddress) -> io::Result<BackendStream> {
    tokio::time::timeout(CONNECT_LIMIT, connect_unhurried(address))
        .await
        .unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into()))
}

async fn connect_unhurried(address: &BackendAddress) -> io::Result<BackendStream> {
    match address {
        #[cfg(unix)]
        BackendAddress::Unix { dir, port } => {
            let path = dir.join(format!(".s.PGSQL.{port}"));
            UnixStream::connect(path).await.map(BackendStream::Unix)
        }
        #[cfg(not(unix))]
        BackendAddress::Unix { .. } => Err(io::ErrorKind::Unsupported.into()),
        BackendAddress::Tcp { host, port } => {
            let stream = TcpStream::connect((host.as_str(), *port)).await?;
            stream.set_nodelay(true)?;
            Ok(BackendStream::Tcp(stream))
        }
    }
}

/// Calls the same method on whichever stream it is.
macro_rules! either {
    ($self:expr, $stream:ident => $call:expr) => {
        match $self.get_mut() {
            #[cfg(unix)]
            BackendStream::Unix($stream) => $call,
            BackendStream::Tcp($stream) => $call,
        }
    };
}

impl AsyncRead for BackendStream {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        either!(self, stream => Pin::new(stream).poll_read(cx, buf))
    }
}

impl AsyncWrite for BackendStream {
    fn poll_write(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        either!(self, stream => Pin::new(stream).poll_write(cx, buf))
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        either!(self, stream => Pin::new(stream).poll_flush(cx))
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        either!(self, stream => Pin::new(stream).poll_shutdown(cx))
    }
}
