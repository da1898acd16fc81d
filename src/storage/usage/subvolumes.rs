//! Looks at volumes that are btrfs subvolumes: by their trees, or where that isn't allowed
//! file by file.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::fs::File;
use std::os::fd::AsFd;
use std::time::Duration;

use nix::errno::Errno;

use super::files::Stamp;
use super::ioctl::{self, Identity, Searcher};
use super::look::{Known, Present, State, unless_gone};
use super::pieces::Chunk;
use super::tree::{self, Reader, Subvolume};
use crate::storage::StorageError;
use crate::storage::pool::Pool;
use crate::types::VolumeId;

impl State {
    /// Reads the subvolumes. Answers whether anything changed, and the snapshots outside the pool.
    pub(super) fn look_at_trees(
        &mut self,
        pool: &Pool,
        present: &[Present],
    ) -> Result<(bool, Vec<(u64, String)>), Errno> {
        let folder = File::open(pool.path()).map_err(|e| errno(&e))?;
        let mut searcher = Searcher::new();
        let running = ioctl::running(folder.as_fd())?;
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
        // By what a subvolume was read, both by their place in `read`.
        let mut models: BTreeMap<usize, usize> = BTreeMap::new();
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
                running,
            };
            let fresh = if let Some(mut known) = known.filter(|k| *k.identity() == identity) {
                known.refresh(&mut reader, BTreeSet::new()).map(|changes| {
                    differs |= changes.any;
                    known
                })
            } else {
                differs = true;
                // The one that parted last has most in common.
                let near = read
                    .iter()
                    .enumerate()
                    .rev()
                    .find_map(|(at, subvolume)| Some((at, subvolume.parted_from(&identity)?)));
                let near =
                    near.filter(|(at, parted)| self.ways.siblings && read[*at].is_near(*parted));
                match near {
                    Some((at, parted)) => {
                        models.insert(read.len(), at);
                        read[at].sibling(&mut reader, identity, parted)
                    }
                    None => Subvolume::read(&mut reader, identity),
                }
            };
            match fresh {
                Ok(fresh) => read.push(fresh),
                // Destroyed meanwhile.
                Err(Errno::ENOENT) => {
                    models.remove(&read.len());
                    differs = true;
                }
                Err(e) => return Err(e),
            }
        }
        if !models.is_empty() {
            match ioctl::commit(folder.as_fd()) {
                // Then nothing is kept back any more either.
                Ok(_) | Err(Errno::EROFS) => {}
                Err(e) => return Err(e),
            }
            let mut reader = Reader {
                searcher: &mut searcher,
                chunks: &mut self.chunks,
                file: folder.as_fd(),
                running: ioctl::running(folder.as_fd())?,
            };
            follow_models(&mut read, &models, &mut reader)?;
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

    /// Reads subvolumes file by file. A file that a snapshot has from its source, as others have
    /// it, is read once.
    pub(super) fn look_at_twins(&mut self, present: &[Present]) -> Result<bool, StorageError> {
        let mut twins: HashMap<([u8; 16], Stamp), Chunk> = HashMap::new();
        let lines = Lines::of(present);
        let mut subvolumes: Vec<(&Present, Identity)> = present
            .iter()
            .filter_map(|p| Some((p, p.identity?)))
            .collect();
        subvolumes.sort_by_key(|(_, identity)| (identity.origin, identity.tree));
        let mut differs = false;
        for (volume, identity) in subvolumes {
            let key = |stamp: &Stamp| {
                let writer = lines.writer(identity.uuid, stamp.changed())?;
                Some((writer, *stamp))
            };
            let mut files = self.take_files(&volume.id);
            let looked = files.look(&volume.path, self.ways.settles, &|stamp| {
                twins.get(&key(stamp)?).cloned()
            });
            let Some(looked) = unless_gone(volume, looked)? else {
                differs = true;
                continue;
            };
            differs |= files.take(looked, &mut self.chunks);
            twins.extend(
                files
                    .settled()
                    .filter_map(|(stamp, chunk)| Some((key(stamp)?, chunk.clone()))),
            );
            self.volumes.insert(volume.id.clone(), Known::Files(files));
        }
        Ok(differs)
    }
}

/// Looks again at what was different in the models of others all the same.
fn follow_models(
    read: &mut [Subvolume],
    models: &BTreeMap<usize, usize>,
    reader: &mut Reader<'_>,
) -> Result<(), Errno> {
    let mut changed: HashMap<usize, BTreeSet<u64>> = HashMap::new();
    let concerned: BTreeSet<usize> = models.iter().flat_map(|(a, b)| [*a, *b]).collect();
    // A model comes before what was read by it.
    for at in concerned {
        let suspects = models.get(&at).and_then(|model| changed.get(model));
        let suspects = suspects.cloned().unwrap_or_default();
        match read[at].refresh(reader, suspects) {
            Ok(found) => drop(changed.insert(at, found.inodes)),
            // Destroyed meanwhile; the next look drops it.
            Err(Errno::ENOENT) => {}
            Err(e) => return Err(e),
        }
    }
    Ok(())
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
            family.contains(&listed.identity.uuid) || family.contains(&listed.identity.parent_uuid)
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

fn errno(error: &std::io::Error) -> Errno {
    Errno::from_raw(error.raw_os_error().unwrap_or(nix::libc::EIO))
}

/// Which subvolume was made from which, and when.
struct Lines(HashMap<[u8; 16], ([u8; 16], Duration)>);

impl Lines {
    fn of(present: &[Present]) -> Self {
        let line = |p: &Present| {
            let identity = p.identity?;
            Some((identity.uuid, (identity.parent_uuid, p.made)))
        };
        Self(present.iter().filter_map(line).collect())
    }

    /// In which subvolume a file was written that was last changed then: in `own`, or in one that
    /// it descends from. None where that can't be told for sure.
    fn writer(&self, own: [u8; 16], changed: Duration) -> Option<[u8; 16]> {
        // Files' times are counted in ticks of up to 10 ms.
        const TICKS: Duration = Duration::from_millis(20);
        let mut writer = own;
        while let Some((source, made)) = self.0.get(&writer).filter(|(s, _)| *s != [0; 16]) {
            if changed > *made + TICKS {
                break;
            }
            if changed + TICKS > *made {
                return None;
            }
            writer = *source;
        }
        Some(writer)
    }
}
