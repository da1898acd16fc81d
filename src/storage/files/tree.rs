//! Reads what there is to clone, before any of it is cloned.

use std::ffi::OsString;
use std::fs::{self, Metadata};
use std::io::ErrorKind;
use std::ops::Range;
use std::path::{Path, PathBuf};

use super::super::{Omit, StorageError, usage::allocated_bytes};

/// What lies below a folder. Paths are relative to the volume; a folder comes
/// before what is in it.
#[derive(Debug, Default)]
pub(super) struct Tree {
    pub(super) folders: Vec<(PathBuf, Metadata)>,
    /// Folder by folder.
    pub(super) files: Vec<Entry>,
    pub(super) links: Vec<(PathBuf, Metadata)>,
    /// Sum of the files' sizes as allocated.
    pub(super) bytes: u64,
    /// Whether nothing was left out.
    pub(super) is_whole: bool,
}

/// A file of a tree.
#[derive(Debug)]
pub(super) struct Entry {
    /// Index into the tree's folders.
    folder: usize,
    pub(super) name: OsString,
    bytes: u64,
}

/// Some files of one folder: what a thread does at a time.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Batch {
    /// Index into the tree's folders.
    pub(super) folder: usize,
    /// Indices into the tree's files.
    pub(super) files: Range<usize>,
    bytes: u64,
}

/// A batch ends at so many files or bytes, so that threads have about the same to do.
const BATCH_FILES: usize = 64;
const BATCH_BYTES: u64 = 64 << 20;

impl Tree {
    /// Walks the folder `start` of `volume`. What vanishes meanwhile is passed
    /// over, and so are sockets and pipes: they mean nothing in a clone.
    pub(super) fn read(volume: &Path, start: &Path, omit: Omit) -> Result<Self, StorageError> {
        let mut tree = Self {
            is_whole: true,
            ..Self::default()
        };
        let top = volume.join(start);
        let meta = fs::symlink_metadata(&top).map_err(StorageError::io("read", &top))?;
        tree.folders.push((start.to_owned(), meta));
        let mut next = 0;
        while let Some((folder, _)) = tree.folders.get(next) {
            let folder = folder.clone();
            let path = volume.join(&folder);
            let entries = match fs::read_dir(&path) {
                Ok(entries) => entries,
                Err(e) if e.kind() == ErrorKind::NotFound && next > 0 => {
                    next += 1;
                    continue;
                }
                Err(e) => return Err(StorageError::io("list", &path)(e)),
            };
            for entry in entries {
                let entry = entry.map_err(StorageError::io("list", &path))?;
                let name = folder.join(entry.file_name());
                if (omit.0)(&name) {
                    tree.is_whole = false;
                    continue;
                }
                match entry.metadata() {
                    Ok(meta) if meta.is_dir() => tree.folders.push((name, meta)),
                    Ok(meta) if meta.is_symlink() => tree.links.push((name, meta)),
                    Ok(meta) if meta.is_file() => {
                        let bytes = allocated_bytes(&meta);
                        tree.bytes += bytes;
                        tree.files.push(Entry {
                            folder: next,
                            name: entry.file_name(),
                            bytes,
                        });
                    }
                    Ok(_) => tree.is_whole = false,
                    Err(e) if e.kind() == ErrorKind::NotFound => {}
                    Err(e) => return Err(StorageError::io("read", &entry.path())(e)),
                }
            }
            next += 1;
        }
        Ok(tree)
    }

    /// Paths of the files.
    pub(super) fn file_names(&self) -> impl Iterator<Item = PathBuf> {
        self.files
            .iter()
            .map(|file| self.folders[file.folder].0.join(&file.name))
    }

    /// All files, in batches. The largest first, so that no thread is left alone with one
    /// at the end.
    pub(super) fn batches(&self) -> Vec<Batch> {
        let mut batches: Vec<Batch> = Vec::new();
        for (n, file) in self.files.iter().enumerate() {
            match batches.last_mut() {
                Some(last)
                    if last.folder == file.folder
                        && last.files.len() < BATCH_FILES
                        && last.bytes + file.bytes <= BATCH_BYTES =>
                {
                    last.files.end = n + 1;
                    last.bytes += file.bytes;
                }
                _ => batches.push(Batch {
                    folder: file.folder,
                    files: n..n + 1,
                    bytes: file.bytes,
                }),
            }
        }
        batches.sort_by_key(|batch| std::cmp::Reverse(batch.bytes));
        batches
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn batches_hold_every_file_once_and_are_bounded() {
        let files = |folder, count, bytes| {
            (0..count).map(move |n: usize| Entry {
                folder,
                name: n.to_string().into(),
                bytes,
            })
        };
        let tree = Tree {
            files: files(0, 3, 10)
                .chain(files(1, BATCH_FILES + 1, 1))
                .chain(files(2, 2, BATCH_BYTES))
                .collect(),
            ..Tree::default()
        };
        let batches = tree.batches();
        let mut seen: Vec<usize> = batches.iter().flat_map(|b| b.files.clone()).collect();
        seen.sort_unstable();
        assert_eq!(seen, (0..tree.files.len()).collect::<Vec<_>>());
        for batch in &batches {
            let of_it = &tree.files[batch.files.clone()];
            assert!(of_it.iter().all(|f| f.folder == batch.folder));
            assert_eq!(of_it.iter().map(|f| f.bytes).sum::<u64>(), batch.bytes);
        }
        let sizes: Vec<_> = batches.iter().map(|b| (b.folder, b.files.len())).collect();
        assert_eq!(sizes, [(2, 1), (2, 1), (1, BATCH_FILES), (0, 3), (1, 1)]);
        assert!(Tree::default().batches().is_empty());
    }

    #[test]
    fn a_tree_knows_whether_something_was_left_out() {
        let folder = tempfile::tempdir().unwrap();
        fs::create_dir(folder.path().join("sub")).unwrap();
        fs::write(folder.path().join("sub/file"), "x").unwrap();
        let read = |omit| Tree::read(folder.path(), Path::new(""), omit).unwrap();
        assert!(read(Omit::NOTHING).is_whole);
        assert_eq!(read(Omit::NOTHING).files.len(), 1);
        let without = read(Omit(|path| path.ends_with("file")));
        assert!(!without.is_whole && without.files.is_empty());
        let _socket = std::os::unix::net::UnixListener::bind(folder.path().join("socket")).unwrap();
        assert!(!read(Omit::NOTHING).is_whole);
    }
}
