//! What is still to be done to a pool, as shell commands that people can read.
//!
//! A plan follows from what was [`Observed`] alone. Each of its groups may be run,
//! interrupted anywhere, and planned anew: what is done is left out then.

use std::fmt::Write as _;
use std::path::Path;

use super::{
    BootPlaces, FileSystem, Image, MountPoint, NOT_MOUNTED, Observed, Refused, SMALLEST_BYTES,
};
use crate::storage::Bytes;
use crate::types::Owner;

/// Room that a file system may leave unused at the end of its device.
const SLACK_BYTES: u64 = 16 << 20;

/// Steps in their order.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Plan {
    steps: Vec<Step>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
struct Step {
    as_root: bool,
    /// A comment's line.
    what: String,
    commands: Vec<String>,
}

/// Steps that one shell runs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Group {
    pub as_root: bool,
    /// For sh(1); needs no arguments and reads nothing.
    pub script: String,
}

impl Plan {
    /// Whether all is done.
    pub fn is_empty(&self) -> bool {
        self.steps.is_empty()
    }

    fn step(&mut self, as_root: bool, what: impl Into<String>, commands: Vec<String>) {
        self.steps.push(Step {
            as_root,
            what: what.into(),
            commands,
        });
    }

    /// The steps, those together that the same user runs one after the other.
    pub fn groups(&self) -> Vec<Group> {
        self.steps
            .chunk_by(|a, b| a.as_root == b.as_root)
            .map(|steps| Group {
                as_root: steps[0].as_root,
                script: script(steps),
            })
            .collect()
    }
}

fn script(steps: &[Step]) -> String {
    // mkfs and losetup lie where a user's shell may not look.
    let mut text = String::from("set -eu\nPATH=$PATH:/usr/sbin:/sbin\n");
    for step in steps {
        write!(text, "\n# {}\n", step.what).expect("a string takes all");
        for command in &step.commands {
            text.push_str(command);
            text.push('\n');
        }
    }
    text
}

/// What is wanted of a pool to be set up.
#[derive(Debug, Clone)]
pub struct SetUp {
    /// None: as large as it is, or [`super::DEFAULT_SIZE_BYTES`].
    pub size_bytes: Option<u64>,
    /// None: whichever it has, or `default_file_system`.
    pub file_system: Option<FileSystem>,
    pub default_file_system: FileSystem,
    pub default_size_bytes: u64,
    /// Who works in the pool, and the mode of its top folder.
    pub owner: Owner,
    pub mode: u32,
}

impl SetUp {
    /// The size that a file made now would get.
    pub fn new_size_bytes(&self, image: &Image) -> u64 {
        self.size_bytes.unwrap_or(match image {
            Image::Empty { size_bytes } if *size_bytes >= SMALLEST_BYTES => *size_bytes,
            _ => self.default_size_bytes,
        })
    }
}

/// What is still to be done until the pool stands.
pub fn set_up(found: &Observed, want: &SetUp, boot: &BootPlaces) -> Result<Plan, Refused> {
    let places = &found.places;
    let mount = quoted_path(places.mount());
    if found.is_being_removed {
        return Err(Refused::new(
            format!("the pool {} is being removed", places.mount().display()),
            format!("dbranch storage remove --path {mount}, which finishes that"),
        ));
    }
    must_be_free(found)?;
    let mut plan = Plan::default();
    let own = found.runs_as_root();
    let file_system = match &found.image {
        Image::Foreign { why } => return Err(foreign(&places.image(), why)),
        Image::Missing | Image::Empty { .. } => {
            let file_system = want.file_system.unwrap_or(want.default_file_system);
            make_image(&mut plan, found, want, file_system)?;
            file_system
        }
        Image::Ready {
            file_system,
            size_bytes,
            ..
        } => {
            must_be_as_wanted(found, want, *file_system, *size_bytes)?;
            if found.is_partial {
                let remove = format!("rm {}", quoted_path(&places.partial()));
                plan.step(own, "an earlier run's other name of the file", vec![remove]);
            }
            *file_system
        }
    };
    let mounted = found.mounted();
    if mounted.is_none() && found.mount_point != (MountPoint::Free { is_marked: true }) {
        let text = format!(
            "Nothing is mounted here now. `dbranch storage setup --path {mount}` mounts {} again.",
            quoted_path(&places.image())
        );
        let commands = vec![
            format!("mkdir -p {mount}"),
            format!(
                "echo {} > {}",
                quoted(&text),
                quoted_path(&places.mount().join(NOT_MOUNTED))
            ),
        ];
        plan.step(own, "the folder it is mounted on", commands);
    }
    let commands = match &found.at_boot {
        None => boot.write(places, file_system),
        Some(at_boot) => boot.renew(at_boot, places, file_system),
    };
    if !commands.is_empty() {
        plan.step(true, "mount it whenever this machine starts", commands);
    }
    if mounted.is_none() {
        let command = boot.mount(places, file_system);
        plan.step(true, "mount it now", vec![command]);
    }
    if mounted.is_none_or(|m| m.owner != want.owner || m.mode != want.mode) {
        let Owner { uid, gid } = want.owner;
        let commands = vec![
            format!("chown {uid}:{gid} {mount}"),
            format!("chmod {:o} {mount}", want.mode),
        ];
        plan.step(true, "give it to whoever works in it", commands);
    }
    Ok(plan)
}

/// The file gets its name when all is in it, by link(2), which replaces nothing. So whatever bears
/// the name is whole, and what bears the other one can be made anew.
fn make_image(
    plan: &mut Plan,
    found: &Observed,
    want: &SetUp,
    file_system: FileSystem,
) -> Result<(), Refused> {
    let size = want.new_size_bytes(&found.image);
    if size < SMALLEST_BYTES {
        return Err(Refused::new(
            format!("a pool of {} is too small", Bytes(size)),
            format!("give `--size` at least {}", Bytes(SMALLEST_BYTES)),
        ));
    }
    let places = &found.places;
    let (image, part) = (quoted_path(&places.image()), quoted_path(&places.partial()));
    let own = found.runs_as_root();
    let mut commands = vec![
        format!("mkdir -p {}", quoted_path(places.parent())),
        format!("rm -f {part}"),
        format!("truncate -s {size} {part}"),
        format!("chmod 600 {part}"),
    ];
    if own && want.owner.uid != 0 {
        commands.push(format!(
            "chown {}:{} {part}",
            want.owner.uid, want.owner.gid
        ));
    }
    commands.push(format!(
        "{} {} {part} >/dev/null",
        file_system.mkfs(),
        file_system.mkfs_options()
    ));
    commands.push(format!("sync {part}"));
    if matches!(found.image, Image::Empty { .. }) {
        commands.push(format!("rm {image}"));
    }
    commands.push(format!("ln {part} {image}"));
    commands.push(format!("rm {part}"));
    let what = format!(
        "a file of {} with {file_system} in it; it takes room as it is filled",
        Bytes(size)
    );
    plan.step(own, what, commands);
    Ok(())
}

fn must_be_free(found: &Observed) -> Result<(), Refused> {
    let folder = found.places.mount().display();
    let hint = "choose another folder with `--path`";
    match &found.mount_point {
        MountPoint::Occupied { by } => Err(Refused::new(
            format!("{folder} can't be mounted on: {by}"),
            format!("move that elsewhere, or {hint}"),
        )),
        MountPoint::Mounted(m) if !m.is_ours => Err(Refused::new(
            format!(
                "{} ({}) is mounted on {folder} already",
                m.source, m.file_system
            ),
            hint,
        )),
        _ => Ok(()),
    }
}

fn foreign(image: &Path, why: &str) -> Refused {
    Refused::new(
        format!("{} is there and is no pool: {why}", image.display()),
        "it is left as it is; move it elsewhere, or choose another folder with `--path`",
    )
}

fn must_be_as_wanted(
    found: &Observed,
    want: &SetUp,
    has: FileSystem,
    size_bytes: u64,
) -> Result<(), Refused> {
    let pool = found.places.mount();
    if let Some(other) = want.file_system.filter(|fs| *fs != has) {
        return Err(Refused::new(
            format!("the pool {} has {has}, not {other}", pool.display()),
            "leave out `--fs`, or choose another folder with `--path`",
        ));
    }
    match want.size_bytes {
        Some(more) if more > size_bytes => Err(Refused::new(
            format!(
                "the pool {} is there already, with {}",
                pool.display(),
                Bytes(size_bytes)
            ),
            format!(
                "dbranch storage grow --size {}G --path {}",
                more.div_ceil(1 << 30),
                quoted_path(pool)
            ),
        )),
        Some(less) if less < size_bytes => Err(cannot_shrink(pool, size_bytes)),
        _ => Ok(()),
    }
}

fn cannot_shrink(pool: &Path, size_bytes: u64) -> Refused {
    Refused::new(
        format!(
            "the pool {} has {} and can't be made smaller",
            pool.display(),
            Bytes(size_bytes)
        ),
        "its file takes only what is in it: delete branches to free room (dbranch usage)",
    )
}

/// What is still to be done until the pool has `size_bytes`. It may be in use meanwhile.
pub fn grow(found: &Observed, size_bytes: u64) -> Result<Plan, Refused> {
    let pool = found.places.mount();
    let (
        Some(mounted),
        Image::Ready {
            file_system,
            size_bytes: now,
            ..
        },
    ) = (found.mounted(), &found.image)
    else {
        return Err(not_mounted(found));
    };
    if size_bytes < *now {
        return Err(cannot_shrink(pool, *now));
    }
    let mut plan = Plan::default();
    let (image, mount) = (quoted_path(&found.places.image()), quoted_path(pool));
    if size_bytes > *now {
        let command = format!("truncate -s {size_bytes} {image}");
        let what = format!(
            "a larger file; it takes no more room until that is filled: {}",
            Bytes(size_bytes)
        );
        plan.step(found.runs_as_root(), what, vec![command]);
    }
    // A size that is no multiple of the file system's blocks leaves a rest.
    if mounted.device_bytes + SLACK_BYTES < size_bytes
        || mounted.file_system_bytes + SLACK_BYTES < size_bytes
    {
        let commands = vec![
            format!("losetup -c {}", quoted(&mounted.source)),
            match file_system {
                FileSystem::Btrfs => format!("btrfs filesystem resize max {mount} >/dev/null"),
                FileSystem::Xfs => format!("xfs_growfs {mount} >/dev/null"),
            },
        ];
        plan.step(true, "let the file system use all of it", commands);
    }
    Ok(plan)
}

fn not_mounted(found: &Observed) -> Refused {
    let pool = found.places.mount();
    if !found.is_anything() {
        return Refused::new(
            format!("no pool is set up in {}", pool.display()),
            "dbranch storage status shows the pools; name one with `--path`",
        );
    }
    Refused::new(
        format!("the pool {} is not mounted", pool.display()),
        format!(
            "dbranch storage setup --path {} mounts it",
            quoted_path(pool)
        ),
    )
}

/// What is still to be done until nothing is left of a pool. The caller has made sure that
/// nothing is in it.
pub fn remove(found: &Observed) -> Result<Plan, Refused> {
    let places = &found.places;
    must_be_free(found)?;
    if !found.is_anything() {
        return Err(not_mounted(found));
    }
    match &found.image {
        Image::Foreign { why } => return Err(foreign(&places.image(), why)),
        // What is in it can't be seen.
        Image::Ready { .. } if found.mounted().is_none() => return Err(not_mounted(found)),
        _ => {}
    }
    if let Some(at_boot) = found.at_boot.as_ref().filter(|b| !b.is_ours()) {
        return Err(Refused::new(
            format!(
                "{} mounts {}, and dbranch did not write that",
                at_boot.file().display(),
                places.mount().display()
            ),
            "take it out by hand, then try again",
        ));
    }
    let own = found.runs_as_root();
    let mut plan = Plan::default();
    let (image, removed) = (quoted_path(&places.image()), quoted_path(&places.removed()));
    if matches!(found.image, Image::Ready { .. }) {
        let command = format!("mv {image} {removed}");
        plan.step(own, "from here on no branch is made there", vec![command]);
    }
    if found.mounted().is_some() {
        let command = format!("umount {}", quoted_path(places.mount()));
        plan.step(true, "unmount it", vec![command]);
    }
    if let Some(at_boot) = &found.at_boot {
        let what = "don't mount it any more when this machine starts";
        plan.step(true, what, at_boot.remove());
    }
    let mut commands = Vec::new();
    if found.mount_point != MountPoint::Missing {
        let mount = places.mount();
        commands.push(format!("rm -f {}", quoted_path(&mount.join(NOT_MOUNTED))));
        commands.push(format!("rmdir {}", quoted_path(mount)));
    }
    let files = [places.partial(), places.image(), places.removed()];
    let files: Vec<String> = files.iter().map(|file| quoted_path(file)).collect();
    // The last name to go is the one that says what is going on.
    commands.extend(
        [
            format!("rm -f {} {}", files[0], empty_image(found, &files[1])),
            format!("rm -f {}", files[2]),
        ]
        .map(|c| c.trim_end().to_owned()),
    );
    plan.step(own, "the file itself", commands);
    Ok(plan)
}

/// An image without a byte in it goes too; one with data has another name by now.
fn empty_image(found: &Observed, image: &str) -> String {
    if matches!(found.image, Image::Empty { .. }) {
        image.to_owned()
    } else {
        String::new()
    }
}

impl Observed {
    /// Whether even what lies beside the mount point takes root.
    fn runs_as_root(&self) -> bool {
        nix::unistd::geteuid().is_root() || !self.may_write
    }
}

/// A path as one word of sh.
pub fn quoted_path(path: &Path) -> String {
    quoted(&path.display().to_string())
}

/// A text as one word of sh, in quotes only where it needs them.
pub fn quoted(text: &str) -> String {
    let is_plain = |c: char| c.is_ascii_alphanumeric() || "/._-+:@%,=".contains(c);
    if !text.is_empty() && text.chars().all(is_plain) {
        text.to_owned()
    } else {
        format!("'{}'", text.replace('\'', r"'\''"))
    }
}

#[cfg(test)]
mod tests;
