//! Pools that dbranch sets up itself: what is to be done, who lives there, taken into use.
//!
//! Most of the work needs root, which the daemon seldom is. So it only plans, and looks what
//! has come of it; whoever asked runs the plan. The one exception is a container that Docker
//! starts with root's rights, for users who have those but no `sudo`.

mod container;
mod status;

use std::path::{Path, PathBuf};

use tracing::info;

pub use status::{BranchesInPool, PoolFile, PoolStatus};

use super::create::human_bytes;
use super::{Engine, EngineError, POOL_MARK, Result, blocking};
use crate::config::{Machine, Origin};
use crate::git::Location;
use crate::registry::BranchRecord;
use crate::storage::image::{
    self, BootPlaces, FileSystem, Group, Image, Observed, Places, Plan, host, plan,
};
use crate::storage::{Choice, DriverKind};
use crate::types::Owner;

/// What is to become of a pool that dbranch sets up itself.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PoolJob {
    /// The mount point. None: the pool of the settings where it is such a one, else the usual place.
    pub path: Option<PathBuf>,
    pub change: PoolChange,
    /// Do it although the room is not there, or although it is not needed.
    pub force: bool,
    /// Instead of this machine's.
    pub unit_dir: Option<PathBuf>,
    pub fstab: Option<PathBuf>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PoolChange {
    SetUp {
        size_bytes: Option<u64>,
        file_system: Option<FileSystem>,
    },
    Grow {
        size_bytes: u64,
    },
    Remove,
}

/// What is still to be done.
#[derive(Debug, Clone)]
pub struct PoolPlan {
    pub path: PathBuf,
    pub image: PathBuf,
    pub file_system: Option<FileSystem>,
    /// What the file has or will have.
    pub size_bytes: u64,
    /// Free on the disk that the file lies on.
    pub host_free_bytes: u64,
    /// Nothing when all is done.
    pub groups: Vec<Group>,
    /// Things worth knowing before it is done.
    pub notes: Vec<String>,
    /// Why there is no need for a pool of its own.
    pub not_needed: Option<String>,
    /// Whether new projects use it already.
    pub is_in_use: bool,
    /// The local image whose container could run what needs root.
    pub container_image: Option<String>,
}

/// A pool that new projects use from now on.
#[derive(Debug, Clone)]
pub struct Adopted {
    pub path: PathBuf,
    pub driver: DriverKind,
    /// False when the settings said so already.
    pub is_new: bool,
    pub settings_file: PathBuf,
    /// A variable that says otherwise to the daemon.
    pub overridden_by: Option<&'static str>,
    /// Projects with branches elsewhere.
    pub projects_elsewhere: Vec<String>,
}

impl Engine {
    /// What is still to be done for a job. Changes nothing.
    pub async fn plan_pool(&self, job: &PoolJob, at: Option<&Location>) -> Result<PoolPlan> {
        let engine = self.clone();
        let wanted = job.clone();
        let mut plan = blocking(move || engine.plan_pool_now(&wanted)).await?;
        if plan.is_first && !job.force {
            plan.view.not_needed = self.why_not_needed(job).await;
        }
        let is_root = nix::unistd::geteuid().is_root();
        if !is_root && plan.view.groups.iter().any(|g| g.as_root) {
            plan.view.container_image = self.container_images(at).await.into_iter().next();
        }
        Ok(plan.view)
    }

    fn plan_pool_now(&self, job: &PoolJob) -> Result<Planned> {
        let boot = BootPlaces::or_else(job.unit_dir.clone(), job.fstab.clone());
        let places = self.pool_places(job, &boot)?;
        let found = look(&places, &boot)?;
        let image = places.image();
        let disk = image.parent().unwrap_or(&image);
        let host_free =
            host::free_bytes(disk).map_err(|e| EngineError::io("look at the room in", disk, &e))?;
        let mut notes = Vec::new();
        let (plan, file_system, size_bytes) = match job.change {
            PoolChange::SetUp {
                size_bytes,
                file_system,
            } => {
                let want = Self::wanted(&found, size_bytes, file_system, host_free, &mut notes)?;
                let plan = plan::set_up(&found, &want, &boot)?;
                let (file_system, size) = of_image(&found.image).unwrap_or((
                    file_system.unwrap_or(want.default_file_system),
                    want.new_size_bytes(&found.image),
                ));
                if !matches!(found.image, Image::Ready { .. }) {
                    must_have_room(&places, size, host_free, job.force, &mut notes)?;
                    must_have_mkfs(file_system)?;
                }
                (plan, Some(file_system), size)
            }
            PoolChange::Grow { size_bytes } => {
                let plan = plan::grow(&found, size_bytes)?;
                if let Image::Ready {
                    allocated_bytes, ..
                } = found.image
                    && !plan.is_empty()
                {
                    let free = host_free.saturating_add(allocated_bytes);
                    must_have_room(&places, size_bytes, free, job.force, &mut notes)?;
                }
                (plan, of_image(&found.image).map(|(fs, _)| fs), size_bytes)
            }
            PoolChange::Remove => {
                self.must_be_empty(&found)?;
                let (file_system, size) = of_image(&found.image).unzip();
                (plan::remove(&found)?, file_system, size.unwrap_or(0))
            }
        };
        let pool_setting = self.pool_in_file()?;
        Ok(Planned {
            is_first: matches!(job.change, PoolChange::SetUp { .. }) && !found.is_anything(),
            view: PoolPlan {
                is_in_use: pool_setting.as_deref() == Some(places.mount()),
                path: places.mount().to_owned(),
                image: places.image(),
                file_system,
                size_bytes,
                host_free_bytes: host_free,
                groups: Plan::groups(&plan),
                notes,
                not_needed: None,
                container_image: None,
            },
        })
    }

    fn pool_places(&self, job: &PoolJob, boot: &BootPlaces) -> Result<Places> {
        if let Some(path) = &job.path {
            return Ok(Places::of(path)?);
        }
        if let Some(set) = self.pool_in_file()?
            && let Ok(places) = Places::of(&set)
            && look(&places, boot)?.is_anything()
        {
            return Ok(places);
        }
        Ok(Places::of(&self.0.paths.cow_pool())?)
    }

    /// The pool that the machine's file names, whatever variables say.
    fn pool_in_file(&self) -> Result<Option<PathBuf>> {
        Ok(Machine::pool_in_file(&self.0.paths)?)
    }

    fn wanted(
        found: &Observed,
        size_bytes: Option<u64>,
        file_system: Option<FileSystem>,
        host_free: u64,
        notes: &mut Vec<String>,
    ) -> Result<plan::SetUp> {
        let is_root = nix::unistd::geteuid().is_root();
        let owner = Owner {
            uid: nix::unistd::geteuid().as_raw(),
            gid: nix::unistd::getegid().as_raw(),
        };
        let default_size_bytes = usual_size(host_free);
        let makes_one = !matches!(found.image, Image::Ready { .. });
        if makes_one && size_bytes.is_none() && default_size_bytes < image::DEFAULT_SIZE_BYTES {
            notes.push(format!(
                "the disk has {} free, so the pool gets {}; `dbranch storage grow` makes it larger later",
                human_bytes(host_free),
                human_bytes(default_size_bytes)
            ));
        }
        let default_file_system = match file_system {
            Some(wanted) if makes_one && !host::kernel_has(wanted) => {
                return Err(
                    EngineError::refused(format!("this kernel has no {wanted}")).hint(
                        match wanted {
                            FileSystem::Btrfs => "dbranch storage setup --fs xfs",
                            FileSystem::Xfs => "dbranch storage setup --fs btrfs",
                        },
                    ),
                );
            }
            Some(wanted) => wanted,
            None if makes_one && !host::kernel_has(FileSystem::Btrfs) => {
                notes.push(
                    "this kernel has no btrfs, so the pool gets XFS: a clone goes file by file there"
                        .into(),
                );
                FileSystem::Xfs
            }
            None => FileSystem::Btrfs,
        };
        Ok(plan::SetUp {
            size_bytes,
            file_system,
            default_file_system,
            default_size_bytes,
            owner,
            // Root's servers run as `postgres`, who passes through.
            mode: if is_root { 0o711 } else { 0o700 },
        })
    }

    /// Whether the file system of new projects clones already.
    async fn why_not_needed(&self, job: &PoolJob) -> Option<String> {
        if cfg!(target_os = "macos") {
            return Some("APFS clones files, so branches share their blocks here already".into());
        }
        if job.path.is_some() {
            return None;
        }
        let pool = self.pool();
        let driver = self.open_pool(Choice::Auto, &pool).await.ok()?;
        driver.shares_blocks().then(|| {
            format!(
                "{} lies on a file system that clones already ({})",
                pool.display(),
                driver.kind()
            )
        })
    }

    fn branches_below(&self, folder: &Path) -> Result<Vec<(String, BranchRecord)>> {
        let mut found = Vec::new();
        for project in self.0.registry.projects()? {
            for branch in self.0.registry.branches(&project.id)? {
                if branch.pool.starts_with(folder) {
                    found.push((project.name.clone(), branch));
                }
            }
        }
        Ok(found)
    }

    /// A pool is removed only when nothing of anybody's is in it.
    fn must_be_empty(&self, found: &Observed) -> Result<()> {
        let pool = found.places.mount();
        let branches = self.branches_below(pool)?;
        if !branches.is_empty() {
            let names: Vec<String> = branches
                .iter()
                .map(|(project, branch)| {
                    let trash = if branch.trashed_at.is_some() {
                        " (in the trash)"
                    } else {
                        ""
                    };
                    format!("`{}` of {project}{trash}", branch.name)
                })
                .collect();
            return Err(EngineError::refused(format!(
                "branches live in {}: {}",
                pool.display(),
                names.join(", ")
            ))
            .hint("move their projects with `dbranch storage move`, or destroy them with `dbranch delete --now NAME`"));
        }
        let moves = self.0.registry.moves()?;
        if moves.iter().any(|m| m.remove.pool.starts_with(pool)) {
            return Err(EngineError::refused(format!(
                "a move to or from {} is not done yet",
                pool.display()
            ))
            .hint("dbranch storage move, which finishes it"));
        }
        if found.mounted().is_none() {
            return Ok(());
        }
        let mut others = Vec::new();
        let entries =
            std::fs::read_dir(pool).map_err(|e| EngineError::io("look into", pool, &e))?;
        for entry in entries {
            let name = entry
                .map_err(|e| EngineError::io("look into", pool, &e))?
                .file_name();
            if name != POOL_MARK {
                others.push(name.display().to_string());
            }
        }
        if others.is_empty() {
            return Ok(());
        }
        Err(EngineError::refused(format!(
            "{} holds what this dbranch did not make: {}",
            pool.display(),
            others.join(", ")
        ))
        .hint("branches of another DBRANCH_HOME are listed by it; move or remove the rest by hand"))
    }

    /// Takes a pool that stands into use: new projects go there from now on.
    pub async fn adopt_pool(&self, path: &Path) -> Result<Adopted> {
        let places = Places::of(path)?;
        let found = look(&places, &BootPlaces::of_machine())?;
        let path = places.mount().to_owned();
        if found.mounted().is_none() {
            return Err(EngineError::refused(format!(
                "the pool {} is not mounted where the daemon runs",
                path.display()
            ))
            .hint("dbranch shutdown, then dbranch storage setup again"));
        }
        let driver = self.open_pool(Choice::Auto, &path).await?;
        if !driver.shares_blocks() {
            return Err(EngineError::refused(format!(
                "branches can't share blocks in {}: {}",
                path.display(),
                driver.advice().unwrap_or_default()
            ))
            .hint("dbranch doctor"));
        }
        self.mark_pool(&path).await?;
        let is_new = self.pool_in_file()?.as_deref() != Some(&*path);
        if is_new {
            Machine::save_pool(&self.0.paths, Some(&path))?;
            info!(pool = %path.display(), "new projects use this pool");
        }
        let machine = self.reload_machine()?;
        let mut projects_elsewhere = Vec::new();
        for project in self.projects()? {
            let branches = self.0.registry.branches(&project.id)?;
            if branches.iter().any(|b| !b.pool.starts_with(&path)) {
                projects_elsewhere.push(project.name);
            }
        }
        Ok(Adopted {
            driver: driver.kind(),
            is_new,
            settings_file: self.0.paths.machine_file(),
            overridden_by: match machine.pool.origin {
                Origin::Variable(name) if machine.pool.value.as_ref() != Some(&path) => Some(name),
                _ => None,
            },
            projects_elsewhere,
            path,
        })
    }

    /// Takes a pool out of use for new projects. False when it was not in use.
    pub fn forget_pool(&self, path: &Path) -> Result<bool> {
        let places = Places::of(path)?;
        let was_in_use = self.pool_in_file()?.as_deref() == Some(places.mount());
        if was_in_use {
            Machine::save_pool(&self.0.paths, None)?;
            self.reload_machine()?;
            info!(pool = %places.mount().display(), "new projects use this pool no more");
        }
        Ok(was_in_use)
    }
}

struct Planned {
    view: PoolPlan,
    /// Nothing of the pool is there yet.
    is_first: bool,
}

fn look(places: &Places, boot: &BootPlaces) -> Result<Observed> {
    image::observe(places, boot).map_err(|e| EngineError::io("look at", places.mount(), &e))
}

fn of_image(image: &Image) -> Option<(FileSystem, u64)> {
    match image {
        Image::Ready {
            file_system,
            size_bytes,
            ..
        } => Some((*file_system, *size_bytes)),
        _ => None,
    }
}

/// Four fifths of what is free, in whole GiB, but no more than anyone needs at first.
fn usual_size(host_free: u64) -> u64 {
    let fitting = (host_free / 5 * 4) >> 30 << 30;
    fitting.clamp(image::SMALLEST_BYTES, image::DEFAULT_SIZE_BYTES)
}

/// A sparse file may promise more room than there is. Databases in it would then get I/O errors
/// where they expect a full disk, so it takes the user's word.
fn must_have_room(
    places: &Places,
    size_bytes: u64,
    free_bytes: u64,
    force: bool,
    notes: &mut Vec<String>,
) -> Result<()> {
    if size_bytes <= free_bytes {
        return Ok(());
    }
    let why = format!(
        "the disk of {} has {} free, so a pool of {} promises room that is not there: databases in it get \
         I/O errors when the disk is full",
        places.image().display(),
        human_bytes(free_bytes),
        human_bytes(size_bytes)
    );
    if force {
        notes.push(why);
        return Ok(());
    }
    let fitting = usual_size(free_bytes) >> 30;
    Err(EngineError::refused(why).hint(if fitting == 0 {
        "free some room on that disk, or choose another one with `--path`".to_owned()
    } else {
        format!("`--size {fitting}G` fits; `--force` does it all the same")
    }))
}

fn must_have_mkfs(file_system: FileSystem) -> Result<()> {
    if host::has_program(file_system.mkfs()) {
        return Ok(());
    }
    Err(
        EngineError::refused(format!("the program {} is missing", file_system.mkfs()))
            .hint(host::install_command(file_system.package())),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_usual_size_leaves_room_on_the_disk() {
        let gib = |n: u64| n << 30;
        assert_eq!(usual_size(gib(500)), gib(50));
        assert_eq!(usual_size(gib(42)), gib(33));
        assert_eq!(usual_size(0), image::SMALLEST_BYTES);
    }

    #[test]
    fn more_than_the_disk_has_takes_the_users_word() {
        let places = Places::of(Path::new("/nowhere/pool")).unwrap();
        let room = |size: u64, force| {
            let mut notes = Vec::new();
            must_have_room(&places, size << 30, 10 << 30, force, &mut notes).map(|()| notes.len())
        };
        assert_eq!(room(10, false), Ok(0));
        assert_eq!(room(11, true), Ok(1));
        let e = room(11, false).unwrap_err();
        assert!(e.message.contains("I/O errors"), "{e}");
        assert!(e.hint.unwrap().contains("--size 8G"));
    }
}
