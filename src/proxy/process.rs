//! Which process a client is, where the system tells (Linux: proc(5), `sock_diag(7)`).

use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

/// Processes remembered: those that were found last, most of which connect again.
const REMEMBERED_MAX: usize = 64;

/// A connection by its two addresses, the client's first.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Ends {
    pub client: SocketAddr,
    pub proxy: SocketAddr,
}

/// Finds in which folder clients' processes work. It remembers which processes those were.
#[derive(Debug, Default)]
pub struct ClientFolders {
    /// Newest last.
    found: Mutex<Vec<u32>>,
}

impl ClientFolders {
    /// Which of `folders` the client's process works in: the index of the innermost one.
    ///
    /// None where it works in none of them, where the system doesn't tell (another user's
    /// process, one in a container, no Linux), and when `limit` of processor time is used up:
    /// time on the clock would make the answer depend on what else the machine does. Blocks.
    pub fn folder_of(&self, ends: Ends, folders: &[PathBuf], limit: Duration) -> Option<usize> {
        let until = processor_time() + limit;
        let socket = format!("socket:[{}]", inode_of_client(ends)?);
        // To look through all processes' files would take a hundred times as long as their
        // working folders, and few work in these.
        let folder_if_it_is = |pid: u32| -> Option<usize> {
            let cwd = std::fs::read_link(format!("/proc/{pid}/cwd")).ok()?;
            let folder = innermost(&cwd, folders)?;
            holds(pid, &socket).then_some(folder)
        };
        let remembered = lock(&self.found).clone();
        if let Some(folder) = remembered
            .iter()
            .rev()
            .find_map(|pid| folder_if_it_is(*pid))
        {
            return Some(folder);
        }
        let mut pids: Vec<u32> = std::fs::read_dir("/proc")
            .ok()?
            .flatten()
            .filter_map(|entry| entry.file_name().to_str()?.parse().ok())
            .collect();
        // A client that wasn't here before is most often a young process.
        pids.sort_unstable_by_key(|pid| std::cmp::Reverse(*pid));
        for pid in pids {
            if processor_time() > until {
                tracing::debug!(client = %ends.client, "its process was not found in time");
                return None;
            }
            if let Some(folder) = folder_if_it_is(pid) {
                let mut found = lock(&self.found);
                found.retain(|known| *known != pid);
                if found.len() >= REMEMBERED_MAX {
                    found.remove(0);
                }
                found.push(pid);
                return Some(folder);
            }
        }
        None
    }
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn innermost(cwd: &std::path::Path, folders: &[PathBuf]) -> Option<usize> {
    let around = folders
        .iter()
        .enumerate()
        .filter(|(_, f)| cwd.starts_with(f));
    around
        .max_by_key(|(_, folder)| folder.as_os_str().len())
        .map(|(index, _)| index)
}

fn holds(pid: u32, socket: &str) -> bool {
    let Ok(files) = std::fs::read_dir(format!("/proc/{pid}/fd")) else {
        return false;
    };
    files
        .flatten()
        .any(|fd| std::fs::read_link(fd.path()).is_ok_and(|link| link.as_os_str() == socket))
}

/// Of this thread (`clock_gettime(2)`).
fn processor_time() -> Duration {
    use nix::time::{ClockId, clock_gettime};
    clock_gettime(ClockId::CLOCK_THREAD_CPUTIME_ID).map_or(Duration::ZERO, Duration::from)
}

#[cfg(not(target_os = "linux"))]
fn inode_of_client(_: Ends) -> Option<u64> {
    None
}

/// The inode of the client's socket. One made for IPv6 may hold an IPv4 connection
/// (ipv6(7)), as Java's do.
#[cfg(target_os = "linux")]
fn inode_of_client(ends: Ends) -> Option<u64> {
    sock_diag::inode(ends, false)
        .or_else(|| sock_diag::inode(ends, true))
        .filter(|inode| *inode != 0)
}

/// Asks the kernel for one socket. `/proc/net/tcp` would cost milliseconds: to write it, the
/// kernel walks its whole table of connections.
#[cfg(target_os = "linux")]
mod sock_diag {
    use std::net::{IpAddr, SocketAddr};
    use std::os::fd::AsRawFd;

    use nix::libc;
    use nix::sys::socket::{
        AddressFamily, MsgFlags, NetlinkAddr, SockFlag, SockProtocol, SockType, recv, sendto,
        socket,
    };

    use super::Ends;

    // linux/netlink.h, linux/sock_diag.h, linux/inet_diag.h
    const HEADER_BYTES: usize = 16;
    const REQUEST_BYTES: usize = HEADER_BYTES + 56;
    const SOCK_DIAG_BY_FAMILY: u16 = 20;
    const NLM_F_REQUEST: u16 = 1;
    const ALL_STATES: u32 = !0;
    const NO_COOKIE: [u8; 8] = [0xff; 8];
    /// Offset of `idiag_inode` in the answer.
    const INODE_AT: usize = HEADER_BYTES + 4 + 48 + 16;

    /// The inode of the socket at the client's end; with `mapped`, of one made for IPv6.
    pub(super) fn inode(ends: Ends, mapped: bool) -> Option<u64> {
        let socket = socket(
            AddressFamily::Netlink,
            SockType::Datagram,
            SockFlag::SOCK_CLOEXEC,
            SockProtocol::NetlinkSockDiag,
        )
        .ok()?;
        let kernel = NetlinkAddr::new(0, 0);
        let request = request(ends, mapped);
        sendto(socket.as_raw_fd(), &request, &kernel, MsgFlags::empty()).ok()?;
        let mut answer = [0; 512];
        let length = recv(socket.as_raw_fd(), &mut answer, MsgFlags::empty()).ok()?;
        inode_in(answer.get(..length)?)
    }

    fn request(ends: Ends, mapped: bool) -> Vec<u8> {
        let is_ipv6 = mapped || ends.client.is_ipv6();
        let family = if is_ipv6 {
            libc::AF_INET6
        } else {
            libc::AF_INET
        };
        let mut raw = Vec::with_capacity(REQUEST_BYTES);
        raw.extend(
            u32::try_from(REQUEST_BYTES)
                .unwrap_or_default()
                .to_ne_bytes(),
        );
        raw.extend(SOCK_DIAG_BY_FAMILY.to_ne_bytes());
        raw.extend(NLM_F_REQUEST.to_ne_bytes());
        raw.extend([0; 8]); // sequence, port: the only request of this socket
        let byte = |number: i32| u8::try_from(number).unwrap_or_default();
        raw.extend([byte(family), byte(libc::IPPROTO_TCP), 0, 0]);
        raw.extend(ALL_STATES.to_ne_bytes());
        raw.extend(ends.client.port().to_be_bytes());
        raw.extend(ends.proxy.port().to_be_bytes());
        raw.extend(sixteen_bytes(ends.client, mapped));
        raw.extend(sixteen_bytes(ends.proxy, mapped));
        raw.extend([0; 4]); // any interface
        raw.extend(NO_COOKIE);
        raw
    }

    fn sixteen_bytes(address: SocketAddr, mapped: bool) -> [u8; 16] {
        match address.ip() {
            IpAddr::V6(ip) => ip.octets(),
            IpAddr::V4(ip) if mapped => ip.to_ipv6_mapped().octets(),
            IpAddr::V4(ip) => {
                let mut bytes = [0; 16];
                bytes[..4].copy_from_slice(&ip.octets());
                bytes
            }
        }
    }

    /// None for an error, as where there is no such socket.
    fn inode_in(answer: &[u8]) -> Option<u64> {
        let kind = u16::from_ne_bytes(answer.get(4..6)?.try_into().ok()?);
        let inode = u32::from_ne_bytes(answer.get(INODE_AT..INODE_AT + 4)?.try_into().ok()?);
        (kind == SOCK_DIAG_BY_FAMILY).then_some(inode.into())
    }

    #[cfg(test)]
    mod tests {
        use super::*;

        #[test]
        fn a_request_has_the_length_it_says() {
            let ends = Ends {
                client: SocketAddr::from(([127, 0, 0, 1], 1)),
                proxy: SocketAddr::from(([127, 0, 0, 1], 2)),
            };
            assert_eq!(request(ends, false).len(), REQUEST_BYTES);
            assert_eq!(request(ends, true).len(), REQUEST_BYTES);
        }
    }
}

#[cfg(test)]
#[cfg(target_os = "linux")]
mod tests {
    use std::io::Write;
    use std::net::{TcpListener, TcpStream};

    use super::*;

    const LONG: Duration = Duration::from_secs(10);

    fn connected() -> (TcpStream, TcpListener, Ends) {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let client = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let ends = Ends {
            client: client.local_addr().unwrap(),
            proxy: listener.local_addr().unwrap(),
        };
        (client, listener, ends)
    }

    #[test]
    fn the_innermost_folder_of_the_clients_process_is_found() {
        let (_client, _listener, ends) = connected();
        let folders = ClientFolders::default();
        let here = std::env::current_dir().unwrap();
        let above = here.parent().unwrap().to_owned();
        let elsewhere = here.join("nowhere");
        let candidates = [elsewhere.clone(), here, above];
        assert_eq!(folders.folder_of(ends, &candidates, LONG), Some(1));
        // A process that was found before is found at once.
        assert_eq!(
            folders.folder_of(ends, &candidates, Duration::ZERO),
            Some(1)
        );
        assert_eq!(folders.folder_of(ends, &[elsewhere], LONG), None);
    }

    #[test]
    fn a_socket_made_for_ipv6_is_found_under_its_ipv4_address() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let proxy = listener.local_addr().unwrap();
        let mapped = std::net::Ipv4Addr::LOCALHOST.to_ipv6_mapped();
        let Ok(client) = TcpStream::connect((mapped, proxy.port())) else {
            let skipped =
                "skipped: a_socket_made_for_ipv6_is_found_under_its_ipv4_address: no IPv6";
            let _ = writeln!(std::io::stderr(), "{skipped}");
            return;
        };
        let (_accepted, seen) = listener.accept().unwrap();
        let ends = Ends {
            client: seen,
            proxy,
        };
        let here = [std::env::current_dir().unwrap()];
        let found = ClientFolders::default().folder_of(ends, &here, LONG);
        assert_eq!(found, Some(0));
        drop(client);
    }

    #[test]
    fn a_connection_that_is_nobodys_and_a_limit_that_is_over_find_nothing() {
        let (client, _listener, ends) = connected();
        let here = [std::env::current_dir().unwrap()];
        let folders = ClientFolders::default();
        assert_eq!(folders.folder_of(ends, &here, Duration::ZERO), None);
        let other = Ends {
            client: SocketAddr::new(ends.client.ip(), 1),
            ..ends
        };
        assert_eq!(folders.folder_of(other, &here, LONG), None);
        drop(client);
    }
}
