//! What branches take on disk, and who shares it.

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::Arc;

use super::{Engine, Result, blocking};
use crate::git::Location;
use crate::registry::{BranchRecord, ProjectRecord, Stage};
use crate::storage::{Holder, StorageDriver, Usage, Usages};
use crate::types::{BranchName, VolumeId};

/// A branch's bytes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct UsageView {
    pub name: BranchName,
    pub trashed: bool,
    /// All files, shared or not.
    pub logical_bytes: u64,
    /// Data that nobody shares.
    pub exclusive_bytes: u64,
    /// What others hold too, on disk.
    pub shared_bytes: u64,
    /// What destroying it would free.
    pub freed_bytes: u64,
    /// With whom, and how many bytes, the most first. None where the file system doesn't tell.
    pub shared_with: Option<Vec<(Sharer, u64)>>,
}

/// Who shares blocks with a branch.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub enum Sharer {
    Branch(BranchName),
    Trashed(BranchName),
    /// No branch of the project, by what it can be called.
    Other(String),
}

/// All branches of a project together, in bytes. None where the file system doesn't tell.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct UsageTotal {
    /// What they would take if nothing were shared.
    pub logical_bytes: u64,
    pub exclusive_bytes: u64,
    /// What at least two hold, counted once.
    pub shared_bytes: Option<u64>,
    /// What destroying them all would free.
    pub freed_bytes: Option<u64>,
    /// What destroying those in the trash would free.
    pub trash_freed_bytes: Option<u64>,
}

/// A pool's room, in bytes.
#[derive(Debug, Clone)]
pub struct PoolView {
    pub driver: String,
    pub path: PathBuf,
    pub total_bytes: u64,
    pub free_bytes: u64,
}

/// Bytes of a project's branches, oldest first, and the room in the pool of its newest.
#[derive(Debug, Clone)]
pub struct UsageReport {
    pub branches: Vec<UsageView>,
    pub total: UsageTotal,
    pub pool: Option<PoolView>,
    /// What keeps the numbers from being exact.
    pub notes: Vec<String>,
}

impl Engine {
    /// Bytes of one branch.
    pub async fn usage_of(&self, branch: &BranchRecord) -> Result<Usage> {
        let driver = self.driver(branch).await?;
        let volume = branch.volume.clone();
        // One at a time, so that those who wait take no threads from others.
        let _measuring = self.0.measuring.lock().await;
        blocking(move || Ok(driver.usage(&volume)?)).await
    }

    /// Bytes of all branches of a project. Those destroyed meanwhile are left out.
    pub async fn usage(&self, location: &Location) -> Result<UsageReport> {
        let project = self.project_at(location)?;
        let mut branches = self.0.registry.branches(&project.id)?;
        let newest = branches.last().cloned();
        branches.retain(|branch| branch.stage == Stage::Ready);
        let mut report = UsageReport {
            branches: Vec::new(),
            total: UsageTotal {
                shared_bytes: Some(0),
                freed_bytes: Some(0),
                trash_freed_bytes: Some(0),
                ..UsageTotal::default()
            },
            pool: None,
            notes: Vec::new(),
        };
        let mut drivers: Vec<(Arc<dyn StorageDriver>, Vec<&BranchRecord>)> = Vec::new();
        for branch in &branches {
            let driver = self.driver(branch).await?;
            match drivers.iter_mut().find(|(d, _)| Arc::ptr_eq(d, &driver)) {
                Some((_, of_driver)) => of_driver.push(branch),
                None => drivers.push((driver, vec![branch])),
            }
        }
        let mut views = HashMap::new();
        for (driver, of_driver) in drivers {
            let ids: Vec<VolumeId> = of_driver.iter().map(|b| b.volume.clone()).collect();
            let measuring = self.0.measuring.lock().await;
            let mut usages = blocking(move || Ok(driver.usage_of_all(&ids)?)).await?;
            drop(measuring);
            report.notes.append(&mut usages.notes);
            let others = self.others(&project, &usages, &of_driver)?;
            let compared = blocking({
                let branches = of_driver.into_iter().cloned().collect::<Vec<_>>();
                move || Ok(compare(&usages, &branches, &others))
            });
            let (of_driver, total) = compared.await?;
            report.total.add(&total);
            views.extend(of_driver);
        }
        report.branches = branches
            .iter()
            .filter_map(|branch| views.remove(&branch.volume))
            .collect();
        if let Some(newest) = newest {
            report.pool = Some(self.room(&newest).await?);
        }
        Ok(report)
    }

    async fn room(&self, branch: &BranchRecord) -> Result<PoolView> {
        let driver = self.driver(branch).await?;
        let kind = driver.kind().to_string();
        let space = blocking(move || Ok(driver.space()?)).await?;
        Ok(PoolView {
            driver: kind,
            path: branch.pool.clone(),
            total_bytes: space.total_bytes,
            free_bytes: space.free_bytes,
        })
    }

    /// What to call holders that are no branches of the project, by their place among the holders.
    fn others(
        &self,
        project: &ProjectRecord,
        usages: &Usages,
        ours: &[&BranchRecord],
    ) -> Result<HashMap<usize, String>> {
        let mut sharing: Vec<usize> = usages
            .shares
            .iter()
            .flatten()
            .filter(|share| share.by.len() > 1)
            .flat_map(|share| share.by.iter().copied())
            .collect();
        sharing.sort_unstable();
        sharing.dedup();
        let mut names = HashMap::new();
        let mut elsewhere = None;
        for at in sharing {
            let name = match &usages.holders[at] {
                Holder::Other(name) => format!("subvolume {name}, no branch"),
                Holder::Volume(id) if ours.iter().any(|b| b.volume == *id) => continue,
                Holder::Volume(id) => {
                    if elsewhere.is_none() {
                        elsewhere = Some(self.named_elsewhere(project)?);
                    }
                    match elsewhere.as_ref().and_then(|names| names.get(id)) {
                        Some(name) => name.clone(),
                        None => format!("volume {id}, no branch"),
                    }
                }
            };
            names.insert(at, name);
        }
        Ok(names)
    }

    fn named_elsewhere(&self, but: &ProjectRecord) -> Result<HashMap<VolumeId, String>> {
        let mut names = HashMap::new();
        for project in self.0.registry.projects()? {
            for branch in self.0.registry.branches(&project.id)? {
                let name = if project.id == but.id {
                    branch.name.to_string()
                } else {
                    format!("{} of project {}", branch.name, project.name)
                };
                names.insert(branch.volume, name);
            }
        }
        Ok(names)
    }
}

impl UsageTotal {
    fn add(&mut self, other: &Self) {
        let both = |a: Option<u64>, b: Option<u64>| Some(a? + b?);
        self.logical_bytes += other.logical_bytes;
        self.exclusive_bytes += other.exclusive_bytes;
        self.shared_bytes = both(self.shared_bytes, other.shared_bytes);
        self.freed_bytes = both(self.freed_bytes, other.freed_bytes);
        self.trash_freed_bytes = both(self.trash_freed_bytes, other.trash_freed_bytes);
    }
}

/// What `branches` hold and share, and the sum.
fn compare(
    usages: &Usages,
    branches: &[BranchRecord],
    others: &HashMap<usize, String>,
) -> (HashMap<VolumeId, UsageView>, UsageTotal) {
    let by_volume: HashMap<&VolumeId, &BranchRecord> =
        branches.iter().map(|b| (&b.volume, b)).collect();
    let ours: Vec<Option<&BranchRecord>> = usages
        .holders
        .iter()
        .map(|holder| match holder {
            Holder::Volume(id) => by_volume.get(id).copied(),
            Holder::Other(_) => None,
        })
        .collect();
    let mut sharers = usages.shares.as_ref().map(|shares| {
        let mut common = vec![vec![0_u64; ours.len()]; ours.len()];
        for share in shares {
            for a in &share.by {
                if ours[*a].is_some() {
                    let row = &mut common[*a];
                    share.by.iter().for_each(|b| row[*b] += share.bytes);
                }
            }
        }
        common
    });
    let mut shared = vec![0; ours.len()];
    for share in usages.shares.iter().flatten().filter(|s| s.by.len() > 1) {
        share.by.iter().for_each(|at| shared[*at] += share.bytes);
    }
    let places: HashMap<&VolumeId, usize> = usages
        .holders
        .iter()
        .enumerate()
        .filter_map(|(at, holder)| match holder {
            Holder::Volume(id) => Some((id, at)),
            Holder::Other(_) => None,
        })
        .collect();
    let name = |at: usize| match ours[at] {
        Some(branch) if branch.trashed_at.is_some() => Sharer::Trashed(branch.name.clone()),
        Some(branch) => Sharer::Branch(branch.name.clone()),
        None => Sharer::Other(others.get(&at).cloned().unwrap_or_default()),
    };
    let mut total = total(usages, &ours);
    let mut views = HashMap::new();
    for volume in &usages.volumes {
        let Some(branch) = by_volume.get(&volume.id) else {
            continue;
        };
        let place = places.get(&volume.id).copied();
        let shared_with = sharers.as_mut().map(|common| {
            let row = place.map(|at| std::mem::take(&mut common[at]));
            let mut with: Vec<(Sharer, u64)> = row
                .unwrap_or_default()
                .into_iter()
                .enumerate()
                .filter(|(at, bytes)| *bytes > 0 && Some(*at) != place)
                .map(|(at, bytes)| (name(at), bytes))
                .collect();
            with.sort_by(|(a, x), (b, y)| y.cmp(x).then_with(|| a.cmp(b)));
            with
        });
        total.logical_bytes += volume.logical_bytes;
        total.exclusive_bytes += volume.exclusive_bytes;
        let view = UsageView {
            name: branch.name.clone(),
            trashed: branch.trashed_at.is_some(),
            logical_bytes: volume.logical_bytes,
            exclusive_bytes: volume.exclusive_bytes,
            shared_bytes: match place {
                Some(at) => shared[at],
                None => volume.logical_bytes.saturating_sub(volume.exclusive_bytes),
            },
            freed_bytes: volume.freed_bytes,
            shared_with,
        };
        views.insert(volume.id.clone(), view);
    }
    (views, total)
}

/// The sums that follow from who shares with whom.
fn total(usages: &Usages, ours: &[Option<&BranchRecord>]) -> UsageTotal {
    let sum = |wanted: &dyn Fn(&[usize]) -> bool| {
        let shares = usages.shares.as_ref()?.iter();
        Some(shares.filter(|s| wanted(&s.by)).map(|s| s.bytes).sum())
    };
    let is_ours = |at: &usize| ours[*at].is_some();
    let is_trash = |at: &usize| ours[*at].is_some_and(|b| b.trashed_at.is_some());
    UsageTotal {
        shared_bytes: sum(&|by| by.len() > 1 && by.iter().any(is_ours)),
        freed_bytes: sum(&|by| by.iter().all(is_ours)),
        trash_freed_bytes: sum(&|by| by.iter().all(is_trash)),
        ..UsageTotal::default()
    }
}
