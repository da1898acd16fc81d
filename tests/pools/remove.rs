//! `dbranch storage remove`.

use std::fs;

use super::Pools;
use crate::support::{LIMIT, wait_until};

#[test]
fn a_pool_with_branches_is_kept_and_an_empty_one_goes_with_all_its_traces() {
    let Some(pools) = Pools::new() else { return };
    let env = &pools.env;
    let _ = pools.set_up();
    env.set_up();
    let _ = env.dbranch(&["create", "x", "--from", "main"]).ok();
    let _ = env.dbranch(&["delete", "x", "--yes"]).ok();
    let _ = pools.storage(&["remove", "--yes"]).fails(
        1,
        &[
            "`main` of shop",
            "`x` of shop (in the trash)",
            "storage move",
        ],
    );
    assert_eq!(env.sql("select 1"), "1");
    let _ = env.dbranch(&["delete-project", "--yes"]).ok();
    let _ = pools
        .storage(&["remove", "--yes"])
        .fails(1, &["`main` of shop (in the trash)"]);
    assert!(pools.is_mounted());

    env.write_config(&env.repo(), "shop", env.ports.first);
    let _ = env.dbranch(&["init", "--yes"]).ok();
    let _ = env.dbranch(&["undelete", "main"]).ok();
    let _ = env.dbranch(&["delete-project", "--now", "--yes"]).ok();
    fs::write(pools.pool().join("notes"), "mine").expect("ours");
    let _ = pools.storage(&["remove", "--yes"]).fails(1, &["notes"]);
    fs::remove_file(pools.pool().join("notes")).expect("ours");

    // What stands in fstab around our lines stays, byte for byte.
    let fstab = fs::read_to_string(pools.fstab()).expect("there");
    fs::write(pools.fstab(), fstab.clone() + "# later, without an end").expect("ours");
    wait_until(LIMIT, "the pool is let go of", || {
        pools.storage(&["remove", "--yes"]).code == Some(0)
    });
    let left = fs::read_to_string(pools.fstab()).expect("there");
    assert_eq!(left, format!("{}\n# later, without an end", super::FSTAB));
    fs::write(pools.fstab(), super::FSTAB).expect("ours");
    pools.nothing_is_left();
    let _ = pools
        .storage(&["remove", "--yes"])
        .fails(1, &["no pool is set up"]);
    let _ = pools
        .storage(&["grow", "--size", "2G"])
        .fails(1, &["no pool is set up"]);
}
