//! Set-up pools: the api's shapes and the engine's.

use crate::api::types as api;
use crate::engine::{self, EngineError, PoolChange};

pub(super) fn job(job: api::PoolJob) -> Result<engine::PoolJob, EngineError> {
    Ok(engine::PoolJob {
        path: job.path,
        change: match job.change {
            api::PoolChange::SetUp {
                size_bytes,
                file_system,
            } => PoolChange::SetUp {
                size_bytes,
                file_system: file_system
                    .map(|name| name.parse())
                    .transpose()
                    .map_err(|e: crate::types::Invalid| EngineError::unknown_word(e.0))?,
            },
            api::PoolChange::Grow { size_bytes } => PoolChange::Grow { size_bytes },
            api::PoolChange::Remove => PoolChange::Remove,
        },
        force: job.force,
        unit_dir: job.unit_dir,
        fstab: job.fstab,
    })
}

pub(super) fn plan(plan: engine::PoolPlan) -> api::PoolPlan {
    let groups = plan.groups.into_iter().map(|group| api::PoolScript {
        as_root: group.as_root,
        script: group.script,
    });
    api::PoolPlan {
        path: plan.path,
        image: plan.image,
        file_system: plan.file_system.map(|fs| fs.to_string()),
        size_bytes: plan.size_bytes,
        host_free_bytes: plan.host_free_bytes,
        groups: groups.collect(),
        notes: plan.notes,
        not_needed: plan.not_needed,
        is_in_use: plan.is_in_use,
        container_image: plan.container_image,
    }
}

pub(super) fn adopted(adopted: engine::Adopted) -> api::PoolAdopted {
    api::PoolAdopted {
        path: adopted.path,
        driver: adopted.driver.to_string(),
        is_new: adopted.is_new,
        settings_file: adopted.settings_file,
        overridden_by: adopted.overridden_by.map(Into::into),
        projects_elsewhere: adopted.projects_elsewhere,
    }
}

pub(super) fn info(pool: engine::PoolStatus) -> api::PoolInfo {
    let (problem, fix) = pool.problem.unzip();
    api::PoolInfo {
        path: pool.path,
        driver: pool.driver,
        file_system: pool.file_system,
        mount_options: pool.options,
        total_bytes: pool.total_bytes,
        free_bytes: pool.free_bytes,
        image: pool.file.map(|file| api::PoolImage {
            path: file.path,
            size_bytes: file.size_bytes,
            allocated_bytes: file.allocated_bytes,
            host_free_bytes: file.host_free_bytes,
        }),
        mounted_by: pool.at_boot,
        for_new_projects: pool.is_for_new_projects,
        branches: pool
            .branches
            .into_iter()
            .map(|b| api::PoolBranches {
                project: b.project,
                branches: b.branches,
                trashed: b.trashed,
            })
            .collect(),
        problem,
        fix,
    }
}
