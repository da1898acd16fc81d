use super::*;
use crate::storage::{copy::Copy, reflink::Reflink};
use crate::types::Owner;
use nix::unistd::{Gid, Uid};

fn pool(folder: &Path) -> Pool {
    let owner = Owner {
        uid: Uid::effective().as_raw(),
        gid: Gid::effective().as_raw(),
    };
    Pool::open(folder, owner).unwrap()
}

fn driver(folder: &Path) -> FileByFile<Copy> {
    crate::storage::copy::open(pool(folder), Some("the file system is ext4".into()))
}

/// A folder where blocks can be shared, if the tests were given one.
fn sharing_folder(test: &str) -> Option<tempfile::TempDir> {
    for (capability, var) in [("xfs", "DBRANCH_TEST_XFS"), ("btrfs", "DBRANCH_TEST_BTRFS")] {
        if let Some(parent) = std::env::var_os(var) {
            return Some(tempfile::tempdir_in(parent).unwrap());
        }
        crate::storage::contract::capability_missing(
            test,
            capability,
            &format!("{var} names no folder"),
        );
    }
    None
}

#[test]
fn too_little_room_is_noticed_before_anything_is_made() {
    let folder = tempfile::tempdir().unwrap();
    let mut driver = driver(folder.path());
    let (from, to) = (VolumeId::random(), VolumeId::random());
    fs::write(driver.create_volume(&from).unwrap().join("x"), "x").unwrap();
    driver.margin_bytes = u64::MAX / 2;
    let cloned = driver.clone_volume(&from, &to, Omit::NOTHING, &|_, _| {});
    let asked = driver.must_have_room(&from, Omit::NOTHING);
    for error in [cloned.unwrap_err(), asked.unwrap_err()] {
        assert!(matches!(error, StorageError::NoRoom { .. }), "{error}");
    }
    assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1);
}

#[test]
fn a_clone_that_fails_half_way_leaves_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let driver = driver(folder.path());
    let (from, to) = (VolumeId::random(), VolumeId::random());
    let volume = driver.create_volume(&from).unwrap();
    for n in 0..50 {
        let sub = volume.join(n.to_string());
        fs::create_dir(&sub).unwrap();
        fs::write(sub.join("file"), "data").unwrap();
    }
    // The half-made clone loses its name, as if the disk had failed: nothing more can be put in.
    let partial = with_ending(&driver.volume_path(&to), PARTIAL);
    let result = driver.clone_volume(&from, &to, Omit::NOTHING, &|_, _| {
        let _ = fs::remove_dir_all(&partial);
    });
    assert!(result.is_err());
    assert_eq!(driver.list().unwrap(), [from]);
    assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1);
}

#[test]
fn what_interrupted_calls_left_is_no_volume_and_is_swept() {
    let folder = tempfile::tempdir().unwrap();
    let driver = driver(folder.path());
    let kept = VolumeId::random();
    driver.create_volume(&kept).unwrap();
    for name in ["abc.partial/data", "abd.doomed/data", "mine.backup"] {
        fs::create_dir_all(folder.path().join(name)).unwrap();
    }
    assert_eq!(driver.list().unwrap(), [kept]);
    assert_eq!(driver.sweep().unwrap(), 2);
    assert_eq!(driver.sweep().unwrap(), 0);
    assert!(folder.path().join("mine.backup").exists());
}

#[test]
fn trying_leaves_nothing_in_the_pool() {
    let folder = tempfile::tempdir().unwrap();
    why_not_shared(&pool(folder.path())).unwrap();
    assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 0);
}

#[test]
fn copies_say_what_they_cost() {
    let folder = tempfile::tempdir().unwrap();
    let advice = driver(folder.path()).advice().unwrap();
    assert!(
        advice.contains("full copy") && advice.contains("ext4"),
        "{advice}"
    );
}

#[test]
fn a_copy_of_choice_where_blocks_can_be_shared_says_so_and_shares_none() {
    let test = "a_copy_of_choice_where_blocks_can_be_shared_says_so_and_shares_none";
    let Some(folder) = sharing_folder(test) else {
        return;
    };
    let driver = crate::storage::copy::open(pool(folder.path()), None);
    let advice = driver.advice().unwrap();
    assert!(
        advice.contains("full copy") && advice.contains("`auto`"),
        "{advice}"
    );
    let (from, to) = (VolumeId::random(), VolumeId::random());
    let file = driver.create_volume(&from).unwrap().join("file");
    fs::write(&file, vec![1; 4 << 20]).unwrap();
    driver
        .clone_volume(&from, &to, Omit::NOTHING, &|_, _| {})
        .unwrap();
    let usage = driver.usage(&to).unwrap();
    assert_eq!(usage.exclusive_bytes, usage.logical_bytes);
}

/// The driver made from volumes that shared blocks under the name `copy` goes on with them.
#[test]
fn volumes_of_one_driver_are_good_for_the_other() {
    let test = "volumes_of_one_driver_are_good_for_the_other";
    let Some(folder) = sharing_folder(test) else {
        return;
    };
    let reflink = crate::storage::reflink::open(pool(folder.path()), None).unwrap();
    let copy = crate::storage::copy::open(pool(folder.path()), None);
    let ids = [(); 3].map(|()| VolumeId::random());
    let file = reflink.create_volume(&ids[0]).unwrap().join("file");
    fs::write(file, vec![1; 1 << 20]).unwrap();
    let drivers: [&dyn StorageDriver; 2] = [&reflink, &copy];
    for (n, driver) in drivers.iter().enumerate() {
        driver
            .clone_volume(&ids[n], &ids[n + 1], Omit::NOTHING, &|_, _| {})
            .unwrap();
    }
    // Both tell the truth of what the other made.
    let shared = copy.usage(&ids[1]).unwrap();
    assert!(shared.exclusive_bytes < shared.logical_bytes, "{shared:?}");
    assert_eq!(reflink.usage(&ids[1]).unwrap(), shared);
    for id in &ids {
        copy.destroy(id).unwrap();
    }
    assert!(reflink.list().unwrap().is_empty());
}

/// btrfs shares no blocks between a file that is written in place and one that isn't.
#[cfg(target_os = "linux")]
#[test]
fn files_written_in_place_are_shared_too() {
    let test = "files_written_in_place_are_shared_too";
    let Some(parent) = std::env::var_os("DBRANCH_TEST_BTRFS") else {
        let reason = "DBRANCH_TEST_BTRFS names no folder";
        return crate::storage::contract::capability_missing(test, "btrfs", reason);
    };
    let folder = tempfile::tempdir_in(parent).unwrap();
    let driver: FileByFile<Reflink> =
        crate::storage::reflink::open(pool(folder.path()), None).unwrap();
    let (from, to) = (VolumeId::random(), VolumeId::random());
    let volume = driver.create_volume(&from).unwrap();
    fs::write(volume.join("usual"), vec![1; 1 << 20]).unwrap();
    let in_place = volume.join("in-place");
    let file = File::create(&in_place).unwrap();
    let set = std::process::Command::new("chattr")
        .arg("+C")
        .arg(&in_place)
        .status();
    assert!(set.is_ok_and(|s| s.success()), "chattr sets it");
    (&file).write_all(&vec![2; 1 << 20]).unwrap();
    let method = driver
        .clone_volume(&from, &to, Omit::NOTHING, &|_, _| {})
        .unwrap();
    let CloneMethod::Reflink {
        files,
        shared_bytes,
        written_bytes,
    } = method
    else {
        panic!("{method}")
    };
    assert_eq!((files, written_bytes), (2, 0));
    assert!(shared_bytes >= 2 << 20, "{shared_bytes}");
    assert_eq!(
        fs::read(driver.volume_path(&to).join("in-place")).unwrap(),
        vec![2; 1 << 20]
    );
}

/// A small file system of its own, gone with it.
#[cfg(target_os = "linux")]
struct SmallXfs {
    folder: tempfile::TempDir,
}

#[cfg(target_os = "linux")]
impl SmallXfs {
    /// The smallest that mkfs.xfs makes; some 220 MB of it are free.
    fn mount(test: &str) -> Option<Self> {
        use crate::storage::contract::capability_missing;
        if !Uid::effective().is_root() {
            capability_missing(test, "root", "only root can mount");
            return None;
        }
        let folder = tempfile::tempdir().unwrap();
        let image = folder.path().join("image");
        File::create(&image).unwrap().set_len(300 << 20).unwrap();
        let script = "PATH=$PATH:/usr/sbin:/sbin; mkfs.xfs -q -m reflink=1 image && mkdir at && mount -o loop image at";
        let mounted = std::process::Command::new("sh")
            .args(["-c", script])
            .current_dir(folder.path())
            .output()
            .unwrap();
        if !mounted.status.success() {
            let why = String::from_utf8_lossy(&mounted.stderr);
            capability_missing(test, "xfs", &format!("it can't be mounted: {why}"));
            return None;
        }
        Some(Self { folder })
    }

    fn path(&self) -> PathBuf {
        self.folder.path().join("at")
    }

    fn filler(&self) -> PathBuf {
        self.path().join("filler")
    }

    /// Lets one file grow over all the room that is left.
    fn fill(&self) {
        let mut options = File::options();
        let file = options
            .create(true)
            .append(true)
            .open(self.filler())
            .unwrap();
        let mut at = i64::try_from(file.metadata().unwrap().len()).unwrap();
        let mut step = 64 << 20;
        while step >= 4096 {
            match nix::fcntl::posix_fallocate(&file, at, step) {
                Ok(()) => at += step,
                Err(nix::errno::Errno::ENOSPC) => step /= 2,
                Err(e) => panic!("{e}"),
            }
        }
    }
}

#[cfg(target_os = "linux")]
impl Drop for SmallXfs {
    fn drop(&mut self) {
        let unmounted = std::process::Command::new("umount")
            .arg(self.path())
            .status();
        assert!(
            unmounted.is_ok_and(|s| s.success()) || std::thread::panicking(),
            "nothing keeps it busy"
        );
    }
}

#[cfg(target_os = "linux")]
#[test]
fn a_disk_that_fills_up_in_the_middle_fails_the_clone_and_nothing_else() {
    let test = "a_disk_that_fills_up_in_the_middle_fails_the_clone_and_nothing_else";
    let Some(disk) = SmallXfs::mount(test) else {
        return;
    };
    let at = disk.path().join("pool");
    let driver = crate::storage::reflink::open(pool(&at), None).unwrap();
    let ids = [(); 3].map(|()| VolumeId::random());
    let volume = driver.create_volume(&ids[0]).unwrap();
    for n in 0..4000 {
        fs::write(volume.join(n.to_string()), vec![1; 8192]).unwrap();
    }
    let clone = |to: &VolumeId, progress: Progress<'_>| {
        driver.clone_volume(&ids[0], to, Omit::NOTHING, progress)
    };
    clone(&ids[1], &|_, _| {}).unwrap();

    let once = std::sync::Once::new();
    let error = clone(&ids[2], &|_, _| once.call_once(|| disk.fill())).unwrap_err();
    assert!(matches!(error, StorageError::Full { .. }), "{error}");
    assert!(error.to_string().starts_with("no room left in "), "{error}");
    assert!(error.hint().is_some());
    let volumes = || fs::read_dir(&at).unwrap().count();
    assert_eq!(volumes(), 2, "nothing half made is left");
    assert_eq!(driver.usage(&ids[1]).unwrap().logical_bytes, 4000 * 8192);

    // What was given back is taken too: not a block is free. Still a branch can be deleted,
    // which needs the driver to open.
    disk.fill();
    let refused = clone(&ids[2], &|_, _| {}).unwrap_err();
    assert!(matches!(refused, StorageError::NoRoom { .. }), "{refused}");
    let reopened = crate::storage::reflink::reopen(pool(&at));
    reopened.destroy(&ids[1]).unwrap();
    assert_eq!(volumes(), 1);

    fs::remove_file(disk.filler()).unwrap();
    clone(&ids[2], &|_, _| {}).unwrap();
    assert_eq!(volumes(), 2);
}

#[cfg(target_os = "linux")]
#[test]
fn a_pool_mounted_read_only_says_so_and_is_as_before_afterwards() {
    let test = "a_pool_mounted_read_only_says_so_and_is_as_before_afterwards";
    let Some(disk) = SmallXfs::mount(test) else {
        return;
    };
    let at = disk.path().join("pool");
    let driver = crate::storage::reflink::open(pool(&at), None).unwrap();
    let (from, to) = (VolumeId::random(), VolumeId::random());
    fs::write(driver.create_volume(&from).unwrap().join("x"), "x").unwrap();
    let remount = |how: &str| {
        let done = std::process::Command::new("mount")
            .args(["-o", how])
            .arg(disk.path())
            .status();
        assert!(done.is_ok_and(|s| s.success()), "root remounts");
    };
    remount("remount,ro");
    let driver = crate::storage::reflink::reopen(pool(&at));
    let clone = || driver.clone_volume(&from, &to, Omit::NOTHING, &|_, _| {});
    for error in [clone().unwrap_err(), driver.destroy(&from).unwrap_err()] {
        assert!(matches!(error, StorageError::ReadOnly { .. }), "{error}");
        let hint = error.hint().unwrap();
        assert!(hint.contains("mount -o remount,rw"), "{hint}");
    }
    assert_eq!(driver.list().unwrap(), std::slice::from_ref(&from));
    remount("remount,rw");
    clone().unwrap();
    driver.destroy(&from).unwrap();
    assert_eq!(driver.list().unwrap(), [to]);
}
