//! The server's side of the contract.

use std::convert::Infallible;
use std::future::Future;

use axum::Router;
use axum::body::{Body, Bytes};
use axum::extract::{Path, State};
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::post;
use futures_util::StreamExt;
use serde_json::Value;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;

use super::types::{Failure, FailureKind, Message, Request};

/// Lines that may wait for a slow reader. Progress beyond it is dropped.
const BACKLOG: usize = 64;

/// Tells clients of another version that the daemon is one.
const SERVER: &str = concat!("dbranch/", env!("CARGO_PKG_VERSION"));

/// Does what requests ask.
pub trait Handler: Clone + Send + Sync + 'static {
    /// Answers with the JSON of the request's answer type. The request is done to its end
    /// even if the client goes away.
    fn handle(
        &self,
        request: Request,
        tell: Tell,
    ) -> impl Future<Output = Result<Value, Failure>> + Send;
}

/// Takes messages to the client while a request is being done.
#[derive(Debug, Clone)]
pub struct Tell(mpsc::Sender<Message>);

impl Tell {
    /// Never waits: what the client does not read in time is dropped.
    pub fn say(&self, message: Message) {
        let _ = self.0.try_send(message);
    }
}

/// The routes, to be served on any listener.
pub fn router<H: Handler>(handler: H) -> Router {
    Router::new()
        .route("/v1/{op}", post(call::<H>))
        .with_state(handler)
}

async fn call<H: Handler>(
    State(handler): State<H>,
    Path(op): Path<String>,
    body: Bytes,
) -> Response {
    let request = match parse(&op, &body) {
        Ok(request) => request,
        Err(why) => return (StatusCode::BAD_REQUEST, why + "\n").into_response(),
    };
    let (sender, receiver) = mpsc::channel(BACKLOG);
    tokio::spawn(async move {
        let answer = handler.handle(request, Tell(sender.clone())).await;
        let last = match answer {
            Ok(value) => Message::Done(value),
            Err(failure) => Message::Failed(failure),
        };
        let _ = sender.send(last).await;
    });
    let lines = ReceiverStream::new(receiver).map(|message| Ok::<_, Infallible>(line(&message)));
    (
        [
            (header::CONTENT_TYPE, "application/x-ndjson"),
            (header::SERVER, SERVER),
        ],
        Body::from_stream(lines),
    )
        .into_response()
}

fn parse(op: &str, body: &[u8]) -> Result<Request, String> {
    let mut fields: Value = if body.is_empty() {
        Value::Object(serde_json::Map::new())
    } else {
        serde_json::from_slice(body).map_err(|e| format!("the body is no JSON: {e}"))?
    };
    let object = fields.as_object_mut().ok_or("the body is no JSON object")?;
    object.insert("op".into(), op.into());
    serde_json::from_value(fields).map_err(|e| e.to_string())
}

fn line(message: &Message) -> Bytes {
    let mut bytes = serde_json::to_vec(message).unwrap_or_else(|e| {
        let failure = Failure {
            kind: FailureKind::Bug,
            message: format!("an answer could not be written: {e}"),
            hint: None,
        };
        serde_json::to_vec(&Message::Failed(failure)).expect("strings can be written as JSON")
    });
    bytes.push(b'\n');
    bytes.into()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_path_names_the_operation_and_the_body_its_fields() {
        assert_eq!(parse("ping", b""), Ok(Request::Ping));
        assert_eq!(
            parse("shutdown", br#"{"stop_branches": true}"#),
            Ok(Request::Shutdown {
                stop_branches: true
            })
        );
        assert!(
            parse("explode", b"{}")
                .unwrap_err()
                .contains("unknown variant `explode`")
        );
        assert!(parse("ping", b"[1]").is_err());
    }
}
