//! A parent and its descendants as volumes, each with bytes of its own by which deletion is checked.

use std::fs::{self, File};
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use dbranch::postgres::{self, Conf, DATA_FOLDER};
use dbranch::storage::{Choice, Omit, StorageDriver};
use dbranch::types::VolumeId;
use tempfile::TempDir;

use crate::pool;
use crate::server::{self, Programs, Server};

/// What all volumes together are given for their own, about.
const MARKS_BYTES: u64 = 1 << 30;

/// What the file system may use beside the volumes' data: its own records of them.
const SLACK_BYTES: u64 = 64 << 20;

/// How long a file system may take to free what was deleted.
const CLEANING_LIMIT: Duration = Duration::from_secs(300);

pub(crate) struct Family<'a> {
    pub(crate) programs: &'a Programs,
    pub(crate) driver: Arc<dyn StorageDriver>,
    pub(crate) root: VolumeId,
    pub(crate) members: Vec<VolumeId>,
    pub(crate) scratch: TempDir,
    /// Bytes in use before the first descendant was made.
    used_before: u64,
    _folder: TempDir,
}

impl<'a> Family<'a> {
    /// Makes the root: a stopped cluster with `pgbench`'s tables.
    pub(crate) async fn found(
        programs: &'a Programs,
        place: &Path,
        driver: &str,
        scale: u32,
    ) -> Result<Self> {
        let folder = pool::temp_folder(place)?;
        let choice: Choice = driver.parse()?;
        let pool = if driver == "zfs" {
            place.to_owned()
        } else {
            folder.path().join("pool")
        };
        let driver = dbranch::storage::open(choice, &pool, server::owner()?)?;
        let mut family = Self {
            programs,
            driver,
            root: VolumeId::random(),
            members: Vec::new(),
            // Short: a Unix socket's path may have 107 bytes.
            scratch: pool::temp_folder(Path::new("/tmp"))?,
            used_before: 0,
            _folder: folder,
        };
        let data_dir = family.driver.create_volume(&family.root)?.join(DATA_FOLDER);
        programs.initdb(&data_dir, family.scratch.path(), &["--data-checksums"])?;
        let conf = Conf {
            copy_on_write: family.driver.shares_blocks(),
            ..Conf::default()
        };
        conf.write(&data_dir, Some(server::owner()?))?;
        let server = family.start(&family.root).await?;
        let mut pgbench = programs.command("pgbench")?;
        pgbench
            .args(server.client_args())
            .args(["--initialize", "--quiet"])
            .arg(format!("--scale={scale}"))
            .arg("postgres");
        pool::run(&mut pgbench)?;
        server.stop()?;
        family.used_before = family.used_at_rest()?;
        Ok(family)
    }

    pub(crate) fn path(&self, id: &VolumeId) -> PathBuf {
        self.driver.volume_path(id)
    }

    pub(crate) async fn start(&self, id: &VolumeId) -> Result<Server> {
        let data_dir = self.path(id).join(DATA_FOLDER);
        postgres::shed(&data_dir)?;
        Server::start(
            self.programs,
            &data_dir,
            self.scratch.path(),
            &id.as_str()[..8],
        )
        .await
    }

    /// Clones a volume and says how long the driver's call took.
    pub(crate) fn clone_of(&mut self, parent: &VolumeId) -> Result<Duration> {
        let id = VolumeId::random();
        let begun = Instant::now();
        self.driver
            .clone_volume(parent, &id, Omit::NOTHING, &|_, _| ())?;
        let took = begun.elapsed();
        self.members.push(id);
        Ok(took)
    }

    /// Gives a member bytes of its own.
    fn mark(&self, member: &VolumeId, size: u64) -> Result<()> {
        let mut file = File::create(self.path(member).join(format!("mark-{member}")))?;
        // Not zeros, which a file system may leave out.
        let mut state = 1 | u64::from_str_radix(&member.as_str()[..4], 36).unwrap_or(7);
        let mut bytes = Vec::new();
        while (bytes.len() as u64) < size {
            bytes.extend_from_slice(&draw(&mut state).to_ne_bytes());
        }
        Ok(file.write_all(&bytes)?)
    }

    pub(crate) fn settle(&self) -> Result<()> {
        nix::unistd::syncfs(&File::open(self.driver.pool())?).context("sync the file system")
    }

    /// Bytes in use, once everything that was written is on disk.
    fn used_at_rest(&self) -> Result<u64> {
        self.settle()?;
        let space = self.driver.space()?;
        Ok(space.total_bytes - space.free_bytes)
    }

    /// Deletes all but the root in an order drawn by lot, and compares at every tenth of the way
    /// what is used with what those that are left own.
    pub(crate) fn delete_by_lot(mut self) -> Result<()> {
        let all = self.members.len();
        if all == 0 {
            return Ok(());
        }
        let mark = (MARKS_BYTES / all as u64).clamp(1 << 20, 16 << 20);
        for member in &self.members {
            self.mark(member, mark)?;
        }
        // Descendants made before the marks share none of them: each owns its mark alone, and
        // what it wrote while it ran.
        let mut seed = 42;
        for i in (1..all).rev() {
            let other = usize::try_from(draw(&mut seed) % (i as u64 + 1))?;
            self.members.swap(i, other);
        }
        let full = self.used_at_rest()?;
        println!(
            "deletion: {all} volumes use {} beside the root's {}",
            mib(full.saturating_sub(self.used_before)),
            mib(self.used_before)
        );
        let mut times = Vec::new();
        let mut used = full;
        let step = all.div_ceil(10);
        while !self.members.is_empty() {
            let batch = self
                .members
                .split_off(self.members.len().saturating_sub(step));
            let marks = batch.len() as u64 * mark;
            for member in &batch {
                let begun = Instant::now();
                self.driver.destroy(member)?;
                times.push(begun.elapsed());
            }
            let most = used
                .saturating_sub(marks)
                .saturating_add(SLACK_BYTES / 4)
                .min(full);
            used = self.wait_until_at_most(most)?;
            println!(
                "  {} left: {} used",
                self.members.len(),
                mib(used.saturating_sub(self.used_before))
            );
        }
        let end = self.wait_until_at_most(self.used_before + SLACK_BYTES)?;
        println!(
            "  in the end {} more than before the first was made",
            mib(end.saturating_sub(self.used_before))
        );
        crate::compare("  destroy", &times);
        ensure!(
            fs::metadata(self.path(&self.root).join(DATA_FOLDER)).is_ok(),
            "the root is gone too"
        );
        Ok(())
    }

    /// Waits for the file system to clean up, as btrfs does in the background.
    fn wait_until_at_most(&self, most: u64) -> Result<u64> {
        let limit = Instant::now() + CLEANING_LIMIT;
        loop {
            let used = self.used_at_rest()?;
            if used <= most {
                return Ok(used);
            }
            ensure!(
                Instant::now() < limit,
                "{} are used, and at most {} should be",
                mib(used),
                mib(most)
            );
            std::thread::sleep(Duration::from_millis(200));
        }
    }
}

impl Drop for Family<'_> {
    fn drop(&mut self) {
        for volume in self.driver.list().unwrap_or_default() {
            if let Err(e) = self.driver.destroy(&volume) {
                eprintln!("depth: {e}");
            }
        }
    }
}

/// A number drawn by lot, the same in each run (xorshift).
fn draw(state: &mut u64) -> u64 {
    *state ^= *state << 13;
    *state ^= *state >> 7;
    *state ^= *state << 17;
    *state
}

fn mib(bytes: u64) -> String {
    format!("{} MiB", bytes >> 20)
}
