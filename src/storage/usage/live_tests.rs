//! What is counted, against file systems of the tests' own: nobody else writes there.

#![cfg(target_os = "linux")]

use std::collections::HashMap;
use std::fs::{self, File};
use std::io::Write as _;
use std::os::fd::AsFd;
use std::os::unix::fs::{FileExt as _, MetadataExt as _};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::time::{Duration, Instant};

use nix::fcntl::{FallocateFlags, fallocate};
use nix::unistd::{Gid, Uid};

use super::Survey;
use super::look::Ways;
use crate::storage::pool::Pool;
use crate::storage::{Choice, DriverKind, Holder, Omit, StorageDriver, Usages};
use crate::types::{Owner, VolumeId};

const LIMIT: Duration = Duration::from_secs(60);
const MIB: u64 = 1 << 20;

/// A file system in a sparse file, with a pool on it.
struct Mounted {
    driver: Option<Arc<dyn StorageDriver>>,
    at: PathBuf,
    _folder: tempfile::TempDir,
}

impl Drop for Mounted {
    fn drop(&mut self) {
        drop(self.driver.take());
        let start = Instant::now();
        while !run("umount", &[&self.at.display().to_string()]) && start.elapsed() < LIMIT {
            std::thread::sleep(Duration::from_millis(20));
        }
    }
}

fn run(program: &str, args: &[&str]) -> bool {
    Command::new(program)
        .args(args)
        .output()
        .is_ok_and(|out| out.status.success())
}

fn output(program: &str, args: &[&str]) -> String {
    let out = Command::new(program).args(args).output().unwrap();
    assert!(out.status.success(), "{program} {args:?}: {out:?}");
    String::from_utf8(out.stdout).unwrap()
}

impl Mounted {
    /// None, said aloud, where there is no such thing to be had.
    fn new(test: &str, kind: DriverKind, file_system: &str, options: &str) -> Option<Self> {
        let missing = |capability: &str, reason: &str| {
            let required = std::env::var("DBRANCH_TEST_REQUIRE").unwrap_or_default();
            assert!(
                !required.split(',').any(|name| name == capability),
                "{test} needs {capability}: {reason}"
            );
            let _ = writeln!(std::io::stderr(), "skipped: {test}: {reason}");
        };
        if !Uid::effective().is_root() {
            missing("root", "the user is not root");
            return None;
        }
        let folder = tempfile::tempdir().unwrap();
        let image = folder.path().join("image");
        File::create(&image).unwrap().set_len(3 << 30).unwrap();
        let (image, at) = (image.display().to_string(), folder.path().join("m"));
        fs::create_dir(&at).unwrap();
        let quiet = if file_system == "btrfs" { "-q" } else { "-qf" };
        let options = match file_system {
            // What is destroyed is cleaned up after each commit, which else come every 30 s.
            "btrfs" => format!("loop,commit=1,{options}"),
            _ => format!("loop,{options}"),
        };
        if !run(&format!("mkfs.{file_system}"), &[quiet, &image])
            || !run(
                "mount",
                &["-o", &options, &image, &at.display().to_string()],
            )
        {
            missing(file_system, "no such file system can be made and mounted");
            return None;
        }
        let owner = Owner {
            uid: Uid::effective().as_raw(),
            gid: Gid::effective().as_raw(),
        };
        let driver = crate::storage::open(Choice::Driver(kind), &at.join("pool"), owner);
        Some(Self {
            driver: Some(driver.unwrap()),
            at,
            _folder: folder,
        })
    }

    fn driver(&self) -> &dyn StorageDriver {
        self.driver.as_deref().unwrap()
    }

    fn pool(&self) -> Pool {
        let owner = Owner { uid: 0, gid: 0 };
        Pool::open(self.driver().pool(), owner).unwrap()
    }

    fn look(&self, survey: &Survey) -> Usages {
        let ids = self.driver().list().unwrap();
        survey.look(&self.pool(), &ids, true).unwrap()
    }

    fn sync(&self) {
        nix::unistd::syncfs(File::open(&self.at).unwrap()).unwrap();
    }

    fn volume(&self) -> (VolumeId, PathBuf) {
        let id = VolumeId::random();
        let path = self.driver().create_volume(&id).unwrap();
        (id, path)
    }

    fn clone_of(&self, from: &VolumeId) -> (VolumeId, PathBuf) {
        let to = VolumeId::random();
        let driver = self.driver();
        driver
            .clone_volume(from, &to, Omit::NOTHING, &|_, _| {})
            .unwrap();
        (to.clone(), driver.volume_path(&to))
    }

    /// Waits until a file written now has another time than one written before: older kernels
    /// count in ticks.
    fn tick(&self) {
        let probe = self.at.join("tick");
        let time = || {
            fs::write(&probe, "").unwrap();
            let meta = fs::metadata(&probe).unwrap();
            (meta.ctime(), meta.ctime_nsec())
        };
        let before = time();
        while time() == before {
            std::hint::spin_loop();
        }
    }
}

fn write_at(path: &Path, offset: u64, len: u64, byte: u8) {
    let file = File::options()
        .create(true)
        .truncate(false)
        .write(true)
        .open(path)
        .unwrap();
    let len = usize::try_from(len).unwrap();
    file.write_all_at(&vec![byte; len], offset).unwrap();
}

/// Does things to volumes, always the same ones.
struct Chaos {
    seed: u64,
    held: Vec<File>,
}

impl Chaos {
    fn below(&mut self, n: u64) -> u64 {
        self.seed = self
            .seed
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        (self.seed >> 33) % n
    }

    fn pick<T: Clone>(&mut self, all: &[T]) -> Option<T> {
        let n = u64::try_from(all.len()).unwrap();
        (n > 0).then(|| all[usize::try_from(self.below(n)).unwrap()].clone())
    }

    fn step(&mut self, mounted: &Mounted) {
        let driver = mounted.driver();
        let mut ids = driver.list().unwrap();
        ids.sort_by(|a, b| a.as_str().cmp(b.as_str()));
        let Some(id) = self.pick(&ids) else {
            mounted.volume();
            return;
        };
        let root = driver.volume_path(&id);
        let (mut files, mut folders) = (Vec::new(), vec![root.clone()]);
        let mut at = 0;
        while let Some(folder) = folders.get(at).cloned() {
            at += 1;
            for entry in fs::read_dir(folder).unwrap().flatten() {
                if entry.file_type().unwrap().is_dir() {
                    folders.push(entry.path());
                } else {
                    files.push(entry.path());
                }
            }
        }
        files.sort();
        folders.sort();
        let folder = self.pick(&folders).unwrap();
        let new = folder.join(format!("n{}", self.below(1 << 40)));
        let byte = u8::try_from(self.below(250)).unwrap() + 1;
        let what = self.below(20);
        let Some(file) = self.pick(&files).filter(|_| what > 3) else {
            return match what {
                0 => fs::create_dir(&new).unwrap(),
                1 => write_at(&new, 0, self.below(2000) + 1, byte),
                _ => write_at(&new, 0, self.below(3 * MIB) + 1, byte),
            };
        };
        let size = fs::metadata(&file).unwrap().len();
        let place = self.below(size + 1) / 8192 * 8192;
        match what {
            4..=7 => write_at(&file, place, 8192 * (self.below(4) + 1), byte),
            8 => write_at(&file, size, self.below(300_000), byte),
            9 => {
                let file = File::options().write(true).open(&file).unwrap();
                file.set_len(self.below(size + 1)).unwrap();
            }
            10 | 11 => {
                let flags = match what {
                    10 => FallocateFlags::FALLOC_FL_PUNCH_HOLE,
                    _ => FallocateFlags::empty(),
                } | FallocateFlags::FALLOC_FL_KEEP_SIZE;
                let file = File::options().write(true).open(&file).unwrap();
                let place = i64::try_from(place).unwrap();
                fallocate(&file, flags, place, 65536).unwrap();
            }
            12 => {
                self.held.push(File::open(&file).unwrap());
                fs::remove_file(&file).unwrap();
                if self.held.len() > 5 {
                    self.held.clear();
                }
            }
            13 => fs::rename(&file, &new).unwrap(),
            14 => {
                let _ = fs::hard_link(&file, &new);
            }
            15 => {
                let to = File::create_new(&new).unwrap();
                let from = File::open(&file).unwrap();
                crate::storage::files::ioctl::share(from.as_fd(), to.as_fd()).unwrap();
            }
            16 if folder != root => fs::remove_dir_all(&folder).unwrap(),
            17 | 18 if ids.len() < 8 => drop(mounted.clone_of(&id)),
            19 if ids.len() > 2 => {
                self.held.clear();
                driver.destroy(&id).unwrap();
            }
            _ => fs::write(&file, vec![byte; 100_000]).unwrap(),
        }
    }
}

/// Whatever is done in between: a look that builds on earlier ones sees what one sees that
/// reads everything, each volume for itself.
fn later_looks_see_what_a_first_one_sees(mounted: &Mounted, ways: Ways, rounds: usize) {
    let first = Ways {
        siblings: false,
        ..ways
    };
    let survey = Survey::with(ways);
    let mut chaos = Chaos {
        seed: 4,
        held: Vec::new(),
    };
    for round in 0..rounds {
        for step in 0..25 {
            chaos.step(mounted);
            // In the middle of a transaction, as often as not.
            if step % 10 == 0 {
                mounted.look(&survey);
                mounted.tick();
            }
        }
        mounted.sync();
        // Files that were deleted while open go a moment later.
        let start = Instant::now();
        loop {
            let (later, all_anew) = (mounted.look(&survey), mounted.look(&Survey::with(first)));
            if later == all_anew {
                break;
            }
            assert!(
                start.elapsed() < Duration::from_secs(10),
                "round {round}: {later:#?} {all_anew:#?}"
            );
        }
        mounted.tick();
    }
    assert!(mounted.driver().list().unwrap().len() > 2);
}

#[test]
fn later_looks_at_trees_see_what_a_first_one_sees() {
    let test = "later_looks_at_trees_see_what_a_first_one_sees";
    let Some(mounted) = Mounted::new(test, DriverKind::Btrfs, "btrfs", "noatime") else {
        return;
    };
    later_looks_see_what_a_first_one_sees(&mounted, Ways::default(), 40);
    // What moves to another place is found there.
    let survey = Survey::default();
    let before = mounted.look(&survey);
    let at = mounted.at.display().to_string();
    output("btrfs", &["balance", "start", "-d", &at]);
    let after = mounted.look(&survey);
    assert_eq!(after, mounted.look(&Survey::default()));
    assert_eq!(before, after);
}

#[test]
fn later_looks_at_files_see_what_a_first_one_sees() {
    let test = "later_looks_at_files_see_what_a_first_one_sees";
    for (kind, file_system) in [(DriverKind::Btrfs, "btrfs"), (DriverKind::Reflink, "xfs")] {
        let Some(mounted) = Mounted::new(test, kind, file_system, "noatime") else {
            continue;
        };
        let ways = Ways {
            trees: false,
            // Each file counts as settled, and so is remembered.
            settles: -1,
            ..Ways::default()
        };
        later_looks_see_what_a_first_one_sees(&mounted, ways, 20);
    }
}

/// A root, children that wrote, a grandchild; with extents that are used in part.
fn family(mounted: &Mounted) -> Vec<VolumeId> {
    let (root, path) = mounted.volume();
    let random: Vec<u8> = (0..40 * MIB)
        .map(|i| (i.wrapping_mul(0x9E37_79B9_7F4A_7C15) >> 56) as u8)
        .collect();
    fs::create_dir(path.join("base")).unwrap();
    fs::write(path.join("base/1"), &random).unwrap();
    fs::write(path.join("base/2"), vec![7; 20 << 20]).unwrap();
    fs::write(path.join("small"), "inside the metadata").unwrap();
    mounted.sync();
    // Of the first file's extents a part is no longer used.
    write_at(&path.join("base/1"), 3 * MIB, 2 * MIB, 9);
    mounted.sync();
    let mut all = vec![root.clone()];
    for n in 0..4_u64 {
        let (child, path) = mounted.clone_of(&root);
        write_at(&path.join("base/1"), (10 + 2 * n) * MIB, MIB, 3);
        write_at(&path.join("new"), 0, (n + 1) * MIB, 4);
        all.push(child);
        mounted.sync();
    }
    let (grandchild, path) = mounted.clone_of(&all[1]);
    fs::remove_file(path.join("base/2")).unwrap();
    all.push(grandchild);
    // The root goes on, and now holds little in common.
    fs::remove_file(path.join("new")).unwrap();
    write_at(
        &mounted.driver().volume_path(&root).join("base/1"),
        0,
        20 * MIB,
        5,
    );
    mounted.sync();
    all
}

/// Bytes of data that the file system says are in use; on btrfs without metadata.
fn used(mounted: &Mounted) -> u64 {
    mounted.sync();
    if mounted.driver().kind() != DriverKind::Btrfs {
        let space = mounted.driver().space().unwrap();
        return space.total_bytes - space.free_bytes;
    }
    let at = mounted.at.display().to_string();
    let told = output("btrfs", &["filesystem", "df", "--raw", &at]);
    let data = told.lines().find(|l| l.starts_with("Data")).unwrap();
    data.rsplit_once("used=").unwrap().1.trim().parse().unwrap()
}

/// What the file system may have for its own records in its free space on XFS: lists of inodes,
/// of free and of shared extents. On btrfs the data's sum is compared, and is exact.
fn tolerance(kind: DriverKind) -> u64 {
    if kind == DriverKind::Btrfs {
        0
    } else {
        MIB / 2
    }
}

#[test]
fn destroying_frees_what_was_said() {
    let test = "destroying_frees_what_was_said";
    for (kind, file_system, options) in [
        (DriverKind::Btrfs, "btrfs", "noatime"),
        (DriverKind::Btrfs, "btrfs", "compress=zstd"),
        (DriverKind::Reflink, "xfs", "noatime"),
    ] {
        let Some(mounted) = Mounted::new(test, kind, file_system, options) else {
            continue;
        };
        let all = family(&mounted);
        let survey = Survey::default();
        // The second, its grandchild, the root, the rest.
        for at in [1, 5, 0, 3, 2, 4] {
            let (before, said) = (used(&mounted), mounted.look(&survey));
            let said = said.volumes.iter().find(|v| v.id == all[at]).unwrap();
            mounted.driver().destroy(&all[at]).unwrap();
            // Both free in the background.
            let start = Instant::now();
            loop {
                let freed = before.saturating_sub(used(&mounted));
                if freed.abs_diff(said.freed_bytes) <= tolerance(kind) {
                    break;
                }
                assert!(
                    start.elapsed() < LIMIT / 4,
                    "{file_system} {options} {at}: {freed} freed, {said:?}"
                );
            }
            assert!(said.freed_bytes >= said.exclusive_bytes, "{said:?}");
        }
    }
}

#[test]
fn the_sum_of_all_shares_is_what_the_file_system_has_in_use() {
    let test = "the_sum_of_all_shares_is_what_the_file_system_has_in_use";
    let Some(mounted) = Mounted::new(test, DriverKind::Btrfs, "btrfs", "noatime") else {
        return;
    };
    let empty = used(&mounted);
    family(&mounted);
    let shares = mounted.look(&Survey::default()).shares.unwrap();
    let sum: u64 = shares.iter().map(|share| share.bytes).sum();
    assert_eq!(used(&mounted) - empty, sum);
}

#[test]
fn exclusive_bytes_are_those_that_btrfs_counts() {
    let test = "exclusive_bytes_are_those_that_btrfs_counts";
    let Some(mounted) = Mounted::new(test, DriverKind::Btrfs, "btrfs", "noatime") else {
        return;
    };
    family(&mounted);
    let mut ways = vec![mounted.look(&Survey::default())];
    ways.push(mounted.look(&Survey::with(Ways {
        trees: false,
        ..Ways::default()
    })));
    for usages in ways {
        for volume in &usages.volumes {
            let path = mounted.driver().volume_path(&volume.id);
            let path = path.display().to_string();
            let told = output("btrfs", &["filesystem", "du", "-s", "--raw", &path]);
            let numbers = told.lines().nth(1).unwrap().split_whitespace();
            let numbers: Vec<u64> = numbers.filter_map(|n| n.parse().ok()).collect();
            // It counts data inside the metadata among the volume's own.
            assert!(
                numbers[1].abs_diff(volume.exclusive_bytes) <= 4096,
                "{told}{volume:?}"
            );
            assert!(
                numbers[0].abs_diff(volume.logical_bytes) <= 4096,
                "{told}{volume:?}"
            );
        }
    }
}

#[test]
fn a_snapshot_that_somebody_keeps_holds_what_it_holds() {
    let test = "a_snapshot_that_somebody_keeps_holds_what_it_holds";
    let Some(mounted) = Mounted::new(test, DriverKind::Btrfs, "btrfs", "noatime") else {
        return;
    };
    let (id, path) = mounted.volume();
    write_at(&path.join("a"), 0, 8 * MIB, 1);
    mounted.sync();
    let survey = Survey::default();
    assert_eq!(mounted.look(&survey).volumes[0].freed_bytes, 8 * MIB);
    let kept = mounted.at.join("kept").display().to_string();
    let from = path.display().to_string();
    output("btrfs", &["subvolume", "snapshot", "-r", &from, &kept]);
    write_at(&path.join("b"), 0, MIB, 1);
    mounted.sync();
    let usages = mounted.look(&survey);
    assert_eq!(usages.volumes[0].freed_bytes, MIB);
    assert_eq!(
        usages.holders,
        [Holder::Volume(id.clone()), Holder::Other("kept".into())]
    );
    // And of what was cloned from one that is gone.
    let (clone, _) = mounted.clone_of(&id);
    mounted.driver().destroy(&id).unwrap();
    let usages = mounted.look(&survey);
    let by: HashMap<_, _> = usages
        .shares
        .iter()
        .flatten()
        .map(|share| (share.by.as_slice(), share.bytes))
        .collect();
    assert_eq!(by, [(&[0, 1][..], 8 * MIB), (&[0][..], MIB)].into());
    assert_eq!(usages.holders[0], Holder::Volume(clone));
    output("btrfs", &["subvolume", "delete", &kept]);
    assert_eq!(mounted.look(&survey).volumes[0].freed_bytes, 9 * MIB);
}
