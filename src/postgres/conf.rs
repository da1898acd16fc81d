//! The settings that dbranch manages, in files of the data directory.
//!
//! All of them stand in one readable file, `dbranch.conf`, which
//! `postgresql.conf` includes at its end. Writing content that is there already
//! writes nothing, so a clone keeps sharing its parent's blocks.

use std::collections::BTreeMap;
use std::fmt::Write;
use std::fs;
use std::io::{self, ErrorKind};
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use super::{ClusterError, major};
use crate::fsx;
use crate::types::Owner;

/// Where the server listens besides its Unix socket.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Listen {
    /// Nowhere.
    #[default]
    SocketOnly,
    /// This machine's loopback addresses.
    Loopback,
    /// Everywhere inside a container, whose port is published on loopback only.
    Container,
}

impl Listen {
    fn addresses(self) -> &'static str {
        match self {
            Self::SocketOnly => "",
            Self::Loopback => "localhost",
            Self::Container => "*",
        }
    }
}

/// What the server of a branch is told. Folder and port of the Unix socket aren't
/// here: who starts the server says them on its command line.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Conf {
    pub listen: Listen,
    pub max_connections: u32,
    /// Small: the kernel's cache is shared by all branches, this memory by none.
    pub shared_buffers_mib: u32,
    /// The pool shares blocks between branches. WAL files are then new each time
    /// instead of recycled: overwriting what is shared costs more than it saves.
    pub copy_on_write: bool,
    /// The user's own settings, which win over all that isn't managed. To be
    /// passed by [`check_settings`] before.
    pub settings: BTreeMap<String, String>,
}

impl Default for Conf {
    fn default() -> Self {
        Self {
            listen: Listen::default(),
            max_connections: 100,
            shared_buffers_mib: 32,
            copy_on_write: false,
            settings: BTreeMap::new(),
        }
    }
}

const FILE: &str = "dbranch.conf";
const INCLUDE: &str = "include_if_exists = 'dbranch.conf'";

impl Conf {
    /// Writes `dbranch.conf` and `pg_hba.conf` and has `postgresql.conf` include the
    /// first. Says whether anything changed. A running server must be told to reload.
    pub fn write(&self, data_dir: &Path, owner: Option<Owner>) -> Result<bool, ClusterError> {
        // The included file first: no server may see the line without it.
        let text = self.render(major(data_dir)?);
        let mut changed = put(&data_dir.join(FILE), &text, owner)?;
        changed |= put(&data_dir.join("pg_hba.conf"), &self.render_hba(), owner)?;
        changed |= include(&data_dir.join("postgresql.conf"), owner)?;
        Ok(changed)
    }

    /// The text of `dbranch.conf` for a server of this major version.
    pub fn render(&self, major: u32) -> String {
        let mut text = String::from(
            "# Written by dbranch whenever the branch starts: changes made here don't last.\n\
             # Settings of your own belong under postgres.settings in .dbranch.config.json.\n\n",
        );
        let mut line = |name: &str, value: &str| {
            writeln!(text, "{name} = {}", quoted(value)).expect("a string takes all text");
        };
        for (name, value) in self.managed() {
            line(name, value);
        }
        for (name, value) in self.defaults(major) {
            if !self
                .settings
                .keys()
                .any(|key| key.eq_ignore_ascii_case(name))
            {
                line(name, &value);
            }
        }
        if !self.settings.is_empty() {
            text.push_str("\n# From postgres.settings.\n");
            for (name, value) in &self.settings {
                writeln!(text, "{name} = {}", quoted(value)).expect("a string takes all text");
            }
        }
        text
    }

    /// What can't be set otherwise; see [`check_setting`].
    fn managed(&self) -> [(&'static str, &'static str); 4] {
        [
            ("listen_addresses", self.listen.addresses()),
            ("password_encryption", "scram-sha-256"),
            ("log_destination", "stderr"),
            ("logging_collector", "off"),
        ]
    }

    /// What holds unless the user says otherwise.
    fn defaults(&self, major: u32) -> Vec<(&'static str, String)> {
        let mut all = vec![
            ("max_connections", self.max_connections.to_string()),
            ("shared_buffers", format!("{}MB", self.shared_buffers_mib)),
            ("log_line_prefix", "%m [%p] %q%u@%d %a ".into()),
            // A clone has its parent's subscriptions, and would take its changes away.
            ("max_logical_replication_workers", "0".into()),
        ];
        // A clone of a running parent recovers, and before that the server syncs every file it has:
        // one by one that takes 160 ms on btrfs, 0.7 s on ext4 and 2.7 s on XFS (1,300 files, the disk
        // busy), with one syncfs(2) 80 to 130 ms. Known since version 14, on Linux only.
        if major >= 14 && cfg!(target_os = "linux") {
            all.push(("recovery_init_sync_method", "syncfs".into()));
        }
        if self.copy_on_write {
            // What a branch with these owns, and without, tells `cargo bench --bench sizes`.
            // Overwriting an old log file takes new blocks too, and keeps it: 112 MiB of 246.
            all.push(("wal_recycle", "off".into()));
            // Zeros would be blocks of the branch's own: 16 MiB more at once.
            all.push(("wal_init_zero", "off".into()));
            // `CREATE DATABASE ... TEMPLATE ... STRATEGY file_copy` shares its template's blocks.
            if major >= 18 {
                all.push(("file_copy_method", "clone".into()));
            }
            // On purpose as PostgreSQL has them: `full_page_writes`, since none of these file systems
            // promises that a page of 8 KiB is written whole, and a snapshot of a running parent
            // is to it as a power cut; autovacuum, which counts from zero in a branch and so stays
            // away until a fifth of a table has changed; checkpoints, of which there are none
            // while nothing is written; `wal_compression`, whose only method that every build has
            // costs more than it saves.
        }
        all
    }

    /// The text of `pg_hba.conf`: a password for everyone, and no one from elsewhere.
    pub fn render_hba(&self) -> String {
        let hosts: &[&str] = match self.listen {
            Listen::SocketOnly => &[],
            Listen::Loopback => &["127.0.0.1/32", "::1/128"],
            // The container sees its gateway's address, which nobody can foretell.
            Listen::Container => &["all"],
        };
        let mut text = String::from(
            "# Written by dbranch whenever the branch starts: changes made here don't last.\n\
             # TYPE  DATABASE     USER  ADDRESS       METHOD\n",
        );
        for database in ["all", "replication"] {
            writeln!(
                text,
                "local   {database:<12} all                 scram-sha-256"
            )
            .expect("a string takes all text");
            for host in hosts {
                writeln!(
                    text,
                    "host    {database:<12} all   {host:<13} scram-sha-256"
                )
                .expect("a string takes all text");
            }
        }
        text
    }
}

/// A value as `postgresql.conf` wants it (manual, "Parameter Interaction via the
/// Configuration File"): quotes doubled, and backslashes and line ends escaped,
/// since the server reads escapes as C does.
fn quoted(value: &str) -> String {
    let mut text = String::with_capacity(value.len() + 2);
    text.push('\'');
    for c in value.chars() {
        match c {
            '\'' => text.push_str("''"),
            '\\' => text.push_str("\\\\"),
            '\n' => text.push_str("\\n"),
            '\r' => text.push_str("\\r"),
            c => text.push(c),
        }
    }
    text.push('\'');
    text
}

fn put(path: &Path, text: &str, owner: Option<Owner>) -> Result<bool, ClusterError> {
    match fs::read(path) {
        Ok(there) if there == text.as_bytes() => return Ok(false),
        Err(e) if e.kind() != ErrorKind::NotFound => return Err(failed("read", path)(e)),
        _ => {}
    }
    fsx::write_atomic(path, text.as_bytes(), 0o600, owner).map_err(failed("write", path))?;
    Ok(true)
}

fn include(path: &Path, owner: Option<Owner>) -> Result<bool, ClusterError> {
    // As bytes: comments may be in any encoding.
    let mut text = fs::read(path).map_err(failed("read", path))?;
    if text
        .split(|b| *b == b'\n')
        .any(|line| line.trim_ascii() == INCLUDE.as_bytes())
    {
        return Ok(false);
    }
    let mode = fs::metadata(path).map_err(failed("read", path))?.mode() & 0o7777;
    if !text.is_empty() && !text.ends_with(b"\n") {
        text.push(b'\n');
    }
    text.extend_from_slice(format!("\n# Added by dbranch; the last word.\n{INCLUDE}\n").as_bytes());
    fsx::write_atomic(path, &text, mode, owner).map_err(failed("write", path))?;
    Ok(true)
}

fn failed(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> ClusterError {
    move |source| ClusterError::Io {
        action,
        path: path.to_owned(),
        source,
    }
}

/// A setting that users can't have, and why. The text is fit for them.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("`{}` can't be set: {reason}", name.escape_debug())]
pub struct BadSetting {
    pub name: String,
    pub reason: String,
}

/// Checks a user's settings; the first bad one is the error.
pub fn check_settings(settings: &BTreeMap<String, String>) -> Result<(), BadSetting> {
    settings
        .iter()
        .try_for_each(|(name, value)| check_setting(name, value))
}

/// Checks one setting: what dbranch manages itself can't be set, nor what would
/// make a branch share something with others. Whether the server knows it is for
/// the server to say.
pub fn check_setting(name: &str, value: &str) -> Result<(), BadSetting> {
    let reason = if looks_like_a_setting(name) {
        reason_against(&name.to_ascii_lowercase(), value)
    } else {
        Some(
            "it is no name of a PostgreSQL setting: letters, digits and `_`, with at most one `.` between",
        )
    };
    match reason {
        None => Ok(()),
        Some(reason) => Err(BadSetting {
            name: name.to_owned(),
            reason: reason.to_owned(),
        }),
    }
}

/// `work_mem`, `auto_explain.log_format`.
fn looks_like_a_setting(name: &str) -> bool {
    let part = |text: &str| {
        text.starts_with(|c: char| c.is_ascii_alphabetic() || c == '_')
            && text.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'_')
    };
    match name.split_once('.') {
        None => part(name),
        Some((extension, setting)) => part(extension) && part(setting),
    }
}

fn reason_against(name: &str, value: &str) -> Option<&'static str> {
    if value.contains('\0') {
        return Some("its value has a NUL byte");
    }
    let value = value.trim().to_ascii_lowercase();
    match name {
        "listen_addresses" | "port" => {
            Some("a branch is reached through the proxy, which knows its address")
        }
        _ if name.starts_with("unix_socket_") => {
            Some("the proxy finds a branch by its socket, so dbranch says where that is")
        }
        "bonjour" | "bonjour_name" => Some("a branch is reached through the proxy only"),
        "data_directory" | "config_file" | "hba_file" | "ident_file" | "external_pid_file" => {
            Some("every branch has files of its own, and dbranch knows where")
        }
        "include" | "include_dir" | "include_if_exists" => {
            Some("it isn't a setting but a line of the file; name the settings themselves")
        }
        "logging_collector" | "log_destination" | "log_directory" | "log_filename" => {
            Some("dbranch takes the log from the server's output; read it with `dbranch logs`")
        }
        "wal_level" if value == "minimal" => {
            Some("copying a running branch needs `replica` or `logical`")
        }
        "password_encryption" => Some("passwords are kept as scram-sha-256, nothing weaker"),
        _ if name.starts_with("archive_") => Some("every branch would write into the same archive"),
        "restore_command" | "primary_conninfo" | "primary_slot_name" | "promote_trigger_file" => {
            Some("a branch is no standby server")
        }
        _ if name.starts_with("recovery_target") => Some("a branch is no standby server"),
        "ssl" if matches!(value.as_str(), "off" | "false" | "no" | "0") => None,
        "ssl" => Some("a branch is reached through the proxy, over a local socket"),
        _ if name.starts_with("ssl_") => {
            Some("a branch is reached through the proxy, over a local socket")
        }
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn settings(of: &[(&str, &str)]) -> BTreeMap<String, String> {
        of.iter()
            .map(|(k, v)| ((*k).to_owned(), (*v).to_owned()))
            .collect()
    }

    #[test]
    fn the_users_settings_take_the_place_of_defaults() {
        let conf = Conf {
            settings: settings(&[("Shared_Buffers", "1GB"), ("work_mem", "64MB")]),
            ..Conf::default()
        };
        let text = conf.render(15);
        assert!(text.contains("\nShared_Buffers = '1GB'\n"), "{text}");
        assert!(text.contains("\nwork_mem = '64MB'\n"), "{text}");
        assert!(text.contains("\nlisten_addresses = ''\n"), "{text}");
        assert_eq!(text.to_lowercase().matches("shared_buffers").count(), 1);
        assert!(!text.contains("wal_recycle"));
        assert!(!conf.render(13).contains("recovery_init_sync_method"));
    }

    #[test]
    fn only_a_pool_that_shares_blocks_and_a_server_that_knows_it_clones_files() {
        let conf = |copy_on_write| Conf {
            copy_on_write,
            ..Conf::default()
        };
        let line = "\nfile_copy_method = 'clone'\n";
        assert!(conf(true).render(18).contains(line));
        assert!(!conf(true).render(17).contains("file_copy_method"));
        assert!(!conf(false).render(18).contains("file_copy_method"));
    }

    #[test]
    fn values_are_quoted_so_that_none_can_break_out() {
        assert_eq!(quoted("it's"), "'it''s'");
        assert_eq!(quoted(r"C:\new"), r"'C:\\new'");
        assert_eq!(quoted("a\nport = 1"), r"'a\nport = 1'");
        assert_eq!(quoted(""), "''");
    }

    #[test]
    fn no_one_gets_in_without_a_password() {
        for listen in [Listen::SocketOnly, Listen::Loopback, Listen::Container] {
            let conf = Conf {
                listen,
                ..Conf::default()
            };
            let hba = conf.render_hba();
            for line in hba.lines().filter(|line| !line.starts_with('#')) {
                assert!(line.ends_with(" scram-sha-256"), "{line}");
            }
            assert_eq!(hba.contains("\nhost "), listen != Listen::SocketOnly);
        }
    }

    #[test]
    fn writing_the_same_again_touches_no_file() {
        let dir = tempfile::tempdir().unwrap();
        let main = dir.path().join("postgresql.conf");
        fs::write(dir.path().join("PG_VERSION"), "15\n").unwrap();
        // An editor's last line without an end, and bytes that are no UTF-8.
        fs::write(&main, b"# \xfcber\nport = 5433").unwrap();
        let conf = Conf::default();
        assert!(conf.write(dir.path(), None).unwrap());
        let inodes = || {
            ["postgresql.conf", FILE, "pg_hba.conf"]
                .map(|name| fs::metadata(dir.path().join(name)).unwrap().ino())
        };
        let before = inodes();
        assert!(!conf.write(dir.path(), None).unwrap());
        assert_eq!(inodes(), before);
        let text = String::from_utf8_lossy(&fs::read(&main).unwrap()).into_owned();
        assert!(text.ends_with(&format!("{INCLUDE}\n")), "{text}");
        assert!(text.contains("port = 5433\n"), "{text}");
        let other = Conf {
            max_connections: 7,
            ..conf
        };
        assert!(other.write(dir.path(), None).unwrap());
        assert_eq!(inodes()[0], before[0]);
    }

    #[test]
    fn what_dbranch_manages_is_refused_with_a_reason() {
        for (name, value) in [
            ("port", "5433"),
            ("LISTEN_ADDRESSES", "*"),
            ("unix_socket_directories", "/tmp"),
            ("data_directory", "/x"),
            ("hba_file", "/x"),
            ("logging_collector", "on"),
            ("archive_mode", "on"),
            ("archive_command", "cp"),
            ("wal_level", " Minimal"),
            ("ssl", "on"),
            ("ssl_cert_file", "x"),
            ("include", "x"),
            ("recovery_target_lsn", "0/1"),
            ("password_encryption", "md5"),
            ("work_mem", "1\0"),
            ("a b", "1"),
            ("a.b.c", "1"),
            ("", "1"),
            ("x = 1\ny", "1"),
        ] {
            let refused = check_setting(name, value).unwrap_err();
            assert!(!refused.reason.is_empty(), "{name}");
            assert!(!refused.to_string().contains('\n'), "{refused}");
        }
    }

    #[test]
    fn all_other_settings_are_accepted() {
        let good = settings(&[
            ("work_mem", "64MB"),
            ("wal_level", "logical"),
            ("auto_explain.log_min_duration", "10ms"),
            ("shared_preload_libraries", "pg_stat_statements"),
            ("fsync", "off"),
            ("ssl", "off"),
            ("log_statement", "all"),
        ]);
        assert_eq!(check_settings(&good), Ok(()));
    }
}
