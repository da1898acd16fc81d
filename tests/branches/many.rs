//! What a branch must not take from its parent, and how many branches there may be.

use serde_json::json;

use crate::support::{LIMIT, Server, Storage, TestEnv, edit_config, wait_until};

/// By these counts autovacuum works: a branch would do its parent's pending work again, and own it.
#[test]
fn a_branch_of_a_stopped_parent_begins_without_its_counts() {
    let Some(env) = TestEnv::with(Server::Native, Storage::Copy) else {
        return;
    };
    env.set_up();
    env.sql("create table t(v int) with (autovacuum_enabled = off)");
    env.sql("insert into t select generate_series(1, 1000)");
    env.sql("update t set v = v + 1");
    let dead = "select coalesce(max(n_dead_tup), 0) from pg_stat_user_tables where relname = 't'";
    // A session reports what it did a moment later.
    wait_until(LIMIT, "the parent has counted its dead rows", || {
        env.sql_on("main", dead) == "1000"
    });
    let _ = env.dbranch(&["stop", "main"]).ok();
    let _ = env.dbranch(&["create", "x", "--from", "main"]).ok();
    assert_eq!(env.sql_on("x", dead), "0");
    assert_eq!(env.sql_on("x", "select count(*) from t"), "1000");
    // The parent keeps its own, and a branch keeps those that it made.
    assert_eq!(env.sql_on("main", dead), "1000");
    env.sql_on("x", "update t set v = v + 1 where v <= 11");
    wait_until(LIMIT, "the branch has counted its dead rows", || {
        env.sql_on("x", dead) == "10"
    });
    let _ = env.dbranch(&["stop", "x"]).ok();
    assert_eq!(env.sql_on("x", dead), "10");
}

#[test]
fn when_all_ports_are_given_the_error_names_the_settings_that_help() {
    let Some(env) = TestEnv::with(Server::Native, Storage::Copy) else {
        return;
    };
    env.write_config(&env.repo(), "shop", env.ports.first);
    edit_config(&env.repo(), |config| {
        config["port_max"] = json!(env.ports.first + 5);
    });
    let _ = env.dbranch(&["init", "--yes"]).ok();
    let _ = env.dbranch(&["init-postgres"]).ok();
    let _ = env.dbranch(&["create", "second"]).ok();
    let range = format!("from {} to {}", env.ports.first + 4, env.ports.first + 5);
    let _ = env
        .dbranch(&["create", "third"])
        .fails(1, &[&range, "2 belong to branches", "port_min", "port_max"]);
    assert_eq!(env.branches(), ["main", "second"]);
    // As soon as there is room, it is taken.
    let _ = env
        .dbranch(&["delete", "second", "--now", "--yes", "--force"])
        .ok();
    let _ = env.dbranch(&["create", "third"]).ok();
    assert_eq!(env.sql_on("third", "select 1"), "1");
}
