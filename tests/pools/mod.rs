//! Pools that `dbranch storage setup` makes: real loop devices, real mounts, another fstab.

mod broken_off;
mod grow;
mod refused;
mod remove;
mod rights;
mod setup;

use std::path::PathBuf;
use std::process::Command;

use serde_json::Value;

use crate::support::process::Output;
use crate::support::{LIMIT, Server, Storage, TestEnv, need_root, wait_until};

/// What fstab holds before anything of ours is in it. Its last line has no end.
const FSTAB: &str = "# static file system information\nUUID=1 / ext4 defaults 0 1";

/// An environment on a file system that can't clone, with an fstab of its own.
struct Pools {
    env: TestEnv,
}

impl Pools {
    fn new() -> Option<Self> {
        need_root()?;
        Some(Self::on(TestEnv::with(Server::Native, Storage::Copy)?))
    }

    fn on(mut env: TestEnv) -> Self {
        env.set("DBRANCH_STORAGE", "auto");
        let pools = Self { env };
        std::fs::write(pools.fstab(), FSTAB).expect("ours");
        pools
    }

    fn fstab(&self) -> PathBuf {
        self.env.path("elsewhere/fstab")
    }

    /// Where a pool is set up when nobody names a place.
    fn pool(&self) -> PathBuf {
        self.env.path("home/cow-pool")
    }

    fn image(&self) -> PathBuf {
        self.env.path("home/cow-pool.img")
    }

    #[track_caller]
    fn storage(&self, args: &[&str]) -> Output {
        let fstab = self.fstab();
        let fstab = fstab.to_str().expect("text");
        self.env
            .dbranch(&[&["storage"], args, &["--fstab", fstab]].concat())
    }

    #[track_caller]
    fn set_up(&self) -> Output {
        self.storage(&["setup", "--size", "1G", "--yes"]).ok()
    }

    /// What `storage status` knows of the pool.
    #[track_caller]
    fn status(&self) -> Value {
        let all = self.storage(&["status", "--json"]).json();
        let path = self.pool().display().to_string();
        let pools = all.as_array().expect("an array");
        let found = pools.iter().find(|p| p["path"] == *path);
        found.cloned().unwrap_or(Value::Null)
    }

    fn settings(&self) -> Value {
        let file = self.env.path("home/config/config.json");
        let text = std::fs::read_to_string(file).unwrap_or_else(|_| "{}".into());
        serde_json::from_str(&text).expect("settings are JSON")
    }

    fn is_mounted(&self) -> bool {
        is_mounted(&self.pool())
    }

    /// Stops everything and unmounts the pool, as at the machine's end.
    fn halt(&self) {
        let _ = self.env.dbranch(&["shutdown", "--stop-branches"]).ok();
        unmount(&self.pool());
    }

    /// Mounts what fstab says, as at the machine's start.
    fn boot(&self) {
        let mounted = Command::new("mount")
            .arg("-T")
            .arg(self.fstab())
            .arg(self.pool())
            .output()
            .expect("mount runs");
        assert!(mounted.status.success(), "{mounted:?}");
    }

    /// Asserts that nothing of a pool is left, and fstab is as it was.
    #[track_caller]
    fn nothing_is_left(&self) {
        assert!(!self.pool().exists() && !self.is_mounted());
        for ending in ["", ".part", ".removed"] {
            let file = self.env.path(&format!("home/cow-pool.img{ending}"));
            assert!(!file.exists(), "{}", file.display());
        }
        let fstab = std::fs::read_to_string(self.fstab()).expect("there");
        assert_eq!(fstab, FSTAB);
        assert_eq!(self.settings()["pool"], Value::Null);
    }
}

fn is_mounted(path: &std::path::Path) -> bool {
    let mounts = std::fs::read_to_string("/proc/mounts").expect("Linux");
    mounts.lines().any(|l| l.split(' ').nth(1) == path.to_str())
}

/// Unmounts a file system as soon as the last server that ended has let go of it.
fn unmount(path: &std::path::Path) {
    wait_until(LIMIT, "nobody uses the pool any more", || {
        let out = Command::new("umount").arg(path).output();
        out.is_ok_and(|out| out.status.success())
    });
}
