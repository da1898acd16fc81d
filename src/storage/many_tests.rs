//! Many clones, deleted in any order: what is freed is what nobody shares any more, by the count of a
//! file system on which nobody else writes.
#![cfg(target_os = "linux")]

use std::fs::{self, File};
use std::io::Write;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::time::{Duration, Instant};

use nix::unistd::{Gid, Uid};

use super::*;
use crate::types::Owner;

/// Generations in the chain, and children of the root beside it.
const CHAIN: usize = 12;
const CHILDREN: usize = 40;
/// What each generation, and each child, owns.
const OF_GENERATION: u64 = 4 << 20;
const OF_CHILD: u64 = 2 << 20;
/// The root's data, and how much of it each generation overwrites.
const OF_ROOT: u64 = 16 << 20;
const REWRITTEN: u64 = 64 << 10;
const COMPARED: u64 = 64 << 10;
/// The file system's own records of files and volumes.
const SLACK: u64 = 6 << 20;

/// How long btrfs' cleaner may take.
const LIMIT: Duration = Duration::from_secs(60);

/// A file system in a sparse file.
struct FileSystem {
    folder: tempfile::TempDir,
}

impl FileSystem {
    /// None, said aloud, where this machine can't have one.
    fn make(test: &str, capability: &str, mkfs: &[&str], options: &str) -> Option<Self> {
        let missing = |name: &str, reason: &str| {
            let required = std::env::var("DBRANCH_TEST_REQUIRE").unwrap_or_default();
            assert!(
                !required.split(',').any(|c| c == name),
                "{test} needs {name}: {reason}"
            );
            let _ = writeln!(std::io::stderr(), "skipped: {test}: {reason}");
        };
        if !Uid::effective().is_root() {
            missing("root", "not root");
            return None;
        }
        let folder = tempfile::tempdir().unwrap();
        let image = folder.path().join("image");
        File::create(&image).unwrap().set_len(1 << 30).unwrap();
        fs::create_dir(folder.path().join("at")).unwrap();
        let made = Self { folder };
        let tried = run(Command::new(mkfs[0]).args(&mkfs[1..]).arg(&image)).and_then(|()| {
            run(Command::new("mount")
                .args(["-o", options])
                .arg(&image)
                .arg(made.at()))
        });
        if let Err(reason) = tried {
            missing(capability, &reason);
            return None;
        }
        Some(made)
    }

    fn at(&self) -> PathBuf {
        self.folder.path().join("at")
    }
}

impl Drop for FileSystem {
    fn drop(&mut self) {
        let _ = run(Command::new("umount").arg(self.at()));
    }
}

fn run(command: &mut Command) -> Result<(), String> {
    // Where mkfs is, whatever the user's PATH.
    command.env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin");
    let out = command
        .output()
        .map_err(|e| format!("{}: {e}", command.get_program().display()))?;
    if out.status.success() {
        return Ok(());
    }
    Err(String::from_utf8_lossy(&out.stderr).trim().to_owned())
}

/// A number drawn by lot, the same in each run (xorshift).
fn draw(state: &mut u64) -> u64 {
    *state ^= *state << 13;
    *state ^= *state >> 7;
    *state ^= *state << 17;
    *state
}

/// Bytes that no file system can leave out, the same for the same seed.
fn noise(seed: u64, size: u64) -> Vec<u8> {
    let mut state = seed.wrapping_mul(2) + 1;
    let mut bytes = Vec::new();
    while (bytes.len() as u64) < size {
        bytes.extend_from_slice(&draw(&mut state).to_ne_bytes());
    }
    bytes
}

/// A volume under test, and the files it must have with their seeds.
struct Member {
    id: VolumeId,
    /// Its place in the chain; none for a child beside it.
    generation: Option<usize>,
    files: Vec<(String, u64, u64)>,
}

struct Many {
    driver: Arc<dyn StorageDriver>,
    used_before: u64,
    root: VolumeId,
    members: Vec<Member>,
}

impl Many {
    fn make(at: &Path) -> Self {
        let owner = Owner {
            uid: Uid::effective().as_raw(),
            gid: Gid::effective().as_raw(),
        };
        let driver = open(Choice::Auto, &at.join("pool"), owner).unwrap();
        let root = VolumeId::random();
        let path = driver.create_volume(&root).unwrap();
        fs::write(path.join("table"), noise(1, OF_ROOT)).unwrap();
        let mut many = Self {
            driver,
            used_before: 0,
            root,
            members: Vec::new(),
        };
        many.used_before = many.used();
        for generation in 0..CHAIN {
            let (parent, files) = match generation.checked_sub(1) {
                None => (many.root.clone(), Vec::new()),
                Some(i) => (many.members[i].id.clone(), many.members[i].files.clone()),
            };
            let name = format!("of-generation-{generation}");
            many.add(&parent, Some(generation), files, (name, OF_GENERATION));
        }
        for child in 0..CHILDREN {
            let root = many.root.clone();
            many.add(
                &root,
                None,
                Vec::new(),
                (format!("of-child-{child}"), OF_CHILD),
            );
        }
        many
    }

    fn add(
        &mut self,
        parent: &VolumeId,
        generation: Option<usize>,
        mut files: Vec<(String, u64, u64)>,
        own: (String, u64),
    ) {
        let id = VolumeId::random();
        self.driver
            .clone_volume(parent, &id, Omit::NOTHING, &|_, _| {})
            .unwrap();
        let path = self.driver.volume_path(&id);
        let seed = 100 + self.members.len() as u64;
        fs::write(path.join(&own.0), noise(seed, own.1)).unwrap();
        files.push((own.0, own.1, seed));
        if let Some(generation) = generation {
            let table = File::options()
                .write(true)
                .open(path.join("table"))
                .unwrap();
            let place = generation as u64 * REWRITTEN * 2;
            table.write_all_at(&noise(seed, REWRITTEN), place).unwrap();
        }
        self.members.push(Member {
            id,
            generation,
            files,
        });
    }

    fn used(&self) -> u64 {
        nix::unistd::syncfs(File::open(self.driver.pool()).unwrap()).unwrap();
        let space = self.driver.space().unwrap();
        space.total_bytes - space.free_bytes
    }

    /// What those that are left need beside the root: a generation's file is shared by all later ones.
    fn needed(&self) -> u64 {
        let generations = self.members.iter().filter_map(|m| m.generation);
        let chain = generations.max().map_or(0, |last| last as u64 + 1);
        let children = self
            .members
            .iter()
            .filter(|m| m.generation.is_none())
            .count();
        chain * OF_GENERATION + children as u64 * OF_CHILD
    }

    /// Waits until the file system's count is what it should be.
    fn must_settle(&self) {
        let needed = self.needed();
        // Each generation left may hold what it wrote over its parent's table.
        let rewritten = CHAIN as u64 * REWRITTEN;
        let begun = Instant::now();
        loop {
            let used = self.used().saturating_sub(self.used_before);
            if used <= needed + rewritten + SLACK {
                assert!(
                    used + SLACK >= needed,
                    "{used} bytes used, but those that are left have {needed}"
                );
                return;
            }
            assert!(
                begun.elapsed() < LIMIT,
                "{} volumes left: {used} bytes used, {needed} needed",
                self.members.len()
            );
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// Reads everything; what each file begins with is compared.
    fn must_be_whole(&self) {
        for member in &self.members {
            let path = self.driver.volume_path(&member.id);
            assert_eq!(
                fs::metadata(path.join("table")).unwrap().len(),
                OF_ROOT,
                "{}",
                member.id
            );
            for (name, size, seed) in &member.files {
                let found = fs::read(path.join(name)).unwrap();
                assert_eq!(found.len() as u64, *size, "{name} of {}", member.id);
                assert!(
                    found.starts_with(&noise(*seed, COMPARED)),
                    "{name} of {} has other content",
                    member.id
                );
            }
        }
        let root = fs::read(self.driver.volume_path(&self.root).join("table")).unwrap();
        assert!(
            root.starts_with(&noise(1, COMPARED)),
            "the root's content is another"
        );
    }
}

/// Deletes all in an order drawn by lot, and looks at each quarter of the way.
fn deletion_frees_what_nobody_shares(file_system: &FileSystem) {
    let mut many = Many::make(&file_system.at());
    assert!(many.driver.shares_blocks());
    many.must_settle();
    many.must_be_whole();
    let mut seed = 42;
    for i in (1..many.members.len()).rev() {
        let other = usize::try_from(draw(&mut seed) % (i as u64 + 1)).unwrap();
        many.members.swap(i, other);
    }
    let quarter = many.members.len() / 4;
    while !many.members.is_empty() {
        for member in many
            .members
            .split_off(many.members.len().saturating_sub(quarter))
        {
            many.driver.destroy(&member.id).unwrap();
        }
        many.must_settle();
        many.must_be_whole();
    }
    assert_eq!(many.driver.list().unwrap(), [many.root.clone()]);
}

#[test]
fn btrfs_frees_what_no_clone_shares_any_more_in_any_order_of_deletion() {
    let test = "btrfs_frees_what_no_clone_shares_any_more_in_any_order_of_deletion";
    // Nothing twice: the count is then that of the data.
    let mkfs = ["mkfs.btrfs", "-q", "-m", "single"];
    // Its cleaner works once in a commit interval, which is 30 s by default.
    let options = "loop,commit=1";
    if let Some(file_system) = FileSystem::make(test, "btrfs", &mkfs, options) {
        deletion_frees_what_nobody_shares(&file_system);
    }
}

#[test]
fn xfs_frees_what_no_clone_shares_any_more_in_any_order_of_deletion() {
    let test = "xfs_frees_what_no_clone_shares_any_more_in_any_order_of_deletion";
    let mkfs = ["mkfs.xfs", "-q", "-m", "reflink=1"];
    if let Some(file_system) = FileSystem::make(test, "xfs", &mkfs, "loop") {
        deletion_frees_what_nobody_shares(&file_system);
    }
}
