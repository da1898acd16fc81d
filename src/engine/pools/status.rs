//! The pools of this user: those in use, and those set up.

use std::collections::{BTreeMap, BTreeSet};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use super::look;
use crate::engine::{Engine, POOL_MARK, Result, blocking};
use crate::registry::BranchRecord;
use crate::storage::Choice;
use crate::storage::image::{self, BootPlaces, Image, MountPoint, Places, host};

/// What there is to know of a pool. Bytes are none where they can't be told.
#[derive(Debug, Clone)]
pub struct PoolStatus {
    pub path: PathBuf,
    /// What makes clones there; none where nothing can be made now.
    pub driver: Option<String>,
    /// As the kernel calls it, with the options it is mounted with.
    pub file_system: Option<String>,
    pub options: Option<String>,
    pub total_bytes: Option<u64>,
    pub free_bytes: Option<u64>,
    /// The file it lies in, where dbranch has set it up.
    pub file: Option<PoolFile>,
    /// The file that has it mounted when the machine starts.
    pub at_boot: Option<PathBuf>,
    pub is_for_new_projects: bool,
    pub branches: Vec<BranchesInPool>,
    /// What is wrong, and the command that mends it.
    pub problem: Option<(String, String)>,
}

/// The file of a pool that dbranch has set up.
#[derive(Debug, Clone)]
pub struct PoolFile {
    pub path: PathBuf,
    pub size_bytes: u64,
    /// What it takes on the disk below.
    pub allocated_bytes: u64,
    /// Free on that disk.
    pub host_free_bytes: Option<u64>,
}

/// How many branches of a project live in a pool.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BranchesInPool {
    pub project: String,
    pub branches: usize,
    pub trashed: usize,
}

impl Engine {
    /// All pools: with branches in them, for new projects, or set up by this user.
    pub async fn pools(
        &self,
        unit_dir: Option<PathBuf>,
        fstab: Option<PathBuf>,
    ) -> Result<Vec<PoolStatus>> {
        let boot = BootPlaces::or_else(unit_dir, fstab);
        let mut of_pool: BTreeMap<PathBuf, Vec<(String, BranchRecord)>> = BTreeMap::new();
        for (project, branch) in self.branches_below(Path::new("/"))? {
            let pool = branch.pool.clone();
            of_pool.entry(pool).or_default().push((project, branch));
        }
        let for_new = self.pool();
        let for_new = for_new.canonicalize().unwrap_or(for_new);
        let mut paths: BTreeSet<PathBuf> = of_pool.keys().cloned().collect();
        paths.insert(for_new.clone());
        paths.insert(self.0.paths.cow_pool());
        paths.extend(
            image::set_up_pools(&boot)
                .into_iter()
                .filter(|p| is_ours(p)),
        );
        let mut all = Vec::new();
        for path in paths {
            let branches = of_pool.remove(&path).unwrap_or_default();
            let is_for_new = path == for_new;
            if let Some(status) = self
                .pool_status(&path, &branches, is_for_new, &boot)
                .await?
            {
                all.push(status);
            }
        }
        Ok(all)
    }

    /// None where there is nothing.
    async fn pool_status(
        &self,
        path: &Path,
        branches: &[(String, BranchRecord)],
        is_for_new_projects: bool,
        boot: &BootPlaces,
    ) -> Result<Option<PoolStatus>> {
        let places = Places::of(path).ok();
        let found = places.as_ref().map(|p| look(p, boot)).transpose()?;
        let set_up = found.filter(image::Observed::is_anything);
        if set_up.is_none() && branches.is_empty() && !is_for_new_projects {
            return Ok(None);
        }
        let setup = |word: &str| format!("dbranch storage {word} --path {}", path.display());
        let problem = match &set_up {
            Some(found) if found.is_being_removed => {
                Some(("its removal broke off".to_owned(), setup("remove")))
            }
            Some(found) => match (&found.image, &found.mount_point) {
                (Image::Foreign { why }, _) => Some((
                    format!("{} is no pool: {why}", found.places.image().display()),
                    "move that file elsewhere".into(),
                )),
                (Image::Ready { .. }, MountPoint::Mounted(m)) if m.is_ours => {
                    if found.at_boot.is_none() {
                        let why = "it won't be mounted when the machine starts again";
                        Some((why.to_owned(), setup("setup")))
                    } else {
                        None
                    }
                }
                (Image::Ready { .. }, _) => Some(("it is not mounted".to_owned(), setup("setup"))),
                _ => Some(("its set-up broke off".to_owned(), setup("setup"))),
            },
            None if !branches.is_empty() && !path.join(POOL_MARK).exists() => Some((
                "it is not there".to_owned(),
                "mount its file system again, then dbranch sync".into(),
            )),
            None => None,
        };
        let is_there = path.is_dir() && (problem.is_none() || path.join(POOL_MARK).exists());
        let mount = is_there.then(|| image::mount_of(path)).flatten();
        let mut drivers: Vec<String> = branches.iter().map(|(_, b)| b.driver.clone()).collect();
        drivers.sort_unstable();
        drivers.dedup();
        let (mut driver, mut space) = (None, None);
        // Only what is there already: looking makes no folders.
        if is_there && let Ok(opened) = self.open_pool(Choice::Auto, path).await {
            driver = Some(opened.kind().to_string());
            space = blocking(move || Ok(opened.space()?)).await.ok();
        }
        if !drivers.is_empty() {
            driver = Some(drivers.join(", "));
        }
        let file = set_up.as_ref().and_then(|found| match found.image {
            Image::Ready {
                size_bytes,
                allocated_bytes,
                ..
            } => Some(PoolFile {
                path: found.places.image(),
                size_bytes,
                allocated_bytes,
                host_free_bytes: host::free_bytes(&found.places.image()).ok(),
            }),
            _ => None,
        });
        Ok(Some(PoolStatus {
            path: path.to_owned(),
            driver,
            file_system: mount.as_ref().map(|m| m.file_system.clone()),
            options: mount.map(|m| m.options),
            total_bytes: space.map(|s| s.total_bytes),
            free_bytes: space.map(|s| s.free_bytes),
            file,
            at_boot: set_up
                .and_then(|found| found.at_boot)
                .map(|b| b.file().to_owned()),
            is_for_new_projects,
            branches: per_project(branches),
            problem,
        }))
    }
}

/// Whether a set-up pool is this user's: its file is.
fn is_ours(mount: &Path) -> bool {
    let owner = Places::of(mount)
        .ok()
        .and_then(|places| std::fs::metadata(places.image()).ok())
        .map(|meta| meta.uid());
    owner == Some(nix::unistd::geteuid().as_raw())
}

fn per_project(branches: &[(String, BranchRecord)]) -> Vec<BranchesInPool> {
    let mut all: Vec<BranchesInPool> = Vec::new();
    for (project, branch) in branches {
        if all.last().is_none_or(|last| last.project != *project) {
            all.push(BranchesInPool {
                project: project.clone(),
                branches: 0,
                trashed: 0,
            });
        }
        let last = all.last_mut().expect("one was just pushed");
        if branch.trashed_at.is_some() {
            last.trashed += 1;
        } else {
            last.branches += 1;
        }
    }
    all
}
