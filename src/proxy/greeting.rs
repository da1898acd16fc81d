//! What a backend says from the startup packet to its first ReadyForQuery.
//!
//! Everything passes unchanged (authentication is between client and backend) but
//! `BackendKeyData`, whose key is replaced by one of the proxy's own.

use super::cancel::{CancelKeys, Registration, Target};
use super::wire::{self, CancelKey};
use crate::types::BackendAddress;

/// Longest message held back until it is complete; longer ones pass in pieces.
const HELD_MAX_BYTES: usize = 4096;

/// Reads and rewrites one backend's greeting.
#[derive(Debug)]
pub(super) struct Greeting {
    keys: CancelKeys,
    backend: BackendAddress,
    /// Of protocol 3: asked for by the client, then what the backend agreed to.
    minor: u16,
    registration: Option<Registration>,
    /// The beginning of a message.
    held: Vec<u8>,
    /// Payload bytes of a long message that pass unread.
    passing: usize,
    over: bool,
}

impl Greeting {
    pub(super) fn new(keys: CancelKeys, backend: BackendAddress, minor: u16) -> Self {
        Self {
            keys,
            backend,
            minor,
            registration: None,
            held: Vec::new(),
            passing: 0,
            over: false,
        }
    }

    /// Appends to `told` what the client is to be told for `bytes`.
    ///
    /// The end of `bytes` may be kept back until the rest of its message comes.
    pub(super) fn translate(&mut self, bytes: &[u8], told: &mut Vec<u8>) {
        self.held.extend_from_slice(bytes);
        let mut at = 0;
        while !self.over {
            let rest = &self.held[at..];
            if self.passing > 0 {
                let n = rest.len().min(self.passing);
                told.extend_from_slice(&rest[..n]);
                self.passing -= n;
                at += n;
                if self.passing > 0 {
                    break;
                }
                continue;
            }
            let (Some(kind), Some(length)) =
                (rest.first().copied(), rest.get(1..).and_then(wire::be_u32))
            else {
                break;
            };
            let size = 1 + length as usize;
            if size < 5 {
                // Not a message. The client will say so; nothing more is to be found here.
                self.over = true;
            } else if let Some(message) = rest.get(..size) {
                let message = message.to_vec();
                self.message(kind, &message, told);
                at += size;
            } else if size > HELD_MAX_BYTES {
                self.passing = size;
            } else {
                break;
            }
        }
        if self.over {
            told.extend_from_slice(&self.held[at..]);
            self.held = Vec::new();
        } else {
            self.held.drain(..at);
        }
    }

    fn message(&mut self, kind: u8, message: &[u8], told: &mut Vec<u8>) {
        match (kind, &message[5..]) {
            (b'K', [a, b, c, d, secret @ ..]) => {
                let key = CancelKey {
                    pid: u32::from_be_bytes([*a, *b, *c, *d]),
                    secret: secret.into(),
                };
                let target = Target {
                    address: self.backend.clone(),
                    key,
                };
                let registration = self.keys.register(target, self.minor);
                told.extend(wire::backend_key_data(registration.key()));
                self.registration = Some(registration);
                return;
            }
            // NegotiateProtocolVersion: the newest minor version the backend speaks, sent
            // as a whole version number (3 in the upper half).
            (b'v', [_, _, high, low, ..]) => {
                self.minor = self.minor.min(u16::from_be_bytes([*high, *low]));
            }
            (b'Z', _) => self.over = true,
            _ => {}
        }
        told.extend_from_slice(message);
    }

    /// Whether the first ReadyForQuery was seen.
    pub(super) fn is_over(&self) -> bool {
        self.over
    }

    /// The client's cancel key, if the backend has one.
    pub(super) fn into_registration(self) -> Option<Registration> {
        self.registration
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn message(kind: u8, payload: &[u8]) -> Vec<u8> {
        let mut bytes = vec![kind];
        bytes.extend(u32::try_from(4 + payload.len()).unwrap().to_be_bytes());
        bytes.extend(payload);
        bytes
    }

    fn greeting(minor: u16) -> Greeting {
        let backend = BackendAddress::Tcp {
            host: "127.0.0.1".into(),
            port: 1,
        };
        Greeting::new(CancelKeys::default(), backend, minor)
    }

    fn told(greeting: &mut Greeting, bytes: &[u8], at_once: usize) -> Vec<u8> {
        let mut told = Vec::new();
        for part in bytes.chunks(at_once) {
            greeting.translate(part, &mut told);
        }
        told
    }

    #[test]
    fn only_the_cancel_key_is_replaced() {
        let before = [message(b'R', &[0; 4]), message(b'S', &[b'x'; 6000])].concat();
        let key = message(b'K', &[0, 0, 0, 7, 1, 2, 3, 4]);
        let after = [
            message(b'Z', b"I"),
            message(b'A', b"later"),
            message(b'K', &[9; 8]),
        ]
        .concat();
        for at_once in [1, 3, 7, 4000, 100_000] {
            let mut greeting = greeting(0);
            let bytes = [before.as_slice(), &key, &after].concat();
            let got = told(&mut greeting, &bytes, at_once);
            if at_once == 1 {
                // What comes after the end is the relay's to forward.
                assert!(greeting.is_over());
            }
            let registration = greeting.into_registration().unwrap();
            let own = wire::backend_key_data(registration.key());
            assert_ne!(own, key);
            assert_eq!(registration.target().unwrap().key.secret[..], [1, 2, 3, 4]);
            assert_eq!(got, [before.as_slice(), &own, &after].concat(), "{at_once}");
        }
    }

    #[test]
    fn the_clients_key_follows_the_negotiated_protocol() {
        let key = message(b'K', &[1; 36]);
        let down = message(b'v', &[0, 3, 0, 0, 0, 0, 0, 0]);
        for (asked, negotiation, length) in [
            (2, &[][..], 32),
            (2, &down, 4),
            (0, &[], 4),
            (9999, &down, 4),
        ] {
            let mut greeting = greeting(asked);
            told(&mut greeting, &[negotiation, &key].concat(), 100);
            let registration = greeting.into_registration().unwrap();
            assert_eq!(registration.key().secret.len(), length);
        }
    }

    #[test]
    fn what_is_no_message_passes() {
        let mut greeting = greeting(0);
        let bytes = b"R\0\0\0\0not a message at all";
        assert_eq!(told(&mut greeting, bytes, 100), bytes);
        assert!(greeting.is_over());
    }
}
