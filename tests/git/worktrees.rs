//! Linked worktrees: each on a port of its own, and on the main one for what runs in it.

use std::path::Path;

use crate::support::{LIMIT, TestEnv, wait_until};

fn add(env: &TestEnv, name: &str, args: &[&str]) -> std::path::PathBuf {
    let top = env.path(name);
    let at = top.to_str().expect("text");
    let _ = env
        .git(&[&["worktree", "add", "-q"], args, &[at]].concat())
        .ok();
    top
}

fn url_in(env: &TestEnv, top: &Path) -> String {
    env.dbranch_in(top, &["url"]).text()
}

fn branch_in(env: &TestEnv, top: &Path) -> serde_json::Value {
    env.dbranch_in(top, &["status", "--json"]).json()["branch"].clone()
}

/// What `select v from t` answers to a client that runs in a folder.
fn seen_from(env: &TestEnv, dir: &Path, url: &str) -> String {
    env.psql_in(dir, url, "select v from t").text()
}

#[test]
fn each_worktree_has_a_port_that_follows_its_own_head() {
    let Some(env) = TestEnv::ready() else { return };
    env.sql("create table t as select 'main' as v");
    let main = env.url();
    let side = add(&env, "side", &["-b", "side"]);
    let url = url_in(&env, &side);
    assert_ne!(url, main);
    assert_ne!(
        url,
        env.url_of("side"),
        "a branch's own port is another one"
    );
    let _ = env.psql(&url, "update t set v = 'side'").ok();
    assert_eq!(env.psql(&url, "select v from t").text(), "side");
    assert_eq!(env.psql(&main, "select v from t").text(), "main");

    let _ = env.git_in(&side, &["switch", "-q", "-c", "other"]).ok();
    let _ = env.psql(&url, "update t set v = 'other'").ok();
    assert_eq!(url_in(&env, &side), url, "the port stays");
    let _ = env.git_in(&side, &["switch", "-q", "side"]).ok();
    assert_eq!(env.psql(&url, "select v from t").text(), "side");
    assert_eq!(env.active(), "main");

    let _ = env.dbranch_in(&side, &["use", "other"]).ok();
    assert_eq!(env.psql(&url, "select v from t").text(), "other");
    let _ = env.dbranch_in(&side, &["use"]).ok();
    assert_eq!(branch_in(&env, &side), "side");
}

#[test]
fn a_client_on_the_main_port_reaches_the_branch_of_the_worktree_it_runs_in() {
    let Some(env) = TestEnv::ready() else { return };
    env.sql("create table t as select 'main' as v");
    let main = env.url();
    let side = add(&env, "side", &["-b", "side"]);
    let _ = env
        .psql(&url_in(&env, &side), "update t set v = 'side'")
        .ok();
    // Inside the main worktree's folder, as many have them.
    let inner = env.repo().join("trees/inner");
    let at = inner.to_str().expect("text");
    let _ = env.git(&["worktree", "add", "-q", "-b", "inner", at]).ok();
    let _ = env
        .psql(&url_in(&env, &inner), "update t set v = 'inner'")
        .ok();

    let below = side.join("below");
    std::fs::create_dir(&below).expect("ours");
    assert_eq!(seen_from(&env, &side, &main), "side");
    assert_eq!(seen_from(&env, &below, &main), "side");
    assert_eq!(seen_from(&env, &inner, &main), "inner");
    assert_eq!(seen_from(&env, &env.repo(), &main), "main");
    assert_eq!(seen_from(&env, Path::new("/"), &main), "main");
    let _ = env
        .dbranch_in(&side, &["status"])
        .ok()
        .says(&["reach it on the main port"]);

    crate::support::edit_config(&env.repo(), |config| {
        config["route_by_process"] = false.into();
    });
    let _ = env.dbranch(&["status"]).ok();
    assert_eq!(seen_from(&env, &side, &main), "main");
}

#[test]
fn worktrees_are_followed_without_hooks() {
    let Some(env) = TestEnv::ready() else { return };
    let _ = env.dbranch(&["uninstall-hooks"]).ok();
    let side = add(&env, "side", &["-b", "side"]);
    wait_until(LIMIT, "the new worktree is followed", || {
        branch_in(&env, &side) == "side"
    });
    let _ = env.git_in(&side, &["switch", "-q", "-c", "other"]).ok();
    wait_until(LIMIT, "its switch is followed", || {
        branch_in(&env, &side) == "other"
    });
}

#[test]
fn a_worktree_keeps_its_port_when_it_moves_and_gives_it_back_when_it_goes() {
    let Some(env) = TestEnv::ready() else { return };
    let side = add(&env, "side", &["-b", "side"]);
    let url = url_in(&env, &side);
    let _ = env.dbranch(&["shutdown"]).ok();
    assert_eq!(url_in(&env, &side), url, "another daemon, the same port");

    let moved = env.path("moved");
    let [from, to] = [&side, &moved].map(|p| p.to_str().expect("text"));
    let _ = env.git(&["worktree", "move", from, to]).ok();
    assert_eq!(url_in(&env, &moved), url);
    assert_eq!(env.psql(&url, "select 1").text(), "1");

    let _ = env.git(&["worktree", "remove", "--force", to]).ok();
    wait_until(LIMIT, "the port is let go", || {
        env.psql(&url, "select 1").code != Some(0)
    });
    assert_eq!(env.branches(), ["main", "side"], "its database stays");
}

#[test]
fn worktrees_follow_a_repository_that_moved() {
    let Some(env) = TestEnv::ready() else { return };
    env.sql("create table t as select 'main' as v");
    let side = add(&env, "side", &["-b", "side"]);
    let url = url_in(&env, &side);
    let _ = env.psql(&url, "update t set v = 'side'").ok();
    let moved = env.path("elsewhere").join("moved");
    std::fs::rename(env.repo(), &moved).expect("one file system");
    let at = side.to_str().expect("text");
    let _ = env.git_in(&moved, &["worktree", "repair", at]).ok();
    assert_eq!(env.dbranch_in(&side, &["url"]).text(), url);
    wait_until(LIMIT, "the port is open again", || {
        env.psql(&url, "select v from t").stdout.trim() == "side"
    });
}
