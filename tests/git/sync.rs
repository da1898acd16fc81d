//! `dbranch sync`: what hooks and watcher do, by hand.

use crate::support::TestEnv;

#[test]
fn sync_says_what_it_would_do_and_then_does_it() {
    let Some(env) = TestEnv::ready() else { return };
    env.sql("create table t as select 7 as v");
    let _ = env.dbranch(&["create", "b", "--from", "main"]).ok();
    let _ = env.dbranch(&["use", "b"]).ok();
    // git is on main, the endpoint on b, by hand.
    let plan = env.dbranch(&["sync", "--dry-run"]).ok();
    assert!(
        format!("{}{}", plan.stdout, plan.stderr).contains("main"),
        "{plan}"
    );
    assert_eq!(env.active(), "b", "a dry run changes nothing");
    let done = env.dbranch(&["sync"]).ok();
    assert!(
        format!("{}{}", done.stdout, done.stderr).contains("main"),
        "{done}"
    );
    assert_eq!(env.active(), "main");
    let again = env.dbranch(&["sync", "--json"]).json();
    assert_eq!(again["actions"], serde_json::json!([]));
}

#[test]
fn sync_of_a_detached_head_changes_nothing() {
    let Some(env) = TestEnv::ready() else { return };
    let _ = env.git(&["checkout", "-q", "--detach"]).ok();
    let sync = env.dbranch(&["sync", "--json"]).json();
    assert_eq!(sync["actions"], serde_json::json!([]));
    assert_eq!(env.active(), "main");
}
