//! What every driver must do, run over each of them.

use std::fs;
use std::io::Write;
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use nix::unistd::{Gid, Uid};

#[cfg(target_os = "linux")]
use super::zfs::testing as zfs_testing;
use super::*;
use crate::types::Owner;

const NO_PROGRESS: Progress<'static> = &|_, _| {};

fn me() -> Owner {
    Owner {
        uid: Uid::effective().as_raw(),
        gid: Gid::effective().as_raw(),
    }
}

/// A pool in a folder of its own, gone with it.
struct Bench {
    driver: Arc<dyn StorageDriver>,
    #[cfg(target_os = "linux")]
    dataset: Option<zfs_testing::TestDataset>,
    folder: tempfile::TempDir,
}

impl Drop for Bench {
    fn drop(&mut self) {
        for id in self.driver.list().unwrap_or_default() {
            let _ = self.driver.destroy(&id);
        }
    }
}

pub(super) fn capability_missing(test: &str, capability: &str, reason: &str) {
    let required = std::env::var("DBRANCH_TEST_REQUIRE").unwrap_or_default();
    assert!(
        !required.split(',').any(|name| name == capability),
        "{test} needs {capability}: {reason}"
    );
    let _ = writeln!(std::io::stderr(), "skipped: {test}: {reason}");
}

/// The file systems of the tests: capability, variable that names a folder there, drivers.
const FILE_SYSTEMS: [(&str, &str, &[DriverKind]); 2] = [
    (
        "btrfs",
        "DBRANCH_TEST_BTRFS",
        &[DriverKind::Btrfs, DriverKind::Reflink, DriverKind::Copy],
    ),
    (
        "xfs",
        "DBRANCH_TEST_XFS",
        &[DriverKind::Reflink, DriverKind::Copy],
    ),
];

/// The folder on a file system of [`FILE_SYSTEMS`], if there is one.
fn folder_on(test: &str, capability: &str) -> Option<PathBuf> {
    let (_, var, _) = FILE_SYSTEMS.iter().find(|f| f.0 == capability)?;
    let folder = std::env::var_os(var).map(PathBuf::from);
    if folder.is_none() {
        capability_missing(test, capability, &format!("{var} names no folder"));
    }
    folder
}

fn bench(kind: DriverKind, parent: Option<&Path>) -> Bench {
    let folder = match parent {
        Some(parent) => tempfile::tempdir_in(parent).unwrap(),
        None => tempfile::tempdir().unwrap(),
    };
    let pool = folder.path().join("deep/pool");
    #[cfg(target_os = "linux")]
    let dataset = (kind == DriverKind::Zfs).then(|| zfs_testing::TestDataset::mounted_at(&pool));
    let driver = open(Choice::Driver(kind), &pool, me()).unwrap();
    Bench {
        driver,
        #[cfg(target_os = "linux")]
        dataset,
        folder,
    }
}

/// Runs a check over all drivers: `copy` always, the others where their file systems are.
fn each(test: &str, check: impl Fn(&Bench)) {
    check(&bench(DriverKind::Copy, None));
    for (capability, _, drivers) in FILE_SYSTEMS {
        if let Some(folder) = folder_on(test, capability) {
            for kind in drivers {
                check(&bench(*kind, Some(&folder)));
            }
        }
    }
    #[cfg(target_os = "linux")]
    match zfs_testing::folder() {
        Ok(_) => check(&bench(DriverKind::Zfs, None)),
        Err(reason) => capability_missing(test, "zfs", &reason),
    }
}

/// Has all that was written counted by the file system.
fn settle(bench: &Bench) {
    nix::unistd::sync();
    #[cfg(target_os = "linux")]
    if let Some(dataset) = &bench.dataset {
        dataset.settle();
    }
}

/// A volume with a bit of everything, and its id.
fn filled(bench: &Bench) -> (VolumeId, PathBuf) {
    let id = VolumeId::random();
    let path = bench.driver.create_volume(&id).unwrap();
    fs::create_dir_all(path.join("data/base/1")).unwrap();
    fs::create_dir_all(path.join("data/pg_wal")).unwrap();
    fs::write(path.join("data/base/1/1259"), vec![7; 3 << 20]).unwrap();
    fs::write(path.join("data/base/1/empty"), "").unwrap();
    fs::write(
        path.join("data/pg_wal/000000010000000000000001"),
        vec![1; 100_000],
    )
    .unwrap();
    fs::write(path.join("data/PG_VERSION"), "15\n").unwrap();
    fs::set_permissions(path.join("data"), fs::Permissions::from_mode(0o750)).unwrap();
    symlink("PG_VERSION", path.join("data/link")).unwrap();
    (id, path)
}

fn clone(bench: &Bench, from: &VolumeId, omit: Omit) -> (VolumeId, PathBuf, CloneMethod) {
    let to = VolumeId::random();
    let method = bench
        .driver
        .clone_volume(from, &to, omit, NO_PROGRESS)
        .unwrap();
    let path = bench.driver.volume_path(&to);
    (to, path, method)
}

#[test]
fn a_new_volume_is_empty_and_private() {
    each("a_new_volume_is_empty_and_private", |bench| {
        let id = VolumeId::random();
        let path = bench.driver.create_volume(&id).unwrap();
        assert_eq!(path, bench.driver.volume_path(&id));
        assert_eq!(fs::read_dir(&path).unwrap().count(), 0);
        assert_eq!(fs::metadata(&path).unwrap().mode() & 0o7777, 0o700);
        let again = bench.driver.create_volume(&id).unwrap_err();
        assert!(matches!(again, StorageError::Exists { .. }), "{again}");
    });
}

#[test]
fn a_clone_has_everything_and_lives_its_own_life() {
    each("a_clone_has_everything_and_lives_its_own_life", |bench| {
        let (from, source) = filled(bench);
        let (to, made, method) = clone(bench, &from, Omit::NOTHING);
        match bench.driver.kind() {
            DriverKind::Btrfs => assert_eq!(method, CloneMethod::BtrfsSnapshot),
            DriverKind::Zfs => assert_eq!(method, CloneMethod::ZfsClone),
            DriverKind::Reflink => {
                let CloneMethod::Reflink {
                    files,
                    shared_bytes,
                    written_bytes: 0,
                } = method
                else {
                    panic!("{method}")
                };
                assert_eq!(files, 4);
                assert!(shared_bytes >= 3 << 20, "{method}");
            }
            DriverKind::Copy => {
                assert!(matches!(method, CloneMethod::FullCopy { .. }), "{method}");
            }
        }
        assert_eq!(
            fs::read(made.join("data/base/1/1259")).unwrap(),
            vec![7; 3 << 20]
        );
        assert_eq!(fs::read(made.join("data/base/1/empty")).unwrap(), b"");
        assert_eq!(
            fs::read_link(made.join("data/link")).unwrap(),
            Path::new("PG_VERSION")
        );
        assert_eq!(
            fs::metadata(made.join("data")).unwrap().mode() & 0o7777,
            0o750
        );
        assert_eq!(
            fs::metadata(made.join("data/PG_VERSION"))
                .unwrap()
                .modified()
                .unwrap(),
            fs::metadata(source.join("data/PG_VERSION"))
                .unwrap()
                .modified()
                .unwrap()
        );
        fs::write(made.join("data/PG_VERSION"), "16\n").unwrap();
        fs::write(source.join("data/new"), "later").unwrap();
        assert_eq!(fs::read(source.join("data/PG_VERSION")).unwrap(), b"15\n");
        assert!(!made.join("data/new").exists());
        bench.driver.destroy(&from).unwrap();
        assert_eq!(
            fs::read(made.join("data/base/1/1259")).unwrap(),
            vec![7; 3 << 20]
        );
        // A clone of a clone is as good.
        let (_, grandchild, _) = clone(bench, &to, Omit::NOTHING);
        assert_eq!(
            fs::read(grandchild.join("data/PG_VERSION")).unwrap(),
            b"16\n"
        );
    });
}

#[test]
fn a_file_by_file_clone_omits_and_catches_up() {
    each("a_file_by_file_clone_omits_and_catches_up", |bench| {
        let (from, source) = filled(bench);
        let wal = Path::new("data/pg_wal");
        let (to, made, _) = clone(
            bench,
            &from,
            Omit(|path| path.starts_with("data/pg_wal/") && path != Path::new("data/pg_wal")),
        );
        if bench.driver.consistency() == Consistency::Atomic {
            assert!(made.join("data/pg_wal/000000010000000000000001").exists());
            bench.driver.catch_up(&from, &to, wal).unwrap();
            return;
        }
        assert_eq!(fs::read_dir(made.join(wal)).unwrap().count(), 0);
        fs::write(source.join(wal).join("2"), vec![2; 70_000]).unwrap();
        bench.driver.catch_up(&from, &to, wal).unwrap();
        assert_eq!(fs::read_dir(made.join(wal)).unwrap().count(), 2);
        // One file, large or small, takes the place of what was there.
        for (name, content) in [
            ("data/pg_wal/2", vec![3; 80_000]),
            ("data/PG_VERSION", b"14\n".to_vec()),
        ] {
            fs::write(source.join(name), &content).unwrap();
            bench.driver.catch_up(&from, &to, Path::new(name)).unwrap();
            assert_eq!(fs::read(made.join(name)).unwrap(), content);
        }
        assert_eq!(fs::read_dir(made.join(wal)).unwrap().count(), 2);
        for bad in ["data/gone", "../x", "/etc/passwd", ""] {
            assert!(
                bench.driver.catch_up(&from, &to, Path::new(bad)).is_err(),
                "{bad}"
            );
        }
    });
}

#[test]
fn progress_reaches_its_end_and_never_goes_beyond() {
    each("progress_reaches_its_end_and_never_goes_beyond", |bench| {
        let (from, _) = filled(bench);
        let last = AtomicU64::new(0);
        let progress = |done: u64, all: u64| {
            assert!(done <= all);
            last.fetch_max(done, Ordering::Relaxed);
        };
        let to = VolumeId::random();
        let method = bench
            .driver
            .clone_volume(&from, &to, Omit::NOTHING, &progress)
            .unwrap();
        let bytes = match method {
            CloneMethod::BtrfsSnapshot | CloneMethod::ZfsClone => return,
            CloneMethod::FullCopy { bytes } => bytes,
            CloneMethod::Reflink { shared_bytes, .. } => shared_bytes,
        };
        assert_eq!(last.into_inner(), bytes);
    });
}

#[test]
fn a_clone_from_nothing_or_onto_something_is_refused() {
    each(
        "a_clone_from_nothing_or_onto_something_is_refused",
        |bench| {
            let (from, _) = filled(bench);
            let other = VolumeId::random();
            let missing = bench
                .driver
                .clone_volume(&other, &from, Omit::NOTHING, NO_PROGRESS);
            assert!(
                matches!(missing, Err(StorageError::Missing { .. })),
                "{missing:?}"
            );
            let exists = bench
                .driver
                .clone_volume(&from, &from, Omit::NOTHING, NO_PROGRESS);
            assert!(
                matches!(exists, Err(StorageError::Exists { .. })),
                "{exists:?}"
            );
            assert_eq!(bench.driver.list().unwrap(), [from]);
        },
    );
}

#[test]
fn destroying_removes_all_and_may_be_repeated() {
    each("destroying_removes_all_and_may_be_repeated", |bench| {
        let (id, path) = filled(bench);
        assert_eq!(bench.driver.list().unwrap(), std::slice::from_ref(&id));
        bench.driver.destroy(&id).unwrap();
        bench.driver.destroy(&id).unwrap();
        assert!(!path.exists());
        assert!(bench.driver.list().unwrap().is_empty());
        assert_eq!(fs::read_dir(bench.driver.pool()).unwrap().count(), 0);
    });
}

#[test]
fn a_link_in_the_pool_is_neither_listed_nor_followed() {
    each(
        "a_link_in_the_pool_is_neither_listed_nor_followed",
        |bench| {
            let outside = bench.folder.path().join("outside");
            fs::create_dir(&outside).unwrap();
            fs::write(outside.join("kept"), "").unwrap();
            let id = VolumeId::random();
            symlink(&outside, bench.driver.volume_path(&id)).unwrap();
            assert!(bench.driver.list().unwrap().is_empty());
            let denied = bench.driver.destroy(&id).unwrap_err();
            assert!(matches!(denied, StorageError::Denied { .. }), "{denied}");
            assert!(outside.join("kept").exists());
        },
    );
}

#[test]
fn usage_tells_shared_from_exclusive() {
    each("usage_tells_shared_from_exclusive", |bench| {
        let (from, source) = filled(bench);
        settle(bench);
        let alone = bench.driver.usage(&from).unwrap();
        assert!(alone.logical_bytes >= 3 << 20, "{alone:?}");
        assert!(alone.exclusive_bytes >= 3 << 20, "{alone:?}");
        let (to, _, _) = clone(bench, &from, Omit::NOTHING);
        let shared = bench.driver.usage(&to).unwrap();
        assert!(shared.logical_bytes >= 3 << 20, "{shared:?}");
        if bench.driver.shares_blocks() {
            assert!(shared.exclusive_bytes < 64 << 10, "{shared:?}");
            fs::write(source.join("data/own"), vec![9; 1 << 20]).unwrap();
            settle(bench);
            let own = bench.driver.usage(&from).unwrap().exclusive_bytes;
            assert!((1 << 20..2 << 20).contains(&own), "{own}");
        } else {
            // But for what btrfs keeps in its metadata.
            let counted_elsewhere = shared.logical_bytes - shared.exclusive_bytes;
            assert!(counted_elsewhere < 64 << 10, "{shared:?}");
        }
        assert!(bench.driver.usage(&VolumeId::random()).is_err());
        let space = bench.driver.space().unwrap();
        assert!(0 < space.free_bytes && space.free_bytes <= space.total_bytes);
    });
}

#[test]
fn auto_takes_the_best_that_works_and_says_why_where_nothing_does() {
    let test = "auto_takes_the_best_that_works_and_says_why_where_nothing_does";
    let folder = tempfile::tempdir().unwrap();
    let driver = open(Choice::Auto, folder.path(), me()).unwrap();
    if driver.kind() == DriverKind::Copy {
        assert!(driver.advice().unwrap().contains("full copy"));
        for kind in [DriverKind::Btrfs, DriverKind::Reflink] {
            let error = open(Choice::Driver(kind), folder.path(), me()).unwrap_err();
            assert!(matches!(error, StorageError::Unsupported { .. }), "{error}");
            assert!(error.hint().is_some());
        }
    }
    for (capability, _, drivers) in FILE_SYSTEMS {
        let Some(parent) = folder_on(test, capability) else {
            continue;
        };
        let folder = tempfile::tempdir_in(parent).unwrap();
        let driver = open(Choice::Auto, folder.path(), me()).unwrap();
        assert_eq!(driver.kind(), drivers[0], "on {capability}");
        assert_eq!(driver.advice(), None);
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 0);
    }
}

#[test]
fn as_root_volumes_belong_to_the_owner_and_a_closed_path_is_refused() {
    let test = "as_root_volumes_belong_to_the_owner_and_a_closed_path_is_refused";
    if !Uid::effective().is_root() {
        return capability_missing(test, "root", "the user is not root");
    }
    let owner = Owner {
        uid: 4321,
        gid: 4322,
    };
    let folder = tempfile::tempdir().unwrap();
    let pool = folder.path().join("pool");
    fs::set_permissions(folder.path(), fs::Permissions::from_mode(0o700)).unwrap();
    let closed = open(Choice::Auto, &pool, owner).unwrap_err();
    assert!(matches!(closed, StorageError::Denied { .. }), "{closed}");
    fs::set_permissions(folder.path(), fs::Permissions::from_mode(0o711)).unwrap();
    let driver = open(Choice::Auto, &pool, owner).unwrap();
    assert_eq!(fs::metadata(&pool).unwrap().mode() & 0o7777, 0o711);
    let id = VolumeId::random();
    let path = driver.create_volume(&id).unwrap();
    fs::write(path.join("x"), "x").unwrap();
    std::os::unix::fs::chown(path.join("x"), Some(4321), Some(4322)).unwrap();
    let to = VolumeId::random();
    driver
        .clone_volume(&id, &to, Omit::NOTHING, NO_PROGRESS)
        .unwrap();
    for made in [driver.volume_path(&to), driver.volume_path(&to).join("x")] {
        let meta = fs::metadata(made).unwrap();
        assert_eq!((meta.uid(), meta.gid()), (4321, 4322));
    }
}

/// Runs this very suite again as the user nobody, in a folder of its own.
#[cfg(target_os = "linux")]
#[test]
fn a_user_without_privileges_can_do_all_of_it() {
    use std::os::unix::process::CommandExt;
    const NOBODY: u32 = 65534;
    let test = "a_user_without_privileges_can_do_all_of_it";
    if !Uid::effective().is_root() {
        return capability_missing(test, "root", "the user is not root");
    }
    let mut run = std::process::Command::new("/proc/self/exe");
    run.uid(NOBODY)
        .gid(NOBODY)
        .current_dir("/")
        .env_remove("DBRANCH_TEST_REQUIRE")
        // A user can't make datasets here; what users can do with ZFS, its own tests show.
        .env_remove("DBRANCH_TEST_ZFS")
        .arg("storage::contract::");
    let mut folders = Vec::new();
    for (capability, var, _) in FILE_SYSTEMS {
        let Some(parent) = folder_on(test, capability) else {
            continue;
        };
        let folder = tempfile::tempdir_in(parent).unwrap();
        std::os::unix::fs::chown(folder.path(), Some(NOBODY), Some(NOBODY)).unwrap();
        // TMPDIR too, as the one of root may be closed to others.
        run.env(var, folder.path()).env("TMPDIR", folder.path());
        folders.push(folder);
    }
    if folders.len() < FILE_SYSTEMS.len() {
        return;
    }
    let run = run.output().unwrap();
    let (out, errors) = (
        String::from_utf8_lossy(&run.stdout),
        String::from_utf8_lossy(&run.stderr),
    );
    assert!(run.status.success(), "{out}{errors}");
    assert!(
        out.contains("destroying_removes_all_and_may_be_repeated ... ok"),
        "{out}"
    );
    let is_left_out = |line: &&str| line.contains("names no folder") && !line.contains("_ZFS");
    assert_eq!(errors.lines().find(is_left_out), None, "{errors}");
    for folder in folders {
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 0);
    }
}
