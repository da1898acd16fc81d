//! The schema, one step a version. A step that was released is never edited.

use rusqlite::Connection;

use super::RegistryError;

const STEPS: &[&str] = &[
    "
    CREATE TABLE projects (
        id               TEXT PRIMARY KEY,
        name             TEXT NOT NULL,
        common_dir       TEXT NOT NULL UNIQUE,
        config           TEXT NOT NULL,
        proxy_port       INTEGER NOT NULL UNIQUE,
        last_port        INTEGER NOT NULL DEFAULT 0,
        allowed_commands TEXT,
        created_at       INTEGER NOT NULL,
        deleted_at       INTEGER
    ) STRICT;
    CREATE TABLE branches (
        id           TEXT PRIMARY KEY,
        project      TEXT NOT NULL REFERENCES projects(id),
        name         TEXT NOT NULL,
        parent       TEXT REFERENCES branches(id) ON DELETE SET NULL,
        stage        TEXT NOT NULL CHECK (stage IN ('creating', 'ready', 'deleting')),
        volume       TEXT NOT NULL UNIQUE,
        driver       TEXT NOT NULL,
        pool         TEXT NOT NULL,
        runtime      TEXT NOT NULL,
        programs     TEXT NOT NULL,
        major        INTEGER NOT NULL,
        port         INTEGER NOT NULL UNIQUE,
        started_once INTEGER NOT NULL DEFAULT 0,
        created_at   INTEGER NOT NULL,
        trashed_at   INTEGER
    ) STRICT;
    CREATE UNIQUE INDEX branch_names ON branches(project, name) WHERE trashed_at IS NULL AND stage <> 'deleting';
    CREATE INDEX branch_parents ON branches(parent);
    CREATE TABLE endpoints (
        project  TEXT NOT NULL REFERENCES projects(id) ON DELETE CASCADE,
        git_dir  TEXT NOT NULL,
        branch   TEXT REFERENCES branches(id) ON DELETE SET NULL,
        previous TEXT REFERENCES branches(id) ON DELETE SET NULL,
        head     TEXT,
        PRIMARY KEY (project, git_dir)
    ) STRICT;
    ",
    "
    ALTER TABLE endpoints ADD COLUMN port INTEGER;
    CREATE UNIQUE INDEX endpoint_ports ON endpoints(port);
    ",
    "
    CREATE TABLE spare_volumes (
        volume TEXT PRIMARY KEY,
        branch TEXT NOT NULL REFERENCES branches(id)
    ) STRICT;
    ",
];

/// Brings the schema to this program's version, each step in a transaction.
pub(super) fn migrate(connection: &mut Connection) -> Result<(), RegistryError> {
    let found: usize = connection
        .query_row("PRAGMA user_version", [], |row| row.get::<_, i64>(0))
        .map(|v| usize::try_from(v).unwrap_or(usize::MAX))?;
    if found > STEPS.len() {
        return Err(RegistryError::Newer {
            found,
            known: STEPS.len(),
        });
    }
    for (index, step) in STEPS.iter().enumerate().skip(found) {
        let transaction = connection.transaction()?;
        transaction.execute_batch(step)?;
        transaction.pragma_update(
            None,
            "user_version",
            i64::try_from(index + 1).expect("few steps"),
        )?;
        transaction.commit()?;
    }
    Ok(())
}
