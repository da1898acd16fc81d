//! Looks at all volumes of a pool, and compares them.

use std::collections::HashMap;
use std::os::fd::AsFd;
use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use nix::errno::Errno;
use nix::sys::statfs::{BTRFS_SUPER_MAGIC, statfs};

use super::files::{Files, Looked, SETTLES_SECONDS};
use super::ioctl::{Identity, identity};
use super::pieces::{Chunk, Chunks};
use super::shares::lay;
use super::tree::Subvolume;
use crate::storage::pool::{Pool, open_folder};
use crate::storage::{Holder, Share, StorageError, Usages, VolumeUsage};
use crate::types::VolumeId;

/// Inode number of every subvolume's root folder (`BTRFS_FIRST_FREE_OBJECTID`).
const SUBVOLUME_INODE: u64 = 256;

const UNPRIVILEGED: &str = "without root, btrfs doesn't tell what is kept of partly overwritten \
    extents, nor how well data is compressed: what deleting frees is an estimate";

/// How a pool is looked at; tests know other ways.
#[derive(Debug, Clone, Copy)]
pub(super) struct Ways {
    /// Reading trees, where that is allowed.
    pub(super) trees: bool,
    /// Reading a subvolume by its difference from a related one.
    pub(super) siblings: bool,
    /// After how many seconds a file is taken for settled.
    pub(super) settles: i64,
}

impl Default for Ways {
    fn default() -> Self {
        Self {
            trees: true,
            siblings: true,
            settles: SETTLES_SECONDS,
        }
    }
}

#[derive(Debug, Default)]
pub(super) struct State {
    pub(super) ways: Ways,
    pub(super) chunks: Chunks,
    pub(super) volumes: HashMap<VolumeId, Known>,
    /// Snapshots of volumes that somebody keeps elsewhere, by the number of their tree.
    pub(super) outside: HashMap<u64, Subvolume>,
    last: Option<Usages>,
}

#[derive(Debug)]
pub(super) enum Known {
    Tree(Subvolume),
    Files(Files),
}

/// A volume that is there now.
pub(super) struct Present {
    pub(super) id: VolumeId,
    pub(super) path: PathBuf,
    /// Of a btrfs subvolume.
    pub(super) identity: Option<Identity>,
    /// When that was made, since 1970.
    pub(super) made: Duration,
}

impl State {
    pub(super) fn look(&mut self, pool: &Pool) -> Result<Usages, StorageError> {
        let present = present(pool)?;
        let before = self.volumes.len();
        self.volumes
            .retain(|id, _| present.iter().any(|p| p.id == *id));
        let mut differs = before != self.volumes.len();
        let mut outside = Vec::new();
        let mut notes = Vec::new();
        let subvolumes = present.iter().any(|p| p.identity.is_some());
        let trees = subvolumes.then(|| {
            if self.ways.trees {
                self.look_at_trees(pool, &present)
            } else {
                Err(Errno::EPERM)
            }
        });
        match trees {
            Some(Ok((changed, found))) => {
                differs |= changed;
                outside = found;
            }
            Some(Err(Errno::EPERM)) => {
                differs |= self.look_at_twins(&present)?;
                notes.push(UNPRIVILEGED.to_owned());
            }
            Some(Err(e)) => {
                return Err(StorageError::io("read the trees of", pool.path())(e.into()));
            }
            None => {}
        }
        differs |= self.look_at_folders(&present)?;
        self.chunks.sweep();
        let holders: Vec<Holder> = present
            .into_iter()
            .filter(|p| self.volumes.contains_key(&p.id))
            .map(|p| Holder::Volume(p.id))
            .chain(outside.iter().map(|(_, name)| Holder::Other(name.clone())))
            .collect();
        if let Some(last) = &self.last
            && !differs
            && last.holders == holders
        {
            return Ok(last.clone());
        }
        let usages = self.compare(holders, &outside, notes);
        self.last = Some(usages.clone());
        Ok(usages)
    }

    /// Reads the volumes that are plain folders, several at a time.
    fn look_at_folders(&mut self, present: &[Present]) -> Result<bool, StorageError> {
        let folders: Vec<(&Present, Files)> = present
            .iter()
            .filter(|p| p.identity.is_none())
            .map(|p| (p, self.take_files(&p.id)))
            .collect();
        if folders.is_empty() {
            return Ok(false);
        }
        let next = AtomicUsize::new(0);
        let settles = self.ways.settles;
        let state = Mutex::new((self, false));
        let work = || -> Result<(), StorageError> {
            while let Some((volume, files)) = folders.get(next.fetch_add(1, Ordering::Relaxed)) {
                let looked = unless_gone(volume, files.look(&volume.path, settles, &|_| None))?;
                let mut state = state.lock().expect("nobody panics with it");
                let (this, differs) = &mut *state;
                let Some(looked) = looked else {
                    *differs = true;
                    continue;
                };
                let mut files = files.clone();
                *differs |= files.take(looked, &mut this.chunks);
                this.volumes.insert(volume.id.clone(), Known::Files(files));
            }
            Ok(())
        };
        let threads = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
        std::thread::scope(|scope| {
            let others: Vec<_> = (1..threads.min(folders.len()).min(4))
                .map(|_| scope.spawn(work))
                .collect();
            let mine = work();
            others
                .into_iter()
                .map(|other| {
                    other
                        .join()
                        .unwrap_or_else(|e| std::panic::resume_unwind(e))
                })
                .fold(mine, Result::and)
        })?;
        let (_, differs) = state.into_inner().expect("nobody panics with it");
        Ok(differs)
    }

    pub(super) fn take_files(&mut self, id: &VolumeId) -> Files {
        match self.volumes.remove(id) {
            Some(Known::Files(files)) => files,
            _ => Files::default(),
        }
    }

    /// Lays all that is known over each other.
    fn compare(
        &self,
        holders: Vec<Holder>,
        outside: &[(u64, String)],
        notes: Vec<String>,
    ) -> Usages {
        let known = holders.iter().filter_map(|holder| match holder {
            Holder::Volume(id) => self.volumes.get(id),
            Holder::Other(_) => None,
        });
        let mut maps: Vec<Vec<Chunk>> = known
            .map(|known| match known {
                Known::Tree(subvolume) => subvolume.chunks().cloned().collect(),
                Known::Files(files) => files.chunks().cloned().collect(),
            })
            .collect();
        maps.extend(
            outside
                .iter()
                .map(|(tree, _)| self.outside[tree].chunks().cloned().collect()),
        );
        let laid = lay(&maps);
        let mut freed = vec![0; holders.len()];
        for held in &laid.held {
            if let [alone] = held.by[..] {
                freed[alone] = held.bytes;
            }
        }
        let volumes = holders.iter().enumerate().filter_map(|(at, holder)| {
            let Holder::Volume(id) = holder else {
                return None;
            };
            Some(VolumeUsage {
                id: id.clone(),
                logical_bytes: match &self.volumes[id] {
                    Known::Tree(subvolume) => subvolume.logical_bytes(),
                    Known::Files(files) => files.logical_bytes(),
                },
                exclusive_bytes: laid.used_alone[at],
                freed_bytes: freed[at],
            })
        });
        let shares = laid.held.into_iter().map(|held| Share {
            by: held.by,
            bytes: held.bytes,
        });
        Usages {
            volumes: volumes.collect(),
            shares: Some(shares.collect()),
            holders,
            notes,
        }
    }
}

/// The volumes of a pool, in the order of their ids.
fn present(pool: &Pool) -> Result<Vec<Present>, StorageError> {
    let file_system = statfs(pool.path())
        .map_err(|e| StorageError::io("read the file system of", pool.path())(e.into()))?
        .filesystem_type();
    let mut ids = pool.volumes()?;
    ids.sort_unstable_by(|a, b| a.as_str().cmp(b.as_str()));
    let mut present = Vec::with_capacity(ids.len());
    for id in ids {
        let path = pool.path().join(id.as_str());
        let subvolume = if file_system == BTRFS_SUPER_MAGIC {
            let Ok(folder) = open_folder(&path) else {
                match pool.must_exist(&id) {
                    Ok(_) => return Err(open_folder(&path).expect_err("it failed before")),
                    Err(_) => continue,
                }
            };
            let meta = folder.metadata().map_err(StorageError::io("read", &path))?;
            (meta.ino() == SUBVOLUME_INODE)
                .then(|| identity(folder.as_fd()).ok())
                .flatten()
        } else {
            None
        };
        present.push(Present {
            id,
            path,
            identity: subvolume.map(|(identity, _)| identity),
            made: subvolume.map_or(Duration::ZERO, |(_, made)| made),
        });
    }
    Ok(present)
}

/// An error about a volume that is no longer there is none.
pub(super) fn unless_gone(
    volume: &Present,
    looked: Result<Looked, StorageError>,
) -> Result<Option<Looked>, StorageError> {
    match looked {
        Err(_) if !volume.path.exists() => Ok(None),
        looked => looked.map(Some),
    }
}
