//! A disk that hangs: whatever writes to it waits.

use std::time::{Duration, Instant};

use super::{ready_on, with_branch_b};
use crate::support::{Fs, LIMIT, TestEnv, wait_until};

/// How long git may be kept: the hook's own limit of 5 s, and what a busy machine adds.
const GIT_LIMIT: Duration = Duration::from_secs(7);
const ANSWER_LIMIT: Duration = Duration::from_secs(4);

#[track_caller]
fn within<T>(limit: Duration, what: impl FnOnce() -> T) -> T {
    let begun = Instant::now();
    let done = what();
    let took = begun.elapsed();
    assert!(took < limit, "it took {took:?}, not {limit:?}");
    done
}

/// The daemon answers what needs no disk.
#[track_caller]
fn all_answers(env: &TestEnv) {
    let _ = within(ANSWER_LIMIT, || env.dbranch(&["status", "--json"]).json());
    let _ = within(ANSWER_LIMIT, || env.dbranch(&["list", "--json"]).json());
    let _ = within(ANSWER_LIMIT, || env.show("main"));
}

fn a_disk_that_hangs(fs: Fs) {
    let Some(mut env) = ready_on(fs, 1024) else {
        return;
    };
    with_branch_b(&env);
    env.image().freeze();
    let checkout = within(GIT_LIMIT, || env.git(&["checkout", "-q", "-b", "c"]).ok());
    let _ = checkout.says(&["dbranch: not done after 5s", "in the background"]);
    all_answers(&env);
    // More of them than the daemon has threads.
    env.set("DBRANCH_HOOK_TIMEOUT", "300ms");
    for name in ["d", "e", "f"] {
        let _ = env.git(&["checkout", "-q", "-b", name]).ok();
    }
    let _ = env.git(&["checkout", "-q", "b"]).ok();
    all_answers(&env);
    env.image().thaw();
    wait_until(LIMIT, "what was begun is finished", || {
        env.active() == "b" && env.branches().contains(&"c".to_owned())
    });
    assert_eq!(env.sql("select v from t"), "7");
    assert_eq!(env.sql_on("c", "select v from t"), "7");
    let _ = env.git(&["checkout", "-q", "d"]).ok();
    wait_until(LIMIT, "d has its database", || env.active() == "d");
    assert_eq!(env.sql("select v from t"), "7");
}

#[test]
fn a_btrfs_disk_that_hangs_keeps_neither_git_nor_the_daemon() {
    a_disk_that_hangs(Fs::Btrfs);
}

#[test]
fn an_xfs_disk_that_hangs_keeps_neither_git_nor_the_daemon() {
    a_disk_that_hangs(Fs::Xfs);
}

#[test]
fn a_daemon_starts_while_a_disk_hangs() {
    let Some(env) = ready_on(Fs::Btrfs, 512) else {
        return;
    };
    let _ = env.dbranch(&["shutdown", "--stop-branches"]).ok();
    // What an interrupted call has left, so that there is something to sweep.
    std::fs::create_dir(env.pool().join("abc.partial")).expect("ours");
    env.image().freeze();
    let checkout = within(GIT_LIMIT, || env.git(&["checkout", "-q", "-b", "c"]).ok());
    assert!(checkout.stderr.contains("dbranch: "), "{checkout}");
    all_answers(&env);
    env.image().thaw();
    wait_until(LIMIT, "c has its database", || env.active() == "c");
    assert_eq!(env.sql("select v from t"), "7");
    assert_eq!(env.volumes().len(), 2, "and the pool was swept");
}
