//! The calls that tell where data lies, and nothing else.
//!
//! Numbers and layouts are those of `linux/btrfs.h`, `linux/btrfs_tree.h` and
//! `linux/fiemap.h`; see the kernel's `Documentation/filesystems/fiemap.rst`.
#![expect(unsafe_code, reason = "ioctl(2) is untyped; its only callers are here")]

use std::os::fd::{AsRawFd, BorrowedFd};
use std::time::Duration;

use nix::errno::Errno;

const BTRFS_MAGIC: u8 = 0x94;

// ---- FS_IOC_FIEMAP ------------------------------------------------------------------------

/// Extents asked for by one call: 14 KiB of buffer.
const EXTENTS: usize = 256;

/// `struct fiemap` with its trailing array.
#[repr(C)]
struct Fiemap {
    start: u64,
    length: u64,
    flags: u32,
    mapped_extents: u32,
    extent_count: u32,
    reserved: u32,
    extents: [Extent; EXTENTS],
}

/// `struct fiemap_extent`. Bytes.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Extent {
    pub(super) logical: u64,
    pub(super) physical: u64,
    pub(super) length: u64,
    reserved64: [u64; 2],
    flags: u32,
    reserved: [u32; 3],
}

const SYNC: u32 = 0x1;
const EXTENT_LAST: u32 = 0x1;
/// Not on disk yet, so nowhere (`UNKNOWN`, which `DELALLOC` brings with it).
const EXTENT_UNKNOWN: u32 = 0x2;
/// Compressed: longer than what it takes.
const EXTENT_ENCODED: u32 = 0x8;
/// The data lies in the metadata, as small files' does.
const EXTENT_INLINE: u32 = 0x200;

impl Extent {
    /// Whether it takes room of its own, at a known place.
    pub(super) fn has_place(&self) -> bool {
        self.flags & (EXTENT_UNKNOWN | EXTENT_INLINE) == 0 && self.length > 0
    }

    pub(super) fn is_encoded(&self) -> bool {
        self.flags & EXTENT_ENCODED != 0
    }
}

// ---- BTRFS_IOC_GET_SUBVOL_INFO --------------------------------------------------------------

/// `struct btrfs_ioctl_get_subvol_info_args`.
#[repr(C)]
struct SubvolInfo {
    treeid: u64,
    name: [u8; 256],
    parent_id: u64,
    dirid: u64,
    generation: u64,
    flags: u64,
    uuid: [u8; 16],
    parent_uuid: [u8; 16],
    received_uuid: [u8; 16],
    ctransid: u64,
    otransid: u64,
    stransid: u64,
    rtransid: u64,
    ctime: Timespec,
    otime: Timespec,
    stime: Timespec,
    rtime: Timespec,
    reserved: [u64; 8],
}

/// `struct btrfs_ioctl_timespec`, with the room that aligning it leaves.
#[repr(C)]
#[derive(Clone, Copy)]
struct Timespec {
    sec: u64,
    nsec: u32,
    unused: u32,
}

// ---- BTRFS_IOC_FS_INFO ----------------------------------------------------------------------

/// `struct btrfs_ioctl_fs_info_args`.
#[repr(C)]
struct FsInfo {
    max_id: u64,
    num_devices: u64,
    fsid: [u8; 16],
    sizes: [u32; 3],
    csum_type: u16,
    csum_size: u16,
    /// What is wanted, then what is told.
    flags: u64,
    generation: u64,
    rest: [u64; 120],
}

const GENERATION: u64 = 0x2;

// ---- BTRFS_IOC_TREE_SEARCH_V2 ---------------------------------------------------------------

/// Room for found items: more than the largest item (one node, 64 KiB at most), and
/// little enough for the kernel, which touches all of it again for each leaf.
const FOUND_BYTES: usize = 128 << 10;

/// `struct btrfs_ioctl_search_key`.
#[repr(C)]
struct SearchKey {
    tree_id: u64,
    min_objectid: u64,
    max_objectid: u64,
    min_offset: u64,
    max_offset: u64,
    min_transid: u64,
    max_transid: u64,
    min_type: u32,
    max_type: u32,
    nr_items: u32,
    unused: u32,
    unused_too: [u64; 4],
}

/// `struct btrfs_ioctl_search_args_v2` with its trailing buffer.
#[repr(C)]
struct SearchArgs {
    key: SearchKey,
    buf_size: u64,
    found: [u8; FOUND_BYTES],
}

/// Bytes of `struct btrfs_ioctl_search_header`: transid, objectid, offset, type, length.
const ITEM_HEADER: usize = 32;

mod raw {
    use super::{BTRFS_MAGIC, Fiemap, FsInfo, SearchArgs, SubvolInfo};

    // The number counts `struct fiemap` without its array: 32 bytes.
    nix::ioctl_readwrite_bad!(fiemap, nix::request_code_readwrite!(b'f', 11, 32), Fiemap);
    nix::ioctl_read!(get_subvol_info, BTRFS_MAGIC, 60, SubvolInfo);
    nix::ioctl_readwrite_bad!(
        fs_info,
        nix::request_code_read!(BTRFS_MAGIC, 31, 1024),
        FsInfo
    );
    nix::ioctl_read!(start_sync, BTRFS_MAGIC, 24, u64);
    nix::ioctl_write_ptr!(wait_sync, BTRFS_MAGIC, 22, u64);
    // And the arguments without their buffer: 112 bytes.
    nix::ioctl_readwrite_bad!(
        tree_search_v2,
        nix::request_code_readwrite!(BTRFS_MAGIC, 17, 112),
        SearchArgs
    );
}

/// The extents of a file in order of their place in it (`FS_IOC_FIEMAP`). With `sync`
/// what is not on disk yet is written first.
pub(super) fn extents(
    file: BorrowedFd<'_>,
    sync: bool,
    mut each: impl FnMut(&Extent),
) -> Result<(), Errno> {
    let mut map = Fiemap {
        start: 0,
        length: u64::MAX,
        flags: if sync { SYNC } else { 0 },
        mapped_extents: 0,
        extent_count: 256,
        reserved: 0,
        extents: [Extent::default(); EXTENTS],
    };
    loop {
        // SAFETY: the descriptor is open for the call's time; `map` has the layout the number
        // promises, and `extent_count` is the room its array has, so the kernel writes inside it.
        unsafe { raw::fiemap(file.as_raw_fd(), &raw mut map) }?;
        let mapped = usize::try_from(map.mapped_extents).map_or(EXTENTS, |n| n.min(EXTENTS));
        map.extents[..mapped].iter().for_each(&mut each);
        match map.extents[..mapped].last() {
            Some(last) if last.flags & EXTENT_LAST == 0 => {
                map.start = last.logical.saturating_add(last.length);
                map.length = u64::MAX - map.start;
                map.flags = 0;
            }
            _ => return Ok(()),
        }
    }
}

/// Which subvolume a folder belongs to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Identity {
    pub(super) tree: u64,
    pub(super) uuid: [u8; 16],
    /// Of the subvolume that this was a snapshot of; zeros for none.
    pub(super) parent_uuid: [u8; 16],
    /// The transaction that made it.
    pub(super) origin: u64,
}

/// What subvolume a folder is in, and when that was made
/// (`BTRFS_IOC_GET_SUBVOL_INFO`, Linux 4.18; no privileges needed).
pub(super) fn identity(folder: BorrowedFd<'_>) -> Result<(Identity, Duration), Errno> {
    let never = Timespec {
        sec: 0,
        nsec: 0,
        unused: 0,
    };
    let mut info = SubvolInfo {
        treeid: 0,
        name: [0; 256],
        parent_id: 0,
        dirid: 0,
        generation: 0,
        flags: 0,
        uuid: [0; 16],
        parent_uuid: [0; 16],
        received_uuid: [0; 16],
        ctransid: 0,
        otransid: 0,
        stransid: 0,
        rtransid: 0,
        ctime: never,
        otime: never,
        stime: never,
        rtime: never,
        reserved: [0; 8],
    };
    // SAFETY: the descriptor is open for the call's time, and `info` has the layout and size that
    // the number promises, so the kernel writes inside it.
    unsafe { raw::get_subvol_info(folder.as_raw_fd(), &raw mut info) }?;
    let identity = Identity {
        tree: info.treeid,
        uuid: info.uuid,
        parent_uuid: info.parent_uuid,
        origin: info.otransid,
    };
    Ok((identity, Duration::new(info.otime.sec, info.otime.nsec)))
}

/// Ends the running transaction, so that what is kept back in memory is in the trees
/// (`BTRFS_IOC_START_SYNC`, `BTRFS_IOC_WAIT_SYNC`), and says which that was. Data is not written
/// because of it.
pub(super) fn commit(file: BorrowedFd<'_>) -> Result<u64, Errno> {
    let mut transaction = 0;
    // SAFETY: the descriptor is open for the call's time, and the kernel writes the one number.
    unsafe { raw::start_sync(file.as_raw_fd(), &raw mut transaction) }?;
    // SAFETY: the descriptor is open for the call's time, and the kernel reads the one number.
    unsafe { raw::wait_sync(file.as_raw_fd(), &raw const transaction) }?;
    Ok(transaction)
}

/// The newest transaction that was begun (`BTRFS_IOC_FS_INFO`). Older ones change nothing any more.
pub(super) fn running(file: BorrowedFd<'_>) -> Result<u64, Errno> {
    let mut info = FsInfo {
        max_id: 0,
        num_devices: 0,
        fsid: [0; 16],
        sizes: [0; 3],
        csum_type: 0,
        csum_size: 0,
        flags: GENERATION,
        generation: 0,
        rest: [0; 120],
    };
    // SAFETY: the descriptor is open for the call's time, and `info` has the layout and size that
    // the number promises, so the kernel writes inside it.
    unsafe { raw::fs_info(file.as_raw_fd(), &raw mut info) }?;
    if info.flags & GENERATION == 0 {
        // Linux before 5.10 doesn't tell; what it ends now, it has begun.
        return commit(file);
    }
    Ok(info.generation)
}

/// A key of a btrfs tree; keys are ordered as the fields are.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Key {
    pub(super) object: u64,
    pub(super) kind: u32,
    pub(super) offset: u64,
}

impl Key {
    fn next(self) -> Option<Self> {
        let Self {
            object,
            kind,
            offset,
        } = self;
        let kinds = u32::from(u8::MAX);
        match (offset.checked_add(1), kind.cmp(&kinds)) {
            (Some(offset), _) => Some(Self { offset, ..self }),
            (None, std::cmp::Ordering::Less) => Some(Self {
                object,
                kind: kind + 1,
                offset: 0,
            }),
            (None, _) => Some(Self {
                object: object.checked_add(1)?,
                kind: 0,
                offset: 0,
            }),
        }
    }
}

/// An item of a btrfs tree.
#[derive(Debug)]
pub(super) struct Item<'a> {
    pub(super) key: Key,
    pub(super) data: &'a [u8],
}

/// What to look for: keys from `first` to `last` in a tree, 0 for the one of the descriptor's
/// file. Leaves that were written before the transaction `since` are passed over unread.
#[derive(Debug, Clone, Copy)]
pub(super) struct Query {
    pub(super) tree: u64,
    pub(super) first: Key,
    pub(super) last: Key,
    pub(super) since: u64,
}

/// Reads btrfs trees (`BTRFS_IOC_TREE_SEARCH_V2`, which needs `CAP_SYS_ADMIN`).
pub(super) struct Searcher(Box<SearchArgs>);

impl Searcher {
    #[expect(
        clippy::large_stack_arrays,
        reason = "it moves to the heap, and threads have 2 MiB"
    )]
    pub(super) fn new() -> Self {
        Self(Box::new(SearchArgs {
            key: SearchKey {
                tree_id: 0,
                min_objectid: 0,
                max_objectid: 0,
                min_offset: 0,
                max_offset: 0,
                min_transid: 0,
                max_transid: u64::MAX,
                min_type: 0,
                max_type: 0,
                nr_items: 0,
                unused: 0,
                unused_too: [0; 4],
            },
            buf_size: 0,
            found: [0; FOUND_BYTES],
        }))
    }

    /// Shows `each` item in the order of keys. The tree may change meanwhile.
    pub(super) fn search(
        &mut self,
        file: BorrowedFd<'_>,
        query: Query,
        mut each: impl FnMut(Item<'_>),
    ) -> Result<(), Errno> {
        let mut first = Some(query.first);
        while let Some(from) = first.filter(|first| *first <= query.last) {
            self.0.key = SearchKey {
                tree_id: query.tree,
                min_objectid: from.object,
                max_objectid: query.last.object,
                min_offset: from.offset,
                max_offset: query.last.offset,
                min_transid: query.since,
                max_transid: u64::MAX,
                min_type: from.kind,
                max_type: query.last.kind,
                nr_items: u32::MAX,
                unused: 0,
                unused_too: [0; 4],
            };
            self.0.buf_size = FOUND_BYTES as u64;
            // SAFETY: the descriptor is open for the call's time; the arguments have the layout the
            // number promises, and `buf_size` is the room that follows them, so the kernel writes
            // inside it.
            unsafe { raw::tree_search_v2(file.as_raw_fd(), &raw mut *self.0) }?;
            let mut last = None;
            let mut found = &self.0.found[..];
            for _ in 0..self.0.key.nr_items {
                let Some((item, rest)) = take_item(found) else {
                    return Err(Errno::EOVERFLOW);
                };
                last = Some(item.key);
                found = rest;
                each(item);
            }
            first = last.and_then(Key::next);
        }
        Ok(())
    }
}

/// The first item of what was found, and the rest.
fn take_item(found: &[u8]) -> Option<(Item<'_>, &[u8])> {
    let (header, rest) = found.split_at_checked(ITEM_HEADER)?;
    let word = |at: usize| Some(u64::from_ne_bytes(header.get(at..at + 8)?.try_into().ok()?));
    let half = |at: usize| Some(u32::from_ne_bytes(header.get(at..at + 4)?.try_into().ok()?));
    let (data, rest) = rest.split_at_checked(usize::try_from(half(28)?).ok()?)?;
    let key = Key {
        object: word(8)?,
        kind: half(24)?,
        offset: word(16)?,
    };
    Some((Item { key, data }, rest))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn structures_have_the_kernels_sizes() {
        assert_eq!(size_of::<Extent>(), 56);
        assert_eq!(size_of::<Fiemap>(), 32 + 56 * EXTENTS);
        assert_eq!(size_of::<SubvolInfo>(), 504);
        assert_eq!(size_of::<FsInfo>(), 1024);
        assert_eq!(size_of::<SearchKey>(), 104);
        assert_eq!(size_of::<SearchArgs>(), 112 + FOUND_BYTES);
    }

    #[test]
    fn the_key_after_the_last_offset_is_of_the_next_kind_or_object() {
        let key = |object, kind, offset| Key {
            object,
            kind,
            offset,
        };
        assert_eq!(key(1, 2, 3).next(), Some(key(1, 2, 4)));
        assert_eq!(key(1, 2, u64::MAX).next(), Some(key(1, 3, 0)));
        assert_eq!(key(1, 255, u64::MAX).next(), Some(key(2, 0, 0)));
        assert_eq!(key(u64::MAX, 255, u64::MAX).next(), None);
    }

    #[test]
    fn an_item_that_is_cut_off_is_none() {
        let mut found = vec![0; ITEM_HEADER + 3];
        found[28] = 3;
        assert_eq!(take_item(&found).unwrap().0.data.len(), 3);
        assert!(take_item(&found[..ITEM_HEADER + 2]).is_none());
        assert!(take_item(&found[..ITEM_HEADER - 1]).is_none());
    }
}
