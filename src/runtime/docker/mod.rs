//! Instances as Docker containers. The only user of `bollard`.
//!
//! A container runs `postgres` alone: as the owner of the data, without network,
//! with the data directory, the socket folder and the log file mounted. It is
//! found again by its labels, never by name alone.

mod connect;
mod container;
mod credentials;
mod host;
mod image;
mod once;

use std::collections::HashMap;
use std::fmt::Display;
use std::sync::{Arc, Mutex};

use bollard::errors::Error as ApiError;

use super::RuntimeError;
pub use image::PullProgress;

/// How the daemon reaches a container's server.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Connect {
    /// By the socket in the mounted folder; the container has no network.
    Unix,
    /// By a port that Docker publishes on 127.0.0.1, where containers live in a
    /// virtual machine that sockets don't cross.
    Tcp,
}

/// A connection to a Docker Engine on this machine. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Docker {
    api: bollard::Docker,
    /// Where it was found, for messages.
    endpoint: String,
    pub(super) connect: Connect,
    /// The engine maps user ids; our containers must opt out to own files as their owner.
    maps_users: bool,
    layouts: Arc<Mutex<HashMap<String, image::Layout>>>,
}

impl Docker {
    /// The same engine, with another way to reach servers.
    #[must_use]
    pub fn with_connect(mut self, connect: Connect) -> Self {
        self.connect = connect;
        self
    }

    /// The engine's address: `unix:///var/run/docker.sock`.
    pub fn endpoint(&self) -> &str {
        &self.endpoint
    }
}

/// The HTTP status that the engine refused with.
fn status_of(error: &ApiError) -> Option<u16> {
    match error {
        ApiError::DockerResponseServerError { status_code, .. } => Some(*status_code),
        _ => None,
    }
}

/// What the engine said, without bollard's frame around it.
fn said(error: &ApiError) -> String {
    match error {
        ApiError::DockerResponseServerError { message, .. } => message.trim().to_owned(),
        ApiError::DockerStreamError { error } => error.trim().to_owned(),
        ApiError::RequestTimeoutError => "Docker did not answer in time".to_owned(),
        other => chain(other),
    }
}

fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        let cause_text = cause.to_string();
        if !text.contains(&cause_text) {
            text = format!("{text}: {cause_text}");
        }
        source = cause.source();
    }
    text
}

fn failed(action: impl Display, error: &ApiError) -> RuntimeError {
    RuntimeError::failed(action.to_string(), said(error))
}
