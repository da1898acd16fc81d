//! Stopping, waking, switching by hand.

use crate::support::TestEnv;

#[test]
fn a_connection_starts_a_stopped_branch() {
    let Some(env) = TestEnv::ready() else { return };
    let url = env.url();
    let _ = env.dbranch(&["stop"]).ok();
    assert_eq!(env.state("main"), "stopped");
    assert_eq!(env.servers(), 0);
    assert_eq!(env.psql(&url, "select 1").text(), "1");
    assert_eq!(env.state("main"), "running");
}

#[test]
fn many_connections_at_once_start_a_stopped_branch_once() {
    let Some(env) = TestEnv::ready() else { return };
    let url = env.url();
    let _ = env.dbranch(&["stop", "main"]).ok();
    let mut sessions: Vec<_> = (0..8).map(|_| env.session(&url)).collect();
    for session in &mut sessions {
        session.send("select pg_postmaster_start_time()");
    }
    let mut answers: Vec<String> = sessions
        .iter_mut()
        .map(|s| {
            s.answer()
                .expect("each waits for the start and sees no error")
        })
        .collect();
    answers.dedup();
    assert_eq!(answers.len(), 1, "{answers:?}");
    assert_eq!(env.servers(), 1);
}

#[test]
fn stop_and_resume_can_be_repeated() {
    let Some(env) = TestEnv::ready() else { return };
    let _ = env.dbranch(&["create", "other", "--from", "main"]).ok();
    for _ in 0..2 {
        let _ = env.dbranch(&["stop", "other"]).ok();
    }
    assert_eq!(env.state("other"), "stopped");
    assert_eq!(env.state("main"), "running");
    for _ in 0..2 {
        let _ = env.dbranch(&["resume", "other"]).ok();
    }
    assert_eq!(env.state("other"), "running");
    let _ = env.dbranch(&["stop", "--all"]).ok();
    assert_eq!(env.servers(), 0);
    let _ = env.dbranch(&["stop", "nope"]).fails(1, &["`nope`"]);
}

#[test]
fn use_turns_the_endpoint_and_dash_turns_it_back() {
    let Some(env) = TestEnv::ready() else { return };
    env.sql("create table t(v int)");
    let _ = env.dbranch(&["create", "other", "--from", "main"]).ok();
    assert_eq!(env.active(), "main", "create does not switch");
    let _ = env.dbranch(&["use", "other"]).ok();
    env.sql("drop table t");
    assert_eq!(env.active(), "other");
    let _ = env.dbranch(&["use", "-"]).ok();
    assert_eq!(env.active(), "main");
    assert_eq!(env.sql("select count(*) from t"), "0");
    let _ = env.dbranch(&["use", "-"]).ok();
    assert_eq!(env.active(), "other");
    // What git says counts again from its next switch on.
    let _ = env.git(&["checkout", "-q", "-b", "next"]).ok();
    assert_eq!(env.active(), "next");
    let _ = env.dbranch(&["use", "nope"]).fails(1, &["`nope`"]);
    assert_eq!(env.active(), "next");
}

#[test]
fn the_first_use_of_dash_says_that_there_is_no_previous_branch() {
    let Some(env) = TestEnv::ready() else { return };
    let _ = env.dbranch(&["use", "-"]).fails(1, &["before"]);
}

#[test]
fn a_branch_is_made_from_the_parent_that_is_named() {
    let Some(env) = TestEnv::ready() else { return };
    env.sql("create table t(v int)");
    let _ = env.git(&["checkout", "-q", "-b", "a"]).ok();
    env.sql("insert into t values (1)");
    let _ = env.dbranch(&["create", "from-main", "--from", "main"]).ok();
    let _ = env.dbranch(&["create", "from-here"]).ok();
    assert_eq!(env.sql_on("from-main", "select count(*) from t"), "0");
    assert_eq!(env.sql_on("from-here", "select count(*) from t"), "1");
    let _ = env.dbranch(&["create", "a"]).fails(1, &["`a`", "exists"]);
    let _ = env
        .dbranch(&["create", "b", "--from", "nope"])
        .fails(1, &["`nope`"]);
    assert_eq!(env.branches(), ["a", "from-here", "from-main", "main"]);
}
