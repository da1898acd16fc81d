//! What the life of a branch costs on each storage driver, beside the least it could cost.
//!
//! ```text
//! cargo bench --bench storage -- [--sizes 100MB,1GB] [--rounds 10] [--drivers WORD,...]
//! ```
//!
//! For each driver and size, round by round and in turn:
//!
//! - clone: the driver's call alone; the floor is the file system's own way, by hand
//! - `dbranch create`: the command from its start to its end, against the same floor
//! - first query: from the start of `dbranch create` to an answer at the branch's port; the floor
//!   is the same clone, postgres forked on it, and a login past the proxy
//! - owned: what the branch shares with nobody after that answer, both counted by the driver
//! - delete: the driver's call alone, and `dbranch delete --now` of the stopped branch
//!
//! The parent runs and is idle. `btrfs` lies in `DBRANCH_TEST_BTRFS`, `reflink` in
//! `DBRANCH_TEST_XFS`, `zfs` in `DBRANCH_TEST_ZFS` (a dataset's mount point), `copy` in
//! `DBRANCH_TEST_PLAIN` or else the system's folder for temporary files. What is missing is said.
#![expect(
    clippy::print_stdout,
    clippy::print_stderr,
    reason = "a benchmark prints its results, and on standard error what it does"
)]

mod rounds;

#[path = "../branching/client.rs"]
#[allow(dead_code, reason = "each benchmark uses what it needs of it")]
mod client;
#[path = "../support/floor.rs"]
mod floor;
#[path = "../branching/ioctl.rs"]
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

use anyhow::{Context as _, Result, bail};
use dbranch::storage::DriverKind;
use tokio::signal::unix::{SignalKind, signal};

use floor::Floor;
use numbers::Samples;
use rounds::Measured;
use server::Programs;
use world::World;

/// One row of the table of drivers.
struct Place {
    driver: &'static str,
    /// The variable that names its folder.
    variable: &'static str,
    folder: Option<PathBuf>,
}

struct Settings {
    /// Names and bytes, ascending: the database grows from one to the next.
    sizes: Vec<(String, u64)>,
    rounds: usize,
    /// Drivers to measure; none for all.
    drivers: Vec<String>,
}

fn main() -> ExitCode {
    // `cargo test --all-targets` runs this too, and wants no benchmark.
    if !std::env::args().any(|arg| arg == "--bench") {
        eprintln!("skipped: storage: it measures with `cargo bench --bench storage`");
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
            eprintln!("storage: {e:#}");
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
    let mut beyond = Vec::new();
    let mut skipped = Vec::new();
    println!(
        "# Storage: PostgreSQL {}, native, {} rounds, medians (quartiles)\n\n{}",
        programs.major, settings.rounds, HEAD
    );
    for place in places() {
        if !settings.drivers.is_empty() && !settings.drivers.iter().any(|d| d == place.driver) {
            continue;
        }
        if place.driver.parse::<DriverKind>().is_err() {
            skipped.push(format!("{}: this dbranch has no such driver", place.driver));
            continue;
        }
        let Some(folder) = &place.folder else {
            skipped.push(format!("{}: {} is not set", place.driver, place.variable));
            continue;
        };
        let floor = Floor::of(place.driver)?;
        let world = World::set_up(folder, place.driver, &programs, 40)?;
        let mut now = 0;
        for (size, bytes) in &settings.sizes {
            eprintln!("{}, {size}: loading", place.driver);
            now = rounds::grow(&world, now, *bytes).await?;
            eprintln!("{}, {size}", place.driver);
            let all = rounds::measure(&world, floor, &programs, settings.rounds).await?;
            show(place.driver, size, floor, &all, &mut beyond);
        }
    }
    println!();
    for what in skipped {
        println!("skipped: {what}");
    }
    if beyond.is_empty() {
        println!("All times are within 10 ms or 1.2 times of the floor.");
    } else {
        println!(
            "Beyond 10 ms and 1.2 times of the floor:\n\n- {}",
            beyond.join("\n- ")
        );
    }
    Ok(())
}

const HEAD: &str = "| driver | size | what | dbranch | floor | ratio | difference | 10 ms or 1.2 |\n\
                    |---|---|---|---|---|---|---|---|";

fn show(driver: &str, size: &str, floor: Floor, all: &Measured, beyond: &mut Vec<String>) {
    let made = floor.name();
    let times = [
        (
            format!("clone, ms; floor {made}"),
            &all.clone,
            &all.clone_floor,
        ),
        (
            "`dbranch create`, ms; the same floor".into(),
            &all.create,
            &all.clone_floor,
        ),
        (
            "create to first answer, ms".into(),
            &all.answer,
            &all.answer_floor,
        ),
        (
            format!("delete, ms; floor {}", floor.removal()),
            &all.destroy,
            &all.destroy_floor,
        ),
        (
            "`dbranch delete --now`, ms; the same floor".into(),
            &all.delete,
            &all.destroy_floor,
        ),
    ];
    for (what, ours, floor) in times {
        let (a, b) = (ours.median(), floor.median());
        let is_within = a <= b + 10.0 || a <= 1.2 * b;
        if !is_within {
            beyond.push(format!("{driver}, {size}: {what}: {a:.1} against {b:.1}"));
        }
        let verdict = if is_within { "within" } else { "BEYOND" };
        line(driver, size, &what, ours, floor, verdict);
    }
    line(
        driver,
        size,
        "owned after it, KiB",
        &all.owned,
        &all.owned_floor,
        "",
    );
}

fn line(driver: &str, size: &str, what: &str, ours: &Samples, floor: &Samples, verdict: &str) {
    let (a, b) = (ours.median(), floor.median());
    println!(
        "| {driver} | {size} | {what} | {} | {} | {:.2} | {:+.1} | {verdict} |",
        ours.shown(),
        floor.shown(),
        a / b,
        a - b
    );
}

fn places() -> [Place; 4] {
    let place = |driver, variable: &'static str| Place {
        driver,
        variable,
        folder: std::env::var_os(variable).map(PathBuf::from),
    };
    let mut all = [
        place("btrfs", "DBRANCH_TEST_BTRFS"),
        place("zfs", "DBRANCH_TEST_ZFS"),
        place("reflink", "DBRANCH_TEST_XFS"),
        place("copy", "DBRANCH_TEST_PLAIN"),
    ];
    all[3].folder.get_or_insert_with(std::env::temp_dir);
    all
}

impl Settings {
    fn from_args(mut args: impl Iterator<Item = String>) -> Result<Self> {
        let mut settings = Self {
            sizes: sizes("100MB,1GB")?,
            rounds: 10,
            drivers: Vec::new(),
        };
        while let Some(arg) = args.next() {
            let mut value = || args.next().with_context(|| format!("{arg} needs a value"));
            match arg.as_str() {
                "--bench" => {}
                "--sizes" => settings.sizes = sizes(&value()?)?,
                "--rounds" => settings.rounds = world::at_least_one(value()?.parse()?)?,
                "--drivers" => settings.drivers = value()?.split(',').map(str::to_owned).collect(),
                other => bail!("`{other}`: there are --sizes, --rounds and --drivers"),
            }
        }
        Ok(settings)
    }
}

/// `100MB,5GB`: decimal, as disks are sold.
fn sizes(text: &str) -> Result<Vec<(String, u64)>> {
    let units = [("MB", 1_000_000), ("GB", 1_000_000_000)];
    let mut sizes = Vec::new();
    for name in text.split(',').map(str::trim) {
        let bytes = units.iter().find_map(|(unit, bytes)| {
            let number: u64 = name.strip_suffix(unit)?.parse().ok()?;
            number.checked_mul(*bytes)
        });
        let bytes = bytes.with_context(|| format!("`{name}` is no size like 100MB or 5GB"))?;
        sizes.push((name.to_owned(), bytes));
    }
    sizes.sort_by_key(|(_, bytes)| *bytes);
    Ok(sizes)
}
