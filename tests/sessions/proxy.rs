//! The proxy as clients know it.

use std::io::{Read, Write};
use std::net::{Ipv4Addr, TcpStream};
use std::time::Duration;

use crate::support::{LIMIT, TestEnv, wait_until};

#[test]
fn a_wrong_password_is_refused_by_postgres_itself() {
    let Some(env) = TestEnv::ready() else { return };
    let url = env.url();
    let password = url
        .split([':', '@'])
        .nth(2)
        .expect("the URL holds the password");
    let wrong = url.replace(password, "wrong");
    let refused = env
        .psql(&wrong, "select 1")
        .says(&["password authentication failed"]);
    assert_eq!(refused.code, Some(2), "{refused}");
    let rules =
        env.sql("select count(*) from pg_hba_file_rules where auth_method <> 'scram-sha-256'");
    assert_eq!(rules, "0", "nobody is trusted");
    assert_eq!(
        env.sql("select passwd like 'SCRAM-SHA-256$%' from pg_shadow limit 1"),
        "t"
    );
}

#[test]
fn all_data_is_checksummed_and_utf_8() {
    let Some(env) = TestEnv::ready() else { return };
    assert_eq!(env.sql("show data_checksums"), "on");
    assert_eq!(env.sql("show server_encoding"), "UTF8");
    assert_eq!(env.sql("select 'größe: ✓'"), "größe: ✓");
}

#[test]
fn servers_listen_on_no_network_address() {
    let Some(env) = TestEnv::ready() else { return };
    assert_eq!(env.sql("show listen_addresses"), "");
}

#[test]
fn a_cancel_request_reaches_the_right_server() {
    let Some(env) = TestEnv::ready() else { return };
    // psql turns SIGINT into a CancelRequest.
    let mut psql = env.command("psql", &env.path("elsewhere"));
    psql.args(["-X", "-d", &env.url(), "-c", "select pg_sleep(600)"]);
    psql.stdout(std::process::Stdio::piped())
        .stderr(std::process::Stdio::piped());
    let psql = psql.spawn().expect("psql starts");
    wait_until(LIMIT, "the query runs", || {
        env.sql("select count(*) from pg_stat_activity where query = 'select pg_sleep(600)'") == "1"
    });
    let pid = nix::unistd::Pid::from_raw(i32::try_from(psql.id()).expect("a pid"));
    nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGINT).expect("ours");
    let out = psql.wait_with_output().expect("it ends");
    let stderr = String::from_utf8_lossy(&out.stderr);
    assert!(
        stderr.contains("canceling statement due to user request"),
        "{stderr}"
    );
}

#[test]
fn copy_passes_both_ways() {
    let Some(env) = TestEnv::ready() else { return };
    env.sql("create table t as select i, repeat('x', 100) as v from generate_series(1, 100000) i");
    let file = env.path("elsewhere/rows");
    let shown = file.display();
    let _ = env.psql(&env.url(), &format!("\\copy t to '{shown}'")).ok();
    let _ = env.psql(&env.url(), "create table u (like t)").ok();
    let _ = env
        .psql(&env.url(), &format!("\\copy u from '{shown}'"))
        .ok();
    assert_eq!(
        env.sql("select count(*) from (table t except table u) d"),
        "0"
    );
    assert_eq!(env.sql("select count(*) from u"), "100000");
}

#[test]
fn pgbench_runs_in_every_mode_and_with_connections_of_its_own() {
    let Some(env) = TestEnv::ready() else { return };
    let url = env.url();
    let _ = env.run("pgbench", &["-i", "-q", "-d", &url]).ok();
    for mode in ["simple", "extended", "prepared"] {
        let out = env
            .run(
                "pgbench",
                &["-n", "-M", mode, "-c", "4", "-t", "50", "-d", &url],
            )
            .ok();
        assert!(out.stdout.contains("actually processed: 200/200"), "{out}");
    }
    let out = env
        .run(
            "pgbench",
            &["-n", "-S", "-C", "-c", "4", "-t", "25", "-d", &url],
        )
        .ok();
    assert!(out.stdout.contains("actually processed: 100/100"), "{out}");
}

#[test]
fn garbage_does_not_harm_the_proxy() {
    let Some(env) = TestEnv::ready() else { return };
    let address = (Ipv4Addr::LOCALHOST, env.ports.first);
    let garbage: [&[u8]; 6] = [
        b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n",
        &[0, 0, 0, 0],
        &[0x7f, 0xff, 0xff, 0xff, 0, 3, 0, 0],
        &[0, 0, 0, 8, 0, 2, 0, 0],
        &[0, 0, 0, 9, 0, 3, 0, 0, 0],
        &[0x16, 3, 1, 2, 0, 1, 0, 1],
    ];
    for bytes in garbage {
        let mut stream = TcpStream::connect(address).expect("the proxy listens");
        stream.set_read_timeout(Some(LIMIT)).expect("not zero");
        stream.write_all(bytes).expect("it reads");
        let _ = stream.shutdown(std::net::Shutdown::Write);
        // Whatever it answers, it ends: by closing, or with a reset.
        let mut answer = Vec::new();
        let end = stream.read_to_end(&mut answer);
        let timed_out = end.is_err_and(|e| e.kind() == std::io::ErrorKind::WouldBlock);
        assert!(!timed_out, "{bytes:?} keeps the connection open");
        assert!(answer.len() < 1000);
    }
    // Silent ones don't keep others out.
    let silent: Vec<TcpStream> = (0..50)
        .map(|_| {
            TcpStream::connect_timeout(&address.into(), Duration::from_secs(5)).expect("accepted")
        })
        .collect();
    assert_eq!(env.sql("select 1"), "1");
    drop(silent);
}

#[test]
fn before_the_first_branch_a_client_is_told_what_to_do() {
    let Some(env) = TestEnv::quick() else { return };
    env.write_config(&env.repo(), "shop", env.ports.first);
    let _ = env.dbranch(&["init", "--yes"]).ok();
    let url = format!("postgresql://me:x@127.0.0.1:{}/shop", env.ports.first);
    let refused = env.psql(&url, "select 1");
    let refused = refused.says(&["FATAL", "dbranch init-postgres"]);
    assert_eq!(refused.code, Some(2), "{refused}");
}
