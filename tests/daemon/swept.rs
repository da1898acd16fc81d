//! What others take away while the daemon runs: folders, sockets, ports, a disk.

use std::fs;
use std::net::TcpListener;

use crate::support::{LIMIT, TestEnv, wait_until};

#[test]
fn a_run_folder_that_is_swept_away_comes_back_and_so_do_the_branches() {
    let Some(env) = TestEnv::ready() else { return };
    env.sql("create table t as select 7 as v");
    let url = env.url();
    let pid = env.daemon_pid();
    fs::remove_dir_all(env.path("home/run")).expect("it is there");
    // The proxy's port needs nothing of it; the server is started again for its socket.
    assert_eq!(env.psql(&url, "select v from t").text(), "7");
    wait_until(LIMIT, "the daemon's socket is there again", || {
        env.path("home/run/daemon.sock").exists()
    });
    assert_eq!(env.daemon_pid(), pid, "the same daemon answers");
    let _ = env.dbranch(&["create", "b", "--from", "main"]).ok();
    assert_eq!(env.sql_on("b", "select v from t"), "7");
}

#[test]
fn a_port_that_is_taken_at_the_start_is_said_and_served_once_it_is_free() {
    let Some(env) = TestEnv::ready() else { return };
    let url = env.url();
    let _ = env.dbranch(&["shutdown"]).ok();
    let taken = TcpListener::bind(("127.0.0.1", env.ports.first)).expect("the daemon has left it");
    let _ = env.dbranch(&["start", "--detach"]).ok();
    let port = env.ports.first.to_string();
    let _ = env.dbranch(&["url"]).fails(1, &["is taken", &port]);
    let _ = env.dbranch(&["status"]).ok().says(&["is taken"]);
    assert_eq!(env.sql_on("main", "select 1"), "1", "its own port is free");
    drop(taken);
    wait_until(LIMIT, "the port is served", || {
        env.psql(&url, "select 1").code == Some(0)
    });
}

#[test]
fn a_daemon_without_its_lock_file_is_not_joined_by_a_second_one() {
    let env = TestEnv::bare();
    let _ = env.dbranch(&["start", "--detach"]).ok();
    fs::remove_file(env.path("home/state/daemon.lock")).expect("a daemon holds it");
    let _ = env.dbranch(&["start"]).fails(1, &["already runs"]);
}

/// A pool whose file system is not mounted leaves an empty folder in its place.
#[test]
fn a_pool_that_is_not_mounted_destroys_nothing_and_works_again_afterwards() {
    let Some(env) = TestEnv::ready() else { return };
    env.sql("create table t as select 7 as v");
    let _ = env.dbranch(&["create", "b", "--from", "main"]).ok();
    let _ = env.dbranch(&["shutdown", "--stop-branches"]).ok();
    let aside = env.pool().with_extension("aside");
    fs::rename(env.pool(), &aside).expect("the folder above is ours");
    fs::create_dir(env.pool()).expect("just moved away");

    let _ = env
        .dbranch(&["delete", "b", "--now", "--yes"])
        .fails(1, &["is not there", "mount"]);
    let _ = env
        .git(&["checkout", "-q", "-b", "c"])
        .says(&["STAYS on `main`"]);
    assert_eq!(env.branches(), ["b", "main"]);

    fs::remove_dir(env.pool()).expect("nothing was made in it");
    fs::rename(&aside, env.pool()).expect("and back");
    let _ = env.dbranch(&["sync"]).ok();
    assert_eq!(env.active(), "c");
    for branch in ["b", "c", "main"] {
        assert_eq!(env.sql_on(branch, "select v from t"), "7");
    }
}
