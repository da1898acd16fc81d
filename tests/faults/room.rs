//! Disks that fill up: while a clone is made, while a cluster is, under a server.

use std::fs;

use super::ready_on;
use crate::support::{Fs, Image, LIMIT, Storage, TestEnv, process, wait_until};

#[track_caller]
fn make_room(env: &TestEnv) {
    let filler = env.image().point().join("filler");
    let removed = fs::remove_dir_all(&filler).or_else(|_| fs::remove_file(&filler));
    removed.expect("it was filled");
}

#[test]
fn a_disk_that_fills_up_in_the_middle_of_a_copy_takes_nothing_with_it() {
    let Some(env) = ready_on(Fs::Xfs, 1200) else {
        return;
    };
    env.sql("create table big as select repeat(md5(i::text), 30) as v from generate_series(1, 250000) i");
    let mut create = env.command("dbranch", &env.repo());
    create.args(["create", "c", "--from", "main"]);
    let create = std::thread::spawn(move || process::run(create, LIMIT * 4));
    let is_half_made = |path: &std::path::Path| path.extension().is_some_and(|e| e == "partial");
    wait_until(LIMIT, "the copy has begun", || {
        env.volumes().iter().any(|path| is_half_made(path)) || create.is_finished()
    });
    env.image().fill("filler", 45);
    let created = create.join().expect("it ends by itself");
    let _ = created.fails(1, &["`main` can't be cloned", "no room left", "make room"]);
    assert_eq!(env.branches(), ["main"]);
    assert_eq!(
        env.volumes().len(),
        1,
        "nothing half made: {:?}",
        env.volumes()
    );
    // Not all of `big`: to look at it for the first time writes as much log.
    assert_eq!(env.sql("select v from t"), "7");
    assert_eq!(env.sql("select count(*) from pg_replication_slots"), "0");
    make_room(&env);
    env.sql("insert into t values (8)");
    let _ = env.git(&["checkout", "-q", "-b", "c"]).ok();
    assert_eq!(env.sql("select count(*) from big"), "250000");
}

#[test]
fn btrfs_without_room_for_metadata_takes_no_branch_and_says_why() {
    let Some(env) = ready_on(Fs::Btrfs, 600) else {
        return;
    };
    let _ = env.dbranch(&["stop", "main"]).ok();
    let point = env.image().point();
    env.image().fill("filler", 30);
    fs::create_dir(point.join("small")).expect("ours");
    let mut names = 0..;
    let mut write = || {
        let name = names.next().map(|n: u32| point.join(format!("small/{n}")));
        fs::write(name.expect("without end"), [7; 2000])
    };
    for _ in 0..3 {
        while write().is_ok() {}
        let _ = env.run("sync", &["-f", &point.display().to_string()]).ok();
    }
    // Snapshots may take from a reserve that files may not.
    let volume = env.volumes()[0].display().to_string();
    let mut snapshots =
        (0..).map(|n: u32| point.join(format!("snapshot-{n}")).display().to_string());
    let one_more = |to: String| {
        env.run("btrfs", &["subvolume", "snapshot", &volume, &to])
            .code
    };
    wait_until(LIMIT * 2, "no snapshot can be made", || {
        one_more(snapshots.next().expect("without end")) != Some(0)
    });
    let _ = env
        .dbranch(&["create", "c", "--from", "main"])
        .fails(1, &["`main` can't be cloned", "metadata"]);
    let checkout = env.git(&["checkout", "-q", "-b", "c"]).ok();
    let _ = checkout.says(&["dbranch: ", "metadata", "STAYS on `main`"]);
    assert_eq!(env.branches(), ["main"]);
    assert_eq!(env.volumes().len(), 1);

    // A daemon that starts now can still be used to delete.
    let _ = env.dbranch(&["shutdown"]).ok();
    let _ = env.dbranch(&["list"]).ok();
    fs::remove_dir_all(point.join("small")).expect("ours");
    make_room(&env);
    wait_until(LIMIT, "the room is there again", || {
        env.dbranch(&["create", "d", "--from", "main"]).code == Some(0)
    });
    assert_eq!(env.sql_on("d", "select v from t"), "7");
    assert_eq!(env.sql_on("main", "select v from t"), "7");
}

fn a_first_branch_on_a_full_disk(fs: Fs, storage: Storage) {
    let Some(env) = Image::make(fs, 600).and_then(|image| TestEnv::on(image, storage)) else {
        return;
    };
    env.write_config(&env.repo(), "shop", env.ports.first);
    let _ = env.dbranch(&["init", "--yes"]).ok();
    env.image().fill("filler", 12);
    let refused = env.dbranch(&["init-postgres"]);
    assert_eq!(refused.code, Some(1), "{refused}");
    assert!(
        refused.stderr.contains("No space left") || refused.stderr.contains("not enough room"),
        "{refused}"
    );
    let refused = refused.says(&["hint: ", "make room"]);
    assert!(!refused.stderr.contains("dbranch resume"), "{refused}");
    assert!(env.branches().is_empty());
    assert_eq!(env.volumes(), Vec::<std::path::PathBuf>::new());
    make_room(&env);
    let _ = env.dbranch(&["init-postgres"]).ok();
    assert_eq!(env.sql("select 1"), "1");
}

#[test]
fn a_first_branch_on_a_full_btrfs_leaves_nothing_and_can_be_made_later() {
    a_first_branch_on_a_full_disk(Fs::Btrfs, Storage::Btrfs);
}

#[test]
fn a_first_branch_on_a_full_xfs_leaves_nothing_and_can_be_made_later() {
    a_first_branch_on_a_full_disk(Fs::Xfs, Storage::Copy);
}

fn a_server_on_a_full_disk(fs: Fs) {
    let Some(env) = ready_on(fs, 600) else {
        return;
    };
    fs::create_dir(env.image().point().join("filler")).expect("ours");
    let mut inserted = 0;
    let mut fillers = 0..;
    wait_until(LIMIT, "the server has given up", || {
        // What a server that crashed has given back is taken again.
        let filler = fillers.next().map(|n: u32| format!("filler/{n}"));
        env.image().fill(&filler.expect("without end"), 0);
        // Every switch needs another file of 16 MiB.
        let out = env.psql(
            &env.url(),
            "insert into t values (8); select pg_switch_wal()",
        );
        inserted += u32::from(out.code == Some(0));
        env.state("main") == "failed"
    });
    let show = env.show("main");
    let said = |key: &str| show[key].as_str().unwrap_or_default().to_owned();
    assert!(
        said("failure").contains("No space left on device"),
        "{show}"
    );
    assert!(
        said("failure_hint").contains("dbranch resume main"),
        "{show}"
    );
    let list = env.dbranch(&["list"]).ok();
    assert!(list.stdout.contains("failed"), "{list}");
    let _ = list.says(&["warning: ", "No space left on device", "hint: make room in"]);
    let refused = env.psql(&env.url(), "select 1");
    let _ = refused.says(&["FATAL", "No space left on device", "HINT", "make room"]);

    make_room(&env);
    let count: u32 = env
        .sql("select count(*) from t where v = 8")
        .parse()
        .expect("a number");
    assert!(
        count >= inserted,
        "what was committed is there: {count}, {inserted}"
    );
    assert_eq!(env.state("main"), "running");
}

#[test]
fn a_server_on_a_full_btrfs_says_so_and_goes_on_when_there_is_room() {
    a_server_on_a_full_disk(Fs::Btrfs);
}

#[test]
fn a_server_on_a_full_xfs_says_so_and_goes_on_when_there_is_room() {
    a_server_on_a_full_disk(Fs::Xfs);
}
