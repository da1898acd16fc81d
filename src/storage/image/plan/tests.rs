use super::super::boot::fstab_line;
use super::super::{AtBoot, Mounted, Places};
use super::*;

const OWNER: Owner = Owner { uid: 7, gid: 8 };
const SIZE: u64 = 1 << 30;

fn nothing() -> Observed {
    Observed {
        places: Places::of(Path::new("/nowhere/it's here/pool")).unwrap(),
        image: Image::Missing,
        is_partial: false,
        is_being_removed: false,
        mount_point: MountPoint::Missing,
        at_boot: None,
        may_write: true,
    }
}

fn ready() -> Image {
    Image::Ready {
        file_system: FileSystem::Btrfs,
        size_bytes: SIZE,
        allocated_bytes: 4096,
    }
}

fn mounted() -> Mounted {
    Mounted {
        file_system: "btrfs".into(),
        options: "rw".into(),
        source: "/dev/loop9".into(),
        is_ours: true,
        owner: OWNER,
        mode: 0o700,
        total_bytes: SIZE,
        free_bytes: SIZE,
        device_bytes: SIZE,
        file_system_bytes: SIZE,
    }
}

fn standing() -> Observed {
    Observed {
        image: ready(),
        mount_point: MountPoint::Mounted(mounted()),
        at_boot: Some(AtBoot::Fstab {
            file: "/etc/fstab".into(),
            line: 2,
            ours: Some(format!(
                "# mark\n{}",
                fstab_line(&nothing().places, FileSystem::Btrfs)
            )),
            others_bytes: None,
        }),
        ..nothing()
    }
}

fn wish() -> SetUp {
    SetUp {
        size_bytes: None,
        file_system: None,
        default_file_system: FileSystem::Btrfs,
        default_size_bytes: SIZE,
        owner: OWNER,
        mode: 0o700,
    }
}

fn boot() -> BootPlaces {
    BootPlaces::or_else(None, Some("/nowhere/fstab".into()))
}

fn whole(plan: &Plan) -> String {
    plan.groups().into_iter().map(|g| g.script).collect()
}

fn set_up_of(found: &Observed) -> String {
    whole(&set_up(found, &wish(), &boot()).unwrap())
}

#[test]
fn what_is_done_is_left_out() {
    assert!(set_up(&standing(), &wish(), &boot()).unwrap().is_empty());
    let lost_mount = Observed {
        mount_point: MountPoint::Free { is_marked: true },
        ..standing()
    };
    let script = set_up_of(&lost_mount);
    for left_out in ["mkfs", "truncate", "fstab", "mkdir"] {
        assert!(!script.contains(left_out), "{left_out}: {script}");
    }
    assert!(script.contains("mount -t btrfs"), "{script}");
    let given_away = Observed {
        mount_point: MountPoint::Mounted(Mounted {
            owner: Owner { uid: 0, gid: 0 },
            ..mounted()
        }),
        ..standing()
    };
    let script = set_up_of(&given_away);
    assert!(
        script.contains("chown 7:8") && !script.contains("mount -t"),
        "{script}"
    );
}

#[test]
fn only_a_file_without_data_is_ever_formatted() {
    for image in [Image::Missing, Image::Empty { size_bytes: 0 }] {
        let script = set_up_of(&Observed { image, ..nothing() });
        assert!(script.contains("mkfs.btrfs"), "{script}");
        // It gets its name when it is whole, and by a call that replaces nothing.
        assert!(script.contains("pool.img.part' >/dev/null"), "{script}");
        assert!(!script.contains(" -f /nowhere/'it"), "{script}");
    }
    let foreign = Observed {
        image: Image::Foreign { why: "x".into() },
        ..nothing()
    };
    assert!(set_up(&foreign, &wish(), &boot()).is_err());
    assert!(remove(&foreign).is_err());
    for script in [set_up_of(&nothing()), set_up_of(&standing())] {
        assert!(
            !script.contains("mkfs.btrfs -f") && !script.contains("--force"),
            "{script}"
        );
    }
}

#[test]
fn a_path_is_one_word_whatever_is_in_it() {
    let script = set_up_of(&nothing());
    assert!(
        script.contains(r"mkdir -p '/nowhere/it'\''s here/pool'"),
        "{script}"
    );
    assert_eq!(quoted("a-b/c.d"), "a-b/c.d");
    assert_eq!(quoted("a;b"), "'a;b'");
    assert_eq!(quoted(""), "''");
}

#[test]
fn what_hides_something_or_is_mounted_there_is_refused() {
    for mount_point in [
        MountPoint::Occupied {
            by: "it holds `x`".into(),
        },
        MountPoint::Mounted(Mounted {
            is_ours: false,
            ..mounted()
        }),
    ] {
        let found = Observed {
            mount_point,
            ..nothing()
        };
        assert!(set_up(&found, &wish(), &boot()).is_err());
        assert!(remove(&found).is_err());
    }
}

#[test]
fn another_size_or_file_system_is_said_to_be_so() {
    let refused = |want: SetUp| set_up(&standing(), &want, &boot()).unwrap_err();
    let larger = refused(SetUp {
        size_bytes: Some(SIZE * 2),
        ..wish()
    });
    assert!(larger.hint.contains("storage grow --size 2G"), "{larger:?}");
    let smaller = refused(SetUp {
        size_bytes: Some(SIZE / 2),
        ..wish()
    });
    assert!(smaller.message.contains("smaller"), "{smaller:?}");
    let other = refused(SetUp {
        file_system: Some(FileSystem::Xfs),
        ..wish()
    });
    assert!(other.message.contains("btrfs, not xfs"), "{other:?}");
}

#[test]
fn growing_goes_on_where_it_was_interrupted() {
    let grown = |found: &Observed| whole(&grow(found, SIZE * 2).unwrap());
    let script = grown(&standing());
    for command in [
        "truncate -s 2147483648",
        "losetup -c /dev/loop9",
        "resize max",
    ] {
        assert!(script.contains(command), "{script}");
    }
    let longer = Image::Ready {
        file_system: FileSystem::Btrfs,
        size_bytes: SIZE * 2,
        allocated_bytes: 0,
    };
    let file_only = Observed {
        image: longer.clone(),
        ..standing()
    };
    let script = grown(&file_only);
    assert!(
        !script.contains("truncate") && script.contains("losetup -c"),
        "{script}"
    );
    let all = Observed {
        mount_point: MountPoint::Mounted(Mounted {
            device_bytes: SIZE * 2,
            file_system_bytes: SIZE * 2,
            ..mounted()
        }),
        ..file_only
    };
    assert_eq!(grown(&all), "");
    assert!(grow(&all, SIZE).unwrap_err().message.contains("smaller"));
    assert!(grow(&nothing(), SIZE).is_err());
}

#[test]
fn a_removal_that_broke_off_is_finished() {
    let script = whole(&remove(&standing()).unwrap());
    for command in ["mv ", "umount ", "sed -i 1,2d /etc/fstab", "rmdir "] {
        assert!(script.contains(command), "{script}");
    }
    let unmounted = Observed {
        image: Image::Missing,
        is_being_removed: true,
        mount_point: MountPoint::Free { is_marked: true },
        at_boot: None,
        ..nothing()
    };
    let script = whole(&remove(&unmounted).unwrap());
    assert!(
        !script.contains("umount") && script.contains("pool.img.removed"),
        "{script}"
    );
    assert!(set_up(&unmounted, &wish(), &boot()).is_err());
    // What is in a pool that is not mounted can't be seen.
    let closed = Observed {
        mount_point: MountPoint::Free { is_marked: true },
        ..standing()
    };
    assert!(remove(&closed).is_err());
    assert!(remove(&nothing()).is_err());
}

#[test]
fn what_others_wrote_into_fstab_is_left_to_them() {
    let by_hand = Observed {
        at_boot: Some(AtBoot::Fstab {
            file: "/etc/fstab".into(),
            line: 2,
            ours: None,
            others_bytes: None,
        }),
        ..standing()
    };
    assert!(set_up(&by_hand, &wish(), &boot()).unwrap().is_empty());
    assert!(remove(&by_hand).is_err());
}

#[test]
fn a_user_does_what_needs_no_root() {
    if nix::unistd::geteuid().is_root() {
        assert_eq!(
            set_up(&nothing(), &wish(), &boot()).unwrap().groups().len(),
            1
        );
        return;
    }
    let groups = set_up(&nothing(), &wish(), &boot()).unwrap().groups();
    assert_eq!(
        groups.iter().map(|g| g.as_root).collect::<Vec<_>>(),
        [false, true]
    );
    assert!(groups[0].script.contains("mkfs.btrfs"));
    assert!(!groups[1].script.contains("mkfs.btrfs"));
}
