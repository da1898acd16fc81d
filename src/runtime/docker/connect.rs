//! Finding the Docker Engine, and saying why there is none.

use std::collections::HashMap;
use std::env;
use std::fmt::Write as _;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use sha2::{Digest as _, Sha256};
use tokio::net::UnixStream;

use super::{Connect, Docker, RuntimeError, said};

/// An engine that runs answers within milliseconds; a hung one must not hang us.
const HELLO: Duration = Duration::from_secs(10);

/// Longest time of one request; only pulling takes longer, and that streams.
const REQUEST_SECONDS: u64 = 120;

impl Docker {
    /// Connects to the engine that `DOCKER_HOST`, the current Docker context, or
    /// one of the usual sockets leads to.
    ///
    /// # Errors
    /// `Unavailable`, with what to do about it.
    pub async fn connect() -> Result<Self, RuntimeError> {
        let home = env::home_dir();
        if let Some(host) = env::var("DOCKER_HOST").ok().filter(|host| !host.is_empty()) {
            return Self::connect_to(&host)
                .await
                .map_err(|e| unavailable(format!("DOCKER_HOST is {host}: {e}")));
        }
        if let Some((name, host)) = home.as_deref().and_then(current_context) {
            return Self::connect_to(&host)
                .await
                .map_err(|e| unavailable(format!("Docker's context `{name}` is {host}: {e}")));
        }
        let runtime_dir = env::var_os("XDG_RUNTIME_DIR").map(PathBuf::from);
        let mut worst: Option<RuntimeError> = None;
        for socket in usual_sockets(home.as_deref(), runtime_dir.as_deref()) {
            if !socket.exists() {
                continue;
            }
            match Self::connect_to(&format!("unix://{}", socket.display())).await {
                Ok(docker) => return Ok(docker),
                Err(e) => worst = worst.or(Some(e)),
            }
        }
        Err(worst.unwrap_or_else(|| {
            unavailable(if docker_program_is_there() {
                "Docker is installed, but its engine is not running (no socket); start it with \
                 `sudo systemctl start docker` or by opening Docker Desktop"
                    .into()
            } else {
                "Docker is not installed (no `docker` program, no socket)".into()
            })
        }))
    }

    /// Connects to the engine at `host`: `unix:///path`, or `tcp://` on this machine.
    pub async fn connect_to(host: &str) -> Result<Self, RuntimeError> {
        let version = bollard::API_DEFAULT_VERSION;
        let api = if let Some(path) = host.strip_prefix("unix://") {
            try_socket(Path::new(path)).await?;
            bollard::Docker::connect_with_unix(host, REQUEST_SECONDS, version)
        } else if is_tcp_here(host) {
            bollard::Docker::connect_with_http(host, REQUEST_SECONDS, version)
        } else {
            return Err(unavailable(format!(
                "{host} is another machine or needs TLS or ssh; containers must run where the \
                 data directories are"
            )));
        };
        let api = api.map_err(|e| unavailable(said(&e)))?;
        let hello = async {
            let api = api.negotiate_version().await?;
            let info = api.info().await?;
            Ok::<_, bollard::errors::Error>((api, info))
        };
        let (api, info) = match tokio::time::timeout(HELLO, hello).await {
            Ok(answer) => answer
                .map_err(|e| unavailable(format!("the engine at {host} fails: {}", said(&e))))?,
            Err(_) => {
                return Err(unavailable(format!(
                    "the engine at {host} does not answer within {HELLO:?}"
                )));
            }
        };
        let security = info.security_options.unwrap_or_default();
        let has = |name: &str| {
            security
                .iter()
                .any(|option| option.split(',').any(|part| part == format!("name={name}")))
        };
        if has("rootless") {
            return Err(unavailable(format!(
                "the engine at {host} is rootless: its containers can't use files as their owner"
            )));
        }
        let in_a_machine = cfg!(not(target_os = "linux"))
            || info
                .operating_system
                .is_some_and(|os| os.contains("Docker Desktop"));
        Ok(Self {
            api,
            endpoint: host.to_owned(),
            connect: if in_a_machine {
                Connect::Tcp
            } else {
                Connect::Unix
            },
            maps_users: has("userns"),
            layouts: Arc::new(Mutex::new(HashMap::new())),
        })
    }
}

fn unavailable(text: String) -> RuntimeError {
    RuntimeError::Unavailable(text)
}

/// Tells the usual reasons apart before HTTP hides them.
async fn try_socket(path: &Path) -> Result<(), RuntimeError> {
    let Err(e) = UnixStream::connect(path).await else {
        return Ok(());
    };
    Err(unavailable(match e.kind() {
        ErrorKind::PermissionDenied => format!(
            "no permission on Docker's socket {}; join its group with \
             `sudo usermod -aG docker $USER` and log in again",
            path.display()
        ),
        ErrorKind::ConnectionRefused => format!(
            "Docker's engine is not running (nobody answers on {}); start it with \
             `sudo systemctl start docker`",
            path.display()
        ),
        ErrorKind::NotFound => format!(
            "Docker's engine is not running ({} does not exist)",
            path.display()
        ),
        _ => format!("{}: {e}", path.display()),
    }))
}

fn is_tcp_here(host: &str) -> bool {
    let Some(rest) = host
        .strip_prefix("tcp://")
        .or_else(|| host.strip_prefix("http://"))
    else {
        return false;
    };
    ["127.", "localhost", "[::1]"]
        .iter()
        .any(|name| rest.starts_with(name))
        && env::var_os("DOCKER_TLS_VERIFY").is_none_or(|v| v.is_empty())
}

fn usual_sockets(home: Option<&Path>, runtime_dir: Option<&Path>) -> Vec<PathBuf> {
    let mut all = vec![PathBuf::from("/var/run/docker.sock")];
    if let Some(home) = home {
        all.extend(
            [
                ".docker/run/docker.sock",
                ".docker/desktop/docker.sock",
                ".orbstack/run/docker.sock",
                ".colima/default/docker.sock",
                ".rd/docker.sock",
            ]
            .map(|name| home.join(name)),
        );
    }
    all.extend(runtime_dir.map(|dir| dir.join("docker.sock")));
    all
}

/// Name and address of the context that `docker context use` or `DOCKER_CONTEXT` chose.
fn current_context(home: &Path) -> Option<(String, String)> {
    let config = env::var_os("DOCKER_CONFIG").map_or_else(|| home.join(".docker"), PathBuf::from);
    context_in(&config, env::var("DOCKER_CONTEXT").ok())
}

/// A context's folder is named by the SHA-256 of its name (docker/cli,
/// `cli/context/store`).
fn context_in(config: &Path, chosen: Option<String>) -> Option<(String, String)> {
    let json = |path: PathBuf| -> Option<serde_json::Value> {
        serde_json::from_str(&std::fs::read_to_string(path).ok()?).ok()
    };
    let name = chosen.filter(|name| !name.is_empty()).or_else(|| {
        let config = json(config.join("config.json"))?;
        Some(config.get("currentContext")?.as_str()?.to_owned())
    })?;
    if name.is_empty() || name == "default" {
        return None;
    }
    let mut folder = String::new();
    for byte in Sha256::digest(name.as_bytes()) {
        let _ = write!(folder, "{byte:02x}");
    }
    let meta = json(config.join("contexts/meta").join(folder).join("meta.json"))?;
    let host = meta.pointer("/Endpoints/docker/Host")?.as_str()?.to_owned();
    Some((name, host))
}

fn docker_program_is_there() -> bool {
    env::var_os("PATH")
        .is_some_and(|path| env::split_paths(&path).any(|dir| dir.join("docker").exists()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_chosen_context_is_followed() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(context_in(dir.path(), None), None);
        std::fs::write(
            dir.path().join("config.json"),
            r#"{"currentContext": "colima"}"#,
        )
        .unwrap();
        // The digest of "colima".
        let digest = Sha256::digest(b"colima")
            .iter()
            .fold(String::new(), |all, b| format!("{all}{b:02x}"));
        let meta = dir.path().join("contexts/meta").join(digest);
        std::fs::create_dir_all(&meta).unwrap();
        std::fs::write(
            meta.join("meta.json"),
            r#"{"Name":"colima","Endpoints":{"docker":{"Host":"unix:///x/docker.sock"}}}"#,
        )
        .unwrap();
        let colima = Some(("colima".to_owned(), "unix:///x/docker.sock".to_owned()));
        assert_eq!(context_in(dir.path(), None), colima);
        assert_eq!(context_in(dir.path(), Some("default".into())), None);
        assert_eq!(context_in(dir.path(), Some("gone".into())), None);
    }

    #[tokio::test]
    async fn a_socket_without_engine_says_that_it_is_not_running() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("docker.sock");
        let gone = try_socket(&path).await.unwrap_err().to_string();
        assert!(gone.contains("not running"), "{gone}");
        drop(std::os::unix::net::UnixListener::bind(&path).unwrap());
        let dead = try_socket(&path).await.unwrap_err().to_string();
        assert!(dead.contains("systemctl start docker"), "{dead}");
    }

    #[tokio::test]
    async fn an_engine_on_another_machine_is_refused() {
        for host in [
            "tcp://10.1.2.3:2375",
            "ssh://me@there",
            "npipe:////./pipe/x",
        ] {
            let error = Docker::connect_to(host).await.unwrap_err().to_string();
            assert!(error.contains("where the data directories are"), "{error}");
        }
    }
}
