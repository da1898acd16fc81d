//! The rounds: dbranch and the floor by turns, so that what else the machine does hits both.

use std::path::Path;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use tokio_postgres::Client;

use crate::client::{self, first_answer, number};
use crate::floor::Floor;
use crate::numbers::Samples;
use crate::pool;
use crate::world::{Repo, TimedGit, World};

const MAIN: &str = "main";
const OTHER: &str = "other";

/// How long the machine is left alone before a measurement, so that the clean-up of
/// the one before is over; and how long a branch idles before its bytes are counted.
const REST: Duration = Duration::from_millis(300);

/// Rows of 1 KiB in the heap, nearly the same in the WAL: 8 MB.
const WRITTEN_ROWS: u64 = 7_700;
/// A table's row with its header and line pointer: eight fill a page of 8 KiB.
const ROW_BYTES: u64 = 1024;
const PAYLOAD: &str = "left(repeat(md5(i::text), 31), 980)";

/// What the parent did last.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Parent {
    /// Nothing since a checkpoint.
    Idle,
    /// It has just written 8 MB of WAL.
    Written,
}

impl Parent {
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Idle => "idle parent",
            Self::Written => "parent has just written 8 MB of WAL",
        }
    }
}

/// What one kind of branching came to, over all rounds.
#[derive(Debug, Default)]
pub(crate) struct Branching {
    /// `git checkout -b` with our hook, without one, with one that does nothing.
    pub(crate) git_ours: Samples,
    pub(crate) git_plain: Samples,
    pub(crate) git_idle: Samples,
    pub(crate) ioctl: Samples,
    /// From the start of git to the first answer.
    pub(crate) first_ours: Samples,
    pub(crate) first_floor: Samples,
    /// Of `first_ours`: what the hook's line said, then the wait to be connected, then the query.
    pub(crate) said: Samples,
    pub(crate) connect: Samples,
    pub(crate) query: Samples,
    /// Of `first_floor`: from the ioctl's end to ready, to the answer.
    pub(crate) floor_start: Samples,
    pub(crate) floor_connect: Samples,
    pub(crate) bytes_ours: Samples,
    /// By `btrfs filesystem du`, where that program is.
    pub(crate) du_ours: Samples,
    pub(crate) du_floor: Samples,
    pub(crate) du_snapshot: Samples,
    pub(crate) wal: Samples,
    /// How often dbranch had the parent make a checkpoint.
    pub(crate) checkpoints: usize,
}

/// Switching back to a running branch.
#[derive(Debug, Default)]
pub(crate) struct Back {
    pub(crate) ours: Samples,
    pub(crate) floor: Samples,
    pub(crate) git_ours: Samples,
    pub(crate) git_plain: Samples,
}

/// The parent's server, past the proxy.
pub(crate) struct Root<'a> {
    world: &'a World<'a>,
    client: Client,
}

impl<'a> Root<'a> {
    pub(crate) async fn connect(world: &'a World<'a>) -> Result<Self> {
        let client = world.session(MAIN).await?;
        // Autovacuum would write at times of its own choice.
        client
            .batch_execute(
                "set synchronous_commit = off;
                 create table big (id bigint, payload text) with (autovacuum_enabled = off);
                 create table written (like big) with (autovacuum_enabled = off)",
            )
            .await?;
        Ok(Self { world, client })
    }

    /// Makes the database at least that large.
    pub(crate) async fn grow(&self, to_bytes: u64) -> Result<u64> {
        let size = "select pg_database_size(current_database())";
        // In pieces, so that Ctrl-C need not wait for all of it.
        loop {
            let now = number(&self.client, size).await?;
            let Some(missing) = to_bytes.checked_sub(now).filter(|b| *b > ROW_BYTES) else {
                break;
            };
            let rows = (missing / ROW_BYTES).clamp(1, 250_000);
            self.run(&format!(
                "insert into big select i, {PAYLOAD} from generate_series(1, {rows}) i"
            ))
            .await?;
        }
        self.run("checkpoint").await?;
        self.world.pool.settle()?;
        number(&self.client, size).await
    }

    pub(crate) async fn version(&self) -> Result<String> {
        client::value(&self.client, "show server_version").await
    }

    /// Brings the parent into a state, the same before each measurement. Returns the
    /// bytes of WAL since its last checkpoint.
    async fn prepare(&self, state: Parent) -> Result<u64> {
        self.run("truncate written").await?;
        self.run("checkpoint").await?;
        self.world.pool.settle()?;
        tokio::time::sleep(REST).await;
        if state == Parent::Written {
            self.run(&format!(
                "set synchronous_commit = on; \
                 insert into written select i, {PAYLOAD} from generate_series(1, {WRITTEN_ROWS}) i"
            ))
            .await?;
        }
        number(
            &self.client,
            "select (pg_current_wal_insert_lsn() - redo_lsn)::bigint from pg_control_checkpoint()",
        )
        .await
    }

    async fn checkpoints(&self) -> Result<u64> {
        let redo = "select redo_lsn - '0/0'::pg_lsn from pg_control_checkpoint()";
        number(&self.client, redo).await
    }

    async fn run(&self, statement: &str) -> Result<()> {
        self.client
            .batch_execute(statement)
            .await
            .with_context(|| format!("run {statement}"))
    }
}

/// Branches `rounds` times by dbranch and by hand.
pub(crate) async fn branching(
    world: &World<'_>,
    root: &Root<'_>,
    floor: &Floor<'_>,
    state: Parent,
    rounds: usize,
) -> Result<Branching> {
    let mut all = Branching::default();
    for round in 0..rounds {
        // Who goes first alternates too.
        if round % 2 == 0 {
            by_dbranch(world, root, state, round, &mut all).await?;
            by_hand(world, root, floor, state, round, &mut all).await?;
        } else {
            by_hand(world, root, floor, state, round, &mut all).await?;
            by_dbranch(world, root, state, round, &mut all).await?;
        }
    }
    Ok(all)
}

async fn by_dbranch(
    world: &World<'_>,
    root: &Root<'_>,
    state: Parent,
    round: usize,
    all: &mut Branching,
) -> Result<()> {
    let name = format!("feature/{round}");
    let wal = root.prepare(state).await?;
    let checkpoint_before = root.checkpoints().await?;

    let git = world.timed_git(Repo::Ours, &["checkout", "-q", "-b", &name])?;
    let answer = first_answer(world.url(), &name).await?;

    let git_ended = git.begun + git.took;
    all.said.push(said_ms(&git, &name)?);
    all.git_ours.push_time(git.took);
    all.first_ours.push_time(answer.answered - git.begun);
    all.connect.push_time(answer.connected - git_ended);
    all.query.push_time(answer.answered - answer.connected);
    all.wal.push_bytes(wal);
    if root.checkpoints().await? != checkpoint_before {
        all.checkpoints += 1;
    }
    tokio::time::sleep(REST).await;
    world.pool.settle()?;
    all.bytes_ours.push_bytes(world.exclusive_bytes(&name)?);
    if let Some(bytes) = btrfs_du(&world.volume(&name)?) {
        all.du_ours.push_bytes(bytes);
    }
    world.git(Repo::Ours, &["checkout", "-q", MAIN])?;
    remove(world, &name)
}

async fn by_hand(
    world: &World<'_>,
    root: &Root<'_>,
    floor: &Floor<'_>,
    state: Parent,
    round: usize,
    all: &mut Branching,
) -> Result<()> {
    let name = format!("floor/{round}");
    let slug = format!("floor-{round}");
    let source = world.volume(MAIN)?;
    // The same name in each run; a part before this one may have made it.
    let socket_dir = floor.socket_dir(&format!("{}{slug}", round_tag(state)))?;
    let address = floor.address(&socket_dir);
    root.prepare(state).await?;

    let git = world.timed_git(Repo::Plain, &["checkout", "-q", "-b", &name])?;
    let (snapshot, ioctl) = floor.snapshot(&source, &slug)?;
    let cloned = std::time::Instant::now();
    let server = floor.start(snapshot, &name, &socket_dir).await?;
    let ready = std::time::Instant::now();
    let answer = first_answer(&address, &name).await?;

    all.git_plain.push_time(git.took);
    all.ioctl.push_time(ioctl);
    all.first_floor.push_time(answer.answered - git.begun);
    all.floor_start.push_time(ready - cloned);
    all.floor_connect.push_time(answer.answered - ready);
    tokio::time::sleep(REST).await;
    world.pool.settle()?;
    if let Some(bytes) = btrfs_du(&server.snapshot.path) {
        all.du_floor.push_bytes(bytes);
    }
    drop(server);
    world.git(Repo::Plain, &["checkout", "-q", MAIN])?;
    world.git(Repo::Plain, &["branch", "-q", "-D", &name])?;

    let git = world.timed_git(Repo::Idle, &["checkout", "-q", "-b", &name])?;
    all.git_idle.push_time(git.took);
    world.git(Repo::Idle, &["checkout", "-q", MAIN])?;
    world.git(Repo::Idle, &["branch", "-q", "-D", &name])?;

    // A snapshot nobody starts, after a checkpoint.
    root.prepare(state).await?;
    root.run("checkpoint").await?;
    let (snapshot, _) = floor.snapshot(&source, &slug)?;
    world.pool.settle()?;
    if let Some(bytes) = btrfs_du(&snapshot.path) {
        all.du_snapshot.push_bytes(bytes);
    }
    Ok(())
}

fn round_tag(state: Parent) -> String {
    use std::sync::atomic::{AtomicUsize, Ordering};
    static NEXT: AtomicUsize = AtomicUsize::new(0);
    let n = NEXT.fetch_add(1, Ordering::Relaxed);
    match state {
        Parent::Idle => format!("i{n}-"),
        Parent::Written => format!("w{n}-"),
    }
}

/// Switches between two running branches `rounds` times, by dbranch and by hand.
pub(crate) async fn back(world: &World<'_>, root: &Root<'_>, rounds: usize) -> Result<Back> {
    root.prepare(Parent::Idle).await?;
    world.git(Repo::Ours, &["checkout", "-q", "-b", OTHER])?;
    first_answer(world.url(), OTHER).await?;
    world.git(Repo::Ours, &["checkout", "-q", MAIN])?;
    world.git(Repo::Plain, &["branch", OTHER])?;
    let direct = [
        (OTHER, world.instance(OTHER)?),
        (MAIN, world.instance(MAIN)?),
    ];

    let mut all = Back::default();
    for round in 0..rounds {
        for (branch, direct) in &direct {
            for ours in [round % 2 == 0, round % 2 != 0] {
                tokio::time::sleep(REST).await;
                let repo = if ours { Repo::Ours } else { Repo::Plain };
                let address = if ours { world.url() } else { direct };
                let git = world.timed_git(repo, &["checkout", "-q", branch])?;
                let answer = first_answer(address, branch).await?;
                let (first, alone) = if ours {
                    (&mut all.ours, &mut all.git_ours)
                } else {
                    (&mut all.floor, &mut all.git_plain)
                };
                first.push_time(answer.answered - git.begun);
                alone.push_time(git.took);
            }
        }
    }
    world.git(Repo::Plain, &["branch", "-q", "-D", OTHER])?;
    remove(world, OTHER)?;
    Ok(all)
}

/// Removes a branch that is checked out no more, git's and the database's.
fn remove(world: &World<'_>, name: &str) -> Result<()> {
    world.git(Repo::Ours, &["branch", "-q", "-D", name])?;
    world.dbranch(&["delete", name, "--now", "--yes", "--force"])?;
    Ok(())
}

/// The time in the hook's line: `feature/1 <- main (btrfs snapshot, 12 ms)`.
fn said_ms(git: &TimedGit, name: &str) -> Result<f64> {
    let made = format!("{name} <- {MAIN} (btrfs snapshot, ");
    let rest = git.said.split_once(&made).map(|(_, rest)| rest);
    let ms = rest
        .and_then(|rest| rest.split_once(" ms)"))
        .map(|(ms, _)| ms);
    ensure!(ms.is_some(), "the hook made no branch: {:?}", git.said);
    ms.unwrap_or_default().parse().context("no number of ms")
}

/// Bytes that nothing else shares, as btrfs-progs counts them.
fn btrfs_du(volume: &Path) -> Option<u64> {
    let mut du = Command::new("btrfs");
    du.args(["filesystem", "du", "-s", "--raw"]).arg(volume);
    let out = pool::run(&mut du).ok()?;
    // A line of titles, then: total, exclusive, set shared, name.
    out.lines().nth(1)?.split_whitespace().nth(1)?.parse().ok()
}
