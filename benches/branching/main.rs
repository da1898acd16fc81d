//! What a branch costs, beside the least that it could cost.
//!
//! ```text
//! cargo bench --bench branching
//! ```
//!
//! Runs the built `dbranch` as a user has it: a git repository with the hook, a daemon,
//! queries through the proxy. Round by round the same is done by hand: the bare ioctl,
//! postgres forked or a container made on the snapshot. Each time is shown as the median
//! with the quartiles.
//!
//! Needs git, PostgreSQL's server programs and a folder on btrfs. Variables:
//! `DBRANCH_TEST_BTRFS` (that folder; without it root mounts a file system in a sparse file),
//! `DBRANCH_BENCH_SIZES` (`100MB,1GB,5GB`), `DBRANCH_BENCH_ROUNDS` (10), `DBRANCH_BENCH_RUNTIMES`
//! (`native,docker`), `DBRANCH_TEST_PG_BIN` (server programs; default: the newest of
//! `/usr/lib/postgresql`), `DBRANCH_TEST_IMAGE` (local image for Docker; without it Docker is skipped).
#![expect(
    clippy::print_stdout,
    clippy::print_stderr,
    reason = "a benchmark prints its results, and on standard error what it does"
)]

mod client;
mod floor;
mod ioctl;
mod numbers;
mod pool;
mod rounds;
mod world;

#[path = "../../tests/support/leftovers.rs"]
mod leftovers;
#[path = "../../tests/support/ports.rs"]
mod ports;

use std::path::PathBuf;
use std::process::{Command, ExitCode};

use anyhow::{Context as _, Result, ensure};
use tokio::signal::unix::{SignalKind, signal};

use floor::Floor;
use numbers::{Row, Samples, Unit};
use pool::Pool;
use rounds::{Back, Branching, Parent, Root};
use world::{Runtime, World};

struct Settings {
    /// Names and bytes, ascending: the database grows from one to the next.
    sizes: Vec<(String, u64)>,
    rounds: usize,
    runtimes: Vec<Runtime>,
}

fn main() -> ExitCode {
    // `cargo test --all-targets` runs this too, and wants no benchmark.
    if !std::env::args().any(|arg| arg == "--bench") {
        eprintln!("skipped: branching: it measures with `cargo bench --bench branching`");
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
            eprintln!("branching: {e:#}");
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
        _ = interrupt.recv() => anyhow::bail!("interrupted"),
        _ = terminate.recv() => anyhow::bail!("terminated"),
    }
}

async fn run() -> Result<()> {
    let settings = Settings::from_env()?;
    let pool = Pool::open()?;
    introduce(&pool);
    let mut beyond = Vec::new();
    for runtime in &settings.runtimes {
        let world = World::set_up(&pool, runtime.clone())?;
        let floor = Floor::new(&world).await?;
        let root = Root::connect(&world).await?;
        for (size_name, bytes) in &settings.sizes {
            eprintln!("{}, {size_name}: loading", runtime.name());
            let size = root.grow(*bytes).await?;
            println!(
                "\n## {}, {size_name} (database of {:.0} MB, PostgreSQL {})",
                runtime.name(),
                size_mb(size),
                root.version().await?
            );
            for state in [Parent::Idle, Parent::Written] {
                let label = format!("{}, {size_name}, {}", runtime.name(), state.name());
                eprintln!("{label}");
                let all = rounds::branching(&world, &root, &floor, state, settings.rounds).await?;
                show_branching(&all, state, settings.rounds, &mut beyond, &label);
            }
            eprintln!("{}, {size_name}, switching back", runtime.name());
            let back = rounds::back(&world, &root, settings.rounds).await?;
            show_back(
                &back,
                &mut beyond,
                &format!("{}, {size_name}", runtime.name()),
            );
        }
    }
    println!();
    if beyond.is_empty() {
        println!("All times are within 1.5 times the floor plus 10 ms.");
    } else {
        println!(
            "Beyond 1.5 times the floor plus 10 ms:\n\n- {}",
            beyond.join("\n- ")
        );
    }
    Ok(())
}

#[expect(clippy::cast_precision_loss, reason = "it is rounded to megabytes")]
fn size_mb(bytes: u64) -> f64 {
    bytes as f64 / 1e6
}

fn show_branching(
    all: &Branching,
    state: Parent,
    rounds: usize,
    beyond: &mut Vec<String>,
    label: &str,
) {
    println!(
        "\n### {} ({rounds} rounds; {:.1} MB of WAL since its checkpoint; load average {})\n",
        state.name(),
        all.wal.median() * 1024.0 / 1e6,
        load_average()
    );
    let hook_adds = all.git_ours.minus(&all.git_plain);
    let idle_adds = all.git_idle.minus(&all.git_plain);
    let ours_alone = all.git_ours.minus(&all.git_idle);
    let time = |what, ours, floor| Row {
        what,
        ours,
        floor,
        unit: Unit::Milliseconds,
        promised: true,
    };
    let beside = |what, ours, floor| Row {
        promised: false,
        ..time(what, ours, floor)
    };
    let mut rows = vec![
        time("(a) the hook adds; floor: ioctl", &hook_adds, &all.ioctl),
        beside(
            "(a) the same beyond a hook that does nothing",
            &ours_alone,
            &all.ioctl,
        ),
    ];
    rows.push(time(
        "(b) `git checkout -b` to the first answer",
        &all.first_ours,
        &all.first_floor,
    ));
    show(&rows, beyond, label);
    let bytes = |what, ours, floor| Row {
        what,
        ours,
        floor,
        unit: Unit::KiB,
        promised: false,
    };
    if all.du_floor.is_empty() {
        println!(
            "| (d) bytes a branch owns, KiB | {} | no `btrfs` program | - | - | |",
            all.bytes_ours.shown()
        );
    } else {
        for row in [
            bytes(
                "(d) bytes a branch owns, `dbranch usage`",
                &all.bytes_ours,
                &all.du_floor,
            ),
            bytes(
                "(d) the same, `btrfs filesystem du`",
                &all.du_ours,
                &all.du_floor,
            ),
        ] {
            println!("{}", row.shown());
        }
    }
    println!(
        "\ngit checkout -b: {} ms bare, a hook that does nothing adds {}. \
         dbranch: the hook's line says {}, git ends after {}, connected {} later, answer {} later. \
         Floor: ready {} after the ioctl, answer {} later. \
         A snapshot never started owns {} KiB. The parent made a checkpoint for dbranch, after git, in {} of {rounds}.",
        all.git_plain.shown(),
        idle_adds.shown(),
        all.said.shown(),
        all.git_ours.shown(),
        all.connect.shown(),
        all.query.shown(),
        all.floor_start.shown(),
        all.floor_connect.shown(),
        all.du_snapshot.shown(),
        all.checkpoints,
    );
}

fn show_back(all: &Back, beyond: &mut Vec<String>, label: &str) {
    println!(
        "\n### switching back to a running branch (load average {})\n",
        load_average()
    );
    let hook_adds = all.git_ours.minus(&all.git_plain);
    show(
        &[Row {
            what: "(c) `git checkout` to the first answer",
            ours: &all.ours,
            floor: &all.floor,
            unit: Unit::Milliseconds,
            promised: true,
        }],
        beyond,
        label,
    );
    let after = |all: &Samples, git: &Samples| all.minus(git).shown();
    println!(
        "\ngit checkout: {} ms bare, the hook adds {}; from git's end to the answer {}, floor {}.",
        all.git_plain.shown(),
        hook_adds.shown(),
        after(&all.ours, &all.git_ours),
        after(&all.floor, &all.git_plain),
    );
}

fn show(rows: &[Row<'_>], beyond: &mut Vec<String>, label: &str) {
    println!("{}", Row::HEAD);
    for row in rows {
        println!("{}", row.shown());
        if row.promised && !row.is_within() {
            beyond.push(format!(
                "{label}: {}: {:.1} against {:.1}",
                row.what,
                row.ours.median(),
                row.floor.median()
            ));
        }
    }
}

fn introduce(pool: &Pool) {
    let first_line = |program: &str| {
        pool::run(Command::new(program).arg("--version"))
            .map_or_else(|_| format!("no {program}"), |out| out.trim().to_owned())
    };
    let kernel = std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    println!(
        "# Branching: dbranch {} beside the floor\n\nLinux {}, {} CPUs, load average {}, {}; btrfs {}",
        env!("CARGO_PKG_VERSION"),
        kernel.trim(),
        std::thread::available_parallelism().map_or(1, std::num::NonZero::get),
        load_average(),
        first_line("git"),
        if pool.is_own() {
            "in a sparse file of its own"
        } else {
            "in the folder given"
        }
    );
}

fn load_average() -> String {
    let text = std::fs::read_to_string("/proc/loadavg").unwrap_or_default();
    text.split(' ').next().unwrap_or("unknown").to_owned()
}

impl Settings {
    fn from_env() -> Result<Self> {
        let var =
            |name: &str, default: &str| std::env::var(name).unwrap_or_else(|_| default.to_owned());
        let mut sizes = Vec::new();
        for name in var("DBRANCH_BENCH_SIZES", "100MB,1GB,5GB").split(',') {
            sizes.push((name.trim().to_owned(), parse_size(name.trim())?));
        }
        sizes.sort_by_key(|(_, bytes)| *bytes);
        let rounds = var("DBRANCH_BENCH_ROUNDS", "10").parse();
        let rounds = rounds.context("DBRANCH_BENCH_ROUNDS is no number")?;
        ensure!(rounds > 0, "DBRANCH_BENCH_ROUNDS is 0");
        let mut runtimes = Vec::new();
        for name in var("DBRANCH_BENCH_RUNTIMES", "native,docker").split(',') {
            match name.trim() {
                "native" => runtimes.push(Runtime::Native {
                    bin_dir: bin_dir()?,
                }),
                "docker" => match image() {
                    Ok(image) => runtimes.push(Runtime::Docker { image }),
                    Err(e) => {
                        println!("skipped: docker: {e:#}");
                    }
                },
                other => anyhow::bail!("DBRANCH_BENCH_RUNTIMES: `{other}` is not native or docker"),
            }
        }
        Ok(Self {
            sizes,
            rounds,
            runtimes,
        })
    }
}

/// `100MB`, `5GB`: decimal, as disks are sold.
fn parse_size(text: &str) -> Result<u64> {
    let units = [("MB", 1_000_000), ("GB", 1_000_000_000)];
    let parsed = units.iter().find_map(|(unit, bytes)| {
        let number: u64 = text.strip_suffix(unit)?.trim().parse().ok()?;
        number.checked_mul(*bytes)
    });
    parsed.with_context(|| format!("DBRANCH_BENCH_SIZES: `{text}` is no size like 100MB or 5GB"))
}

fn bin_dir() -> Result<PathBuf> {
    let dir = std::env::var_os("DBRANCH_TEST_PG_BIN")
        .map(PathBuf::from)
        .or_else(newest_server)
        .context("no PostgreSQL server programs; name their folder with DBRANCH_TEST_PG_BIN")?;
    ensure!(
        dir.join("postgres").is_file(),
        "no PostgreSQL server programs in {}",
        dir.display()
    );
    Ok(dir)
}

fn newest_server() -> Option<PathBuf> {
    std::fs::read_dir("/usr/lib/postgresql")
        .ok()?
        .flatten()
        .filter_map(|e| Some((e.file_name().to_str()?.parse::<u32>().ok()?, e.path())))
        .max()
        .map(|(_, dir)| dir.join("bin"))
}

fn image() -> Result<String> {
    let image = std::env::var("DBRANCH_TEST_IMAGE").context("DBRANCH_TEST_IMAGE is not set")?;
    pool::run(Command::new("docker").args(["image", "inspect", &image]))
        .with_context(|| format!("no engine here, or no image {image}"))?;
    Ok(image)
}
