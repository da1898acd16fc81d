//! What each setting does to the bytes that a branch owns.
//!
//! ```text
//! cargo bench --bench sizes -- [--idle SECONDS] [--scale N] [--rows WORD,...]
//! ```
//!
//! One parent of `pgbench` data (scale 65 is 1 GB), running; one branch for each row, made and
//! started with dbranch's settings and the row's over them. All branches run side by side. The
//! bytes are those that the storage driver counts as shared with nobody, of the files:
//!
//! - start: after the first answer
//! - idle: so many seconds later (default 30; what autovacuum and checkpoints do needs 600)
//! - selects: after a full scan of every table and 1,000 selects by key
//! - update: after 1 % of the accounts in one range, with the log, and after a checkpoint
//! - scattered: after one account in 1,000, all over the table, and after a checkpoint
//! - idle: so many seconds later again
//!
//! Needs PostgreSQL's server programs with pgbench, and `DBRANCH_TEST_BTRFS` or
//! `DBRANCH_TEST_XFS`, folders on such file systems. Bytes don't depend on the machine's load.
#![expect(
    clippy::print_stdout,
    clippy::print_stderr,
    reason = "a benchmark prints its results, and on standard error what it does"
)]

mod knobs;
mod parent;

#[path = "../branching/client.rs"]
#[allow(dead_code, reason = "each benchmark uses what it needs of it")]
mod client;
#[path = "../branching/ioctl.rs"]
#[allow(dead_code, reason = "each benchmark uses what it needs of it")]
mod ioctl;
#[path = "../branching/pool.rs"]
#[allow(dead_code, reason = "each benchmark uses what it needs of it")]
mod pool;
#[path = "../support/server.rs"]
#[allow(dead_code, reason = "each benchmark uses what it needs of it")]
mod server;

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use tokio::signal::unix::{SignalKind, signal};

use knobs::{KNOBS, Knob};
use parent::{Branch, Parent, Variant};
use server::Programs;

struct Settings {
    idle: Duration,
    scale: u32,
    /// Rows whose name contains one of these; none for all.
    rows: Vec<String>,
    places: Vec<(&'static str, PathBuf)>,
}

fn main() -> ExitCode {
    // `cargo test --all-targets` runs this too, and wants no benchmark.
    if !std::env::args().any(|arg| arg == "--bench") {
        eprintln!("skipped: sizes: it measures with `cargo bench --bench sizes`");
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
            eprintln!("sizes: {e:#}");
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
    let all: Vec<&Knob> = KNOBS
        .iter()
        .filter(|knob| knob.since <= programs.major && settings.wants(knob.name))
        .collect();
    for (file_system, folder) in &settings.places {
        let mut parents = Vec::new();
        for variant in Variant::ALL {
            if *variant == Variant::Standard || settings.wants(variant.name()) {
                eprintln!("{file_system}: loading, {}", variant.name());
                parents.push(Parent::make(&programs, folder, *variant, settings.scale).await?);
            }
        }
        println!(
            "\n## {file_system}, PostgreSQL {}, parent of {:.0} MB (driver {})\n\n{}",
            programs.major,
            mega(parents[0].bytes()?),
            parents[0].driver_name(),
            head(settings.idle)
        );
        measure(&parents, &all, &settings).await?;
    }
    Ok(())
}

/// A row while it is measured.
struct Row<'a> {
    name: &'static str,
    branch: Branch<'a>,
    /// Stage by stage.
    bytes: Vec<u64>,
}

/// The first parent has a branch for each knob, the others one with dbranch's settings.
async fn measure(parents: &[Parent<'_>], knobs: &[&Knob], settings: &Settings) -> Result<()> {
    let mut rows = Vec::new();
    for (parent, (name, with)) in knobs
        .iter()
        .map(|knob| (&parents[0], (knob.name, knob.settings)))
        .chain(
            parents[1..]
                .iter()
                .map(|p| (p, (p.variant_name(), &[][..]))),
        )
    {
        let branch = parent.branch(with).await?;
        branch.answer().await?;
        rows.push(Row {
            name,
            branch,
            bytes: Vec::new(),
        });
    }
    tokio::time::sleep(Duration::from_millis(500)).await;
    count(parents, &mut rows)?;

    eprintln!("{} branches idle", rows.len());
    tokio::time::sleep(settings.idle).await;
    count(parents, &mut rows)?;

    eprintln!("selects");
    for row in &rows {
        row.branch.select().await?;
    }
    count(parents, &mut rows)?;

    for scattered in [false, true] {
        eprintln!("updates");
        for row in &rows {
            row.branch.update(scattered, settings.scale).await?;
        }
        count(parents, &mut rows)?;
        for row in &rows {
            row.branch.run("checkpoint").await?;
        }
        count(parents, &mut rows)?;
    }

    eprintln!("idle");
    tokio::time::sleep(settings.idle).await;
    count(parents, &mut rows)?;
    for row in &rows {
        let cells: Vec<String> = row.bytes.iter().map(|bytes| shown(*bytes)).collect();
        println!("| {} | {} |", row.name, cells.join(" | "));
    }
    Ok(())
}

fn count(parents: &[Parent<'_>], rows: &mut [Row<'_>]) -> Result<()> {
    parents[0].settle()?;
    for row in rows {
        row.bytes.push(row.branch.owned_bytes()?);
    }
    Ok(())
}

fn head(idle: Duration) -> String {
    let idle = idle.as_secs();
    format!(
        "Bytes owned, in KiB below 10 MiB:\n\n\
         | | start | {idle} s idle | selects | 1 % updated | checkpoint | 0.1 % scattered | \
         checkpoint | {idle} s idle |\n|---|---|---|---|---|---|---|---|---|"
    )
}

fn shown(bytes: u64) -> String {
    if bytes < 10 << 20 {
        format!("{} K", bytes.div_ceil(1 << 10))
    } else {
        format!("{} M", bytes.div_ceil(1 << 20))
    }
}

#[expect(clippy::cast_precision_loss, reason = "it is rounded to megabytes")]
fn mega(bytes: u64) -> f64 {
    bytes as f64 / 1e6
}

impl Settings {
    fn from_args(args: impl Iterator<Item = String>) -> Result<Self> {
        let mut settings = Self {
            idle: Duration::from_secs(30),
            scale: 65,
            rows: Vec::new(),
            places: [("btrfs", "DBRANCH_TEST_BTRFS"), ("XFS", "DBRANCH_TEST_XFS")]
                .into_iter()
                .filter_map(|(name, var)| Some((name, PathBuf::from(std::env::var_os(var)?))))
                .collect(),
        };
        let mut args = args;
        while let Some(arg) = args.next() {
            let mut value = || args.next().with_context(|| format!("{arg} needs a value"));
            match arg.as_str() {
                "--bench" => {}
                "--idle" => settings.idle = Duration::from_secs(value()?.parse()?),
                "--scale" => settings.scale = value()?.parse()?,
                "--rows" => settings.rows = value()?.split(',').map(str::to_owned).collect(),
                other => bail!("`{other}`: there are --idle, --scale and --rows"),
            }
        }
        if settings.places.is_empty() {
            bail!("name a folder with DBRANCH_TEST_BTRFS or DBRANCH_TEST_XFS");
        }
        Ok(settings)
    }

    /// The first row is always measured: the others are compared with it.
    fn wants(&self, name: &str) -> bool {
        self.rows.is_empty()
            || name == KNOBS[0].name
            || self.rows.iter().any(|word| name.contains(word.as_str()))
    }
}
