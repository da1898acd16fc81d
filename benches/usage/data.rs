//! A data directory, as far as its files matter to the file system.

use std::fs::{self, File};
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};

use anyhow::Result;

const PAGE: u64 = 8192;
/// As PostgreSQL cuts its tables and indexes.
const SEGMENT: u64 = 1 << 30;
/// A new database has so many files, most of one or two pages.
const SMALL_FILES: u64 = 1300;

/// One data directory, and what is written into it: always the same.
pub(crate) struct Data {
    dir: PathBuf,
    seed: u64,
    worked: u64,
}

impl Data {
    pub(crate) fn new(volume: &Path, seed: u64) -> Self {
        Self {
            dir: volume.join("data"),
            seed,
            worked: 0,
        }
    }

    fn below(&mut self, n: u64) -> u64 {
        // Marsaglia's xorshift64.
        self.seed ^= self.seed << 13;
        self.seed ^= self.seed >> 7;
        self.seed ^= self.seed << 17;
        self.seed.wrapping_mul(0x2545_F491_4F6C_DD1D) % n
    }

    fn noise(&mut self, len: u64) -> Vec<u8> {
        let words = usize::try_from(len / 8).expect("a small number");
        (0..words)
            .flat_map(|_| self.below(u64::MAX).to_ne_bytes())
            .collect()
    }

    fn segment(&self, number: u64) -> PathBuf {
        self.dir.join(format!("base/16384/16385.{number}"))
    }

    /// The large files, with their lengths.
    fn segments(&self) -> Vec<(PathBuf, u64)> {
        let path_and_length = |number| {
            let path = self.segment(number);
            let length = fs::metadata(&path).ok()?.len();
            Some((path, length))
        };
        (0..).map_while(path_and_length).collect()
    }

    pub(crate) fn fill(&mut self, size: u64) -> Result<()> {
        for folder in [
            "base/1",
            "base/5",
            "base/16384",
            "global",
            "pg_wal",
            "pg_xact",
        ] {
            fs::create_dir_all(self.dir.join(folder))?;
        }
        for number in 0..SMALL_FILES {
            let folder = ["base/1", "base/5", "base/16384", "global"][usize::try_from(number % 4)?];
            let pages = 1 + self.below(4) * self.below(4);
            let noise = self.noise(pages * PAGE);
            fs::write(self.dir.join(folder).join(number.to_string()), noise)?;
        }
        let block = self.noise(1 << 20);
        let mut left = size;
        for number in 0.. {
            let file = File::create(self.segment(number))?;
            let len = left.min(SEGMENT);
            for at in (0..len).step_by(1 << 20) {
                file.write_all_at(&block, at)?;
            }
            left -= len;
            if left == 0 {
                break;
            }
        }
        Ok(())
    }

    /// Writes pages here and there.
    pub(crate) fn write_pages(&mut self, pages: u64) -> Result<()> {
        let segments = self.segments();
        let noise = self.noise(PAGE);
        for _ in 0..pages {
            let (path, len) = &segments[usize::try_from(self.below(segments.len() as u64))?];
            let file = File::options().write(true).open(path)?;
            file.write_all_at(&noise, self.below(len / PAGE) * PAGE)?;
        }
        Ok(())
    }

    /// What a branch does between two looks: catalogs, a few pages, some WAL, a file that goes
    /// and one that comes.
    pub(crate) fn work(&mut self) -> Result<()> {
        self.worked += 1;
        let noise = self.noise(160 << 10);
        fs::write(self.dir.join("global/pg_internal.init"), &noise)?;
        let wal = |n: u64| self.dir.join(format!("pg_wal/{n:024}"));
        fs::write(wal(self.worked), &noise)?;
        let _ = fs::remove_file(wal(self.worked - 1));
        self.write_pages(30)
    }

    pub(crate) fn files(&self) -> u64 {
        SMALL_FILES + self.segments().len() as u64
    }
}
