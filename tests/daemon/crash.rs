//! The daemon killed in the middle of a change: the next one finishes it or rolls it back.
//!
//! `DBRANCH_TEST_CRASH_AT=<step>` makes a debug build abort at that very step.

use crate::support::{LIMIT, Server, Storage, TestEnv, is_alive, kill_9, wait_until};

/// Runs `act` with a daemon that dies at `step`, then lets the next daemon mend it.
#[track_caller]
fn crash_at(env: &mut TestEnv, step: &str, act: &[&str]) {
    let _ = env.dbranch(&["shutdown"]).ok();
    env.set("DBRANCH_TEST_CRASH_AT", step);
    let _ = env.dbranch(&["start", "--detach"]).ok();
    let pid = env.daemon_pid();
    env.unset("DBRANCH_TEST_CRASH_AT");
    let out = env.dbranch(act);
    assert_ne!(out.code, Some(0), "`{step}` was never reached: {out}");
    assert!(
        out.stderr.contains("error: ") && out.stderr.contains("hint: "),
        "{out}"
    );
    wait_until(LIMIT, "the daemon is gone", || !is_alive(pid));
    let _ = env.dbranch(&["start", "--detach"]).ok();
}

fn with_row(storage: Storage) -> Option<TestEnv> {
    let env = TestEnv::with(Server::Native, storage)?;
    env.set_up();
    env.sql("create table t as select 7 as v");
    Some(env)
}

/// Every volume belongs to a branch that is listed or in the trash, or it is gone.
#[track_caller]
fn nothing_is_half_made(env: &TestEnv, branches: &[&str], volumes: usize) {
    wait_until(LIMIT, "what was begun is finished or rolled back", || {
        env.branches() == branches && env.volumes().len() == volumes
    });
    for branch in branches {
        assert_eq!(env.sql_on(branch, "select v from t"), "7", "{branch}");
        assert_eq!(env.state(branch), "running", "{branch}");
    }
}

fn create_is_rolled_back_or_finished(storage: Storage) {
    let Some(mut env) = with_row(storage) else {
        return;
    };
    for step in ["create:intent", "create:cloned"] {
        crash_at(&mut env, step, &["create", "b", "--from", "main"]);
        let finished = env.branches().len() == 2;
        let expected: &[&str] = if finished { &["b", "main"] } else { &["main"] };
        nothing_is_half_made(&env, expected, expected.len());
        if finished {
            let _ = env.dbranch(&["delete", "b", "--now", "--yes"]).ok();
        }
    }
    crash_at(
        &mut env,
        "create:recorded",
        &["create", "b", "--from", "main"],
    );
    nothing_is_half_made(&env, &["b", "main"], 2);
}

#[test]
fn a_btrfs_branch_that_was_being_made_is_there_or_not() {
    create_is_rolled_back_or_finished(Storage::Btrfs);
}

#[test]
fn a_reflinked_branch_that_was_being_made_is_there_or_not() {
    create_is_rolled_back_or_finished(Storage::Reflink);
}

#[test]
fn a_copied_branch_that_was_being_made_is_there_or_not() {
    create_is_rolled_back_or_finished(Storage::Copy);
}

#[test]
fn a_zfs_branch_that_was_being_made_is_there_or_not() {
    create_is_rolled_back_or_finished(Storage::Zfs);
}

#[test]
fn a_long_copy_that_is_killed_leaves_the_parent_working() {
    let Some(env) = with_row(Storage::Copy) else {
        return;
    };
    env.sql("create table big as select repeat(md5(i::text), 30) as v from generate_series(1, 200000) i");
    let pid = env.daemon_pid();
    let before = env.volumes();
    let mut create = env.command("dbranch", &env.repo());
    create.args(["create", "b", "--from", "main"]);
    let create = std::thread::spawn(move || crate::support::process::run(create, LIMIT * 4));
    wait_until(LIMIT, "the copy has begun", || {
        pool_entries(&env) > before.len() || create.is_finished()
    });
    kill_9(pid);
    let created = create.join().expect("it ends by itself");
    if created.code == Some(0) {
        return; // the copy was quicker than the kill; the other tests cover the steps
    }
    let _ = env.dbranch(&["start", "--detach"]).ok();
    nothing_is_half_made(&env, &["main"], 1);
    assert_eq!(pool_entries(&env), before.len(), "no half copy lies about");
    // Backup mode and its replication slot ended with the daemon's session.
    assert_eq!(env.sql("select count(*) from pg_replication_slots"), "0");
    assert_eq!(env.sql("select count(*) from big"), "200000");
    let _ = env.dbranch(&["create", "b", "--from", "main"]).ok();
    assert_eq!(env.sql_on("b", "select count(*) from big"), "200000");
}

/// All that lies in the pool, half made or not, but for the file that marks it as one.
fn pool_entries(env: &TestEnv) -> usize {
    let entries = std::fs::read_dir(env.pool())
        .into_iter()
        .flatten()
        .flatten();
    entries.filter(|e| e.file_name() != ".dbranch").count()
}

#[test]
fn a_branch_that_was_being_destroyed_is_gone_and_others_are_not() {
    for step in ["delete:intent", "delete:destroyed"] {
        let Some(mut env) = TestEnv::ready() else {
            return;
        };
        env.sql("create table t as select 7 as v");
        for name in ["b", "c"] {
            let _ = env.dbranch(&["create", name, "--from", "main"]).ok();
        }
        crash_at(&mut env, step, &["delete", "b", "--now", "--yes"]);
        nothing_is_half_made(&env, &["c", "main"], 2);
    }
}

#[test]
fn a_zfs_parent_that_was_being_destroyed_is_gone_and_its_children_are_not() {
    for step in ["delete:intent", "delete:destroyed"] {
        let Some(mut env) = with_row(Storage::Zfs) else {
            return;
        };
        for (name, parent) in [("b", "main"), ("c", "b"), ("d", "b")] {
            let _ = env.dbranch(&["create", name, "--from", parent]).ok();
        }
        crash_at(&mut env, step, &["delete", "b", "--now", "--yes"]);
        nothing_is_half_made(&env, &["c", "d", "main"], 3);
        // Three volumes, and a snapshot for each of the two that have an origin.
        wait_until(LIMIT, "no snapshot is left over", || {
            env.dataset().tree().len() == 5
        });
    }
}

#[test]
fn a_branch_on_its_way_to_the_trash_is_kept() {
    let Some(mut env) = TestEnv::ready() else {
        return;
    };
    env.sql("create table t as select 7 as v");
    let _ = env.dbranch(&["create", "b", "--from", "main"]).ok();
    crash_at(&mut env, "trash:intent", &["delete", "b", "--yes"]);
    assert_eq!(env.volumes().len(), 2, "the data is kept whatever happened");
    if env.branches() == ["main"] {
        let _ = env.dbranch(&["undelete", "b"]).ok();
    }
    assert_eq!(env.sql_on("b", "select v from t"), "7");
}

#[test]
fn a_first_branch_that_was_being_made_can_be_made_again() {
    for step in ["init:intent", "init:cluster"] {
        let Some(mut env) = TestEnv::quick() else {
            return;
        };
        env.write_config(&env.repo(), "shop", env.ports.first);
        let _ = env.dbranch(&["init", "--yes"]).ok();
        crash_at(&mut env, step, &["init-postgres"]);
        if env.branches().is_empty() {
            wait_until(LIMIT, "nothing half made is left", || {
                env.volumes().is_empty() && env.servers() == 0
            });
            let _ = env.dbranch(&["init-postgres"]).ok();
        }
        assert_eq!(env.branches(), ["main"]);
        assert_eq!(env.volumes().len(), 1);
        assert_eq!(env.sql("select 1"), "1");
    }
}

#[test]
fn a_hook_whose_daemon_dies_never_fails_git() {
    let Some(mut env) = TestEnv::ready() else {
        return;
    };
    let _ = env.dbranch(&["shutdown"]).ok();
    env.set("DBRANCH_TEST_CRASH_AT", "create:cloned");
    let _ = env.dbranch(&["start", "--detach"]).ok();
    env.unset("DBRANCH_TEST_CRASH_AT");
    let _ = env.git(&["checkout", "-q", "-b", "b"]).ok();
    // The next daemon asks git, and makes what is missing.
    let _ = env.dbranch(&["start", "--detach"]).ok();
    wait_until(LIMIT, "the endpoint shows b", || env.active() == "b");
    assert_eq!(env.sql("select 1"), "1");
    assert_eq!(env.volumes().len(), 2);
}
