//! Brings one file to equality with another, writing only the blocks that differ.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;

use super::super::files::file::next_data;

/// What is compared and written in one piece: PostgreSQL's page (`BLCKSZ`).
pub(super) const BLOCK: usize = 8192;
const BLOCK_BYTES: u64 = BLOCK as u64;

/// What is read in one piece.
const CHUNK: usize = 1 << 20;

/// Makes `to` like `from` and says which parts that took. `step` gets the bytes looked at.
/// All other parts were compared and found equal, if nobody changed `from` meanwhile.
///
/// Parts that were never written in `from` become such parts in `to`. What has data
/// in `from` gets data in `to`, even zeros: postgres counts on room that it has filled.
pub(super) fn bring_over(
    from: &File,
    to: &File,
    step: &dyn Fn(u64),
) -> io::Result<Vec<Range<u64>>> {
    let len = from.metadata()?.len();
    if to.metadata()?.len() != len {
        to.set_len(len)?;
    }
    let (mut ours, mut theirs) = (vec![0; CHUNK], vec![0; CHUNK]);
    let (mut at, mut written) = (0, Vec::new());
    while at < len {
        let (start, end) = next_data(from, at, len)?.unwrap_or((len, len));
        clear(to, at..start)?;
        at = start;
        while at < end {
            let wanted = usize::try_from(end - at).map_or(CHUNK, |left| left.min(CHUNK));
            let found = read_at(from, &mut ours[..wanted], at)?;
            if found == 0 {
                // The source has shrunk; a source at rest doesn't.
                to.set_len(at)?;
                return Ok(written);
            }
            let (ours, theirs) = (&ours[..found], &mut theirs[..found]);
            let next = at + found as u64;
            if next_data(to, at, next)?.is_none() {
                to.write_all_at(ours, at)?;
                written.push(at..next);
            } else {
                let there = read_at(to, theirs, at)?;
                theirs[there..].fill(0);
                for range in differing(ours, theirs, at) {
                    let start = at + range.start as u64;
                    written.push(start..start + range.len() as u64);
                    to.write_all_at(&ours[range], start)?;
                }
            }
            step(found as u64);
            at = next;
        }
    }
    Ok(written)
}

/// Whether two files have the same bytes in some parts.
pub(super) fn are_equal_in(one: &File, other: &File, parts: &[Range<u64>]) -> io::Result<bool> {
    let (mut ours, mut theirs) = (vec![0; CHUNK], vec![0; CHUNK]);
    for part in parts {
        let mut at = part.start;
        while at < part.end {
            let wanted = usize::try_from(part.end - at).map_or(CHUNK, |left| left.min(CHUNK));
            let found = read_at(one, &mut ours[..wanted], at)?;
            let there = read_at(other, &mut theirs[..wanted], at)?;
            if found != wanted || there != wanted || ours[..wanted] != theirs[..wanted] {
                return Ok(false);
            }
            at += wanted as u64;
        }
    }
    Ok(true)
}

/// Reads until the buffer is full or the file ends.
pub(super) fn read_at(file: &File, buffer: &mut [u8], at: u64) -> io::Result<usize> {
    let mut done = 0;
    while done < buffer.len() {
        match file.read_at(&mut buffer[done..], at + done as u64) {
            Ok(0) => break,
            Ok(n) => done += n,
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) => return Err(e),
        }
    }
    Ok(done)
}

/// The parts in which two pieces that lie at `at` in their files differ, to whole blocks of
/// the files; neighbours joined.
fn differing(ours: &[u8], theirs: &[u8], at: u64) -> Vec<Range<usize>> {
    let mut found: Vec<Range<usize>> = Vec::new();
    let mut start = 0;
    while start < ours.len() {
        let into_block = usize::try_from((at + start as u64) % BLOCK_BYTES).unwrap_or(0);
        let end = (start + BLOCK - into_block).min(ours.len());
        if ours[start..end] != theirs[start..end] {
            match found.last_mut() {
                Some(last) if last.end == start => last.end = end,
                _ => found.push(start..end),
            }
        }
        start = end;
    }
    found
}

/// Makes a part of a file read as zeros, as a hole where that can be.
fn clear(file: &File, part: Range<u64>) -> io::Result<()> {
    let mut at = part.start;
    while at < part.end {
        let Some((start, end)) = next_data(file, at, part.end)? else {
            return Ok(());
        };
        if !punch(file, start..end)? {
            let zeros = vec![0; CHUNK];
            let mut at = start;
            while at < end {
                let n = usize::try_from(end - at).map_or(CHUNK, |left| left.min(CHUNK));
                file.write_all_at(&zeros[..n], at)?;
                at += n as u64;
            }
        }
        at = end;
    }
    Ok(())
}

/// Takes the blocks away from a part of a file (`fallocate(2)`). False where the file
/// system can't.
#[cfg(target_os = "linux")]
fn punch(file: &File, part: Range<u64>) -> io::Result<bool> {
    use nix::errno::Errno;
    use nix::fcntl::{FallocateFlags, fallocate};
    let position = |n: u64| i64::try_from(n).map_err(|_| io::Error::from(Errno::EOVERFLOW));
    let (start, length) = (position(part.start)?, position(part.end - part.start)?);
    let flags = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
    match fallocate(file, flags, start, length) {
        Ok(()) => Ok(true),
        Err(Errno::EOPNOTSUPP | Errno::ENOSYS) => Ok(false),
        Err(e) => Err(e.into()),
    }
}

#[cfg(not(target_os = "linux"))]
#[expect(
    clippy::unnecessary_wraps,
    reason = "the same signature on every system"
)]
fn punch(_file: &File, _part: Range<u64>) -> io::Result<bool> {
    Ok(false)
}

#[cfg(test)]
mod tests {
    use super::super::super::usage::allocated_bytes;
    use super::*;

    fn file(content: &[u8]) -> File {
        let file = tempfile::tempfile().unwrap();
        file.write_all_at(content, 0).unwrap();
        file
    }

    fn pattern(len: usize, seed: usize) -> Vec<u8> {
        let bytes = (0..251).cycle().step_by(7).skip(seed);
        bytes.take(len).collect()
    }

    /// Brings over, and says how many bytes were written.
    fn bring(from: &File, to: &File) -> u64 {
        let parts = bring_over(from, to, &|_| {}).unwrap();
        assert!(are_equal_in(from, to, &parts).unwrap());
        parts.iter().map(|part| part.end - part.start).sum()
    }

    fn are_equal(one: &File, other: &File) -> bool {
        let len = one.metadata().unwrap().len();
        #[expect(clippy::single_range_in_vec_init, reason = "one part: all of it")]
        let all = [0..len];
        len == other.metadata().unwrap().len() && are_equal_in(one, other, &all).unwrap()
    }

    #[test]
    fn only_the_blocks_that_differ_are_written() {
        let mut content = pattern(3 << 20, 1);
        let to = file(&content);
        content[BLOCK * 3] ^= 1;
        content[BLOCK * 4 + 5] ^= 1;
        content[BLOCK * 200] ^= 1;
        let from = file(&content);
        assert_eq!(bring(&from, &to), 3 * BLOCK_BYTES);
        assert!(are_equal(&from, &to));
        assert_eq!(bring(&from, &to), 0);
    }

    #[test]
    fn a_file_is_shortened_and_lengthened() {
        let (long, short) = (pattern(1_000_003, 2), pattern(12_345, 2));
        let to = file(&long);
        let from = file(&short);
        assert_eq!(bring(&from, &to), 0);
        assert_eq!(to.metadata().unwrap().len(), 12_345);
        let from = file(&long);
        assert!(bring(&from, &to) >= 1_000_003 - 12_345);
        assert!(are_equal(&from, &to));
        bring(&file(b""), &to);
        assert_eq!(to.metadata().unwrap().len(), 0);
    }

    #[test]
    fn parts_are_equal_only_where_both_files_have_them() {
        #[expect(clippy::single_range_in_vec_init, reason = "one part")]
        let part = [0..4];
        let equal = |one, other| are_equal_in(&file(one), &file(other), &part).unwrap();
        assert!(equal(b"abcd", b"abcde"));
        assert!(!equal(b"abcd", b"abc") && !equal(b"abc", b"abc") && !equal(b"abcd", b"abce"));
    }

    #[cfg(target_os = "linux")]
    #[test]
    fn a_hole_becomes_a_hole_and_written_zeros_take_room() {
        let from = file(&pattern(64 << 10, 3));
        from.set_len(8 << 20).unwrap();
        from.write_all_at(&vec![0; 1 << 20], 4 << 20).unwrap();
        from.sync_all().unwrap();
        let to = file(&pattern(8 << 20, 4));
        bring(&from, &to);
        to.sync_all().unwrap();
        assert!(are_equal(&from, &to));
        let bytes = |f: &File| allocated_bytes(&f.metadata().unwrap());
        assert!(bytes(&to) < 2 << 20, "{}", bytes(&to));
        // Into an empty file too: what postgres has filled with zeros is room it counts on.
        let to = file(b"");
        bring(&from, &to);
        to.sync_all().unwrap();
        assert!(bytes(&to) >= 1 << 20, "{}", bytes(&to));
    }

    #[test]
    fn pieces_are_compared_by_the_blocks_of_their_files() {
        let ours = vec![0; BLOCK * 2];
        let mut theirs = ours.clone();
        theirs[4096] = 1;
        // The piece begins in the middle of a block.
        let found = |theirs: &[u8], at| {
            let ranges = differing(&ours, theirs, at).into_iter();
            ranges.map(|r| (r.start, r.end)).collect::<Vec<_>>()
        };
        assert_eq!(found(&theirs, 4096), [(4096, 4096 + BLOCK)]);
        assert_eq!(found(&theirs, 0), [(0, BLOCK)]);
        theirs[BLOCK] = 1;
        assert_eq!(found(&theirs, 0), [(0, BLOCK * 2)]);
    }
}
