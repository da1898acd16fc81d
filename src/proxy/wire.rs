//! PostgreSQL's protocol as bytes: startup packets, message headers, ErrorResponse.
//!
//! Knows limits and layouts, no routes and no sockets. Source: PostgreSQL manual,
//! chapter "Frontend/Backend Protocol", section "Message Formats".

use std::io;

use tokio::io::{AsyncRead, AsyncReadExt};

/// Longest startup packet in bytes: `MAX_STARTUP_PACKET_LENGTH` of PostgreSQL.
pub(super) const STARTUP_MAX_BYTES: usize = 10_000;

/// Longest cancel key in bytes that protocol 3.2 allows.
pub(super) const CANCEL_SECRET_MAX_BYTES: usize = 256;

/// Terminate, the one message the proxy itself says to a backend.
pub(super) const TERMINATE: [u8; 5] = [b'X', 0, 0, 0, 4];

/// The packet codes that stand where a protocol version would.
const CANCEL_REQUEST: u32 = version(1234, 5678);
const SSL_REQUEST: u32 = version(1234, 5679);
const GSSENC_REQUEST: u32 = version(1234, 5680);

const fn version(major: u32, minor: u32) -> u32 {
    (major << 16) | minor
}

/// What names one session in a CancelRequest. `Debug` hides the secret.
#[derive(Clone, PartialEq, Eq, Hash)]
pub(super) struct CancelKey {
    pub pid: u32,
    /// Four bytes in protocol 3.0, up to 256 from 3.2 on.
    pub secret: Box<[u8]>,
}

impl std::fmt::Debug for CancelKey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "CancelKey({}, …)", self.pid)
    }
}

/// A packet without a type byte, as a connection begins with.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum FirstPacket {
    SslRequest,
    GssEncRequest,
    Cancel(CancelKey),
    Startup(StartupPacket),
    /// A protocol whose major version is not 3.
    Unsupported {
        major: u16,
        minor: u16,
    },
}

/// A startup packet of protocol 3.x.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct StartupPacket {
    /// The minor version the client asks for.
    pub minor: u16,
    /// As received, with the length in front: what a backend is sent.
    pub raw: Vec<u8>,
}

/// Why a first packet could not be read.
#[derive(Debug, thiserror::Error)]
pub(super) enum PacketError {
    #[error("the client left before it said what it wants")]
    Closed,
    /// Not PostgreSQL's protocol: no answer would be understood.
    #[error("a first packet of {0} bytes is none of PostgreSQL's")]
    Length(u32),
    #[error("invalid startup packet layout: expected terminator as last byte")]
    Layout,
    #[error(transparent)]
    Io(#[from] io::Error),
}

/// Reads one packet without a type byte.
///
/// Takes exactly the packet's bytes from `stream`. Not cancel-safe: bytes read so
/// far are lost with the future.
pub(super) async fn read_first_packet<S>(stream: &mut S) -> Result<FirstPacket, PacketError>
where
    S: AsyncRead + Unpin,
{
    let mut head = [0; 4];
    match stream.read_exact(&mut head).await {
        Ok(_) => {}
        Err(e) if e.kind() == io::ErrorKind::UnexpectedEof => return Err(PacketError::Closed),
        Err(e) => return Err(e.into()),
    }
    let length = u32::from_be_bytes(head);
    let size = length as usize;
    if !(8..=STARTUP_MAX_BYTES).contains(&size) {
        return Err(PacketError::Length(length));
    }
    let mut raw = vec![0; size];
    raw[..4].copy_from_slice(&head);
    match stream.read_exact(&mut raw[4..]).await {
        Ok(_) => parse_first_packet(raw),
        Err(e) if e.kind() == io::ErrorKind::UnexpectedEof => Err(PacketError::Closed),
        Err(e) => Err(e.into()),
    }
}

/// Tells what `raw` is, a packet of at least 8 bytes with its length in front.
fn parse_first_packet(raw: Vec<u8>) -> Result<FirstPacket, PacketError> {
    let code = be_u32(&raw[4..]).ok_or(PacketError::Layout)?;
    match (code, raw.len()) {
        (SSL_REQUEST, 8) => Ok(FirstPacket::SslRequest),
        (GSSENC_REQUEST, 8) => Ok(FirstPacket::GssEncRequest),
        (CANCEL_REQUEST, n) if n > 12 && n <= 12 + CANCEL_SECRET_MAX_BYTES => {
            Ok(FirstPacket::Cancel(CancelKey {
                pid: be_u32(&raw[8..]).ok_or(PacketError::Layout)?,
                secret: raw[12..].into(),
            }))
        }
        (CANCEL_REQUEST, _) => Err(PacketError::Layout),
        _ => {
            let [a, b, c, d] = code.to_be_bytes();
            let (major, minor) = (u16::from_be_bytes([a, b]), u16::from_be_bytes([c, d]));
            if major != 3 {
                return Ok(FirstPacket::Unsupported { major, minor });
            }
            let packet = StartupPacket { minor, raw };
            // One walk now, so that `parameters` later can't meet a bad layout.
            let mut rest = &packet.raw[8..];
            while let Some((_, after)) = next_parameter(rest)? {
                rest = after;
            }
            Ok(FirstPacket::Startup(packet))
        }
    }
}

impl StartupPacket {
    /// The parameters in the order sent: user, database, options, `_pq_.` ones.
    pub(super) fn parameters(&self) -> impl Iterator<Item = (&[u8], &[u8])> {
        let mut rest = self.raw.get(8..).unwrap_or_default();
        std::iter::from_fn(move || {
            let (pair, after) = next_parameter(rest).ok().flatten()?;
            rest = after;
            Some(pair)
        })
    }

    /// The parameter's value, the last one where it was sent twice, as PostgreSQL takes it.
    pub(super) fn parameter(&self, name: &str) -> Option<String> {
        self.parameters()
            .filter(|(key, _)| *key == name.as_bytes())
            .last()
            .map(|(_, value)| String::from_utf8_lossy(value).into_owned())
    }
}

type Parameter<'a> = ((&'a [u8], &'a [u8]), &'a [u8]);

/// Splits the first name and value off; `None` at the terminator, which must be the last byte.
fn next_parameter(bytes: &[u8]) -> Result<Option<Parameter<'_>>, PacketError> {
    let (name, rest) = c_string(bytes).ok_or(PacketError::Layout)?;
    if name.is_empty() {
        return if rest.is_empty() {
            Ok(None)
        } else {
            Err(PacketError::Layout)
        };
    }
    let (value, rest) = c_string(rest).ok_or(PacketError::Layout)?;
    Ok(Some(((name, value), rest)))
}

fn c_string(bytes: &[u8]) -> Option<(&[u8], &[u8])> {
    let end = bytes.iter().position(|b| *b == 0)?;
    Some((&bytes[..end], &bytes[end + 1..]))
}

/// Big-endian `u32` at the start of `bytes`.
pub(super) fn be_u32(bytes: &[u8]) -> Option<u32> {
    bytes.first_chunk().map(|four| u32::from_be_bytes(*four))
}

fn length_of(bytes: usize) -> [u8; 4] {
    u32::try_from(bytes)
        .expect("messages made here are far shorter than 4 GiB")
        .to_be_bytes()
}

/// A CancelRequest packet.
pub(super) fn cancel_request(key: &CancelKey) -> Vec<u8> {
    let mut packet = Vec::with_capacity(12 + key.secret.len());
    packet.extend(length_of(12 + key.secret.len()));
    packet.extend(CANCEL_REQUEST.to_be_bytes());
    packet.extend(key.pid.to_be_bytes());
    packet.extend(&key.secret);
    packet
}

/// A `BackendKeyData` message.
pub(super) fn backend_key_data(key: &CancelKey) -> Vec<u8> {
    let mut message = Vec::with_capacity(9 + key.secret.len());
    message.push(b'K');
    message.extend(length_of(8 + key.secret.len()));
    message.extend(key.pid.to_be_bytes());
    message.extend(&key.secret);
    message
}

/// The end of a session, in words for its client.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Fatal {
    /// Five characters, PostgreSQL manual, appendix A.
    pub sqlstate: &'static str,
    pub message: String,
    pub detail: Option<String>,
    pub hint: Option<String>,
}

impl Fatal {
    pub(super) fn new(sqlstate: &'static str, message: impl Into<String>) -> Self {
        Self {
            sqlstate,
            message: message.into(),
            detail: None,
            hint: None,
        }
    }

    pub(super) fn detail(mut self, detail: impl Into<String>) -> Self {
        self.detail = Some(detail.into());
        self
    }

    pub(super) fn hint(mut self, hint: impl Into<String>) -> Self {
        self.hint = Some(hint.into());
        self
    }

    /// The ErrorResponse, severity FATAL (fields: "Error and Notice Message Fields").
    pub(super) fn encode(&self) -> Vec<u8> {
        let mut message = vec![b'E', 0, 0, 0, 0];
        let mut field = |kind: u8, text: &str| {
            message.push(kind);
            // A NUL would end the field early and shift the rest.
            message.extend(text.bytes().filter(|b| *b != 0));
            message.push(0);
        };
        field(b'S', "FATAL");
        field(b'V', "FATAL");
        field(b'C', self.sqlstate);
        field(b'M', &self.message);
        if let Some(detail) = &self.detail {
            field(b'D', detail);
        }
        if let Some(hint) = &self.hint {
            field(b'H', hint);
        }
        message.push(0);
        let length = length_of(message.len() - 1);
        message[1..5].copy_from_slice(&length);
        message
    }
}

/// Walks over the messages of one direction, however their bytes are cut.
///
/// Looks at headers only. Bytes that cannot be a message make it `lost`: it then
/// claims nothing any more, and the receiver will complain of them itself.
#[derive(Debug, Default)]
pub(super) struct Scanner {
    /// The beginning of a message whose header is not complete: type, length, and
    /// of ReadyForQuery the status.
    head: [u8; 6],
    have: u8,
    /// Payload bytes still to come.
    skip: u32,
    lost: bool,
}

impl Scanner {
    /// Reports each message of which `bytes` completes the header: its type, and for
    /// ReadyForQuery (`Z`) its status byte, else 0.
    #[inline]
    pub(super) fn feed(&mut self, mut bytes: &[u8], mut seen: impl FnMut(u8, u8)) {
        if self.lost {
            return;
        }
        loop {
            let step = bytes.len().min(self.skip as usize);
            bytes = &bytes[step..];
            self.skip -= u32::try_from(step).expect("step is at most `skip`");
            if self.have == 0 {
                while let [kind, a, b, c, d, rest @ ..] = bytes {
                    let Some(payload) = payload_bytes([*a, *b, *c, *d]) else {
                        self.lost = true;
                        return;
                    };
                    let status = match (kind, rest.first()) {
                        (b'Z', Some(status)) if payload > 0 => *status,
                        (b'Z', None) if payload > 0 => break,
                        _ => 0,
                    };
                    seen(*kind, status);
                    if let Some(after) = rest.get(payload as usize..) {
                        bytes = after;
                    } else {
                        let here = u32::try_from(rest.len()).expect("shorter than the payload");
                        self.skip = payload - here;
                        return;
                    }
                }
            }
            let Some((first, rest)) = bytes.split_first() else {
                return;
            };
            self.head[usize::from(self.have)] = *first;
            self.have += 1;
            bytes = rest;
            if self.have < 5 {
                continue;
            }
            let [kind, a, b, c, d, status] = self.head;
            let Some(payload) = payload_bytes([a, b, c, d]) else {
                self.lost = true;
                return;
            };
            if kind == b'Z' && payload > 0 && self.have == 5 {
                continue;
            }
            let taken = u32::from(self.have) - 5;
            seen(kind, if taken == 1 { status } else { 0 });
            self.skip = payload - taken;
            self.have = 0;
        }
    }

    /// Whether the last byte seen ended a message.
    pub(super) fn at_boundary(&self) -> bool {
        self.have == 0 && self.skip == 0 && !self.lost
    }

    /// How many bytes may be read without passing the end of the current message:
    /// 0 at a boundary, and when lost.
    pub(super) fn bytes_to_boundary(&self) -> usize {
        match (self.lost, self.have) {
            (true, _) => 0,
            (false, 0) => self.skip as usize,
            (false, have) => 5_usize.saturating_sub(have.into()).max(1),
        }
    }
}

/// Payload bytes of a message whose length field is `field`; `None` for what PostgreSQL
/// never sends: less than the field itself, or negative.
fn payload_bytes(field: [u8; 4]) -> Option<u32> {
    let length = u32::from_be_bytes(field);
    (4..=i32::MAX as u32).contains(&length).then(|| length - 4)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn startup(version: u32, body: &[u8]) -> Vec<u8> {
        let mut raw = Vec::new();
        raw.extend(length_of(8 + body.len()));
        raw.extend(version.to_be_bytes());
        raw.extend(body);
        raw
    }

    async fn read(bytes: &[u8]) -> Result<FirstPacket, PacketError> {
        read_first_packet(&mut &bytes[..]).await
    }

    #[tokio::test]
    async fn startup_keeps_every_byte_and_finds_its_parameters() {
        let body = b"user\0me\0database\0app@x\0_pq_.test\x001\0\0";
        let raw = startup(version(3, 2), body);
        let FirstPacket::Startup(packet) = read(&raw).await.unwrap() else {
            panic!("a startup packet");
        };
        assert_eq!(packet.raw, raw);
        assert_eq!(packet.minor, 2);
        assert_eq!(packet.parameter("user").as_deref(), Some("me"));
        assert_eq!(packet.parameter("database").as_deref(), Some("app@x"));
        assert_eq!(packet.parameter("_pq_.test").as_deref(), Some("1"));
        assert_eq!(packet.parameter("options"), None);
    }

    #[tokio::test]
    async fn a_parameter_sent_twice_counts_as_sent_last() {
        let raw = startup(version(3, 0), b"user\0a\0user\0b\0\0");
        let FirstPacket::Startup(packet) = read(&raw).await.unwrap() else {
            panic!("a startup packet");
        };
        assert_eq!(packet.parameter("user").as_deref(), Some("b"));
    }

    #[tokio::test]
    async fn bad_layouts_are_refused() {
        for body in [
            &b"user\0me\0"[..],
            b"user\0me",
            b"user\0",
            b"",
            b"\0x",
            b"user\0me\0\0\0",
        ] {
            let got = read(&startup(version(3, 0), body)).await;
            assert!(matches!(got, Err(PacketError::Layout)), "{body:?}: {got:?}");
        }
    }

    #[tokio::test]
    async fn requests_are_recognised() {
        assert_eq!(
            read(&startup(SSL_REQUEST, b"")).await.unwrap(),
            FirstPacket::SslRequest
        );
        assert_eq!(
            read(&startup(GSSENC_REQUEST, b"")).await.unwrap(),
            FirstPacket::GssEncRequest
        );
        for secret in [4, 32, 256] {
            let key = CancelKey {
                pid: 77,
                secret: vec![9; secret].into(),
            };
            let got = read(&cancel_request(&key)).await.unwrap();
            assert_eq!(got, FirstPacket::Cancel(key));
        }
        for secret in [0, 257] {
            let key = CancelKey {
                pid: 77,
                secret: vec![9; secret].into(),
            };
            assert!(matches!(
                read(&cancel_request(&key)).await,
                Err(PacketError::Layout)
            ));
        }
    }

    #[tokio::test]
    async fn other_protocols_are_named() {
        let got = read(&startup(version(2, 0), &[0; 288])).await.unwrap();
        assert_eq!(got, FirstPacket::Unsupported { major: 2, minor: 0 });
    }

    #[tokio::test]
    async fn what_is_no_packet_of_postgresql_is_told_by_its_length() {
        let tls_hello = [0x16, 3, 1, 2, 0, 1, 0, 1];
        for bytes in [
            &tls_hello[..],
            b"GET / HTTP/1.1\r\n",
            &[0, 0, 0, 7, 1, 1, 1],
            &[0, 0, 0x27, 0x11, 0, 3, 0, 0],
        ] {
            assert!(matches!(read(bytes).await, Err(PacketError::Length(_))));
        }
        // 10,000 bytes are the most.
        assert!(matches!(
            read(&[0, 0, 0x27, 0x10, 0, 3, 0, 0]).await,
            Err(PacketError::Closed)
        ));
        assert!(matches!(read(&[0, 0]).await, Err(PacketError::Closed)));
    }

    #[test]
    fn error_response_is_laid_out_field_by_field() {
        let fatal = Fatal::new("57P01", "a\0b").detail("d").hint("h");
        let mut expected = vec![b'E', 0, 0, 0, 0];
        expected.extend(b"SFATAL\0VFATAL\0C57P01\0Mab\0Dd\0Hh\0\0");
        let length = u32::try_from(expected.len() - 1).unwrap();
        expected[1..5].copy_from_slice(&length.to_be_bytes());
        assert_eq!(fatal.encode(), expected);
    }

    fn message(kind: u8, payload: &[u8]) -> Vec<u8> {
        let mut bytes = vec![kind];
        bytes.extend(length_of(4 + payload.len()));
        bytes.extend(payload);
        bytes
    }

    #[test]
    fn messages_are_seen_once_however_they_are_cut() {
        let mut stream = Vec::new();
        for (kind, payload) in [
            (b'D', &[7_u8; 40][..]),
            (b'Z', b"I"),
            (b'C', b""),
            (b'Z', b"T"),
            (b'S', b"abc"),
            (b'Z', b"E"),
        ] {
            stream.extend(message(kind, payload));
        }
        let expected = [
            (b'D', 0),
            (b'Z', b'I'),
            (b'C', 0),
            (b'Z', b'T'),
            (b'S', 0),
            (b'Z', b'E'),
        ];
        for cut in 1..stream.len() {
            for second in cut..stream.len() {
                let mut scanner = Scanner::default();
                let mut seen = Vec::new();
                for part in [&stream[..cut], &stream[cut..second], &stream[second..]] {
                    scanner.feed(part, |kind, status| seen.push((kind, status)));
                }
                assert_eq!(seen, expected, "cut at {cut} and {second}");
                assert!(scanner.at_boundary());
            }
        }
    }

    #[test]
    fn reading_to_the_boundary_never_passes_it() {
        let mut stream = message(b'D', &[7; 40]);
        let end = stream.len();
        stream.extend(message(b'Z', b"I"));
        for cut in 1..end {
            let mut scanner = Scanner::default();
            scanner.feed(&stream[..cut], |_, _| {});
            let mut at = cut;
            while !scanner.at_boundary() {
                let step = scanner.bytes_to_boundary();
                assert!(step > 0);
                scanner.feed(&stream[at..at + step], |_, _| {});
                at += step;
            }
            assert_eq!(at, end);
        }
    }

    #[test]
    fn impossible_lengths_lose_the_scanner_for_good() {
        for length in [0, 3, 0x8000_0000, u32::MAX] {
            let mut scanner = Scanner::default();
            let mut bytes = vec![b'Q'];
            bytes.extend(u32::to_be_bytes(length));
            bytes.extend(message(b'Z', b"I"));
            scanner.feed(&bytes, |_, _| panic!("nothing is seen"));
            assert!(!scanner.at_boundary());
            assert_eq!(scanner.bytes_to_boundary(), 0);
        }
    }
}
