//! The api on a loopback port, for browsers: the same requests as over the socket, with a token.

use std::collections::HashMap;
use std::net::{Ipv4Addr, SocketAddr};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};

use anyhow::Context;
use axum::Router;
use axum::body::Body;
use axum::extract::{Request, State};
use axum::http::{HeaderMap, StatusCode, header};
use axum::middleware::{self, Next};
use axum::response::{IntoResponse, Response};
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

use crate::config::Paths;
use crate::fsx;
use crate::types::Password;

/// Listens on every `api_port` that a project's config names. Cheap to clone.
#[derive(Debug, Clone)]
pub(super) struct TcpApi {
    routes: Router,
    token: Password,
    open: Arc<Mutex<HashMap<u16, CancellationToken>>>,
    stop: CancellationToken,
}

impl TcpApi {
    pub(super) fn new(
        routes: Router,
        paths: &Paths,
        stop: CancellationToken,
    ) -> anyhow::Result<Self> {
        Ok(Self {
            routes,
            token: token(paths)?,
            open: Arc::default(),
            stop,
        })
    }

    /// Listens on these ports and on no others.
    pub(super) fn listen_on(&self, ports: &[u16]) {
        let mut open = self.open.lock().unwrap_or_else(PoisonError::into_inner);
        open.retain(|port, stop| {
            let wanted = ports.contains(port);
            if !wanted {
                stop.cancel();
            }
            wanted
        });
        for port in ports {
            if !open.contains_key(port) {
                let stop = self.stop.child_token();
                open.insert(*port, stop.clone());
                tokio::spawn(self.clone().serve(*port, stop));
            }
        }
    }

    async fn serve(self, port: u16, stop: CancellationToken) {
        let listener = match TcpListener::bind(SocketAddr::from((Ipv4Addr::LOCALHOST, port))).await
        {
            Ok(listener) => listener,
            Err(e) => {
                warn!(port, "api_port can't be listened on: {e}");
                self.open
                    .lock()
                    .unwrap_or_else(PoisonError::into_inner)
                    .remove(&port);
                return;
            }
        };
        info!(port, "the api listens");
        let routes = self
            .routes
            .clone()
            .layer(middleware::from_fn_with_state(self.token.clone(), admit));
        if let Err(e) = axum::serve(listener, routes)
            .with_graceful_shutdown(stop.cancelled_owned())
            .await
        {
            warn!(port, "api: {e}");
        }
    }
}

/// The token, made at first need.
fn token(paths: &Paths) -> anyhow::Result<Password> {
    let file = token_file(paths);
    match std::fs::read_to_string(&file) {
        Ok(text) => Ok(Password::new(text.trim_end())),
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => {
            let token = Password::random();
            fsx::write_atomic(&file, token.reveal().as_bytes(), 0o600, None)
                .with_context(|| format!("write {}", file.display()))?;
            Ok(token)
        }
        Err(e) => Err(e).with_context(|| format!("read {}", file.display())),
    }
}

fn token_file(paths: &Paths) -> PathBuf {
    paths.secrets_dir().join("api.token")
}

async fn admit(State(token): State<Password>, request: Request<Body>, next: Next) -> Response {
    match refusal(request.headers(), &token) {
        None => next.run(request).await,
        Some((status, why)) => (status, format!("{why}\n")).into_response(),
    }
}

/// Only a caller who knows the token, and no page of another origin on its behalf.
fn refusal(headers: &HeaderMap, token: &Password) -> Option<(StatusCode, &'static str)> {
    let text = |name| headers.get(name).and_then(|value| value.to_str().ok());
    let is_here = |host: &str| {
        let name = host.rsplit_once(':').map_or(host, |(name, _)| name);
        name == "127.0.0.1" || name == "localhost"
    };
    // A name that was pointed at loopback is not ours (DNS rebinding).
    if !text(header::HOST).is_some_and(is_here) {
        return Some((
            StatusCode::FORBIDDEN,
            "the host must be 127.0.0.1 or localhost",
        ));
    }
    if let Some(origin) = text(header::ORIGIN)
        && !origin.strip_prefix("http://").is_some_and(is_here)
    {
        return Some((
            StatusCode::FORBIDDEN,
            "pages of other origins are not served",
        ));
    }
    let given = text(header::AUTHORIZATION)
        .and_then(|value| value.strip_prefix("Bearer "))
        .unwrap_or_default();
    if !same(given.as_bytes(), token.reveal().as_bytes()) {
        return Some((
            StatusCode::UNAUTHORIZED,
            "send the token: Authorization: Bearer ...",
        ));
    }
    None
}

/// Compares in a time that tells nothing of where two texts differ.
fn same(a: &[u8], b: &[u8]) -> bool {
    a.len() == b.len() && a.iter().zip(b).fold(0, |differs, (x, y)| differs | (x ^ y)) == 0
}

#[cfg(test)]
mod tests {
    use super::*;

    fn asked(pairs: &[(&'static str, &str)]) -> Option<StatusCode> {
        let headers: HeaderMap = pairs
            .iter()
            .map(|(k, v)| (header::HeaderName::from_static(k), v.parse().unwrap()))
            .collect();
        refusal(&headers, &Password::new("sesame")).map(|(status, _)| status)
    }

    #[test]
    fn only_the_token_from_this_machine_is_admitted() {
        let good = ("authorization", "Bearer sesame");
        let host = ("host", "127.0.0.1:15433");
        assert_eq!(asked(&[host, good]), None);
        assert_eq!(
            asked(&[
                ("host", "localhost"),
                good,
                ("origin", "http://localhost:15433")
            ]),
            None
        );
        assert_eq!(asked(&[host]), Some(StatusCode::UNAUTHORIZED));
        assert_eq!(
            asked(&[host, ("authorization", "Bearer sesam")]),
            Some(StatusCode::UNAUTHORIZED)
        );
        assert_eq!(
            asked(&[("host", "evil.example:15433"), good]),
            Some(StatusCode::FORBIDDEN)
        );
        assert_eq!(
            asked(&[host, good, ("origin", "https://evil.example")]),
            Some(StatusCode::FORBIDDEN)
        );
        assert_eq!(asked(&[good]), Some(StatusCode::FORBIDDEN));
    }
}
