//! Sessions while the endpoint turns from one branch to another.

use std::time::{Duration, Instant};

use tokio_postgres::NoTls;

use crate::support::{LIMIT, TestEnv, edit_config};

/// `main` with an empty table `t`, and a branch `other` that has it too.
fn two_branches() -> Option<TestEnv> {
    let env = TestEnv::ready()?;
    env.sql("create table t(v text)");
    let _ = env.git(&["branch", "-q", "other"]).ok();
    let _ = env.dbranch(&["create", "other", "--from", "main"]).ok();
    Some(env)
}

#[test]
fn an_idle_session_is_ended_with_57p01_without_asking() {
    let Some(env) = two_branches() else { return };
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .expect("a runtime can be made");
    let url = env.url();
    runtime.block_on(async {
        let (client, connection) = tokio_postgres::connect(&url, NoTls)
            .await
            .expect("connects");
        let ended = tokio::spawn(connection);
        client.simple_query("select 1").await.expect("answers");
        let switch = tokio::task::spawn_blocking(move || {
            let _ = env.git(&["checkout", "-q", "other"]).ok();
            env
        });
        let end = tokio::time::timeout(LIMIT, ended)
            .await
            .expect("ended by itself");
        let error = end.expect("no panic").expect_err("ended by the server");
        let error = error.as_db_error().expect("told by an ErrorResponse");
        assert_eq!(error.code().code(), "57P01");
        assert_eq!(error.severity(), "FATAL");
        assert!(error.message().contains("other"), "{error:?}");
        drop(switch.await.expect("the switch is done"));
    });
}

#[test]
fn a_session_in_a_transaction_finishes_it_where_it_began() {
    let Some(env) = two_branches() else { return };
    let mut session = env.session(&env.url());
    assert_eq!(
        session
            .run("begin; insert into t values ('before')")
            .as_deref(),
        Ok("")
    );
    let _ = env.git(&["checkout", "-q", "other"]).ok();
    assert_eq!(
        env.sql("select count(*) from t"),
        "0",
        "new sessions are on the new branch"
    );
    assert_eq!(
        session.run("insert into t values ('after')").as_deref(),
        Ok("")
    );
    assert_eq!(
        session.run("commit; select count(*) from t").ok(),
        None,
        "ended after the commit"
    );
    assert_eq!(
        env.sql("select count(*) from t"),
        "0",
        "nothing strayed to the new branch"
    );
    let _ = env.git(&["checkout", "-q", "main"]).ok();
    assert_eq!(
        env.sql("select string_agg(v, ' ' order by v) from t"),
        "after before"
    );
}

#[test]
fn the_end_after_a_transaction_is_57p01() {
    let Some(env) = two_branches() else { return };
    let mut session = env.session(&env.url());
    assert_eq!(
        session.run("begin; insert into t values ('x')").as_deref(),
        Ok("")
    );
    let _ = env.git(&["checkout", "-q", "other"]).ok();
    // psql may show the end together with the answer to the commit, which came first.
    let mut end = session.run("commit").expect("the commit is answered");
    assert!(!end.contains("ERROR"), "{end}");
    end += &session
        .run("select 1")
        .expect_err("then the session is over");
    assert!(end.contains("57P01") && end.contains("other"), "{end}");
}

#[test]
fn a_transaction_that_outlasts_the_grace_is_rolled_back() {
    let Some(env) = two_branches() else { return };
    edit_config(&env.repo(), |c| c["switch_grace"] = "300ms".into());
    let _ = env.dbranch(&["init", "--yes"]).ok();
    let mut session = env.session(&env.url());
    assert_eq!(
        session.run("begin; insert into t values ('x')").as_deref(),
        Ok("")
    );
    let start = Instant::now();
    let _ = env.git(&["checkout", "-q", "other"]).ok();
    crate::support::wait_until(LIMIT, "the server has dropped the session", || {
        env.sql_on(
            "main",
            "select count(*) from pg_stat_activity where state like 'idle in%'",
        ) == "0"
    });
    assert!(start.elapsed() >= Duration::from_millis(300));
    let lost = session.run("commit").expect_err("ended");
    assert!(lost.contains("57P01"), "{lost}");
    assert_eq!(env.sql_on("main", "select count(*) from t"), "0");
}

#[test]
fn a_query_that_runs_during_the_switch_is_answered_first() {
    let Some(env) = two_branches() else { return };
    let mut session = env.session(&env.url());
    assert_eq!(session.run("select 1").as_deref(), Ok("1"));
    session.send("select pg_sleep(1.5), 'answered'");
    crate::support::wait_until(LIMIT, "the query runs", || {
        env.sql_on("main", "select count(*) from pg_stat_activity where query like 'select pg_sleep%' and state = 'active'") == "1"
    });
    let _ = env.git(&["checkout", "-q", "other"]).ok();
    assert_eq!(
        env.sql("insert into t values ('new'); select v from t"),
        "new"
    );
    match session.answer() {
        Ok(answer) | Err(answer) => {
            assert!(answer.lines().any(|line| line == "|answered"), "{answer}");
        }
    }
    let _ = session.run("select 1").expect_err("then it is over");
}

#[test]
fn a_session_on_a_branchs_own_port_does_not_notice_a_switch() {
    let Some(env) = two_branches() else { return };
    let mut pinned = env.session(&env.url_of("main"));
    assert_eq!(
        pinned
            .run("create temp table mine as select 5 as v")
            .as_deref(),
        Ok("")
    );
    let _ = env.git(&["checkout", "-q", "other"]).ok();
    let _ = env.git(&["checkout", "-q", "main"]).ok();
    assert_eq!(pinned.run("select v from mine").as_deref(), Ok("5"));
}

#[test]
fn a_switch_to_the_branch_that_is_active_ends_nobody() {
    let Some(env) = two_branches() else { return };
    let mut session = env.session(&env.url());
    assert_eq!(session.run("select 1").as_deref(), Ok("1"));
    let _ = env.dbranch(&["use", "main"]).ok();
    let _ = env.git(&["checkout", "-q", "main"]).ok();
    let _ = env.dbranch(&["sync"]).ok();
    assert_eq!(session.run("select 2").as_deref(), Ok("2"));
}
