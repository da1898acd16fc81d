//! Looks at a pool's volumes, and remembers what it saw.

#[cfg(target_os = "linux")]
use super::look;
use super::measure;
use crate::storage::pool::Pool;
use crate::storage::{Holder, Share, StorageError, Usage, Usages, VolumeUsage};
use crate::types::VolumeId;

/// What is known of a pool's volumes. One look at a time: a second one waits, and then has
/// little left to read.
#[derive(Debug, Default)]
pub(in crate::storage) struct Survey {
    #[cfg(target_os = "linux")]
    state: std::sync::Mutex<look::State>,
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
                    *state = look::State::default();
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

#[cfg(test)]
#[cfg(target_os = "linux")]
impl Survey {
    pub(super) fn with(ways: look::Ways) -> Self {
        let survey = Self::default();
        survey.state.lock().unwrap().ways = ways;
        survey
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
