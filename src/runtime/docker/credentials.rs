//! Who we are to a registry, as `docker login` has noted it.
//!
//! The engine knows no logins: each request brings them along. They lie in the `config.json` of the
//! `docker` program, or in a program that it names there (docker/cli, "Credential stores").

use std::env;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use bollard::BollardRequest;
use bollard::auth::DockerCredentials;
use serde_json::Value;
use tokio::io::AsyncWriteExt as _;
use tokio::process::Command;

/// Docker Hub's name in the config, for images without a registry.
const HUB: &str = "https://index.docker.io/v1/";

/// A helper may ask the user to unlock a key ring.
const HELPER_LIMIT: Duration = Duration::from_secs(60);

/// The login for an image's registry.
#[derive(Debug, Default)]
pub(super) struct Login {
    pub(super) credentials: Option<DockerCredentials>,
    /// Why what is noted can't be had. Public images can be pulled all the same.
    pub(super) trouble: Option<String>,
}

impl Login {
    pub(super) async fn of(image: &str) -> Self {
        let folder = env::var_os("DOCKER_CONFIG")
            .filter(|dir| !dir.is_empty())
            .map(PathBuf::from)
            .or_else(|| Some(env::home_dir()?.join(".docker")));
        match folder {
            Some(folder) => Self::noted_in(&folder, image).await,
            None => Self::default(),
        }
    }

    async fn noted_in(folder: &Path, image: &str) -> Self {
        let path = folder.join("config.json");
        let trouble = |why: String| Self {
            credentials: None,
            trouble: Some(why),
        };
        let config: Value = match std::fs::read(&path) {
            Ok(text) => match serde_json::from_slice(&text) {
                Ok(config) => config,
                Err(e) => return trouble(format!("{} is not understood: {e}", path.display())),
            },
            Err(e) if e.kind() == ErrorKind::NotFound => return Self::default(),
            Err(e) => return trouble(format!("read {}: {e}", path.display())),
        };
        let server = registry_of(image).unwrap_or(HUB);
        let helper = config
            .get("credHelpers")
            .and_then(|helpers| helpers.get(server))
            .or_else(|| config.get("credsStore"))
            .and_then(Value::as_str)
            .filter(|helper| !helper.is_empty());
        match helper {
            Some(helper) => match ask(helper, server).await {
                Ok(credentials) => Self {
                    credentials,
                    trouble: None,
                },
                Err(why) => trouble(format!("docker-credential-{helper}: {why}")),
            },
            None => Self {
                credentials: noted(&config, server),
                trouble: None,
            },
        }
    }
}

/// The registry in an image's name; none means Docker Hub (distribution, `reference`).
pub(super) fn registry_of(image: &str) -> Option<&str> {
    let (first, _) = image.split_once('/')?;
    let is_host = first.contains(['.', ':']) || first == "localhost";
    (is_host && !["docker.io", "index.docker.io"].contains(&first)).then_some(first)
}

/// What stands in the config itself, under the registry's name or a URL of it.
fn noted(config: &Value, server: &str) -> Option<DockerCredentials> {
    let auths = config.get("auths")?.as_object()?;
    let entry = auths.get(server).or_else(|| {
        let mut others = auths.iter();
        others.find_map(|(key, entry)| (host_of(key) == host_of(server)).then_some(entry))
    })?;
    let text = |name: &str| {
        let value = entry.get(name)?.as_str()?;
        (!value.is_empty()).then(|| value.to_owned())
    };
    // `auth` is the name and the password together, for hand-written files.
    let pair = text("auth").and_then(|auth| {
        let pair = String::from_utf8(STANDARD.decode(auth).ok()?).ok()?;
        let (user, password) = pair.split_once(':')?;
        Some((user.to_owned(), password.trim_end_matches('\0').to_owned()))
    });
    let (username, password) = match pair {
        Some((user, password)) => (Some(user), Some(password)),
        None => (text("username"), text("password")),
    };
    let credentials = DockerCredentials {
        username,
        password,
        identitytoken: text("identitytoken"),
        registrytoken: text("registrytoken"),
        serveraddress: Some(server.to_owned()),
        ..DockerCredentials::default()
    };
    let any = [
        &credentials.username,
        &credentials.identitytoken,
        &credentials.registrytoken,
    ];
    any.iter().any(|it| it.is_some()).then_some(credentials)
}

/// `https://host/v1/` -> `host`.
fn host_of(key: &str) -> &str {
    let rest = key
        .strip_prefix("https://")
        .or_else(|| key.strip_prefix("http://"))
        .unwrap_or(key);
    rest.split('/').next().unwrap_or(rest)
}

/// Asks a credential helper (docker/docker-credential-helpers, "Development").
async fn ask(helper: &str, server: &str) -> Result<Option<DockerCredentials>, String> {
    let mut child = Command::new(format!("docker-credential-{helper}"))
        .arg("get")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .kill_on_drop(true)
        .spawn()
        .map_err(|e| e.to_string())?;
    let mut input = child.stdin.take().expect("piped");
    let conversation = async {
        // One that knows without reading is fine too.
        let _ = input.write_all(server.as_bytes()).await;
        drop(input);
        child.wait_with_output().await
    };
    let output = tokio::time::timeout(HELPER_LIMIT, conversation)
        .await
        .map_err(|_| format!("no answer within {} s", HELPER_LIMIT.as_secs()))?
        .map_err(|e| e.to_string())?;
    let said = String::from_utf8_lossy(&output.stdout);
    if !output.status.success() {
        // The protocol's words for "none".
        if said.contains("credentials not found") {
            return Ok(None);
        }
        let also = String::from_utf8_lossy(&output.stderr);
        return Err(format!("{} {}", said.trim(), also.trim()).trim().to_owned());
    }
    let answer: Value =
        serde_json::from_str(&said).map_err(|_| "its answer is not understood".to_owned())?;
    let text = |name: &str| answer.get(name)?.as_str().map(str::to_owned);
    let (username, secret) = (text("Username"), text("Secret"));
    let mut credentials = DockerCredentials {
        serveraddress: Some(server.to_owned()),
        ..DockerCredentials::default()
    };
    if username.as_deref() == Some("<token>") {
        credentials.identitytoken = secret;
    } else {
        credentials.username = username;
        credentials.password = secret;
    }
    Ok(Some(credentials))
}

/// Writes the login's header in the alphabet that the engine reads (RFC 4648, section 5): bollard
/// uses the other one, and the engine takes a login that it can't read for none.
pub(super) fn with_readable_login(mut request: BollardRequest) -> BollardRequest {
    const HEADER: &str = "x-registry-auth";
    let rewritten = request.headers().get(HEADER).and_then(|value| {
        let text = value.to_str().ok()?.replace('+', "-").replace('/', "_");
        text.parse().ok()
    });
    if let Some(value) = rewritten {
        request.headers_mut().insert(HEADER, value);
    }
    request
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    async fn login(config: &Value, image: &str) -> Login {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("config.json");
        std::fs::write(path, config.to_string()).unwrap();
        Login::noted_in(folder.path(), image).await
    }

    fn name_and_password(login: Login) -> Option<(String, String)> {
        assert_eq!(login.trouble, None);
        let found = login.credentials?;
        Some((found.username?, found.password?))
    }

    fn is_ada(login: Login) -> bool {
        name_and_password(login) == Some(("ada".into(), "a:b?".into()))
    }

    #[test]
    fn an_images_registry_is_its_first_part_if_that_is_a_host() {
        for (image, registry) in [
            ("postgres:17", None),
            ("postgis/postgis:16-3.4", None),
            ("docker.io/library/postgres", None),
            ("ghcr.io/me/pg:1", Some("ghcr.io")),
            ("localhost/pg", Some("localhost")),
            ("127.0.0.1:5000/pg@sha256:00", Some("127.0.0.1:5000")),
        ] {
            assert_eq!(registry_of(image), registry, "{image}");
        }
    }

    #[tokio::test]
    async fn a_login_is_found_under_the_registrys_name_or_url() {
        // ada:a:b?
        for key in ["ghcr.io", "https://ghcr.io", "https://ghcr.io/v1/"] {
            let config = json!({"auths": {key: {"auth": "YWRhOmE6Yj8="}, "other.io": {}}});
            assert!(is_ada(login(&config, "ghcr.io/x").await));
            assert_eq!(name_and_password(login(&config, "other.io/x").await), None);
            assert_eq!(name_and_password(login(&config, "postgres").await), None);
        }
        let hub = json!({"auths": {HUB: {"username": "ada", "password": "a:b?"}}});
        assert!(is_ada(login(&hub, "postgres:17").await));
        let token = json!({"auths": {"ghcr.io": {"auth": "", "identitytoken": "t"}}});
        let found = login(&token, "ghcr.io/x").await.credentials.unwrap();
        assert_eq!(
            (found.identitytoken.as_deref(), found.username),
            (Some("t"), None)
        );
    }

    #[tokio::test]
    async fn what_cannot_be_read_is_said_and_nothing_is_none() {
        let folder = tempfile::tempdir().unwrap();
        let found = Login::noted_in(folder.path(), "postgres").await;
        assert!(found.credentials.is_none() && found.trouble.is_none());
        std::fs::write(folder.path().join("config.json"), "{").unwrap();
        let found = Login::noted_in(folder.path(), "postgres").await;
        assert!(found.trouble.unwrap().contains("config.json"));
        let config = json!({"credsStore": "dbranch-has-no-such-helper"});
        let found = login(&config, "postgres").await;
        assert!(found.trouble.unwrap().contains("no-such-helper"));
    }
}
