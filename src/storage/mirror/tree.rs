//! Reads what lies in a volume.

use std::fs::{self, Metadata};
use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use super::super::{StorageError, usage::allocated_bytes};

/// Where ZFS shows a volume's snapshots if it is told to; no part of the volume.
const ZFS_CONTROL: &str = ".zfs";

/// What something in a volume is. Sockets and pipes mean nothing in another place.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    Folder,
    File,
    Link,
}

/// What lies in a volume. Paths are relative to it; a folder comes before what is in it.
#[derive(Debug, Default)]
pub(super) struct Tree {
    /// The volume itself is the first, with an empty path.
    pub(super) folders: Vec<(PathBuf, Metadata)>,
    /// The largest first.
    pub(super) files: Vec<(PathBuf, Metadata)>,
    pub(super) links: Vec<(PathBuf, Metadata)>,
    /// Sum of the files' sizes as allocated.
    pub(super) bytes: u64,
}

impl Tree {
    /// Walks a volume. What vanishes meanwhile is passed over.
    pub(super) fn read(volume: &Path) -> Result<Self, StorageError> {
        let mut tree = Self::default();
        let meta = fs::symlink_metadata(volume).map_err(StorageError::io("read", volume))?;
        tree.folders.push((PathBuf::new(), meta));
        let mut next = 0;
        while let Some((folder, _)) = tree.folders.get(next) {
            let folder = folder.clone();
            let path = volume.join(&folder);
            next += 1;
            let entries = match fs::read_dir(&path) {
                Ok(entries) => entries,
                Err(e) if e.kind() == ErrorKind::NotFound && next > 1 => continue,
                Err(e) => return Err(StorageError::io("list", &path)(e)),
            };
            for entry in entries {
                let entry = entry.map_err(StorageError::io("list", &path))?;
                let name = folder.join(entry.file_name());
                if name == Path::new(ZFS_CONTROL) {
                    continue;
                }
                match entry.metadata() {
                    Ok(meta) if meta.is_dir() => tree.folders.push((name, meta)),
                    Ok(meta) if meta.is_symlink() => tree.links.push((name, meta)),
                    Ok(meta) if meta.is_file() => {
                        tree.bytes += allocated_bytes(&meta);
                        tree.files.push((name, meta));
                    }
                    Ok(_) => {}
                    Err(e) if e.kind() == ErrorKind::NotFound => {}
                    Err(e) => return Err(StorageError::io("read", &entry.path())(e)),
                }
            }
        }
        // So that no thread is left alone with a large one at the end.
        tree.files
            .sort_by_key(|(_, meta)| std::cmp::Reverse(allocated_bytes(meta)));
        Ok(tree)
    }

    /// All there is: folders first, each before what is in it.
    pub(super) fn entries(&self) -> impl DoubleEndedIterator<Item = (&Path, Kind, &Metadata)> {
        let folders = self
            .folders
            .iter()
            .map(|(n, m)| (n.as_path(), Kind::Folder, m));
        let files = self.files.iter().map(|(n, m)| (n.as_path(), Kind::File, m));
        let links = self.links.iter().map(|(n, m)| (n.as_path(), Kind::Link, m));
        folders.chain(files).chain(links)
    }
}
