//! The phase before a session: from the first byte to the startup packet.

use std::io;

use tokio::io::{AsyncRead, AsyncWrite, AsyncWriteExt};

use super::Startup;
use super::wire::{self, CancelKey, Fatal, FirstPacket, PacketError, StartupPacket};

/// What a client came for.
#[derive(Debug)]
pub(super) enum Opening {
    Session {
        packet: StartupPacket,
        startup: Startup,
    },
    Cancel(CancelKey),
}

/// Why nothing came of a connection.
#[derive(Debug, thiserror::Error)]
pub(super) enum HandshakeError {
    /// To be told to the client.
    #[error("{}", .0.message)]
    Refused(Fatal),
    /// To be closed without a word: the other side is gone or speaks something else.
    #[error(transparent)]
    Silent(PacketError),
}

impl From<io::Error> for HandshakeError {
    fn from(e: io::Error) -> Self {
        Self::Silent(e.into())
    }
}

/// Answers encryption requests with "no" and returns what the client wants.
///
/// One SSLRequest and one GSSENCRequest are allowed, in either order, as PostgreSQL
/// does (`ProcessStartupPacket`). Takes no byte behind the startup packet. Not
/// cancel-safe: the caller closes the connection when its time is over.
pub(super) async fn open<S>(stream: &mut S) -> Result<Opening, HandshakeError>
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    let (mut ssl_asked, mut gss_asked) = (false, false);
    loop {
        match wire::read_first_packet(stream).await {
            Ok(FirstPacket::SslRequest) if !ssl_asked => {
                ssl_asked = true;
                stream.write_all(b"N").await?;
            }
            Ok(FirstPacket::GssEncRequest) if !gss_asked => {
                gss_asked = true;
                stream.write_all(b"N").await?;
            }
            Ok(FirstPacket::SslRequest) => return Err(unsupported(1234, 5679)),
            Ok(FirstPacket::GssEncRequest) => return Err(unsupported(1234, 5680)),
            Ok(FirstPacket::Unsupported { major, minor }) => return Err(unsupported(major, minor)),
            Ok(FirstPacket::Cancel(key)) => return Ok(Opening::Cancel(key)),
            Ok(FirstPacket::Startup(packet)) => {
                let startup = requested(&packet)?;
                return Ok(Opening::Session { packet, startup });
            }
            Err(e @ PacketError::Layout) => {
                return Err(HandshakeError::Refused(Fatal::new("08P01", e.to_string())));
            }
            Err(e) => return Err(HandshakeError::Silent(e)),
        }
    }
}

fn unsupported(major: u16, minor: u16) -> HandshakeError {
    HandshakeError::Refused(Fatal::new(
        "0A000",
        format!("unsupported frontend protocol {major}.{minor}: server supports 3.0 to 3.2"),
    ))
}

fn requested(packet: &StartupPacket) -> Result<Startup, HandshakeError> {
    let user = packet.parameter("user").filter(|user| !user.is_empty());
    let Some(user) = user else {
        return Err(HandshakeError::Refused(Fatal::new(
            "28000",
            "no PostgreSQL user name specified in startup packet",
        )));
    };
    Ok(Startup {
        database: packet
            .parameter("database")
            .filter(|name| !name.is_empty())
            .unwrap_or_else(|| user.clone()),
        application_name: packet.parameter("application_name"),
        user,
        ends: None,
    })
}

#[cfg(test)]
mod tests {
    use tokio::io::AsyncReadExt;

    use super::*;

    fn packet(code: u32, body: &[u8]) -> Vec<u8> {
        let mut raw = u32::try_from(8 + body.len())
            .unwrap()
            .to_be_bytes()
            .to_vec();
        raw.extend(code.to_be_bytes());
        raw.extend(body);
        raw
    }

    const SSL: u32 = 80_877_103;
    const GSS: u32 = 80_877_104;
    const V3: u32 = 196_608;

    async fn opened(bytes: &[u8]) -> (Result<Opening, HandshakeError>, Vec<u8>) {
        let (mut client, mut server) = tokio::io::duplex(64 * 1024);
        client.write_all(bytes).await.unwrap();
        client.shutdown().await.unwrap();
        let opening = open(&mut server).await;
        drop(server);
        let mut answer = Vec::new();
        client.read_to_end(&mut answer).await.unwrap();
        (opening, answer)
    }

    #[tokio::test]
    async fn encryption_requests_are_each_declined_once() {
        let bytes = [
            packet(GSS, b""),
            packet(SSL, b""),
            packet(V3, b"user\0me\0\0"),
        ]
        .concat();
        let (opening, answer) = opened(&bytes).await;
        let Ok(Opening::Session { startup, .. }) = opening else {
            panic!("{opening:?}")
        };
        assert_eq!(answer, b"NN");
        assert_eq!(
            (startup.user.as_str(), startup.database.as_str()),
            ("me", "me")
        );

        for code in [SSL, GSS] {
            let (opening, answer) = opened(&[packet(code, b""), packet(code, b"")].concat()).await;
            let Err(HandshakeError::Refused(fatal)) = opening else {
                panic!("{opening:?}")
            };
            assert_eq!((fatal.sqlstate, answer.as_slice()), ("0A000", &b"N"[..]));
        }
    }

    #[tokio::test]
    async fn a_startup_without_user_is_refused() {
        for body in [&b"database\0x\0\0"[..], b"user\0\0\0"] {
            let (opening, _) = opened(&packet(V3, body)).await;
            let Err(HandshakeError::Refused(fatal)) = opening else {
                panic!("{opening:?}")
            };
            assert_eq!(fatal.sqlstate, "28000");
        }
    }

    #[tokio::test]
    async fn the_database_and_application_name_are_found() {
        let (opening, _) = opened(&packet(
            V3,
            b"user\0me\0application_name\0psql\0database\0d\0\0",
        ))
        .await;
        let Ok(Opening::Session { startup, .. }) = opening else {
            panic!("{opening:?}")
        };
        assert_eq!(startup.database, "d");
        assert_eq!(startup.application_name.as_deref(), Some("psql"));
    }

    #[tokio::test]
    async fn protocol_2_gets_an_error_and_garbage_gets_nothing() {
        let (opening, _) = opened(&packet(131_072, &[0; 288])).await;
        let Err(HandshakeError::Refused(fatal)) = opening else {
            panic!("{opening:?}")
        };
        assert_eq!(fatal.sqlstate, "0A000");
        let (opening, answer) = opened(b"\x16\x03\x01\x02\x00\x01\x00\x01").await;
        assert!(matches!(opening, Err(HandshakeError::Silent(_))));
        assert!(answer.is_empty());
    }
}
