//! What is not touched, and what is not promised.

use std::fs;
use std::io::Write;
use std::process::{Command, Stdio};

use super::Pools;
use crate::support::{Server, Storage, TestEnv, need_root};

#[test]
fn what_holds_data_is_never_formatted_or_hidden() {
    let Some(pools) = Pools::new() else { return };
    let _ = pools.env.dbranch(&["start", "--detach"]).ok();
    let setup = || pools.storage(&["setup", "--size", "1G", "--yes"]);

    fs::write(pools.image(), "letters to grandma").expect("ours");
    let _ = setup().fails(1, &["cow-pool.img", "--path"]);
    let _ = pools
        .storage(&["remove", "--yes"])
        .fails(1, &["cow-pool.img"]);
    assert_eq!(
        fs::read(pools.image()).expect("there"),
        b"letters to grandma"
    );

    let file = fs::File::create(pools.image()).expect("ours");
    file.set_len(64 << 20).expect("ours");
    let made = Command::new("mkfs.ext4")
        .arg("-q")
        .arg(pools.image())
        .status();
    assert!(made.is_ok_and(|s| s.success()));
    let before = fs::read(pools.image()).expect("there");
    let _ = setup().fails(1, &["cow-pool.img"]);
    assert!(before == fs::read(pools.image()).expect("there"));
    fs::remove_file(pools.image()).expect("ours");

    fs::create_dir(pools.pool()).expect("ours");
    fs::write(pools.pool().join("mine"), "x").expect("ours");
    let _ = setup().fails(1, &["`mine`"]);
    assert!(!pools.image().exists());
}

#[test]
fn a_promise_of_room_that_is_not_there_takes_force() {
    let Some(pools) = Pools::new() else { return };
    let huge = ["setup", "--size", "900T", "--yes"];
    let _ = pools
        .storage(&huge)
        .fails(1, &["I/O errors", "--force", "--size"]);
    let _ = pools
        .storage(&["setup", "--size", "1M"])
        .fails(1, &["too small"]);
    assert!(!pools.image().exists());
    let _ = pools.set_up();
    let _ = pools
        .storage(&["grow", "--size", "900T", "--yes"])
        .fails(1, &["I/O errors"]);
    let _ = pools
        .storage(&["grow", "--size", "2T", "--force", "--yes"])
        .ok()
        .says(&["I/O errors"]);
    let _ = pools.storage(&["remove", "--yes"]).ok();
    pools.nothing_is_left();
}

#[test]
fn where_branches_share_blocks_already_no_pool_is_made() {
    if need_root().is_none() {
        return;
    }
    let Some(env) = TestEnv::with(Server::Native, Storage::Btrfs) else {
        return;
    };
    let out = env.dbranch(&["storage", "setup", "--yes", "--json"]);
    let out = out.ok().says(&["no pool is needed", "btrfs"]);
    assert!(out.stdout.contains("\"changed\": false"), "{out}");
    assert!(!env.path("home/cow-pool.img").exists());
}

#[test]
fn a_pool_that_is_not_mounted_gets_no_branch() {
    let Some(pools) = Pools::new() else { return };
    let env = &pools.env;
    let _ = pools.set_up();
    pools.halt();
    env.write_config(&env.repo(), "shop", env.ports.first);
    let _ = env.dbranch(&["init", "--yes"]).ok();
    let _ = env
        .dbranch(&["init-postgres"])
        .fails(1, &["not mounted", "dbranch storage setup"]);
    let left: Vec<_> = fs::read_dir(pools.pool())
        .expect("there")
        .flatten()
        .collect();
    assert_eq!(left.len(), 1, "only the file that says so: {left:?}");
    let _ = pools
        .storage(&["remove", "--yes"])
        .fails(1, &["not mounted"]);
    pools.boot();
    let _ = env.dbranch(&["init-postgres"]).ok();
    pools.halt();
}

#[test]
fn a_variable_that_names_another_pool_is_said_to_win() {
    let Some(mut pools) = Pools::new() else {
        return;
    };
    let elsewhere = pools.env.path("elsewhere/pool");
    pools.env.set("DBRANCH_POOL", &elsewhere);
    let _ = pools.set_up().says(&["DBRANCH_POOL is set", "which wins"]);
    assert_eq!(
        pools.settings()["pool"],
        *pools.pool().display().to_string()
    );
    pools.env.unset("DBRANCH_POOL");
    let _ = pools.env.dbranch(&["shutdown"]).ok();
    let _ = pools.set_up().says(&["nothing to do"]);
    let _ = pools.storage(&["remove", "--yes"]).ok();
    pools.nothing_is_left();
}

#[test]
fn on_a_terminal_init_offers_a_pool_and_takes_no_for_an_answer() {
    let Some(mut pools) = Pools::new() else {
        return;
    };
    // A variable would be a choice already.
    pools.env.set("DBRANCH_STORAGE", "");
    let env = &pools.env;
    // Name, port, the offer, and then the plan that it shows.
    let mut on_terminal = env.command("timeout", &env.repo());
    on_terminal
        .args(["60", "script"])
        .args([
            "--quiet",
            "--return",
            "--command",
            "dbranch init",
            "/dev/null",
        ])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped());
    let mut child = on_terminal.spawn().expect("script runs");
    let mut stdin = child.stdin.take().expect("piped");
    let answers = format!("shop\n{}\ny\nn\n", env.ports.first);
    stdin.write_all(answers.as_bytes()).expect("it reads");
    let said = child.wait_with_output().expect("it ends");
    drop(stdin);
    let said = String::from_utf8_lossy(&said.stdout);
    for words in ["Do it now?", "mkfs.btrfs", "Go on?", "you said no"] {
        assert!(said.contains(words), "{words}: {said}");
    }
    assert!(!pools.image().exists());
    assert_eq!(env.dbranch(&["status", "--json"]).json()["project"], "shop");
}

#[test]
fn a_disk_where_branches_are_copies_is_told_apart_with_what_to_do() {
    let Some(pools) = Pools::new() else { return };
    let env = &pools.env;
    env.write_config(&env.repo(), "shop", env.ports.first);
    let init = env.dbranch(&["init", "--yes"]).ok();
    assert!(init.stdout.contains("dbranch storage setup"), "{init}");
    assert!(!pools.image().exists(), "`--yes` is no word to make a pool");
    let _ = env
        .dbranch(&["init-postgres"])
        .ok()
        .says(&["dbranch storage setup"]);
    let setup = pools.set_up();
    let _ = setup.says(&[
        "branches stay where they are (shop)",
        "dbranch storage move",
    ]);
    assert_eq!(env.sql("select 1"), "1");
    let _ = env.dbranch(&["shutdown", "--stop-branches"]).ok();
    let _ = pools.storage(&["remove", "--yes"]).ok();
    pools.nothing_is_left();
}
