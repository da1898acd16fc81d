//! Machines and folders on which a command can't do its work.

use std::fs;
use std::net::{Ipv4Addr, TcpListener};
use std::os::unix::fs::PermissionsExt;

use crate::support::{Server, Storage, TestEnv, edit_config, is_root, need_root};

/// Commands that need a project.
const PROJECT_COMMANDS: [&[&str]; 15] = [
    &["init-postgres"],
    &["create", "x"],
    &["use", "x"],
    &["list"],
    &["show", "x"],
    &["status"],
    &["usage"],
    &["delete", "x", "--yes"],
    &["undelete", "x"],
    &["delete-project", "--yes"],
    &["stop"],
    &["resume"],
    &["sync"],
    &["url"],
    &["logs"],
];

#[test]
fn outside_a_repository_each_command_says_so() {
    let env = TestEnv::bare();
    let elsewhere = env.path("elsewhere");
    for args in PROJECT_COMMANDS
        .iter()
        .chain([&["init", "--yes"][..], &["install-hooks"]].iter())
    {
        let _ = env
            .dbranch_in(&elsewhere, args)
            .fails(1, &["git repository"]);
    }
    assert_eq!(fs::read_dir(&elsewhere).expect("ours").count(), 0);
}

#[test]
fn without_a_config_each_command_names_init() {
    let env = TestEnv::bare();
    for args in PROJECT_COMMANDS {
        let out = env.dbranch(args);
        assert!(matches!(out.code, Some(1 | 2)), "{out}");
        let code = out.code.unwrap_or_default();
        let _ = out.fails(code, &["dbranch init"]);
    }
}

#[test]
fn a_port_in_use_is_named_with_the_process_that_has_it() {
    let env = TestEnv::bare();
    let port = env.ports.first;
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, port)).expect("claimed by us");
    env.write_config(&env.repo(), "shop", port);
    let pid = std::process::id().to_string();
    let mut words = vec![port.to_string(), "proxy_port".into()];
    if cfg!(target_os = "linux") && is_root() {
        words.push(pid);
    }
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    let _ = env.dbranch(&["init", "--yes"]).fails(1, &words);
    drop(listener);
    let _ = env.dbranch(&["init", "--yes"]).ok();
}

#[test]
fn without_postgres_and_docker_it_says_what_to_install() {
    let mut env = TestEnv::bare();
    env.set("DBRANCH_RUNTIME", "auto");
    env.set("DBRANCH_PG_BIN", env.path("elsewhere"));
    env.set(
        "DOCKER_HOST",
        format!("unix://{}", env.path("elsewhere/none.sock").display()),
    );
    env.set("PATH", path_without_servers(&env));
    env.write_config(&env.repo(), "shop", env.ports.first);
    let _ = env.dbranch(&["init", "--yes"]).ok();
    let _ = env
        .dbranch(&["init-postgres"])
        .fails(1, &["PostgreSQL", "Docker", "install"]);
    assert!(env.branches().is_empty());
    assert!(env.volumes().is_empty(), "nothing half made");
}

/// A folder with links to dbranch and git only.
fn path_without_servers(env: &TestEnv) -> std::path::PathBuf {
    let dir = env.path("bin");
    fs::create_dir(&dir).expect("ours");
    let dbranch = env!("CARGO_BIN_EXE_dbranch");
    std::os::unix::fs::symlink(dbranch, dir.join("dbranch")).expect("ours");
    for tool in ["git", "sh", "uname"] {
        let found = env
            .run("bash", &["-c", &format!("command -v {tool}")])
            .text();
        std::os::unix::fs::symlink(found, dir.join(tool)).expect("ours");
    }
    dir
}

#[test]
fn a_version_that_is_not_installed_is_refused_with_what_is() {
    let Some(env) = TestEnv::quick() else { return };
    env.write_config(&env.repo(), "shop", env.ports.first);
    let installed = env.run("postgres", &["--version"]).text();
    let major = installed
        .split([' ', '.'])
        .nth(2)
        .expect("postgres (PostgreSQL) 15.1");
    let other = if major == "14" { 13 } else { 14 };
    edit_config(&env.repo(), |c| c["postgres"]["version"] = other.into());
    let _ = env.dbranch(&["init", "--yes"]).ok();
    let _ = env
        .dbranch(&["init-postgres"])
        .fails(1, &[&other.to_string(), major]);
    assert!(env.branches().is_empty() && env.volumes().is_empty());
}

#[test]
fn an_image_that_is_absent_and_can_not_be_had_is_named() {
    let Some(env) = TestEnv::with(Server::Docker, Storage::Copy) else {
        return;
    };
    env.write_config(&env.repo(), "shop", env.ports.first);
    // A registry on a port of ours, where nobody answers.
    let image = format!("127.0.0.1:{}/nobody/postgres:17", env.ports.last());
    edit_config(&env.repo(), |c| {
        c["postgres"]["image"] = image.clone().into();
    });
    let _ = env.dbranch(&["init", "--yes"]).ok();
    let _ = env
        .dbranch(&["init-postgres"])
        .fails(1, &[&image, "docker pull"]);
    assert!(env.branches().is_empty() && env.volumes().is_empty());
    assert!(env.containers().is_empty());
}

#[test]
fn an_engine_that_does_not_answer_is_named_when_docker_is_asked_for() {
    let mut env = TestEnv::bare();
    env.set("DBRANCH_RUNTIME", "docker");
    let socket = env.path("elsewhere/none.sock");
    env.set("DOCKER_HOST", format!("unix://{}", socket.display()));
    env.write_config(&env.repo(), "shop", env.ports.first);
    let _ = env.dbranch(&["init", "--yes"]).ok();
    let _ = env.dbranch(&["init-postgres"]).fails(1, &["Docker"]);
    assert!(env.branches().is_empty() && env.volumes().is_empty());
}

/// Whether the environment's own folder lies on a file system for a better driver than `copy`.
fn shares_blocks(env: &TestEnv) -> bool {
    let file_system = env.run("stat", &["-f", "-c", "%T", "."]).text();
    ["btrfs", "xfs", "zfs"].contains(&file_system.as_str())
}

#[test]
fn a_driver_asked_for_where_it_cannot_work_is_refused() {
    let Some(mut env) = TestEnv::with(Server::Native, Storage::Copy) else {
        return;
    };
    if shares_blocks(&env) {
        return; // then it works, as other tests show
    }
    env.write_config(&env.repo(), "shop", env.ports.first);
    let _ = env.dbranch(&["init", "--yes"]).ok();
    for storage in ["btrfs", "reflink"] {
        env.set("DBRANCH_STORAGE", storage);
        let _ = env
            .dbranch(&["init-postgres"])
            .fails(1, &[storage, "the file system is", "`copy`"]);
        assert!(env.branches().is_empty() && env.volumes().is_empty());
    }
}

#[test]
fn auto_takes_the_copy_where_nothing_better_is_and_says_what_it_costs() {
    let Some(mut env) = TestEnv::with(Server::Native, Storage::Copy) else {
        return;
    };
    if shares_blocks(&env) {
        return;
    }
    env.set("DBRANCH_STORAGE", "auto");
    env.write_config(&env.repo(), "shop", env.ports.first);
    let _ = env.dbranch(&["init", "--yes"]).ok();
    let _ = env
        .dbranch(&["init-postgres"])
        .ok()
        .says(&["copy", "btrfs"]);
    assert_eq!(env.show("main")["storage"], "copy");
}

#[test]
fn a_wrong_word_in_a_variable_is_refused_by_its_name() {
    let mut env = TestEnv::bare();
    for (var, word) in [("DBRANCH_RUNTIME", "podman"), ("DBRANCH_STORAGE", "ntfs")] {
        env.set(var, word);
        let _ = env.dbranch(&["init", "--yes"]).fails(2, &[var, word]);
        env.unset(var);
    }
    env.set("DBRANCH_POOL", "relative/path");
    let _ = env.dbranch(&["init", "--yes"]).fails(2, &["DBRANCH_POOL"]);
    assert!(!env.repo().join(".dbranch.config.json").exists());
}

#[test]
fn init_postgres_twice_is_refused_and_changes_nothing() {
    let Some(env) = TestEnv::ready() else { return };
    env.sql("create table t as select 7 as v");
    let _ = env.dbranch(&["init-postgres"]).fails(1, &["main"]);
    assert_eq!(env.sql("select v from t"), "7");
    assert_eq!(env.volumes().len(), 1);
}

#[test]
fn a_home_that_can_not_be_written_is_named() {
    if is_root() {
        // Root writes everywhere but below a file.
        let mut env = TestEnv::bare();
        let file = env.path("elsewhere/file");
        fs::write(&file, "").expect("ours");
        env.set("DBRANCH_HOME", file.join("home"));
        let out = env.dbranch(&["init", "--yes"]);
        assert!(matches!(out.code, Some(1..=3)), "{out}");
        let _ = out.says(&[&file.display().to_string()]);
    } else {
        let env = TestEnv::bare();
        let home = env.path("home");
        fs::set_permissions(&home, fs::Permissions::from_mode(0o500)).expect("ours");
        let out = env.dbranch(&["init", "--yes"]);
        assert!(matches!(out.code, Some(1..=3)), "{out}");
        let _ = out.says(&[&home.display().to_string()]);
        fs::set_permissions(&home, fs::Permissions::from_mode(0o711)).expect("ours");
    }
}

#[test]
fn root_never_runs_postgres_as_root() {
    if need_root().is_none() {
        return;
    }
    let Some(env) = TestEnv::ready() else { return };
    let _ = env.git(&["checkout", "-q", "-b", "b"]).ok();
    assert_eq!(env.sql("select 1"), "1");
    let servers = crate::support::processes_in(&env.pool());
    assert!(!servers.is_empty());
    for server in servers {
        let status = fs::read_to_string(format!("/proc/{}/status", server.pid)).unwrap_or_default();
        assert!(!status.contains("\nUid:\t0\t"), "{server:?}");
    }
}

#[test]
fn no_socket_or_secret_is_open_to_others() {
    let Some(env) = TestEnv::ready() else { return };
    let url = env.url();
    let password = url
        .split([':', '@'])
        .nth(2)
        .expect("the URL holds the password")
        .to_owned();
    let mut folders = vec![env.path("home"), env.repo()];
    while let Some(dir) = folders.pop() {
        for entry in fs::read_dir(&dir).expect("ours").flatten() {
            let (path, meta) = (entry.path(), entry.metadata().expect("there"));
            if meta.is_dir() {
                folders.push(path);
                continue;
            }
            let open = meta.permissions().mode() & 0o077;
            if path.extension() == Some("sock".as_ref()) {
                assert_eq!(open, 0, "{}", path.display());
            }
            let text = fs::read(&path).unwrap_or_default();
            let secret = text
                .windows(password.len())
                .any(|w| w == password.as_bytes());
            assert!(
                !secret || open == 0,
                "{} shows the password",
                path.display()
            );
            assert!(
                !secret || !path.starts_with(env.repo()),
                "{}",
                path.display()
            );
        }
    }
}
