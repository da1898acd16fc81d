//! A dataset for a test, below the one that is mounted at `DBRANCH_TEST_ZFS`.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use crate::types::VolumeId;

/// A dataset, destroyed when dropped with all below it.
pub(crate) struct TestDataset {
    pub(crate) name: String,
}

/// Runs `zfs`, which must succeed; waits while a dataset is busy, as a FUSE file system is for
/// some moments after its unmount.
pub(crate) fn zfs(args: &[&str]) -> String {
    let deadline = Instant::now() + Duration::from_secs(60);
    loop {
        match try_zfs(args) {
            Ok(printed) => return printed,
            Err(e) if e.contains("busy") && Instant::now() < deadline => {}
            Err(e) => panic!("{e}"),
        }
        std::thread::sleep(Duration::from_millis(20));
    }
}

fn try_zfs(args: &[&str]) -> Result<String, String> {
    let out = Command::new("zfs").args(args).current_dir("/").output();
    let out = out.map_err(|e| format!("zfs: {e}"))?;
    if out.status.success() {
        return Ok(String::from_utf8_lossy(&out.stdout).trim().to_owned());
    }
    let said = String::from_utf8_lossy(&out.stderr);
    Err(format!("zfs {}: {}", args.join(" "), said.trim()))
}

/// The folder on ZFS that tests may use, or why there is none.
pub(crate) fn folder() -> Result<PathBuf, String> {
    std::env::var_os("DBRANCH_TEST_ZFS")
        .map(PathBuf::from)
        .ok_or_else(|| "DBRANCH_TEST_ZFS names no folder".into())
}

/// The dataset that is mounted there. zfs-fuse's own `zfs list PATH` finds none once the kernel
/// has given out more than 255 device numbers.
fn dataset_at(point: &Path) -> String {
    let mounts = std::fs::read_to_string("/proc/self/mounts").unwrap();
    let found = mounts.lines().find_map(|line| {
        let mut fields = line.split(' ');
        let (dataset, at) = (fields.next()?, fields.next()?);
        (Path::new(at) == point).then(|| dataset.to_owned())
    });
    found.unwrap_or_else(|| panic!("no dataset is mounted at {}", point.display()))
}

impl TestDataset {
    /// Makes one that is mounted at `point`.
    pub(crate) fn mounted_at(point: &Path) -> Self {
        let base = folder().unwrap();
        let base = dataset_at(&base);
        let name = format!("{base}/dbt-{}", VolumeId::random());
        let mountpoint = format!("mountpoint={}", point.to_str().unwrap());
        zfs(&["create", "-o", &mountpoint, &name]);
        Self { name }
    }

    /// All below it, snapshots too, relative to it, in zfs's order.
    pub(crate) fn tree(&self) -> Vec<String> {
        let types = "filesystem,snapshot";
        let listed = zfs(&["list", "-H", "-r", "-t", types, "-o", "name", &self.name]);
        let below = listed.lines().filter_map(|l| l.strip_prefix(&self.name));
        below
            .filter(|name| !name.is_empty())
            .map(|name| name.trim_start_matches('/').to_owned())
            .collect()
    }

    /// Has everything written so that it is counted: making a snapshot waits for that.
    pub(crate) fn settle(&self) {
        let snapshot = format!("{}@settle", self.name);
        zfs(&["snapshot", &snapshot]);
        zfs(&["destroy", &snapshot]);
    }
}

impl Drop for TestDataset {
    fn drop(&mut self) {
        // -R, as clones of volumes are datasets beside them: all of it lies below this one, which is ours alone.
        let deadline = Instant::now() + Duration::from_secs(60);
        while let Err(e) = try_zfs(&["destroy", "-R", &self.name]) {
            if e.contains("does not exist") {
                return;
            }
            if Instant::now() > deadline {
                let _ = std::io::Write::write_all(&mut std::io::stderr(), e.as_bytes());
                return;
            }
            std::thread::sleep(Duration::from_millis(20));
        }
    }
}
