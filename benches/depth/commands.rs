//! What dbranch's own commands take with one branch and with many.

use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::Result;
use dbranch::types::VolumeId;

use crate::SOME;
use crate::floor::Floor;
use crate::numbers::Samples;
use crate::server::Programs;
use crate::world::World;

const ROUNDS: usize = 9;

pub(crate) fn measure(
    programs: &Programs,
    place: &Path,
    driver: &str,
    floor: Floor,
    count: u16,
) -> Result<()> {
    let world = World::set_up(place, driver, programs, count + 50)?;
    world.dbranch(&["create", "first"])?;
    world.dbranch(&["stop", "first"])?;
    let few = Table::of(&world, "first")?;

    eprintln!("{count} branches by dbranch");
    let (mut creates, mut by_hand) = (Vec::new(), Vec::new());
    let parent = world.volume("main")?;
    for i in 1..count {
        let name = format!("feature/{i}");
        let i = usize::from(i);
        // Each alone: what the one before has left to be written would be paid by the next.
        let measured = i <= SOME || i + SOME >= usize::from(count);
        if measured {
            settle(&world)?;
            let made = parent.with_file_name(VolumeId::random().as_str());
            by_hand.push(floor.clone_volume(&parent, &made)?);
            floor.destroy(&parent, &made)?;
            settle(&world)?;
        }
        let took = world.timed(&["create", &name, "--from", "main"])?;
        if measured {
            creates.push(took);
        }
        world.dbranch(&["stop", &name])?;
    }
    crate::compare("commands: `dbranch create`, idle parent", &creates);
    crate::compare(&format!("  beside it {}", floor.name()), &by_hand);

    let many = Table::of(&world, "feature/7")?;
    println!("\n| | 2 branches, ms | {count}, ms | ratio |\n|---|---|---|---|");
    for ((what, few), (_, many)) in few.0.iter().zip(&many.0) {
        println!(
            "| {what} | {} | {} | {:.1} |",
            few.shown(),
            many.shown(),
            many.median() / few.median()
        );
    }
    Ok(())
}

fn settle(world: &World) -> Result<()> {
    nix::unistd::syncfs(&std::fs::File::open(world.pool())?)?;
    Ok(())
}

/// Commands and what they took.
struct Table(Vec<(&'static str, Samples)>);

impl Table {
    /// Measures with a branch that is neither active nor running.
    fn of(world: &World, branch: &str) -> Result<Self> {
        let mut all = Self(Vec::new());
        let each: &[(&str, &[&str])] = &[
            ("list", &["list"]),
            ("status", &["status"]),
            ("show", &["show", branch]),
            ("url", &["url", branch]),
            ("env", &["env"]),
            ("use", &["use", branch]),
            ("use back", &["use", "main"]),
            ("doctor", &["doctor"]),
            ("sync", &["sync"]),
        ];
        for (what, args) in each {
            all.push(what, ROUNDS, || world.timed(args))?;
        }
        all.push("usage", 1, || world.timed(&["usage"]))?;
        let mut n = 0;
        all.push("git checkout -b", ROUNDS, || {
            n += 1;
            settle(world)?;
            let name = format!("hook-{n}");
            let begun = Instant::now();
            world.git(&["checkout", "-q", "-b", &name])?;
            let took = begun.elapsed();
            world.git(&["checkout", "-q", "main"])?;
            world.dbranch(&["stop", &name])?;
            Ok(took)
        })?;
        all.push("git checkout, back and forth", ROUNDS, || {
            let begun = Instant::now();
            world.git(&["checkout", "-q", "hook-1"])?;
            world.git(&["checkout", "-q", "main"])?;
            Ok(begun.elapsed())
        })?;
        all.push("delete --now", ROUNDS, || {
            let name = format!("hook-{n}");
            n -= 1;
            world.git(&["branch", "-q", "-D", &name])?;
            world.timed(&["delete", &name, "--now", "--yes", "--force"])
        })?;
        world.dbranch(&["stop", "main"])?;
        all.push("the daemon's start", 5, || {
            world.dbranch(&["shutdown", "--stop-branches"])?;
            world.timed(&["start", "--detach"])
        })?;
        all.push("shutdown", 5, || {
            let took = world.timed(&["shutdown"])?;
            world.dbranch(&["start", "--detach"])?;
            Ok(took)
        })?;
        Ok(all)
    }

    fn push(
        &mut self,
        what: &'static str,
        rounds: usize,
        mut once: impl FnMut() -> Result<Duration>,
    ) -> Result<()> {
        let mut samples = Samples::default();
        for _ in 0..rounds {
            samples.push_time(once()?);
        }
        self.0.push((what, samples));
        Ok(())
    }
}
