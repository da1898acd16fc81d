//! Who owns a pool and what is in it, and who gets there.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use nix::unistd::{AccessFlags, Uid, access};

use super::{Finding, Pool};
use crate::types::Owner;

pub(super) fn examine(pool: &Pool, findings: &mut Vec<Finding>) {
    let us = Uid::effective();
    if !us.is_root()
        && let Ok(meta) = fs::metadata(&pool.path)
        && meta.uid() != us.as_raw()
        && access(&pool.path, AccessFlags::W_OK | AccessFlags::X_OK).is_err()
    {
        findings.push(Finding::PoolOf { uid: meta.uid() });
    }
    findings.extend(impassable(&pool.path, pool.owner));
    let mut foreign = Vec::new();
    for volume in &pool.volumes {
        let data = pool.path.join(volume.as_str()).join(pool.data_folder);
        let Ok(meta) = fs::metadata(&data) else {
            continue;
        };
        foreign.extend(foreign_in(&data, pool.owner));
        findings.extend(loose_mode(&data, &meta));
    }
    if !foreign.is_empty() {
        findings.push(Finding::Foreign {
            paths: foreign,
            uid: pool.owner.uid,
        });
    }
}

/// What keeps a server of `owner` from starting on a data directory. Quick: it is asked at every start.
pub(super) fn obstacle(data: &Path, owner: Owner) -> Option<Finding> {
    let meta = fs::metadata(data).ok()?;
    let volume = data.parent().unwrap_or(data);
    impassable(volume, owner)
        .or_else(|| {
            (meta.uid() != owner.uid).then(|| Finding::Foreign {
                paths: vec![data.to_owned()],
                uid: owner.uid,
            })
        })
        .or_else(|| loose_mode(data, &meta))
}

/// The first folder on the way to `path` that its owner-to-be can't pass. Only a server that runs as
/// another user than this process needs the look.
pub(in crate::storage) fn impassable(path: &Path, owner: Owner) -> Option<Finding> {
    if !Uid::effective().is_root() || owner.uid == 0 {
        return None;
    }
    let mut folders: Vec<&Path> = path.ancestors().collect();
    folders.reverse();
    folders.into_iter().find_map(|folder| {
        let meta = fs::metadata(folder).ok()?;
        let needed = if meta.uid() == owner.uid {
            0o100
        } else if meta.gid() == owner.gid {
            0o010
        } else {
            0o001
        };
        (meta.mode() & needed == 0).then(|| Finding::Impassable {
            folder: folder.to_owned(),
            uid: owner.uid,
        })
    })
}

/// `PostgreSQL` refuses a data directory that the group may write to, or others anything
/// (`checkDataDir` in miscinit.c).
fn loose_mode(data: &Path, meta: &fs::Metadata) -> Option<Finding> {
    let mode = meta.mode() & 0o7777;
    (mode & 0o027 != 0).then(|| Finding::LooseMode {
        path: data.to_owned(),
        mode,
    })
}

/// The data directory, if something at its top or in its main folders belongs to another user: what
/// a tool that root ran has left there stops the server later.
fn foreign_in(data: &Path, owner: Owner) -> Option<PathBuf> {
    let is_foreign = |path: &Path| {
        // What vanishes meanwhile is nobody's.
        fs::symlink_metadata(path).is_ok_and(|meta| meta.uid() != owner.uid)
    };
    let folders = [data.to_owned(), data.join("global"), data.join("base")];
    let found = is_foreign(data)
        || folders
            .iter()
            .flat_map(|folder| fs::read_dir(folder).into_iter().flatten().flatten())
            .any(|entry| is_foreign(&entry.path()));
    found.then(|| data.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    #[test]
    fn a_data_directory_open_to_others_is_found_and_a_group_readable_one_is_not() {
        let dir = tempfile::tempdir().unwrap();
        for (mode, loose) in [(0o700, false), (0o750, false), (0o755, true), (0o770, true)] {
            fs::set_permissions(dir.path(), fs::Permissions::from_mode(mode)).unwrap();
            let meta = fs::metadata(dir.path()).unwrap();
            assert_eq!(loose_mode(dir.path(), &meta).is_some(), loose, "{mode:o}");
        }
    }
}
