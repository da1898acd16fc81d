//! Looks at a pool's volumes, and remembers what it saw.

use super::measure;
use crate::storage::pool::Pool;
use crate::storage::{Holder, Share, StorageError, Usage, Usages, VolumeUsage};
use crate::types::VolumeId;

/// What is known of a pool's volumes. One look at a time: a second one waits, and then has
/// little left to read.
#[derive(Debug, Default)]
pub(in crate::storage) struct Survey {
    #[cfg(target_os = "linux")]
    state: std::sync::Mutex<linux::State>,
}

impl Survey {
    /// Looks at all volumes of a pool; the answer is of those asked for that are there.
    /// Where no blocks are shared there is nothing to compare.
    pub(in crate::storage) fn look(
        &self,
        pool: &Pool,
        ids: &[VolumeId],
        shares_blocks: bool,
    ) -> Result<Usages, StorageError> {
        if !shares_blocks {
            return plain(pool, ids, true);
        }
        #[cfg(target_os = "linux")]
        {
            let mut state = match self.state.lock() {
                Ok(state) => state,
                Err(broken) => {
                    // Whoever panicked may have left it half way.
                    let mut state = broken.into_inner();
                    *state = linux::State::default();
                    self.state.clear_poison();
                    state
                }
            };
            match state.look(pool) {
                Ok(usages) => return Ok(usages.only(ids)),
                // A file system that clones, but tells nobody where (NFS).
                Err(StorageError::Io { source, .. })
                    if [nix::libc::EOPNOTSUPP, nix::libc::ENOTTY]
                        .map(Some)
                        .contains(&source.raw_os_error()) => {}
                Err(e) => return Err(e),
            }
        }
        plain(pool, ids, false)
    }
}

impl Survey {
    /// Bytes of one volume.
    pub(in crate::storage) fn usage(
        &self,
        pool: &Pool,
        id: &VolumeId,
        shares_blocks: bool,
    ) -> Result<Usage, StorageError> {
        pool.must_exist(id)?;
        let usages = self.look(pool, std::slice::from_ref(id), shares_blocks)?;
        let usage = usages.volumes.first().map(|volume| Usage {
            logical_bytes: volume.logical_bytes,
            exclusive_bytes: volume.exclusive_bytes,
        });
        usage.ok_or_else(|| StorageError::Missing {
            id: id.clone(),
            pool: pool.path().to_owned(),
        })
    }
}

/// Each volume for itself. `alone`: whether it is known that they share nothing.
fn plain(pool: &Pool, ids: &[VolumeId], alone: bool) -> Result<Usages, StorageError> {
    let mut usages = Usages::default();
    for id in ids {
        match pool.must_exist(id).and_then(|path| measure(&path)) {
            Ok(usage) => usages.volumes.push(VolumeUsage::new(id.clone(), usage)),
            Err(e) => {
                if pool.must_exist(id).is_ok() {
                    return Err(e);
                }
            }
        }
    }
    if alone {
        usages.holders = usages
            .volumes
            .iter()
            .map(|v| Holder::Volume(v.id.clone()))
            .collect();
        let shares = usages.volumes.iter().enumerate().map(|(at, volume)| Share {
            by: vec![at],
            bytes: volume.freed_bytes,
        });
        usages.shares = Some(shares.collect());
    } else {
        usages.notes.push(
            "this file system doesn't tell which blocks are shared: all are counted as each branch's own"
                .into(),
        );
    }
    Ok(usages)
}

#[cfg(target_os = "linux")]
mod linux {
    use std::collections::{HashMap, HashSet};
    use std::fs::File;
    use std::os::fd::AsFd;
    use std::os::unix::fs::MetadataExt;
    use std::path::PathBuf;
    use std::sync::Mutex;
    use std::sync::atomic::{AtomicUsize, Ordering};

    use nix::errno::Errno;
    use nix::sys::statfs::{BTRFS_SUPER_MAGIC, statfs};

    use super::super::files::{Files, Looked, Stamp};
    use super::super::ioctl::{Identity, Searcher, identity};
    use super::super::pieces::{Chunk, Chunks};
    use super::super::shares::lay;
    use super::super::tree::{self, Reader, Subvolume};
    use crate::storage::pool::{Pool, open_folder};
    use crate::storage::{Holder, Share, StorageError, Usages, VolumeUsage};
    use crate::types::VolumeId;

    /// Inode number of every subvolume's root folder (`BTRFS_FIRST_FREE_OBJECTID`).
    const SUBVOLUME_INODE: u64 = 256;

    const UNPRIVILEGED: &str = "without root, btrfs doesn't tell what is kept of partly overwritten \
        extents, nor how well data is compressed: what deleting frees is an estimate";

    #[derive(Debug, Default)]
    pub(super) struct State {
        chunks: Chunks,
        volumes: HashMap<VolumeId, Known>,
        /// Snapshots of volumes that somebody keeps elsewhere, by the number of their tree.
        outside: HashMap<u64, Subvolume>,
        last: Option<Usages>,
    }

    #[derive(Debug)]
    enum Known {
        Tree(Subvolume),
        Files(Files),
    }

    /// A volume that is there now.
    struct Present {
        id: VolumeId,
        path: PathBuf,
        /// Of a btrfs subvolume.
        identity: Option<Identity>,
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
            match subvolumes.then(|| self.look_at_trees(pool, &present)) {
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

        /// Reads the subvolumes. Answers whether anything changed, and the snapshots outside the pool.
        fn look_at_trees(
            &mut self,
            pool: &Pool,
            present: &[Present],
        ) -> Result<(bool, Vec<(u64, String)>), Errno> {
            let folder = File::open(pool.path()).map_err(|e| errno(&e))?;
            let mut searcher = Searcher::new();
            let listed = tree::list(&mut searcher, folder.as_fd())?;
            let mut wanted: Vec<(Identity, Option<&VolumeId>)> = present
                .iter()
                .filter_map(|p| Some((p.identity?, Some(&p.id))))
                .collect();
            let outside = relatives(&wanted, listed);
            wanted.extend(outside.iter().map(|listed| (listed.identity, None)));
            // A source comes before its snapshots, and a snapshot before later ones.
            wanted.sort_by_key(|(identity, _)| (identity.origin, identity.tree));
            let mut differs = false;
            let mut read: Vec<Subvolume> = Vec::with_capacity(wanted.len());
            for (identity, id) in wanted {
                let known = match id {
                    Some(id) => match self.volumes.remove(id) {
                        Some(Known::Tree(known)) => Some(known),
                        _ => None,
                    },
                    None => self.outside.remove(&identity.tree),
                };
                let mut reader = Reader {
                    searcher: &mut searcher,
                    chunks: &mut self.chunks,
                    file: folder.as_fd(),
                };
                let fresh = match known.filter(|known| *known.identity() == identity) {
                    Some(mut known) => known.refresh(&mut reader).map(|changed| {
                        differs |= changed;
                        known
                    }),
                    None => {
                        differs = true;
                        // The one that parted last has most in common.
                        let nearest = read.iter().rev().find_map(|subvolume| {
                            Some((subvolume, subvolume.parted_from(&identity)?))
                        });
                        match nearest {
                            Some((near, parted)) => near.sibling(&mut reader, identity, parted),
                            None => Subvolume::read(&mut reader, identity),
                        }
                    }
                };
                match fresh {
                    Ok(fresh) => read.push(fresh),
                    // Destroyed meanwhile.
                    Err(Errno::ENOENT) => differs = true,
                    Err(e) => return Err(e),
                }
            }
            self.outside.clear();
            for subvolume in read {
                let number = subvolume.identity().tree;
                let volume = present
                    .iter()
                    .find(|p| p.identity.is_some_and(|i| i.tree == number));
                match volume {
                    Some(p) => drop(self.volumes.insert(p.id.clone(), Known::Tree(subvolume))),
                    None => drop(self.outside.insert(number, subvolume)),
                }
            }
            let names = outside
                .into_iter()
                .filter(|listed| self.outside.contains_key(&listed.identity.tree))
                .map(|listed| (listed.identity.tree, listed.name))
                .collect();
            Ok((differs, names))
        }

        /// Reads subvolumes file by file. A file that a snapshot has as its source has it is read once.
        fn look_at_twins(&mut self, present: &[Present]) -> Result<bool, StorageError> {
            let mut families: HashMap<[u8; 16], HashMap<Stamp, Chunk>> = HashMap::new();
            let by_uuid: HashMap<_, _> = present
                .iter()
                .filter_map(|p| Some((p.identity?.uuid, p.identity?.parent_uuid)))
                .collect();
            let mut subvolumes: Vec<(&Present, Identity)> = present
                .iter()
                .filter_map(|p| Some((p, p.identity?)))
                .collect();
            subvolumes.sort_by_key(|(_, identity)| (identity.origin, identity.tree));
            let mut differs = false;
            for (volume, identity) in subvolumes {
                let mut eldest = identity.uuid;
                while let Some(source) = by_uuid.get(&eldest).filter(|uuid| **uuid != [0; 16]) {
                    eldest = *source;
                }
                let twins = families.entry(eldest).or_default();
                let mut files = self.take_files(&volume.id);
                let looked = files.look(&volume.path, &|stamp| twins.get(stamp).cloned());
                let Some(looked) = unless_gone(volume, looked)? else {
                    differs = true;
                    continue;
                };
                differs |= files.take(looked, &mut self.chunks);
                twins.extend(
                    files
                        .settled()
                        .map(|(stamp, chunk)| (*stamp, chunk.clone())),
                );
                self.volumes.insert(volume.id.clone(), Known::Files(files));
            }
            Ok(differs)
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
            let state = Mutex::new((self, false));
            let work = || -> Result<(), StorageError> {
                while let Some((volume, files)) = folders.get(next.fetch_add(1, Ordering::Relaxed))
                {
                    let looked = unless_gone(volume, files.look(&volume.path, &|_| None))?;
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

        fn take_files(&mut self, id: &VolumeId) -> Files {
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

    fn errno(error: &std::io::Error) -> Errno {
        Errno::from_raw(error.raw_os_error().unwrap_or(nix::libc::EIO))
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
            let identity = if file_system == BTRFS_SUPER_MAGIC {
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
            present.push(Present { id, path, identity });
        }
        Ok(present)
    }

    /// Subvolumes that are no volumes, but have to do with one: its snapshots, what they were
    /// made from, and so on.
    fn relatives(
        volumes: &[(Identity, Option<&VolumeId>)],
        mut listed: Vec<tree::Listed>,
    ) -> Vec<tree::Listed> {
        let trees: HashSet<u64> = volumes.iter().map(|(identity, _)| identity.tree).collect();
        listed.retain(|listed| !trees.contains(&listed.identity.tree));
        let mut family: HashSet<[u8; 16]> = volumes
            .iter()
            .flat_map(|(identity, _)| [identity.uuid, identity.parent_uuid])
            .collect();
        family.remove(&[0; 16]);
        let mut related = Vec::new();
        loop {
            let (found, others): (Vec<_>, Vec<_>) = listed.into_iter().partition(|listed| {
                family.contains(&listed.identity.uuid)
                    || family.contains(&listed.identity.parent_uuid)
            });
            if found.is_empty() {
                return related;
            }
            for found in &found {
                family.extend([found.identity.uuid, found.identity.parent_uuid]);
            }
            family.remove(&[0; 16]);
            related.extend(found);
            listed = others;
        }
    }

    /// An error about a volume that is no longer there is none.
    fn unless_gone(
        volume: &Present,
        looked: Result<Looked, StorageError>,
    ) -> Result<Option<Looked>, StorageError> {
        match looked {
            Err(_) if !volume.path.exists() => Ok(None),
            looked => looked.map(Some),
        }
    }
}
