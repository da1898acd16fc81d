//! Whether two clones of one running cluster, cut one after the other, hold the same data.
//!
//! The first clone is cut while nobody waits for a checkpoint, the second behind one. The second is
//! smaller and starts sooner; it may take the first one's place if it holds the same:
//!
//! - What a clone's server shows is what the log says up to the log's end. From the first one's end
//!   on, the second one's log must hold nothing but what a checkpoint writes, and that checkpoint
//!   among it. What the first clone lacks because it still lay in `wal_buffers` shows as such a record.
//! - The log is synced before any page that it describes, commit status, prepared transactions and
//!   sequences included; tables written without log (`wal_level = minimal`) before their commit. So
//!   a change that the log does not hold is in no file either.
//! - Without log change: hint bits and free space maps (no content), unlogged tables (emptied by
//!   the recovery that both need), temporary files (dropped), statistics, slots (shed), a sequence within
//!   the 32 numbers it logged ahead (the second clone loses fewer of them). And files such as
//!   `postgresql.auto.conf`, which are compared byte by byte.
//!
//! A log that was being written while the first clone was cut ends unclearly: not the same.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use super::wal::{Control, Log, Record};

/// From this much log since the last checkpoint on, a clone is cut again behind a new one. It then
/// starts sooner and owns what it changes, not what its parent had written (measured with
/// 8 MiB: 0.25 MiB instead of 8).
const CHECKPOINT_FROM_BYTES: u64 = 2 << 20;

/// More than this outside the log's reach is not compared.
const COMPARED_BYTES: u64 = 4 << 20;

/// Where a clone's log ends.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Cut {
    data_dir: PathBuf,
    control: Control,
    end: u64,
    last_record: Option<u64>,
}

impl Cut {
    /// Reads it from a clone that no server has started yet.
    ///
    /// # Errors
    /// Where the end is not clear: the parent was writing just then.
    pub fn of(data_dir: &Path) -> io::Result<Self> {
        let control = Control::read(data_dir)?;
        let (end, last_record) = Log::open(data_dir, control)?.end()?;
        Ok(Self {
            data_dir: data_dir.to_owned(),
            control,
            end,
            last_record,
        })
    }

    /// Whether so much would have to be replayed that a clone behind a checkpoint is worth it.
    pub fn checkpoint_pays(&self) -> bool {
        self.end.saturating_sub(self.control.redo) >= CHECKPOINT_FROM_BYTES
    }

    /// Whether the parent has written hardly anything since, to judge by where it would write
    /// next. It may have noted by itself who is writing, as every 15 s (`RUNNING_XACTS`).
    pub fn is_recent(&self, insert_position: u64) -> bool {
        (self.end..self.end + 256).contains(&insert_position)
    }

    /// Where the log ends: what `pg_current_wal_insert_lsn()` says as long as nothing is written.
    #[cfg(test)]
    pub fn end(&self) -> u64 {
        self.end
    }

    /// Whether a later clone of the same cluster, behind a checkpoint, holds the same data.
    ///
    /// # Errors
    /// Where that is not clear.
    pub fn holds_what(&self, later: &Path) -> io::Result<bool> {
        let control = Control::read(later)?;
        if (control.system, control.timeline) != (self.control.system, self.control.timeline)
            || control.redo < self.end
        {
            return Ok(false);
        }
        let log = Log::open(later, control)?;
        let mut reader = log.reader(self.end);
        let (mut previous, mut checkpointed) = (self.last_record, false);
        while let Some(record) = reader.next()? {
            let follows = previous.is_none_or(|start| start == record.previous);
            if !follows || !belongs_to_a_checkpoint(&record) {
                return Ok(false);
            }
            checkpointed |= record.start == control.checkpoint;
            previous = Some(record.start);
        }
        Ok(checkpointed && unlogged_files(&self.data_dir)? == unlogged_files(later)?)
    }
}

/// `access/rmgrlist.h`, `catalog/pg_control.h` and `storage/standbydefs.h`.
fn belongs_to_a_checkpoint(record: &Record) -> bool {
    const XLOG: u8 = 0;
    const STANDBY: u8 = 8;
    const CHECKPOINT_ONLINE: u8 = 0x10;
    const CHECKPOINT_REDO: u8 = 0xe0;
    const RUNNING_XACTS: u8 = 0x10;
    matches!(
        (record.manager, record.kind),
        (XLOG, CHECKPOINT_ONLINE | CHECKPOINT_REDO) | (STANDBY, RUNNING_XACTS)
    )
}

/// The files whose changes no log describes: all outside the server's own folders.
fn unlogged_files(data_dir: &Path) -> io::Result<BTreeMap<PathBuf, Vec<u8>>> {
    let mut found = BTreeMap::new();
    let (mut folders, mut bytes) = (vec![data_dir.to_owned()], 0);
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(&folder)? {
            let entry = entry?;
            let (path, kind) = (entry.path(), entry.file_type()?);
            let name = entry.file_name();
            let name = name.to_string_lossy();
            if folder == data_dir && is_the_servers(&name) {
                continue;
            }
            if kind.is_dir() {
                folders.push(path);
                continue;
            }
            let content = if kind.is_symlink() {
                fs::read_link(&path)?.into_os_string().into_encoded_bytes()
            } else {
                bytes += entry.metadata()?.len();
                if bytes > COMPARED_BYTES {
                    let text = format!("{} holds too much to compare", folder.display());
                    return Err(io::Error::new(io::ErrorKind::InvalidData, text));
                }
                fs::read(&path)?
            };
            found.insert(path.strip_prefix(data_dir).unwrap_or(&path).into(), content);
        }
    }
    Ok(found)
}

/// What the log describes or recovery makes anew (manual, "Database File Layout"), and the files
/// of the running server.
fn is_the_servers(name: &str) -> bool {
    const OWN: [&str; 19] = [
        "base",
        "global",
        "pg_commit_ts",
        "pg_dynshmem",
        "pg_logical",
        "pg_multixact",
        "pg_notify",
        "pg_replslot",
        "pg_serial",
        "pg_snapshots",
        "pg_stat",
        "pg_stat_tmp",
        "pg_subtrans",
        "pg_tblspc",
        "pg_twophase",
        "pg_wal",
        "pg_xact",
        "postmaster.opts",
        "postmaster.pid",
    ];
    OWN.contains(&name)
}
