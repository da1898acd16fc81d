//! What cloning a volume file by file costs, beside `cp` doing the same.
//!
//! ```text
//! DBRANCH_TEST_XFS=/mnt/xfs cargo bench --bench cloning
//! ```
//!
//! Makes a folder like a data directory of 1,300 files and clones it, round by round in turn:
//! the driver's call, durable when it returns, and the program `cp`. `reflink` beside `cp -a
//! --reflink=always` in the folders that `DBRANCH_TEST_XFS` and `DBRANCH_TEST_BTRFS` name; `copy`
//! in the same and in the temporary folder beside `cp -a --reflink=never` and the syncfs(2) that
//! makes it durable (without, it has only filled the cache). `DBRANCH_BENCH_ROUNDS` (20), `DBRANCH_BENCH_MIB` (256) of data.
#![expect(
    clippy::print_stdout,
    clippy::print_stderr,
    reason = "a benchmark prints its results, and on standard error what it does"
)]

#[path = "../branching/numbers.rs"]
#[expect(dead_code, reason = "the other benchmark needs more of it")]
mod numbers;

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};
use std::time::Instant;

use anyhow::{Context as _, Result, ensure};
use dbranch::storage::{self, Choice, DriverKind, Omit, StorageError};
use dbranch::types::{Owner, VolumeId};
use nix::unistd::{Gid, Uid};

use numbers::Samples;

const FILES: usize = 1300;
const FOLDERS: usize = 27;

fn main() -> ExitCode {
    // `cargo test --all-targets` runs this too, and wants no benchmark.
    if !std::env::args().any(|arg| arg == "--bench") {
        eprintln!("skipped: cloning: it measures with `cargo bench --bench cloning`");
        return ExitCode::SUCCESS;
    }
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            eprintln!("cloning: {e:#}");
            ExitCode::FAILURE
        }
    }
}

fn run() -> Result<()> {
    let (rounds, mib) = (
        number("DBRANCH_BENCH_ROUNDS", 20)?,
        number("DBRANCH_BENCH_MIB", 256)?,
    );
    println!("{FILES} files, {mib} MiB, {rounds} rounds; ms: median (quartiles)");
    let mut folders = vec![("temporary folder", std::env::temp_dir())];
    for (name, var) in [("XFS", "DBRANCH_TEST_XFS"), ("btrfs", "DBRANCH_TEST_BTRFS")] {
        match std::env::var_os(var) {
            Some(dir) => folders.push((name, PathBuf::from(dir))),
            None => eprintln!("skipped: {name}: {var} names no folder"),
        }
    }
    for (name, parent) in folders {
        for (kind, reflink) in [(DriverKind::Reflink, "always"), (DriverKind::Copy, "never")] {
            match compare(&parent, kind, &format!("--reflink={reflink}"), rounds, mib) {
                Ok((ours, cp)) => println!(
                    "{name}: {kind} {}, cp -a --reflink={reflink} {}, ratio {:.2}",
                    ours.shown(),
                    cp.shown(),
                    ours.median() / cp.median()
                ),
                Err(e) => match e.downcast_ref::<StorageError>() {
                    Some(StorageError::Unsupported { .. }) => {}
                    _ => return Err(e.context(format!("{name}, {kind}"))),
                },
            }
        }
    }
    Ok(())
}

fn number(var: &str, default: usize) -> Result<usize> {
    std::env::var(var).map_or(Ok(default), |text| {
        text.parse().with_context(|| format!("{var}={text}"))
    })
}

/// The driver's times and those of `cp`.
fn compare(
    parent: &Path,
    kind: DriverKind,
    reflink: &str,
    rounds: usize,
    mib: usize,
) -> Result<(Samples, Samples)> {
    let folder = tempfile::tempdir_in(parent)?;
    let owner = Owner {
        uid: Uid::effective().as_raw(),
        gid: Gid::effective().as_raw(),
    };
    let pool = folder.path().join("pool");
    let driver = storage::open(Choice::Driver(kind), &pool, owner)?;
    let from = VolumeId::random();
    let source = driver.create_volume(&from)?;
    fill(&source, mib)?;
    settle(&pool)?;

    let (mut ours, mut theirs) = (Samples::default(), Samples::default());
    // The first round warms the caches and doesn't count.
    for round in 0..=rounds {
        let to = VolumeId::random();
        let begun = Instant::now();
        driver.clone_volume(&from, &to, Omit::NOTHING, &|_, _| {})?;
        let took = begun.elapsed();
        if round > 0 {
            ours.push_time(took);
        }
        driver.destroy(&to)?;
        settle(&pool)?;

        let by_hand = folder.path().join("cp");
        let begun = Instant::now();
        let status = Command::new("cp")
            .args(["-a", reflink])
            .args([&source, &by_hand])
            .status()
            .context("run cp")?;
        if kind == DriverKind::Copy {
            settle(&pool)?;
        }
        let took = begun.elapsed();
        ensure!(status.success(), "cp failed");
        if round > 0 {
            theirs.push_time(took);
        }
        fs::remove_dir_all(&by_hand)?;
        settle(&pool)?;
    }
    Ok((ours, theirs))
}

/// Sizes as in a data directory: most files have a page or a few, some have most of the data.
fn fill(volume: &Path, mib: usize) -> Result<()> {
    let page: Vec<u8> = (0..8192_u32).map(|i| (i % 251) as u8).collect();
    let large = mib * 128 / 10;
    for n in 0..FILES {
        let folder = volume.join(format!("data/base/{}", n % FOLDERS));
        fs::create_dir_all(&folder)?;
        let pages = if n % 130 == 0 { large } else { 1 + n % 4 };
        fs::write(folder.join(n.to_string()), page.repeat(pages))?;
    }
    Ok(())
}

/// Brings the file system to rest: what was written is on disk (syncfs(2)).
fn settle(folder: &Path) -> Result<()> {
    #[cfg(target_os = "linux")]
    nix::unistd::syncfs(File::open(folder)?)?;
    #[cfg(not(target_os = "linux"))]
    File::open(folder)?.sync_all()?;
    Ok(())
}
