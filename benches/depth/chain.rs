//! A chain of branches, each made of the one before and changed a little.

use std::time::Duration;

use anyhow::{Context as _, Result};
use dbranch::types::VolumeId;

use crate::family::Family;
use crate::floor::Floor;
use crate::numbers::Samples;
use crate::pool;
use crate::server::Server;
use crate::{SOME, client, number};

/// How often, and how long each time, root and leaf are read in turn.
const TURNS: usize = 9;
const TURN: Duration = Duration::from_secs(4);

pub(crate) async fn measure(family: &mut Family<'_>, floor: Floor, depth: usize) -> Result<()> {
    if depth == 0 {
        return Ok(());
    }
    eprintln!("a chain of {depth}");
    let (mut times, mut by_hand, mut starts) = (Vec::new(), Vec::new(), Vec::new());
    let mut parent = family.root.clone();
    for generation in 1..=depth {
        // A file in more pieces takes a file system longer to clone, whoever asks for it.
        if generation <= SOME || generation + SOME > depth {
            by_hand.push(number::floor_once(family, floor, &parent)?);
        }
        family.settle()?;
        times.push(family.clone_of(&parent)?);
        parent = family.members.last().context("just made")?.clone();
        let begun = std::time::Instant::now();
        let server = family.start(&parent).await?;
        starts.push(begun.elapsed());
        // Rows all over the table, so that the leaf's file lies in pieces of every generation.
        let session = client::connect(&server.config()).await?;
        session
            .batch_execute(&format!(
                "update pgbench_accounts set abalance = {generation} where aid % 5003 = {}",
                generation * 7 % 5003
            ))
            .await?;
        drop(session);
        server.stop()?;
    }
    crate::compare(&format!("depth: a chain of {depth}, each clone"), &times);
    crate::compare(&format!("  beside them {}", floor.name()), &by_hand);
    crate::compare("  each start", &starts);
    throughput(family, &parent).await
}

/// `pgbench -S` at the root and at the leaf in turn.
async fn throughput(family: &Family<'_>, leaf: &VolumeId) -> Result<()> {
    let (root, leaf) = (family.start(&family.root).await?, family.start(leaf).await?);
    let (mut of_root, mut of_leaf) = (Samples::default(), Samples::default());
    let (mut ratios, mut costs) = (Samples::default(), [Samples::default(), Samples::default()]);
    for turn in 0..TURNS {
        let mut now = [0.0; 2];
        for which in [turn % 2, 1 - turn % 2] {
            let (per_second, ticks) = transactions(family, [&root, &leaf][which])?;
            now[which] = per_second;
            costs[which].push(ticks);
        }
        of_root.push(now[0]);
        of_leaf.push(now[1]);
        ratios.push(now[1] / now[0]);
    }
    println!(
        "  pgbench -S, transactions a second: root {}, leaf {}, ratio {:.2} (each turn's: {})",
        of_root.shown(),
        of_leaf.shown(),
        of_leaf.median() / of_root.median(),
        ratios.shown(),
    );
    println!(
        "  the servers' processor time for a million of them, ticks: root {}, leaf {}, speed by it {:.2}",
        costs[0].shown(),
        costs[1].shown(),
        costs[0].median() / costs[1].median(),
    );
    root.stop()?;
    leaf.stop()
}

/// Transactions a second, and ticks of the processor for a million.
fn transactions(family: &Family<'_>, server: &Server) -> Result<(f64, f64)> {
    let mut pgbench = family.programs.command("pgbench")?;
    pgbench
        .args(server.client_args())
        .args(["--select-only", "--no-vacuum", "--client=2"])
        .arg(format!("--time={}", TURN.as_secs()))
        .arg("postgres");
    let before = server.ticks_of_children()?;
    let said = pool::run(&mut pgbench)?;
    // Its sessions end a moment after their client.
    std::thread::sleep(Duration::from_millis(300));
    let ticks = server.ticks_of_children()? - before;
    // number of transactions actually processed: 12345
    // tps = 12345.678901 (without initial connection time)
    let number = |label: &str| -> Result<f64> {
        let rest = said.lines().find_map(|line| line.strip_prefix(label));
        let word = rest.and_then(|rest| rest.trim().split(' ').next());
        word.with_context(|| format!("pgbench says: {said}"))?
            .parse()
            .context("no number")
    };
    let done = number("number of transactions actually processed:")?;
    #[expect(clippy::cast_precision_loss, reason = "a few hundred")]
    let ticks = ticks as f64;
    Ok((number("tps =")?, ticks * 1e6 / done))
}
