//! How much write-ahead log a clone would have to replay, told from the files alone.

use std::fs;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

/// From this much write-ahead log since the last checkpoint on, a checkpoint is made before a
/// clone. The clone then starts sooner and owns what it changes, not what its parent had
/// written (measured with 8 MiB: 0.25 MiB instead of 8).
const CHECKPOINT_FROM_BYTES: u64 = 2 << 20;

/// Size of a WAL page, `XLOG_BLCKSZ`, which nobody builds otherwise.
const PAGE: u64 = 8192;

/// Whether a checkpoint before a clone pays. Reads a few bytes of files, so that a checkout
/// needs no session of an idle parent: such a session would cost the parent's server a
/// process, and the branch 160 KiB of relation cache in one more database.
///
/// Files of an unknown layout (`catalog/pg_control.h`, `access/xlog_internal.h`) count as
/// "no": the clone is right without a checkpoint, only slower to start.
pub fn checkpoint_pays(data_dir: &Path) -> io::Result<bool> {
    let Some(redo) = redo_of(&fs::read(data_dir.join("global/pg_control"))?) else {
        return Ok(false);
    };
    let end = end_of_log(&data_dir.join("pg_wal"))?.unwrap_or(redo);
    Ok(end.saturating_sub(redo) >= CHECKPOINT_FROM_BYTES)
}

/// Where recovery would begin: `ControlFileData.checkPointCopy.redo`, at the same place in
/// versions 13 to 18.
fn redo_of(control: &[u8]) -> Option<u64> {
    let bytes = |at: usize| control.get(at..at + 8)?.try_into().ok();
    let version = u32::from_ne_bytes(control.get(8..12)?.try_into().ok()?);
    (1300..1900)
        .contains(&version)
        .then(|| bytes(40).map(u64::from_ne_bytes))?
}

/// The position up to which the log is on disk, to a page. The file written last has it: those
/// that wait to be used again bear later names, but are older.
fn end_of_log(folder: &Path) -> io::Result<Option<u64>> {
    let mut newest: Option<(SystemTime, PathBuf, u64, u64)> = None;
    for entry in fs::read_dir(folder)? {
        let entry = entry?;
        let name = entry.file_name();
        let Some((high, low)) = name.to_str().and_then(positions) else {
            continue;
        };
        // One may be renamed or removed meanwhile.
        let Ok(metadata) = entry.metadata() else {
            continue;
        };
        let (written, bytes) = (metadata.modified()?, metadata.len());
        if newest.as_ref().is_none_or(|(when, ..)| *when < written) {
            newest = Some((written, entry.path(), (high << 32) + low * bytes, bytes));
        }
    }
    let Some((_, path, start, bytes)) = newest else {
        return Ok(None);
    };
    let file = fs::File::open(path)?;
    // Pages are written in order and name their position; behind the last one are zeros, or the
    // names of an earlier use.
    let (mut written, mut beyond) = (0, bytes / PAGE);
    while written < beyond {
        let page = written.midpoint(beyond);
        let mut address = [0; 8];
        file.read_exact_at(&mut address, page * PAGE + 8)?;
        if u64::from_ne_bytes(address) == start + page * PAGE {
            written = page + 1;
        } else {
            beyond = page;
        }
    }
    Ok(Some(start + written * PAGE))
}

/// `0000000100000002000000AB`: timeline, then the two parts of the position.
fn positions(name: &str) -> Option<(u64, u64)> {
    let is_wal = name.len() == 24 && name.bytes().all(|b| b.is_ascii_hexdigit());
    let part = |range: std::ops::Range<usize>| u64::from_str_radix(&name[range], 16).ok();
    is_wal.then(|| Some((part(8..16)?, part(16..24)?)))?
}

#[cfg(test)]
mod tests {
    use super::*;

    const FILE: u64 = 16 << 20;

    /// A cluster with WAL files, each with so many pages written, oldest first.
    fn cluster(redo: u64, files: &[(&str, u64)]) -> tempfile::TempDir {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir(dir.path().join("global")).unwrap();
        fs::create_dir(dir.path().join("pg_wal")).unwrap();
        let mut control = vec![0; 8192];
        control[8..12].copy_from_slice(&1300u32.to_ne_bytes());
        control[40..48].copy_from_slice(&redo.to_ne_bytes());
        fs::write(dir.path().join("global/pg_control"), control).unwrap();
        let mut age = 100;
        for (name, pages) in files {
            let file = fs::File::create(dir.path().join("pg_wal").join(name)).unwrap();
            file.set_len(FILE).unwrap();
            let start = positions(name).map_or(0, |(high, low)| (high << 32) + low * FILE);
            for page in 0..*pages {
                let address = (start + page * PAGE).to_ne_bytes();
                file.write_all_at(&address, page * PAGE + 8).unwrap();
            }
            age -= 1;
            file.set_modified(SystemTime::now() - std::time::Duration::from_secs(age))
                .unwrap();
        }
        dir
    }

    #[test]
    fn a_checkpoint_pays_from_two_mebibytes_of_log_on() {
        let pays =
            |redo, files: &[(&str, u64)]| checkpoint_pays(cluster(redo, files).path()).unwrap();
        let (one, two) = ("000000010000000100000010", "000000010000000100000011");
        let redo = (1 << 32) + 0x10 * FILE;
        assert!(!pays(redo, &[(one, 0)]));
        assert!(!pays(redo, &[(one, 255)]));
        assert!(pays(redo, &[(one, 256)]));
        assert!(!pays(redo + FILE / 2, &[(one, 1024 + 255)]));
        assert!(pays(redo + FILE / 2, &[(one, 2048), (two, 1)]));
        // The later one waits to be used again: it was written before.
        assert!(!pays(redo, &[(two, 2048), (one, 10)]));
        assert!(!pays(redo, &[("00000002.history", 0), (one, 1)]));
    }

    #[test]
    fn an_unknown_control_file_means_no_checkpoint() {
        let dir = cluster(0, &[("000000010000000100000010", 2048)]);
        fs::write(dir.path().join("global/pg_control"), [0; 20]).unwrap();
        assert!(!checkpoint_pays(dir.path()).unwrap());
    }
}
