//! Images that are not here: pulled from a real registry, with progress, and what can go wrong.

use std::fs;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;

use serde_json::{Value, json};

use crate::support::registry::{PASSWORD, Registry, USER, docker};
use crate::support::{LIMIT, Server, Storage, TestEnv, edit_config, process, wait_until};

/// A project whose database is to run on that image.
fn project_on(image: &str) -> Option<TestEnv> {
    let env = TestEnv::with(Server::Docker, Storage::Btrfs)?;
    env.write_config(&env.repo(), "shop", env.ports.first);
    edit_config(&env.repo(), |config| {
        config["postgres"]["image"] = json!(image);
    });
    let _ = env.dbranch(&["init", "--yes"]).ok();
    Some(env)
}

fn is_here(image: &str) -> bool {
    docker(&["image", "inspect", image]).code == Some(0)
}

fn base() -> String {
    std::env::var("DBRANCH_TEST_IMAGE").expect("the registry was started, so there is one")
}

#[test]
fn an_absent_image_is_pulled_with_a_bar_and_only_once() {
    let Some(mut registry) = Registry::start(false) else {
        return;
    };
    let image = registry.publish(&base(), "pg:15");
    let Some(env) = project_on(&image) else {
        return;
    };
    assert!(!is_here(&image));

    // A tag that the registry has not.
    edit_config(&env.repo(), |c| {
        c["postgres"]["image"] = json!(format!("{image}-none"));
    });
    let _ = env.dbranch(&["init", "--yes"]).ok();
    let _ = env
        .dbranch(&["init-postgres"])
        .fails(1, &["pg:15-none", "manifest unknown", "postgres.image"]);
    edit_config(&env.repo(), |c| c["postgres"]["image"] = json!(image));
    let _ = env.dbranch(&["init", "--yes"]).ok();
    assert_eq!((env.branches().len(), env.volumes().len()), (0, 0));

    // A terminal of 80 columns, which `script` (util-linux) makes.
    registry.wire().slow_down(15);
    let mut terminal = env.command("script", &env.repo());
    terminal
        .args(["-q", "-e", "-c", "dbranch init-postgres", "/dev/null"])
        .env("TERM", "xterm");
    let out = process::run(terminal, LIMIT * 4).ok();
    let bar = "pulling the image: downloading [=";
    assert!(
        out.stdout.contains(bar) && out.stdout.contains("/5.72 MiB"),
        "{out}"
    );
    assert!(out.stdout.contains("created branch `main`"), "{out}");
    registry.wire().slow_down(0);
    env.sql("create table t as select 7 as v");
    let _ = env.dbranch(&["install-hooks"]).ok();
    let _ = env.git(&["checkout", "-q", "-b", "b"]).ok();
    assert_eq!(env.sql("select v from t"), "7");

    let before = registry.wire().connections();
    let _ = env.dbranch(&["delete-project", "--now", "--yes"]).ok();
    let _ = env.dbranch(&["init", "--yes"]).ok();
    let _ = env.dbranch(&["init-postgres"]).ok();
    assert_eq!(env.sql("select 1"), "1");
    assert_eq!(
        registry.wire().connections(),
        before,
        "nothing is asked for"
    );
}

#[test]
fn a_registry_that_dies_in_the_middle_of_a_pull_leaves_nothing() {
    let Some(mut registry) = Registry::start(false) else {
        return;
    };
    let image = registry.publish("scratch", "noise:1");
    let Some(env) = project_on(&image) else {
        return;
    };
    registry.wire().die_after(2_000_000);
    std::thread::scope(|scope| {
        let pull = scope.spawn(|| ask_for_the_first_branch(&env));
        wait_until(LIMIT, "the registry dies", || registry.wire().is_dead());
        // The engine tries again after 5 s, then after 10, 15, 20 and 25. The registry is back by
        // then, without the layer.
        let layer = registry.layer();
        let kept = layer.with_extension("kept");
        fs::rename(&layer, &kept).expect("ours");
        registry.wire().revive();
        let lines = pull.join().expect("it is answered");
        fs::rename(&kept, &layer).expect("ours");

        let said = |what: &str| {
            let of = |line: &&Value| {
                line["progress"]["what"]
                    .as_str()
                    .unwrap_or("")
                    .contains(what)
            };
            lines.iter().find(of).cloned()
        };
        let downloading = said("downloading").expect("bytes are counted");
        assert!(downloading["progress"]["total"].as_u64() > Some(6_000_000));
        assert!(said("retrying in").is_some(), "{lines:?}");
        let failed = &lines.last().expect("a last line")["failed"];
        let message = failed["message"].as_str().unwrap_or_default();
        assert!(
            message.contains(&image) && message.contains("unknown"),
            "{failed}"
        );
        assert!(failed["hint"].is_string(), "{failed}");
    });
    assert!(!is_here(&image));
    assert_eq!((env.branches().len(), env.volumes().len()), (0, 0));

    // The next try pulls it; that it holds no server is found only then.
    let _ = env
        .dbranch(&["init-postgres"])
        .fails(1, &["holds no PostgreSQL server", "postgres.image"]);
    assert!(is_here(&image));
    assert_eq!((env.branches().len(), env.volumes().len()), (0, 0));
}

/// Asks the daemon as the command line does; all lines of its answer.
fn ask_for_the_first_branch(env: &TestEnv) -> Vec<Value> {
    let git_dir = env.repo().join(".git");
    let body = json!({"at": {"common_dir": git_dir, "git_dir": git_dir, "worktree": env.repo()}});
    let body = body.to_string();
    let mut socket = UnixStream::connect(env.path("home/run/daemon.sock")).expect("it runs");
    write!(
        socket,
        "POST /v1/init-postgres HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: {}\r\n\r\n{body}",
        body.len()
    )
    .expect("it reads");
    let mut answer = String::new();
    socket.read_to_string(&mut answer).expect("it answers");
    // Between the lines stand the sizes of the chunks.
    let lines = answer.lines().filter(|line| line.starts_with('{'));
    lines
        .map(|l| serde_json::from_str(l).expect("JSON"))
        .collect()
}

#[test]
fn the_logins_of_docker_open_a_registry_that_wants_one() {
    let Some(mut registry) = Registry::start(true) else {
        return;
    };
    let image = registry.publish("scratch", "noise:1");
    let Some(mut env) = project_on(&image) else {
        return;
    };
    let host = registry.host();
    let logins = env.path("user/.docker");
    fs::create_dir(&logins).expect("ours");
    let note = |config: Value| fs::write(logins.join("config.json"), config.to_string());
    let denied = |env: &TestEnv, words: &[&str]| {
        let login = format!("docker login {host}");
        let _ = env
            .dbranch(&["init-postgres"])
            .fails(1, &[&["no basic auth", login.as_str()], words].concat());
        assert!(!is_here(&image));
    };
    let opened = |env: &TestEnv| {
        let _ = env
            .dbranch(&["init-postgres"])
            .fails(1, &["holds no PostgreSQL server"]);
        assert!(is_here(&image));
        let _ = docker(&["rmi", "-f", &image]).ok();
    };

    denied(&env, &[]);
    note(json!({"auths": {"elsewhere.io": {"auth": "YTpi"}}})).expect("ours");
    denied(&env, &[]);
    // As `docker login` writes it.
    let config = logins.display().to_string();
    let _ = docker(&[
        "--config", &config, "login", "-u", USER, "-p", PASSWORD, &host,
    ])
    .ok();
    opened(&env);

    // A helper, which the daemon finds on its PATH.
    let helpers = env.path("elsewhere");
    let helper = helpers.join("docker-credential-test");
    let answer = json!({"ServerURL": host, "Username": USER, "Secret": PASSWORD});
    let script = format!("#!/bin/sh\n[ \"$1 $(cat)\" = 'get {host}' ] && echo '{answer}'\n");
    let installed = env.run(
        "install",
        &["-m", "755", "/dev/null", "docker-credential-test"],
    );
    let _ = installed.ok();
    fs::write(&helper, script).expect("ours");
    let _ = env.dbranch(&["shutdown"]).ok();
    let path = format!("{}:{}", helpers.display(), env.search_path());
    env.set("PATH", path);
    let _ = env.dbranch(&["start", "--detach"]).ok();
    note(json!({"credHelpers": {(host.as_str()): "test"}, "credsStore": "none"})).expect("ours");
    opened(&env);
    note(json!({"credsStore": "test"})).expect("ours");
    opened(&env);
    note(json!({"credsStore": "none"})).expect("ours");
    denied(&env, &["docker-credential-none"]);
}
