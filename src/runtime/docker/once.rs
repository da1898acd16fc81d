//! Containers that run one program to its end, such as initdb.

use std::collections::HashMap;
use std::fs;
use std::io::Write as _;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};

use bollard::errors::Error as ApiError;
use bollard::models::{ContainerCreateBody, ContainerSummaryStateEnum, HostConfig};
use bollard::query_parameters::{
    CreateContainerOptions, LogsOptionsBuilder, StartContainerOptions,
};
use futures_util::StreamExt as _;

use super::container::{bind, covers, image_of, is_abandoned, user};
use super::image::absent;
use super::{Docker, RuntimeError, failed, status_of};
use crate::runtime::{InitSpec, initdb_args, prepare};
use crate::types::Owner;

/// Marks short-lived containers.
const ONCE: &str = "dev.dbranch.once";

/// One program to be run to its end in a container.
#[derive(Debug, Default)]
pub(super) struct Once<'a> {
    pub(super) image: &'a str,
    /// For messages: "make the database cluster".
    pub(super) action: String,
    pub(super) entrypoint: Vec<String>,
    pub(super) user: Option<String>,
    pub(super) env: Vec<String>,
    pub(super) binds: Vec<String>,
    /// Declared volumes of the image to be hidden.
    pub(super) to_cover: Vec<String>,
    /// Sees this machine's processes and may mount, for [`Docker::run_on_host`].
    pub(super) steps_out: bool,
}

impl Docker {
    pub(in crate::runtime) async fn init_cluster(
        &self,
        spec: &InitSpec,
    ) -> Result<(), RuntimeError> {
        prepare::check_owner(spec.owner)?;
        let image = image_of(&spec.server)?;
        let major = self.major_of(image).await?;
        let layout = self.layout_of(image).await?;
        let passwd = PasswdFile::write(&spec.password_file, spec)?;
        let mut entrypoint = vec!["initdb".to_owned()];
        entrypoint.extend(initdb_args(spec, major, &layout.data_dir, "/run/pwfile"));
        let (code, output) = self
            .run_once(Once {
                image,
                action: "make the database cluster (initdb)".into(),
                entrypoint,
                user: Some(user(spec.owner)),
                env: vec!["LC_ALL=C".into()],
                binds: vec![
                    bind(&spec.data_dir, &layout.data_dir, "")?,
                    bind(&spec.password_file, "/run/pwfile", ":ro")?,
                    bind(&passwd.0, "/etc/passwd", ":ro")?,
                ],
                to_cover: layout.to_cover,
                ..Once::default()
            })
            .await?;
        if code == 0 {
            return Ok(());
        }
        Err(RuntimeError::failed(
            "make the database cluster (initdb)",
            output.trim(),
        ))
    }

    /// Runs a program to its end; returns its exit status and all its output.
    pub(super) async fn run_once(&self, once: Once<'_>) -> Result<(i64, String), RuntimeError> {
        self.sweep().await;
        let action = once.action;
        let body = ContainerCreateBody {
            image: Some(once.image.to_owned()),
            user: once.user,
            env: Some(once.env),
            entrypoint: Some(once.entrypoint),
            cmd: Some(Vec::new()),
            labels: Some(HashMap::from([(ONCE.to_owned(), "1".to_owned())])),
            host_config: Some(HostConfig {
                binds: Some(once.binds),
                tmpfs: Some(covers(once.to_cover)),
                network_mode: Some("none".into()),
                ..if once.steps_out {
                    super::host::rights()
                } else {
                    self.host_config()
                }
            }),
            ..ContainerCreateBody::default()
        };
        let created = self
            .api
            .create_container(None::<CreateContainerOptions>, body)
            .await;
        let id = match created {
            Ok(created) => created.id,
            Err(e) if status_of(&e) == Some(404) => return Err(absent(once.image)),
            Err(e) => return Err(failed(action, &e)),
        };
        let outcome = async {
            self.api
                .start_container(&id, None::<StartContainerOptions>)
                .await?;
            let code = self.code_at_end(&id).await?;
            let options = LogsOptionsBuilder::default()
                .stdout(true)
                .stderr(true)
                .build();
            let mut logs = std::pin::pin!(self.api.logs(&id, Some(options)));
            let mut output = String::new();
            while let Some(piece) = logs.next().await {
                output.push_str(&piece?.to_string());
            }
            Ok::<_, ApiError>((code, output))
        }
        .await;
        self.remove(&id).await?;
        outcome.map_err(|e| failed(action, &e))
    }

    /// Removes ended containers that a killed daemon left behind.
    async fn sweep(&self) {
        let Ok(left) = self.list(&[format!("{ONCE}=1")]).await else {
            return;
        };
        for one in left {
            let ended = matches!(
                one.state,
                Some(
                    ContainerSummaryStateEnum::CREATED
                        | ContainerSummaryStateEnum::EXITED
                        | ContainerSummaryStateEnum::DEAD
                )
            );
            if ended
                && is_abandoned(&one)
                && let Some(id) = one.id
                && let Err(e) = self.remove(&id).await
            {
                tracing::debug!("leftover container {id}: {e}");
            }
        }
    }
}

/// A passwd file with the owner in it: initdb asks who it is, and the image
/// knows nothing of our user. Removed when dropped.
#[derive(Debug)]
struct PasswdFile(PathBuf);

impl PasswdFile {
    fn write(beside: &Path, spec: &InitSpec) -> Result<Self, RuntimeError> {
        let path = beside.with_extension("passwd");
        let Owner { uid, gid } = spec.owner;
        let text = format!(
            "root:x:0:0:root:/root:/bin/sh\npostgres:x:{uid}:{gid}::/var/lib/postgresql:/bin/sh\n"
        );
        let write = || {
            prepare::remove_if_there(&path)?;
            fs::OpenOptions::new()
                .write(true)
                .create_new(true)
                .mode(0o644)
                .open(&path)?
                .write_all(text.as_bytes())
        };
        write().map_err(|e| RuntimeError::failed(format!("write {}", path.display()), e))?;
        Ok(Self(path))
    }
}

impl Drop for PasswdFile {
    fn drop(&mut self) {
        if let Err(e) = prepare::remove_if_there(&self.0) {
            tracing::debug!("{}: {e}", self.0.display());
        }
    }
}
