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
    // Not bound to `branches`: what is to be removed stays to be removed, whatever becomes of the branch.
    "
    CREATE TABLE moves (
        volume TEXT PRIMARY KEY,
        driver TEXT NOT NULL,
        pool   TEXT NOT NULL,
        branch TEXT NOT NULL
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

#[cfg(test)]
mod tests {
    use super::*;

    /// A registry as a program that knew the first `steps` steps left it.
    fn written_at(steps: usize) -> Connection {
        let connection = Connection::open_in_memory().unwrap();
        for step in &STEPS[..steps] {
            connection.execute_batch(step).unwrap();
        }
        connection
            .pragma_update(None, "user_version", i64::try_from(steps).unwrap())
            .unwrap();
        connection
            .execute_batch(
                "INSERT INTO projects (id, name, common_dir, config, proxy_port, created_at)
                    VALUES ('p', 'shop', '/r/.git', '{}', 15432, 1);
                 INSERT INTO branches (id, project, name, stage, volume, driver, pool, runtime, programs, major, port,
                    created_at) VALUES ('b', 'p', 'main', 'ready', 'v', 'copy', '/pool', 'native', '/bin', 15, 15500, 1);",
            )
            .unwrap();
        connection
    }

    #[test]
    fn a_registry_from_before_moves_keeps_its_branches_and_can_move_them() {
        let mut connection = written_at(3);
        migrate(&mut connection).unwrap();
        let version: i64 = connection
            .query_row("PRAGMA user_version", [], |row| row.get(0))
            .unwrap();
        assert_eq!(usize::try_from(version).unwrap(), STEPS.len());
        let volume: String = connection
            .query_row("SELECT volume FROM branches WHERE id = 'b'", [], |row| {
                row.get(0)
            })
            .unwrap();
        assert_eq!(volume, "v");
        connection
            .execute(
                "INSERT INTO moves (volume, driver, pool, branch) VALUES ('w', 'btrfs', '/new', 'b')",
                [],
            )
            .unwrap();
        migrate(&mut connection).unwrap();
    }
}
