//! Room that runs out: for data, for metadata, for files.

use std::fs;

use super::{env_on, find, finds, finds_nothing, text};
use crate::support::{Fs, Image, LIMIT, Storage, TestEnv, wait_until};

#[test]
fn little_room_is_said_before_there_is_none() {
    let Some(env) = env_on(Fs::Xfs, 1024) else {
        return;
    };
    finds_nothing(&env, "room");
    env.image().fill("big", 150);
    finds(&env, "room", "warning", &["150", "free"]);
    env.image().fill("bigger", 20);
    finds(&env, "room", "problem", &["postgres may stop"]);
    for name in ["big", "bigger"] {
        fs::remove_file(env.image().point().join(name)).expect("ours");
    }
    finds_nothing(&env, "room");
}

#[test]
fn metadata_that_runs_out_is_found_though_data_has_room() {
    let Some(env) = env_on(Fs::Btrfs, 512) else {
        return;
    };
    finds_nothing(&env, "metadata");
    let point = env.image().point();
    // Data takes all chunks that are left, and keeps a little room in them.
    env.image().fill("big", 30);
    finds(&env, "metadata", "warning", &["metadata"]);
    // Small files lie in the metadata.
    let small = [7; 2000];
    fs::create_dir(point.join("small")).expect("ours");
    let mut names = 0..;
    let mut write = || {
        let name = names.next().map(|n: u32| point.join(format!("small/{n}")));
        fs::write(name.expect("without end"), small)
    };
    for _ in 0..3 {
        // What is promised to files on their way counts; what they really took is less.
        while write().is_ok() {}
        let _ = env.run("sync", &["-f", &point.display().to_string()]).ok();
    }
    finds(&env, "metadata", "problem", &["metadata"]);
    // Chunks that are given back to data only in part: a balance is what helps.
    fs::OpenOptions::new()
        .write(true)
        .open(point.join("big"))
        .and_then(|file| file.set_len(1 << 20))
        .expect("ours");
    let balance = |finding: &serde_json::Value| text(finding, "fix").contains("balance");
    wait_until(LIMIT, "the room is seen", || {
        find(&env, "metadata").is_none_or(|f| balance(&f))
    });
}

#[test]
fn a_file_system_that_runs_out_of_files_is_found() {
    let Some(image) = Image::make_with(Fs::Ext4, 512, &["-N", "3000"], "") else {
        return;
    };
    let Some(env) = TestEnv::on(image, Storage::Copy) else {
        return;
    };
    finds(&env, "inodes", "warning", &["files"]);
}

#[test]
fn records_without_room_are_found() {
    let Some(env) = env_on(Fs::Btrfs, 512) else {
        return;
    };
    finds_nothing(&env, "state-room");
    let _ = env.dbranch(&["shutdown"]).ok();
    let home = env.path("home").display().to_string();
    let options = "size=40m,mode=711";
    let _ = env
        .run(
            "mount",
            &["-t", "tmpfs", "-o", options, "dbranch-test", &home],
        )
        .ok();
    finds(&env, "state-room", "problem", &["records"]);
    let _ = env.dbranch(&["shutdown"]).ok();
    wait_until(LIMIT, "it is unmounted", || {
        env.run("umount", &[&home]).code == Some(0)
    });
}
