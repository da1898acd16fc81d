//! What doctor finds of pools, in words and with the command that mends it.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::time::Duration;

use super::{Check, Level};
use crate::engine::POOL_MARK;
use crate::engine::{Engine, EngineError, Result, blocking};
use crate::fsx::{as_root, shell_word};
use crate::registry::BranchRecord;
use crate::storage::health::{self, Examined, Finding};
use crate::storage::{self, Choice, DriverKind, Mount};
use crate::types::{BranchName, VolumeId};

/// How long a disk may take to answer before it is said to hang.
const ANSWER_LIMIT: Duration = Duration::from_secs(5);
/// An image's own disk with less than this free is about to break what lies in the image.
const DISK_FULL_BYTES: u64 = 256 << 20;

/// A pool, and whose volumes lie there.
#[derive(Debug, Default)]
struct PoolInUse {
    drivers: Vec<DriverKind>,
    branches: HashMap<VolumeId, BranchName>,
}

/// File systems that share no blocks between files.
const COPYING: [&str; 3] = ["ext4", "tmpfs", "overlayfs"];

impl Engine {
    /// Every pool that holds a branch of this user, and the one that new projects get.
    pub(super) async fn check_pools(&self) -> Result<Vec<Check>> {
        let mut checks = Vec::new();
        let known = self.known_branches()?;
        let mut pools: Vec<(PathBuf, PoolInUse)> = Vec::new();
        for branch in &known {
            let known = pools.iter().position(|(path, _)| *path == branch.pool);
            let at = known.unwrap_or_else(|| {
                pools.push((branch.pool.clone(), PoolInUse::default()));
                pools.len() - 1
            });
            let pool = &mut pools[at].1;
            if let Ok(kind) = branch.driver.parse()
                && !pool.drivers.contains(&kind)
            {
                pool.drivers.push(kind);
            }
            pool.branches
                .insert(branch.volume.clone(), branch.name.clone());
        }
        let wanted = self.pool();
        let wanted = wanted.canonicalize().unwrap_or(wanted);
        if !pools.iter().any(|(path, _)| *path == wanted) {
            checks.extend(self.check_future_pool(&wanted).await);
        }
        for (path, pool) in &pools {
            checks.extend(self.check_pool(path, pool).await);
        }
        Ok(checks)
    }

    fn known_branches(&self) -> Result<Vec<BranchRecord>> {
        let mut known = Vec::new();
        for project in self.0.registry.projects()? {
            known.extend(self.0.registry.branches(&project.id)?);
        }
        Ok(known)
    }

    /// The pool that the machine's settings name, where no branch lies yet. It is not made here.
    async fn check_future_pool(&self, path: &Path) -> Vec<Check> {
        if let Err(e) = self.may_become_a_pool(path) {
            return vec![of_error("pool-missing", e)];
        }
        if !path.exists() {
            let parent = path.ancestors().find(|p| p.exists());
            let file_system = parent.map_or_else(String::new, storage::file_system_of);
            let detail = format!(
                "{} will be made at first need, on {file_system}",
                path.display()
            );
            if COPYING.contains(&file_system.as_str()) {
                let detail = format!("{detail}, where every branch is a full copy");
                return vec![Check::warning(
                    "full-copies",
                    detail,
                    "dbranch storage setup",
                )];
            }
            return vec![Check::ok("storage", detail)];
        }
        self.check_pool(path, &PoolInUse::default()).await
    }

    async fn check_pool(&self, path: &Path, pool: &PoolInUse) -> Vec<Check> {
        let in_use = !pool.branches.is_empty();
        let volumes: Vec<_> = pool.branches.keys().cloned().collect();
        if in_use
            && let Err(e) = self
                .pool_is_there(path, &volumes, pool.drivers.first().copied())
                .await
        {
            return vec![of_error("pool-missing", e)];
        }
        let examined = match self.examine(path, pool).await {
            Ok(examined) => examined,
            Err(e) => return vec![of_error("pool-hangs", e)],
        };
        let mut checks: Vec<Check> = examined
            .findings
            .iter()
            .map(|finding| self.in_words(path, &examined, finding, pool))
            .collect();
        let broken = checks.iter().any(|c| c.level == Level::Problem);
        if !broken {
            checks.extend(self.check_driver(path, pool).await);
        }
        if in_use {
            checks.extend(self.check_mark(path));
        }
        let kinds: Vec<_> = pool.drivers.iter().map(|k| k.as_str()).collect();
        let detail = format!(
            "{} in {} ({}), {} free",
            if kinds.is_empty() {
                "no branch yet".to_owned()
            } else {
                kinds.join(" and ")
            },
            path.display(),
            examined.file_system,
            human(examined.space.free_bytes)
        );
        checks.insert(0, Check::ok("storage", detail));
        checks
    }

    async fn examine(&self, path: &Path, pool: &PoolInUse) -> Result<Examined> {
        let request = health::Pool {
            path: path.to_owned(),
            driver: pool.drivers.first().copied(),
            volumes: pool.branches.keys().cloned().collect(),
            data_folder: crate::postgres::DATA_FOLDER,
            owner: self.0.owner,
        };
        let work = blocking(move || Ok(health::examine(&request)?));
        match tokio::time::timeout(ANSWER_LIMIT, work).await {
            Ok(examined) => examined,
            Err(_) => Err(hangs(path)),
        }
    }

    /// Whether branches there could be made in a better way.
    async fn check_driver(&self, path: &Path, pool: &PoolInUse) -> Option<Check> {
        let choice = match self.machine().storage.value.parse::<Choice>() {
            Ok(choice) => choice,
            Err(e) => {
                return Some(Check::problem(
                    "storage",
                    e.to_string(),
                    "export DBRANCH_STORAGE=auto",
                ));
            }
        };
        if let (Choice::Driver(kind), true) = (choice, pool.drivers.is_empty()) {
            return match self.open_pool(choice, path).await {
                Ok(driver) => advised(pool, driver.advice()),
                Err(e) => Some(Check::problem(
                    "driver",
                    format!(
                        "the storage driver `{kind}` is asked for by {}: {}",
                        self.machine().storage.origin,
                        e.message
                    ),
                    e.hint.unwrap_or_default(),
                )),
            };
        }
        let best = match self.open_pool(Choice::Auto, path).await {
            Ok(best) => best,
            Err(e) => return Some(of_error("driver", e)),
        };
        let rank = |kind: DriverKind| DriverKind::ALL.iter().position(|k| *k == kind);
        match pool
            .drivers
            .iter()
            .find(|used| rank(**used) > rank(best.kind()))
        {
            Some(used) => Some(Check::warning(
                "better-driver",
                format!(
                    "branches in {} are made by `{used}`, and `{}` would work there",
                    path.display(),
                    best.kind()
                ),
                format!(
                    "dbranch storage move --to {} --driver {}",
                    shell_word(path),
                    best.kind()
                ),
            )),
            None => advised(pool, best.advice()),
        }
    }

    /// The file that tells a pool from the empty folder under its mount point.
    fn check_mark(&self, path: &Path) -> Option<Check> {
        let mark = path.join(POOL_MARK);
        match std::fs::read_to_string(&mark) {
            Ok(text) if text.contains(&*self.0.paths.state_dir().to_string_lossy()) => None,
            Ok(_) => Some(Check::warning(
                "pool-shared",
                format!(
                    "{} says that this pool belongs to the dbranch of another folder: each would remove \
                     what the other is just making",
                    mark.display()
                ),
                format!(
                    "cat {}; then give each one a pool: DBRANCH_POOL",
                    shell_word(&mark)
                ),
            )),
            Err(_) => Some(Check::warning(
                "pool-mark",
                format!(
                    "{} is gone: without it a pool that is not mounted looks like one that is empty",
                    mark.display()
                ),
                format!(
                    "dbranch shutdown; echo {} > {}; dbranch start --detach",
                    shell_word(self.0.paths.state_dir()),
                    shell_word(&mark)
                ),
            )),
        }
    }

    #[expect(clippy::too_many_lines, reason = "one arm a finding, each a few lines")]
    fn in_words(
        &self,
        path: &Path,
        examined: &Examined,
        finding: &Finding,
        pool: &PoolInUse,
    ) -> Check {
        let shown = path.display();
        let point = examined
            .mount
            .as_ref()
            .map_or_else(|| path.to_owned(), |m: &Mount| m.point.clone());
        let at = shell_word(&point);
        let root = |command: String| as_root(&command);
        let own = |uid: u32| format!("{uid}:{}", self.0.owner.gid);
        let make_room = make_room(path, examined);
        match finding {
            Finding::Volatile => Check::warning(
                "volatile",
                format!(
                    "{shown} lies in memory: its branches are gone after a restart of the machine"
                ),
                "dbranch storage setup",
            ),
            Finding::ReadOnly => Check::problem(
                "read-only",
                format!(
                    "{} is mounted read-only; if it became so by itself, `dmesg` says why",
                    point.display()
                ),
                root(format!("mount -o remount,rw {at}")),
            ),
            Finding::NotWritable { reason, immutable } => Check::problem(
                "not-writable",
                format!("nothing can be written to {shown}: {reason}"),
                root(if *immutable {
                    format!("chattr -i {}", shell_word(path))
                } else {
                    "dmesg | tail".into()
                }),
            ),
            Finding::PoolOf { uid } => Check::problem(
                "wrong-owner",
                format!("{shown} belongs to uid {uid}, and this user can't write to it"),
                root(format!(
                    "chown -R {} {}",
                    own(self.0.owner.uid),
                    shell_word(path)
                )),
            ),
            Finding::Impassable { folder, uid } => Check::problem(
                "impassable",
                format!(
                    "the user that runs postgres (uid {uid}) can't pass through {}",
                    folder.display()
                ),
                root(format!("chmod o+x {}", shell_word(folder))),
            ),
            Finding::Foreign { paths, uid } => {
                let words: Vec<_> = paths.iter().map(|p| shell_word(p)).collect();
                Check::problem(
                    "wrong-owner",
                    format!(
                        "not all in {} belongs to uid {uid}, which postgres runs as",
                        words.join(", ")
                    ),
                    root(format!("chown -R {} {}", own(*uid), words.join(" "))),
                )
            }
            Finding::LooseMode { path, mode } => Check::problem(
                "loose-mode",
                format!(
                    "postgres refuses {}: its mode is {mode:03o}",
                    path.display()
                ),
                root(format!("chmod 700 {}", shell_word(path))),
            ),
            Finding::LittleRoom { full } => Check::new(
                "room",
                if *full {
                    Level::Problem
                } else {
                    Level::Warning
                },
                format!(
                    "{} of {} are free in {shown}{}",
                    human(examined.space.free_bytes),
                    human(examined.space.total_bytes),
                    if *full {
                        ": postgres may stop at any moment"
                    } else {
                        ""
                    }
                ),
                make_room,
            ),
            Finding::FewInodes { free } => Check::warning(
                "inodes",
                format!(
                    "{shown} has room for {free} more files; a branch takes more than a thousand"
                ),
                make_room,
            ),
            Finding::LittleMetadata {
                free_bytes,
                idle_data_bytes,
            } => Check::new(
                "metadata",
                if *free_bytes < health::METADATA_FULL_BYTES {
                    Level::Problem
                } else {
                    Level::Warning
                },
                format!(
                    "btrfs in {} has {} left for metadata, of which every branch needs some",
                    point.display(),
                    human(*free_bytes)
                ),
                if idle_data_bytes > free_bytes {
                    root(format!("btrfs balance start -dusage=50 {at}"))
                } else {
                    make_room
                },
            ),
            Finding::ImageOutgrows {
                image,
                may_grow_bytes,
                disk_free_bytes,
            } => Check::new(
                "image",
                if *disk_free_bytes < DISK_FULL_BYTES {
                    Level::Problem
                } else {
                    Level::Warning
                },
                format!(
                    "{} may still grow by {}, and its disk has {} free: where that is full, the file system in it breaks",
                    image.display(),
                    human(*may_grow_bytes),
                    human(*disk_free_bytes)
                ),
                // Gives the disk back what deleted branches took.
                root(format!("fstrim -v {at}")),
            ),
            Finding::ImageDeleted { image, device } => Check::problem(
                "image-deleted",
                format!(
                    "{} was deleted while it is mounted: all in {} is lost with the mount",
                    image.display(),
                    point.display()
                ),
                root(format!(
                    "sh -c 'fsfreeze -f {at} && cp --sparse=always /dev/{device} {}; fsfreeze -u {at}'",
                    shell_word(image)
                )),
            ),
            Finding::NoDataCow => Check::warning(
                "nodatacow",
                format!(
                    "{} is mounted with nodatacow: new files have no checksums, and break up when branches share them",
                    point.display()
                ),
                root(format!("mount -o remount,datacow,datasum {at}")),
            ),
            Finding::NoUnprivilegedDelete => Check::warning(
                "slow-delete",
                format!(
                    "without the mount option user_subvol_rm_allowed a deletion in {shown} takes as long as there are files"
                ),
                root(format!("mount -o remount,user_subvol_rm_allowed {at}")),
            ),
            Finding::NoCow { paths } => no_cow(path, paths, pool),
            Finding::Quota { mode } => Check::warning(
                "quota",
                format!(
                    "btrfs in {} keeps quota groups ({mode}): every snapshot and deletion is slower",
                    point.display()
                ),
                root(format!("btrfs quota disable {at}")),
            ),
            Finding::QuotaLimit {
                group,
                used_bytes,
                limit_bytes,
            } => Check::new(
                "quota-limit",
                if limit_bytes.saturating_sub(*used_bytes) < health::FULL_BYTES {
                    Level::Problem
                } else {
                    Level::Warning
                },
                format!(
                    "{} of the {} that quota group {group} allows are used in {}",
                    human(*used_bytes),
                    human(*limit_bytes),
                    point.display()
                ),
                root(format!("btrfs qgroup limit none {group} {at}")),
            ),
            Finding::NotAtBoot {
                disabled,
                fstab_line,
            } => Check::warning(
                "not-at-boot",
                format!("nothing mounts {} when the machine starts", point.display()),
                if !disabled {
                    let line = shell_word(Path::new(&format!("{fstab_line} ")));
                    format!("echo {line} | {}", root("tee -a /etc/fstab".into()))
                } else if storage::Boot::here().has_unit(&point) {
                    root(format!(
                        "systemctl enable {}",
                        shell_word(Path::new(&storage::unit_name(&point)))
                    ))
                } else {
                    root(format!(
                        "sed -i '\\#[[:space:]]{}[[:space:]]#s/noauto/auto/' /etc/fstab",
                        point.display()
                    ))
                },
            ),
        }
    }
}

/// The attribute only helps new files, so those of a branch are written anew.
fn no_cow(pool_path: &Path, paths: &[PathBuf], pool: &PoolInUse) -> Check {
    let mut steps = Vec::new();
    for path in paths {
        if path == pool_path {
            steps.push(as_root(&format!("chattr -C {}", shell_word(path))));
            continue;
        }
        let inside = path.strip_prefix(pool_path).unwrap_or(path);
        let Some(id) = inside.iter().next().and_then(|id| id.to_str()) else {
            continue;
        };
        let name = VolumeId::new(id)
            .ok()
            .and_then(|id| pool.branches.get(&id).cloned());
        let volume = shell_word(&pool_path.join(id));
        let stop = name.map_or_else(String::new, |name| format!("dbranch stop {name} && "));
        steps.push(format!(
            "{stop}{}",
            as_root(&format!(
                "sh -c 'cd {volume} && chattr -C . && cp -a --reflink=never data cow && mv data nocow && mv cow data && rm -r nocow'"
            ))
        ));
    }
    let shown: Vec<_> = paths.iter().map(|p| p.display().to_string()).collect();
    Check::warning(
        "nocow",
        format!(
            "no copy-on-write (attribute C) in {}: no checksums, and files that branches share break up",
            shown.join(", ")
        ),
        steps.join("; "),
    )
}

fn advised(pool: &PoolInUse, advice: Option<String>) -> Option<Check> {
    let fix = if pool.branches.is_empty() {
        "dbranch storage setup"
    } else {
        "dbranch storage setup, then dbranch storage move"
    };
    advice.map(|advice| Check::warning("full-copies", advice, fix))
}

/// What gives a pool room: less in it, or a larger file around it.
fn make_room(path: &Path, examined: &Examined) -> String {
    let less = "dbranch usage, then dbranch delete --now what is not needed";
    if examined.image.is_none() {
        return less.into();
    }
    let gib = (examined.space.total_bytes >> 30).max(1) * 2;
    format!(
        "{less}; or dbranch storage grow --size {gib}G --path {}",
        shell_word(path)
    )
}

fn of_error(code: &'static str, e: EngineError) -> Check {
    let fix = e.hint.unwrap_or_else(|| "dbranch logs --daemon".into());
    Check::problem(code, e.message, fix)
}

pub(in crate::engine) fn hangs(path: &Path) -> EngineError {
    let point = Mount::of(path).map_or_else(|| path.to_owned(), |m| m.point);
    EngineError::refused(format!(
        "the disk of {} does not answer: it is frozen, or waits for a device",
        path.display()
    ))
    .hint(as_root(&format!("fsfreeze -u {}", shell_word(&point))))
}

fn human(bytes: u64) -> String {
    crate::engine::create::human_bytes(bytes)
}
