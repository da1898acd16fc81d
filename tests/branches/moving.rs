//! `storage move`: a project's branches in another pool, as if nothing had happened.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;

use crate::support::process::Output;
use crate::support::{LIMIT, Server, Storage, TestEnv, edit_config, need_root, wait_until};

/// A pool beside the environment's own, on the file system of the tests.
fn plain_pool(env: &TestEnv) -> PathBuf {
    env.path("plain")
}

fn move_to(env: &TestEnv, pool: &Path, driver: &str) -> Output {
    let pool = pool.to_str().expect("our paths are text");
    env.dbranch(&[
        "storage", "move", "--to", pool, "--driver", driver, "--yes", "--json",
    ])
}

/// The volumes in a pool: folders, whatever they are called.
fn volumes_in(pool: &Path) -> usize {
    fs::read_dir(pool)
        .into_iter()
        .flatten()
        .flatten()
        .filter(|e| e.file_type().is_ok_and(|t| t.is_dir()))
        .count()
}

/// `main`, its children `a` and `b`, `aa` below `a`, and `gone` in the trash. Each has rows of
/// its own, and all have some megabytes in common.
fn family(server: Server, storage: Storage) -> Option<TestEnv> {
    let env = TestEnv::with(server, storage)?;
    env.set_up();
    env.sql("create table t(v text); insert into t values ('main')");
    env.sql("create table big as select md5(i::text) as v from generate_series(1, 200000) i");
    // Or whoever reads it first would write to each page.
    env.sql("vacuum (freeze) big");
    for (name, parent) in [("a", "main"), ("b", "main"), ("aa", "a"), ("gone", "b")] {
        let _ = env.dbranch(&["create", name, "--from", parent]).ok();
        env.sql_on(name, &format!("insert into t values ('{name}')"));
    }
    let _ = env.dbranch(&["stop", "b"]).ok();
    let _ = env.dbranch(&["delete", "gone", "--yes"]).ok();
    Some(env)
}

const ALL_ROWS: &str = "select string_agg(v, ',' order by v) from t";

#[track_caller]
fn family_is_whole(env: &TestEnv, storage: &str) {
    for (name, parent, rows) in [
        ("main", Value::Null, "main"),
        ("a", "main".into(), "a,main"),
        ("b", "main".into(), "b,main"),
        ("aa", "a".into(), "a,aa,main"),
    ] {
        let show = env.show(name);
        assert_eq!(show["parent"], parent, "{name}");
        assert_eq!(show["storage"], storage, "{name}");
        assert_eq!(env.sql_on(name, ALL_ROWS), rows, "{name}");
        assert_eq!(env.sql_on(name, "select count(*) from big"), "200000");
    }
}

/// Names, ids, ports and URLs: what a move leaves alone.
fn identity(env: &TestEnv) -> Vec<Value> {
    ["main", "a", "b", "aa"]
        .map(|name| {
            let show = env.show(name);
            serde_json::json!([show["id"], show["port"], show["url"], show["created_at"]])
        })
        .to_vec()
}

fn there_and_back(server: Server, storage: Storage) {
    let Some(env) = family(server, storage) else {
        return;
    };
    let (before, url) = (identity(&env), env.url());
    let plain = plain_pool(&env);

    let moved = move_to(&env, &plain, "copy").json();
    let names: Vec<_> = moved["branches"]
        .as_array()
        .expect("an array")
        .iter()
        .map(|b| b["name"].as_str().expect("a text"))
        .collect();
    assert_eq!(names, ["main", "a", "b", "aa", "gone"], "{moved}");
    let still = |name: &str| {
        let all = moved["branches"].as_array().expect("an array");
        let found = all.iter().find(|b| b["name"] == name);
        found.expect("it was moved")["stood_still_ms"].clone()
    };
    assert!(
        still("main").is_number() && still("aa").is_number(),
        "{moved}"
    );
    assert!(still("b").is_null() && still("gone").is_null(), "{moved}");
    assert_eq!(env.state("a"), "running", "what ran runs");
    assert_eq!(env.state("b"), "stopped", "and what did not does not");
    assert_eq!((env.volumes().len(), volumes_in(&plain)), (0, 5));
    family_is_whole(&env, "copy");
    assert_eq!(env.psql(&url, ALL_ROWS).text(), "main");
    assert_eq!(identity(&env), before);

    let moved = move_to(&env, &env.pool(), storage.name()).json();
    assert_eq!((env.volumes().len(), volumes_in(&plain)), (5, 0));
    family_is_whole(&env, storage.name());
    assert_eq!(identity(&env), before);
    for branch in moved["branches"].as_array().expect("an array") {
        let is_root = branch["name"] == "main";
        assert_eq!(branch["shares_with"].is_null(), is_root, "{branch}");
    }
    // Each has a log of its own, but `big` (13 MB) and the catalogs (22 MB) they still share.
    for name in ["a", "b", "aa"] {
        let show = env.show(name);
        let shared = bytes(&show, "logical_bytes") - bytes(&show, "exclusive_bytes");
        assert!(shared > 25_000_000, "{name}: {show}");
    }
    let _ = env.dbranch(&["undelete", "gone"]).ok();
    assert_eq!(env.sql_on("gone", ALL_ROWS), "b,gone,main");
    assert_eq!(env.show("gone")["parent"], "b");
    // They are parents like any other.
    let _ = env.dbranch(&["create", "new", "--from", "aa"]).ok();
    assert_eq!(env.sql_on("new", ALL_ROWS), "a,aa,main");
}

#[track_caller]
fn bytes(value: &Value, key: &str) -> u64 {
    value[key]
        .as_u64()
        .unwrap_or_else(|| panic!("{key}: {value}"))
}

#[test]
fn a_native_family_moves_to_plain_folders_and_back() {
    there_and_back(Server::Native, Storage::Btrfs);
}

#[test]
fn a_docker_family_moves_to_plain_folders_and_back() {
    there_and_back(Server::Docker, Storage::Btrfs);
}

#[test]
fn a_family_on_xfs_moves_to_plain_folders_and_back() {
    there_and_back(Server::Native, Storage::Reflink);
}

#[test]
fn a_parent_and_its_child_move_to_zfs() {
    let Some(mut env) = TestEnv::with(Server::Native, Storage::Zfs) else {
        return;
    };
    let zfs = env.pool();
    env.set("DBRANCH_POOL", plain_pool(&env));
    env.set("DBRANCH_STORAGE", "copy");
    env.set_up();
    env.sql("create table t as select 'main' as v");
    let _ = env.dbranch(&["create", "a", "--from", "main"]).ok();
    env.sql_on("a", "insert into t values ('a')");
    let moved = move_to(&env, &zfs, "zfs").json();
    assert_eq!(moved["branches"][1]["shares_with"], "main", "{moved}");
    assert_eq!(env.sql_on("a", ALL_ROWS), "a,main");
    assert_eq!(env.sql(ALL_ROWS), "main");
    assert_eq!(volumes_in(&plain_pool(&env)), 0);
    let tree = env.dataset().tree();
    assert!(tree.iter().any(|(_, origin)| origin != "-"), "{tree:?}");
    let _ = env.dbranch(&["stop", "--all"]).ok();
}

#[test]
fn volumes_of_one_file_system_are_moved_by_sharing() {
    let Some(env) = family(Server::Native, Storage::Btrfs) else {
        return;
    };
    let pool = env.pool().join("deeper");
    let moved = move_to(&env, &pool, "btrfs").json();
    family_is_whole(&env, "btrfs");
    assert_eq!((env.volumes().len(), volumes_in(&pool)), (1, 5));
    for branch in moved["branches"].as_array().expect("an array") {
        let (all, new) = (
            bytes(branch, "logical_bytes"),
            bytes(branch, "written_bytes"),
        );
        assert!(new < all / 4, "{branch}");
    }
    // Another driver in the same folder.
    let moved = move_to(&env, &pool, "copy").json();
    assert_eq!(moved["branches"].as_array().map(Vec::len), Some(5));
    family_is_whole(&env, "copy");
    assert_eq!(volumes_in(&pool), 5);
}

#[test]
fn a_move_asks_says_what_it_would_do_and_does_nothing_twice() {
    let Some(env) = family(Server::Native, Storage::Copy) else {
        return;
    };
    let plain = plain_pool(&env);
    let to = plain.to_str().expect("text");
    let refused = env.dbranch(&["storage", "move", "--to", to]);
    let _ = refused.fails(1, &["5 branches", to, "--yes"]);
    let dry = env
        .dbranch(&["storage", "move", "--to", to, "--dry-run", "--json"])
        .json();
    assert_eq!(dry["branches"].as_array().map(Vec::len), Some(5));
    assert_eq!(dry["dry_run"], true);
    assert!(bytes(&dry, "needed_bytes") > 5 * 20_000_000, "{dry}");
    assert!(!plain.exists(), "only told");
    family_is_whole(&env, "copy");

    let _ = move_to(&env, &plain, "copy").ok();
    let again = env.dbranch(&["storage", "move", "--to", to, "--yes"]);
    let _ = again.ok().says(&["nothing to do"]);
    // By default it goes where the machine's settings say.
    let moved = env.dbranch(&["storage", "move", "--yes", "--json"]).json();
    assert_eq!(moved["branches"].as_array().map(Vec::len), Some(5));
    assert_eq!((env.volumes().len(), volumes_in(&plain)), (5, 0));
}

#[test]
fn a_target_that_can_not_be_used_is_refused_and_nothing_is_moved() {
    let Some(env) = TestEnv::ready() else { return };
    env.sql("create table t as select 7 as v");
    let volumes = env.volumes();
    let file = env.path("elsewhere/file");
    fs::write(&file, "").expect("ours");
    let _ = move_to(&env, &file.join("pool"), "copy").fails(1, &["nothing was moved", "--to"]);
    let _ = move_to(&env, &plain_pool(&env), "btrfs").fails(1, &["nothing was moved", "btrfs"]);
    let _ = move_to(&env, &plain_pool(&env), "floppy").fails(2, &["floppy"]);
    if need_root().is_some() {
        let read_only = env.path("elsewhere/read-only");
        fs::create_dir(&read_only).expect("ours");
        mount(&read_only, "size=1m,ro");
        let pool = read_only.join("pool");
        let _ = move_to(&env, &pool, "copy").fails(1, &["nothing was moved", "read-only"]);
        unmount(&read_only);
    }
    let inside = volumes[0].join("pool");
    let _ = move_to(&env, &inside, "copy").fails(1, &["lies in the data of branch `main`"]);
    fs::remove_dir(&inside).expect("empty");
    assert_eq!(env.volumes(), volumes);
    assert_eq!(env.state("main"), "running");
    assert_eq!(env.sql("select v from t"), "7");
}

fn mount(folder: &Path, options: &str) {
    let mounted = Command::new("mount")
        .args(["-t", "tmpfs", "-o", options, "dbranch-test"])
        .arg(folder)
        .status();
    assert!(mounted.is_ok_and(|s| s.success()), "root can mount a tmpfs");
}

fn unmount(folder: &Path) {
    wait_until(LIMIT, "nobody uses the mounted folder any more", || {
        let unmounted = Command::new("umount").arg(folder).output();
        unmounted.is_ok_and(|out| out.status.success())
    });
}

#[test]
fn a_target_without_room_is_refused_before_and_survived_when_it_fills_up() {
    if need_root().is_none() {
        return;
    }
    let Some(env) = family(Server::Native, Storage::Copy) else {
        return;
    };
    let small = env.path("small");
    fs::create_dir(&small).expect("ours");
    mount(&small, "size=150m,mode=711");
    let pool = small.join("pool");
    let _ = move_to(&env, &pool, "copy").fails(1, &["not enough room", "nothing was moved"]);
    assert_eq!((env.volumes().len(), volumes_in(&pool)), (5, 0));
    unmount(&small);

    // Room for the estimate, but somebody else takes it while the move is under way.
    mount(&small, "size=1g,mode=711");
    fs::create_dir(&pool).expect("ours");
    let daemon = Pid::from_raw(i32::try_from(env.daemon_pid()).expect("a pid"));
    let failed = std::thread::scope(|scope| {
        let moving = scope.spawn(|| move_to(&env, &pool, "copy"));
        wait_until(LIMIT, "the move has begun", || volumes_in(&pool) > 0);
        // It stands still while the disk fills up, however quick this machine is.
        kill(daemon, Signal::SIGSTOP).expect("ours");
        let hog = fs::File::create(small.join("hog")).and_then(|mut hog| {
            // Until there is no room left.
            std::io::copy(&mut std::io::repeat(1), &mut hog)
        });
        kill(daemon, Signal::SIGCONT).expect("ours");
        assert!(hog.is_err(), "the disk is full");
        moving.join().expect("it ends")
    });
    let failed = failed.fails(1, &["was not moved", "room", "branches are in"]);
    assert!(failed.stderr.contains("hint: "), "{failed}");
    let there = volumes_in(&pool);
    assert_eq!(env.volumes().len() + there, 5, "nothing half made");
    fs::remove_file(small.join("hog")).expect("ours");
    assert_eq!(env.sql_on("aa", ALL_ROWS), "a,aa,main");
    assert_eq!(env.sql_on("main", ALL_ROWS), "main");

    // Taken up again, and back, to be able to unmount it.
    let _ = move_to(&env, &pool, "copy").ok();
    assert_eq!((env.volumes().len(), volumes_in(&pool)), (0, 5));
    family_is_whole(&env, "copy");
    let _ = move_to(&env, &env.pool(), "copy").ok();
    family_is_whole(&env, "copy");
    unmount(&small);
}

#[test]
fn a_branch_that_does_not_start_in_its_new_place_is_turned_back() {
    let Some(env) = TestEnv::ready() else { return };
    env.sql("create table t as select 7 as v");
    let (before, plain) = (env.show("main"), plain_pool(&env));
    edit_config(&env.repo(), |c| {
        c["postgres"]["settings"]["shared_buffers"] = "a lot".into();
    });
    let failed = move_to(&env, &plain, "copy");
    let _ = failed.fails(1, &["`main` was not moved", "did not start", "0 of 1"]);
    assert_eq!((env.volumes().len(), volumes_in(&plain)), (1, 0));
    assert_eq!(env.show("main")["volume"], before["volume"]);
    edit_config(&env.repo(), |c| {
        c["postgres"]["settings"]["shared_buffers"] = "16MB".into();
    });
    assert_eq!(env.sql("select v from t"), "7");
    let _ = move_to(&env, &plain, "copy").ok();
    assert_eq!((env.volumes().len(), volumes_in(&plain)), (0, 1));
    assert_eq!(env.sql("select v from t"), "7");
}

/// pgbench keeps four sums equal in every transaction.
const SUMS: &str = "select (select sum(abalance) from pgbench_accounts) \
    = all(array[(select sum(bbalance) from pgbench_branches), \
    (select sum(tbalance) from pgbench_tellers), (select coalesce(sum(delta), 0) from pgbench_history)])";

#[test]
fn a_branch_under_load_is_moved_with_every_transaction_it_confirmed() {
    let Some(env) = TestEnv::ready() else { return };
    let main = env.url_of("main");
    let _ = env
        .run("pgbench", &["-i", "-q", "-s", "2", "-d", &main])
        .ok();
    let _ = env.dbranch(&["create", "child", "--from", "main"]).ok();
    env.sql("create table confirmed(n int)");
    let plain = plain_pool(&env);
    let done = AtomicBool::new(false);
    let confirmed = std::thread::scope(|scope| {
        let load = scope.spawn(|| {
            let mut rounds = 0;
            while !done.load(Ordering::Relaxed) {
                // Ended by the stop, as by `dbranch stop`; the next one waits and comes through.
                let _ = env.run("pgbench", &["-n", "-c", "4", "-T", "1", "-d", &main]);
                rounds += 1;
            }
            rounds
        });
        let counter = scope.spawn(|| {
            let mut confirmed = 0;
            while !done.load(Ordering::Relaxed) {
                let row = env.psql(
                    &main,
                    &format!("insert into confirmed values ({confirmed})"),
                );
                if row.code == Some(0) {
                    confirmed += 1;
                } else {
                    // Whoever was inside, or just logging in, is sent away by the stop.
                    assert!(
                        row.stderr.contains("terminating connection")
                            || row.stderr.contains("server closed the connection"),
                        "{row}"
                    );
                }
            }
            confirmed
        });
        let moved = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            wait_until(LIMIT, "pgbench writes", || {
                env.psql(&main, "select count(*) > 100 from pgbench_history")
                    .text()
                    == "t"
            });
            let _ = move_to(&env, &plain, "copy").ok();
            let _ = move_to(&env, &env.pool(), env.storage.name()).ok();
        }));
        done.store(true, Ordering::Relaxed);
        let confirmed = counter.join().expect("only the stop ends a session");
        assert!(load.join().expect("pgbench ran") > 0);
        if let Err(why) = moved {
            std::panic::resume_unwind(why);
        }
        confirmed
    });
    assert!(confirmed > 0);
    let found: i64 = env
        .sql("select count(distinct n) from confirmed")
        .parse()
        .expect("a number");
    assert!(found >= confirmed, "{found} of {confirmed}");
    assert_eq!(env.sql(SUMS), "t");
    assert_eq!(env.sql_on("child", SUMS), "t");
}

#[test]
fn children_made_and_branches_deleted_during_a_move_end_up_right() {
    let Some(env) = family(Server::Native, Storage::Copy) else {
        return;
    };
    let plain = plain_pool(&env);
    std::thread::scope(|scope| {
        let moving = scope.spawn(|| move_to(&env, &plain, "copy"));
        wait_until(LIMIT, "the move has begun", || {
            volumes_in(&plain) > 0 || moving.is_finished()
        });
        for (n, parent) in ["main", "aa", "b", "main", "aa"].iter().enumerate() {
            let name = format!("new-{n}");
            let _ = env.dbranch(&["create", &name, "--from", parent]).ok();
        }
        let _ = env.dbranch(&["delete", "gone", "--now", "--yes"]).ok();
        let _ = env.dbranch(&["delete", "new-0", "--now", "--yes"]).ok();
        let _ = moving.join().expect("it ends").ok();
    });
    // What came after its last look is one more move away.
    let _ = move_to(&env, &plain, "copy").ok();
    family_is_whole(&env, "copy");
    assert_eq!(env.sql_on("new-1", ALL_ROWS), "a,aa,main");
    assert_eq!(env.sql_on("new-2", ALL_ROWS), "b,main");
    let expected = ["a", "aa", "b", "main", "new-1", "new-2", "new-3", "new-4"];
    assert_eq!(env.branches(), expected);
    assert_eq!(
        (env.volumes().len(), volumes_in(&plain)),
        (0, expected.len())
    );
}

#[test]
fn a_branch_whose_pool_is_gone_keeps_no_other_from_moving() {
    let Some(env) = family(Server::Native, Storage::Copy) else {
        return;
    };
    let (plain, other) = (plain_pool(&env), env.path("other"));
    let _ = move_to(&env, &plain, "copy").ok();
    for name in ["main", "a", "aa"] {
        let _ = env.dbranch(&["stop", name]).ok();
    }
    let aside = env.path("aside");
    fs::rename(&plain, &aside).expect("movable");
    let _ = env
        .dbranch(&["create", "x", "--from", "main"])
        .fails(1, &["not there"]);
    let left = move_to(&env, &other, "copy");
    assert_eq!(left.code, Some(1), "{left}");
    let left = left.says(&["`main` stays where it is", "is not there", "dbranch forget"]);
    assert!(!left.stderr.contains("panicked"), "{left}");
    fs::rename(&aside, &plain).expect("movable");
    let _ = move_to(&env, &other, "copy").ok();
    family_is_whole(&env, "copy");
    assert_eq!((volumes_in(&plain), volumes_in(&other)), (0, 5));
}

/// `main` and its child `a`, with rows of their own, after moves in which the daemon died at each
/// of `steps`: each time they are first where the step leaves them, then where they shall be.
fn killed_at(steps: &[&str]) {
    let Some(mut env) = TestEnv::with(Server::Native, Storage::Btrfs) else {
        return;
    };
    env.set_up();
    env.sql("create table t as select 1 as v");
    let _ = env.dbranch(&["create", "a", "--from", "main"]).ok();
    env.sql_on("a", "insert into t values (1)");
    let url = env.url_of("a");
    let (mut from, mut to) = ((env.pool(), "btrfs"), (plain_pool(&env), "copy"));
    let mut rows = 2;
    for step in steps {
        let _ = env.dbranch(&["shutdown"]).ok();
        env.set("DBRANCH_TEST_CRASH_AT", step);
        let _ = env.dbranch(&["start", "--detach"]).ok();
        let pid = env.daemon_pid();
        env.unset("DBRANCH_TEST_CRASH_AT");
        let out = move_to(&env, &to.0, to.1);
        assert_ne!(out.code, Some(0), "`{step}` was never reached: {out}");
        assert!(out.stderr.contains("hint: "), "{out}");
        wait_until(LIMIT, "the daemon is gone", || {
            !crate::support::is_alive(pid)
        });

        let _ = env.dbranch(&["start", "--detach"]).ok();
        wait_until(LIMIT, "what the move left is removed", || {
            volumes_in(&from.0) + volumes_in(&to.0) == 2
        });
        let count = "select count(*) from t";
        assert_eq!(env.psql(&url, count).text(), rows.to_string(), "{step}");
        assert_eq!(env.sql(count), "1", "{step}");
        env.sql_on("a", "insert into t values (1)");
        rows += 1;

        let _ = move_to(&env, &to.0, to.1).ok();
        let volumes = (volumes_in(&from.0), volumes_in(&to.0));
        assert_eq!(volumes, (0, 2), "{step}");
        assert_eq!(env.psql(&url, count).text(), rows.to_string(), "{step}");
        assert_eq!(env.show("a")["storage"], to.1);
        let sync = env.dbranch(&["sync"]).ok();
        assert!(!sync.stderr.contains("no branch knows"), "{step}: {sync}");
        std::mem::swap(&mut from, &mut to);
    }
}

#[test]
fn a_move_that_is_killed_before_the_turn_is_taken_back() {
    killed_at(&[
        "move:intent",
        "move:volume",
        "move:copied",
        "move:stopped",
        "move:verified",
    ]);
}

#[test]
fn a_move_that_is_killed_after_the_turn_is_finished() {
    killed_at(&["move:turned", "move:started", "move:removed"]);
}
