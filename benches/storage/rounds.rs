//! The rounds: dbranch and the floor by turns, so that what else the machine does hits both.

use std::fs::File;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use dbranch::postgres::{self, DATA_FOLDER};
use dbranch::storage::{Omit, StorageDriver};
use dbranch::types::VolumeId;
use serde_json::Value;
use tokio_postgres::Config;

use crate::client;
use crate::floor::Floor;
use crate::numbers::Samples;
use crate::server::{Programs, Server};
use crate::world::{self, World};

/// How long the machine is left alone before a measurement, so that the clean-up of
/// the one before is over.
const REST: Duration = Duration::from_millis(200);

const ROW_BYTES: u64 = 1024;

#[derive(Debug, Default)]
pub(crate) struct Measured {
    pub(crate) clone: Samples,
    pub(crate) clone_floor: Samples,
    pub(crate) create: Samples,
    pub(crate) answer: Samples,
    pub(crate) answer_floor: Samples,
    pub(crate) owned: Samples,
    pub(crate) owned_floor: Samples,
    pub(crate) destroy: Samples,
    pub(crate) destroy_floor: Samples,
    pub(crate) delete: Samples,
}

/// Makes the database `to` bytes large; it has `now`.
pub(crate) async fn grow(world: &World, now: u64, to: u64) -> Result<u64> {
    let session = client::connect(&world.url("main")?).await?;
    session
        .batch_execute(
            "set synchronous_commit = off;
             create table if not exists big (id bigint, payload text) with (autovacuum_enabled = off)",
        )
        .await?;
    // In pieces, so that Ctrl-C need not wait for all of it.
    let mut rows = to.saturating_sub(now) / ROW_BYTES;
    while rows > 0 {
        let some = rows.min(250_000);
        session
            .batch_execute(&format!(
                "insert into big select i, left(repeat(md5(i::text), 31), 980) from generate_series(1, {some}) i"
            ))
            .await?;
        rows -= some;
    }
    for statement in ["vacuum big", "checkpoint"] {
        session.batch_execute(statement).await?;
    }
    Ok(to)
}

pub(crate) async fn measure(
    world: &World,
    floor: Floor,
    programs: &Programs,
    rounds: usize,
) -> Result<Measured> {
    let driver = world.driver()?;
    let (parent, main) = (world.volume("main")?, world.url("main")?);
    let mut all = Measured::default();
    for round in 0..rounds {
        for ours in [round % 2 == 0, round % 2 != 0] {
            rest(world).await?;
            if ours {
                driver_round(driver.as_ref(), &parent, &mut all)?;
                rest(world).await?;
                dbranch_round(world, &main, driver.as_ref(), &mut all).await?;
            } else {
                floor_round(
                    world,
                    floor,
                    programs,
                    &main,
                    driver.as_ref(),
                    &parent,
                    &mut all,
                )
                .await?;
            }
        }
    }
    Ok(all)
}

/// Leaves the machine alone a moment, with all that was written on disk.
async fn rest(world: &World) -> Result<()> {
    nix::unistd::syncfs(&File::open(world.pool())?).context("sync the file system")?;
    tokio::time::sleep(REST).await;
    Ok(())
}

fn id_of(volume: &Path) -> Result<VolumeId> {
    let name = volume.file_name().and_then(|n| n.to_str());
    Ok(VolumeId::new(name.context("no name")?)?)
}

fn driver_round(driver: &dyn StorageDriver, parent: &Path, all: &mut Measured) -> Result<()> {
    let (from, to) = (id_of(parent)?, VolumeId::random());
    let begun = Instant::now();
    driver.clone_volume(&from, &to, Omit(postgres::omit), &|_, _| ())?;
    all.clone.push_time(begun.elapsed());
    let begun = Instant::now();
    driver.destroy(&to)?;
    all.destroy.push_time(begun.elapsed());
    Ok(())
}

async fn dbranch_round(
    world: &World,
    main: &Config,
    driver: &dyn StorageDriver,
    all: &mut Measured,
) -> Result<()> {
    let name = format!("b-{}", VolumeId::random());
    let begun = Instant::now();
    let created = world.dbranch(&["create", &name, "--from", "main", "--json"])?;
    all.create.push_time(begun.elapsed());
    let created: Value = serde_json::from_str(&created)?;
    let port = created["branch"]["port"].as_u64().context("no port")?;
    client::first_answer(&world::at_port(main, u16::try_from(port)?), &name).await?;
    all.answer.push_time(begun.elapsed());

    rest(world).await?;
    let volume = world.volume(&name)?;
    all.owned
        .push_bytes(driver.usage(&id_of(&volume)?)?.exclusive_bytes);

    world.dbranch(&["stop", &name])?;
    rest(world).await?;
    let took = world.timed(&["delete", &name, "--now", "--yes", "--force"])?;
    all.delete.push_time(took);
    Ok(())
}

async fn floor_round(
    world: &World,
    floor: Floor,
    programs: &Programs,
    main: &Config,
    driver: &dyn StorageDriver,
    parent: &Path,
    all: &mut Measured,
) -> Result<()> {
    // A volume's name, so that the driver counts its bytes as those of its own.
    let id = VolumeId::random();
    let made = driver.volume_path(&id);
    let begun = Instant::now();
    all.clone_floor
        .push_time(floor.clone_volume(parent, &made)?);
    let data = made.join(DATA_FOLDER);
    postgres::shed(&data)?;
    let server = Server::start(programs, &data, world.base(), "floor").await?;
    let session = client::connect(&server.config_as(main)).await?;
    client::value(&session, "select 1").await?;
    all.answer_floor.push_time(begun.elapsed());
    rest(world).await?;
    all.owned_floor
        .push_bytes(driver.usage(&id)?.exclusive_bytes);
    drop(session);
    server.stop()?;
    rest(world).await?;
    all.destroy_floor.push_time(floor.destroy(parent, &made)?);
    Ok(())
}
