//! Volumes and what lies in them.

use std::os::unix::fs::symlink;
use std::path::PathBuf;

use super::{finds, finds_and_mends, finds_nothing, run, run_fix};
use crate::support::TestEnv;

#[test]
fn volumes_and_marks_that_are_not_as_they_were_are_found() {
    let Some(env) = TestEnv::ready() else { return };
    let stranger = env.pool().join("1abcdefghijk");
    std::fs::create_dir_all(stranger.join("data")).expect("ours");
    let shown = stranger.display().to_string();
    finds_and_mends(&env, "stranger", "warning", &[&shown]);
    assert!(!stranger.exists());

    let mark = env.pool().join(".dbranch");
    std::fs::remove_file(&mark).expect("it is there");
    finds_and_mends(&env, "pool-mark", "warning", &["gone"]);
    assert_eq!(env.sql("select 1"), "1");
    let text = std::fs::read_to_string(&mark).expect("it is back");
    std::fs::write(&mark, "of /another/home/state").expect("ours");
    finds(&env, "pool-shared", "warning", &["another folder"]);
    std::fs::write(&mark, text).expect("ours");
    finds_nothing(&env, "pool-shared");

    let volume = PathBuf::from(env.show("main")["volume"].as_str().expect("a path"));
    let _ = env.dbranch(&["stop", "main"]).ok();
    let version = volume.join("data/PG_VERSION");
    let aside = volume.join("aside");
    std::fs::rename(&version, &aside).expect("ours");
    finds(&env, "volume", "problem", &["`main`", "no data"]);
    std::fs::rename(&aside, &version).expect("ours");
    finds_nothing(&env, "volume");
}

#[test]
fn data_that_lies_outside_its_volume_is_found_and_brought_back() {
    let Some(env) = TestEnv::ready() else { return };
    let outside = env.path("elsewhere/space");
    std::fs::create_dir(&outside).expect("ours");
    if crate::support::is_root() {
        let _ = env
            .run("chown", &["postgres:", &outside.display().to_string()])
            .ok();
    }
    env.sql(&format!(
        "create tablespace away location '{}'",
        outside.display()
    ));
    env.sql("create table t tablespace away as select 7 as v");
    env.sql("create index i on t(v) tablespace away");
    let _ = env.dbranch(&["create", "b"]).fails(1, &["pg_tblspc"]);
    finds_and_mends(&env, "external", "problem", &["`main`", "pg_tblspc"]);
    assert_eq!(env.sql("select v from t"), "7");
    let _ = env.dbranch(&["create", "b"]).ok();

    let volume = PathBuf::from(env.show("b")["volume"].as_str().expect("a path"));
    let _ = env.dbranch(&["stop", "b"]).ok();
    let (wal, away) = (volume.join("data/pg_wal"), env.path("elsewhere/wal"));
    run(
        &env,
        "cp",
        &[
            "-a",
            &wal.display().to_string(),
            &away.display().to_string(),
        ],
    );
    std::fs::remove_dir_all(&wal).expect("ours");
    symlink(&away, &wal).expect("ours");
    let found = finds(&env, "external", "problem", &["`b`", "pg_wal"]);
    let _ = run_fix(&env, &found);
    finds_nothing(&env, "external");
    assert_eq!(env.sql_on("b", "select v from t"), "7");
}
