//! Drivers: which one, and whether a better one is possible.

use super::{env_on, finds, finds_nothing};
use crate::support::Fs;

#[test]
fn branches_that_could_be_snapshots_are_found() {
    let Some(mut env) = env_on(Fs::Btrfs, 512) else {
        return;
    };
    env.set("DBRANCH_STORAGE", "copy");
    env.set_up();
    let _ = env.dbranch(&["shutdown"]).ok();
    env.set("DBRANCH_STORAGE", "auto");
    finds(&env, "better-driver", "warning", &["`copy`", "`btrfs`"]);
}

#[test]
fn full_copies_and_a_driver_that_can_not_be_had_are_found() {
    let Some(mut env) = env_on(Fs::Ext4, 512) else {
        return;
    };
    finds(&env, "full-copies", "warning", &["ext4", "full copy"]);
    finds_nothing(&env, "driver");
    let _ = env.dbranch(&["shutdown"]).ok();
    env.set("DBRANCH_STORAGE", "btrfs");
    finds(&env, "driver", "problem", &["DBRANCH_STORAGE", "ext4"]);
}
