//! Checkouts of every kind.

use std::fs;

use crate::support::{LIMIT, TestEnv, wait_until};

fn parent_of(env: &TestEnv, branch: &str) -> String {
    env.show(branch)["parent"]
        .as_str()
        .unwrap_or("none")
        .to_owned()
}

#[test]
fn the_parent_is_the_branch_that_git_was_given() {
    let Some(env) = TestEnv::ready() else { return };
    env.sql("create table t as select 'main' as v");
    let _ = env.git(&["checkout", "-q", "-b", "a"]).ok();
    env.sql("update t set v = 'a'");
    // By name, while another branch is checked out.
    let _ = env.git(&["checkout", "-q", "-b", "from-main", "main"]).ok();
    assert_eq!(
        (parent_of(&env, "from-main"), env.sql("select v from t")),
        ("main".into(), "main".into())
    );
    let _ = env.git(&["switch", "-q", "-c", "from-a", "a"]).ok();
    assert_eq!(
        (parent_of(&env, "from-a"), env.sql("select v from t")),
        ("a".into(), "a".into())
    );
    // By HEAD: the branch that was checked out.
    let _ = env.git(&["checkout", "-q", "-b", "from-head", "HEAD"]).ok();
    assert_eq!(parent_of(&env, "from-head"), "from-a");
    // Made first and checked out later.
    let _ = env.git(&["branch", "later", "main"]).ok();
    let _ = env.git(&["checkout", "-q", "later"]).ok();
    assert_eq!(parent_of(&env, "later"), "main");
}

#[test]
fn a_branch_from_a_commit_comes_from_the_nearest_branch_in_history() {
    let Some(env) = TestEnv::ready() else { return };
    env.sql("create table t as select 'main' as v");
    let _ = env.git(&["checkout", "-q", "-b", "a"]).ok();
    env.sql("update t set v = 'a'");
    let _ = env
        .git(&["commit", "-q", "--allow-empty", "-m", "on a"])
        .ok();
    let commit = env.git(&["rev-parse", "HEAD"]).text();
    let _ = env.git(&["checkout", "-q", "main"]).ok();
    let _ = env.git(&["checkout", "-q", "-b", "near-a", &commit]).ok();
    assert_eq!(env.sql("select v from t"), "a");
    let _ = env.git(&["tag", "v1", "main"]).ok();
    let _ = env.git(&["checkout", "-q", "-b", "near-main", "v1"]).ok();
    assert_eq!(env.sql("select v from t"), "main");
}

#[test]
fn what_is_no_switch_of_branches_changes_nothing() {
    let Some(env) = TestEnv::ready() else { return };
    let _ = env.git(&["checkout", "-q", "-b", "b"]).ok();
    let unchanged = |what: &str| {
        assert_eq!(env.active(), "b", "{what}");
        assert_eq!(env.branches(), ["b", "main"], "{what}");
    };
    fs::write(env.repo().join("app.txt"), "changed\n").expect("ours");
    let file = env.git(&["checkout", "-q", "--", "app.txt"]).ok();
    assert_eq!(file.stderr, "", "a file checkout is silent");
    unchanged("a checkout of a file");
    let _ = env.git(&["checkout", "-q", "--detach"]).ok();
    unchanged("a detached HEAD");
    let _ = env.git(&["tag", "v1"]).ok();
    let _ = env.git(&["checkout", "-q", "v1"]).ok();
    unchanged("a tag");
    let _ = env.git(&["checkout", "-q", "b"]).ok();
    fs::write(env.repo().join("app.txt"), "changed\n").expect("ours");
    let _ = env.git(&["stash", "-q"]).ok();
    let _ = env.git(&["stash", "pop", "-q"]).ok();
    let _ = env.git(&["commit", "-q", "-a", "-m", "changed"]).ok();
    let _ = env.git(&["reset", "-q", "--hard", "HEAD~1"]).ok();
    unchanged("stash, commit and reset");
    let _ = env.git(&["pack-refs", "--all"]).ok();
    let _ = env.git(&["gc", "-q"]).ok();
    unchanged("pack-refs and gc");
}

#[test]
fn a_rebase_ends_on_the_branch_it_rebased() {
    let Some(env) = TestEnv::ready() else { return };
    let _ = env.git(&["checkout", "-q", "-b", "feature"]).ok();
    fs::write(env.repo().join("feature.txt"), "f\n").expect("ours");
    let _ = env.git(&["add", "."]).ok();
    let _ = env.git(&["commit", "-q", "-m", "feature"]).ok();
    let _ = env.git(&["checkout", "-q", "main"]).ok();
    let _ = env
        .git(&["commit", "-q", "--allow-empty", "-m", "more"])
        .ok();
    // Two arguments: git goes from main to feature, and no hook tells of its end there.
    let _ = env.git(&["rebase", "-q", "main", "feature"]).ok();
    wait_until(LIMIT, "the end of the rebase is seen", || {
        env.active() == "feature"
    });
    assert_eq!(env.branches(), ["feature", "main"]);
}

#[test]
fn a_renamed_git_branch_keeps_its_database() {
    let Some(env) = TestEnv::ready() else { return };
    let _ = env.git(&["checkout", "-q", "-b", "old"]).ok();
    env.sql("create table only_here()");
    let id = env.show("old")["id"].clone();
    // git runs no hook for it: the watcher sees HEAD change.
    let _ = env.git(&["branch", "-m", "old", "new"]).ok();
    wait_until(LIMIT, "the database has the new name", || {
        env.branches() == ["main", "new"]
    });
    assert_eq!(env.show("new")["id"], id);
    assert_eq!(env.active(), "new");
    env.sql("table only_here");
}

#[test]
fn a_switch_without_hooks_is_seen_by_the_watcher() {
    let Some(env) = TestEnv::ready() else { return };
    env.sql("create table t as select 'main' as v");
    let _ = env.dbranch(&["uninstall-hooks"]).ok();
    let _ = env.git(&["checkout", "-q", "-b", "quiet"]).ok();
    wait_until(LIMIT, "the new branch is there", || env.active() == "quiet");
    assert_eq!(parent_of(&env, "quiet"), "main");
    let _ = env.git(&["checkout", "-q", "main"]).ok();
    wait_until(LIMIT, "main is back", || env.active() == "main");
    assert_eq!(env.sql("select v from t"), "main");
}

#[test]
fn a_switch_while_no_daemon_runs_is_caught_up_with() {
    let Some(env) = TestEnv::ready() else { return };
    let mut quiet = env.command("git", &env.repo());
    let _ = env.dbranch(&["shutdown", "--stop-branches"]).ok();
    quiet.args([
        "-c",
        "core.hooksPath=/dev/null",
        "checkout",
        "-q",
        "-b",
        "b",
    ]);
    let _ = crate::support::process::run(quiet, LIMIT).ok();
    // The hook is off and so is the daemon: its next start asks git.
    let _ = env.dbranch(&["start", "--detach"]).ok();
    wait_until(LIMIT, "the endpoint shows b", || env.active() == "b");
    assert_eq!(parent_of(&env, "b"), "main");
}

#[test]
fn the_hook_starts_the_daemon() {
    let Some(env) = TestEnv::ready() else { return };
    env.sql("create table t as select 7 as v");
    let _ = env.dbranch(&["shutdown", "--stop-branches"]).ok();
    let _ = env
        .git(&["checkout", "-q", "-b", "b"])
        .ok()
        .says(&["b <- main"]);
    assert_eq!(env.sql("select v from t"), "7");
}

#[test]
fn a_hook_that_can_not_work_never_fails_git() {
    let Some(mut env) = TestEnv::ready() else {
        return;
    };
    env.kill_daemon();
    // No daemon can be started from a home that is a file.
    let file = env.path("elsewhere/file");
    fs::write(&file, "").expect("ours");
    env.set("DBRANCH_HOME", &file);
    let _ = env.git(&["checkout", "-q", "-b", "b"]).ok();
    env.unset("DBRANCH_HOME");
    // A hook that finds no dbranch is silent.
    env.set("PATH", "/usr/local/bin:/usr/bin:/bin");
    env.set("DBRANCH_HOOKS", "0");
    assert_eq!(env.git(&["checkout", "-q", "main"]).ok().stderr, "");
    env.unset("PATH");
    env.unset("DBRANCH_HOOKS");
    assert_eq!(env.sql("select 1"), "1");
}

#[test]
fn switches_back_and_forth_in_a_row_end_where_git_ends() {
    let Some(env) = TestEnv::ready() else { return };
    env.sql("create table t as select 'main' as v");
    for name in ["a", "b"] {
        let _ = env.git(&["checkout", "-q", "-b", name, "main"]).ok();
        env.sql(&format!("update t set v = '{name}'"));
    }
    for round in 0..10 {
        for name in ["a", "main", "b"] {
            let _ = env.git(&["checkout", "-q", name]).ok();
        }
        assert_eq!(env.sql("select v from t"), "b", "round {round}");
        let _ = env.git(&["checkout", "-q", "main"]).ok();
        assert_eq!(env.sql("select v from t"), "main", "round {round}");
    }
    assert_eq!(env.branches(), ["a", "b", "main"]);
}
