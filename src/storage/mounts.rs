//! Where file systems are mounted, and what mounts them at boot.
//!
//! Read from `/proc/self/mountinfo` (proc(5)), fstab(5) and systemd.mount(5).
//! Elsewhere than on Linux nothing is known, and nothing is claimed.

use std::ffi::OsString;
use std::fs;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};

/// One line of `/proc/self/mountinfo`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Mount {
    pub point: PathBuf,
    /// What of the file system is mounted: `/`, or a folder of it.
    pub root: PathBuf,
    /// `btrfs`, `xfs`, ...
    pub file_system: String,
    /// A device, mostly.
    pub source: PathBuf,
    /// Options of the mount and of the file system.
    pub options: Vec<String>,
}

impl Mount {
    /// The mount that holds a path; none where that can't be told. Touches no disk but proc.
    pub fn of(path: &Path) -> Option<Self> {
        let table = fs::read("/proc/self/mountinfo").ok()?;
        innermost(parse(&table), path)
    }

    pub fn has(&self, option: &str) -> bool {
        self.options.iter().any(|o| o == option)
    }

    /// The kernel's name of the device: `loop0`, `sda1`, `dm-0`.
    pub(super) fn device(&self) -> Option<String> {
        let path = fs::canonicalize(&self.source).ok()?;
        path.starts_with("/dev")
            .then(|| path.file_name()?.to_str().map(str::to_owned))?
    }
}

fn parse(table: &[u8]) -> Vec<Mount> {
    table
        .split(|b| *b == b'\n')
        .filter_map(parse_line)
        .collect()
}

fn parse_line(line: &[u8]) -> Option<Mount> {
    let fields: Vec<&[u8]> = line.split(|b| *b == b' ').collect();
    // A variable number of fields ends with a lone dash.
    let dash = fields.iter().skip(6).position(|f| *f == b"-")? + 6;
    let text = |field: &[u8]| String::from_utf8_lossy(field).into_owned();
    let mut options: Vec<String> = Vec::new();
    for field in [fields.get(5)?, fields.get(dash + 3)?] {
        options.extend(text(field).split(',').map(str::to_owned));
    }
    Some(Mount {
        root: unescaped(fields.get(3)?),
        point: unescaped(fields.get(4)?),
        file_system: text(fields.get(dash + 1)?),
        source: unescaped(fields.get(dash + 2)?),
        options,
    })
}

/// The longest mount point above `path`; of several on the same one the last.
fn innermost(mounts: Vec<Mount>, path: &Path) -> Option<Mount> {
    mounts
        .into_iter()
        .filter(|m| path.starts_with(&m.point))
        .max_by_key(|m| m.point.components().count())
}

/// Blanks and the like are written as `\040`, in mountinfo and in fstab.
fn unescaped(field: &[u8]) -> PathBuf {
    let mut out = Vec::with_capacity(field.len());
    let mut rest = field;
    while let [first, tail @ ..] = rest {
        let code = (*first == b'\\')
            .then(|| tail.get(..3))
            .flatten()
            .and_then(|digits| u8::from_str_radix(std::str::from_utf8(digits).ok()?, 8).ok());
        out.push(code.unwrap_or(*first));
        rest = if code.is_some() { &tail[3..] } else { tail };
    }
    PathBuf::from(OsString::from_vec(out))
}

/// What is configured to be mounted when the machine starts.
#[derive(Debug, Clone)]
pub struct Boot {
    fstab: PathBuf,
    unit_dirs: Vec<PathBuf>,
    systemd: bool,
}

/// Whether a mount is there again after the next start of the machine.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum AfterBoot {
    Mounted,
    /// A unit file is there and nothing wants it, or an entry says `noauto`.
    NotEnabled,
    NotMounted,
    /// Nothing here tells, as in a container.
    Unknown,
}

impl Boot {
    /// Of this machine.
    pub fn here() -> Self {
        let dirs = [
            "/etc/systemd/system",
            "/run/systemd/system",
            "/usr/local/lib/systemd/system",
            "/usr/lib/systemd/system",
            "/lib/systemd/system",
        ];
        Self {
            fstab: "/etc/fstab".into(),
            unit_dirs: dirs.map(PathBuf::from).to_vec(),
            // sd_booted(3).
            systemd: Path::new("/run/systemd/system").is_dir(),
        }
    }

    pub fn mounts(&self, point: &Path) -> AfterBoot {
        if point == Path::new("/") {
            return AfterBoot::Mounted;
        }
        let entries = self.entries();
        if let Some((_, options)) = entries.iter().rfind(|(at, _)| at == point) {
            return if options.split(',').any(|o| o == "noauto") {
                AfterBoot::NotEnabled
            } else {
                AfterBoot::Mounted
            };
        }
        if self.systemd
            && let Some(found) = self.by_unit(point)
        {
            return found;
        }
        if self.systemd || !entries.is_empty() {
            AfterBoot::NotMounted
        } else {
            AfterBoot::Unknown
        }
    }

    /// Whether a unit of systemd is for that mount point.
    pub fn has_unit(&self, point: &Path) -> bool {
        let unit = unit_name(point);
        let dirs = &mut self.unit_dirs.iter();
        dirs.any(|dir| fs::symlink_metadata(dir.join(&unit)).is_ok())
    }

    fn by_unit(&self, point: &Path) -> Option<AfterBoot> {
        if !self.has_unit(point) {
            return None;
        }
        let unit = unit_name(point);
        let wanted = self.unit_dirs.iter().any(|dir| {
            let subs = fs::read_dir(dir).into_iter().flatten().flatten();
            subs.filter(|e| {
                let name = e.file_name();
                let name = name.as_bytes();
                name.ends_with(b".wants") || name.ends_with(b".requires")
            })
            .any(|e| {
                [&unit, &unit.replace(".mount", ".automount")]
                    .iter()
                    .any(|u| fs::symlink_metadata(e.path().join(u)).is_ok())
            })
        });
        Some(if wanted {
            AfterBoot::Mounted
        } else {
            AfterBoot::NotEnabled
        })
    }

    /// The command that mounts the file system that a path should lie in and does not: the
    /// innermost mount point at or above it that is configured and not mounted.
    pub fn command_to_mount(&self, path: &Path) -> Option<String> {
        let is_mounted = |point: &Path| Mount::of(point).is_some_and(|m| m.point == point);
        path.ancestors()
            .take_while(|point| *point != Path::new("/"))
            .find_map(|point| {
                let in_fstab = || self.entries().iter().any(|(at, _)| at == point);
                let command = if self.has_unit(point) {
                    let unit = unit_name(point);
                    format!("systemctl start {}", super::shell_word(Path::new(&unit)))
                } else if in_fstab() {
                    format!("mount {}", super::shell_word(point))
                } else {
                    return None;
                };
                (!is_mounted(point)).then(|| super::as_root(&command))
            })
    }

    /// Mount points of the fstab with their options.
    fn entries(&self) -> Vec<(PathBuf, String)> {
        let text = fs::read(&self.fstab).unwrap_or_default();
        text.split(|b| *b == b'\n')
            .filter_map(|line| {
                let mut fields = line
                    .split(u8::is_ascii_whitespace)
                    .filter(|field| !field.is_empty());
                let source = fields.next().filter(|s| !s.starts_with(b"#"))?;
                let (point, _, options) = (fields.next()?, fields.next()?, fields.next());
                let _ = source;
                let options = String::from_utf8_lossy(options.unwrap_or(b"defaults")).into_owned();
                Some((unescaped(point), options))
            })
            .collect()
    }
}

/// The name of the unit that mounts at a path (systemd.unit(5), "String Escaping for Inclusion in
/// Unit Names").
pub fn unit_name(point: &Path) -> String {
    use std::fmt::Write;
    let bytes = point.as_os_str().as_bytes();
    let trimmed: Vec<&[u8]> = bytes
        .split(|b| *b == b'/')
        .filter(|p| !p.is_empty())
        .collect();
    if trimmed.is_empty() {
        return "-.mount".into();
    }
    let mut name = String::new();
    for (n, byte) in trimmed.join(&b'/').into_iter().enumerate() {
        match byte {
            b'/' => name.push('-'),
            b'.' if n == 0 => name.push_str("\\x2e"),
            b if b.is_ascii_alphanumeric() || b":_.".contains(&b) => name.push(char::from(b)),
            b => {
                let _ = write!(name, "\\x{b:02x}");
            }
        }
    }
    name + ".mount"
}

/// The image file behind a loop device that a file system is mounted from (loop(4)), through a
/// partition or a device mapper too.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Image {
    pub(super) file: PathBuf,
    /// Removed while it is in use: its blocks go with the mount.
    pub(super) deleted: bool,
}

pub(super) fn image_behind(device: &str) -> Option<Image> {
    let block = fs::canonicalize(Path::new("/sys/class/block").join(device)).ok()?;
    // A partition's folder lies in its disk's.
    let disk = [Some(block.as_path()), block.parent()]
        .into_iter()
        .flatten()
        .find_map(|dir| fs::read(dir.join("loop/backing_file")).ok());
    if let Some(text) = disk {
        let text = text.strip_suffix(b"\n").unwrap_or(&text);
        let (file, deleted) = match text.strip_suffix(b" (deleted)") {
            Some(file) => (file, true),
            None => (text, false),
        };
        return Some(Image {
            file: PathBuf::from(OsString::from_vec(file.to_vec())),
            deleted,
        });
    }
    let below = fs::read_dir(block.join("slaves")).ok()?.flatten();
    below
        .filter_map(|e| e.file_name().into_string().ok())
        .find_map(|device| image_behind(&device))
}

#[cfg(test)]
mod tests {
    use super::*;

    const TABLE: &str = "\
22 1 254:0 / / rw,relatime - ext4 /dev/root rw,discard
30 22 0:40 / /mnt/a\\040b rw,noatime shared:5 - btrfs /dev/loop3 rw,space_cache=v2,user_subvol_rm_allowed
31 22 0:41 /sub /mnt ro - xfs /dev/sdb1 rw
32 22 0:42 / /mnt rw - tmpfs tmpfs rw
";

    #[test]
    fn a_path_lies_in_the_innermost_mount_and_the_last_on_it() {
        let of = |path: &str| innermost(parse(TABLE.as_bytes()), Path::new(path)).unwrap();
        assert_eq!(of("/mnt/a b/pool").source, Path::new("/dev/loop3"));
        assert!(of("/mnt/a b").has("user_subvol_rm_allowed") && of("/mnt/a b").has("noatime"));
        assert_eq!(of("/mnt/a").file_system, "tmpfs");
        assert_eq!(of("/mnt2").point, Path::new("/"));
        assert_eq!(parse(TABLE.as_bytes())[2].root, Path::new("/sub"));
        assert!(parse(TABLE.as_bytes())[2].has("ro"));
    }

    #[test]
    fn unit_names_are_systemds() {
        // As `systemd-escape --path --suffix=mount` prints them.
        for (path, unit) in [
            ("/", "-.mount"),
            ("/mnt/db-pool/", "mnt-db\\x2dpool.mount"),
            ("/.hidden//x y", "\\x2ehidden-x\\x20y.mount"),
            ("/home/é", "home-\\xc3\\xa9.mount"),
        ] {
            assert_eq!(unit_name(Path::new(path)), unit);
        }
    }

    fn boot(dir: &Path, systemd: bool) -> Boot {
        Boot {
            fstab: dir.join("fstab"),
            unit_dirs: vec![dir.join("etc"), dir.join("usr")],
            systemd,
        }
    }

    #[test]
    fn a_mount_survives_by_fstab_or_by_a_unit_that_something_wants() {
        let dir = tempfile::tempdir().unwrap();
        let fstab = "# comment\nUUID=1 / ext4 defaults 0 1\n/i /mnt/my\\040pool btrfs loop 0 0\n/j /mnt/later xfs noauto 0 0\n";
        fs::write(dir.path().join("fstab"), fstab).unwrap();
        let boot = boot(dir.path(), true);
        let at = |point: &str| boot.mounts(Path::new(point));
        assert_eq!(at("/"), AfterBoot::Mounted);
        assert_eq!(at("/mnt/my pool"), AfterBoot::Mounted);
        assert_eq!(at("/mnt/later"), AfterBoot::NotEnabled);
        assert_eq!(at("/mnt/unit"), AfterBoot::NotMounted);
        let etc = dir.path().join("etc");
        fs::create_dir_all(etc.join("local-fs.target.wants")).unwrap();
        fs::write(etc.join("mnt-unit.mount"), "").unwrap();
        assert_eq!(at("/mnt/unit"), AfterBoot::NotEnabled);
        std::os::unix::fs::symlink(
            "../mnt-unit.mount",
            etc.join("local-fs.target.wants/mnt-unit.mount"),
        )
        .unwrap();
        assert_eq!(at("/mnt/unit"), AfterBoot::Mounted);
    }

    #[test]
    fn a_container_without_fstab_tells_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let boot = boot(dir.path(), false);
        assert_eq!(boot.mounts(Path::new("/data")), AfterBoot::Unknown);
        fs::write(dir.path().join("fstab"), "# UNCONFIGURED\n").unwrap();
        assert_eq!(boot.mounts(Path::new("/data")), AfterBoot::Unknown);
    }

    #[test]
    fn the_command_that_mounts_is_the_one_that_is_configured() {
        let dir = tempfile::tempdir().unwrap();
        let boot = boot(dir.path(), true);
        let pool = Path::new("/nowhere/pool/deep");
        assert_eq!(boot.command_to_mount(pool), None);
        fs::write(dir.path().join("fstab"), "/i /nowhere/pool xfs loop\n").unwrap();
        let command = boot.command_to_mount(pool).unwrap();
        assert!(command.ends_with("mount /nowhere/pool"), "{command}");
        fs::create_dir(dir.path().join("etc")).unwrap();
        fs::write(dir.path().join("etc/nowhere-pool.mount"), "").unwrap();
        let command = boot.command_to_mount(pool).unwrap();
        assert!(
            command.ends_with("systemctl start nowhere-pool.mount"),
            "{command}"
        );
    }
}
