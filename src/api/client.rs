//! The client's side of the contract, over the daemon's Unix socket.
//!
//! Blocking from outside, with a runtime of one thread inside: the git hook waits for
//! every millisecond spent here.

use std::io::{self, ErrorKind};
use std::os::unix::net::UnixStream as StdUnixStream;
use std::time::Duration;

use bytes::Bytes;
use http_body_util::{BodyExt, Full};
use hyper::body::Incoming;
use hyper::client::conn::http1::{SendRequest, handshake};
use hyper::header::{CONTENT_TYPE, HOST, SERVER};
use hyper_util::rt::TokioIo;
use serde::de::DeserializeOwned;
use serde_json::Value;
use tokio::net::UnixStream;
use tokio::runtime::{Builder, Runtime};

use super::types::{Failure, Message, Request};
use crate::config::Paths;

/// Why there is no connection, though a daemon may run.
#[derive(Debug, thiserror::Error)]
pub enum ConnectError {
    /// The folder of the socket isn't ours.
    #[error(transparent)]
    Place(#[from] crate::config::ConfigError),
    #[error("connect to {socket}: {source}")]
    Io { socket: String, source: io::Error },
}

/// Why a request has no answer.
#[derive(Debug, thiserror::Error)]
pub enum CallError {
    /// The daemon's own "no".
    #[error("{}", .0.message)]
    Failed(Failure),
    #[error("no answer within {0:?}")]
    Timeout(Duration),
    /// The daemon went away; what it had begun it finishes or undoes when it is back.
    #[error("the connection to the daemon broke: {0}")]
    Broken(String),
    /// The daemon speaks another version of the contract.
    #[error("the daemon's answer is not understood: {0}")]
    Unclear(String),
}

/// A connection to the daemon.
#[derive(Debug)]
pub struct Client {
    // Declared first, so dropped first: the runtime drives the connection.
    sender: SendRequest<Full<Bytes>>,
    runtime: Runtime,
    daemon_version: Option<String>,
}

impl Client {
    /// Connects; `None` when no daemon listens.
    pub fn connect(paths: &Paths) -> Result<Option<Self>, ConnectError> {
        paths.verify_run_dir()?;
        let socket = paths.daemon_socket();
        let failed = |source| ConnectError::Io {
            socket: socket.display().to_string(),
            source,
        };
        let stream = match StdUnixStream::connect(&socket) {
            Ok(stream) => stream,
            // The file is missing, or is left from a daemon that was killed.
            Err(e) if matches!(e.kind(), ErrorKind::NotFound | ErrorKind::ConnectionRefused) => {
                return Ok(None);
            }
            Err(e) => return Err(failed(e)),
        };
        stream.set_nonblocking(true).map_err(failed)?;
        let runtime = Builder::new_current_thread()
            .enable_all()
            .build()
            .map_err(failed)?;
        let sender = runtime
            .block_on(async {
                let io = TokioIo::new(UnixStream::from_std(stream)?);
                let (sender, connection) = handshake(io).await.map_err(io::Error::other)?;
                // Its errors reach the call that waits on it.
                tokio::spawn(connection);
                Ok(sender)
            })
            .map_err(failed)?;
        Ok(Some(Self {
            sender,
            runtime,
            daemon_version: None,
        }))
    }

    /// Sends a request and waits for its answer, handing on what is said meanwhile.
    pub fn call(
        &mut self,
        request: &Request,
        on_message: impl FnMut(Message),
    ) -> Result<Value, CallError> {
        self.runtime.block_on(answer(
            &mut self.sender,
            request,
            on_message,
            &mut self.daemon_version,
        ))
    }

    /// As [`Client::call`], but waits no longer than `limit`. The daemon goes on all the same.
    pub fn call_within(
        &mut self,
        limit: Duration,
        request: &Request,
        on_message: impl FnMut(Message),
    ) -> Result<Value, CallError> {
        let answer = answer(
            &mut self.sender,
            request,
            on_message,
            &mut self.daemon_version,
        );
        self.runtime
            .block_on(async { tokio::time::timeout(limit, answer).await })
            .unwrap_or(Err(CallError::Timeout(limit)))
    }

    /// As [`Client::call`], for a known answer.
    pub fn call_as<T: DeserializeOwned>(
        &mut self,
        request: &Request,
        on_message: impl FnMut(Message),
    ) -> Result<T, CallError> {
        decode(self.call(request, on_message)?)
    }

    /// The version in the last answer's `server: dbranch/<version>` header.
    pub fn daemon_version(&self) -> Option<&str> {
        self.daemon_version.as_deref()
    }
}

/// Reads an answer as what it should be.
pub fn decode<T: DeserializeOwned>(answer: Value) -> Result<T, CallError> {
    serde_json::from_value(answer).map_err(|e| CallError::Unclear(e.to_string()))
}

async fn answer(
    sender: &mut SendRequest<Full<Bytes>>,
    request: &Request,
    mut on_message: impl FnMut(Message),
    daemon_version: &mut Option<String>,
) -> Result<Value, CallError> {
    let broken = |e: hyper::Error| CallError::Broken(e.to_string());
    let body = serde_json::to_value(request).map_err(|e| CallError::Unclear(e.to_string()))?;
    let op = body["op"].as_str().expect("every request has its tag");
    let http = hyper::Request::post(format!("/v1/{op}"))
        .header(HOST, "dbranch")
        .header(CONTENT_TYPE, "application/json")
        .body(Full::new(Bytes::from(body.to_string())))
        .expect("an op is a valid path");
    sender.ready().await.map_err(broken)?;
    let response = sender.send_request(http).await.map_err(broken)?;
    if let Some(version) = response.headers().get(SERVER).and_then(|v| v.to_str().ok()) {
        *daemon_version = version.strip_prefix("dbranch/").map(str::to_owned);
    }
    let status = response.status();
    let mut lines = Lines {
        body: response.into_body(),
        buffer: Vec::new(),
    };
    while let Some(line) = lines.next().await.map_err(broken)? {
        let message = serde_json::from_slice(&line).map_err(|_| {
            let text = String::from_utf8_lossy(&line);
            CallError::Unclear(format!("{status}: {}", text.trim()))
        })?;
        let outcome = match message {
            Message::Done(value) => Ok(value),
            Message::Failed(failure) => Err(CallError::Failed(failure)),
            message => {
                on_message(message);
                continue;
            }
        };
        // To the body's end: hyper closes a connection whose answer was left half read, and
        // the next request on it would fail.
        while let Ok(Some(_)) = lines.next().await {}
        return outcome;
    }
    if status.is_success() {
        Err(CallError::Broken("it ended without an answer".into()))
    } else {
        Err(CallError::Unclear(format!("`{op}`: {status}")))
    }
}

/// The lines of a body. Not cancel-safe: a line half read is lost with it.
struct Lines {
    body: Incoming,
    buffer: Vec<u8>,
}

impl Lines {
    async fn next(&mut self) -> Result<Option<Vec<u8>>, hyper::Error> {
        let mut searched = 0;
        loop {
            if let Some(at) = self.buffer[searched..].iter().position(|b| *b == b'\n') {
                let rest = self.buffer.split_off(searched + at + 1);
                let line = std::mem::replace(&mut self.buffer, rest);
                if line.trim_ascii().is_empty() {
                    searched = 0;
                    continue;
                }
                return Ok(Some(line));
            }
            searched = self.buffer.len();
            match self.body.frame().await {
                Some(frame) => {
                    if let Ok(data) = frame?.into_data() {
                        self.buffer.extend_from_slice(&data);
                    }
                }
                // The last line may lack its end.
                None if self.buffer.trim_ascii().is_empty() => return Ok(None),
                None => return Ok(Some(std::mem::take(&mut self.buffer))),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::fmt::Write as _;
    use std::io::{Read, Write};
    use std::os::unix::net::UnixListener;
    use std::thread::JoinHandle;

    use super::super::types::FailureKind;
    use super::*;

    struct Fake {
        _home: tempfile::TempDir,
        paths: Paths,
        server: JoinHandle<String>,
    }

    /// Answers one request with `chunks`, then ends; returns what it was sent.
    fn fake(status: &str, chunks: &[&str]) -> Fake {
        let home = tempfile::tempdir().unwrap();
        let paths = Paths::under(home.path());
        paths.create().unwrap();
        let listener = UnixListener::bind(paths.daemon_socket()).unwrap();
        let mut response = format!(
            "HTTP/1.1 {status}\r\nserver: dbranch/9.9.9\r\ntransfer-encoding: chunked\r\n\r\n"
        );
        for chunk in chunks {
            write!(response, "{:x}\r\n{chunk}\r\n", chunk.len()).unwrap();
        }
        response += "0\r\n\r\n";
        let server = std::thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            let mut request = Vec::new();
            let mut buffer = [0; 4096];
            while !request.ends_with(b"}") {
                let n = stream.read(&mut buffer).unwrap();
                request.extend_from_slice(&buffer[..n]);
            }
            stream.write_all(response.as_bytes()).unwrap();
            String::from_utf8(request).unwrap()
        });
        Fake {
            _home: home,
            paths,
            server,
        }
    }

    fn ping(fake: &Fake) -> (Result<Value, CallError>, Vec<Message>) {
        let mut client = Client::connect(&fake.paths).unwrap().unwrap();
        let mut heard = Vec::new();
        let answer = client.call(&Request::Ping, |m| heard.push(m));
        assert_eq!(client.daemon_version(), Some("9.9.9"));
        (answer, heard)
    }

    #[test]
    fn no_daemon_is_no_error() {
        let home = tempfile::tempdir().unwrap();
        let paths = Paths::under(home.path());
        assert!(Client::connect(&paths).unwrap().is_none());
        paths.create().unwrap();
        drop(UnixListener::bind(paths.daemon_socket()).unwrap());
        assert!(Client::connect(&paths).unwrap().is_none());
    }

    #[test]
    fn lines_are_messages_however_they_are_cut() {
        let fake = fake(
            "200 OK",
            &[
                "{\"notice\":\"a\"}\n{\"progress\":{\"what\":\"w\",",
                "\"done\":1,\"total\":2}}\n",
                "\n{\"done\":{\"x\":",
                "1}}",
            ],
        );
        let (answer, heard) = ping(&fake);
        assert_eq!(answer.unwrap()["x"], 1);
        assert_eq!(heard.len(), 2);
        assert_eq!(heard[0], Message::Notice("a".into()));
        let sent = fake.server.join().unwrap();
        assert!(sent.starts_with("POST /v1/ping HTTP/1.1\r\n"), "{sent}");
        assert!(sent.ends_with("{\"op\":\"ping\"}"), "{sent}");
    }

    #[test]
    fn a_refusal_comes_with_its_hint() {
        let line = r#"{"failed":{"kind":"refused","message":"no","hint":"do"}}"#;
        let (answer, _) = ping(&fake("409 Conflict", &[line]));
        let Err(CallError::Failed(failure)) = answer else {
            panic!("{answer:?}")
        };
        assert_eq!(failure.kind, FailureKind::Refused);
        assert_eq!(failure.hint.as_deref(), Some("do"));
    }

    #[test]
    fn an_answer_without_end_or_sense_is_an_error() {
        let (answer, _) = ping(&fake("200 OK", &["{\"notice\":\"a\"}\n"]));
        assert!(matches!(answer, Err(CallError::Broken(_))), "{answer:?}");
        let (answer, _) = ping(&fake("404 Not Found", &["no such thing"]));
        assert!(matches!(answer, Err(CallError::Unclear(_))), "{answer:?}");
    }

    #[test]
    fn a_slow_answer_is_waited_for_no_longer_than_asked() {
        let home = tempfile::tempdir().unwrap();
        let paths = Paths::under(home.path());
        paths.create().unwrap();
        let _silent = UnixListener::bind(paths.daemon_socket()).unwrap();
        let mut client = Client::connect(&paths).unwrap().unwrap();
        let answer = client.call_within(Duration::from_millis(20), &Request::Ping, drop);
        assert!(matches!(answer, Err(CallError::Timeout(_))), "{answer:?}");
    }
}
