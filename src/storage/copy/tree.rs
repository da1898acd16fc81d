//! Reads what there is to copy, before any of it is copied.

use std::fs::{self, Metadata};
use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use super::super::{Omit, StorageError, usage::allocated_bytes};

/// What lies below a folder. Paths are relative to the volume; a folder comes
/// before what is in it.
#[derive(Debug, Default)]
pub(in crate::storage) struct Tree {
    pub(in crate::storage) folders: Vec<(PathBuf, Metadata)>,
    pub(in crate::storage) files: Vec<(PathBuf, Metadata)>,
    pub(in crate::storage) links: Vec<(PathBuf, Metadata)>,
    /// Sum of the files' sizes as allocated.
    pub(in crate::storage) bytes: u64,
}

impl Tree {
    /// Walks the folder `start` of `volume`. What vanishes meanwhile is passed
    /// over, and so are sockets and pipes: they mean nothing in a copy.
    pub(in crate::storage) fn read(
        volume: &Path,
        start: &Path,
        omit: Omit,
    ) -> Result<Self, StorageError> {
        let mut tree = Self::default();
        let top = volume.join(start);
        let meta = fs::symlink_metadata(&top).map_err(StorageError::io("read", &top))?;
        tree.folders.push((start.to_owned(), meta));
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
                if (omit.0)(&name) {
                    continue;
                }
                match entry.metadata() {
                    Ok(meta) => tree.take(name, meta),
                    Err(e) if e.kind() == ErrorKind::NotFound => {}
                    Err(e) => return Err(StorageError::io("read", &entry.path())(e)),
                }
            }
        }
        // The largest first, so that no thread is left alone with one at the end.
        tree.files
            .sort_by_key(|(_, meta)| std::cmp::Reverse(allocated_bytes(meta)));
        Ok(tree)
    }

    fn take(&mut self, name: PathBuf, meta: Metadata) {
        if meta.is_dir() {
            self.folders.push((name, meta));
        } else if meta.is_file() {
            self.bytes += allocated_bytes(&meta);
            self.files.push((name, meta));
        } else if meta.is_symlink() {
            self.links.push((name, meta));
        }
    }
}
