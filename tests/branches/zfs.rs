//! What is particular about branches on ZFS: what depends on what, and mounts.

use std::path::Path;

use crate::support::{LIMIT, Server, Storage, TestEnv, wait_until, zfs};

/// An environment on `main` with a table that says whose it is.
fn on_zfs() -> Option<TestEnv> {
    let env = TestEnv::with(Server::Native, Storage::Zfs)?;
    env.set_up();
    env.sql("create table t as select 'main' as v");
    Some(env)
}

/// Cuts a branch and makes it differ from its parent.
fn cut(env: &TestEnv, name: &str, from: &str) {
    let _ = env.dbranch(&["create", name, "--from", from]).ok();
    assert_eq!(env.sql_on(name, "select v from t"), from);
    env.sql_on(name, &format!("update t set v = '{name}'"));
}

fn volume(env: &TestEnv, branch: &str) -> String {
    let show = env.show(branch);
    let path = Path::new(show["volume"].as_str().expect("a path"));
    let name = path.file_name().and_then(|n| n.to_str());
    name.expect("a volume has a name").to_owned()
}

/// ZFS holds a dataset for each of so many volumes, and a snapshot for each that has an origin.
#[track_caller]
fn holds(env: &TestEnv, volumes: usize) {
    let tree = env.dataset().tree();
    let (snapshots, datasets): (Vec<_>, Vec<_>) = tree.iter().partition(|d| d.0.contains('@'));
    let clones = datasets.iter().filter(|d| d.1 != "-").count();
    assert_eq!(
        (datasets.len(), snapshots.len()),
        (volumes, clones),
        "{tree:?}"
    );
}

#[test]
fn branches_outlive_a_parent_on_zfs_that_is_destroyed_or_in_the_trash() {
    let Some(env) = on_zfs() else { return };
    cut(&env, "child", "main");
    cut(&env, "grandchild", "child");
    cut(&env, "sibling", "child");
    holds(&env, 4);
    // Trashed, children are still cut from its children; taken back, it is as it was.
    let _ = env.dbranch(&["delete", "child", "--yes"]).ok();
    cut(&env, "later", "grandchild");
    let _ = env.dbranch(&["undelete", "child"]).ok();
    assert_eq!(env.sql_on("child", "select v from t"), "child");
    holds(&env, 5);
    // Destroyed from the middle and, by name, from the trash.
    let _ = env.dbranch(&["delete", "child", "--now", "--yes"]).ok();
    holds(&env, 4);
    let _ = env.dbranch(&["delete", "grandchild", "--yes"]).ok();
    let _ = env
        .dbranch(&["delete", "grandchild", "--now", "--yes"])
        .ok();
    holds(&env, 3);
    for branch in ["main", "sibling", "later"] {
        let _ = env.dbranch(&["stop", branch]).ok();
        assert_eq!(env.sql_on(branch, "select v from t"), branch);
    }
    let _ = env.dbranch(&["delete-project", "--now", "--yes"]).ok();
    assert_eq!(env.dataset().tree(), []);
}

#[test]
fn a_snapshot_made_by_hand_stops_a_delete_before_anything_changes() {
    let Some(env) = on_zfs() else { return };
    cut(&env, "kept", "main");
    let snapshot = format!("{}/{}@mine", env.dataset().name(), volume(&env, "kept"));
    zfs(&["snapshot", &snapshot]);
    let _ = env
        .dbranch(&["delete", "kept", "--now", "--yes"])
        .fails(1, &[&snapshot, "zfs destroy"]);
    assert_eq!(env.branches(), ["kept", "main"]);
    assert_eq!(env.sql_on("kept", "select v from t"), "kept");
    zfs(&["destroy", &snapshot]);
    let _ = env.dbranch(&["delete", "kept", "--now", "--yes"]).ok();
    holds(&env, 1);
}

#[test]
fn a_pool_on_zfs_that_is_not_mounted_is_said_and_comes_back() {
    let Some(env) = on_zfs() else { return };
    cut(&env, "child", "main");
    let _ = env.dbranch(&["shutdown", "--stop-branches"]).ok();
    wait_until(LIMIT, "nobody uses the pool", || env.servers() == 0);
    let pool = env.dataset().name().to_owned();
    let volumes = ["main", "child"].map(|b| format!("{pool}/{}", volume(&env, b)));
    let _ = env.dbranch(&["shutdown", "--stop-branches"]).ok();
    for dataset in [&volumes[0], &volumes[1], &pool] {
        zfs(&["unmount", dataset]);
    }
    let mount = format!("zfs mount {pool}");
    let _ = env.dbranch(&["resume", "main"]).fails(1, &[&mount]);
    let _ = env
        .dbranch(&["create", "x", "--from", "main"])
        .fails(1, &[&mount]);
    let doctor = env.dbranch(&["doctor"]);
    assert!(doctor.stdout.contains(&mount), "{doctor}");
    // The pool alone: what is used of it is mounted with it.
    zfs(&["mount", &pool]);
    assert_eq!(env.sql("select v from t"), "main");
    let _ = env.dbranch(&["shutdown", "--stop-branches"]).ok();
    zfs(&["unmount", &volumes[0]]);
    assert_eq!(env.sql_on("child", "select v from t"), "child");
    assert_eq!(env.branches(), ["child", "main"]);
    holds(&env, 2);
}
