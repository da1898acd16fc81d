//! Reads what a folder's files hold, file by file, and later only the changed ones.
//!
//! A file's place on disk changes only when the file is written, and then its change
//! time does too. So what was read stays right while inode, times and size are the
//! same, whatever is written into other files that share the blocks. Only a file
//! that was changed a moment ago may have data that has no place yet.

use std::collections::HashMap;
use std::fs::{self, File, Metadata};
use std::io::ErrorKind;
use std::os::fd::AsFd;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use super::ioctl;
use super::pieces::{Chunk, Chunks, Piece};
use super::{allocated_bytes, walk};
use crate::storage::StorageError;

/// What was written longer ago than this the kernel has put on disk by itself (30 s, and 5 until
/// it looks: `vm.dirty_expire_centisecs`). To be sure, what is left is written before an older
/// file is read; that of younger files isn't, so that nobody is disturbed.
pub(super) const SETTLES_SECONDS: i64 = 35;

/// Pieces are no longer than this, so that their length fits.
const PIECE_BYTES: u64 = 1 << 30;

/// Tells whether a file is the one that was read. Times in nanoseconds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) struct Stamp {
    inode: u64,
    changed: (i64, i64),
    modified: (i64, i64),
    size: u64,
    allocated: u64,
}

impl Stamp {
    /// When the file was last changed, since 1970.
    pub(super) fn changed(&self) -> Duration {
        let (seconds, nanoseconds) = self.changed;
        let known = (u64::try_from(seconds), u32::try_from(nanoseconds));
        match known {
            (Ok(seconds), Ok(nanoseconds)) => Duration::new(seconds, nanoseconds),
            _ => Duration::ZERO,
        }
    }

    fn of(meta: &Metadata) -> Self {
        Self {
            inode: meta.ino(),
            changed: (meta.ctime(), meta.ctime_nsec()),
            modified: (meta.mtime(), meta.mtime_nsec()),
            size: meta.len(),
            allocated: allocated_bytes(meta),
        }
    }
}

#[derive(Debug, Clone)]
struct Known {
    stamp: Stamp,
    chunk: Chunk,
    /// Whether it holds until the stamp changes.
    settled: bool,
}

/// A volume's files as they were when they were last looked at, by inode.
#[derive(Debug, Clone, Default)]
pub(super) struct Files(HashMap<u64, Known>);

/// What was found of a file: as before, or read.
enum Found {
    Same,
    Read { pieces: Vec<Piece>, settled: bool },
}

/// What was found of a volume.
pub(super) struct Looked(Vec<(Stamp, Found)>);

impl Files {
    /// Looks at all files below `root`, taking those for settled that didn't change for `settles`
    /// seconds. `twin` may know a file with the very same stamp.
    pub(super) fn look(
        &self,
        root: &Path,
        settles: i64,
        twin: &(dyn Fn(&Stamp) -> Option<Chunk> + Sync),
    ) -> Result<Looked, StorageError> {
        let now = SystemTime::now().duration_since(UNIX_EPOCH);
        let now = now.map_or(0, |now| i64::try_from(now.as_secs()).unwrap_or(i64::MAX));
        let mut looked = Vec::with_capacity(self.0.len());
        walk(root, |path, meta| {
            let stamp = Stamp::of(meta);
            let same = |known: &Known| known.settled && known.stamp == stamp;
            if self.0.get(&stamp.inode).is_some_and(same) {
                looked.push((stamp, Found::Same));
                return Ok(());
            }
            let settled = now.saturating_sub(stamp.changed.0) > settles;
            let pieces = match twin(&stamp) {
                Some(chunk) => chunk.to_vec(),
                None if stamp.allocated == 0 => Vec::new(),
                None => match read(path, settled)? {
                    Some(pieces) => pieces,
                    // Gone meanwhile.
                    None => return Ok(()),
                },
            };
            looked.push((stamp, Found::Read { pieces, settled }));
            Ok(())
        })?;
        Ok(Looked(looked))
    }

    /// Takes over what was found, and says whether it is different.
    pub(super) fn take(&mut self, looked: Looked, chunks: &mut Chunks) -> bool {
        let mut new = HashMap::with_capacity(looked.0.len());
        let mut differs = false;
        for (stamp, found) in looked.0 {
            let old = self.0.remove(&stamp.inode);
            let known = match (found, old) {
                (Found::Same, Some(old)) => old,
                (Found::Same, None) => continue,
                (Found::Read { pieces, settled }, old) => {
                    let chunk = chunks.intern(&pieces);
                    differs |= old.is_none_or(|old| {
                        old.chunk != chunk || old.stamp.allocated != stamp.allocated
                    });
                    Known {
                        stamp,
                        chunk,
                        settled,
                    }
                }
            };
            // A file with two names is one file.
            new.insert(stamp.inode, known);
        }
        differs |= !self.0.is_empty();
        self.0 = new;
        differs
    }

    /// The files that are known for good.
    pub(super) fn settled(&self) -> impl Iterator<Item = (&Stamp, &Chunk)> {
        let settled = self.0.values().filter(|known| known.settled);
        settled.map(|known| (&known.stamp, &known.chunk))
    }

    /// Sum of the files' sizes as allocated.
    pub(super) fn logical_bytes(&self) -> u64 {
        self.0.values().map(|known| known.stamp.allocated).sum()
    }

    pub(super) fn chunks(&self) -> impl Iterator<Item = &Chunk> {
        self.0.values().map(|known| &known.chunk)
    }
}

/// A file's pieces; none if the file is gone.
fn read(path: &Path, sync: bool) -> Result<Option<Vec<Piece>>, StorageError> {
    let file = match open(path) {
        Ok(file) => file,
        Err(e) if e.kind() == ErrorKind::NotFound => return Ok(None),
        Err(e) => return Err(StorageError::io("open", path)(e)),
    };
    let mut pieces = Vec::new();
    let mut encoded = false;
    ioctl::extents(file.as_fd(), sync, |extent| {
        if !extent.has_place() {
            return;
        }
        encoded |= extent.is_encoded();
        let end = extent.physical.saturating_add(extent.length);
        let mut start = extent.physical;
        while start < end {
            // Cut at the same places whoever has the blocks.
            let cut = (start / PIECE_BYTES + 1)
                .saturating_mul(PIECE_BYTES)
                .min(end);
            let length = u32::try_from(cut - start).expect("PIECE_BYTES at most");
            pieces.push(Piece {
                at: extent.logical + (start - extent.physical),
                start,
                held: length,
                used: length,
            });
            start = cut;
        }
    })
    .map_err(|e| StorageError::io("read the extents of", path)(e.into()))?;
    if encoded {
        clip(&mut pieces);
    }
    Ok(Some(pieces))
}

fn open(path: &Path) -> std::io::Result<File> {
    use std::os::unix::fs::OpenOptionsExt;
    fs::OpenOptions::new()
        .read(true)
        .custom_flags((nix::fcntl::OFlag::O_NOFOLLOW | nix::fcntl::OFlag::O_NONBLOCK).bits())
        .open(path)
}

/// Compressed extents are told with the length they have unpacked: each ends where the
/// next one on disk begins, if not before.
fn clip(pieces: &mut [Piece]) {
    let mut order: Vec<usize> = (0..pieces.len()).collect();
    order.sort_unstable_by_key(|i| pieces[*i].start);
    for pair in order.windows(2) {
        let next = pieces[pair[1]].start;
        let piece = &mut pieces[pair[0]];
        if piece.start < next && next < piece.end() {
            piece.held = u32::try_from(next - piece.start).expect("less than a piece");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_compressed_extent_ends_where_the_next_begins() {
        let piece = |start, held| Piece {
            at: 0,
            start,
            held,
            used: 128,
        };
        let mut pieces = [piece(100, 128), piece(40, 128), piece(500, 128)];
        clip(&mut pieces);
        assert_eq!(pieces, [piece(100, 128), piece(40, 60), piece(500, 128)]);
    }
}
