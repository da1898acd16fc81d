//! Reads what a subvolume's files hold from its tree, and later only what changed.
//!
//! Leaves of the tree bear the transaction that wrote them, and the kernel passes
//! over those older than is asked for. A file that changed has its inode written
//! again; a file that is gone, its folder's. So from the leaves written since a
//! transaction follows all that is different since. The same leads from a snapshot
//! to another of the same source, so that of a hundred branches one is read in full.
//!
//! btrfs keeps changes of inodes and folders back in memory until a transaction ends, and
//! data until it is written. Both reach the tree in the transaction that runs now or a
//! later one, and so the next look, which passes over older leaves only.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::os::fd::BorrowedFd;
use std::sync::Arc;

use nix::errno::Errno;

use super::ioctl::{Identity, Item, Key, Query, Searcher};
use super::pieces::{Chunk, Chunks, Piece};

/// Numbers of files: `BTRFS_FIRST_FREE_OBJECTID` to `BTRFS_LAST_FREE_OBJECTID`.
const FIRST_INODE: u64 = 256;
const LAST_INODE: u64 = 256_u64.wrapping_neg();

/// Kinds of items (`linux/btrfs_tree.h`).
const INODE_ITEM: u32 = 1;
const INODE_REF: u32 = 12;
const DIR_INDEX: u32 = 96;
const EXTENT_DATA: u32 = 108;

/// Pieces are kept in chunks of this much of a file: where one changes, the others stay shared.
const CHUNK_BYTES: u64 = 4 << 20;

/// What the tree says of a file or folder. Bytes.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Inode {
    /// The transaction that last changed it.
    changed: u64,
    size: u64,
    /// Allocated, as `st_blocks` counts.
    allocated: u64,
    links: u32,
    is_folder: bool,
    /// The folder it is in; 0 for none.
    parent: u64,
    /// By place in the file, in units of [`CHUNK_BYTES`].
    chunks: BTreeMap<u64, Chunk>,
}

/// What was found of an inode.
#[derive(Debug, Default)]
struct Found {
    inode: Option<Stat>,
    parent: Option<u64>,
    pieces: Vec<Piece>,
    /// Of a folder: the inodes in it.
    children: HashSet<u64>,
}

/// `struct btrfs_inode_item`, as far as it matters.
#[derive(Debug, Clone, Copy)]
struct Stat {
    changed: u64,
    size: u64,
    allocated: u64,
    links: u32,
    is_folder: bool,
}

/// A subvolume as it was when it was last read.
#[derive(Debug, Clone)]
pub(super) struct Subvolume {
    identity: Identity,
    inodes: HashMap<u64, Arc<Inode>>,
    /// The transaction that ran when it was read: what was written later is not older.
    since: u64,
}

/// What a look found different.
#[derive(Debug, Default)]
pub(super) struct Changes {
    /// Whether anything is.
    pub(super) any: bool,
    /// The inodes that may be.
    pub(super) inodes: BTreeSet<u64>,
}

/// A tree that is being read.
pub(super) struct Reader<'a> {
    pub(super) searcher: &'a mut Searcher,
    pub(super) chunks: &'a mut Chunks,
    /// Any file of the file system.
    pub(super) file: BorrowedFd<'a>,
    /// A transaction that no change from now on is older than.
    pub(super) running: u64,
}

impl Subvolume {
    pub(super) fn identity(&self) -> &Identity {
        &self.identity
    }

    /// Reads all of a subvolume.
    pub(super) fn read(reader: &mut Reader<'_>, identity: Identity) -> Result<Self, Errno> {
        let mut subvolume = Self {
            identity,
            inodes: HashMap::new(),
            since: reader.running,
        };
        for (number, found) in reader.find(identity.tree, FIRST_INODE..=LAST_INODE, 0)? {
            if let Some(inode) = found.into_inode(reader.chunks) {
                subvolume.inodes.insert(number, Arc::new(inode));
            }
        }
        Ok(subvolume)
    }

    /// The last transaction at which this subvolume and another were still the same tree.
    pub(super) fn parted_from(&self, identity: &Identity) -> Option<u64> {
        let source = identity.parent_uuid;
        let own = &self.identity;
        if source == [0; 16] {
            None
        } else if source == own.uuid {
            Some(identity.origin)
        } else if source == own.parent_uuid {
            Some(own.origin.min(identity.origin))
        } else {
            None
        }
    }

    /// Whether reading another by its difference from this one pays: all that changed here since
    /// they `parted` has to be read there.
    pub(super) fn is_near(&self, parted: u64) -> bool {
        let pieces = |inode: &Inode| inode.chunks.values().map(|c| c.len()).sum::<usize>();
        let (mut all, mut changed) = (0, 0);
        for inode in self.inodes.values() {
            let pieces = 1 + pieces(inode);
            all += pieces;
            if inode.changed >= parted {
                changed += pieces;
            }
        }
        changed * 3 < all
    }

    /// Reads a subvolume that was the same tree as this one up to the transaction `parted`.
    ///
    /// A change of this one that btrfs still keeps back may have been taken for the other's: once
    /// it is in the tree (see [`commit`](super::ioctl::commit)), the other must look at all inodes
    /// that [`Subvolume::refresh`] then names here.
    pub(super) fn sibling(
        &self,
        reader: &mut Reader<'_>,
        identity: Identity,
        parted: u64,
    ) -> Result<Self, Errno> {
        let mut sibling = Self {
            identity,
            inodes: self.inodes.clone(),
            since: parted,
        };
        let changed_here = self
            .inodes
            .iter()
            .filter(|(_, inode)| inode.changed >= parted)
            .map(|(number, _)| *number)
            .collect();
        sibling.refresh(reader, changed_here)?;
        Ok(sibling)
    }

    /// Reads what changed since this was last read, and each of the `suspects` anew.
    pub(super) fn refresh(
        &mut self,
        reader: &mut Reader<'_>,
        mut suspects: BTreeSet<u64>,
    ) -> Result<Changes, Errno> {
        let tree = self.identity.tree;
        let mut changes = Changes::default();
        for (number, found) in reader.find(tree, FIRST_INODE..=LAST_INODE, self.since)? {
            changes.inodes.insert(number);
            match self.inodes.get(&number) {
                Some(old) if !suspects.contains(&number) => {
                    match old.patched(&found, reader.chunks) {
                        Some(new) if new == **old => {}
                        // What is in a folder is read with the folder.
                        Some(new) if !new.is_folder => {
                            changes.any = true;
                            self.inodes.insert(number, Arc::new(new));
                        }
                        _ => drop(suspects.insert(number)),
                    }
                }
                _ => drop(suspects.insert(number)),
            }
        }
        // A deleted file that someone has open goes without any trace elsewhere.
        let unlinked = self.inodes.iter().filter(|(_, inode)| inode.links == 0);
        suspects.extend(unlinked.map(|(number, _)| *number));
        let mut looked_at = HashSet::new();
        while let Some(number) = suspects.pop_first() {
            if !looked_at.insert(number) {
                continue;
            }
            changes.inodes.insert(number);
            let found = reader.find(tree, number..=number, 0)?;
            let found = found.into_iter().next().map(|(_, found)| found);
            let children = found.as_ref().map(|found| found.children.clone());
            match found.and_then(|found| found.into_inode(reader.chunks)) {
                Some(new) => {
                    if new.is_folder {
                        let children = children.unwrap_or_default();
                        suspects.extend(self.moved(number, &children));
                    }
                    let old = self.inodes.insert(number, Arc::new(new));
                    changes.any |= old.as_ref() != self.inodes.get(&number);
                }
                None => {
                    if let Some(old) = self.inodes.remove(&number) {
                        changes.any = true;
                        if old.is_folder {
                            suspects.extend(self.moved(number, &HashSet::new()));
                        }
                    }
                }
            }
        }
        self.since = reader.running;
        Ok(changes)
    }

    /// Inodes of a folder that are new there, or no longer there.
    fn moved(&self, folder: u64, children: &HashSet<u64>) -> Vec<u64> {
        let gone = self
            .inodes
            .iter()
            .filter(|(number, inode)| inode.parent == folder && !children.contains(number))
            .map(|(number, _)| *number)
            // The top folder is in itself.
            .filter(|number| *number != folder);
        let new = children
            .iter()
            .filter(|number| !self.inodes.contains_key(number))
            .copied();
        gone.chain(new).collect()
    }

    /// Sum of the files' sizes as allocated.
    pub(super) fn logical_bytes(&self) -> u64 {
        self.inodes.values().map(|inode| inode.allocated).sum()
    }

    pub(super) fn chunks(&self) -> impl Iterator<Item = &Chunk> {
        self.inodes.values().flat_map(|inode| inode.chunks.values())
    }
}

impl Inode {
    /// This inode with what was found since; none if that isn't all there is to know.
    fn patched(&self, found: &Found, chunks: &mut Chunks) -> Option<Self> {
        let mut new = self.clone();
        if let Some(stat) = found.inode {
            if stat.is_folder != self.is_folder {
                return None;
            }
            (new.changed, new.size) = (stat.changed, stat.size);
            (new.allocated, new.links) = (stat.allocated, stat.links);
            if stat.links == 0 {
                new.parent = 0;
            }
        }
        if let Some(parent) = found.parent {
            new.parent = parent;
        }
        if new.size < self.size {
            let kept = new.size;
            new.cut_to(kept, chunks);
        }
        for of_chunk in found.pieces.chunk_by(|a, b| a.chunk() == b.chunk()) {
            let number = of_chunk[0].chunk();
            let old = new.chunks.get(&number).map_or(&[][..], |chunk| chunk);
            let all = overwritten(old, of_chunk);
            if all != old {
                let chunk = chunks.intern(&all);
                new.chunks.insert(number, chunk);
            }
        }
        // Holes that were punched leave no item behind. Whether there are any, the sum tells.
        let pieces = new.chunks.values().flat_map(|chunk| chunk.iter());
        let allocated: u64 = pieces.map(|piece| u64::from(piece.used)).sum();
        (new.is_folder || allocated == new.allocated).then_some(new)
    }

    fn cut_to(&mut self, size: u64, chunks: &mut Chunks) {
        let mut cut = self.chunks.split_off(&(size / CHUNK_BYTES));
        if let Some((number, first)) = cut.pop_first() {
            let kept: Vec<Piece> = first.iter().filter(|p| p.at < size).copied().collect();
            if !kept.is_empty() {
                self.chunks.insert(number, chunks.intern(&kept));
            }
        }
    }
}

impl Piece {
    fn chunk(&self) -> u64 {
        self.at / CHUNK_BYTES
    }
}

/// Pieces with newer ones laid over them, both in the order of the file. What the new ones
/// cover in part was written anew too, so it is among them.
fn overwritten(old: &[Piece], new: &[Piece]) -> Vec<Piece> {
    let mut all = Vec::with_capacity(old.len() + new.len());
    let mut old = old.iter().peekable();
    for piece in new {
        while let Some(before) = old.next_if(|o| o.at < piece.at) {
            all.push(*before);
        }
        while old.next_if(|o| o.at < piece.until()).is_some() {}
        all.push(*piece);
    }
    all.extend(old);
    all
}

impl Found {
    /// None where there is no such inode.
    fn into_inode(self, chunks: &mut Chunks) -> Option<Inode> {
        let stat = self.inode?;
        let by_chunk = self.pieces.chunk_by(|a, b| a.chunk() == b.chunk());
        Some(Inode {
            changed: stat.changed,
            size: stat.size,
            allocated: stat.allocated,
            links: stat.links,
            is_folder: stat.is_folder,
            parent: self.parent.unwrap_or(0),
            chunks: by_chunk
                .map(|pieces| (pieces[0].chunk(), chunks.intern(pieces)))
                .collect(),
        })
    }

    fn take(&mut self, item: &Item<'_>) {
        match item.key.kind {
            INODE_ITEM => self.inode = Stat::parse(item.data),
            INODE_REF => self.parent = Some(item.key.offset),
            DIR_INDEX => self.children.extend(u64_at(item.data, 0)),
            EXTENT_DATA => self.pieces.extend(piece(item)),
            _ => {}
        }
    }
}

impl Stat {
    fn parse(data: &[u8]) -> Option<Self> {
        let mode = u32_at(data, 52)?;
        Some(Self {
            changed: u64_at(data, 8)?,
            size: u64_at(data, 16)?,
            allocated: u64_at(data, 24)?,
            links: u32_at(data, 40)?,
            is_folder: mode & 0o170_000 == 0o040_000,
        })
    }
}

/// `struct btrfs_file_extent_item`. None for a hole.
fn piece(item: &Item<'_>) -> Option<Piece> {
    const INLINE: u8 = 0;
    let at = item.key.offset;
    let short = |bytes: u64| u32::try_from(bytes).ok();
    if *item.data.get(20)? == INLINE {
        return Some(Piece {
            at,
            start: 0,
            held: 0,
            used: short(u64_at(item.data, 8)?)?,
        });
    }
    let start = u64_at(item.data, 21)?;
    (start != 0).then_some(())?;
    Some(Piece {
        at,
        start,
        // The whole extent stays while any block of it is used.
        held: short(u64_at(item.data, 29)?)?,
        used: short(u64_at(item.data, 45)?)?,
    })
}

/// A subvolume that the file system's tree of trees names.
#[derive(Debug)]
pub(super) struct Listed {
    pub(super) identity: Identity,
    /// The last part of its path.
    pub(super) name: String,
}

/// All subvolumes of the file system but those that are being destroyed.
pub(super) fn list(searcher: &mut Searcher, file: BorrowedFd<'_>) -> Result<Vec<Listed>, Errno> {
    const ROOT_TREE: u64 = 1;
    const ROOT_ITEM: u32 = 132;
    const ROOT_BACKREF: u32 = 144;
    let query = Query {
        tree: ROOT_TREE,
        first: Key {
            object: FIRST_INODE,
            kind: ROOT_ITEM,
            offset: 0,
        },
        last: Key {
            object: LAST_INODE,
            kind: ROOT_BACKREF,
            offset: u64::MAX,
        },
        since: 0,
    };
    let mut listed: Vec<Listed> = Vec::new();
    searcher.search(file, query, |item| match item.key.kind {
        ROOT_ITEM => listed.extend(identity(&item).map(|identity| Listed {
            identity,
            name: String::new(),
        })),
        ROOT_BACKREF => {
            let named = listed
                .last_mut()
                .filter(|last| last.identity.tree == item.key.object);
            if let (Some(listed), Some(name)) = (named, item.data.get(18..)) {
                listed.name = String::from_utf8_lossy(name).into_owned();
            }
        }
        _ => {}
    })?;
    Ok(listed)
}

/// From `struct btrfs_root_item`; none if nothing refers to the tree any more.
fn identity(item: &Item<'_>) -> Option<Identity> {
    let uuid = |at: usize| item.data.get(at..at + 16)?.try_into().ok();
    let references = u32_at(item.data, 216)?;
    (references > 0).then_some(())?;
    Some(Identity {
        tree: item.key.object,
        uuid: uuid(247)?,
        parent_uuid: uuid(263)?,
        origin: u64_at(item.data, 303)?,
    })
}

fn u64_at(data: &[u8], at: usize) -> Option<u64> {
    Some(u64::from_le_bytes(data.get(at..at + 8)?.try_into().ok()?))
}

fn u32_at(data: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_le_bytes(data.get(at..at + 4)?.try_into().ok()?))
}

impl Reader<'_> {
    /// What there is of a range of inodes, in their order, in leaves written `since` a transaction.
    fn find(
        &mut self,
        tree: u64,
        inodes: std::ops::RangeInclusive<u64>,
        since: u64,
    ) -> Result<Vec<(u64, Found)>, Errno> {
        let query = Query {
            tree,
            first: Key {
                object: *inodes.start(),
                kind: 0,
                offset: 0,
            },
            last: Key {
                object: *inodes.end(),
                kind: u32::from(u8::MAX),
                offset: u64::MAX,
            },
            since,
        };
        let mut all = Vec::<(u64, Found)>::new();
        self.searcher
            .search(self.file, query, |item| match all.last_mut() {
                Some((number, found)) if *number == item.key.object => found.take(&item),
                _ => {
                    let mut found = Found::default();
                    found.take(&item);
                    all.push((item.key.object, found));
                }
            })?;
        Ok(all)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn piece(at: u64, start: u64, used: u32) -> Piece {
        Piece {
            at,
            start,
            held: used,
            used,
        }
    }

    #[test]
    fn newer_pieces_take_the_place_of_what_they_cover() {
        let old = [piece(0, 100, 8), piece(8, 200, 8), piece(16, 300, 8)];
        assert_eq!(overwritten(&old, &[]), old);
        assert_eq!(overwritten(&old, &old), old);
        // A write into the middle of the second: its rests are written anew.
        let new = [piece(8, 200, 2), piece(10, 900, 4), piece(14, 200, 2)];
        assert_eq!(
            overwritten(&old, &new),
            [old[0], new[0], new[1], new[2], old[2]]
        );
        assert_eq!(
            overwritten(&old, &[piece(4, 7, 12)]),
            [old[0], piece(4, 7, 12), old[2]]
        );
        assert_eq!(overwritten(&[], &[piece(4, 7, 12)]), [piece(4, 7, 12)]);
    }

    #[test]
    fn a_patch_that_does_not_add_up_is_refused() {
        let mut chunks = Chunks::default();
        let inode = Inode {
            changed: 5,
            size: 3 * CHUNK_BYTES,
            allocated: 12,
            links: 1,
            is_folder: false,
            parent: 256,
            chunks: [
                (0, chunks.intern(&[piece(0, 100, 4)])),
                (1, chunks.intern(&[piece(CHUNK_BYTES, 200, 4)])),
                (2, chunks.intern(&[piece(2 * CHUNK_BYTES, 300, 4)])),
            ]
            .into(),
        };
        let found = |allocated, size, pieces: &[Piece]| Found {
            inode: Some(Stat {
                changed: 6,
                size,
                allocated,
                links: 1,
                is_folder: false,
            }),
            pieces: pieces.into(),
            ..Found::default()
        };
        let written = found(12, inode.size, &[piece(0, 900, 4)]);
        let new = inode.patched(&written, &mut chunks).unwrap();
        assert_eq!(new.chunks[&0][..], [piece(0, 900, 4)]);
        assert!(Arc::ptr_eq(&new.chunks[&1], &inode.chunks[&1]));
        let cut = found(8, CHUNK_BYTES + 4, &[]);
        let new = inode.patched(&cut, &mut chunks).unwrap();
        assert_eq!(new.chunks.keys().copied().collect::<Vec<_>>(), [0, 1]);
        // A hole: less is allocated than the pieces say.
        let punched = found(8, inode.size, &[]);
        assert_eq!(inode.patched(&punched, &mut chunks), None);
    }
}
