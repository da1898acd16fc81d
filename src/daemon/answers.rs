//! What the engine knows, in the api's shapes.

use std::time::SystemTime;

use crate::api::types::{
    Backend, BranchDetails, BranchInfo, BranchState, BranchUsage, Created, Deleted, Finding,
    Forgotten, LeftBranch, Level, MovedBranch, PoolUsage, SharedWith, SharerKind, StorageMoved,
    Switched, TrashUsage, UrlInfo, UsageInfo, UsageTotal,
};
use crate::engine::{
    self, BranchView, Credentials, DeletedBranch, Engine, EngineError, InstanceState, Sharer,
    UsageReport, UsageView,
};
use crate::git::Location;
use crate::registry::{BranchRecord, Stage};
use crate::types::BackendAddress;

fn timestamp(time: SystemTime) -> String {
    humantime::format_rfc3339_millis(time).to_string()
}

/// A branch is `creating` until its instance was ready for the first time.
pub(super) fn state(state: &InstanceState, record: &BranchRecord) -> BranchState {
    match state {
        _ if record.stage == Stage::Creating => BranchState::Creating,
        InstanceState::Running(_) => BranchState::Running,
        InstanceState::Failed { .. } => BranchState::Failed,
        InstanceState::Starting if !record.started_once => BranchState::Creating,
        InstanceState::Starting | InstanceState::Stopped => BranchState::Stopped,
    }
}

pub(super) fn branch(view: &BranchView) -> BranchInfo {
    let record = &view.record;
    let failure = match &view.state {
        InstanceState::Failed { error, .. } => Some(error),
        _ => None,
    };
    BranchInfo {
        id: record.id.clone(),
        name: record.name.clone(),
        parent: view.parent.clone(),
        state: state(&view.state, record),
        active: view.active,
        port: record.port,
        created_at: timestamp(record.created_at),
        trashed_at: record.trashed_at.map(timestamp),
        expires_at: Engine::expiry(record).map(timestamp),
        failure: failure.map(|e| e.message.clone()),
        failure_hint: failure.and_then(|e| e.hint.clone()),
    }
}

pub(super) async fn details(
    engine: &Engine,
    at: &Location,
    record: &BranchRecord,
) -> Result<BranchDetails, EngineError> {
    let view = engine.view_of(at, record)?;
    let (credentials, _) = engine.connect_info(at, Some(&record.name)).await?;
    let usage = engine.usage_if_quick(record).await;
    Ok(BranchDetails {
        info: branch(&view),
        storage: record.driver.clone(),
        runtime: record.server.runtime.clone(),
        url: credentials.url(),
        volume: engine.volume(record)?,
        backend: match engine.backend(record) {
            BackendAddress::Unix { dir, port } => Backend::Unix { unix: dir, port },
            BackendAddress::Tcp { host, port } => Backend::Tcp { tcp: host, port },
        },
        postgres_version: record.server.major,
        log_file: engine.log_file(record),
        children: engine.children(record)?,
        sessions: view.sessions,
        logical_bytes: usage.map(|u| u.logical_bytes),
        exclusive_bytes: usage.map(|u| u.exclusive_bytes),
    })
}

pub(super) fn created(
    engine: &Engine,
    at: &Location,
    made: &engine::Created,
) -> Result<Created, EngineError> {
    Ok(Created {
        branch: branch(&engine.view_of(at, &made.branch)?),
        method: made.method.clone(),
        storage: made.branch.driver.clone(),
        runtime: made.branch.server.runtime.clone(),
        postgres_version: made.branch.server.major,
        duration_ms: made.took.as_secs_f64() * 1000.0,
    })
}

pub(super) fn switched(switched: &engine::Switched) -> Switched {
    Switched {
        branch: switched.branch.name.clone(),
        previous: switched.previous.clone(),
        changed: switched.changed,
        duration_ms: switched.took.as_secs_f64() * 1000.0,
    }
}

pub(super) fn deleted(deleted: DeletedBranch) -> Deleted {
    Deleted {
        name: deleted.name,
        destroyed: deleted.destroyed,
        expires_at: deleted.expires_at.map(timestamp),
    }
}

pub(super) fn moved(moved: engine::Moved) -> StorageMoved {
    StorageMoved {
        pool: moved.pool,
        driver: moved.driver,
        branches: moved
            .branches
            .into_iter()
            .map(|branch| MovedBranch {
                id: branch.record.id,
                name: branch.record.name,
                trashed: branch.record.trashed_at.is_some(),
                from_pool: branch.from.pool,
                from_driver: branch.from.driver,
                logical_bytes: branch.bytes,
                written_bytes: branch.written_bytes,
                shares_with: branch.base,
                stood_still_ms: branch.stood_still.map(|d| d.as_secs_f64() * 1000.0),
            })
            .collect(),
        left: moved
            .left
            .into_iter()
            .map(|(branch, why)| LeftBranch {
                name: branch.name,
                why,
            })
            .collect(),
        needed_bytes: moved.needed_bytes,
        free_bytes: moved.free_bytes,
        dry_run: moved.dry_run,
    }
}

pub(super) fn forgotten(branch: BranchRecord) -> Forgotten {
    Forgotten {
        volume: branch.pool.join(branch.volume.as_str()),
        name: branch.name,
    }
}

/// So many sharers are named at most for each branch: a thousand branches of one parent all share
/// with each other.
const SHARERS: usize = 100;

pub(super) fn usage(report: UsageReport) -> Result<UsageInfo, EngineError> {
    let pool = report.pool.ok_or_else(|| {
        EngineError::refused("this project has no database branch yet")
            .hint("dbranch init-postgres")
    })?;
    let total = report.total;
    Ok(UsageInfo {
        trash: TrashUsage {
            branches: report.branches.iter().filter(|b| b.trashed).count(),
            freed_by_delete_bytes: total.trash_freed_bytes,
        },
        branches: report.branches.into_iter().map(branch_usage).collect(),
        total: UsageTotal {
            logical_bytes: total.logical_bytes,
            exclusive_bytes: total.exclusive_bytes,
            shared_bytes: total.shared_bytes,
            freed_by_delete_bytes: total.freed_bytes,
        },
        pool: PoolUsage {
            driver: pool.driver,
            path: pool.path,
            total_bytes: pool.total_bytes,
            free_bytes: pool.free_bytes,
        },
        notes: report.notes,
    })
}

fn branch_usage(branch: UsageView) -> BranchUsage {
    let sharers = branch.shared_with.as_ref().map_or(0, Vec::len);
    let shared_with = branch.shared_with.map(|with| {
        with.into_iter()
            .take(SHARERS)
            .map(|(sharer, bytes)| {
                let (kind, name) = match sharer {
                    Sharer::Branch(name) => (SharerKind::Branch, name.to_string()),
                    Sharer::Trashed(name) => (SharerKind::Trash, name.to_string()),
                    Sharer::Other(name) => (SharerKind::Other, name),
                };
                SharedWith { name, kind, bytes }
            })
            .collect()
    });
    BranchUsage {
        name: branch.name,
        logical_bytes: branch.logical_bytes,
        exclusive_bytes: branch.exclusive_bytes,
        shared_bytes: branch.shared_bytes,
        freed_by_delete_bytes: branch.freed_bytes,
        shared_with,
        shared_with_more: sharers.saturating_sub(SHARERS),
        trashed: branch.trashed,
    }
}

pub(super) fn url(credentials: &Credentials, branch: Option<BranchRecord>) -> UrlInfo {
    UrlInfo {
        url: credentials.url(),
        host: credentials.host.clone(),
        port: credentials.port,
        user: credentials.user.clone(),
        password: credentials.password.reveal().to_owned(),
        database: credentials.database.clone(),
        branch: branch.map(|b| b.name),
    }
}

pub(super) fn finding(check: engine::Check) -> Finding {
    Finding {
        what: check.what,
        level: match check.level {
            engine::Level::Ok => Level::Ok,
            engine::Level::Warning => Level::Warning,
            engine::Level::Problem => Level::Problem,
        },
        detail: check.detail,
        fix: check.fix,
    }
}
