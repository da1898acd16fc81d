//! Foretells what a mirror will write, from a few blocks of each file.

use std::fs::{self, File, Metadata};
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;

use super::super::StorageError;
use super::super::usage::allocated_bytes;
use super::diff::BLOCK;
use super::tree::Tree;

/// Blocks of a file that are looked at: a file up to 512 KiB is known for sure.
const SAMPLES: u64 = 64;

/// Bytes of a volume.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Estimate {
    /// As allocated.
    pub all_bytes: u64,
    /// Those of them that the base is likely not to have.
    pub own_bytes: u64,
}

/// Estimates how much of the volume in `from` the one in `base` has not got, at the same
/// place of a file of the same name. A file with the base's length and time of
/// change is taken for the same; of others 64 blocks are compared. Good
/// enough to see whether room will do, and for nothing else.
pub fn estimate(from: &Path, base: Option<&Path>) -> Result<Estimate, StorageError> {
    let tree = Tree::read(from)?;
    let mut own_bytes = 0;
    for (name, meta) in &tree.files {
        own_bytes += match base {
            None => allocated_bytes(meta),
            // What can't be read, or vanishes, counts in full.
            Some(base) => likely_own(&from.join(name), meta, &base.join(name))
                .unwrap_or_else(|_| allocated_bytes(meta)),
        };
    }
    Ok(Estimate {
        all_bytes: tree.bytes,
        own_bytes,
    })
}

fn likely_own(path: &Path, meta: &Metadata, base: &Path) -> io::Result<u64> {
    let there = fs::symlink_metadata(base)?;
    if there.len() == meta.len() && there.modified()? == meta.modified()? {
        return Ok(0);
    }
    let (ours, theirs) = (File::open(path)?, File::open(base)?);
    let blocks = meta.len().div_ceil(BLOCK as u64);
    let samples = blocks.min(SAMPLES);
    let (mut one, mut other) = ([0; BLOCK], [0; BLOCK]);
    let mut differing = 0;
    for sample in 0..samples {
        let at = (sample * blocks / samples) * BLOCK as u64;
        let found = ours.read_at(&mut one, at)?;
        if theirs.read_at(&mut other[..found], at)? != found || one[..found] != other[..found] {
            differing += 1;
        }
    }
    if samples == 0 {
        return Ok(0);
    }
    Ok(allocated_bytes(meta).div_ceil(samples) * differing)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_base_has_is_not_counted() {
        let folder = tempfile::tempdir().unwrap();
        let (from, base) = (folder.path().join("from"), folder.path().join("base"));
        for dir in [&from, &base] {
            fs::create_dir(dir).unwrap();
            fs::write(dir.join("same"), vec![1; 1 << 20]).unwrap();
            let same = File::options().write(true).open(dir.join("same"));
            let time = std::time::SystemTime::UNIX_EPOCH;
            same.unwrap().set_modified(time).unwrap();
        }
        fs::write(from.join("new"), vec![2; 256 << 10]).unwrap();
        let mut half = vec![3; 2 << 20];
        fs::write(base.join("half"), &half).unwrap();
        half[1 << 20..].fill(4);
        fs::write(from.join("half"), &half).unwrap();
        let other = File::options().write(true).open(from.join("half"));
        let later = std::time::SystemTime::now() + std::time::Duration::from_secs(9);
        other.unwrap().set_modified(later).unwrap();
        let found = estimate(&from, Some(&base)).unwrap();
        let all = estimate(&from, None).unwrap();
        assert_eq!(found.all_bytes, all.all_bytes);
        assert_eq!(all.own_bytes, all.all_bytes);
        let expected = (256 << 10) + (1 << 20);
        assert!(
            (expected - (64 << 10)..expected + (64 << 10)).contains(&found.own_bytes),
            "{found:?}"
        );
    }
}
