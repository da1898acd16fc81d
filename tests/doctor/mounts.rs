//! Mount options, images, and what the next start of the machine mounts.

use std::process::Command;

use super::{doctor, env_on, finds, finds_and_mends, finds_nothing, run, run_fix, text};
use crate::support::{Fs, Image, LIMIT, Storage, TestEnv, need_root, process, wait_until};

#[test]
fn a_file_system_in_order_has_no_findings() {
    let Some(env) = env_on(Fs::Btrfs, 1024) else {
        return;
    };
    let findings = doctor(&env);
    let storage = findings.iter().find(|f| f["what"] == "storage");
    let storage = storage.expect("the pool is told of");
    assert!(text(storage, "detail").contains("btrfs"), "{storage}");
    let of_storage: Vec<_> = findings
        .iter()
        .filter(|f| {
            f["level"] != "ok" && !["config", "git hooks", "not-at-boot"].contains(&text(f, "what"))
        })
        .collect();
    assert!(of_storage.is_empty(), "{of_storage:#?}");
}

#[test]
fn options_that_harm_are_found_and_remounted_away() {
    let Some(image) = Image::make_with(Fs::Btrfs, 256, &[], "nodatacow") else {
        return;
    };
    let Some(env) = TestEnv::on(image, Storage::Btrfs) else {
        return;
    };
    finds_and_mends(&env, "nodatacow", "warning", &["checksums"]);
    env.image().remount("ro");
    finds_and_mends(&env, "read-only", "problem", &["read-only"]);
    let point = env.image().point().display().to_string();
    run(&env, "btrfs", &["quota", "enable", &point]);
    run(&env, "btrfs", &["qgroup", "limit", "10M", "0/5", &point]);
    finds_and_mends(&env, "quota-limit", "problem", &["10.0 MiB", "0/5"]);
    finds_and_mends(&env, "quota", "warning", &["qgroup"]);
}

#[test]
fn a_pool_that_may_not_be_changed_is_found() {
    let Some(env) = env_on(Fs::Btrfs, 256) else {
        return;
    };
    run(&env, "chattr", &["+i", &env.pool().display().to_string()]);
    finds_and_mends(&env, "not-writable", "problem", &["not permitted"]);
}

#[test]
fn an_image_larger_than_its_disk_is_found() {
    // 8 TiB, more than any disk that tests run on has free.
    let Some(env) = env_on(Fs::Btrfs, 8 << 20) else {
        return;
    };
    let found = finds(&env, "image", "warning", &["may still grow", "free"]);
    let file = env.image().file().display().to_string();
    assert!(text(&found, "detail").contains(&file), "{found}");
    let _ = run_fix(&env, &found);
}

#[test]
fn an_image_whose_disk_is_nearly_full_is_a_problem() {
    let Some(env) = TestEnv::quick() else { return };
    let Some((env, tmpfs)) = on_tmpfs(env) else {
        return;
    };
    finds(&env, "volatile", "warning", &["memory"]);
    // An image inside it, whose disk is the small tmpfs.
    let image = Image::make_in(&tmpfs.0, Fs::Btrfs, 2048).expect("as root");
    let mut inner = TestEnv::on(image, Storage::Btrfs).expect("servers are here");
    inner.unset("DBRANCH_POOL");
    let found = finds(&inner, "image", "problem", &["may still grow"]);
    let _ = run_fix(&inner, &found);
    finds_nothing(&inner, "volatile");
}

/// A mounted tmpfs, unmounted in the end.
struct Tmpfs(std::path::PathBuf);

impl Drop for Tmpfs {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("-l").arg(&self.0).output();
    }
}

/// The environment with its pool on a tmpfs of 200 MiB.
fn on_tmpfs(mut env: TestEnv) -> Option<(TestEnv, Tmpfs)> {
    need_root()?;
    let point = env.path("memory");
    std::fs::create_dir(&point).expect("ours");
    let mounted = Command::new("mount")
        .args(["-t", "tmpfs", "-o", "size=200m,mode=711", "dbranch-test"])
        .arg(&point)
        .status();
    assert!(mounted.is_ok_and(|s| s.success()), "root can mount a tmpfs");
    std::fs::create_dir(point.join("pool")).expect("ours");
    env.set("DBRANCH_POOL", point.join("pool"));
    env.set("DBRANCH_STORAGE", "copy");
    Some((env, Tmpfs(point)))
}

#[test]
fn an_image_deleted_under_its_mount_is_saved() {
    let Some(env) = env_on(Fs::Btrfs, 256) else {
        return;
    };
    let image = env.image();
    std::fs::write(image.point().join("kept"), "data").expect("writable");
    std::fs::remove_file(image.file()).expect("ours");
    let found = finds(&env, "image-deleted", "problem", &["lost with the mount"]);
    let _ = run_fix(&env, &found);
    let _ = env.dbranch(&["shutdown"]).ok();
    image.unmount();
    image.mount();
    let kept = std::fs::read_to_string(image.point().join("kept"));
    assert_eq!(kept.expect("it was saved"), "data");
    finds_nothing(&env, "image-deleted");
}

#[test]
fn a_mount_that_no_boot_makes_is_found() {
    let Some(env) = env_on(Fs::Btrfs, 256) else {
        return;
    };
    // A daemon that sees an fstab of this test's own.
    let etc = env.path("elsewhere/etc");
    run(&env, "cp", &["-a", "/etc", &etc.display().to_string()]);
    let fstab = etc.join("fstab");
    std::fs::write(&fstab, "/dev/root / ext4 defaults 0 1\n").expect("writable");
    let mut start = env.command("unshare", &env.repo());
    start.args(["-m", "--propagation", "slave", "sh", "-ec"]);
    // The new namespace must not keep other tests' file systems mounted.
    start.arg(format!(
        "awk '$2 ~ /\\/img-/ && $2 != \"{}\" {{print $2}}' /proc/mounts | xargs -r -n 1 umount -l; \
         mount --bind {} /etc; dbranch start --detach",
        env.image().point().display(),
        etc.display()
    ));
    let _ = process::run(start, LIMIT).ok();
    let pid = env.dbranch(&["start", "--detach", "--json"]).json()["pid"].to_string();
    let fix = |finding: &serde_json::Value| {
        let fix = text(finding, "fix");
        run(&env, "nsenter", &["-t", &pid, "-m", "sh", "-ec", fix]);
    };
    let found = finds(&env, "not-at-boot", "warning", &["when the machine starts"]);
    fix(&found);
    finds_nothing(&env, "not-at-boot");
    let line = std::fs::read_to_string(&fstab).expect("ours");
    let line = line.lines().last().expect("a line was added").to_owned();
    let image = env.image();
    assert!(line.contains("loop,nofail") && line.contains(&image.file().display().to_string()));
    // mount(8) itself understands it.
    let checked = ["--tab-file", &fstab.display().to_string(), "--verify"].map(ToOwned::to_owned);
    let checked: Vec<&str> = checked.iter().map(String::as_str).collect();
    let verified = env.run("findmnt", &checked);
    assert!(!verified.stdout.contains("parse error"), "{verified}");

    std::fs::write(&fstab, line.replace("nofail", "noauto")).expect("writable");
    let found = finds(&env, "not-at-boot", "warning", &[]);
    fix(&found);
    finds_nothing(&env, "not-at-boot");
}

#[test]
fn a_pool_that_is_not_mounted_is_found_with_its_command() {
    let Some(env) = env_on(Fs::Btrfs, 256) else {
        return;
    };
    env.set_up();
    let _ = env.dbranch(&["stop", "--all"]).ok();
    env.image().unmount();
    let pool = env.pool().display().to_string();
    finds(&env, "pool-missing", "problem", &[&pool, "not mounted"]);
    env.image().mount();
    finds_nothing(&env, "pool-missing");
    assert_eq!(env.sql("select 1"), "1");
}

#[test]
fn a_disk_that_hangs_is_found_while_it_hangs() {
    let Some(env) = env_on(Fs::Btrfs, 256) else {
        return;
    };
    env.image().freeze();
    let found = finds(&env, "pool-hangs", "problem", &["does not answer"]);
    let _ = run_fix(&env, &found);
    wait_until(LIMIT, "the disk answers again", || {
        super::find(&env, "pool-hangs").is_none()
    });
}
