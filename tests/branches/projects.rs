//! Several repositories, names that clash, folders that move.

use std::fs;

use crate::support::{TestEnv, edit_config};

/// A second repository with a config of that name, on the environment's second proxy port.
fn second_project(env: &TestEnv, name: &str) -> std::path::PathBuf {
    let dir = env.path("second");
    env.init_repo(&dir);
    env.write_config(&dir, name, env.ports.first + 1);
    let _ = env.dbranch_in(&dir, &["init", "--yes"]).ok();
    dir
}

#[test]
fn two_projects_of_one_name_live_side_by_side() {
    let Some(env) = TestEnv::ready() else { return };
    env.sql("create table t as select 'first' as v");
    let second = second_project(&env, "shop");
    let _ = env.dbranch_in(&second, &["init-postgres"]).ok();
    let url = env.dbranch_in(&second, &["url"]).text();
    assert_ne!(url, env.url());
    let _ = env
        .psql(&url, "create table t as select 'second' as v")
        .ok();
    assert_eq!(env.sql("select v from t"), "first");
    let _ = env
        .dbranch_in(&second, &["delete-project", "--now", "--yes"])
        .ok();
    assert_eq!(env.sql("select v from t"), "first");
    assert_eq!(env.branches(), ["main"]);
}

#[test]
fn a_proxy_port_of_another_project_is_said_and_another_one_taken() {
    let Some(env) = TestEnv::ready() else { return };
    let dir = env.path("second");
    env.init_repo(&dir);
    env.write_config(&dir, "rival", env.ports.first);
    let taken = env.ports.first.to_string();
    let _ = env
        .dbranch_in(&dir, &["init", "--yes"])
        .ok()
        .says(&[&taken, "`shop`"]);
    let rival = env.dbranch_in(&dir, &["status", "--json"]).json();
    assert_ne!(rival["proxy_port"], env.ports.first);
    assert_eq!(env.sql("select 1"), "1");
}

#[test]
fn two_clones_of_one_repository_have_databases_of_their_own() {
    let Some(env) = TestEnv::ready() else { return };
    env.sql("create table t as select 'first' as v");
    let _ = env.git(&["add", ".dbranch.config.json"]).ok();
    let _ = env.git(&["commit", "-q", "-m", "config"]).ok();
    let clone = env.path("clone");
    let (from, to) = (env.repo(), clone.display().to_string());
    let _ = env
        .git(&["clone", "-q", &from.display().to_string(), &to])
        .ok();
    // The committed config names the port that the first checkout uses: the second has another.
    let _ = env.dbranch_in(&clone, &["init", "--yes"]).ok();
    let _ = env.dbranch_in(&clone, &["init-postgres"]).ok();
    let url = env.dbranch_in(&clone, &["url"]).text();
    assert_ne!(url, env.url());
    let shared = env.git_in(&clone, &["status", "--porcelain"]).text();
    assert_eq!(shared, "", "the team's file is not touched");
    assert_eq!(
        env.psql(&url, "select to_regclass('t') is null").text(),
        "t"
    );
    assert_eq!(env.sql("select v from t"), "first");
}

#[test]
fn a_repository_that_moved_keeps_its_branches() {
    let Some(env) = TestEnv::ready() else { return };
    env.sql("create table t as select 'kept' as v");
    let _ = env.git(&["checkout", "-q", "-b", "feature"]).ok();
    let url = env.url();
    let moved = env.path("moved");
    fs::rename(env.repo(), &moved).expect("movable");
    let status = env.dbranch_in(&moved, &["status", "--json"]);
    let status = if status.code == Some(0) {
        status
    } else {
        // It may ask to be told; then one command is all it takes.
        let _ = status.fails(1, &["dbranch init"]);
        let _ = env.dbranch_in(&moved, &["init", "--yes"]).ok();
        env.dbranch_in(&moved, &["status", "--json"])
    };
    assert_eq!(status.json()["branch"], "feature");
    assert_eq!(env.dbranch_in(&moved, &["url"]).text(), url);
    assert_eq!(env.psql(&url, "select v from t").text(), "kept");
    let _ = env.git_in(&moved, &["checkout", "-q", "main"]).ok();
    let _ = env
        .git_in(&moved, &["checkout", "-q", "-b", "later"])
        .ok()
        .says(&["later <- main"]);
    fs::rename(&moved, env.repo()).expect("movable");
    let _ = env.dbranch(&["init", "--yes"]).ok();
    assert_eq!(env.branches(), ["feature", "later", "main"]);
}

#[test]
fn a_copied_repository_is_a_project_of_its_own() {
    let Some(env) = TestEnv::ready() else { return };
    env.sql("create table t as select 'first' as v");
    let copy = env.path("copy");
    let (from, to) = (env.repo().display().to_string(), copy.display().to_string());
    let _ = env.run("cp", &["-a", &from, &to]).ok();
    edit_config(&copy, |c| c["proxy_port"] = (env.ports.first + 1).into());
    let _ = env.dbranch_in(&copy, &["init", "--yes"]).ok();
    let _ = env.dbranch_in(&copy, &["init-postgres"]).ok();
    let url = env.dbranch_in(&copy, &["url"]).text();
    let _ = env.psql(&url, "create table t as select 'copy' as v").ok();
    assert_eq!(
        env.sql("select v from t"),
        "first",
        "the first one keeps its own"
    );
}
