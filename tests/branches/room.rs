//! A pool with too little room.

use std::process::Command;

use crate::support::{LIMIT, Server, Storage, TestEnv, edit_config, need_root, wait_until};

#[test]
fn a_full_copy_that_does_not_fit_is_refused_before_it_begins() {
    if need_root().is_none() {
        return;
    }
    let Some(mut env) = TestEnv::with(Server::Native, Storage::Copy) else {
        return;
    };
    let small = env.path("small");
    std::fs::create_dir(&small).expect("ours");
    let mounted = Command::new("mount")
        .args(["-t", "tmpfs", "-o", "size=240m,mode=711", "dbranch-test"])
        .arg(&small)
        .status();
    assert!(mounted.is_ok_and(|s| s.success()), "root can mount a tmpfs");
    env.set("DBRANCH_POOL", small.join("pool"));
    env.write_config(&env.repo(), "shop", env.ports.first);
    edit_config(&env.repo(), |c| {
        c["postgres"]["settings"]["max_wal_size"] = "32MB".into();
        c["postgres"]["settings"]["min_wal_size"] = "32MB".into();
    });
    let _ = env.dbranch(&["init", "--yes"]).ok();
    let _ = env.dbranch(&["init-postgres"]).ok();
    let _ = env.dbranch(&["install-hooks"]).ok();
    // Some 90 MB beside a cluster of 30 MB and its log: a second one does not fit.
    env.sql("create table big as select md5(i::text) from generate_series(1, 1400000) i");
    let checkout = env.git(&["checkout", "-q", "-b", "too-big"]);
    assert_eq!(checkout.code, Some(0), "git is never broken: {checkout}");
    let checkout = checkout.says(&["room"]);
    assert!(!checkout.stderr.contains("too-big <- main"), "{checkout}");
    let _ = env
        .dbranch(&["create", "by-hand", "--from", "main"])
        .fails(1, &["room"]);
    assert_eq!(env.branches(), ["main"]);
    // Paths, not entries: an entry keeps its folder open, and with it the mount.
    let volumes: Vec<_> = std::fs::read_dir(small.join("pool"))
        .expect("the pool is there")
        .flatten()
        .map(|e| e.path())
        .filter(|volume| volume.join("data").exists())
        .collect();
    assert_eq!(volumes.len(), 1, "nothing half made: {volumes:?}");
    // main is what the endpoint still shows, and it lives.
    assert_eq!(env.sql("select count(*) from big"), "1400000");
    let _ = env.dbranch(&["shutdown", "--stop-branches"]).ok();
    wait_until(LIMIT, "nobody uses the pool any more", || {
        let unmounted = Command::new("umount").arg(&small).output();
        unmounted.is_ok_and(|out| out.status.success())
    });
}
