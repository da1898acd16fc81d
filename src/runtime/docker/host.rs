//! Running a script as root on the machine itself, by a container that may do so.
//!
//! Who may talk to Docker's engine may do all that root may (Docker manual, "Docker daemon attack
//! surface"); this only makes use of it where there is no `sudo`. Nothing runs in the container
//! but the step out of it.

use bollard::models::HostConfig;
use bollard::query_parameters::ListImagesOptionsBuilder;

use super::once::Once;
use super::{Connect, Docker, RuntimeError, failed};

/// Goes into the mount namespace of the process with the pid `$1`, which is this one, so that what
/// the script `$2` mounts is seen where the daemon and its servers run (nsenter(1)). Where the
/// image has no nsenter, the machine's own is used.
const STEP_OUT: &str = r#"
if command -v nsenter >/dev/null; then
    exec nsenter --target "$1" --mount -- /bin/sh -c "$2"
elif command -v chroot >/dev/null; then
    exec chroot "/proc/$1/root" nsenter --target "$1" --mount -- /bin/sh -c "$2"
fi
exit 97
"#;

/// What that takes, and to mount, give away and write what belongs to others (capabilities(7)):
/// less than `--privileged`, which an engine that lacks some right itself refuses altogether.
const RIGHTS: [&str; 6] = [
    "SYS_ADMIN",
    "SYS_CHROOT",
    "SYS_PTRACE",
    "CHOWN",
    "DAC_OVERRIDE",
    "FOWNER",
];

/// Loop devices and what hands them out (the kernel's `Documentation/admin-guide/devices.txt`).
const DEVICES: [&str; 2] = ["b 7:* rwm", "c 10:237 rwm"];

/// [`STEP_OUT`]'s exit status where the image has neither program.
const NO_WAY_OUT: i64 = 97;

/// Images by the last part of their names that have what is needed, and that people trust.
const USUAL: [&str; 6] = [
    "postgres", "postgis", "debian", "ubuntu", "alpine", "busybox",
];

pub(super) fn rights() -> HostConfig {
    let all = |words: &[&str]| Some(words.iter().map(|&word| word.to_owned()).collect());
    HostConfig {
        pid_mode: Some("host".into()),
        userns_mode: Some("host".into()),
        cap_drop: all(&["ALL"]),
        cap_add: all(&RIGHTS),
        device_cgroup_rules: all(&DEVICES),
        security_opt: all(&["seccomp=unconfined", "apparmor=unconfined", "label=disable"]),
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

    /// Runs a script of sh(1) as root in this process's mount namespace; returns its exit status
    /// and all its output. None: the image lacks what that takes.
    pub async fn run_on_host(
        &self,
        image: &str,
        script: &str,
    ) -> Result<Option<(i64, String)>, RuntimeError> {
        let pid = std::process::id().to_string();
        let ran = self
            .run_once(Once {
                image,
                action: "run a script as root by a container".into(),
                entrypoint: ["sh", "-c", STEP_OUT, "sh", &pid, script]
                    .map(Into::into)
                    .to_vec(),
                user: Some("0:0".into()),
                steps_out: true,
                ..Once::default()
            })
            .await?;
        Ok((ran.0 != NO_WAY_OUT).then_some(ran))
    }
}
