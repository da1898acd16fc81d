//! Owners and modes, of the pool and of what is in it.

use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;

use super::{env_on, finds, finds_and_mends, finds_nothing, run, text};
use crate::support::{Fs, TestEnv};

fn data_of(env: &TestEnv, branch: &str) -> String {
    let volume = env.show(branch)["volume"].as_str().map(PathBuf::from);
    volume.expect("a path").join("data").display().to_string()
}

#[test]
fn wrong_owners_and_modes_are_found_told_by_a_start_and_mended() {
    let Some(env) = env_on(Fs::Btrfs, 512) else {
        return;
    };
    env.set_up();
    env.sql("create table t as select 7 as v");
    let data = data_of(&env, "main");
    let _ = env.dbranch(&["stop", "main"]).ok();
    finds_nothing(&env, "wrong-owner");

    run(&env, "chown", &["-R", "0:0", &data]);
    let refused = env
        .dbranch(&["resume", "main"])
        .fails(1, &[&data, "chown -R"]);
    assert!(refused.stderr.contains("`main`"), "{refused}");
    let refused = env.psql(&env.url(), "select 1");
    let _ = refused.says(&["FATAL", "`main`", "chown -R", &data]);
    finds_and_mends(&env, "wrong-owner", "problem", &[&data]);
    assert_eq!(env.sql("select v from t"), "7");

    // One file that a tool of root's has left.
    let _ = env.dbranch(&["stop", "main"]).ok();
    run(
        &env,
        "chown",
        &["0:0", &format!("{data}/global/pg_control")],
    );
    finds_and_mends(&env, "wrong-owner", "problem", &[&data]);

    run(&env, "chmod", &["755", &data]);
    let _ = env
        .dbranch(&["resume", "main"])
        .fails(1, &["755", "chmod 700"]);
    finds_and_mends(&env, "loose-mode", "problem", &["755"]);
    assert_eq!(env.sql("select v from t"), "7");

    // A folder on the way.
    let _ = env.dbranch(&["stop", "main"]).ok();
    let point = env.image().point().to_owned();
    std::fs::set_permissions(&point, PermissionsExt::from_mode(0o700)).expect("ours");
    let _ = env
        .dbranch(&["resume", "main"])
        .fails(1, &["can't pass", "chmod o+x"]);
    finds_and_mends(&env, "impassable", "problem", &["can't pass"]);
    assert_eq!(env.sql("select v from t"), "7");
}

#[test]
fn what_an_unprivileged_user_lacks_is_found() {
    use crate::branches::unprivileged::{as_nobody, given_to_nobody};
    let Some(env) = env_on(Fs::Btrfs, 512).and_then(given_to_nobody) else {
        return;
    };
    let dbranch = env.path("user/dbranch");
    let doctor = || {
        let out = as_nobody(&env, &dbranch, &["doctor", "--json"]);
        serde_json::from_str::<Vec<serde_json::Value>>(&out.stdout).expect("JSON")
    };
    let finding = |what: &str| doctor().into_iter().find(|f| f["what"] == what);
    let mend = |what: &str| {
        let found = finding(what).unwrap_or_else(|| panic!("no {what} in {:#?}", doctor()));
        assert!(text(&found, "fix").starts_with("sudo "), "{found}");
        let _ = super::run_fix(&env, &found);
        assert_eq!(finding(what), None);
        found
    };
    let _ = as_nobody(&env, &dbranch, &["init", "--yes"]).ok();
    let _ = as_nobody(&env, &dbranch, &["init-postgres"]).ok();
    assert_eq!(mend("slow-delete")["level"], "warning");

    let pool = env.pool().display().to_string();
    run(&env, "chown", &["0:0", &pool]);
    let refused = as_nobody(&env, &dbranch, &["create", "b"]).fails(1, &["sudo chown -R", &pool]);
    assert!(refused.stderr.contains("belongs to uid 0"), "{refused}");
    assert_eq!(mend("wrong-owner")["level"], "problem");
    let _ = as_nobody(&env, &dbranch, &["create", "b"]).ok();
    let _ = as_nobody(&env, &dbranch, &["shutdown", "--stop-branches"]).ok();
}

#[test]
fn a_volume_without_copy_on_write_is_found_and_written_anew() {
    let Some(env) = env_on(Fs::Btrfs, 512) else {
        return;
    };
    env.set_up();
    env.sql("create table t as select 7 as v");
    let pool = env.pool().display().to_string();
    run(&env, "chattr", &["+C", &pool]);
    finds_and_mends(&env, "nocow", "warning", &["attribute C", &pool]);
    // As when the folder bore it before there was anything in it.
    let _ = env.dbranch(&["stop", "main"]).ok();
    let data = data_of(&env, "main");
    run(
        &env,
        "sh",
        &[
            "-ec",
            &format!(
                "cd {data}/..; mkdir n; chattr +C n; cp -a --reflink=never data/. n; rm -r data; mv n data"
            ),
        ],
    );
    assert_eq!(env.sql("select v from t"), "7");
    let found = finds(&env, "nocow", "warning", &["attribute C", &data]);
    assert!(text(&found, "fix").contains("dbranch stop main"), "{found}");
    finds_and_mends(&env, "nocow", "warning", &[]);
    assert_eq!(env.sql("select v from t"), "7");
    finds_nothing(&env, "wrong-owner");
}
