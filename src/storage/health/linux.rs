//! What Linux tells of a file system beyond what every system does.

use std::fs::{self, File};
use std::path::{Path, PathBuf};

use rustix::fs::{IFlags, ioctl_getflags};

use super::{Finding, METADATA_LOW_BYTES, Pool, after_boot};
use crate::storage::DriverKind;
use crate::storage::mounts::{Boot, Mount, image_behind};
use crate::storage::usage::allocated_bytes;

/// File systems without a disk.
const IN_MEMORY: [&str; 2] = ["tmpfs", "ramfs"];
/// A quota group with less than this left, or a twentieth, is nearly used up.
const QUOTA_LEFT_BYTES: u64 = 64 << 20;

/// Returns the image that the file system lies in, if it does.
pub(super) fn examine(pool: &Pool, mount: &Mount, findings: &mut Vec<Finding>) -> Option<PathBuf> {
    if IN_MEMORY.contains(&mount.file_system.as_str()) {
        findings.push(Finding::Volatile);
        return None;
    }
    let device = mount.device();
    let image = device.as_deref().and_then(image_behind);
    if let (Some(image), Some(device)) = (&image, &device) {
        findings.extend(if image.deleted {
            Some(Finding::ImageDeleted {
                image: image.file.clone(),
                device: device.clone(),
            })
        } else {
            outgrows(&image.file)
        });
    }
    if mount.file_system == "btrfs" {
        examine_btrfs(pool, mount, findings);
    }
    let no_cow = no_cow(pool);
    if !no_cow.is_empty() {
        findings.push(Finding::NoCow { paths: no_cow });
    }
    let (source, options) = match &image {
        Some(image) => (image.file.display().to_string(), "loop,nofail"),
        None => (by_uuid(mount), "nofail"),
    };
    // A file system that mounts itself (ZFS, autofs), or none of the machine's own.
    if device.is_some() {
        let options = fstab_options(mount, options);
        findings.extend(after_boot(&Boot::here(), mount, &source, &options));
    }
    Some(image?.file)
}

/// The options that are ours to keep: the others are the kernel's own defaults.
fn fstab_options(mount: &Mount, first: &str) -> String {
    let mut options = vec![first.to_owned()];
    let kept = mount.options.iter().filter(|o| {
        ["noatime", "user_subvol_rm_allowed"].contains(&o.as_str()) || o.starts_with("compress")
    });
    options.extend(kept.cloned());
    if mount.file_system == "btrfs" && mount.root != Path::new("/") {
        options.push(format!("subvol={}", mount.root.display()));
    }
    options.join(",")
}

/// The device by a name that lasts.
fn by_uuid(mount: &Mount) -> String {
    let device = fs::canonicalize(&mount.source).ok();
    let names = fs::read_dir("/dev/disk/by-uuid").into_iter().flatten();
    names
        .flatten()
        .find(|e| fs::canonicalize(e.path()).ok() == device)
        .and_then(|e| e.file_name().into_string().ok())
        .map_or_else(
            || mount.source.display().to_string(),
            |uuid| format!("UUID={uuid}"),
        )
}

/// Whether a sparse image may grow beyond its disk.
fn outgrows(image: &Path) -> Option<Finding> {
    let meta = fs::metadata(image).ok()?;
    let may_grow_bytes = meta.len().saturating_sub(allocated_bytes(&meta));
    let disk_free_bytes = super::pool::space_of(image).ok()?.free_bytes;
    (may_grow_bytes > disk_free_bytes).then(|| Finding::ImageOutgrows {
        image: image.to_owned(),
        may_grow_bytes,
        disk_free_bytes,
    })
}

fn examine_btrfs(pool: &Pool, mount: &Mount, findings: &mut Vec<Finding>) {
    if mount.has("nodatacow") || mount.has("nodatasum") {
        findings.push(Finding::NoDataCow);
    }
    if pool.driver == Some(DriverKind::Btrfs)
        && !nix::unistd::geteuid().is_root()
        && !mount.has("user_subvol_rm_allowed")
    {
        findings.push(Finding::NoUnprivilegedDelete);
    }
    let Some(sysfs) = mount.device().and_then(|device| btrfs_sysfs(&device)) else {
        return;
    };
    findings.extend(room_for_metadata(&sysfs).and_then(|room| {
        (room.free_bytes < METADATA_LOW_BYTES).then_some(Finding::LittleMetadata {
            free_bytes: room.free_bytes,
            idle_data_bytes: room.idle_data_bytes,
        })
    }));
    quota(&sysfs, findings);
}

/// `/sys/fs/btrfs/<uuid>` of the file system on a device (the kernel's
/// `Documentation/ABI/stable/sysfs-fs-btrfs` and btrfs(5), "FILESYSTEM SYSFS").
pub(super) fn btrfs_sysfs(device: &str) -> Option<PathBuf> {
    let all = fs::read_dir("/sys/fs/btrfs").ok()?.flatten();
    all.map(|e| e.path())
        .find(|dir| dir.join("devices").join(device).exists())
}

fn number(file: &Path) -> Option<u64> {
    fs::read_to_string(file).ok()?.trim().parse().ok()
}

/// Room for metadata, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::storage) struct MetadataRoom {
    pub(in crate::storage) free_bytes: u64,
    /// In chunks of data that hold nothing.
    pub(in crate::storage) idle_data_bytes: u64,
}

impl MetadataRoom {
    /// Of the btrfs that holds a path.
    pub(in crate::storage) fn of(path: &Path) -> Option<Self> {
        room_for_metadata(&btrfs_sysfs(&Mount::of(path)?.device()?)?)
    }
}

/// What metadata chunks have left, and what chunks can still be made, as the kernel counts before it
/// refuses a reservation: promised room is taken, and in it the reserve for the kernel's own work.
fn room_for_metadata(sysfs: &Path) -> Option<MetadataRoom> {
    let of = |group: &str, what: &str| number(&sysfs.join("allocation").join(group).join(what));
    let total = of("metadata", "total_bytes")?;
    let taken: u64 = [
        "bytes_used",
        "bytes_pinned",
        "bytes_reserved",
        "bytes_may_use",
    ]
    .iter()
    .filter_map(|what| of("metadata", what))
    .sum();
    // Copies of metadata take room for each copy (DUP, RAID1).
    let copies = (of("metadata", "disk_total")? / total.max(1)).max(1);
    let allocated: u64 = ["data", "metadata", "system"]
        .iter()
        .filter_map(|group| of(group, "disk_total"))
        .sum();
    let devices: u64 = fs::read_dir(sysfs.join("devices"))
        .ok()?
        .flatten()
        // 512 bytes each, whatever the device's own blocks are.
        .filter_map(|e| Some(number(&e.path().join("size"))? * 512))
        .sum();
    let unallocated = devices.saturating_sub(allocated) / copies;
    Some(MetadataRoom {
        free_bytes: (total + unallocated).saturating_sub(taken),
        idle_data_bytes: of("data", "total_bytes")?.saturating_sub(of("data", "bytes_used")?),
    })
}

fn quota(sysfs: &Path, findings: &mut Vec<Finding>) {
    let dir = sysfs.join("qgroups");
    if number(&dir.join("enabled")) != Some(1) {
        return;
    }
    let mode = fs::read_to_string(dir.join("mode")).unwrap_or_default();
    findings.push(Finding::Quota {
        mode: mode.trim().to_owned(),
    });
    for entry in fs::read_dir(&dir).into_iter().flatten().flatten() {
        let of = |what: &str| number(&entry.path().join(what));
        // BTRFS_QGROUP_LIMIT_MAX_RFER and _EXCL (linux/btrfs.h).
        for (flag, used, limit) in [
            (1, "referenced", "max_referenced"),
            (2, "exclusive", "max_exclusive"),
        ] {
            if of("limit_flags").unwrap_or(0) & flag == 0 {
                continue;
            }
            let (Some(used_bytes), Some(limit_bytes)) = (of(used), of(limit)) else {
                continue;
            };
            let left = limit_bytes.saturating_sub(used_bytes);
            if left < QUOTA_LEFT_BYTES.max(limit_bytes / 20) {
                findings.push(Finding::QuotaLimit {
                    group: entry.file_name().to_string_lossy().replace('_', "/"),
                    used_bytes,
                    limit_bytes,
                });
            }
        }
    }
}

/// Folders and files that bear the attribute C. New files inherit it from their folder; the control
/// file stands for those that were there before.
fn no_cow(pool: &Pool) -> Vec<PathBuf> {
    let mut paths = vec![pool.path.clone()];
    for volume in &pool.volumes {
        let volume = pool.path.join(volume.as_str());
        let data = volume.join(pool.data_folder);
        let inside = ["base", "pg_wal", "global/pg_control"].map(|name| data.join(name));
        // One for a volume is enough.
        let found = [volume, data].into_iter().chain(inside).find(|p| has_c(p));
        paths.extend(found);
    }
    paths.retain(|path| has_c(path));
    paths
}

fn has_c(path: &Path) -> bool {
    has_flag(path, IFlags::NOCOW)
}

pub(super) fn is_immutable(path: &Path) -> bool {
    has_flag(path, IFlags::IMMUTABLE)
}

fn has_flag(path: &Path, flag: IFlags) -> bool {
    File::open(path)
        .ok()
        .and_then(|file| ioctl_getflags(&file).ok())
        .is_some_and(|flags| flags.contains(flag))
}
