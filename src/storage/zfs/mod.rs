//! The ZFS driver: a volume is a dataset, a clone is `zfs snapshot` and `zfs clone`.
//!
//! The pool folder is where one dataset is mounted; volumes are datasets right
//! below it. Only datasets that bear our mark are ever destroyed, one by one:
//! nothing here destroys recursively. A clone needs a snapshot of its source for
//! as long as it lives, and each has one of its own. A volume whose clones live on
//! is destroyed by promoting one of them first; the snapshots go with their clones.

use std::ffi::OsStr;
use std::fs::{self, Permissions};
use std::io::{self, ErrorKind};
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use nix::unistd::{Uid, User};

use self::dataset::{Dataset, MARK, Step};
use self::place::Place;
use self::program::{Failure, Kind, Program};
use super::pool::{self, Pool};
use super::{
    CloneMethod, Consistency, DriverKind, Omit, Progress, Space, StorageDriver, StorageError, Usage,
};
use crate::types::VolumeId;

mod dataset;
mod place;
mod program;
#[cfg(test)]
pub(super) mod testing;
#[cfg(test)]
mod tests;
mod usage;

/// Prefix of the volumes that probing makes; no id has a dash.
const PROBE: &str = "probe-";

/// What ZFS wants free before it makes a dataset, roughly: it says only that it hasn't got it.
const METADATA_BYTES: u64 = 16 << 20;

/// How long a dataset may be busy before that is an error: whoever used it has been told to stop.
const BUSY_LIMIT: Duration = Duration::from_secs(10);

/// The same for one that is unmounted already: zfs-fuse lets go of it some moments later, when
/// it has written what there was to write.
const UNMOUNTED_LIMIT: Duration = Duration::from_secs(60);

/// What a user needs to be allowed with `zfs allow` (zfs-allow(8)).
const PERMISSIONS: &str = "create,clone,destroy,mount,promote,snapshot,userprop";

#[derive(Debug)]
pub(super) struct Zfs {
    pool: Pool,
    program: Program,
    /// The one that is mounted at the pool folder.
    dataset: String,
    /// Destroying looks at what depends on what, and must not see it change.
    destroying: Mutex<()>,
    busy_limit: Duration,
}

impl Zfs {
    /// Whether a folder lies on ZFS.
    pub(super) fn is_at(folder: &Path) -> bool {
        place::of(folder).is_ok_and(|place| place != Place::NotZfs)
    }

    /// Finds the dataset of the pool folder, and tries there what the user may do.
    /// `Unsupported` says why it can't be used; a dataset that is not mounted is
    /// `Denied`, as other drivers must not write into the folder beneath it.
    pub(super) fn open(pool: Pool) -> Result<Self, StorageError> {
        let unsupported = |reason: String| StorageError::Unsupported {
            driver: DriverKind::Zfs,
            path: pool.path().to_owned(),
            reason,
        };
        let program = Program::find();
        let place = place::of(pool.path())
            .map_err(StorageError::io("read the file system of", pool.path()))?;
        let dataset = match place {
            Place::Root(dataset) => dataset,
            elsewhere => {
                let unmounted = program
                    .as_ref()
                    .and_then(|program| place::unmounted_at(program, pool.path()));
                if let Some(dataset) = unmounted {
                    return Err(not_mounted(&dataset, pool.path()));
                }
                let name = pool::file_system_name(pool.path());
                return Err(unsupported(match elsewhere {
                    Place::Inside(around) => format!(
                        "it is a folder in the dataset {around}, not one of its own; make one: {}",
                        new_dataset(&around, pool.path())
                    ),
                    _ => format!("the file system is {name}"),
                }));
            }
        };
        let Some(program) = program else {
            return Err(unsupported(
                "the program `zfs` is missing: apt install zfsutils-linux".into(),
            ));
        };
        let driver = Self {
            pool,
            program,
            dataset,
            destroying: Mutex::new(()),
            busy_limit: BUSY_LIMIT,
        };
        let _in_use = driver.pool.in_use()?;
        let reason = match driver.probe() {
            // In a full pool branches must still be shown and deleted.
            Ok(()) | Err(StorageError::NoRoom { .. }) => return Ok(driver),
            Err(StorageError::Denied { hint, .. }) => format!("no permission: {hint}"),
            Err(e) => e.to_string(),
        };
        Err(StorageError::Unsupported {
            driver: DriverKind::Zfs,
            path: driver.pool.path().to_owned(),
            reason,
        })
    }

    /// The command that mounts the dataset whose mount point a folder is, if there is one.
    pub(super) fn command_to_mount(folder: &Path) -> Option<String> {
        let dataset = place::unmounted_at(&Program::find()?, folder)?;
        Some(super::as_root(&format!("zfs mount {dataset}")))
    }

    /// Root can do everything or nothing; what a user may do only trying tells.
    fn probe(&self) -> Result<(), StorageError> {
        if Uid::effective().is_root() {
            let asked = self
                .program
                .run(&["list", "-H", "-o", "name", &self.dataset]);
            return match asked {
                Ok(_) => Ok(()),
                Err(e) => Err(self.refusal("use", self.pool.path(), e)),
            };
        }
        let stem = VolumeId::random();
        let (first, second) = (format!("{PROBE}{stem}a"), format!("{PROBE}{stem}b"));
        let tried = self
            .create(&first)
            .and_then(|_| self.clone_dataset(&first, &second))
            .and_then(|()| self.remove(&first));
        let swept = [second, first].map(|name| self.remove(&name));
        tried?;
        swept.into_iter().collect()
    }

    fn name_of(&self, volume: &str) -> String {
        format!("{}/{volume}", self.dataset)
    }

    fn path_of(&self, volume: &str) -> PathBuf {
        self.pool.path().join(volume)
    }

    /// Serialises what destroys.
    fn destroying(&self) -> MutexGuard<'_, ()> {
        self.destroying
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    fn create(&self, volume: &str) -> Result<PathBuf, StorageError> {
        let (name, path) = (self.name_of(volume), self.path_of(volume));
        self.make(volume, &["create"], &[&name])?;
        let finish = || {
            let folder = pool::open_folder(&path)?;
            folder
                .set_permissions(Permissions::from_mode(0o700))
                .map_err(StorageError::io("set the mode of", &path))?;
            self.pool.give_to_owner(&folder, &path)
        };
        if let Err(error) = finish() {
            let _ = self.remove(volume);
            return Err(error);
        }
        Ok(path)
    }

    /// Two calls of the program, and no look before them: git waits for this.
    fn clone_dataset(&self, from: &str, to: &str) -> Result<(), StorageError> {
        let source = self.name_of(from);
        let snapshot = dataset::snapshot_for(&source, to);
        self.program
            .run(&["snapshot", &snapshot])
            .map_err(|e| self.refusal("snapshot", &self.path_of(from), e))?;
        let made = self.make(to, &["clone"], &[&snapshot, &self.name_of(to)]);
        if made.is_err() {
            self.destroy_snapshot(&snapshot);
        }
        made
    }

    /// Makes a marked dataset by `create` or `clone` and sees to it that it is mounted.
    fn make(&self, volume: &str, verb: &[&str], rest: &[&str]) -> Result<(), StorageError> {
        let path = self.path_of(volume);
        let mark = format!("{MARK}={volume}");
        // Automatic snapshots of branches would keep what has been deleted from being freed.
        let options = ["-o", &mark, "-o", "com.sun:auto-snapshot=false"];
        match self.program.run(&[verb, &options, rest].concat()) {
            Ok(_) => {}
            Err(e) if e.kind == Kind::MadeUnmounted => {}
            Err(e) if e.kind == Kind::Exists => return Err(self.exists(volume)),
            Err(e) => {
                // It may have been made and not mounted.
                let _ = self.remove(volume);
                return Err(self.refusal("create", &path, e));
            }
        }
        let mounted = self.mount(volume);
        if mounted.is_err() {
            let _ = self.remove(volume);
        }
        mounted
    }

    fn exists(&self, volume: &str) -> StorageError {
        match VolumeId::new(volume) {
            Ok(id) => StorageError::Exists {
                id,
                pool: self.pool.path().to_owned(),
            },
            Err(_) => {
                StorageError::io("create", &self.path_of(volume))(ErrorKind::AlreadyExists.into())
            }
        }
    }

    /// Whether something is mounted in the volume's place.
    fn is_mounted(&self, volume: &str) -> Result<bool, StorageError> {
        let device = |path: &Path| match fs::symlink_metadata(path) {
            Ok(meta) => Ok(Some(meta.dev())),
            Err(e) if e.kind() == ErrorKind::NotFound => Ok(None),
            Err(e) => Err(StorageError::io("read", path)(e)),
        };
        let of_volume = device(&self.path_of(volume))?;
        Ok(of_volume.is_some() && of_volume != device(self.pool.path())?)
    }

    fn mount(&self, volume: &str) -> Result<(), StorageError> {
        if self.is_mounted(volume)? {
            return Ok(());
        }
        let path = self.path_of(volume);
        match self.program.run_as_root(&["mount", &self.name_of(volume)]) {
            Ok(_) => {}
            Err(e) if e.kind == Kind::AlreadyMounted => {}
            Err(e) => return Err(self.refusal("mount", &path, e)),
        }
        if self.is_mounted(volume)? {
            return Ok(());
        }
        Err(StorageError::io("mount", &path)(io::Error::other(format!(
            "it is mounted elsewhere; volumes must inherit their mountpoint: zfs inherit \
             mountpoint {}",
            self.name_of(volume)
        ))))
    }

    /// Destroys a volume, whatever depends on it, and the snapshot it was cloned from.
    fn remove(&self, volume: &str) -> Result<(), StorageError> {
        // A link or a file in its place is not ours.
        let folder = self.pool.existing(OsStr::new(volume))?;
        let _turn = self.destroying();
        let (name, path) = (self.name_of(volume), self.path_of(volume));
        let failed = |e| self.refusal("destroy", &path, e);
        loop {
            let Some((own, step)) = self.next_step(&name, &path)? else {
                return remove_folder(folder);
            };
            match step {
                Step::Promote(clone) => {
                    self.program.run(&["promote", &clone]).map_err(failed)?;
                }
                Step::DestroySnapshot(snapshot) => {
                    match self.program.run(&["destroy", &snapshot]) {
                        Ok(_) => {}
                        Err(e) if e.kind == Kind::HasClones => {
                            return Err(in_the_way(&path, &e.named()));
                        }
                        Err(e) => return Err(failed(e)),
                    }
                }
                Step::Refuse(others) => return Err(in_the_way(&path, &others)),
                Step::Destroy => {
                    self.destroy_leaf(volume)?;
                    if let Some(origin) = &own.origin
                        && dataset::is_our_snapshot(origin, &self.dataset)
                    {
                        self.destroy_snapshot(origin);
                    }
                    return Ok(());
                }
            }
        }
    }

    /// What the way to destroying a volume begins with, and the volume; nothing when there
    /// is no such dataset.
    fn next_step(&self, name: &str, path: &Path) -> Result<Option<(Dataset, Step)>, StorageError> {
        let failed = |e| self.refusal("destroy", path, e);
        let listed = Dataset::list(&self.program, name, "1", "filesystem,volume,snapshot");
        let mut listed = match listed {
            Err(e) if e.kind == Kind::NoSuchDataset => return Ok(None),
            listed => listed.map_err(failed)?,
        };
        if listed.is_empty() {
            return Ok(None);
        }
        let own = listed.remove(0);
        if !own.is_ours() {
            let volume = name.rsplit('/').next().unwrap_or_default();
            return Err(StorageError::Denied {
                action: "destroy",
                path: path.to_owned(),
                hint: format!(
                    "the dataset {name} lacks the property {MARK}={volume}, so dbranch did not make \
                     it; move it out of {}",
                    self.dataset
                ),
            });
        }
        let siblings = if listed.is_empty() {
            Vec::new()
        } else {
            Dataset::list(&self.program, &self.dataset, "1", "filesystem").map_err(failed)?
        };
        let step = dataset::next_step(&listed, &siblings, &self.dataset);
        Ok(Some((own, step)))
    }

    /// Destroys a dataset that nothing depends on, and waits while it is still busy.
    fn destroy_leaf(&self, volume: &str) -> Result<(), StorageError> {
        let (name, path) = (self.name_of(volume), self.path_of(volume));
        let begun = Instant::now();
        let has_time = || {
            let is_mounted = self.is_mounted(volume).unwrap_or(true);
            begun.elapsed()
                < if is_mounted {
                    self.busy_limit
                } else {
                    UNMOUNTED_LIMIT
                }
        };
        let mut pause = Duration::from_millis(5);
        let failure = loop {
            let tried = self
                .unmount_as_user(volume)
                .and_then(|()| self.program.run(&["destroy", &name]));
            match tried {
                Ok(_) => break None,
                Err(e) if e.kind == Kind::NoSuchDataset => break None,
                Err(e) if e.kind == Kind::Busy && has_time() => {
                    thread::sleep(pause);
                    pause = (pause * 2).min(Duration::from_millis(200));
                }
                Err(e) => break Some(e),
            }
        };
        let Some(failure) = failure else {
            let folder = self.pool.existing(OsStr::new(volume))?;
            return remove_folder(folder);
        };
        // A volume that could not be destroyed stays one that can be used.
        if let Err(e) = self.mount(volume) {
            tracing::warn!(volume = %path.display(), "mount it again: {e}");
        }
        Err(self.refusal("destroy", &path, failure))
    }

    /// Root's `zfs destroy` unmounts by itself; a user's can't.
    fn unmount_as_user(&self, volume: &str) -> Result<(), Failure> {
        if Uid::effective().is_root() || !self.is_mounted(volume).unwrap_or(true) {
            return Ok(());
        }
        match self
            .program
            .run_as_root(&["unmount", &self.name_of(volume)])
        {
            Err(e) if e.kind != Kind::NotMounted => Err(e),
            _ => Ok(()),
        }
    }

    /// Destroys a snapshot if no clone needs it any more. What stays, a sweep takes. Says
    /// whether it is gone.
    fn destroy_snapshot(&self, snapshot: &str) -> bool {
        match self.program.run(&["destroy", snapshot]) {
            Ok(_) => true,
            Err(e) => {
                tracing::debug!(snapshot, "stays for now: {e}");
                e.kind == Kind::NoSuchDataset
            }
        }
    }

    /// What a failed call means.
    fn refusal(&self, action: &'static str, path: &Path, failure: Failure) -> StorageError {
        let denied = |hint: String| StorageError::Denied {
            action,
            path: path.to_owned(),
            hint,
        };
        let free_bytes = || self.pool.space().map_or(0, |s| s.free_bytes);
        let no_room = || StorageError::NoRoom {
            path: self.pool.path().to_owned(),
            needed_bytes: METADATA_BYTES,
            free_bytes: free_bytes(),
        };
        match failure.kind {
            Kind::Denied => denied(self.what_to_allow(&failure)),
            Kind::ReadOnly => denied(format!(
                "the dataset is read-only: zfs set readonly=off {}",
                self.dataset
            )),
            Kind::Busy => denied(format!(
                "something uses it: fuser -vm {} shows what ({})",
                path.display(),
                failure.said()
            )),
            Kind::NoRoom => no_room(),
            Kind::NoMountPoint if free_bytes() < METADATA_BYTES => no_room(),
            _ => StorageError::io(action, path)(failure.into()),
        }
    }

    fn what_to_allow(&self, failure: &Failure) -> String {
        let said = failure.said();
        let uid = Uid::effective();
        if uid.is_root() {
            return said;
        }
        let user = User::from_uid(uid)
            .ok()
            .flatten()
            .map_or_else(|| uid.to_string(), |user| user.name);
        let (zfs, dataset) = (self.program.path().display(), &self.dataset);
        format!(
            "as root, `zfs allow {user} {PERMISSIONS} {dataset}`, and since Linux lets only root mount, \
             a line in sudoers (visudo): `{user} ALL=(root) NOPASSWD: {zfs} mount {dataset}/*, {zfs} \
             unmount {dataset}/*` ({said})"
        )
    }

    /// A volume must be a dataset, and mounted; it is mounted again when it is not, as after a
    /// restart of the machine.
    fn must_be_a_volume(&self, id: &VolumeId) -> Result<(), StorageError> {
        let volume = id.as_str();
        if self.is_mounted(volume)? {
            return Ok(());
        }
        let (name, path) = (self.name_of(volume), self.path_of(volume));
        match Dataset::list(&self.program, &name, "0", "filesystem") {
            Ok(_) => self.mount(volume),
            Err(e) if e.kind == Kind::NoSuchDataset => {
                self.pool.must_exist(id)?;
                Err(StorageError::Unsupported {
                    driver: DriverKind::Zfs,
                    path,
                    reason: "this volume is a plain folder, made by the driver `copy`".into(),
                })
            }
            Err(e) => Err(self.refusal("read", &path, e)),
        }
    }
}

/// Removes the empty folder that a dataset was mounted at: zfs leaves it at times.
fn remove_folder(folder: Option<PathBuf>) -> Result<(), StorageError> {
    let Some(path) = folder else { return Ok(()) };
    match fs::remove_dir(&path) {
        Err(e) if e.kind() == ErrorKind::DirectoryNotEmpty => Err(StorageError::Denied {
            action: "destroy",
            hint: "it is a folder with files in it and no dataset, so the driver `zfs` did not \
                   make it; move it out of the pool"
                .into(),
            path,
        }),
        Err(e) if e.kind() != ErrorKind::NotFound => Err(StorageError::io("destroy", &path)(e)),
        _ => Ok(()),
    }
}

/// What others made that depends on a volume: named, never touched.
fn in_the_way(path: &Path, others: &[String]) -> StorageError {
    let (snapshots, datasets): (Vec<&str>, Vec<&str>) = others
        .iter()
        .map(String::as_str)
        .partition(|name| name.contains('@'));
    let mut ways = Vec::new();
    if !snapshots.is_empty() {
        ways.push(format!("zfs destroy {}", snapshots.join("; zfs destroy ")));
    }
    for dataset in datasets {
        ways.push(format!("zfs promote {dataset} (or zfs destroy {dataset})"));
    }
    StorageError::Denied {
        action: "destroy",
        path: path.to_owned(),
        hint: format!(
            "dbranch did not make what depends on it, and won't destroy it: {}; if you no longer \
             need that: {}",
            others.join(", "),
            ways.join("; ")
        ),
    }
}

/// The command that makes a dataset of its own for a pool. Its records are of 16 KiB: with those of
/// ZFS's own choice a page that changes costs a branch 128 KiB, with smaller ones all data takes
/// more room.
fn new_dataset(around: &str, folder: &Path) -> String {
    format!(
        "zfs create -o mountpoint={} -o recordsize=16k -o compression=on -o atime=off {around}/dbranch",
        folder.display()
    )
}

fn not_mounted(dataset: &str, path: &Path) -> StorageError {
    StorageError::Denied {
        action: "use",
        path: path.to_owned(),
        hint: format!(
            "the dataset {dataset} is not mounted: zfs mount {dataset}, or all of them: zfs mount -a"
        ),
    }
}

impl StorageDriver for Zfs {
    fn kind(&self) -> DriverKind {
        DriverKind::Zfs
    }

    fn pool(&self) -> &Path {
        self.pool.path()
    }

    fn consistency(&self) -> Consistency {
        Consistency::Atomic
    }

    fn shares_blocks(&self) -> bool {
        true
    }

    fn create_volume(&self, id: &VolumeId) -> Result<PathBuf, StorageError> {
        let _in_use = self.pool.in_use()?;
        self.pool.must_be_free(id)?;
        self.create(id.as_str())
    }

    fn make_reachable(&self, id: &VolumeId) -> Result<(), StorageError> {
        match self.must_be_a_volume(id) {
            Err(StorageError::Missing { .. }) => Ok(()),
            reached => reached,
        }
    }

    fn clone_volume(
        &self,
        from: &VolumeId,
        to: &VolumeId,
        _omit: Omit,
        _progress: Progress<'_>,
    ) -> Result<CloneMethod, StorageError> {
        let _in_use = self.pool.in_use()?;
        self.must_be_a_volume(from)?;
        self.pool.must_be_free(to)?;
        self.clone_dataset(from.as_str(), to.as_str())?;
        Ok(CloneMethod::ZfsClone)
    }

    fn catch_up(&self, _from: &VolumeId, _to: &VolumeId, _path: &Path) -> Result<(), StorageError> {
        Ok(())
    }

    fn check_destroy(&self, id: &VolumeId) -> Result<(), StorageError> {
        let path = self.volume_path(id);
        match self.next_step(&self.name_of(id.as_str()), &path)? {
            Some((_, Step::Refuse(others))) => Err(in_the_way(&path, &others)),
            _ => Ok(()),
        }
    }

    fn destroy(&self, id: &VolumeId) -> Result<(), StorageError> {
        let _in_use = self.pool.in_use()?;
        self.remove(id.as_str())
    }

    fn list(&self) -> Result<Vec<VolumeId>, StorageError> {
        let listed = Dataset::list(&self.program, &self.dataset, "1", "filesystem")
            .map_err(|e| self.refusal("list", self.pool.path(), e))?;
        Ok(listed.iter().filter_map(Dataset::volume).collect())
    }

    /// Also mounts volumes that are not mounted, after a restart of the machine or when the
    /// call that made them was interrupted: a dataset that exists is whole.
    fn sweep(&self) -> Result<usize, StorageError> {
        let list = || {
            let types = "filesystem,snapshot";
            Dataset::list(&self.program, &self.dataset, "2", types)
                .map_err(|e| self.refusal("list", self.pool.path(), e))
        };
        let mut swept = 0;
        let mut all = list()?;
        // Others may be in the middle of a clone; mounting disturbs nobody.
        let alone = self.pool.alone()?;
        if alone.is_some() {
            for probe in all.iter().filter(|d| d.is_ours()) {
                let name = probe.name.rsplit('/').next().unwrap_or_default();
                if name.starts_with(PROBE) {
                    self.remove(name)?;
                    swept += 1;
                }
            }
            all = list()?;
            let turn = self.destroying();
            swept += dataset::orphans(&all, &self.dataset)
                .into_iter()
                .filter(|orphan| self.destroy_snapshot(orphan))
                .count();
            drop(turn);
        }
        let volumes: Vec<VolumeId> = all.iter().filter_map(Dataset::volume).collect();
        for volume in &volumes {
            if let Err(e) = self.mount(volume.as_str()) {
                tracing::warn!(%volume, "mount it: {e}");
            }
        }
        for folder in self.pool.volumes()? {
            // Empty, or it stays: what has files is no mount point of ours.
            let is_left = alone.is_some() && !volumes.contains(&folder);
            if is_left && fs::remove_dir(self.volume_path(&folder)).is_ok() {
                swept += 1;
            }
        }
        Ok(swept)
    }

    fn usage(&self, id: &VolumeId) -> Result<Usage, StorageError> {
        let path = self.pool.must_exist(id)?;
        usage::of(&self.program, &self.name_of(id.as_str()))
            .map_err(|e| self.refusal("measure", &path, e))
    }

    fn space(&self) -> Result<Space, StorageError> {
        self.pool.space()
    }
}
