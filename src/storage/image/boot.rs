//! What mounts a pool at every start of the machine: a systemd mount unit, or a line in fstab.

use std::fmt::Write as _;
use std::fs;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use super::plan::{quoted, quoted_path};
use super::{FileSystem, Places};

/// The first line of a unit of ours.
const UNIT_MARK: &str =
    "# `dbranch storage setup` wrote this file, `dbranch storage remove` takes it away.";
/// Beginning and end of the line before a line of ours in fstab, with the mount point between.
const FSTAB_MARK: (&str, &str) = (
    "# dbranch pool ",
    ": `dbranch storage setup` wrote this line and the next.",
);
/// Follows the mark where the file's last line had no end, and got one before ours.
const LINE_END: &str = " And the line end before.";

/// Where this machine keeps what it mounts at its start.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BootPlaces {
    unit_dir: PathBuf,
    fstab: PathBuf,
    way: Way,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Way {
    /// systemd runs and is told.
    Systemd,
    /// A unit is written and nobody told: into a folder that a test named.
    UnitOnly,
    Fstab,
}

impl BootPlaces {
    /// Of this machine. That systemd runs is told by its folder (`sd_booted(3)`).
    pub fn of_machine() -> Self {
        Self {
            unit_dir: "/etc/systemd/system".into(),
            fstab: "/etc/fstab".into(),
            way: if Path::new("/run/systemd/system").is_dir() {
                Way::Systemd
            } else {
                Way::Fstab
            },
        }
    }

    /// Another folder for units, or another fstab; [`BootPlaces::of_machine`] with neither.
    pub fn or_else(unit_dir: Option<PathBuf>, fstab: Option<PathBuf>) -> Self {
        let machine = Self::of_machine();
        match (unit_dir, fstab) {
            (None, None) => machine,
            (Some(unit_dir), fstab) => Self {
                unit_dir,
                fstab: fstab.unwrap_or_else(|| "/nonexistent".into()),
                way: Way::UnitOnly,
            },
            (None, Some(fstab)) => Self {
                unit_dir: "/nonexistent".into(),
                fstab,
                way: Way::Fstab,
            },
        }
    }

    /// What mounts a pool at start, whoever wrote it.
    pub(super) fn find(&self, mount: &Path) -> Option<AtBoot> {
        let unit = self.unit_dir.join(unit_name(mount));
        if let Ok(text) = fs::read_to_string(&unit) {
            return Some(AtBoot::Unit {
                told: self.way == Way::Systemd,
                ours: text.starts_with(UNIT_MARK).then_some(text),
                file: unit,
            });
        }
        let text = fs::read_to_string(&self.fstab).ok()?;
        let lines: Vec<&str> = text.lines().collect();
        let at = lines
            .iter()
            .position(|l| target_of(l).is_some_and(|t| t == mount))?;
        let mark = at.checked_sub(1).map(|n| lines[n]);
        let ours = mark.filter(|mark| marked_mount(mark) == Some(mount));
        let before = |mark: &str| {
            let alone = text.strip_suffix(&format!("\n{mark}\n{}\n", lines[at]))?;
            mark.ends_with(LINE_END).then_some(alone.len() as u64)
        };
        Some(AtBoot::Fstab {
            file: self.fstab.clone(),
            line: at + 1,
            others_bytes: ours.and_then(before),
            ours: ours.map(|mark| [mark, lines[at]].join("\n")),
        })
    }

    /// Commands that make what is written down say what it should; none where it does, or where
    /// somebody else wrote it.
    pub(super) fn renew(&self, found: &AtBoot, places: &Places, fs: FileSystem) -> Vec<String> {
        match found {
            AtBoot::Unit {
                ours: Some(text), ..
            } if *text != unit_text(places, fs) => self.write(places, fs),
            AtBoot::Fstab {
                file,
                line,
                ours: Some(ours),
                ..
            } if !ours.ends_with(&format!("\n{}", fstab_line(places, fs))) => {
                // sed(1) takes one backslash away.
                let text = fstab_line(places, fs).replace('\\', "\\\\");
                let file = quoted_path(file);
                let replace = format!("sed -i {} {file}", quoted(&format!("{line}c\\{text}")));
                vec![unchanged(&file, *line, ours), replace]
            }
            _ => Vec::new(),
        }
    }

    /// Commands that write it down. They run as root.
    pub(super) fn write(&self, places: &Places, fs: FileSystem) -> Vec<String> {
        if self.way == Way::Fstab {
            return self.write_fstab(places, fs);
        }
        let unit = self.unit_dir.join(unit_name(places.mount()));
        let mut commands = vec![format!(
            "cat > {} <<'END'\n{}END",
            quoted_path(&unit),
            unit_text(places, fs)
        )];
        if self.way == Way::Systemd {
            commands.push("systemctl daemon-reload".into());
        }
        commands
    }

    /// One `printf`, so one write: a crash leaves both lines or none.
    fn write_fstab(&self, places: &Places, fs: FileSystem) -> Vec<String> {
        let unended =
            fs::read(&self.fstab).is_ok_and(|text| text.last().is_some_and(|last| *last != b'\n'));
        let (begin, end) = FSTAB_MARK;
        let mark = format!(
            "{begin}{}{end}{}",
            places.mount().display(),
            if unended { LINE_END } else { "" }
        );
        let line = fstab_line(places, fs);
        let format = if unended { r"'\n%s\n%s\n'" } else { r"'%s\n'" };
        vec![format!(
            "printf {format} \\\n  {} \\\n  {} \\\n  >> {}",
            quoted(&mark),
            quoted(&line),
            quoted_path(&self.fstab)
        )]
    }

    /// The command that mounts what was written down, by that very text where something reads it.
    pub(super) fn mount(&self, places: &Places, fs: FileSystem) -> String {
        let machine = Self::of_machine();
        match self.way {
            Way::Systemd => format!(
                "systemctl enable --now {}",
                quoted(&unit_name(places.mount()))
            ),
            Way::Fstab if self.fstab == machine.fstab => {
                format!("mount {}", quoted_path(places.mount()))
            }
            Way::Fstab | Way::UnitOnly => format!(
                "mount -t {fs} -o loop,{} {} {}",
                fs.mount_options(),
                quoted_path(&places.image()),
                quoted_path(places.mount())
            ),
        }
    }
}

/// What mounts a pool at start.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum AtBoot {
    Unit {
        file: PathBuf,
        /// Whether systemd runs and must be told.
        told: bool,
        /// Its text; none where somebody else wrote it.
        ours: Option<String>,
    },
    Fstab {
        file: PathBuf,
        /// Its number, from 1 on.
        line: usize,
        /// Our two lines as they stand there; none where somebody else wrote the line.
        ours: Option<String>,
        /// Where ours are the last lines and the line end before is ours too: the bytes before.
        others_bytes: Option<u64>,
    },
}

impl AtBoot {
    /// The file it stands in.
    pub fn file(&self) -> &Path {
        match self {
            Self::Unit { file, .. } | Self::Fstab { file, .. } => file,
        }
    }

    /// Whether dbranch wrote it, and so may take it away.
    pub fn is_ours(&self) -> bool {
        match self {
            Self::Unit { ours, .. } | Self::Fstab { ours, .. } => ours.is_some(),
        }
    }

    /// Commands that take it away, all other bytes kept, and those that come after.
    /// They run as root.
    pub(super) fn remove(&self) -> Vec<String> {
        match self {
            Self::Unit { file, told, .. } => {
                let mut commands = vec![format!("rm {}", quoted_path(file))];
                if *told {
                    let name = file.file_name().unwrap_or_default().to_string_lossy();
                    commands.insert(0, format!("systemctl disable {}", quoted(&name)));
                    commands.push("systemctl daemon-reload".into());
                }
                commands
            }
            Self::Fstab {
                file,
                line,
                ours,
                others_bytes,
            } => {
                let (file, first) = (quoted_path(file), line - 1);
                let ours = ours.as_deref().unwrap_or_default();
                let removed = match others_bytes {
                    Some(bytes) => format!("truncate -s {bytes} {file}"),
                    None => format!("sed -i {first},{line}d {file}"),
                };
                vec![unchanged(&file, *line, ours), removed]
            }
        }
    }
}

/// The mount points of the pools that dbranch has set up on this machine, whoever's they are.
pub fn set_up_pools(boot: &BootPlaces) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for entry in fs::read_dir(&boot.unit_dir).into_iter().flatten().flatten() {
        let is_mount = entry.path().extension().is_some_and(|e| e == "mount");
        if is_mount
            && let Ok(text) = fs::read_to_string(entry.path())
            && text.starts_with(UNIT_MARK)
            && let Some(mount) = text.lines().find_map(|l| l.strip_prefix("Where="))
        {
            found.push(mount.replace("%%", "%").into());
        }
    }
    let fstab = match fs::read_to_string(&boot.fstab) {
        Ok(text) => text,
        Err(e) => {
            if e.kind() != ErrorKind::NotFound {
                tracing::debug!("read {}: {e}", boot.fstab.display());
            }
            String::new()
        }
    };
    found.extend(fstab.lines().filter_map(marked_mount).map(Path::to_owned));
    found
}

/// Asserts that our two lines stand where they stood.
fn unchanged(file: &str, line: usize, ours: &str) -> String {
    let (mark, entry) = ours.split_once('\n').unwrap_or((ours, ""));
    format!(
        "sed -n {}p {file} | grep -qxF {} &&\n  \
         sed -n {line}p {file} | grep -qxF {} ||\n  \
         {{ echo {file} was changed meanwhile, run it again >&2; exit 1; }}",
        line - 1,
        quoted(mark),
        quoted(entry)
    )
}

fn unit_text(places: &Places, fs: FileSystem) -> String {
    // A percent sign begins a specifier (systemd.unit(5)).
    let path = |path: &Path| path.display().to_string().replace('%', "%%");
    format!(
        "{UNIT_MARK}\n\
         [Unit]\n\
         Description=Databases of dbranch\n\
         \n\
         [Mount]\n\
         What={}\n\
         Where={}\n\
         Type={fs}\n\
         Options=loop,nofail,{}\n\
         \n\
         [Install]\n\
         WantedBy=multi-user.target\n",
        path(&places.image()),
        path(places.mount()),
        fs.mount_options()
    )
}

pub(super) fn fstab_line(places: &Places, fs: FileSystem) -> String {
    format!(
        "{} {} {fs} loop,nofail,{} 0 0",
        fstab_field(&places.image()),
        fstab_field(places.mount()),
        fs.mount_options()
    )
}

/// fstab(5): a blank is written as an octal escape. Places have no control characters or
/// backslashes; `#` matters only at a line's beginning, where a full path has its slash.
fn fstab_field(path: &Path) -> String {
    path.display().to_string().replace(' ', "\\040")
}

/// The mount point of a line of fstab.
fn target_of(line: &str) -> Option<PathBuf> {
    if line.trim_start().starts_with('#') {
        return None;
    }
    let field = line.split_whitespace().nth(1)?;
    Some(super::observe::unescaped(field).into())
}

fn marked_mount(line: &str) -> Option<&Path> {
    let line = line.strip_suffix(LINE_END).unwrap_or(line);
    let (begin, end) = FSTAB_MARK;
    line.strip_prefix(begin)?.strip_suffix(end).map(Path::new)
}

/// The unit's name is the escaped mount point (systemd.unit(5), "String escaping").
fn unit_name(mount: &Path) -> String {
    let text = mount.display().to_string();
    let mut name = String::new();
    for (n, byte) in text.trim_matches('/').bytes().enumerate() {
        match byte {
            b'/' => name.push('-'),
            b'.' if n == 0 => name.push_str("\\x2e"),
            b':' | b'_' | b'.' => name.push(byte.into()),
            byte if byte.is_ascii_alphanumeric() => name.push(byte.into()),
            byte => write!(name, "\\x{byte:02x}").expect("a string takes all"),
        }
    }
    name + ".mount"
}

#[cfg(test)]
mod tests {
    use super::*;

    fn places() -> Places {
        Places {
            mount: "/nowhere/ada b/cow-pool".into(),
        }
    }

    #[test]
    fn a_unit_bears_the_name_that_systemd_expects() {
        // As `systemd-escape --path --suffix=mount` has it.
        for (path, name) in [
            (
                "/nowhere/ada b/cow-pool",
                r"nowhere-ada\x20b-cow\x2dpool.mount",
            ),
            ("/.x/ü", r"\x2ex-\xc3\xbc.mount"),
            ("/a/.b_c:d", "a-.b_c:d.mount"),
        ] {
            assert_eq!(unit_name(Path::new(path)), name);
        }
    }

    #[test]
    fn a_unit_mounts_the_file_and_lets_the_machine_start_without_it() {
        let text = unit_text(&places(), FileSystem::Btrfs);
        for line in [
            "What=/nowhere/ada b/cow-pool.img",
            "Where=/nowhere/ada b/cow-pool",
            "Type=btrfs",
            "WantedBy=multi-user.target",
        ] {
            assert!(text.lines().any(|l| l == line), "{line}: {text}");
        }
        assert!(text.contains("Options=loop,nofail,nosuid,nodev,noatime,user_subvol_rm_allowed"));
    }

    #[test]
    fn a_line_of_fstab_is_found_by_its_mount_point() {
        let line = fstab_line(&places(), FileSystem::Xfs);
        assert!(line.starts_with(
            r"/nowhere/ada\040b/cow-pool.img /nowhere/ada\040b/cow-pool xfs loop,nofail,"
        ));
        assert_eq!(target_of(&line).as_deref(), Some(places().mount()));
        assert_eq!(target_of(&format!("# {line}")), None);
        assert_eq!(target_of(""), None);
    }

    fn run(commands: &[String], file: &Path) -> String {
        let script = format!("set -eu\n{}", commands.join("\n"));
        let status = std::process::Command::new("sh")
            .args(["-c", &script])
            .status();
        assert!(status.unwrap().success(), "{script}");
        fs::read_to_string(file).unwrap()
    }

    /// Runs what `write` and `remove` say and returns the file after each.
    fn written_and_removed(before: &str) -> (String, String) {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("fstab");
        fs::write(&file, before).unwrap();
        let boot = BootPlaces::or_else(None, Some(file.clone()));
        let run = |commands: &[String]| run(commands, &file);
        assert_eq!(boot.find(places().mount()), None);
        let written = run(&boot.write(&places(), FileSystem::Btrfs));
        assert_eq!(set_up_pools(&boot), [places().mount()]);
        let found = boot.find(places().mount()).unwrap();
        assert!(found.is_ours());
        (written, run(&found.remove()))
    }

    #[test]
    fn fstab_gets_two_lines_and_loses_only_them() {
        for before in [
            "",
            "# a\nUUID=1 / ext4 defaults 0 1\n",
            "UUID=1 / ext4 defaults 0 1",
        ] {
            let (written, removed) = written_and_removed(before);
            assert!(written.starts_with(before), "{written}");
            assert!(written.ends_with(" 0 0\n"), "{written}");
            assert_eq!(
                written.lines().count(),
                before.lines().count() + 2,
                "{written}"
            );
            assert_eq!(removed, before);
        }
    }

    #[test]
    fn what_an_older_version_wrote_is_renewed_in_its_place() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("fstab");
        fs::write(&file, "# first\n").unwrap();
        let boot = BootPlaces::or_else(None, Some(file.clone()));
        let find = || boot.find(places().mount()).unwrap();
        let older = run(&boot.write(&places(), FileSystem::Btrfs), &file) + "# last";
        fs::write(&file, &older).unwrap();
        assert!(boot.renew(&find(), &places(), FileSystem::Btrfs).is_empty());
        let renewed = run(&boot.renew(&find(), &places(), FileSystem::Xfs), &file);
        let line = |fs| fstab_line(&places(), fs);
        assert_eq!(
            renewed,
            older.replace(&line(FileSystem::Btrfs), &line(FileSystem::Xfs))
        );
        assert!(boot.renew(&find(), &places(), FileSystem::Xfs).is_empty());

        let units = BootPlaces::or_else(Some(dir.path().into()), None);
        let find = || units.find(places().mount()).unwrap();
        let unit = dir.path().join(unit_name(places().mount()));
        run(&units.write(&places(), FileSystem::Btrfs), &unit);
        assert!(
            units
                .renew(&find(), &places(), FileSystem::Btrfs)
                .is_empty()
        );
        run(&units.renew(&find(), &places(), FileSystem::Xfs), &unit);
        assert!(units.renew(&find(), &places(), FileSystem::Xfs).is_empty());
    }

    #[test]
    fn a_line_that_a_person_wrote_is_seen_and_is_not_ours() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("fstab");
        fs::write(&file, fstab_line(&places(), FileSystem::Btrfs) + "\n").unwrap();
        let boot = BootPlaces::or_else(None, Some(file));
        let found = boot.find(places().mount()).unwrap();
        assert!(!found.is_ours());
        assert!(set_up_pools(&boot).is_empty());
    }
}
