//! Starting, stopping, being found.

use std::process::Stdio;

use crate::support::{LIMIT, TestEnv, is_alive, wait_until};

#[test]
fn a_second_start_says_who_runs() {
    let env = TestEnv::bare();
    let _ = env.dbranch(&["start", "--detach"]).ok();
    env.write_config(&env.repo(), "shop", env.ports.first);
    let _ = env.dbranch(&["init", "--yes"]).ok();
    let pid = env.daemon_pid();
    let _ = env.dbranch(&["start"]).fails(1, &[&pid.to_string()]);
    assert_eq!(env.daemon_pid(), pid);
}

#[test]
fn shutdown_ends_the_daemon_and_can_be_repeated() {
    let env = TestEnv::bare();
    env.write_config(&env.repo(), "shop", env.ports.first);
    let _ = env.dbranch(&["init", "--yes"]).ok();
    let pid = env.daemon_pid();
    let _ = env.dbranch(&["shutdown"]).ok();
    wait_until(LIMIT, "the daemon is gone", || !is_alive(pid));
    let _ = env.dbranch(&["shutdown"]).ok();
    assert!(
        crate::support::processes_in(env.base()).is_empty(),
        "shutdown starts nothing"
    );
}

#[test]
fn shutdown_returns_when_the_next_daemon_can_start() {
    let env = TestEnv::bare();
    for _ in 0..10 {
        let _ = env.dbranch(&["start", "--detach"]).ok();
        let _ = env.dbranch(&["shutdown"]).ok();
    }
}

#[test]
fn start_in_the_foreground_ends_with_its_terminal_signal() {
    let env = TestEnv::bare();
    env.write_config(&env.repo(), "shop", env.ports.first);
    for signal in [
        nix::sys::signal::Signal::SIGINT,
        nix::sys::signal::Signal::SIGTERM,
    ] {
        let mut start = env.command("dbranch", &env.repo());
        start
            .arg("start")
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null());
        let mut daemon = start.spawn().expect("dbranch starts");
        // A command that is quicker would start one of its own.
        let socket = env.path("home/run/daemon.sock");
        wait_until(LIMIT, "it listens", || {
            std::os::unix::net::UnixStream::connect(&socket).is_ok()
        });
        let _ = env.dbranch(&["init", "--yes"]).ok();
        assert_eq!(env.daemon_pid(), daemon.id());
        let pid = nix::unistd::Pid::from_raw(i32::try_from(daemon.id()).expect("a pid"));
        nix::sys::signal::kill(pid, signal).expect("ours");
        let status = daemon.wait().expect("it ends");
        assert!(
            matches!(status.code(), Some(0 | 130)),
            "{signal}: {status:?}"
        );
    }
}

#[test]
fn shutdown_leaves_instances_and_the_next_daemon_finds_them() {
    let Some(env) = TestEnv::ready() else { return };
    let started = env.sql("select pg_postmaster_start_time()");
    let _ = env.dbranch(&["shutdown"]).ok();
    assert_eq!(env.servers(), 1);
    assert_eq!(env.sql("select pg_postmaster_start_time()"), started);
    assert_eq!(env.servers(), 1);
}

#[test]
fn commands_at_once_start_one_daemon() {
    let env = TestEnv::bare();
    env.write_config(&env.repo(), "shop", env.ports.first);
    let _ = env.dbranch(&["init", "--yes"]).ok();
    let _ = env.dbranch(&["shutdown"]).ok();
    let pids: Vec<u32> = std::thread::scope(|scope| {
        let asked: Vec<_> = (0..6).map(|_| scope.spawn(|| env.daemon_pid())).collect();
        asked
            .into_iter()
            .map(|t| t.join().expect("answered"))
            .collect()
    });
    assert!(pids.iter().all(|pid| *pid == pids[0]), "{pids:?}");
    // Those that lost the race are on their way out.
    wait_until(LIMIT, "one daemon is left", || {
        crate::support::processes_in(env.base()).len() == 1
    });
    assert_eq!(env.daemon_pid(), pids[0], "the one that answered");
}

#[test]
fn an_instance_whose_server_died_with_the_machine_starts_again() {
    let Some(env) = TestEnv::ready() else { return };
    env.sql("create table t as select 7 as v");
    let pid = env.daemon_pid();
    // Power loss: all at once, stale pid files and sockets stay.
    crate::support::kill_9(pid);
    for process in crate::support::processes_in(&env.pool()) {
        crate::support::kill_9(process.pid);
    }
    wait_until(LIMIT, "nothing runs", || {
        env.servers() == 0 && !is_alive(pid)
    });
    assert_eq!(env.sql("select v from t"), "7");
}
