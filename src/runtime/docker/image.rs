//! Images: whether they are here, pulling, and what they hold.

use std::collections::HashMap;

use bollard::models::CreateImageInfo;
use bollard::query_parameters::CreateImageOptionsBuilder;
use futures_util::StreamExt as _;

use super::credentials::{Login, registry_of, with_readable_login};
use super::once::Once;
use super::{Docker, RuntimeError, failed, said, status_of};
use crate::runtime::discover;

/// How far a pull is. Bytes are of the layers known so far, so `total` grows.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PullProgress {
    pub done_bytes: u64,
    pub total_bytes: u64,
    /// The engine's word: `Downloading`, `Extracting`, ...
    pub status: String,
}

/// Where an image wants its data, and which of its folders would become
/// anonymous volumes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Layout {
    pub(super) data_dir: String,
    /// Declared volumes that the mount on `data_dir` does not cover.
    pub(super) to_cover: Vec<String>,
}

impl Layout {
    /// PGDATA and VOLUME differ by version: one folder up to 17, from 18 on the
    /// volume is the parent of the parent (docker-library/postgres).
    fn of(env: &[String], volumes: Vec<String>) -> Self {
        let data_dir = variable(env, "PGDATA")
            .filter(|path| path.starts_with('/'))
            .unwrap_or("/var/lib/postgresql/data")
            .trim_end_matches('/')
            .to_owned();
        let to_cover = volumes
            .into_iter()
            .filter(|volume| volume.trim_end_matches('/') != data_dir)
            .collect();
        Self { data_dir, to_cover }
    }
}

fn variable<'a>(env: &'a [String], name: &str) -> Option<&'a str> {
    env.iter()
        .find_map(|line| line.strip_prefix(name)?.strip_prefix('='))
}

/// With a tag: the engine would pull all tags of a name without one.
fn with_tag(image: &str) -> String {
    let name = image.rsplit('/').next().unwrap_or(image);
    if name.contains(':') || image.contains('@') {
        image.to_owned()
    } else {
        format!("{image}:latest")
    }
}

impl Docker {
    /// Whether the engine has the image.
    pub async fn image_present(&self, image: &str) -> Result<bool, RuntimeError> {
        match self.api.inspect_image(image).await {
            Ok(_) => Ok(true),
            Err(e) if status_of(&e) == Some(404) => Ok(false),
            Err(e) => Err(failed(format!("look at the image {image}"), &e)),
        }
    }

    /// Pulls the image from its registry, logged in as `docker pull` would be.
    ///
    /// # Errors
    /// `NoServer` when it can't be had: no network, no such image, no login.
    pub async fn pull(
        &self,
        image: &str,
        progress: &mut (dyn FnMut(PullProgress) + Send),
    ) -> Result<(), RuntimeError> {
        let options = CreateImageOptionsBuilder::default()
            .from_image(&with_tag(image))
            .build();
        let login = Login::of(image).await;
        if let Some(trouble) = &login.trouble {
            tracing::warn!(image, "pulled without a login: {trouble}");
        }
        let api = self.api.clone().with_request_modifier(with_readable_login);
        let mut layers = Layers::default();
        let mut stream = std::pin::pin!(api.create_image(Some(options), None, login.credentials));
        while let Some(step) = stream.next().await {
            let step = step.map_err(|e| not_pulled(image, &said(&e), login.trouble.as_deref()))?;
            if let Some(now) = layers.apply(&step) {
                progress(now);
            }
        }
        self.layouts
            .lock()
            .expect("no holder of this lock panics")
            .remove(image);
        Ok(())
    }

    /// The major version of PostgreSQL in an image that is here: its `PG_MAJOR`,
    /// else what its `postgres --version` prints.
    pub async fn major_of(&self, image: &str) -> Result<u32, RuntimeError> {
        let inspected = self.api.inspect_image(image).await.map_err(|e| {
            if status_of(&e) == Some(404) {
                absent(image)
            } else {
                failed(format!("look at the image {image}"), &e)
            }
        })?;
        let env = inspected.config.and_then(|c| c.env).unwrap_or_default();
        if let Some(major) = variable(&env, "PG_MAJOR").and_then(discover::major_in) {
            return Ok(major);
        }
        let no_server = |detail: &str| RuntimeError::NoServer {
            message: format!("the image {image} holds no PostgreSQL server: {detail}"),
            hint: "set postgres.image to an image that is built like the official `postgres`"
                .into(),
        };
        let (code, output) = self
            .run_once(Once {
                image,
                action: format!("ask the image {image} for its version"),
                entrypoint: vec!["postgres".into(), "--version".into()],
                ..Once::default()
            })
            .await
            .map_err(|e| no_server(&e.to_string()))?;
        discover::version_in(&output)
            .and_then(|version| discover::major_in(&version))
            .filter(|_| code == 0)
            .ok_or_else(|| no_server(output.trim()))
    }

    /// The image's layout, read once per image.
    pub(super) async fn layout_of(&self, image: &str) -> Result<Layout, RuntimeError> {
        let known = self
            .layouts
            .lock()
            .expect("no holder of this lock panics")
            .get(image)
            .cloned();
        if let Some(layout) = known {
            return Ok(layout);
        }
        let config = match self.api.inspect_image(image).await {
            Ok(inspected) => inspected.config.unwrap_or_default(),
            Err(e) if status_of(&e) == Some(404) => return Err(absent(image)),
            Err(e) => return Err(failed(format!("look at the image {image}"), &e)),
        };
        let layout = Layout::of(
            &config.env.unwrap_or_default(),
            config.volumes.unwrap_or_default(),
        );
        self.layouts
            .lock()
            .expect("no holder of this lock panics")
            .insert(image.to_owned(), layout.clone());
        Ok(layout)
    }
}

pub(super) fn absent(image: &str) -> RuntimeError {
    RuntimeError::NoServer {
        message: format!("the image {image} is not here"),
        hint: format!("`docker pull {image}`, or set postgres.image to one that is"),
    }
}

/// Why an image can't be pulled, and what to do about it: the engine's words tell three cases apart.
fn not_pulled(image: &str, detail: &str, no_login: Option<&str>) -> RuntimeError {
    let says = |words: &[&str]| words.iter().any(|word| detail.contains(word));
    let hint = if says(&["unauthorized", "no basic auth", "denied"]) {
        let registry = registry_of(image).map_or_else(String::new, |r| format!(" {r}"));
        format!("`docker login{registry}`, then try again")
    } else if says(&["manifest unknown", "not found"]) {
        "set postgres.image to a name and tag that its registry has, or postgres.version".into()
    } else {
        format!(
            "`docker pull {image}` when the network is there, or set postgres.image to an image \
             that is here (`docker images`)"
        )
    };
    let no_login = no_login.map_or_else(String::new, |why| format!(" (without a login: {why})"));
    RuntimeError::NoServer {
        message: format!("the image {image} is not here and can't be pulled: {detail}{no_login}"),
        hint,
    }
}

/// Adds up the layers that a pull reports one by one.
#[derive(Debug, Default)]
struct Layers(HashMap<String, (u64, u64)>);

impl Layers {
    fn apply(&mut self, step: &CreateImageInfo) -> Option<PullProgress> {
        let status = step.status.clone()?;
        if let (Some(id), Some(detail)) = (&step.id, &step.progress_detail) {
            let bytes = |n: Option<i64>| n.and_then(|n| u64::try_from(n).ok()).unwrap_or(0);
            let (done, total) = (bytes(detail.current), bytes(detail.total));
            // Extraction counts the same bytes again.
            if status == "Downloading" && total > 0 {
                self.0.insert(id.clone(), (done, total));
            } else if status == "Download complete"
                && let Some(layer) = self.0.get_mut(id)
            {
                layer.0 = layer.1;
            }
        }
        Some(PullProgress {
            done_bytes: self.0.values().map(|layer| layer.0).sum(),
            total_bytes: self.0.values().map(|layer| layer.1).sum(),
            status,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use bollard::models::ProgressDetail;

    fn env(lines: &[&str]) -> Vec<String> {
        lines.iter().map(|line| (*line).to_owned()).collect()
    }

    #[test]
    fn every_declared_volume_is_covered() {
        let old = Layout::of(
            &env(&["PGDATA=/var/lib/postgresql/data"]),
            env(&["/var/lib/postgresql/data"]),
        );
        assert_eq!(old.data_dir, "/var/lib/postgresql/data");
        assert_eq!(old.to_cover, env(&[]));
        let new = Layout::of(
            &env(&["PG_MAJOR=18", "PGDATA=/var/lib/postgresql/18/docker"]),
            env(&["/var/lib/postgresql"]),
        );
        assert_eq!(new.data_dir, "/var/lib/postgresql/18/docker");
        assert_eq!(new.to_cover, env(&["/var/lib/postgresql"]));
    }

    #[test]
    fn a_name_without_a_tag_never_means_all_tags() {
        assert_eq!(with_tag("postgres"), "postgres:latest");
        assert_eq!(with_tag("postgres:17"), "postgres:17");
        assert_eq!(with_tag("host:5000/pg"), "host:5000/pg:latest");
        assert_eq!(with_tag("pg@sha256:00"), "pg@sha256:00");
    }

    #[test]
    fn the_hint_fits_what_the_registry_said() {
        let hint = |image, detail| match not_pulled(image, detail, None) {
            RuntimeError::NoServer { hint, .. } => hint,
            other => panic!("{other}"),
        };
        let unknown = "manifest for r.io/pg:1 not found: manifest unknown";
        assert!(hint("r.io/pg:1", unknown).contains("postgres.image"));
        let unauthorized = "Head \"https://r.io/v2/\": unauthorized: authentication required";
        assert!(hint("r.io/pg:1", unauthorized).starts_with("`docker login r.io`"));
        let denied =
            "pull access denied for pg, repository does not exist or may require 'docker login'";
        assert!(hint("pg:1", denied).starts_with("`docker login`"));
        let refused = "dial tcp 127.0.0.1:5000: connect: connection refused";
        assert!(hint("pg:1", refused).contains("docker pull pg:1"));
    }

    #[test]
    fn progress_adds_up_the_layers() {
        let mut layers = Layers::default();
        let mut step = |id: &str, status: &str, current, total| {
            layers
                .apply(&CreateImageInfo {
                    id: Some(id.into()),
                    status: Some(status.into()),
                    progress_detail: Some(ProgressDetail {
                        current: Some(current),
                        total: Some(total),
                    }),
                    ..CreateImageInfo::default()
                })
                .unwrap()
        };
        step("a", "Downloading", 10, 100);
        let now = step("b", "Downloading", 5, 50);
        assert_eq!((now.done_bytes, now.total_bytes), (15, 150));
        step("a", "Download complete", 0, 0);
        let now = step("a", "Extracting", 1, 100);
        assert_eq!((now.done_bytes, now.total_bytes), (105, 150));
    }
}
