//! A pool that vanishes: unmounted, or its disk died.

use std::process::Command;

use super::{is_empty, notes, ready_on, with_branch_b};
use crate::support::{Fs, LIMIT, TestEnv, wait_until};

/// What is asked of a pool that is not there fails, says so, and changes nothing.
#[track_caller]
fn all_is_refused_and_kept(env: &TestEnv) {
    assert_eq!(env.branches(), ["b", "main"]);
    assert!(notes(env).contains("is not there"), "{}", notes(env));
    let refused = env.psql(&env.url_of("b"), "select 1");
    assert_eq!(refused.code, Some(2), "{refused}");
    let _ = refused.says(&["FATAL", "is not there", "HINT", "mount"]);
    let _ = env
        .dbranch(&["create", "c", "--from", "main"])
        .fails(1, &["is not there"]);
    let _ = env
        .dbranch(&["delete", "b", "--now", "--yes"])
        .fails(1, &["is not there"]);
    let _ = env.git(&["branch", "-q", "-f", "c"]).ok();
    let checkout = env.git(&["checkout", "-q", "c"]).ok();
    let _ = checkout.says(&["dbranch: ", "is not there", "STAYS on `main`"]);
    let checkout = env.git(&["checkout", "-q", "b"]).ok();
    let _ = checkout.says(&["dbranch: switched to b", "is not there"]);
    let _ = env.git(&["checkout", "-q", "main"]).ok();
    assert_eq!(env.branches(), ["b", "main"]);
    assert!(is_empty(env.image().point()), "nothing beneath the mount");
}

fn a_pool_unmounted_while_branches_run(fs: Fs) {
    let Some(env) = ready_on(fs, 1024) else {
        return;
    };
    with_branch_b(&env);
    let daemon = env.daemon_pid();
    env.image().unmount_lazily();

    // What runs goes on: the kernel keeps the file system for it.
    env.sql("insert into t values (8)");
    all_is_refused_and_kept(&env);
    assert_eq!(env.state("main"), "running");

    env.image().mount();
    assert_eq!(env.sql_on("b", "select v from t"), "7");
    let _ = env.git(&["checkout", "-q", "-b", "d"]).ok();
    assert_eq!(env.sql("select count(*) from t"), "2", "nothing was lost");
    assert_eq!(env.daemon_pid(), daemon);
    assert!(!notes(&env).contains("is not there"));
}

#[test]
fn a_btrfs_pool_unmounted_while_branches_run_loses_nothing() {
    a_pool_unmounted_while_branches_run(Fs::Btrfs);
}

#[test]
fn an_xfs_pool_unmounted_while_branches_run_loses_nothing() {
    a_pool_unmounted_while_branches_run(Fs::Xfs);
}

fn a_pool_that_is_not_mounted_at_the_start(fs: Fs) {
    let Some(env) = ready_on(fs, 1024) else {
        return;
    };
    with_branch_b(&env);
    let _ = env.dbranch(&["shutdown", "--stop-branches"]).ok();
    env.image().unmount();

    let _ = env.dbranch(&["start", "--detach"]).ok();
    all_is_refused_and_kept(&env);
    let _ = env.dbranch(&["sync"]);
    // A second project wants the same pool.
    let other = env.path("elsewhere/other");
    env.init_repo(&other);
    env.write_config(&other, "other", env.ports.first + 1);
    let _ = env.dbranch_in(&other, &["init", "--yes"]).ok();
    let _ = env
        .dbranch_in(&other, &["init-postgres"])
        .fails(1, &["is not there", "mount"]);
    assert!(is_empty(env.image().point()), "nothing beneath the mount");

    env.image().mount();
    for branch in ["main", "b"] {
        assert_eq!(env.sql_on(branch, "select v from t"), "7");
    }
    assert_eq!(env.volumes().len(), 2);
    let _ = env.dbranch_in(&other, &["init-postgres"]).ok();
}

#[test]
fn a_btrfs_pool_that_is_not_mounted_at_the_start_loses_nothing() {
    a_pool_that_is_not_mounted_at_the_start(Fs::Btrfs);
}

#[test]
fn an_xfs_pool_that_is_not_mounted_at_the_start_loses_nothing() {
    a_pool_that_is_not_mounted_at_the_start(Fs::Xfs);
}

#[test]
fn servers_of_an_unmounted_pool_can_be_stopped() {
    let Some(env) = ready_on(Fs::Btrfs, 512) else {
        return;
    };
    env.image().unmount_lazily();
    let _ = env.dbranch(&["stop", "main"]).ok();
    assert_eq!(env.servers_anywhere(), 0, "so that the disk can be let go");
    env.image().mount();
    assert_eq!(env.sql("select v from t"), "7");
}

#[test]
fn a_server_on_an_unmounted_pool_is_found_again_and_not_started_twice() {
    let Some(env) = ready_on(Fs::Btrfs, 512) else {
        return;
    };
    let pid = env.sql("select pg_postmaster_start_time()");
    env.image().unmount_lazily();
    env.kill_daemon();
    let _ = env.dbranch(&["start", "--detach"]).ok();
    assert_eq!(env.branches(), ["main"]);
    env.image().mount();
    assert_eq!(env.sql("select pg_postmaster_start_time()"), pid);
    assert_eq!(env.servers_anywhere(), 1);
}

#[test]
fn a_disk_that_dies_under_a_server_is_named_and_works_again() {
    let Some(env) = ready_on(Fs::Xfs, 512) else {
        return;
    };
    let point = env.image().point().to_owned();
    // As when the device is gone: every access fails (xfs_io(8), `shutdown`).
    let died = Command::new("xfs_io")
        .args(["-x", "-c", "shutdown"])
        .arg(&point)
        .status();
    assert!(died.is_ok_and(|s| s.success()), "xfs_io is in xfsprogs");
    wait_until(LIMIT, "the server has noticed", || {
        let _ = env.psql(&env.url(), "insert into t values (8)");
        env.state("main") == "failed"
    });
    let show = env.show("main");
    let failure = show["failure"].as_str().unwrap_or_default();
    assert!(failure.contains("Input/output error"), "{show}");
    let refused = env.psql(&env.url(), "select 1");
    let _ = refused.says(&["FATAL", "Input/output error", "HINT"]);
    let checkout = env.git(&["checkout", "-q", "-b", "c"]).ok();
    let _ = checkout.says(&["dbranch: ", "Input/output error", "STAYS on `main`"]);
    assert_eq!(env.branches(), ["main"]);

    env.image().unmount();
    env.image().mount();
    assert_eq!(env.sql("select v from t where v = 7"), "7");
    let _ = env.git(&["checkout", "-q", "main"]).ok();
    let _ = env.git(&["checkout", "-q", "-b", "d"]).ok();
    assert_eq!(env.active(), "d");
}
