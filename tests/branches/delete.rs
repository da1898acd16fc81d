//! Deleting, bringing back, destroying.

use crate::support::{LIMIT, TestEnv, wait_until};

/// An environment on `main` with a branch `old` that holds a row of its own.
fn with_old_branch() -> Option<TestEnv> {
    let env = TestEnv::ready()?;
    env.sql("create table t(v text)");
    let _ = env.git(&["checkout", "-q", "-b", "old"]).ok();
    env.sql("insert into t values ('kept')");
    let _ = env.git(&["checkout", "-q", "main"]).ok();
    Some(env)
}

#[test]
fn delete_keeps_a_branch_in_the_trash_and_undelete_brings_it_back() {
    let Some(env) = with_old_branch() else { return };
    let id = env.show("old")["id"].clone();
    let _ = env
        .dbranch(&["delete", "old", "--yes"])
        .ok()
        .says(&["undelete"]);
    assert_eq!(env.branches(), ["main"]);
    wait_until(LIMIT, "the deleted branch's instance is stopped", || {
        env.servers() == 1
    });
    assert_eq!(env.volumes().len(), 2, "the data is kept");
    let _ = env
        .dbranch(&["show", "old"])
        .fails(1, &["`old`", "undelete"]);

    let _ = env.dbranch(&["undelete", "old"]).ok();
    assert_eq!(env.branches(), ["main", "old"]);
    assert_eq!(env.show("old")["id"], id);
    assert_eq!(env.sql_on("old", "select v from t"), "kept");
    let _ = env.dbranch(&["undelete", "old"]).fails(1, &["`old`"]);
}

#[test]
fn delete_now_destroys() {
    let Some(env) = with_old_branch() else { return };
    let _ = env.dbranch(&["delete", "old", "--now", "--yes"]).ok();
    assert_eq!(env.branches(), ["main"]);
    assert_eq!(env.volumes().len(), 1);
    let _ = env.dbranch(&["undelete", "old"]).fails(1, &["`old`"]);
    // The name is free: git's branch gets a new database.
    let _ = env.git(&["checkout", "-q", "old"]).ok();
    assert_eq!(env.sql("select count(*) from t"), "0");
}

#[test]
fn delete_now_destroys_what_lies_in_the_trash() {
    let Some(env) = with_old_branch() else { return };
    let _ = env.dbranch(&["delete", "old", "--yes"]).ok();
    let _ = env.dbranch(&["delete", "old", "--now", "--yes"]).ok();
    assert_eq!(env.volumes().len(), 1);
    let _ = env.dbranch(&["undelete", "old"]).fails(1, &["`old`"]);
}

#[test]
fn delete_without_a_terminal_wants_yes() {
    let Some(env) = with_old_branch() else { return };
    let _ = env.dbranch(&["delete", "old"]).fails(1, &["old", "--yes"]);
    assert_eq!(env.branches(), ["main", "old"]);
    let _ = env.dbranch(&["delete-project"]).fails(1, &["--yes"]);
    assert_eq!(env.branches(), ["main", "old"]);
}

#[test]
fn delete_refuses_the_active_branch_without_force() {
    let Some(env) = with_old_branch() else { return };
    let _ = env.git(&["checkout", "-q", "old"]).ok();
    let _ = env
        .dbranch(&["delete", "old", "--yes"])
        .fails(1, &["`old`", "--force"]);
    assert_eq!(env.sql("select v from t"), "kept");
    let _ = env.dbranch(&["delete", "old", "--yes", "--force"]).ok();
    assert_eq!(env.branches(), ["main"]);
    let _ = env.dbranch(&["undelete", "old"]).ok();
    assert_eq!(env.sql_on("old", "select v from t"), "kept");
}

#[test]
fn delete_refuses_a_branch_with_sessions_without_force() {
    let Some(env) = with_old_branch() else { return };
    let mut session = env.session(&env.url_of("old"));
    assert_eq!(session.run("select v from t").as_deref(), Ok("kept"));
    let _ = env
        .dbranch(&["delete", "old", "--yes"])
        .fails(1, &["`old`", "--force"]);
    assert_eq!(session.run("select 1").as_deref(), Ok("1"));
    let _ = env.dbranch(&["delete", "old", "--yes", "--force"]).ok();
    let lost = session.run("select 1").expect_err("its branch is gone");
    assert!(lost.contains("57P01"), "{lost}");
}

#[test]
fn children_live_on_without_their_parent() {
    let Some(env) = with_old_branch() else { return };
    let _ = env.git(&["checkout", "-q", "old"]).ok();
    let _ = env.git(&["checkout", "-q", "-b", "child"]).ok();
    let _ = env.dbranch(&["delete", "old", "--now", "--yes"]).ok();
    assert_eq!(env.sql("select v from t"), "kept");
    let _ = env.dbranch(&["stop", "child"]).ok();
    assert_eq!(env.sql("select v from t"), "kept");
    // Scripts read a name or nothing, never the name of what is gone.
    assert!(env.show("child")["parent"].is_null());
}

#[test]
fn a_name_can_be_used_again_while_its_old_branch_lies_in_the_trash() {
    let Some(env) = with_old_branch() else { return };
    let _ = env.dbranch(&["delete", "old", "--yes"]).ok();
    let _ = env.dbranch(&["create", "old", "--from", "main"]).ok();
    assert_eq!(env.sql_on("old", "select count(*) from t"), "0");
    let _ = env.dbranch(&["undelete", "old"]).fails(1, &["`old`"]);
    assert_eq!(env.sql_on("old", "select count(*) from t"), "0");
}

#[test]
fn delete_of_an_unknown_branch_is_refused() {
    let Some(env) = with_old_branch() else { return };
    let _ = env
        .dbranch(&["delete", "odl", "--yes"])
        .fails(1, &["`odl`", "dbranch list"]);
    assert_eq!(env.branches(), ["main", "old"]);
}

#[test]
fn delete_project_keeps_the_data_and_now_destroys_it() {
    let Some(env) = with_old_branch() else { return };
    let _ = env.dbranch(&["delete-project", "--yes"]).ok();
    wait_until(LIMIT, "the instances are stopped", || env.servers() == 0);
    assert_eq!(env.volumes().len(), 2, "the data is kept");
    let _ = env.dbranch(&["list"]).fails(2, &["dbranch init"]);

    let _ = env.dbranch(&["init", "--yes"]).ok();
    let _ = env.dbranch(&["init-postgres"]).ok();
    assert_eq!(env.branches(), ["main"]);
    let volumes = env.volumes().len();
    let _ = env.dbranch(&["delete-project", "--now", "--yes"]).ok();
    assert!(env.volumes().len() < volumes);
    assert_eq!(env.servers(), 0);
}
