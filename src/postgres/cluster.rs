//! Facts about a data directory, and what a clone of one must shed.

use std::ffi::OsStr;
use std::fs;
use std::io::{self, ErrorKind};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use super::BackupLabel;
use crate::fsx;
use crate::types::Owner;

/// The data directory's name in its volume.
pub const DATA_FOLDER: &str = "data";

/// The write-ahead log's folder, relative to the volume.
pub const WAL_FOLDER: &str = "data/pg_wal";

/// The control file, relative to the volume. A copy of a running cluster takes it
/// last, so that it is no older than any other file.
pub const CONTROL_FILE: &str = "data/global/pg_control";

/// Why a data directory can't be used.
#[derive(Debug, thiserror::Error)]
pub enum ClusterError {
    #[error("{} is no PostgreSQL data directory: {reason}", path.display())]
    NotACluster { path: PathBuf, reason: String },
    /// Data outside the directory: no clone of the volume would have it.
    #[error("{what} leads out of the data directory, to {}", target.display())]
    External { what: String, target: PathBuf },
    #[error("{action} {}: {source}", path.display())]
    Io {
        action: &'static str,
        path: PathBuf,
        source: io::Error,
    },
}

impl ClusterError {
    /// What to do next, where that is known.
    pub fn hint(&self) -> Option<String> {
        match self {
            Self::External { what, .. } => Some(format!(
                "a branch must hold all of its data: move the contents back into {what}, or load the \
                 database into a new branch with pg_dump and pg_restore"
            )),
            Self::NotACluster { .. } | Self::Io { .. } => None,
        }
    }

    fn io(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Self {
        move |source| Self::Io {
            action,
            path: path.to_owned(),
            source,
        }
    }
}

/// The major version that made the data directory, from its `PG_VERSION`.
pub fn major(data_dir: &Path) -> Result<u32, ClusterError> {
    let path = data_dir.join("PG_VERSION");
    let not_a_cluster = |reason: &str| ClusterError::NotACluster {
        path: data_dir.to_owned(),
        reason: reason.to_owned(),
    };
    match fs::read_to_string(&path) {
        Ok(text) => text.trim().parse().map_err(|_| {
            not_a_cluster(&format!("PG_VERSION says `{}`", text.trim().escape_debug()))
        }),
        Err(e) if e.kind() == ErrorKind::NotFound => Err(not_a_cluster("it has no PG_VERSION")),
        Err(e) => Err(ClusterError::io("read", &path)(e)),
    }
}

/// Folders whose contents a copy of a running cluster leaves out; the folders
/// themselves must be there (manual, "Making a Base Backup Using the Low Level API").
const EMPTIED: [&str; 8] = [
    "pg_wal",
    "pg_replslot",
    "pg_dynshmem",
    "pg_notify",
    "pg_serial",
    "pg_snapshots",
    "pg_stat_tmp",
    "pg_subtrans",
];

/// Whether a copy of a running cluster leaves this out. The path is relative to
/// the volume. The write-ahead log and the control file are left out to be
/// caught up with later; what else is left out postgres makes anew.
pub fn omit(path: &Path) -> bool {
    let Ok(inside) = path.strip_prefix(DATA_FOLDER) else {
        return false;
    };
    let mut parts = inside.iter();
    let first = parts.next().unwrap_or_default();
    if parts.next().is_some() && EMPTIED.iter().any(|folder| first == *folder) {
        return true;
    }
    if path == Path::new(CONTROL_FILE) || path.starts_with("data/postmaster.pid") {
        return true;
    }
    let name = path.file_name().unwrap_or_default();
    name == "postmaster.opts"
        || name.as_bytes().starts_with(b"pgsql_tmp")
        // pg_internal.init, and with a pid appended while it is being written.
        || name.as_bytes().starts_with(b"pg_internal.init")
        || is_temporary_relation(name)
}

/// `t3_16384`, `t3_16384_fsm`, `t3_16384.1`: a session's temporary tables
/// (manual, "Database File Layout"), which a starting server deletes.
fn is_temporary_relation(name: &OsStr) -> bool {
    let digits = |text: &str| !text.is_empty() && text.bytes().all(|b| b.is_ascii_digit());
    let Some(rest) = name.to_str().and_then(|n| n.strip_prefix('t')) else {
        return false;
    };
    rest.split_once('_').is_some_and(|(backend, relation)| {
        let number = relation.split(['_', '.']).next().unwrap_or_default();
        digits(backend) && digits(number)
    })
}

/// Drops from a fresh clone what belongs to its parent's server: the lock file
/// of its postmaster, the replication slots, which would keep WAL for receivers
/// that the clone doesn't have, and the counts of what the parent had changed, by
/// which autovacuum would do the parent's pending work once more in each clone
/// (349 MiB instead of 0.25 in one whose parent had updated a third of 300 MB). A
/// clone of a running parent has no such counts: crash recovery discards them
/// (manual, "The Cumulative Statistics System"). Fast: a few names, no walk.
pub fn shed(data_dir: &Path) -> Result<(), ClusterError> {
    for name in ["postmaster.pid", "postmaster.opts"] {
        remove_if_there(&data_dir.join(name))?;
    }
    for entry in entries(&data_dir.join("pg_stat"))? {
        if is_cumulative_statistics(&entry.file_name()) {
            remove_if_there(&entry.path())?;
        }
    }
    let slots = data_dir.join("pg_replslot");
    for entry in entries(&slots)? {
        let path = entry.path();
        let removed = match entry.file_type() {
            Ok(kind) if kind.is_dir() => fs::remove_dir_all(&path),
            Ok(_) => fs::remove_file(&path),
            Err(e) => Err(e),
        };
        removed.map_err(ClusterError::io("remove", &path))?;
    }
    Ok(())
}

/// `pgstat.stat`, up to version 14 `global.stat` and `db_16384.stat`. Extensions keep
/// theirs in the same folder.
fn is_cumulative_statistics(name: &OsStr) -> bool {
    name.to_str().is_some_and(|name| {
        matches!(name, "pgstat.stat" | "global.stat")
            || name
                .strip_prefix("db_")
                .is_some_and(|rest| rest.strip_suffix(".stat").is_some())
    })
}

fn remove_if_there(path: &Path) -> Result<(), ClusterError> {
    match fs::remove_file(path) {
        Err(e) if e.kind() != ErrorKind::NotFound => Err(ClusterError::io("remove", path)(e)),
        _ => Ok(()),
    }
}

/// What a folder holds; nothing if it isn't there.
fn entries(folder: &Path) -> Result<Vec<fs::DirEntry>, ClusterError> {
    match fs::read_dir(folder).and_then(Iterator::collect) {
        Ok(entries) => Ok(entries),
        Err(e) if e.kind() == ErrorKind::NotFound => Ok(Vec::new()),
        Err(e) => Err(ClusterError::io("list", folder)(e)),
    }
}

/// Puts the label of a finished backup into the copy, whose server then replays
/// the WAL from the backup's start instead of trusting the control file.
pub fn write_backup_label(
    data_dir: &Path,
    label: &BackupLabel,
    owner: Option<Owner>,
) -> Result<(), ClusterError> {
    let path = data_dir.join("backup_label");
    fsx::write_atomic(&path, label.text.as_bytes(), 0o600, owner)
        .map_err(ClusterError::io("write", &path))
}

/// Refuses a cluster that keeps data elsewhere: tablespaces, or a write-ahead log
/// behind a link. No single clone of the volume covers those.
pub fn refuse_external(data_dir: &Path) -> Result<(), ClusterError> {
    let wal = data_dir.join("pg_wal");
    let mut links = vec![wal];
    links.extend(
        entries(&data_dir.join("pg_tblspc"))?
            .iter()
            .map(fs::DirEntry::path),
    );
    for path in links {
        match fs::read_link(&path) {
            Ok(target) => {
                let what = path.strip_prefix(data_dir).unwrap_or(&path);
                return Err(ClusterError::External {
                    what: what.display().to_string(),
                    target,
                });
            }
            // A folder (EINVAL), as it should be, or nothing yet.
            Err(e) if matches!(e.kind(), ErrorKind::InvalidInput | ErrorKind::NotFound) => {}
            Err(e) => return Err(ClusterError::io("read", &path)(e)),
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::symlink;

    #[test]
    fn the_version_is_read_or_the_folder_refused() {
        let dir = tempfile::tempdir().unwrap();
        assert!(matches!(
            major(dir.path()),
            Err(ClusterError::NotACluster { .. })
        ));
        fs::write(dir.path().join("PG_VERSION"), "15\n").unwrap();
        assert_eq!(major(dir.path()).unwrap(), 15);
        fs::write(dir.path().join("PG_VERSION"), "9.6\n").unwrap();
        assert!(major(dir.path()).unwrap_err().to_string().contains("9.6"));
    }

    #[test]
    fn a_running_clusters_passing_files_are_omitted() {
        for path in [
            "data/postmaster.pid",
            "data/postmaster.opts",
            "data/global/pg_control",
            "data/pg_wal/000000010000000000000001",
            "data/pg_wal/archive_status/x.ready",
            "data/pg_replslot/slot/state",
            "data/pg_stat_tmp/global.stat",
            "data/base/pgsql_tmp/pgsql_tmp12.0",
            "data/base/pgsql_tmp",
            "data/base/5/pg_internal.init",
            "data/global/pg_internal.init.77",
            "data/base/5/t3_16384",
            "data/base/5/t3_16384_fsm",
            "data/base/5/t12_16384.1",
        ] {
            assert!(omit(Path::new(path)), "{path}");
        }
    }

    #[test]
    fn everything_else_is_copied() {
        for path in [
            "data",
            "data/pg_wal",
            "data/pg_replslot",
            "data/pg_subtrans",
            "data/pg_xact/0000",
            "data/pg_logical/replorigin_checkpoint",
            "data/pg_twophase/00000123",
            "data/base/5/16384",
            "data/base/5/16384_init",
            "data/base/5/2619_fsm",
            "data/postgresql.auto.conf",
            "data/tables",
            "data/t_1",
            "pg_wal/x",
            "other/pgsql_tmp",
        ] {
            assert!(!omit(Path::new(path)), "{path}");
        }
    }

    #[test]
    fn a_clone_sheds_its_parents_server_slots_and_counts_and_may_do_so_again() {
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name);
        fs::create_dir_all(at("pg_replslot/standby")).unwrap();
        fs::create_dir(at("pg_stat")).unwrap();
        let counts = ["pgstat.stat", "global.stat", "db_5.stat"];
        for name in counts.iter().chain(&["pg_stat_statements.stat"]) {
            fs::write(at("pg_stat").join(name), "").unwrap();
        }
        fs::write(at("pg_replslot/standby/state"), "").unwrap();
        for name in ["postmaster.pid", "postmaster.opts", "PG_VERSION"] {
            fs::write(at(name), "15\n").unwrap();
        }
        shed(dir.path()).unwrap();
        shed(dir.path()).unwrap();
        assert!(!at("postmaster.pid").exists() && !at("postmaster.opts").exists());
        assert_eq!(fs::read_dir(at("pg_replslot")).unwrap().count(), 0);
        assert!(at("PG_VERSION").exists());
        assert!(counts.iter().all(|name| !at("pg_stat").join(name).exists()));
        assert!(at("pg_stat/pg_stat_statements.stat").exists());
    }

    #[test]
    fn data_outside_the_directory_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name);
        fs::create_dir_all(at("pg_wal")).unwrap();
        // A tablespace that lies in place is a folder.
        fs::create_dir_all(at("pg_tblspc/16390")).unwrap();
        refuse_external(dir.path()).unwrap();
        symlink("/elsewhere", at("pg_tblspc/16391")).unwrap();
        let error = refuse_external(dir.path()).unwrap_err();
        assert!(error.to_string().contains("pg_tblspc/16391"), "{error}");
        assert!(error.hint().is_some());
        fs::remove_file(at("pg_tblspc/16391")).unwrap();
        fs::remove_dir(at("pg_wal")).unwrap();
        symlink("/wal", at("pg_wal")).unwrap();
        let error = refuse_external(dir.path()).unwrap_err();
        assert!(error.to_string().contains("/wal"), "{error}");
    }
}
