//! `dbranch storage setup`, and the pool it makes.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::process::Command;

use super::{FSTAB, Pools, unmount};
use crate::support::{LIMIT, wait_until};

#[test]
fn a_pool_on_any_disk_makes_branches_instant_and_survives_a_restart() {
    let Some(pools) = Pools::new() else { return };
    let env = &pools.env;
    // The daemon runs from here on, with other settings.
    env.write_config(&env.repo(), "shop", env.ports.first);
    let _ = env.dbranch(&["init", "--yes"]).ok();
    let settings = env.path("home/config/config.json");
    fs::write(&settings, r#"{"runtime": "native"}"#).expect("ours");

    let shown = pools
        .storage(&["setup", "--size", "1G", "--dry-run"])
        .text();
    assert!(shown.contains("mkfs.btrfs") && !pools.image().exists());
    let _ = pools
        .storage(&["setup", "--size", "1G"])
        .fails(1, &["mkfs.btrfs", "mount", "--yes"]);
    assert!(!pools.image().exists(), "nothing is done without a word");
    let _ = pools
        .set_up()
        .says(&["mkfs.btrfs", "set up pool", "new projects use it"]);

    assert_eq!(pools.settings()["runtime"], "native", "other settings stay");
    assert_eq!(
        pools.settings()["pool"],
        *pools.pool().display().to_string()
    );
    let file = fs::metadata(pools.image()).expect("made");
    assert_eq!(file.len(), 1 << 30);
    assert!(file.blocks() * 512 < 64 << 20, "sparse: {}", file.blocks());
    let status = pools.status();
    assert_eq!(status["for_new_projects"], true, "{status}");
    assert_eq!(status["file_system"], "btrfs");
    assert_eq!(status["mounted_by"], *pools.fstab().display().to_string());
    let options = status["mount_options"].as_str().expect("text");
    assert!(options.contains("user_subvol_rm_allowed") && options.contains("nosuid"));

    // A second time changes nothing.
    let fstab = fs::read_to_string(pools.fstab()).expect("there");
    assert!(fstab.starts_with(FSTAB));
    let _ = pools.set_up().says(&["nothing to do"]);
    let _ = pools
        .storage(&["setup", "--yes"])
        .ok()
        .says(&["nothing to do"]);
    assert_eq!(fs::read_to_string(pools.fstab()).expect("there"), fstab);

    let _ = env.dbranch(&["init-postgres"]).ok();
    let _ = env.dbranch(&["install-hooks"]).ok();
    env.sql("create table t as select 1 as v");
    let _ = env
        .git(&["checkout", "-q", "-b", "x"])
        .ok()
        .says(&["btrfs snapshot"]);
    env.sql("update t set v = 2");
    let status = pools.status();
    assert_eq!(status["branches"][0]["branches"], 2, "{status}");

    // The machine ends and starts again.
    pools.halt();
    let _ = env
        .dbranch(&["create", "early"])
        .fails(1, &["is not mounted", "dbranch storage setup"]);
    let _ = pools.storage(&["status"]).ok();
    assert_eq!(pools.status()["problem"], "it is not mounted");
    pools.boot();
    assert_eq!(env.sql("select v from t"), "2");
    assert_eq!(env.sql_on("main", "select v from t"), "1");

    // Where nothing mounted it, setup does.
    pools.halt();
    let _ = pools.storage(&["setup", "--yes"]).ok();
    assert_eq!(env.sql("select v from t"), "2");
    let _ = env.dbranch(&["delete-project", "--now", "--yes"]).ok();
    wait_until(LIMIT, "the pool is let go of", || {
        pools.storage(&["remove", "--yes"]).code == Some(0)
    });
    pools.nothing_is_left();
}

#[test]
fn a_pool_with_xfs_shares_blocks() {
    let Some(pools) = Pools::new() else { return };
    let env = &pools.env;
    let args = ["setup", "--size", "1G", "--fs", "xfs", "--yes"];
    let _ = pools.storage(&args).ok().says(&["mkfs.xfs"]);
    env.set_up();
    let _ = env.dbranch(&["create", "x", "--from", "main"]).ok();
    assert_eq!(env.sql_on("x", "select 1"), "1");
    let usage = env.dbranch(&["show", "x", "--json"]).json();
    let own = usage["exclusive_bytes"].as_u64().expect("a number");
    let all = usage["logical_bytes"].as_u64().expect("a number");
    assert!(own < all / 2, "{own} of {all} bytes are its own");
    pools.halt();
}

#[test]
fn a_unit_of_systemd_says_what_fstab_would() {
    let Some(pools) = Pools::new() else { return };
    let env = &pools.env;
    let dir = env.path("elsewhere/units");
    fs::create_dir(&dir).expect("ours");
    let dir = dir.to_str().expect("text");
    let setup = [
        "storage",
        "setup",
        "--size",
        "1G",
        "--yes",
        "--unit-dir",
        dir,
    ];
    let _ = env.dbranch(&setup).ok();
    let _ = env.dbranch(&setup).ok().says(&["nothing to do"]);
    let units: Vec<_> = fs::read_dir(dir).expect("ours").flatten().collect();
    assert_eq!(units.len(), 1, "{units:?}");
    let unit = units[0].path();
    let text = fs::read_to_string(&unit).expect("there");
    if Command::new("systemd-analyze")
        .arg("--version")
        .output()
        .is_ok()
    {
        let checked = Command::new("systemd-analyze")
            .arg("verify")
            .arg(&unit)
            .output()
            .expect("it is there");
        let said = String::from_utf8_lossy(&checked.stderr);
        let name = unit.file_name().expect("named").display().to_string();
        assert!(!said.contains(&name), "{said}");
    }
    // What systemd would run (systemd.mount(5)).
    let value = |key: &str| {
        let found = text.lines().find_map(|l| l.strip_prefix(key));
        found
            .unwrap_or_else(|| panic!("no {key} in {text}"))
            .to_owned()
    };
    let _ = env.dbranch(&["shutdown"]).ok();
    unmount(&pools.pool());
    let mounted = Command::new("mount")
        .args(["-t", &value("Type="), "-o", &value("Options=")])
        .args([value("What="), value("Where=")])
        .status();
    assert!(mounted.is_ok_and(|s| s.success()));
    assert!(pools.is_mounted());
    let remove = ["storage", "remove", "--yes", "--unit-dir", dir];
    let _ = env.dbranch(&remove).ok();
    assert!(!unit.exists());
    pools.nothing_is_left();
}
