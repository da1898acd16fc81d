//! Checkouts while something is wrong, and what else must not go unsaid.

use std::fs;

use crate::support::TestEnv;

#[test]
fn a_checkout_is_followed_though_the_config_is_broken() {
    let Some(env) = TestEnv::ready() else { return };
    env.sql("create table t as select 7 as v");
    let url = env.url();
    let config = env.repo().join(".dbranch.config.json");
    let good = fs::read(&config).expect("set up");
    fs::write(&config, "<<<<<<< HEAD").expect("writable");
    let _ = env.git(&["checkout", "-q", "-b", "b"]).ok().says(&[
        "b <- main",
        ".dbranch.config.json",
        "line 1",
    ]);
    let _ = env.psql(&url, "update t set v = 8").ok();
    let _ = env.dbranch(&["list"]).fails(2, &[".dbranch.config.json"]);
    fs::write(&config, good).expect("writable");
    assert_eq!(env.sql_on("main", "select v from t"), "7");
    assert_eq!(env.sql_on("b", "select v from t"), "8");
}

#[test]
fn commands_that_wait_for_the_users_word_are_mentioned_by_the_hook() {
    let Some(env) = TestEnv::ready() else { return };
    let config = env.repo().join(".dbranch.config.json");
    let text = fs::read_to_string(&config).expect("set up");
    let text = text.replacen('{', r#"{"commands":{"after_create":["touch made"]},"#, 1);
    fs::write(&config, text).expect("writable");
    let _ = env
        .git(&["checkout", "-q", "-b", "b"])
        .ok()
        .says(&["dbranch allow"]);
    assert!(!env.repo().join("made").exists());
}

#[test]
fn a_branch_that_a_linked_worktree_has_checked_out_is_not_deleted_by_mistake() {
    let Some(env) = TestEnv::ready() else { return };
    let side = env.path("elsewhere").join("side");
    let side = side.to_str().expect("text");
    let _ = env.git(&["worktree", "add", "-q", "-b", "side", side]).ok();
    assert_eq!(env.branches(), ["main", "side"]);
    let _ = env
        .dbranch(&["delete", "side", "--yes"])
        .fails(1, &["checked out in", side]);
    let _ = env.dbranch(&["delete", "side", "--yes", "--force"]).ok();
}

#[test]
fn a_repository_that_moved_lets_go_of_its_old_place() {
    let Some(env) = TestEnv::ready() else { return };
    env.sql("create table t as select 7 as v");
    let url = env.url();
    let moved = env.path("elsewhere").join("moved");
    fs::rename(env.repo(), &moved).expect("one file system");
    let _ = env.git_in(&moved, &["checkout", "-q", "-b", "b"]).ok();
    assert_eq!(env.psql(&url, "select v from t").text(), "7");
    let _ = env.dbranch_in(&moved, &["delete", "main", "--yes"]).ok();
    // HEAD is watched in the new place too.
    let _ = env
        .git_in(&moved, &["update-ref", "refs/heads/c", "HEAD"])
        .ok();
    let _ = env
        .git_in(&moved, &["symbolic-ref", "HEAD", "refs/heads/c"])
        .ok();
    crate::support::wait_until(crate::support::LIMIT, "c is followed", || {
        let status = env.dbranch_in(&moved, &["status", "--json"]).json();
        status["branch"] == "c"
    });
}
