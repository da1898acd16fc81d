//! What is ZFS's own: dependencies of clones, mounts, what others made, interrupted calls.

use std::collections::BTreeSet;

use nix::unistd::Gid;

use super::testing::{TestDataset, folder, zfs};
use super::*;
use crate::storage::{Choice, open};
use crate::types::Owner;

/// A pool with a dataset of its own, or nothing where there is no ZFS.
struct Stage {
    driver: Zfs,
    dataset: TestDataset,
    folder: tempfile::TempDir,
}

fn me() -> Owner {
    Owner {
        uid: Uid::effective().as_raw(),
        gid: Gid::effective().as_raw(),
    }
}

#[expect(clippy::print_stderr, reason = "a skipped test says so")]
fn stage(test: &str) -> Option<Stage> {
    if let Err(reason) = folder() {
        let required = std::env::var("DBRANCH_TEST_REQUIRE").unwrap_or_default();
        let is_required = required.split(',').any(|name| name == "zfs");
        assert!(!is_required, "{test} needs zfs: {reason}");
        eprintln!("skipped: {test}: {reason}");
        return None;
    }
    let folder = tempfile::tempdir().unwrap();
    let point = folder.path().canonicalize().unwrap().join("pool");
    let dataset = TestDataset::mounted_at(&point);
    let driver = Zfs::open(Pool::open(&point, me()).unwrap()).unwrap();
    Some(Stage {
        driver,
        dataset,
        folder,
    })
}

impl Stage {
    /// A volume with a file that says whose it is.
    fn create(&self) -> VolumeId {
        let id = VolumeId::random();
        let path = self.driver.create_volume(&id).unwrap();
        fs::write(path.join("who"), id.as_str()).unwrap();
        id
    }

    /// A clone that knows its parent and itself.
    fn clone(&self, from: &VolumeId) -> VolumeId {
        let to = VolumeId::random();
        let method = self
            .driver
            .clone_volume(from, &to, Omit::NOTHING, &|_, _| {})
            .unwrap();
        assert_eq!(method, CloneMethod::ZfsClone);
        let path = self.driver.volume_path(&to);
        assert_eq!(self.who(&to), from.as_str());
        fs::write(path.join("who"), to.as_str()).unwrap();
        to
    }

    fn who(&self, id: &VolumeId) -> String {
        fs::read_to_string(self.driver.volume_path(id).join("who")).unwrap()
    }

    fn name(&self, id: &VolumeId) -> String {
        self.driver.name_of(id.as_str())
    }

    /// What is in the pool: volumes and snapshots as ZFS lists them, and folders.
    #[track_caller]
    fn holds_only(&self, volumes: &[&VolumeId]) {
        let tree = self.dataset.tree();
        let names: BTreeSet<&str> = tree
            .iter()
            .filter(|n| !n.contains('@'))
            .map(String::as_str)
            .collect();
        let expected: BTreeSet<&str> = volumes.iter().map(|v| v.as_str()).collect();
        assert_eq!(names, expected, "{tree:?}");
        // A snapshot for each clone that still has an origin, and no other.
        let origins = zfs(&[
            "list",
            "-H",
            "-r",
            "-t",
            "filesystem",
            "-o",
            "origin",
            &self.dataset.name,
        ]);
        let origins = origins.lines().filter(|o| *o != "-").count();
        assert_eq!(tree.len() - names.len(), origins, "{tree:?}");
        let folders = fs::read_dir(self.driver.pool()).unwrap().count();
        assert_eq!(folders, volumes.len());
        for volume in volumes {
            assert_eq!(self.who(volume), volume.as_str());
        }
    }
}

#[test]
fn a_family_is_destroyed_in_any_order_and_leaves_nothing() {
    let Some(stage) = stage("a_family_is_destroyed_in_any_order_and_leaves_nothing") else {
        return;
    };
    // Each first, each last, and each before and after each of its relatives.
    for order in [
        [0, 1, 2, 3],
        [1, 2, 3, 0],
        [2, 3, 0, 1],
        [3, 0, 1, 2],
        [3, 2, 1, 0],
        [2, 1, 0, 3],
        [1, 0, 3, 2],
        [0, 3, 2, 1],
    ] {
        let parent = stage.create();
        let child = stage.clone(&parent);
        let grandchild = stage.clone(&child);
        let sibling = stage.clone(&parent);
        let family = [parent, child, grandchild, sibling];
        let mut left: Vec<&VolumeId> = family.iter().collect();
        stage.holds_only(&left);
        for which in order {
            stage.driver.destroy(&family[which]).unwrap();
            left.retain(|v| **v != family[which]);
            stage.holds_only(&left);
        }
    }
    assert!(stage.dataset.tree().is_empty());
}

#[test]
fn a_destroyed_parent_frees_what_its_children_do_not_share() {
    let Some(stage) = stage("a_destroyed_parent_frees_what_its_children_do_not_share") else {
        return;
    };
    let used = || -> u64 {
        stage.dataset.settle();
        zfs(&["get", "-Hp", "-o", "value", "used", &stage.dataset.name])
            .parse()
            .unwrap()
    };
    let parent = stage.create();
    let children = [stage.clone(&parent), stage.clone(&parent)];
    fs::write(
        stage.driver.volume_path(&parent).join("own"),
        noise(4 << 20),
    )
    .unwrap();
    let before = used();
    let own = stage.driver.usage(&parent).unwrap().exclusive_bytes;
    assert!((4 << 20..5 << 20).contains(&own), "{own}");
    stage.driver.destroy(&parent).unwrap();
    let freed = before - used();
    assert!(freed > 4 << 20, "{freed} of {own}");
    for child in &children {
        stage.driver.destroy(child).unwrap();
    }
    assert!(stage.dataset.tree().is_empty());
}

/// Bytes that do not compress, from a linear congruential generator.
fn noise(length: usize) -> Vec<u8> {
    let mut state = 1_u64;
    let next = |_| {
        state = state
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        u8::try_from(state >> 56).expect("eight bits are left")
    };
    (0..length).map(next).collect()
}

#[test]
fn what_a_child_alone_keeps_alive_counts_as_its_own() {
    let Some(stage) = stage("what_a_child_alone_keeps_alive_counts_as_its_own") else {
        return;
    };
    let parent = stage.create();
    let file = stage.driver.volume_path(&parent).join("file");
    fs::write(&file, noise(2 << 20)).unwrap();
    let child = stage.clone(&parent);
    fs::remove_file(&file).unwrap();
    stage.dataset.settle();
    let own = stage.driver.usage(&child).unwrap().exclusive_bytes;
    assert!((2 << 20..3 << 20).contains(&own), "{own}");
}

#[test]
fn what_others_made_stays_and_is_named() {
    let Some(stage) = stage("what_others_made_stays_and_is_named") else {
        return;
    };
    let parent = stage.create();
    let child = stage.clone(&parent);
    let daily = format!("{}@daily", stage.name(&parent));
    zfs(&["snapshot", &daily]);
    let refused = stage.driver.destroy(&parent).unwrap_err();
    assert!(matches!(refused, StorageError::Denied { .. }), "{refused}");
    assert!(refused.to_string().contains(&daily), "{refused}");
    stage.driver.destroy(&child).unwrap();
    assert_eq!(stage.who(&parent), parent.as_str());
    // A clone of our own snapshot, made by hand, in and beside the pool.
    let child = stage.clone(&parent);
    zfs(&["destroy", &daily]);
    let snapshot = dataset::snapshot_for(&stage.name(&parent), child.as_str());
    for foreign in [
        format!("{}/byhand", stage.dataset.name),
        format!("{}-byhand", stage.dataset.name),
    ] {
        zfs(&["clone", "-o", "mountpoint=none", &snapshot, &foreign]);
        stage.driver.destroy(&child).unwrap();
        let refused = stage.driver.destroy(&parent).unwrap_err();
        assert!(refused.to_string().contains(&foreign), "{refused}");
        assert_eq!(stage.driver.sweep().unwrap(), 0);
        zfs(&["destroy", &foreign]);
        if foreign.ends_with("/byhand") {
            // What it needed, a sweep takes now. The next one is of the same name.
            assert_eq!(stage.driver.sweep().unwrap(), 1);
            zfs(&["snapshot", &snapshot]);
        }
    }
    // A dataset inside of a volume inherits the mark, and is still nobody's of ours.
    let inner = format!("{}/inner", stage.name(&parent));
    zfs(&["create", &inner]);
    let refused = stage.driver.destroy(&parent).unwrap_err();
    assert!(refused.to_string().contains(&inner), "{refused}");
    zfs(&["destroy", &inner]);
    stage.driver.destroy(&parent).unwrap();
    assert!(stage.dataset.tree().is_empty());
}

#[test]
fn a_dataset_without_our_mark_is_neither_listed_nor_destroyed() {
    let Some(stage) = stage("a_dataset_without_our_mark_is_neither_listed_nor_destroyed") else {
        return;
    };
    let id = VolumeId::random();
    zfs(&["create", &stage.name(&id)]);
    fs::write(stage.driver.volume_path(&id).join("kept"), "").unwrap();
    assert_eq!(stage.driver.list().unwrap(), []);
    let refused = stage.driver.destroy(&id).unwrap_err();
    assert!(refused.to_string().contains(MARK), "{refused}");
    assert_eq!(stage.driver.sweep().unwrap(), 0);
    assert!(stage.driver.volume_path(&id).join("kept").exists());
    // A plain folder with files, as the driver `copy` makes them.
    let plain = VolumeId::random();
    fs::create_dir(stage.driver.volume_path(&plain)).unwrap();
    fs::write(stage.driver.volume_path(&plain).join("kept"), "").unwrap();
    assert!(stage.driver.destroy(&plain).is_err());
    let to = VolumeId::random();
    let refused = stage
        .driver
        .clone_volume(&plain, &to, Omit::NOTHING, &|_, _| {})
        .unwrap_err();
    assert!(
        matches!(refused, StorageError::Unsupported { .. }),
        "{refused}"
    );
    assert!(stage.driver.volume_path(&plain).join("kept").exists());
}

/// Each state that a kill between two calls of the program leaves.
#[test]
fn a_sweep_ends_what_a_killed_call_began() {
    let Some(stage) = stage("a_sweep_ends_what_a_killed_call_began") else {
        return;
    };
    let parent = stage.create();
    let child = stage.clone(&parent);
    // Cloning: snapshotted, not cloned.
    let gone = VolumeId::random();
    zfs(&[
        "snapshot",
        &dataset::snapshot_for(&stage.name(&parent), gone.as_str()),
    ]);
    // Probing, as a user.
    let probe = format!("{PROBE}{gone}a");
    let mark = format!("{MARK}={probe}");
    zfs(&["create", "-o", &mark, &stage.driver.name_of(&probe)]);
    // Cloned, not mounted.
    zfs(&["unmount", &stage.name(&child)]);
    // Destroyed, but for the folder it was mounted at.
    fs::create_dir(stage.driver.volume_path(&gone)).unwrap();
    assert_eq!(stage.driver.sweep().unwrap(), 3);
    stage.holds_only(&[&parent, &child]);
    // Destroying: promoted, then the parent destroyed, its origin not.
    zfs(&["promote", &stage.name(&child)]);
    stage.driver.destroy(&parent).unwrap();
    stage.holds_only(&[&child]);
    assert_eq!(stage.driver.sweep().unwrap(), 0);
    let grandchild = stage.clone(&child);
    stage.driver.destroy_leaf(grandchild.as_str()).unwrap();
    assert_eq!(stage.driver.sweep().unwrap(), 1);
    stage.holds_only(&[&child]);
}

#[test]
fn a_volume_that_is_not_mounted_is_mounted_and_never_cloned_as_empty() {
    let Some(stage) = stage("a_volume_that_is_not_mounted_is_mounted_and_never_cloned_as_empty")
    else {
        return;
    };
    let volume = stage.create();
    let name = stage.name(&volume);
    let path = stage.driver.volume_path(&volume);
    for leaves_a_folder in [true, false] {
        zfs(&["unmount", &name]);
        let _ = fs::remove_dir(&path);
        if leaves_a_folder {
            fs::create_dir(&path).unwrap();
        }
        let _ = stage.clone(&volume);
    }
    // What can't be mounted is said.
    zfs(&["unmount", &name]);
    zfs(&["set", "mountpoint=none", &name]);
    let refused = stage.driver.make_reachable(&volume).unwrap_err();
    assert!(refused.to_string().contains("mount"), "{refused}");
    let to = VolumeId::random();
    let refused = stage
        .driver
        .clone_volume(&volume, &to, Omit::NOTHING, &|_, _| {});
    assert!(refused.is_err());
    zfs(&["inherit", "mountpoint", &name]);
    stage.driver.make_reachable(&volume).unwrap();
    assert_eq!(stage.who(&volume), volume.as_str());
    // Of what does not exist, the server's start has more to say.
    stage.driver.make_reachable(&to).unwrap();
}

#[test]
fn a_pool_that_is_not_mounted_is_no_place_for_another_driver() {
    let Some(stage) = stage("a_pool_that_is_not_mounted_is_no_place_for_another_driver") else {
        return;
    };
    zfs(&["unmount", &stage.dataset.name]);
    let point = stage.folder.path().join("pool");
    for choice in [Choice::Auto, Choice::Driver(DriverKind::Zfs)] {
        let refused = open(choice, &point, me()).unwrap_err();
        let hint = refused.hint().unwrap_or_default();
        assert!(hint.contains("zfs mount -a"), "{refused}: {hint}");
    }
    zfs(&["mount", &stage.dataset.name]);
    let driver = open(Choice::Auto, &point, me()).unwrap();
    assert_eq!((driver.kind(), driver.advice()), (DriverKind::Zfs, None));
}

#[test]
fn a_folder_inside_a_dataset_is_refused_with_the_command_that_helps() {
    let Some(stage) = stage("a_folder_inside_a_dataset_is_refused_with_the_command_that_helps")
    else {
        return;
    };
    let inside = stage.driver.pool().join("sub/pool");
    let refused = open(Choice::Driver(DriverKind::Zfs), &inside, me()).unwrap_err();
    let command = format!("zfs create -o mountpoint={}", inside.display());
    assert!(refused.to_string().contains(&command), "{refused}");
    let copy = open(Choice::Auto, &inside, me()).unwrap();
    assert_eq!(copy.kind(), DriverKind::Copy);
    assert!(copy.advice().unwrap().contains(&command));
    // And it does help.
    let command = refused.to_string();
    let (_, command) = command.split_once("zfs create").unwrap();
    let args: Vec<&str> = std::iter::once("create")
        .chain(command.split_whitespace())
        .collect();
    zfs(&args);
    let driver = open(Choice::Auto, &inside, me()).unwrap();
    assert_eq!(driver.kind(), DriverKind::Zfs);
}

#[test]
fn a_full_pool_refuses_a_clone_and_leaves_no_trace() {
    let Some(stage) = stage("a_full_pool_refuses_a_clone_and_leaves_no_trace") else {
        return;
    };
    let parent = stage.create();
    zfs(&["set", "quota=8M", &stage.dataset.name]);
    let path = stage.driver.volume_path(&parent).join("filler");
    let mut filler = fs::File::create(&path).unwrap();
    let block = noise(1 << 20);
    let full = (0..64)
        .find_map(|_| io::Write::write_all(&mut filler, &block).err())
        .expect("a quota holds");
    assert_eq!(full.kind(), ErrorKind::QuotaExceeded, "{full}");
    drop(filler);
    stage.dataset.settle();
    let to = VolumeId::random();
    let refused = stage
        .driver
        .clone_volume(&parent, &to, Omit::NOTHING, &|_, _| {})
        .unwrap_err();
    assert!(matches!(refused, StorageError::NoRoom { .. }), "{refused}");
    stage.holds_only(&[&parent]);
    // What is full can still be emptied.
    fs::remove_file(&path).unwrap();
    stage.dataset.settle();
    let child = stage.clone(&parent);
    stage.driver.destroy(&parent).unwrap();
    stage.holds_only(&[&child]);
}

#[test]
fn a_volume_in_use_is_not_destroyed_and_stays_usable() {
    let Some(mut stage) = stage("a_volume_in_use_is_not_destroyed_and_stays_usable") else {
        return;
    };
    stage.driver.busy_limit = Duration::from_millis(200);
    let volume = stage.create();
    let held = fs::File::open(stage.driver.volume_path(&volume).join("who")).unwrap();
    let refused = stage.driver.destroy(&volume).unwrap_err();
    assert!(refused.hint().unwrap().contains("fuser"), "{refused}");
    drop(held);
    stage.holds_only(&[&volume]);
    stage.driver.busy_limit = BUSY_LIMIT;
    stage.driver.destroy(&volume).unwrap();
    stage.holds_only(&[]);
}
