//! What it takes to tell what branches take, beside the file system's own tools.
//!
//! ```text
//! cargo bench --bench usage
//! ```
//!
//! Makes a data directory with files of PostgreSQL's sizes, ages it by writing single pages,
//! and clones it a hundred times; source and clones write in between, as running branches
//! do. Then it looks at all of them: for the first time, again, and after writes.
//!
//! Variables: `DBRANCH_TEST_BTRFS`, `DBRANCH_TEST_XFS` (folders on such file systems; what is not named
//! is left out), `DBRANCH_BENCH_SIZE` (MB of the data directory, 5000), `DBRANCH_BENCH_BRANCHES` (100),
//! `DBRANCH_BENCH_ROUNDS` (10).
#![expect(
    clippy::print_stdout,
    clippy::print_stderr,
    reason = "a benchmark prints its results, and on standard error what it does"
)]

mod data;

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use dbranch::storage::{self, Choice, StorageDriver, Usages};
use dbranch::types::{Owner, VolumeId};
use nix::unistd::{Gid, Uid};

use data::Data;

struct Settings {
    size: u64,
    branches: usize,
    rounds: usize,
}

fn main() -> ExitCode {
    // `cargo test --all-targets` runs this too, and wants no benchmark.
    if !std::env::args().any(|arg| arg == "--bench") {
        eprintln!("skipped: usage: it measures with `cargo bench --bench usage`");
        return ExitCode::SUCCESS;
    }
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            eprintln!("usage: {e:#}");
            ExitCode::FAILURE
        }
    }
}

fn run() -> Result<()> {
    let number = |name: &str, default: u64| -> Result<u64> {
        let text = std::env::var(name).unwrap_or_else(|_| default.to_string());
        text.parse().with_context(|| format!("{name} is no number"))
    };
    let settings = Settings {
        size: number("DBRANCH_BENCH_SIZE", 5000)? * 1_000_000,
        branches: usize::try_from(number("DBRANCH_BENCH_BRANCHES", 100)?)?,
        rounds: usize::try_from(number("DBRANCH_BENCH_ROUNDS", 10)?)?,
    };
    ensure!(
        settings.branches > 0 && settings.rounds > 0,
        "nothing to do"
    );
    let kernel = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    let cpus = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
    let user = if Uid::effective().is_root() {
        "root"
    } else {
        "no root"
    };
    println!(
        "# Usage of {} branches of {} MB\n\nLinux {}, {cpus} CPUs, {user}",
        settings.branches,
        settings.size / 1_000_000,
        kernel.trim()
    );
    let mut measured = false;
    for (name, variable) in [("btrfs", "DBRANCH_TEST_BTRFS"), ("XFS", "DBRANCH_TEST_XFS")] {
        let Some(folder) = std::env::var_os(variable) else {
            println!("\nskipped: {name}: {variable} names no folder");
            continue;
        };
        let pool = Pool::new(&PathBuf::from(folder))?;
        measure(name, &pool, &settings).with_context(|| format!("measure {name}"))?;
        measured = true;
    }
    ensure!(measured, "no file system to measure on");
    Ok(())
}

/// A pool in a folder of its own. Dropping it destroys all that is in it.
struct Pool {
    dir: PathBuf,
    driver: Arc<dyn StorageDriver>,
    _folder: tempfile::TempDir,
}

impl Pool {
    fn new(parent: &Path) -> Result<Self> {
        let folder = tempfile::Builder::new().prefix("dbu-").tempdir_in(parent)?;
        fs::set_permissions(folder.path(), fs::Permissions::from_mode(0o711))?;
        let dir = folder.path().join("pool");
        let driver = open(&dir)?;
        Ok(Self {
            dir,
            driver,
            _folder: folder,
        })
    }

    /// Brings all to rest: what was written is on disk (syncfs(2)).
    fn settle(&self) -> Result<()> {
        nix::unistd::syncfs(fs::File::open(&self.dir)?).context("sync the file system")
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        for id in self.driver.list().unwrap_or_default() {
            let _ = self.driver.destroy(&id);
        }
    }
}

/// A driver that has seen nothing yet.
fn open(pool: &Path) -> Result<Arc<dyn StorageDriver>> {
    let owner = Owner {
        uid: Uid::effective().as_raw(),
        gid: Gid::effective().as_raw(),
    };
    Ok(storage::open(Choice::Auto, pool, owner)?)
}

/// A source and its clones, and what is written into them.
struct Family {
    ids: Vec<VolumeId>,
    root: Data,
    branches: Vec<Data>,
}

fn build(name: &str, pool: &Pool, settings: &Settings) -> Result<Family> {
    eprintln!("{name}: making {} MB", settings.size / 1_000_000);
    let root_id = VolumeId::random();
    let mut root = Data::new(&pool.driver.create_volume(&root_id)?, 1);
    root.fill(settings.size)?;
    pool.settle()?;
    eprintln!("{name}: aging");
    for _ in 0..16 {
        root.write_pages(settings.size / (8192 * 64 * 16))?;
        pool.settle()?;
    }
    eprintln!("{name}: cloning");
    let mut ids = vec![root_id.clone()];
    let mut branches = Vec::new();
    for n in 0..settings.branches {
        let id = VolumeId::random();
        pool.driver
            .clone_volume(&root_id, &id, storage::Omit::NOTHING, &|_, _| {})?;
        let mut branch = Data::new(&pool.driver.volume_path(&id), n as u64 + 2);
        branch.work()?;
        root.write_pages(100)?;
        ids.push(id);
        branches.push(branch);
    }
    pool.settle()?;
    Ok(Family {
        ids,
        root,
        branches,
    })
}

fn measure(name: &str, pool: &Pool, settings: &Settings) -> Result<()> {
    let Family {
        ids,
        root,
        mut branches,
    } = build(name, pool, settings)?;
    let look = |driver: &Arc<dyn StorageDriver>, times: &mut Times| -> Result<Usages> {
        let start = Instant::now();
        let usages = driver.usage_of_all(&ids)?;
        times.0.push(start.elapsed());
        ensure!(usages.volumes.len() == ids.len(), "volumes are missing");
        Ok(usages)
    };
    let mut all = [(); 5].map(|()| Times::default());
    let [cold, young, again, one, every] = &mut all;
    let before = resident_kib();
    let driver = open(&pool.dir)?;
    let usages = look(&driver, cold)?;
    let memory = resident_kib().saturating_sub(before);
    for _ in 1..settings.rounds.min(3) {
        look(&open(&pool.dir)?, cold)?;
    }
    look(&driver, young)?;
    let by_trees = name == "btrfs" && Uid::effective().is_root();
    if !by_trees {
        eprintln!("{name}: waiting until files count as settled");
        std::thread::sleep(Duration::from_secs(37));
        look(&driver, &mut Times::default())?;
    }
    for _ in 0..settings.rounds {
        look(&driver, again)?;
    }
    for round in 0..settings.rounds {
        branches[round % settings.branches].work()?;
        pool.settle()?;
        look(&driver, one)?;
    }
    for _ in 0..settings.rounds.min(5) {
        branches.iter_mut().try_for_each(Data::work)?;
        pool.settle()?;
        look(&driver, every)?;
    }
    let sum: u64 = usages.shares.iter().flatten().map(|s| s.bytes).sum();
    println!(
        "\n## {name} (driver {}; {} files a branch, {:.1} GB in all, {:.1} GB on disk)\n",
        driver.kind(),
        root.files(),
        gigabytes(usages.volumes.iter().map(|v| v.logical_bytes).sum()),
        gigabytes(sum)
    );
    eprintln!("{name}: the floor");
    let mut stat = Times::default();
    for _ in 0..settings.rounds.min(3) {
        floor(&mut stat, Command::new("du").arg("-s").arg(&pool.dir))?;
    }
    let mut du = Times::default();
    if name == "btrfs" {
        let mut command = Command::new("btrfs");
        command.args(["filesystem", "du", "-s", "--raw"]);
        command.args(ids.iter().map(|id| pool.driver.volume_path(id)));
        if floor(&mut du, &mut command).is_err() {
            println!("no `btrfs` program that can tell\n");
        }
    }
    println!("| look | ms | of `du -s` | of `btrfs filesystem du` |\n|---|---|---|---|");
    for (what, times) in [
        ("the first", &*cold),
        ("the second, a moment later", young),
        ("another one", again),
        ("after one branch wrote", one),
        ("after all branches wrote", every),
    ] {
        println!(
            "| {what} | {} | {} | {} |",
            times.shown(),
            times.part_of(&stat),
            times.part_of(&du)
        );
    }
    println!(
        "\n`du -s`: {} ms; `btrfs filesystem du`: {} ms. What is remembered takes {} MiB.",
        stat.shown(),
        du.shown(),
        memory / 1024
    );
    Ok(())
}

/// What the file system's own tool takes.
fn floor(times: &mut Times, command: &mut Command) -> Result<()> {
    let start = Instant::now();
    let status = command
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .status()?;
    ensure!(status.success(), "{command:?}: {status}");
    times.0.push(start.elapsed());
    Ok(())
}

#[derive(Default)]
struct Times(Vec<Duration>);

impl Times {
    fn median(&self) -> Option<f64> {
        let mut sorted = self.0.clone();
        sorted.sort_unstable();
        Some(sorted.get(sorted.len() / 2)?.as_secs_f64() * 1e3)
    }

    /// The median, and the longest.
    fn shown(&self) -> String {
        let longest = self.0.iter().max();
        match (self.median(), longest) {
            (Some(median), Some(longest)) if self.0.len() > 1 => {
                format!("{median:.1} (at most {:.1})", longest.as_secs_f64() * 1e3)
            }
            (Some(median), _) => format!("{median:.1}"),
            _ => "-".into(),
        }
    }

    fn part_of(&self, other: &Self) -> String {
        match (self.median(), other.median()) {
            (Some(this), Some(other)) => format!("{:.4}", this / other),
            _ => "-".into(),
        }
    }
}

#[expect(clippy::cast_precision_loss, reason = "it is rounded")]
fn gigabytes(bytes: u64) -> f64 {
    bytes as f64 / 1e9
}

/// Memory of this process (`VmRSS`, proc(5)).
fn resident_kib() -> u64 {
    let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|l| l.strip_prefix("VmRSS:"));
    let number = line.and_then(|l| l.split_whitespace().next()?.parse().ok());
    number.unwrap_or(0)
}
