//! What dbranch knows about PostgreSQL itself: data directories, settings,
//! readiness, and the few statements it sends as administrator.
//!
//! Starts and stops nothing; knows no branch. A volume's data directory is its
//! folder `data`. A running parent is cloned file by file in this order
//! (PostgreSQL manual, "Making a Base Backup Using the Low Level API"):
//!
//! ```text
//!   admin.start_backup          WAL is kept from here on
//!   clone all but cluster::omit
//!   catch up cluster::CONTROL_FILE
//!   backup.stop                 gives the label
//!   cluster::write_backup_label
//!   catch up label.wal_files()
//!   backup.end                  WAL may be recycled again
//! ```
//!
//! In this order nothing that breaks off half-way can be started: without control
//! file, label and WAL together a server refuses. An atomic clone needs nothing of this, only `cluster::shed`.

mod admin;
mod cluster;
mod conf;
mod pid_file;
mod probe;
mod query;
mod twin;
mod wal;

#[cfg(test)]
mod live_tests;
#[cfg(test)]
mod test_server;
#[cfg(test)]
mod twin_tests;

pub use admin::{Admin, AdminError, Backup, BackupLabel};
pub use cluster::{
    CONTROL_FILE, ClusterError, DATA_FOLDER, WAL_FOLDER, major, omit, refuse_external, shed,
    write_backup_label,
};
pub use conf::{BadSetting, Conf, Listen, check_setting, check_settings};
pub use pid_file::{PidFile, Status};
pub use probe::wait_ready;
pub use query::query;
pub use twin::Cut;
