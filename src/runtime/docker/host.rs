//! Running a script as root on the machine itself, by a container that may do so.
//!
//! Who may talk to Docker's engine may do all that root may (Docker manual, "Docker daemon attack
//! surface"); this only makes use of it where there is no `sudo`. Nothing runs in the container
//! but the step out of it.

use bollard::models::HostConfig;
use bollard::query_parameters::ListImagesOptionsBuilder;

use super::once::Once;
use super::{Connect, Docker, RuntimeError, failed};

/// Goes into the mount namespace of the machine's first process and runs the script there
/// (nsenter(1)). Where the image has no nsenter, the machine's own is used.
const STEP_OUT: &str = r#"
if command -v nsenter >/dev/null; then
    exec nsenter --target 1 --mount -- /bin/sh -c "$1"
elif command -v chroot >/dev/null; then
    exec chroot /proc/1/root nsenter --target 1 --mount -- /bin/sh -c "$1"
fi
exit 97
"#;

/// [`STEP_OUT`]'s exit status where the image has neither program.
const NO_WAY_OUT: i64 = 97;

/// Images by the last part of their names that have what is needed, and that people trust.
const USUAL: [&str; 6] = [
    "postgres", "postgis", "debian", "ubuntu", "alpine", "busybox",
];

pub(super) fn all_rights() -> HostConfig {
    HostConfig {
        privileged: Some(true),
        pid_mode: Some("host".into()),
        userns_mode: Some("host".into()),
        ..HostConfig::default()
    }
}

impl Docker {
    /// Whether [`Docker::run_on_host`] reaches this machine: an engine in a virtual machine
    /// reaches only that.
    pub fn is_on_this_machine(&self) -> bool {
        self.connect == Connect::Unix
    }

    /// The local images that are likely to have sh and nsenter, `wished` before others.
    pub async fn images_with_a_shell(
        &self,
        wished: &[String],
    ) -> Result<Vec<String>, RuntimeError> {
        let options = ListImagesOptionsBuilder::default().build();
        let all = self.api.list_images(Some(options)).await;
        let all = all.map_err(|e| failed("list the images", &e))?;
        let tags: Vec<String> = all.into_iter().flat_map(|image| image.repo_tags).collect();
        let usual = tags.iter().filter(|tag| {
            let name = tag.rsplit('/').next().unwrap_or(tag);
            USUAL.contains(&name.split(':').next().unwrap_or(name))
        });
        let wished = wished.iter().filter(|image| tags.contains(image));
        let mut found: Vec<String> = Vec::new();
        for image in wished.chain(usual) {
            if !found.contains(image) {
                found.push(image.clone());
            }
        }
        Ok(found)
    }

    /// Runs a script of sh(1) as root in this machine's own mount namespace; returns its exit
    /// status and all its output. None: the image lacks what that takes.
    pub async fn run_on_host(
        &self,
        image: &str,
        script: &str,
    ) -> Result<Option<(i64, String)>, RuntimeError> {
        let ran = self
            .run_once(Once {
                image,
                action: "run a script as root by a container".into(),
                entrypoint: ["sh", "-c", STEP_OUT, "sh", script]
                    .map(Into::into)
                    .to_vec(),
                user: Some("0:0".into()),
                is_privileged: true,
                ..Once::default()
            })
            .await?;
        Ok((ran.0 != NO_WAY_OUT).then_some(ran))
    }
}
