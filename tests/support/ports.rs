//! Blocks of free ports, one block an environment, also between test runs side by side.

use std::net::{Ipv4Addr, TcpListener, UdpSocket};
use std::sync::atomic::{AtomicU16, Ordering};

/// Ports of one environment: the first for a proxy, the others for its branches.
pub(crate) struct Ports {
    pub(crate) first: u16,
    /// Holding the UDP port of the same number keeps other runs away from the block.
    _claim: UdpSocket,
}

impl Ports {
    pub(crate) const COUNT: u16 = 40;

    /// Above dbranch's own defaults, and below the range from which systems take the ports
    /// of outgoing connections.
    const RANGE: std::ops::Range<u16> = 18_000..32_000;

    pub(crate) fn claim() -> Self {
        static NEXT: AtomicU16 = AtomicU16::new(0);
        let blocks = (Self::RANGE.end - Self::RANGE.start) / Self::COUNT;
        let start = u16::try_from(std::process::id() % u32::from(blocks)).expect("below blocks");
        for _ in 0..blocks {
            let block = (start + NEXT.fetch_add(1, Ordering::Relaxed)) % blocks;
            let first = Self::RANGE.start + block * Self::COUNT;
            let Ok(claim) = UdpSocket::bind((Ipv4Addr::LOCALHOST, first)) else {
                continue;
            };
            if (first..first + Self::COUNT).all(is_free) {
                return Self {
                    first,
                    _claim: claim,
                };
            }
        }
        panic!("no {} free ports in a row here", Self::COUNT);
    }

    pub(crate) fn last(&self) -> u16 {
        self.first + Self::COUNT - 1
    }
}

pub(crate) fn is_free(port: u16) -> bool {
    TcpListener::bind((Ipv4Addr::LOCALHOST, port)).is_ok()
}
