//! A pool with too little room.

use std::process::Command;

use crate::support::{Server, Storage, TestEnv, need_root};

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
        .args(["-t", "tmpfs", "-o", "size=160m,mode=711", "dbranch-test"])
        .arg(&small)
        .status();
    assert!(mounted.is_ok_and(|s| s.success()), "root can mount a tmpfs");
    env.set("DBRANCH_POOL", small.join("pool"));
    env.set_up();
    // Three copies would not fit, and the WAL leaves no room for a second one.
    env.sql("create table big as select repeat(md5(i::text), 32) from generate_series(1, 40000) i");
    let checkout = env.git(&["checkout", "-q", "-b", "too-big"]);
    assert_eq!(checkout.code, Some(0), "git is never broken: {checkout}");
    let checkout = checkout.says(&["room"]);
    assert!(!checkout.stderr.contains("too-big <- main"), "{checkout}");
    let _ = env
        .dbranch(&["create", "by-hand", "--from", "main"])
        .fails(1, &["room"]);
    assert_eq!(env.branches(), ["main"]);
    let volumes = std::fs::read_dir(small.join("pool")).expect("the pool is there");
    let volumes: Vec<_> = volumes
        .flatten()
        .filter(|e| e.path().join("data").exists())
        .collect();
    assert_eq!(volumes.len(), 1, "nothing half made: {volumes:?}");
    // main is what the endpoint still shows, and it lives.
    assert_eq!(env.sql("select count(*) from big"), "40000");
    let _ = env.dbranch(&["shutdown", "--stop-branches"]).ok();
    let unmounted = Command::new("umount").arg(&small).status();
    assert!(
        unmounted.is_ok_and(|s| s.success()),
        "nobody uses the pool any more"
    );
}
