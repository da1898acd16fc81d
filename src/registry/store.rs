//! The registry's file and its statements.

use std::collections::HashSet;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use rusqlite::types::Type;
use rusqlite::{Connection, OptionalExtension, Row, named_params, params};

use super::{
    BranchRecord, EndpointRecord, MoveRecord, Place, ProjectRecord, ServerRecord, Stage, migrations,
};
use crate::types::{BranchId, BranchName, ProjectId, VolumeId};

#[derive(Debug, thiserror::Error)]
pub enum RegistryError {
    #[error("registry: {0}")]
    Sqlite(#[from] rusqlite::Error),
    #[error(
        "the registry has schema version {found}, this dbranch knows {known}: a newer dbranch wrote it"
    )]
    Newer { found: usize, known: usize },
    #[error("open registry {}: {source}", path.display())]
    Open {
        path: PathBuf,
        source: std::io::Error,
    },
    #[error("branch `{0}` already exists")]
    NameTaken(BranchName),
    #[error("the project was deleted meanwhile")]
    ProjectGone,
    #[error(
        "no free port from {min} to {max} for another branch: {taken} belong to branches, others to other programs"
    )]
    NoPort { min: u16, max: u16, taken: usize },
    #[error("the branch was deleted or moved meanwhile")]
    Elsewhere,
}

impl RegistryError {
    /// Whether the disk of the registry is full.
    pub fn is_out_of_room(&self) -> bool {
        matches!(self, Self::Sqlite(e) if e.sqlite_error_code() == Some(rusqlite::ErrorCode::DiskFull))
    }
}

/// How long a commit takes to be safe.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Durability {
    /// Survives the death of the daemon at once, a power failure a little later.
    Process,
    /// Survives a power failure when the call returns.
    Disk,
}

type Result<T, E = RegistryError> = std::result::Result<T, E>;

/// The registry. Cheap to clone; calls block for a millisecond at most and are
/// serialised.
#[derive(Debug, Clone)]
pub struct Registry {
    connection: Arc<Mutex<Connection>>,
}

impl Registry {
    /// Opens or makes the registry, mode 0600, and brings its schema up to date.
    pub fn open(path: &Path) -> Result<Self> {
        let io = |source| RegistryError::Open {
            path: path.to_owned(),
            source,
        };
        std::fs::OpenOptions::new()
            .create(true)
            .append(true)
            .open(path)
            .map_err(io)?;
        std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o600)).map_err(io)?;
        let mut connection = Connection::open(path)?;
        connection.pragma_update(None, "journal_mode", "WAL")?;
        connection.pragma_update(None, "foreign_keys", true)?;
        connection.busy_timeout(Duration::from_secs(5))?;
        migrations::migrate(&mut connection)?;
        Ok(Self {
            connection: Arc::new(Mutex::new(connection)),
        })
    }

    fn write<T>(
        &self,
        durability: Durability,
        work: impl FnOnce(&Connection) -> Result<T>,
    ) -> Result<T> {
        let mut connection = self
            .connection
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        let synchronous = match durability {
            Durability::Process => "NORMAL",
            Durability::Disk => "FULL",
        };
        connection.pragma_update(None, "synchronous", synchronous)?;
        let transaction = connection.transaction()?;
        let result = work(&transaction)?;
        transaction.commit()?;
        Ok(result)
    }

    fn read<T>(&self, work: impl FnOnce(&Connection) -> Result<T>) -> Result<T> {
        work(
            &self
                .connection
                .lock()
                .unwrap_or_else(PoisonError::into_inner),
        )
    }

    // --- projects ---

    pub fn projects(&self) -> Result<Vec<ProjectRecord>> {
        self.read(|c| {
            all(
                c,
                "SELECT * FROM projects ORDER BY created_at, id",
                [],
                project,
            )
        })
    }

    pub fn project(&self, id: &ProjectId) -> Result<Option<ProjectRecord>> {
        self.read(|c| project_by_id(c, id))
    }

    pub fn project_at(&self, common_dir: &Path) -> Result<Option<ProjectRecord>> {
        self.read(|c| {
            one(
                c,
                "SELECT * FROM projects WHERE common_dir = ?1",
                [text(common_dir)],
                project,
            )
        })
    }

    /// Records a new project, or one that was deleted anew.
    pub fn put_project(&self, p: &ProjectRecord) -> Result<()> {
        self.write(Durability::Disk, |c| put_project(c, p))
    }

    /// Changes what is recorded of a project, as it is at this moment: whoever read the record
    /// earlier takes back nothing that others changed since. None where there is no such project.
    pub fn change_project(
        &self,
        id: &ProjectId,
        change: impl FnOnce(&mut ProjectRecord),
    ) -> Result<Option<ProjectRecord>> {
        self.write(Durability::Disk, |c| {
            let Some(mut record) = project_by_id(c, id)? else {
                return Ok(None);
            };
            change(&mut record);
            put_project(c, &record)?;
            Ok(Some(record))
        })
    }

    /// Forgets a project that was deleted and has no branches left. True if it was one.
    pub fn remove_project(&self, id: &ProjectId) -> Result<bool> {
        self.write(Durability::Disk, |c| {
            let removed = c.execute(
                "DELETE FROM projects WHERE id = ?1 AND deleted_at IS NOT NULL
                    AND NOT EXISTS (SELECT 1 FROM branches WHERE project = ?1)",
                [id.as_str()],
            )?;
            Ok(removed > 0)
        })
    }

    // --- branches ---

    /// All branches of a project in order of creation: live, being made, and trashed.
    pub fn branches(&self, project: &ProjectId) -> Result<Vec<BranchRecord>> {
        self.read(|c| {
            all(
                c,
                "SELECT * FROM branches WHERE project = ?1 ORDER BY created_at, id",
                [project.as_str()],
                branch,
            )
        })
    }

    /// How many branches of a project can be used: neither being made, nor in the trash, nor being
    /// destroyed.
    pub fn live_count(&self, project: &ProjectId) -> Result<usize> {
        self.read(|c| {
            let count: i64 = c
                .prepare_cached(
                    "SELECT count(*) FROM branches
                     WHERE project = ?1 AND trashed_at IS NULL AND stage = 'ready'",
                )?
                .query_row([project.as_str()], |row| row.get(0))?;
            Ok(usize::try_from(count).unwrap_or_default())
        })
    }

    pub fn branch(&self, id: &BranchId) -> Result<Option<BranchRecord>> {
        self.read(|c| {
            one(
                c,
                "SELECT * FROM branches WHERE id = ?1",
                [id.as_str()],
                branch,
            )
        })
    }

    /// The branch of that name that is neither in the trash nor being destroyed.
    pub fn branch_named(
        &self,
        project: &ProjectId,
        name: &BranchName,
    ) -> Result<Option<BranchRecord>> {
        self.read(|c| {
            one(
                c,
                "SELECT * FROM branches WHERE project = ?1 AND name = ?2 AND trashed_at IS NULL AND stage <> 'deleting'",
                [project.as_str(), name.as_str()],
                branch,
            )
        })
    }

    /// Records a new branch. `ports` are tried in order; the record's own port is ignored.
    pub fn add_branch(
        &self,
        new: &BranchRecord,
        ports: (u16, u16),
        usable: impl Fn(u16) -> bool,
    ) -> Result<BranchRecord> {
        self.write(Durability::Process, |c| {
            if project_by_id(c, &new.project)?.is_none_or(|p| p.deleted_at.is_some()) {
                return Err(RegistryError::ProjectGone);
            }
            let port = take_port(c, &new.project, ports, usable)?;
            c.prepare_cached(
                "INSERT INTO branches (id, project, name, parent, stage, volume, driver, pool, port, started_once,
                                       created_at, trashed_at, runtime, programs, major)
                 VALUES (?1, ?2, ?3, (SELECT id FROM branches WHERE id = ?4), ?5, ?6, ?7, ?8, ?9, ?10, ?11, ?12,
                    ?13, ?14, ?15)",
            )?
            .execute(params![
                new.id.as_str(),
                new.project.as_str(),
                new.name.as_str(),
                new.parent.as_ref().map(BranchId::as_str),
                stage_word(new.stage),
                new.volume.as_str(),
                new.driver,
                text(&new.pool),
                port,
                new.started_once,
                millis(new.created_at),
                new.trashed_at.map(millis),
                new.server.runtime,
                new.server.programs,
                new.server.major,
            ])
            .map_err(|e| name_taken(e, &new.name))?;
            Ok(BranchRecord { port, ..new.clone() })
        })
    }

    pub fn set_stage(&self, id: &BranchId, stage: Stage) -> Result<()> {
        self.write(Durability::Disk, |c| {
            c.prepare_cached("UPDATE branches SET stage = ?2 WHERE id = ?1")?
                .execute(params![id.as_str(), stage_word(stage)])?;
            Ok(())
        })
    }

    pub fn set_started(&self, id: &BranchId) -> Result<()> {
        self.write(Durability::Process, |c| {
            c.prepare_cached("UPDATE branches SET started_once = 1 WHERE id = ?1")?
                .execute([id.as_str()])?;
            Ok(())
        })
    }

    /// Moves branches into the trash, all or none. Endpoints let go of them.
    pub fn set_trashed(&self, ids: &[BranchId], at: SystemTime) -> Result<()> {
        self.write(Durability::Disk, |c| {
            for id in ids {
                c.execute(
                    "UPDATE branches SET trashed_at = ?2 WHERE id = ?1",
                    params![id.as_str(), millis(at)],
                )?;
                for column in ["branch", "previous"] {
                    c.execute(
                        &format!("UPDATE endpoints SET {column} = NULL WHERE {column} = ?1"),
                        [id.as_str()],
                    )?;
                }
            }
            Ok(())
        })
    }

    /// Takes a branch out of the trash under a name that is free.
    pub fn untrash(&self, id: &BranchId, name: &BranchName) -> Result<()> {
        self.write(Durability::Disk, |c| {
            c.execute(
                "UPDATE branches SET trashed_at = NULL, name = ?2 WHERE id = ?1",
                [id.as_str(), name.as_str()],
            )
            .map_err(|e| name_taken(e, name))?;
            Ok(())
        })
    }

    pub fn rename_branch(&self, id: &BranchId, name: &BranchName) -> Result<()> {
        self.write(Durability::Disk, |c| {
            c.execute(
                "UPDATE branches SET name = ?2 WHERE id = ?1",
                [id.as_str(), name.as_str()],
            )
            .map_err(|e| name_taken(e, name))?;
            Ok(())
        })
    }

    pub fn remove_branch(&self, id: &BranchId) -> Result<()> {
        self.write(Durability::Disk, |c| {
            c.execute("DELETE FROM branches WHERE id = ?1", [id.as_str()])?;
            Ok(())
        })
    }

    // --- spare volumes ---

    /// Volumes that belong to branches but hold no branch's data: made and not taken yet, or
    /// replaced. Each is to be destroyed.
    pub fn spare_volumes(&self) -> Result<Vec<(VolumeId, BranchId)>> {
        self.read(|c| {
            all(c, "SELECT volume, branch FROM spare_volumes", [], |row| {
                Ok((
                    valid(row, "volume", VolumeId::new)?,
                    valid(row, "branch", BranchId::new)?,
                ))
            })
        })
    }

    /// Records a volume that is about to be made for a branch.
    pub fn add_spare_volume(&self, volume: &VolumeId, branch: &BranchId) -> Result<()> {
        self.write(Durability::Disk, |c| {
            c.execute(
                "INSERT INTO spare_volumes (volume, branch) VALUES (?1, ?2)",
                [volume.as_str(), branch.as_str()],
            )?;
            Ok(())
        })
    }

    /// Gives a branch its spare volume in exchange for the one it has, which becomes the spare.
    pub fn take_spare_volume(&self, spare: &VolumeId, branch: &BranchId) -> Result<()> {
        self.write(Durability::Disk, |c| {
            c.execute(
                "INSERT INTO spare_volumes (volume, branch) SELECT volume, id FROM branches
                 WHERE id = ?1",
                [branch.as_str()],
            )?;
            c.execute(
                "UPDATE branches SET volume = ?2 WHERE id = ?1",
                [branch.as_str(), spare.as_str()],
            )?;
            c.execute(
                "DELETE FROM spare_volumes WHERE volume = ?1",
                [spare.as_str()],
            )?;
            Ok(())
        })
    }

    /// Forgets the spare volumes of a branch that is lost with them.
    pub fn remove_spare_volumes_of(&self, branch: &BranchId) -> Result<()> {
        self.write(Durability::Process, |c| {
            c.execute(
                "DELETE FROM spare_volumes WHERE branch = ?1",
                [branch.as_str()],
            )?;
            Ok(())
        })
    }

    /// Forgets a spare volume that was destroyed.
    pub fn remove_spare_volume(&self, volume: &VolumeId) -> Result<()> {
        self.write(Durability::Process, |c| {
            c.execute(
                "DELETE FROM spare_volumes WHERE volume = ?1",
                [volume.as_str()],
            )?;
            Ok(())
        })
    }

    // --- moves ---

    /// Records where a branch that is being made will lie, as its parent was moved meanwhile.
    pub fn set_place(&self, id: &BranchId, place: &Place) -> Result<()> {
        self.write(Durability::Process, |c| put_place(c, id, place).map(drop))
    }

    /// Records that a volume is about to be made which a branch shall move to.
    pub fn begin_move(&self, new: &MoveRecord) -> Result<()> {
        self.write(Durability::Disk, |c| put_move(c, new))
    }

    /// Turns a branch from one volume to another, at once and on disk; from then on it is
    /// `from` that is to be removed. `Elsewhere` if the branch doesn't lie in `from`
    /// or no move to `to` has begun.
    pub fn turn_move(&self, id: &BranchId, from: &Place, to: &Place) -> Result<()> {
        self.write(Durability::Disk, |c| {
            let lies: Option<String> = one(
                c,
                "SELECT volume FROM branches WHERE id = ?1 AND stage = 'ready'",
                [id.as_str()],
                |row| row.get(0),
            )?;
            if lies.as_deref() != Some(from.volume.as_str()) || !end_move(c, &to.volume)? {
                return Err(RegistryError::Elsewhere);
            }
            // A spare volume lies where its branch lay.
            c.execute(
                "INSERT INTO moves (volume, driver, pool, branch)
                 SELECT volume, ?2, ?3, branch FROM spare_volumes WHERE branch = ?1",
                params![id.as_str(), from.driver, text(&from.pool)],
            )?;
            c.execute("DELETE FROM spare_volumes WHERE branch = ?1", [id.as_str()])?;
            put_place(c, id, to)?;
            put_move(
                c,
                &MoveRecord {
                    branch: id.clone(),
                    remove: from.clone(),
                },
            )
        })
    }

    /// Records that a volume was removed.
    pub fn end_move(&self, removed: &VolumeId) -> Result<()> {
        self.write(Durability::Disk, |c| end_move(c, removed).map(drop))
    }

    /// The moves under way or cut short, of all projects.
    pub fn moves(&self) -> Result<Vec<MoveRecord>> {
        self.read(|c| all(c, "SELECT * FROM moves ORDER BY volume", [], moving))
    }

    /// Whether any branch's data lies in that volume.
    pub fn holds_data(&self, volume: &VolumeId) -> Result<bool> {
        self.read(|c| {
            let found = one(
                c,
                "SELECT 1 FROM branches WHERE volume = ?1",
                [volume.as_str()],
                |_| Ok(()),
            )?;
            Ok(found.is_some())
        })
    }

    // --- endpoints ---

    pub fn endpoints(&self, project: &ProjectId) -> Result<Vec<EndpointRecord>> {
        self.read(|c| {
            all(
                c,
                "SELECT * FROM endpoints WHERE project = ?1 ORDER BY git_dir",
                [project.as_str()],
                endpoint,
            )
        })
    }

    /// A branch that is no more, or lies in the trash since the caller saw it, is passed over.
    pub fn put_endpoint(&self, e: &EndpointRecord) -> Result<()> {
        self.write(Durability::Process, |c| {
            c.prepare_cached(
                "INSERT INTO endpoints (project, git_dir, branch, previous, head, port)
                 VALUES (?1, ?2, (SELECT id FROM branches WHERE id = ?3 AND trashed_at IS NULL),
                    (SELECT id FROM branches WHERE id = ?4 AND trashed_at IS NULL), ?5, ?6)
                 ON CONFLICT (project, git_dir) DO UPDATE SET
                    branch = excluded.branch, previous = excluded.previous, head = excluded.head,
                    port = coalesce(excluded.port, port)",
            )?
            .execute(params![
                e.project.as_str(),
                text(&e.git_dir),
                e.branch.as_ref().map(BranchId::as_str),
                e.previous.as_ref().map(BranchId::as_str),
                e.head,
                e.port,
            ])?;
            Ok(())
        })
    }

    /// The port of a worktree's endpoint, given now where it has none yet. `ports` are tried in order.
    pub fn endpoint_port(
        &self,
        project: &ProjectId,
        git_dir: &Path,
        ports: (u16, u16),
        usable: impl Fn(u16) -> bool,
    ) -> Result<u16> {
        let key = params![project.as_str(), text(git_dir)];
        let known = self.read(|c| {
            one(
                c,
                "SELECT port FROM endpoints WHERE project = ?1 AND git_dir = ?2",
                key,
                |row| row.get::<_, Option<u16>>(0),
            )
        })?;
        if let Some(port) = known.flatten() {
            return Ok(port);
        }
        self.write(Durability::Disk, |c| {
            let port = take_port(c, project, ports, usable)?;
            c.execute(
                "INSERT INTO endpoints (project, git_dir, port) VALUES (?1, ?2, ?3)
                 ON CONFLICT (project, git_dir) DO UPDATE SET port = excluded.port",
                params![project.as_str(), text(git_dir), port],
            )?;
            Ok(port)
        })
    }

    pub fn remove_endpoint(&self, project: &ProjectId, git_dir: &Path) -> Result<()> {
        self.write(Durability::Process, |c| {
            c.execute(
                "DELETE FROM endpoints WHERE project = ?1 AND git_dir = ?2",
                params![project.as_str(), text(git_dir)],
            )?;
            Ok(())
        })
    }

    pub fn remove_endpoints(&self, project: &ProjectId) -> Result<()> {
        self.write(Durability::Process, |c| {
            c.execute(
                "DELETE FROM endpoints WHERE project = ?1",
                [project.as_str()],
            )?;
            Ok(())
        })
    }
}

fn project_by_id(connection: &Connection, id: &ProjectId) -> Result<Option<ProjectRecord>> {
    one(
        connection,
        "SELECT * FROM projects WHERE id = ?1",
        [id.as_str()],
        project,
    )
}

fn put_project(connection: &Connection, p: &ProjectRecord) -> Result<()> {
    connection
        .prepare_cached(
            "INSERT INTO projects (id, name, common_dir, config, proxy_port, allowed_commands, created_at,
                                   deleted_at)
             VALUES (:id, :name, :common_dir, :config, :proxy_port, :allowed, :created, :deleted)
             ON CONFLICT (id) DO UPDATE SET name = :name, common_dir = :common_dir, config = :config,
                proxy_port = :proxy_port, allowed_commands = :allowed, deleted_at = :deleted",
        )?
        .execute(named_params! {
            ":id": p.id.as_str(),
            ":name": p.name,
            ":common_dir": text(&p.common_dir),
            ":config": p.config,
            ":proxy_port": p.proxy_port,
            ":allowed": p.allowed_commands,
            ":created": millis(p.created_at),
            ":deleted": p.deleted_at.map(millis),
        })?;
    Ok(())
}

/// The next port that nobody has and that is `usable`.
///
/// In a circle: the URL of a branch or worktree that is no more shall not reach the next one.
fn take_port(
    connection: &Connection,
    project: &ProjectId,
    (min, max): (u16, u16),
    usable: impl Fn(u16) -> bool,
) -> Result<u16> {
    let taken: HashSet<u16> = all(
        connection,
        "SELECT port FROM branches UNION SELECT port FROM endpoints WHERE port IS NOT NULL",
        [],
        |row| row.get(0),
    )?
    .into_iter()
    .collect();
    let last: u16 = connection.query_row(
        "SELECT last_port FROM projects WHERE id = ?1",
        [project.as_str()],
        |row| row.get(0),
    )?;
    let port = (min.max(last.saturating_add(1))..=max)
        .chain(min..=max)
        .find(|port| !taken.contains(port) && usable(*port))
        .ok_or_else(|| RegistryError::NoPort {
            min,
            max,
            taken: taken
                .iter()
                .filter(|port| (min..=max).contains(*port))
                .count(),
        })?;
    connection.execute(
        "UPDATE projects SET last_port = ?2 WHERE id = ?1",
        params![project.as_str(), port],
    )?;
    Ok(port)
}

/// Turns a branch to a volume. False where there is no such branch.
fn put_place(connection: &Connection, id: &BranchId, place: &Place) -> Result<bool> {
    let changed = connection.execute(
        "UPDATE branches SET volume = ?2, driver = ?3, pool = ?4 WHERE id = ?1",
        params![
            id.as_str(),
            place.volume.as_str(),
            place.driver,
            text(&place.pool)
        ],
    )?;
    Ok(changed > 0)
}

fn put_move(connection: &Connection, new: &MoveRecord) -> Result<()> {
    connection.execute(
        "INSERT INTO moves (volume, driver, pool, branch) VALUES (?1, ?2, ?3, ?4)",
        params![
            new.remove.volume.as_str(),
            new.remove.driver,
            text(&new.remove.pool),
            new.branch.as_str()
        ],
    )?;
    Ok(())
}

/// False where no move names that volume.
fn end_move(connection: &Connection, removed: &VolumeId) -> Result<bool> {
    let removed = connection.execute("DELETE FROM moves WHERE volume = ?1", [removed.as_str()])?;
    Ok(removed > 0)
}

/// What a violated constraint means where a branch is given a name.
fn name_taken(e: rusqlite::Error, name: &BranchName) -> RegistryError {
    let by_name = |message: &str| message.contains("branches.name");
    match &e {
        rusqlite::Error::SqliteFailure(failure, Some(message))
            if failure.code == rusqlite::ErrorCode::ConstraintViolation && by_name(message) =>
        {
            RegistryError::NameTaken(name.clone())
        }
        _ => e.into(),
    }
}

fn one<T, P: rusqlite::Params>(
    connection: &Connection,
    sql: &str,
    parameters: P,
    map: impl FnOnce(&Row<'_>) -> rusqlite::Result<T>,
) -> Result<Option<T>> {
    Ok(connection
        .prepare_cached(sql)?
        .query_row(parameters, map)
        .optional()?)
}

fn all<T, P: rusqlite::Params>(
    connection: &Connection,
    sql: &str,
    parameters: P,
    map: impl FnMut(&Row<'_>) -> rusqlite::Result<T>,
) -> Result<Vec<T>> {
    Ok(connection
        .prepare_cached(sql)?
        .query_map(parameters, map)?
        .collect::<rusqlite::Result<_>>()?)
}

fn project(row: &Row<'_>) -> rusqlite::Result<ProjectRecord> {
    Ok(ProjectRecord {
        id: valid(row, "id", ProjectId::new)?,
        name: row.get("name")?,
        common_dir: path(row, "common_dir")?,
        config: row.get("config")?,
        proxy_port: row.get("proxy_port")?,
        allowed_commands: row.get("allowed_commands")?,
        created_at: time(row.get("created_at")?),
        deleted_at: row.get::<_, Option<i64>>("deleted_at")?.map(time),
    })
}

fn branch(row: &Row<'_>) -> rusqlite::Result<BranchRecord> {
    let parent: Option<String> = row.get("parent")?;
    Ok(BranchRecord {
        id: valid(row, "id", BranchId::new)?,
        project: valid(row, "project", ProjectId::new)?,
        name: valid(row, "name", BranchName::new)?,
        parent: parent
            .map(BranchId::new)
            .transpose()
            .map_err(|e| conversion(e.into()))?,
        stage: match row.get::<_, String>("stage")?.as_str() {
            "creating" => Stage::Creating,
            "deleting" => Stage::Deleting,
            _ => Stage::Ready,
        },
        volume: valid(row, "volume", VolumeId::new)?,
        driver: row.get("driver")?,
        pool: path(row, "pool")?,
        server: ServerRecord {
            runtime: row.get("runtime")?,
            programs: row.get("programs")?,
            major: row.get("major")?,
        },
        port: row.get("port")?,
        started_once: row.get("started_once")?,
        created_at: time(row.get("created_at")?),
        trashed_at: row.get::<_, Option<i64>>("trashed_at")?.map(time),
    })
}

fn moving(row: &Row<'_>) -> rusqlite::Result<MoveRecord> {
    Ok(MoveRecord {
        branch: valid(row, "branch", BranchId::new)?,
        remove: Place {
            volume: valid(row, "volume", VolumeId::new)?,
            driver: row.get("driver")?,
            pool: path(row, "pool")?,
        },
    })
}

fn endpoint(row: &Row<'_>) -> rusqlite::Result<EndpointRecord> {
    let id = |column: &str| -> rusqlite::Result<Option<BranchId>> {
        row.get::<_, Option<String>>(column)?
            .map(BranchId::new)
            .transpose()
            .map_err(|e| conversion(e.into()))
    };
    Ok(EndpointRecord {
        project: valid(row, "project", ProjectId::new)?,
        git_dir: path(row, "git_dir")?,
        branch: id("branch")?,
        previous: id("previous")?,
        head: row.get("head")?,
        port: row.get("port")?,
    })
}

fn valid<T, E: std::error::Error + Send + Sync + 'static>(
    row: &Row<'_>,
    column: &str,
    new: impl FnOnce(String) -> Result<T, E>,
) -> rusqlite::Result<T> {
    new(row.get(column)?).map_err(|e| conversion(Box::new(e)))
}

fn conversion(e: Box<dyn std::error::Error + Send + Sync>) -> rusqlite::Error {
    rusqlite::Error::FromSqlConversionFailure(0, Type::Text, e)
}

fn stage_word(stage: Stage) -> &'static str {
    match stage {
        Stage::Creating => "creating",
        Stage::Ready => "ready",
        Stage::Deleting => "deleting",
    }
}

/// Paths are kept as text; bytes that are no UTF-8 are escaped so that they come back unchanged.
fn text(path: &Path) -> String {
    use std::fmt::Write;
    use std::os::unix::ffi::OsStrExt;
    let mut out = String::new();
    for chunk in path.as_os_str().as_bytes().utf8_chunks() {
        out.push_str(&chunk.valid().replace('\u{1}', "\u{1}01"));
        for byte in chunk.invalid() {
            let _ = write!(out, "\u{1}{byte:02x}");
        }
    }
    out
}

fn path(row: &Row<'_>, column: &str) -> rusqlite::Result<PathBuf> {
    use std::os::unix::ffi::OsStringExt;
    let text: String = row.get(column)?;
    let mut parts = text.split('\u{1}');
    let mut bytes = parts.next().unwrap_or_default().as_bytes().to_vec();
    for part in parts {
        let (code, rest) = part.split_at_checked(2).unwrap_or((part, ""));
        bytes.push(u8::from_str_radix(code, 16).map_err(|e| conversion(Box::new(e)))?);
        bytes.extend_from_slice(rest.as_bytes());
    }
    Ok(std::ffi::OsString::from_vec(bytes).into())
}

fn millis(time: SystemTime) -> i64 {
    let since = time.duration_since(UNIX_EPOCH).unwrap_or_default();
    i64::try_from(since.as_millis()).unwrap_or(i64::MAX)
}

fn time(millis: i64) -> SystemTime {
    UNIX_EPOCH + Duration::from_millis(u64::try_from(millis).unwrap_or_default())
}

#[cfg(test)]
mod tests;
