//! Looks what there is of a pool. Needs no privileges.

use std::fs::{self, File};
use std::io::{self, ErrorKind};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use nix::unistd::{AccessFlags, access};

use super::{AtBoot, BootPlaces, FileSystem, NOT_MOUNTED, Places, superblock};
use crate::storage::pool::space_of;
use crate::types::Owner;

/// What there is of a pool.
#[derive(Debug, Clone)]
pub struct Observed {
    pub places: Places,
    pub image: Image,
    /// An earlier set-up broke off while it made the file.
    pub is_partial: bool,
    /// A removal has begun: the file bears another name, and the pool was empty.
    pub is_being_removed: bool,
    pub mount_point: MountPoint,
    pub at_boot: Option<AtBoot>,
    /// Whether this user may make files beside the mount point (or would, where folders are missing).
    pub(super) may_write: bool,
}

/// The file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Image {
    Missing,
    /// Of a size, but without a byte of data.
    Empty {
        size_bytes: u64,
    },
    Ready {
        file_system: FileSystem,
        size_bytes: u64,
        /// What it takes on the disk below.
        allocated_bytes: u64,
    },
    /// It holds something else, or can't be read.
    Foreign {
        why: String,
    },
}

/// The folder.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum MountPoint {
    Missing,
    /// A folder with nothing in it but perhaps the file that says so.
    Free {
        is_marked: bool,
    },
    /// Something is there that a mount would hide.
    Occupied {
        by: String,
    },
    Mounted(Mounted),
}

/// What is mounted there.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Mounted {
    /// As the kernel calls it: `btrfs`.
    pub file_system: String,
    pub options: String,
    /// The device or whatever else is mounted: `/dev/loop3`.
    pub source: String,
    /// Whether it is the pool's own file.
    pub is_ours: bool,
    pub owner: Owner,
    pub mode: u32,
    pub total_bytes: u64,
    pub free_bytes: u64,
    /// Bytes of the loop device.
    pub device_bytes: u64,
    /// Bytes the file system covers of it.
    pub file_system_bytes: u64,
}

impl Observed {
    /// The pool's own file system, when it is mounted.
    pub fn mounted(&self) -> Option<&Mounted> {
        match &self.mount_point {
            MountPoint::Mounted(mounted) if mounted.is_ours => Some(mounted),
            _ => None,
        }
    }

    /// Whether there is anything of a pool.
    pub fn is_anything(&self) -> bool {
        self.image != Image::Missing
            || self.is_partial
            || self.is_being_removed
            || self.at_boot.as_ref().is_some_and(AtBoot::is_ours)
    }
}

/// Looks at everything.
pub fn observe(places: &Places, boot: &BootPlaces) -> io::Result<Observed> {
    Ok(Observed {
        image: image(&places.image())?,
        is_partial: places.partial().exists(),
        is_being_removed: places.removed().exists(),
        mount_point: mount_point(places)?,
        at_boot: boot.find(places.mount()),
        may_write: may_write(places.parent()),
        places: places.clone(),
    })
}

fn image(path: &Path) -> io::Result<Image> {
    let meta = match fs::symlink_metadata(path) {
        Ok(meta) => meta,
        Err(e) if e.kind() == ErrorKind::NotFound => return Ok(Image::Missing),
        Err(e) => return Err(e),
    };
    if !meta.is_file() {
        return Ok(Image::Foreign {
            why: "it is no file".into(),
        });
    }
    // In units of 512 bytes (inode(7)). None of them: all of it is a hole.
    let allocated_bytes = meta.blocks() * 512;
    if allocated_bytes == 0 {
        return Ok(Image::Empty {
            size_bytes: meta.len(),
        });
    }
    let found = match File::open(path) {
        Ok(file) => superblock::file_system(&file)?,
        Err(e) if e.kind() == ErrorKind::PermissionDenied => {
            let why = format!("it belongs to the user with the id {}", meta.uid());
            return Ok(Image::Foreign { why });
        }
        Err(e) => return Err(e),
    };
    Ok(match found {
        Some(file_system) => Image::Ready {
            file_system,
            size_bytes: meta.len(),
            allocated_bytes,
        },
        None => Image::Foreign {
            why: "it holds data, but no btrfs or XFS".into(),
        },
    })
}

fn mount_point(places: &Places) -> io::Result<MountPoint> {
    if let Some(mount) = mount_at(places.mount()) {
        return Ok(MountPoint::Mounted(mounted(places, mount)?));
    }
    let entries = match fs::read_dir(places.mount()) {
        Ok(entries) => entries,
        Err(e) if e.kind() == ErrorKind::NotFound => return Ok(MountPoint::Missing),
        Err(e) if e.kind() == ErrorKind::NotADirectory => {
            let by = "it is no folder".into();
            return Ok(MountPoint::Occupied { by });
        }
        Err(e) => return Err(e),
    };
    let mut is_marked = false;
    for entry in entries {
        let name = entry?.file_name();
        if name != NOT_MOUNTED {
            let by = format!("it holds `{}`", name.display());
            return Ok(MountPoint::Occupied { by });
        }
        is_marked = true;
    }
    Ok(MountPoint::Free { is_marked })
}

fn mounted(places: &Places, mount: Mount) -> io::Result<Mounted> {
    let meta = fs::metadata(places.mount())?;
    let space = space_of(places.mount())?;
    let device = mount.source.strip_prefix("/dev/");
    let of_device = |file: &str| {
        let text = fs::read_to_string(Path::new("/sys/block").join(device?).join(file)).ok()?;
        Some(text.trim_end_matches('\n').to_owned())
    };
    let backing = of_device("loop/backing_file").map(PathBuf::from);
    let files = [places.image(), places.removed()];
    let file = backing.filter(|file| files.contains(file));
    let log_bytes = match &file {
        Some(file) if mount.file_system == "xfs" => File::open(file)
            .and_then(|f| superblock::xfs_log_bytes(&f))
            .unwrap_or(0),
        _ => 0,
    };
    Ok(Mounted {
        is_ours: file.is_some(),
        owner: Owner {
            uid: meta.uid(),
            gid: meta.gid(),
        },
        mode: meta.mode() & 0o7777,
        total_bytes: space.total_bytes,
        free_bytes: space.free_bytes,
        // In units of 512 bytes, whatever the device's are (Documentation/ABI/stable/sysfs-block).
        device_bytes: of_device("size")
            .and_then(|n| n.parse::<u64>().ok())
            .unwrap_or(0)
            * 512,
        file_system_bytes: space.total_bytes + log_bytes,
        file_system: mount.file_system,
        options: mount.options,
        source: mount.source,
    })
}

/// A line of /proc/self/mountinfo (`proc_pid_mountinfo(5)`).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Mount {
    pub point: PathBuf,
    /// As the kernel calls it: `btrfs`.
    pub file_system: String,
    pub source: String,
    pub options: String,
}

/// What is mounted at a path itself.
fn mount_at(path: &Path) -> Option<Mount> {
    mount_of(path).filter(|mount| mount.point == path)
}

/// What is mounted where a path lies. None on systems without /proc.
pub fn mount_of(path: &Path) -> Option<Mount> {
    let text = fs::read_to_string("/proc/self/mountinfo").ok()?;
    let mounts = text.lines().filter_map(parse_mount);
    // Of those at one place, the last one lies on top.
    mounts
        .filter(|mount| path.starts_with(&mount.point))
        .max_by_key(|mount| mount.point.as_os_str().len())
}

fn parse_mount(line: &str) -> Option<Mount> {
    let (front, back) = line.split_once(" - ")?;
    let front: Vec<&str> = front.split(' ').collect();
    let point = unescaped(front.get(4)?).into();
    let mut back = back.split(' ');
    let (file_system, source) = (back.next()?.to_owned(), unescaped(back.next()?));
    // Those of the mount, then those of the file system, which repeats some.
    let mut options: Vec<&str> = front.get(5)?.split(',').collect();
    for option in back.next().unwrap_or_default().split(',') {
        if !option.is_empty() && !options.contains(&option) {
            options.push(option);
        }
    }
    Some(Mount {
        point,
        file_system,
        source,
        options: options.join(","),
    })
}

/// Takes octal escapes back: `\040` is a blank.
pub(super) fn unescaped(field: &str) -> String {
    let bytes = field.as_bytes();
    let (mut out, mut at) = (Vec::with_capacity(bytes.len()), 0);
    while at < bytes.len() {
        let octal = bytes
            .get(at + 1..at + 4)
            .and_then(|d| std::str::from_utf8(d).ok());
        match octal.and_then(|d| u8::from_str_radix(d, 8).ok()) {
            Some(byte) if bytes[at] == b'\\' => {
                out.push(byte);
                at += 4;
            }
            _ => {
                out.push(bytes[at]);
                at += 1;
            }
        }
    }
    String::from_utf8_lossy(&out).into_owned()
}

fn may_write(folder: &Path) -> bool {
    folder
        .ancestors()
        .find(|f| f.exists())
        .is_some_and(|f| access(f, AccessFlags::W_OK | AccessFlags::X_OK).is_ok())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mounts_are_found_with_all_their_options() {
        let line = r"36 25 0:31 / /a\040b rw,noatime shared:1 - btrfs /dev/loop3 rw,user_subvol_rm_allowed,subvol=/";
        let mount = parse_mount(line).unwrap();
        assert_eq!(mount.point, Path::new("/a b"));
        assert_eq!(mount.file_system, "btrfs");
        assert_eq!(mount.source, "/dev/loop3");
        assert_eq!(mount.options, "rw,noatime,user_subvol_rm_allowed,subvol=/");
        assert_eq!(
            mount_of(Path::new("/proc/self")).unwrap().file_system,
            "proc"
        );
    }

    #[test]
    fn a_file_is_told_by_what_it_holds() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("f");
        assert_eq!(image(&path).unwrap(), Image::Missing);
        let file = File::create(&path).unwrap();
        file.set_len(1 << 30).unwrap();
        assert_eq!(
            image(&path).unwrap(),
            Image::Empty {
                size_bytes: 1 << 30
            }
        );
        fs::write(&path, "letters to grandma").unwrap();
        assert!(matches!(image(&path).unwrap(), Image::Foreign { .. }));
        assert!(matches!(image(dir.path()).unwrap(), Image::Foreign { .. }));
    }

    #[test]
    fn a_folder_with_something_in_it_is_no_place_for_a_mount() {
        let dir = tempfile::tempdir().unwrap();
        let places = Places::of(&dir.path().join("pool")).unwrap();
        let look = || mount_point(&places).unwrap();
        assert_eq!(look(), MountPoint::Missing);
        fs::create_dir(places.mount()).unwrap();
        assert_eq!(look(), MountPoint::Free { is_marked: false });
        fs::write(places.mount().join(NOT_MOUNTED), "").unwrap();
        assert_eq!(look(), MountPoint::Free { is_marked: true });
        fs::write(places.mount().join("x"), "").unwrap();
        assert!(matches!(look(), MountPoint::Occupied { .. }));
    }
}
