//! Data that can't be served: said plainly, to every client, and nothing is lost.

use std::fs;
use std::path::PathBuf;

use crate::support::{LIMIT, TestEnv, is_alive, kill_9, processes_in, wait_until};

fn data_dir(env: &TestEnv, branch: &str) -> PathBuf {
    let show = env.show(branch);
    PathBuf::from(show["volume"].as_str().expect("a path")).join("data")
}

#[test]
fn a_branch_that_can_not_start_tells_each_client_which_and_why() {
    let Some(env) = TestEnv::ready() else { return };
    env.sql("create table t as select 7 as v");
    let _ = env.dbranch(&["create", "broken", "--from", "main"]).ok();
    let _ = env.dbranch(&["stop", "broken"]).ok();
    let control = data_dir(&env, "broken").join("global/pg_control");
    let aside = control.with_extension("aside");
    fs::rename(&control, &aside).expect("a stopped branch's file can be moved");

    let refused = env.psql(&env.url_of("broken"), "select 1");
    assert_eq!(refused.code, Some(2), "{refused}");
    let refused = refused.says(&["FATAL", "`broken`", "HINT"]);
    assert!(
        refused.stderr.contains("pg_control"),
        "the server's own reason: {refused}"
    );
    assert_eq!(env.state("broken"), "failed");
    let _ = env.dbranch(&["resume", "broken"]).fails(1, &["`broken`"]);
    assert!(
        env.dbranch(&["logs", "broken"])
            .text()
            .contains("pg_control")
    );
    assert_eq!(env.sql("select v from t"), "7", "others go on");

    fs::rename(&aside, &control).expect("and back");
    let _ = env.dbranch(&["resume", "broken"]).ok();
    assert_eq!(env.sql_on("broken", "select v from t"), "7");
}

#[test]
fn a_data_directory_of_another_major_version_is_refused() {
    let Some(env) = TestEnv::ready() else { return };
    let _ = env.dbranch(&["create", "ancient", "--from", "main"]).ok();
    let _ = env.dbranch(&["stop", "ancient"]).ok();
    let version = data_dir(&env, "ancient").join("PG_VERSION");
    let right = fs::read(&version).expect("a cluster has one");
    fs::write(&version, "9\n").expect("writable");
    let _ = env
        .dbranch(&["resume", "ancient"])
        .fails(1, &["`ancient`", "9"]);
    let refused = env
        .psql(&env.url_of("ancient"), "select 1")
        .says(&["FATAL", "`ancient`", "9"]);
    assert_eq!(refused.code, Some(2), "{refused}");
    fs::write(&version, right).expect("writable");
    assert_eq!(env.sql_on("ancient", "select 1"), "1");
}

#[test]
fn a_volume_that_is_gone_is_said() {
    let Some(env) = TestEnv::ready() else { return };
    let _ = env.dbranch(&["create", "gone", "--from", "main"]).ok();
    let _ = env.dbranch(&["stop", "gone"]).ok();
    let volume = PathBuf::from(env.show("gone")["volume"].as_str().expect("a path"));
    let aside = volume.with_extension("aside");
    fs::rename(&volume, &aside).expect("movable");
    let _ = env.dbranch(&["resume", "gone"]).fails(1, &["`gone`"]);
    let _ = env
        .dbranch(&["create", "child", "--from", "gone"])
        .fails(1, &["`gone`"]);
    assert_eq!(env.branches(), ["gone", "main"]);
    fs::rename(&aside, &volume).expect("movable");
    assert_eq!(env.sql_on("gone", "select 1"), "1");
}

#[test]
fn a_server_that_is_killed_is_noticed_and_started_by_the_next_connection() {
    let Some(env) = TestEnv::ready() else { return };
    env.sql("create table t as select 7 as v");
    let server = processes_in(&env.pool())
        .into_iter()
        .find(|p| p.command.contains("-D"))
        .expect("main runs");
    kill_9(server.pid);
    wait_until(LIMIT, "the server is gone", || !is_alive(server.pid));
    wait_until(LIMIT, "its end is noticed", || {
        env.state("main") != "running"
    });
    // Its own children may hold the data directory for a moment: the start must cope.
    assert_eq!(env.sql("select v from t"), "7");
    assert_eq!(env.state("main"), "running");
}
