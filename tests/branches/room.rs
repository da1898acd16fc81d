//! A pool with too little room.

use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::support::{LIMIT, Server, Storage, TestEnv, edit_config, need_root, wait_until};

/// A file system of 300 MB, of which some 220 can be used: the smallest XFS there is.
fn mount_small_xfs(env: &TestEnv) -> PathBuf {
    let at = env.path("small");
    let image = env.path("elsewhere/xfs.img");
    std::fs::create_dir(&at).expect("ours");
    let image_file = std::fs::File::create(&image).expect("ours");
    image_file.set_len(300 << 20).expect("sparse");
    let image = image.to_str().expect("a short path");
    let _ = env.run("mkfs.xfs", &["-q", "-m", "reflink=1", image]).ok();
    let mount_point = at.to_str().expect("a short path");
    let _ = env.run("mount", &["-o", "loop", image, mount_point]).ok();
    let passable = std::fs::Permissions::from_mode(0o711);
    std::fs::set_permissions(&at, passable).expect("ours");
    at
}

#[track_caller]
fn unmount(at: &Path) {
    wait_until(LIMIT, "nobody uses the pool any more", || {
        let unmounted = Command::new("umount").arg(at).output();
        unmounted.is_ok_and(|out| out.status.success())
    });
}

#[test]
fn a_pool_that_fills_up_refuses_branches_until_room_was_freed() {
    if need_root().is_none() {
        return;
    }
    let Some(mut env) = TestEnv::with(Server::Native, Storage::Reflink) else {
        return;
    };
    let small = mount_small_xfs(&env);
    env.set("DBRANCH_POOL", small.join("pool"));
    env.set_up();
    env.sql("create table t as select 1 as v");
    let _ = env
        .git(&["checkout", "-q", "-b", "first"])
        .ok()
        .says(&["first <- main (reflink of "]);
    let filler = small.join("filler");
    let free = free_bytes(&small);
    let mib = |bytes: u64| format!("{}M", bytes >> 20);
    let filler_name = filler.to_str().expect("a short path");
    let _ = env
        .run("fallocate", &["-l", &mib(free - (24 << 20)), filler_name])
        .ok();

    let checkout = env.git(&["checkout", "-q", "-b", "second"]);
    assert_eq!(checkout.code, Some(0), "git is never broken: {checkout}");
    let checkout = checkout.says(&["not enough room"]);
    assert!(!checkout.stderr.contains("second <- first"), "{checkout}");
    let started = "select pg_postmaster_start_time(), pg_current_wal_lsn()";
    let before = env.sql_on("main", started);
    for _ in 0..3 {
        let _ = env
            .dbranch(&["create", "third", "--from", "main"])
            .fails(1, &["not enough room", "free"]);
    }
    assert_eq!(
        env.sql_on("main", started),
        before,
        "the parent wasn't asked"
    );
    assert_eq!(env.branches(), ["first", "main"]);
    // What there is works and can be deleted.
    assert_eq!(env.sql_on("main", "select v from t"), "1");
    let _ = env.dbranch(&["use", "main"]).ok();
    let _ = env.dbranch(&["delete", "first", "--now", "--yes"]).ok();

    std::fs::remove_file(&filler).expect("ours");
    let _ = env.dbranch(&["create", "third", "--from", "main"]).ok();
    assert_eq!(env.sql_on("third", "select v from t"), "1");
    let _ = env.dbranch(&["shutdown", "--stop-branches"]).ok();
    unmount(&small);
}

fn free_bytes(at: &Path) -> u64 {
    let stat = nix::sys::statvfs::statvfs(at).expect("it is mounted");
    stat.blocks_available() * stat.fragment_size()
}

#[test]
fn a_full_copy_that_does_not_fit_is_refused_before_it_begins() {
    if need_root().is_none() {
        return;
    }
    let Some(mut env) = TestEnv::with(Server::Native, Storage::Copy) else {
        return;
    };
    let small = env.path("small");
    std::fs::create_dir(&small).expect("ours");
    let mounted = Command::new("mount")
        .args(["-t", "tmpfs", "-o", "size=240m,mode=711", "dbranch-test"])
        .arg(&small)
        .status();
    assert!(mounted.is_ok_and(|s| s.success()), "root can mount a tmpfs");
    env.set("DBRANCH_POOL", small.join("pool"));
    env.write_config(&env.repo(), "shop", env.ports.first);
    edit_config(&env.repo(), |c| {
        c["postgres"]["settings"]["max_wal_size"] = "32MB".into();
        c["postgres"]["settings"]["min_wal_size"] = "32MB".into();
    });
    let _ = env.dbranch(&["init", "--yes"]).ok();
    let _ = env.dbranch(&["init-postgres"]).ok();
    let _ = env.dbranch(&["install-hooks"]).ok();
    // Some 90 MB beside a cluster of 30 MB and its log: a second one does not fit.
    env.sql("create table big as select md5(i::text) from generate_series(1, 1400000) i");
    let checkout = env.git(&["checkout", "-q", "-b", "too-big"]);
    assert_eq!(checkout.code, Some(0), "git is never broken: {checkout}");
    let checkout = checkout.says(&["room"]);
    assert!(!checkout.stderr.contains("too-big <- main"), "{checkout}");
    let _ = env
        .dbranch(&["create", "by-hand", "--from", "main"])
        .fails(1, &["room"]);
    assert_eq!(env.branches(), ["main"]);
    // Paths, not entries: an entry keeps its folder open, and with it the mount.
    let volumes: Vec<_> = std::fs::read_dir(small.join("pool"))
        .expect("the pool is there")
        .flatten()
        .map(|e| e.path())
        .filter(|volume| volume.join("data").exists())
        .collect();
    assert_eq!(volumes.len(), 1, "nothing half made: {volumes:?}");
    // main is what the endpoint still shows, and it lives.
    assert_eq!(env.sql("select count(*) from big"), "1400000");
    let _ = env.dbranch(&["shutdown", "--stop-branches"]).ok();
    unmount(&small);
}
