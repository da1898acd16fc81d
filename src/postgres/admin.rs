//! The few statements dbranch sends to a server as its administrator.

use std::path::PathBuf;
use std::time::Duration;

use tokio::task::JoinHandle;
use tokio_postgres::{Client, Config, NoTls, Row, SimpleQueryMessage};

use crate::types::{BackendAddress, BranchId, Password};

use super::WAL_FOLDER;

/// How long connecting may take, authentication included.
const CONNECT_LIMIT: Duration = Duration::from_secs(10);

/// Why a server could not be asked, or what it answered instead.
#[derive(Debug, thiserror::Error)]
pub enum AdminError {
    #[error("connect to {address}: {}", describe(source))]
    Connect {
        address: BackendAddress,
        source: tokio_postgres::Error,
    },
    #[error("connect to {address}: no answer within {} s", CONNECT_LIMIT.as_secs())]
    TimedOut { address: BackendAddress },
    #[error("{action}: {}", describe(source))]
    Query {
        action: &'static str,
        source: tokio_postgres::Error,
    },
    #[error("{action}: unexpected answer from the server: {detail}")]
    Unexpected {
        action: &'static str,
        detail: String,
    },
}

impl AdminError {
    /// The server is starting, stopping or recovering: trying again may help
    /// (SQLSTATE `57P03`, or no socket yet).
    pub fn is_not_ready_yet(&self) -> bool {
        let Self::Connect { source, .. } = self else {
            return false;
        };
        match source.code() {
            Some(code) => code.code() == "57P03",
            None => std::error::Error::source(source)
                .and_then(|e| e.downcast_ref::<std::io::Error>())
                .is_some_and(|e| {
                    use std::io::ErrorKind::{ConnectionRefused, ConnectionReset, NotFound};
                    matches!(e.kind(), ConnectionRefused | ConnectionReset | NotFound)
                }),
        }
    }
}

/// The server's own words; the library's `Display` says only "db error".
fn describe(error: &tokio_postgres::Error) -> String {
    match error.as_db_error() {
        Some(db) => {
            let detail = db.detail().map(|d| format!(" ({d})")).unwrap_or_default();
            format!("{} [{}]{detail}", db.message(), db.code().code())
        }
        None => match std::error::Error::source(error) {
            Some(source) => format!("{error}: {source}"),
            None => error.to_string(),
        },
    }
}

/// A session of the administrator. Dropping it ends the session.
#[derive(Debug)]
pub struct Admin {
    client: Client,
    connection: JoinHandle<()>,
}

impl Drop for Admin {
    fn drop(&mut self) {
        self.connection.abort();
    }
}

impl Admin {
    /// Connects within 10 s or fails. Cancel-safe.
    pub async fn connect(
        address: &BackendAddress,
        user: &str,
        database: &str,
        password: &Password,
    ) -> Result<Self, AdminError> {
        let mut config = Config::new();
        match address {
            BackendAddress::Unix { dir, port } => config.host_path(dir).port(*port),
            BackendAddress::Tcp { host, port } => config.host(host).port(*port),
        };
        config
            .user(user)
            .dbname(database)
            .password(password.reveal())
            .application_name("dbranch")
            // What a user's database defines must not be met by our statements, nor limits
            // meant for an application stop them.
            .options(
                "-c search_path=pg_catalog -c statement_timeout=0 -c lock_timeout=0 \
                 -c default_transaction_read_only=off",
            );
        let (client, connection) = tokio::time::timeout(CONNECT_LIMIT, config.connect(NoTls))
            .await
            .map_err(|_| AdminError::TimedOut {
                address: address.clone(),
            })?
            .map_err(|source| AdminError::Connect {
                address: address.clone(),
                source,
            })?;
        let connection = tokio::spawn(async move {
            // Whoever uses the session sees its error; this is for the log.
            if let Err(error) = connection.await {
                tracing::debug!(%error, "administrator's session ended");
            }
        });
        Ok(Self { client, connection })
    }

    /// Whether the session is over, for whatever reason.
    pub fn is_closed(&self) -> bool {
        self.client.is_closed()
    }

    /// The server's version as a number: `150018`, `180003`.
    pub async fn version_num(&self) -> Result<u32, AdminError> {
        const ACTION: &str = "read the server's version";
        let row = self.row(ACTION, "SHOW server_version_num").await?;
        parse(ACTION, &row)
    }

    /// Makes `role` (superuser, with this password) and its `database`, or brings
    /// them to that state. The password travels and is logged as a SCRAM verifier
    /// only. `locale` is for a new database; without it the cluster's own holds.
    pub async fn set_up(
        &self,
        role: &str,
        password: &Password,
        database: &str,
        locale: Option<&str>,
    ) -> Result<(), AdminError> {
        const ACTION: &str = "set up the role";
        const MAKE: &str = "set up the database";
        let found = "SELECT 1 FROM pg_catalog.pg_roles WHERE rolname = $1";
        let verb = if self.exists(ACTION, found, role).await? {
            "ALTER"
        } else {
            "CREATE"
        };
        let verifier = postgres_protocol::password::scram_sha_256(password.reveal().as_bytes());
        let statement = format!(
            "{verb} ROLE {} LOGIN SUPERUSER PASSWORD {}",
            identifier(role),
            literal(&verifier)
        );
        self.run(ACTION, &statement).await?;

        let found = "SELECT 1 FROM pg_catalog.pg_database WHERE datname = $1";
        let statement = if self.exists(MAKE, found, database).await? {
            format!(
                "ALTER DATABASE {} OWNER TO {}",
                identifier(database),
                identifier(role)
            )
        } else {
            let locale = locale
                .map(|l| format!(" TEMPLATE template0 ENCODING 'UTF8' LOCALE {}", literal(l)))
                .unwrap_or_default();
            format!(
                "CREATE DATABASE {} OWNER {}{locale}",
                identifier(database),
                identifier(role)
            )
        };
        self.run(MAKE, &statement).await
    }

    /// Makes a checkpoint.
    pub async fn checkpoint(&self) -> Result<(), AdminError> {
        self.run("write a checkpoint", "CHECKPOINT").await
    }

    /// Where the next WAL record will begin, written out or not.
    pub async fn insert_position(&self) -> Result<u64, AdminError> {
        const ACTION: &str = "read the log's position";
        let row = self
            .row(ACTION, "SELECT pg_catalog.pg_current_wal_insert_lsn()")
            .await?;
        let text = row.first().map(String::as_str).unwrap_or_default();
        lsn(text).ok_or_else(|| AdminError::Unexpected {
            action: ACTION,
            detail: format!("`{}`", text.escape_debug()),
        })
    }

    /// Begins a base backup: from here on the cluster may be copied while it runs.
    /// WAL isn't recycled until the backup is ended or dropped, by a temporary slot.
    /// The session is used up by it, as the server ends a backup with its session.
    pub async fn start_backup(self) -> Result<Backup, AdminError> {
        const ACTION: &str = "start a backup";
        let version = self.version_num().await?;
        // Silent while files are copied, for as long as that takes. Not in the connection's
        // options because version 13 doesn't know it.
        if version >= 140_000 {
            self.run(ACTION, "SET idle_session_timeout = 0").await?;
        }
        let row = self
            .row(
                ACTION,
                "SELECT setting FROM pg_catalog.pg_settings WHERE name = 'wal_segment_size'",
            )
            .await?;
        let segment_bytes = parse(ACTION, &row)?;
        let slot = format!("dbranch_{}", BranchId::random());
        // Physical, reserving WAL at once, gone with the session.
        self.run(
            "reserve WAL for the backup",
            &format!(
                "SELECT pg_catalog.pg_create_physical_replication_slot({}, true, true)",
                literal(&slot)
            ),
        )
        .await?;
        self.run(
            ACTION,
            if version >= 150_000 {
                "SELECT pg_catalog.pg_backup_start('dbranch', true)"
            } else {
                "SELECT pg_catalog.pg_start_backup('dbranch', true, false)"
            },
        )
        .await?;
        Ok(Backup {
            admin: self,
            version,
            segment_bytes,
            slot,
        })
    }

    async fn run(&self, action: &'static str, statement: &str) -> Result<(), AdminError> {
        self.client
            .batch_execute(statement)
            .await
            .map_err(|source| AdminError::Query { action, source })
    }

    /// One row, asked for in one round trip: no statement is prepared.
    async fn row(&self, action: &'static str, query: &str) -> Result<Answer, AdminError> {
        let messages = self
            .client
            .simple_query(query)
            .await
            .map_err(|source| AdminError::Query { action, source })?;
        messages
            .into_iter()
            .find_map(|message| match message {
                SimpleQueryMessage::Row(row) => Some(
                    (0..row.len())
                        .map(|i| row.get(i).unwrap_or_default().to_owned())
                        .collect(),
                ),
                _ => None,
            })
            .ok_or_else(|| AdminError::Unexpected {
                action,
                detail: "no row".into(),
            })
    }

    async fn exists(
        &self,
        action: &'static str,
        query: &str,
        name: &str,
    ) -> Result<bool, AdminError> {
        let rows: Vec<Row> = self
            .client
            .query(query, &[&name])
            .await
            .map_err(|source| AdminError::Query { action, source })?;
        Ok(!rows.is_empty())
    }
}

/// The columns of a row, as text.
type Answer = Vec<String>;

fn parse<T: std::str::FromStr>(action: &'static str, row: &Answer) -> Result<T, AdminError> {
    let text = row.first().map(String::as_str).unwrap_or_default();
    text.parse().map_err(|_| AdminError::Unexpected {
        action,
        detail: format!("`{}`", text.escape_debug()),
    })
}

/// A base backup under way. Dropping it aborts the backup and lets WAL be recycled.
#[derive(Debug)]
pub struct Backup {
    admin: Admin,
    version: u32,
    segment_bytes: u64,
    slot: String,
}

impl Backup {
    /// Whether the session is over, and the backup with it.
    pub fn is_closed(&self) -> bool {
        self.admin.is_closed()
    }

    /// Ends the copying. WAL up to here is on disk, and stays until `end`.
    pub async fn stop(&mut self) -> Result<BackupLabel, AdminError> {
        const ACTION: &str = "stop the backup";
        let row = self
            .admin
            .row(
                ACTION,
                if self.version >= 150_000 {
                    "SELECT lsn, labelfile FROM pg_catalog.pg_backup_stop(false)"
                } else {
                    "SELECT lsn, labelfile FROM pg_catalog.pg_stop_backup(false, false)"
                },
            )
            .await?;
        let [stop, text] = <[String; 2]>::try_from(row).map_err(|row| AdminError::Unexpected {
            action: ACTION,
            detail: format!("{} columns", row.len()),
        })?;
        BackupLabel::new(text, &stop, self.segment_bytes).map_err(|detail| AdminError::Unexpected {
            action: ACTION,
            detail,
        })
    }

    /// Lets WAL be recycled again and gives the session back.
    pub async fn end(self) -> Result<Admin, AdminError> {
        let statement = format!(
            "SELECT pg_catalog.pg_drop_replication_slot({})",
            literal(&self.slot)
        );
        self.admin
            .run("release the backup's WAL", &statement)
            .await?;
        Ok(self.admin)
    }
}

/// What a copy made in backup mode needs to start consistently.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BackupLabel {
    /// The content of `backup_label`, to be written byte for byte.
    pub text: String,
    wal_files: Vec<String>,
}

impl BackupLabel {
    fn new(text: String, stop: &str, segment_bytes: u64) -> Result<Self, String> {
        let wal_files = wal_files(&text, stop, segment_bytes)
            .ok_or_else(|| format!("label `{}`, stop {stop}", text.escape_debug()))?;
        Ok(Self { text, wal_files })
    }

    /// The WAL files that hold all from the backup's start to its end, relative
    /// to the volume: no more than these has to be copied.
    pub fn wal_files(&self) -> impl Iterator<Item = PathBuf> + '_ {
        self.wal_files
            .iter()
            .map(|name| PathBuf::from(WAL_FOLDER).join(name))
    }
}

/// Names from the first file, which the label tells
/// (`START WAL LOCATION: 0/2000028 (file 000000010000000000000002)`), to the one
/// that ends at `stop`.
fn wal_files(label: &str, stop: &str, segment_bytes: u64) -> Option<Vec<String>> {
    let line = label
        .lines()
        .find_map(|l| l.strip_prefix("START WAL LOCATION: "))?;
    let (start, rest) = line.split_once(" (file ")?;
    let (start, stop) = (lsn(start)?, lsn(stop)?);
    let timeline = rest.get(..8)?;
    if !segment_bytes.is_power_of_two() || segment_bytes > 1 << 32 || stop <= start {
        return None;
    }
    let in_each = (1 << 32) / segment_bytes;
    let names: Vec<String> = (start / segment_bytes..=(stop - 1) / segment_bytes)
        .map(|n| format!("{timeline}{:08X}{:08X}", n / in_each, n % in_each))
        .collect();
    (names.first()? == rest.get(..24)?).then_some(names)
}

/// `16/B374D848`, a position in the WAL (manual, "`pg_lsn` Type").
fn lsn(text: &str) -> Option<u64> {
    let (high, low) = text.split_once('/')?;
    let half = |text| u32::from_str_radix(text, 16).ok().map(u64::from);
    Some(half(high)? << 32 | half(low)?)
}

/// Quoted as an identifier (manual, "Identifiers and Key Words").
fn identifier(name: &str) -> String {
    format!("\"{}\"", name.replace('"', "\"\""))
}

/// Quoted as a string, whatever `standard_conforming_strings` says.
fn literal(text: &str) -> String {
    if text.contains('\\') {
        format!(" E'{}'", text.replace('\\', "\\\\").replace('\'', "''"))
    } else {
        format!("'{}'", text.replace('\'', "''"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LABEL: &str = "START WAL LOCATION: 1/FE000028 (file 0000000300000001000000FE)\n\
                         CHECKPOINT LOCATION: 1/FE000060\nSTART TIMELINE: 3\n";

    #[test]
    fn the_wal_files_of_a_backup_are_named_across_the_boundary() {
        let label = BackupLabel::new(LABEL.into(), "2/1000000", 16 << 20).unwrap();
        let names: Vec<PathBuf> = label.wal_files().collect();
        assert_eq!(
            names,
            [
                "data/pg_wal/0000000300000001000000FE",
                "data/pg_wal/0000000300000001000000FF",
                "data/pg_wal/000000030000000200000000",
            ]
            .map(PathBuf::from)
        );
    }

    #[test]
    fn a_label_that_makes_no_sense_is_refused() {
        for (label, stop, segment) in [
            ("", "2/0", 16 << 20),
            (LABEL, "x", 16 << 20),
            (LABEL, "1/0", 16 << 20),
            (LABEL, "2/0", 0),
            // The file named isn't the one the position lies in.
            (LABEL, "2/0", 64 << 20),
        ] {
            assert!(BackupLabel::new(label.into(), stop, segment).is_err());
        }
    }

    #[test]
    fn names_and_strings_are_quoted() {
        assert_eq!(identifier("a\"b"), "\"a\"\"b\"");
        assert_eq!(literal("it's"), "'it''s'");
        assert_eq!(literal("a\\'"), " E'a\\\\'''");
    }

    #[tokio::test]
    async fn a_server_that_is_not_there_is_said_so() {
        let dir = tempfile::tempdir().unwrap();
        let address = BackendAddress::Unix {
            dir: dir.path().to_owned(),
            port: 5432,
        };
        let error = Admin::connect(&address, "u", "d", &Password::new("p"))
            .await
            .unwrap_err();
        assert!(error.is_not_ready_yet(), "{error}");
        assert!(error.to_string().contains(":5432"), "{error}");
    }
}
