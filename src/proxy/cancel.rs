//! Cancel keys of the proxy's own, and where each leads.
//!
//! A client is told a key that only the proxy knows; a CancelRequest with it is
//! passed on with the backend's key over a connection of its own. So a key stays
//! good when a session gets another backend, and a backend's key never leaves.

use std::collections::HashMap;
use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};

use super::backend;
use super::wire::{self, CancelKey};
use crate::types::BackendAddress;

/// Length in bytes of a secret, by minor protocol version: fixed in 3.0, and as
/// PostgreSQL 18 makes them from 3.2 on.
fn secret_bytes(minor: u16) -> usize {
    if minor >= 2 { 32 } else { 4 }
}

/// How long a backend may take over a CancelRequest.
const LIMIT: Duration = Duration::from_secs(5);

/// A backend session that can be cancelled.
#[derive(Debug, Clone)]
pub(super) struct Target {
    pub address: BackendAddress,
    pub key: CancelKey,
}

impl Target {
    /// Asks the backend to cancel what the session runs, and waits until it has heard.
    ///
    /// PostgreSQL answers by closing after the signal was sent. Cancel-safe: dropped
    /// early, the request may or may not have arrived.
    pub(super) async fn cancel(&self) -> io::Result<()> {
        let ask = async {
            let mut stream = backend::connect(&self.address).await?;
            stream.write_all(&wire::cancel_request(&self.key)).await?;
            while stream.read(&mut [0; 64]).await? > 0 {}
            Ok(())
        };
        tokio::time::timeout(LIMIT, ask)
            .await
            .unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into()))
    }
}

/// All sessions' keys. Clones share them.
#[derive(Debug, Clone, Default)]
pub(super) struct CancelKeys(Arc<Mutex<HashMap<CancelKey, Target>>>);

impl CancelKeys {
    /// Makes a key for `target`, fit for protocol 3.`minor`; it lasts as long as the answer.
    ///
    /// The pid stays the backend's, as clients compare it with `pg_backend_pid()` and
    /// with the sender of notifications; the secret is what tells sessions apart.
    pub(super) fn register(&self, target: Target, minor: u16) -> Registration {
        let pid = target.key.pid;
        let mut secret = vec![0; secret_bytes(minor)];
        let mut keys = self.lock();
        loop {
            getrandom::fill(&mut secret).expect("the operating system's random source answers");
            let key = CancelKey {
                pid,
                secret: secret.as_slice().into(),
            };
            if let std::collections::hash_map::Entry::Vacant(free) = keys.entry(key.clone()) {
                free.insert(target);
                return Registration {
                    keys: self.clone(),
                    key,
                };
            }
        }
    }

    /// What the holder of `key` may cancel.
    pub(super) fn target(&self, key: &CancelKey) -> Option<Target> {
        self.lock().get(key).cloned()
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<CancelKey, Target>> {
        // Each change is one call on the map: a panic can't leave it half made.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A key in use; dropping it makes the key void.
#[derive(Debug)]
pub(super) struct Registration {
    keys: CancelKeys,
    key: CancelKey,
}

impl Registration {
    /// What the client is told.
    pub(super) fn key(&self) -> &CancelKey {
        &self.key
    }

    /// What the key leads to.
    pub(super) fn target(&self) -> Option<Target> {
        self.keys.target(&self.key)
    }
}

impl Drop for Registration {
    fn drop(&mut self) {
        self.keys.lock().remove(&self.key);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn target(pid: u32) -> Target {
        Target {
            address: BackendAddress::Tcp {
                host: "127.0.0.1".into(),
                port: 1,
            },
            key: CancelKey {
                pid,
                secret: [1, 2, 3, 4].into(),
            },
        }
    }

    #[test]
    fn a_key_leads_to_its_target_until_the_session_ends() {
        let keys = CancelKeys::default();
        let (a, b) = (keys.register(target(7), 0), keys.register(target(7), 0));
        assert_ne!(a.key(), b.key());
        assert_ne!(a.key().secret, target(7).key.secret);
        assert_eq!(a.key().pid, 7);
        assert_eq!(a.target().unwrap().key, target(7).key);
        let key = a.key().clone();
        drop(a);
        assert!(keys.target(&key).is_none());
        assert!(keys.target(b.key()).is_some());
        drop(b);
        assert!(keys.lock().is_empty());
    }

    #[test]
    fn keys_are_as_long_as_the_protocol_has_them() {
        let keys = CancelKeys::default();
        for (minor, length) in [(0, 4), (2, 32), (9999, 32)] {
            assert_eq!(keys.register(target(1), minor).key().secret.len(), length);
        }
    }

    #[test]
    fn debug_hides_secrets() {
        let text = format!("{:?}", target(7));
        assert!(!text.contains("1, 2, 3, 4"), "{text}");
    }
}
