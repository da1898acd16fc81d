//! Where the data of files lies, kept once however many files say the same.

use std::collections::HashSet;
use std::sync::Arc;

/// A part of a file's data on disk. Bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(super) struct Piece {
    /// Where in the file it begins.
    pub(super) at: u64,
    /// Where on the file system: an address, the same for all that share it.
    pub(super) start: u64,
    /// What is held there because of this piece. 0 for data inside the metadata.
    pub(super) held: u32,
    /// What the file has of it.
    pub(super) used: u32,
}

impl Piece {
    pub(super) fn end(&self) -> u64 {
        self.start + u64::from(self.held)
    }

    /// What lies past the piece in the file.
    pub(super) fn until(&self) -> u64 {
        self.at + u64::from(self.used)
    }
}

/// Pieces of one file in the order of the file, shared by all files that have just these.
pub(super) type Chunk = Arc<[Piece]>;

/// Finds equal chunks, so that each is in memory, and looked at, once.
#[derive(Debug, Default)]
pub(super) struct Chunks(HashSet<Chunk>);

impl Chunks {
    pub(super) fn intern(&mut self, pieces: &[Piece]) -> Chunk {
        if let Some(known) = self.0.get(pieces) {
            return known.clone();
        }
        let new: Chunk = pieces.into();
        self.0.insert(new.clone());
        new
    }

    /// Forgets chunks that nobody has any more.
    pub(super) fn sweep(&mut self) {
        self.0.retain(|chunk| Arc::strong_count(chunk) > 1);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn equal_chunks_are_one_until_nobody_has_it() {
        let mut chunks = Chunks::default();
        let piece = Piece {
            at: 0,
            start: 4096,
            held: 4096,
            used: 4096,
        };
        let (a, b) = (chunks.intern(&[piece]), chunks.intern(&[piece]));
        assert!(Arc::ptr_eq(&a, &b));
        drop((a, b));
        chunks.sweep();
        assert!(chunks.0.is_empty());
    }
}
