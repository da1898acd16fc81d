//! `dbranch init`.

use std::fs;

use serde_json::Value;

use crate::support::TestEnv;

fn config(env: &TestEnv) -> Value {
    let text = fs::read_to_string(env.repo().join(".dbranch.config.json")).expect("init wrote it");
    assert!(text.ends_with('\n'), "a text file ends its last line");
    serde_json::from_str(&text).expect("init writes JSON")
}

#[test]
fn init_writes_what_it_was_told_and_says_what_it_found() {
    let env = TestEnv::bare();
    let port = env.ports.first.to_string();
    let args = ["init", "--yes", "--name", "shop", "--proxy-port", &port];
    let _ = env.dbranch(&args).ok().says(&["shop", &port]);
    let config = config(&env);
    assert_eq!(config["name"], "shop");
    assert_eq!(config["proxy_port"], env.ports.first);
    assert_eq!(env.dbranch(&["status", "--json"]).json()["project"], "shop");
}

#[test]
fn init_names_the_project_after_its_folder() {
    let env = TestEnv::bare();
    let dir = env.path("my-app");
    env.init_repo(&dir);
    let port = env.ports.first.to_string();
    let _ = env
        .dbranch_in(&dir, &["init", "--yes", "--proxy-port", &port])
        .ok();
    let text = fs::read_to_string(dir.join(".dbranch.config.json")).expect("init wrote it");
    assert!(text.contains("\"my-app\""), "{text}");
}

#[test]
fn init_takes_a_free_port_by_itself() {
    let env = TestEnv::bare();
    let _ = env.dbranch(&["init", "--yes"]).ok();
    let port = config(&env)["proxy_port"].as_u64().expect("a number");
    let status = env.dbranch(&["status", "--json"]).json();
    assert_eq!(status["proxy_port"], port);
}

#[test]
fn init_again_changes_nothing() {
    let env = TestEnv::bare();
    let port = env.ports.first.to_string();
    let _ = env.dbranch(&["init", "--yes", "--proxy-port", &port]).ok();
    let file = env.repo().join(".dbranch.config.json");
    // Hand-made changes stay, also in the way it is written.
    let text = fs::read_to_string(&file)
        .expect("there")
        .replacen('{', "{\n\n", 1);
    fs::write(&file, &text).expect("ours");
    let _ = env.dbranch(&["init", "--yes"]).ok();
    assert_eq!(fs::read_to_string(&file).expect("there"), text);
}

#[test]
fn init_works_from_a_folder_below_and_in_a_repository_without_commits() {
    let env = TestEnv::bare();
    let dir = env.path("unborn");
    fs::create_dir_all(dir.join("src/deep")).expect("ours");
    let _ = env.git_in(&dir, &["init", "-q", "-b", "trunk"]).ok();
    let port = env.ports.first.to_string();
    let _ = env
        .dbranch_in(
            &dir.join("src/deep"),
            &["init", "--yes", "--proxy-port", &port],
        )
        .ok();
    assert!(dir.join(".dbranch.config.json").exists());
    let status = env
        .dbranch_in(&dir.join("src"), &["status", "--json"])
        .json();
    assert_eq!(status["git_branch"], "trunk");
}

#[test]
fn the_first_branch_is_named_after_the_git_branch() {
    let Some(env) = TestEnv::quick() else { return };
    let _ = env.git(&["checkout", "-q", "-b", "trunk/ünï"]).ok();
    env.write_config(&env.repo(), "shop", env.ports.first);
    let _ = env.dbranch(&["init", "--yes"]).ok();
    let _ = env.dbranch(&["init-postgres"]).ok();
    assert_eq!(env.branches(), ["trunk/ünï"]);
    assert_eq!(env.active(), "trunk/ünï");
    assert_eq!(env.sql("select 1"), "1");
}
