//! A ZFS dataset for an environment.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

/// A dataset, mounted; destroyed when dropped, with all below it.
pub(crate) struct Dataset {
    name: String,
}

/// The dataset that is mounted there. zfs-fuse's own `zfs list PATH` finds none once the kernel
/// has given out more than 255 device numbers.
fn dataset_at(point: &Path) -> String {
    let mounts = std::fs::read_to_string("/proc/self/mounts").expect("there is proc");
    let found = mounts.lines().find_map(|line| {
        let mut fields = line.split(' ');
        let (dataset, at) = (fields.next()?, fields.next()?);
        (Path::new(at) == point).then(|| dataset.to_owned())
    });
    found.unwrap_or_else(|| panic!("no dataset is mounted at {}", point.display()))
}

impl Dataset {
    /// Makes one below the dataset that is mounted at `parent`, and says where it is mounted.
    pub(crate) fn make(parent: &Path) -> (Self, PathBuf) {
        let parent = parent.canonicalize().expect("the folder is there");
        let of_parent = dataset_at(&parent);
        let mut random = [0; 4];
        getrandom::fill(&mut random).expect("the system has random bytes");
        let leaf = format!("dbt-{:08x}", u32::from_ne_bytes(random));
        let name = format!("{of_parent}/{leaf}");
        zfs(&["create", &name]);
        (Self { name }, parent.join(leaf))
    }

    pub(crate) fn name(&self) -> &str {
        &self.name
    }

    /// The volumes and snapshots in it, relative to it, and each one's origin or `-`.
    pub(crate) fn tree(&self) -> Vec<(String, String)> {
        let types = "filesystem,snapshot";
        let listed = zfs(&[
            "list",
            "-H",
            "-r",
            "-t",
            types,
            "-o",
            "name,origin",
            &self.name,
        ]);
        let below = format!("{}/", self.name);
        let lines = listed.lines().filter_map(|l| l.strip_prefix(&below));
        let split = lines.filter_map(|l| l.split_once('\t'));
        split
            .map(|(name, origin)| (name.to_owned(), origin.to_owned()))
            .collect()
    }
}

impl Drop for Dataset {
    fn drop(&mut self) {
        let deadline = Instant::now() + Duration::from_secs(60);
        // -R, as clones of volumes are datasets beside them: all lies in this one, which is ours.
        while let Err(e) = try_zfs(&["destroy", "-R", &self.name]) {
            let in_vain = Instant::now() > deadline;
            assert!(!in_vain || std::thread::panicking(), "{e}");
            if in_vain || e.contains("does not exist") {
                return;
            }
            std::thread::sleep(Duration::from_millis(20));
        }
    }
}

/// Runs `zfs`, which must succeed; waits while a dataset is busy, as one of zfs-fuse is for some
/// moments after its unmount.
#[track_caller]
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
