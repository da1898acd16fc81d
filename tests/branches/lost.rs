//! A pool that is lost for good, and one that two homes share.

use std::fs;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::support::{LIMIT, Server, Storage, TestEnv, edit_config, wait_until};

#[test]
fn a_branch_whose_disk_is_lost_can_be_forgotten_and_no_other() {
    let Some(mut env) = TestEnv::with(Server::Native, Storage::Copy) else {
        return;
    };
    let disk = env.path("disk");
    env.set("DBRANCH_POOL", &disk);
    env.set_up();
    for name in ["a", "b", "c"] {
        let _ = env.dbranch(&["create", name, "--from", "main"]).ok();
    }
    let _ = env
        .dbranch(&["forget", "a", "--yes"])
        .fails(1, &["`a` is not lost", "dbranch delete --now a"]);
    let _ = env.dbranch(&["stop", "--all"]).ok();
    let aside = env.path("aside");
    fs::rename(&disk, &aside).expect("movable");
    // An empty folder, as where a file system was mounted.
    fs::create_dir(&disk).expect("ours");

    let _ = env
        .dbranch(&["delete", "a", "--now", "--yes"])
        .fails(1, &["is not there", "dbranch forget a"]);
    let _ = env.dbranch(&["delete", "b", "--yes"]).ok();
    let _ = env.dbranch(&["forget", "a"]).fails(1, &["`a`", "--yes"]);
    let _ = env.dbranch(&["forget", "a", "b", "--yes"]).ok();
    assert_eq!(env.branches(), ["c", "main"]);
    let trash = env.dbranch(&["list", "--trash", "--json"]).json();
    assert_eq!(trash.as_array().map(Vec::len), Some(0), "{trash}");
    let _ = env
        .dbranch(&["forget", "a", "--yes"])
        .fails(1, &["`a`", "dbranch list"]);
    let _ = env.dbranch(&["forget", "main", "--yes"]).ok();
    let list = env.dbranch(&["list", "--json"]).json();
    assert!(list[0]["parent"].is_null(), "its parent is no more: {list}");
    assert_eq!(fs::read_dir(&disk).expect("there").count(), 0);

    // The disk comes back: what is known works, what was forgotten is named and left alone.
    fs::remove_dir(&disk).expect("empty");
    fs::rename(&aside, &disk).expect("movable");
    assert_eq!(env.sql_on("c", "select 1"), "1");
    let sync = env.dbranch(&["sync"]).ok().stderr;
    assert_eq!(sync.matches("no branch knows").count(), 3, "{sync}");
}

#[test]
fn a_start_leaves_what_another_home_is_making_in_the_same_pool() {
    let Some(mut env) = TestEnv::with(Server::Native, Storage::Copy) else {
        return;
    };
    let pool = env.path("shared");
    env.set("DBRANCH_POOL", &pool);
    env.set_up();
    env.sql("create table big as select repeat(md5(i::text), 30) as v from generate_series(1, 100000) i");
    // Another home with a branch in that pool, whose daemon is down.
    let other_repo = env.path("elsewhere/repo");
    env.init_repo(&other_repo);
    env.write_config(&other_repo, "other", env.ports.first + 1);
    // Two daemons know nothing of each other's ports.
    edit_config(&other_repo, |c| c["port_min"] = env.ports.last().into());
    let theirs = |args: &[&str]| {
        let mut command = env.command("dbranch", &other_repo);
        command.args(args).env("DBRANCH_HOME", env.path("other"));
        crate::support::process::run(command, LIMIT * 2)
    };
    fs::create_dir(env.path("other")).expect("ours");
    let _ = theirs(&["init", "--yes"]).ok();
    let _ = theirs(&["init-postgres"]).ok();
    let _ = theirs(&["shutdown", "--stop-branches"]).ok();

    let unfinished = || {
        let all = fs::read_dir(&pool).into_iter().flatten().flatten();
        all.map(|e| e.path())
            .find(|p| p.extension() == Some("partial".as_ref()))
    };
    let pid = Pid::from_raw(i32::try_from(env.daemon_pid()).expect("a pid"));
    let made = std::thread::scope(|scope| {
        let making = scope.spawn(|| env.dbranch(&["create", "b", "--from", "main"]));
        wait_until(LIMIT, "the copy has begun", || unfinished().is_some());
        // It stands still in the middle of its copy, however quick this machine is.
        kill(pid, Signal::SIGSTOP).expect("ours");
        let half_made = unfinished();
        let started = theirs(&["start", "--detach"]);
        let still_there = half_made.as_ref().is_some_and(|dir| dir.exists());
        kill(pid, Signal::SIGCONT).expect("ours");
        let _ = started.ok();
        assert!(half_made.is_none() || still_there, "{half_made:?}");
        making.join().expect("it ends")
    });
    let _ = made.ok();
    assert_eq!(env.sql_on("b", "select count(*) from big"), "100000");
    let _ = theirs(&["shutdown", "--stop-branches"]).ok();

    // What nobody is making any more goes with the next start.
    let left = pool.join("abc.partial");
    fs::create_dir(&left).expect("ours");
    let _ = theirs(&["start", "--detach"]).ok();
    assert!(!left.exists());
    let _ = theirs(&["shutdown"]).ok();
}
