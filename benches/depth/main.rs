//! Whether the thousandth branch costs what the first did, and the hundredth generation reads
//! as fast as the root.
//!
//! ```text
//! cargo bench --bench depth -- [--branches 1000] [--depth 100] [--commands 1000] [--drivers WORD,...]
//! ```
//!
//! - number: so many clones of one parent by the driver's call, and by hand with the file system's
//!   own way beside the first and the last 20
//! - depth: a chain in which each branch is started, changed a little and is the next one's parent;
//!   then `pgbench -S` at its end and at the root in turn
//! - deletion: all of these in an order drawn by lot (the seed is fixed); at every tenth of the way
//!   the room that the file system says is used, against what those that are left may own
//! - commands: so many branches by `dbranch create` (each is stopped once it was up), then what
//!   dbranch's commands take with them and took with one branch
//!
//! Each part counts on a file system that nobody else writes to: `DBRANCH_TEST_BTRFS` (driver btrfs),
//! `DBRANCH_TEST_XFS` (driver reflink), `DBRANCH_TEST_ZFS` (driver zfs).
#![expect(
    clippy::print_stdout,
    clippy::print_stderr,
    reason = "a benchmark prints its results, and on standard error what it does"
)]

mod chain;
mod commands;
mod family;
mod number;

#[path = "../branching/client.rs"]
#[allow(dead_code, reason = "each benchmark uses what it needs of it")]
mod client;
#[path = "../support/floor.rs"]
#[allow(dead_code, reason = "each benchmark uses what it needs of it")]
mod floor;
#[path = "../branching/ioctl.rs"]
#[allow(dead_code, reason = "each benchmark uses what it needs of it")]
mod ioctl;
#[path = "../../tests/support/leftovers.rs"]
#[allow(dead_code, reason = "each benchmark uses what it needs of it")]
mod leftovers;
#[path = "../branching/numbers.rs"]
#[allow(dead_code, reason = "each benchmark uses what it needs of it")]
mod numbers;
#[path = "../branching/pool.rs"]
#[allow(dead_code, reason = "each benchmark uses what it needs of it")]
mod pool;
#[path = "../support/server.rs"]
#[allow(dead_code, reason = "each benchmark uses what it needs of it")]
mod server;
#[path = "../support/world.rs"]
#[allow(dead_code, reason = "each benchmark uses what it needs of it")]
mod world;

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use dbranch::storage::DriverKind;
use tokio::signal::unix::{SignalKind, signal};

use family::Family;
use floor::Floor;
use numbers::Samples;
use server::Programs;

struct Settings {
    branches: usize,
    depth: usize,
    commands: u16,
    /// `pgbench`'s scale of the parent; one is 15 MB.
    scale: u32,
    /// Drivers to measure; none for all.
    drivers: Vec<String>,
}

fn main() -> ExitCode {
    // `cargo test --all-targets` runs this too, and wants no benchmark.
    if !std::env::args().any(|arg| arg == "--bench") {
        eprintln!("skipped: depth: it measures with `cargo bench --bench depth`");
        return ExitCode::SUCCESS;
    }
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build();
    let outcome = runtime
        .context("start the runtime")
        .and_then(|runtime| runtime.block_on(run_until_interrupted()));
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            eprintln!("depth: {e:#}");
            ExitCode::FAILURE
        }
    }
}

/// A signal drops what is being done, and with it all it made.
async fn run_until_interrupted() -> Result<()> {
    let mut interrupt = signal(SignalKind::interrupt())?;
    let mut terminate = signal(SignalKind::terminate())?;
    tokio::select! {
        outcome = run() => outcome,
        _ = interrupt.recv() => bail!("interrupted"),
        _ = terminate.recv() => bail!("terminated"),
    }
}

async fn run() -> Result<()> {
    let settings = Settings::from_args(std::env::args().skip(1))?;
    let programs = Programs::find()?;
    for (driver, variable) in [
        ("btrfs", "DBRANCH_TEST_BTRFS"),
        ("zfs", "DBRANCH_TEST_ZFS"),
        ("reflink", "DBRANCH_TEST_XFS"),
    ] {
        if !settings.drivers.is_empty() && !settings.drivers.iter().any(|d| d == driver) {
            continue;
        }
        let Some(place) = std::env::var_os(variable).map(PathBuf::from) else {
            println!("skipped: {driver}: {variable} is not set");
            continue;
        };
        if driver.parse::<DriverKind>().is_err() {
            println!("skipped: {driver}: this dbranch has no such driver");
            continue;
        }
        let floor = Floor::of(driver)?;
        println!("\n## {driver}, PostgreSQL {}\n", programs.major);
        if settings.branches + settings.depth > 0 {
            let mut family = Family::found(&programs, &place, driver, settings.scale).await?;
            number::measure(&mut family, floor, settings.branches)?;
            chain::measure(&mut family, floor, settings.depth).await?;
            family.delete_by_lot()?;
        }
        if settings.commands > 0 {
            commands::measure(&programs, &place, driver, floor, settings.commands)?;
        }
    }
    Ok(())
}

/// How many of the first and of the last are compared.
const SOME: usize = 20;

/// Prints the medians of the first and of the last, and their ratio.
fn compare(what: &str, times: &[Duration]) {
    let some = SOME.min(times.len() / 2);
    let median = |of: &[Duration]| {
        let mut samples = Samples::default();
        for time in of {
            samples.push_time(*time);
        }
        samples.median()
    };
    let (first, last) = (median(&times[..some]), median(&times[times.len() - some..]));
    println!(
        "{what}: first {some} {first:.1} ms, last {some} of {} {last:.1} ms, ratio {:.2}",
        times.len(),
        last / first
    );
}

impl Settings {
    fn from_args(mut args: impl Iterator<Item = String>) -> Result<Self> {
        let mut settings = Self {
            branches: 1000,
            depth: 100,
            commands: 1000,
            scale: 10,
            drivers: Vec::new(),
        };
        while let Some(arg) = args.next() {
            let mut value = || args.next().with_context(|| format!("{arg} needs a value"));
            match arg.as_str() {
                "--bench" => {}
                "--branches" => settings.branches = value()?.parse()?,
                "--depth" => settings.depth = value()?.parse()?,
                "--commands" => settings.commands = value()?.parse()?,
                "--scale" => settings.scale = value()?.parse()?,
                "--drivers" => settings.drivers = value()?.split(',').map(str::to_owned).collect(),
                other => bail!(
                    "`{other}`: there are --branches, --depth, --commands, --scale and --drivers"
                ),
            }
        }
        Ok(settings)
    }
}
