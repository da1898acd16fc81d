//! Which runtime, and which server for it.

use super::{
    Docker, Native, PullProgress, Runtime, RuntimeError, RuntimeKind, Server, blocking, discover,
};

/// PostgreSQL's version when nobody asks for another.
pub const DEFAULT_MAJOR: u32 = 17;

/// A runtime and the server that it shall run.
#[derive(Debug, Clone)]
pub struct Choice {
    pub runtime: Runtime,
    pub server: Server,
    /// PostgreSQL's major version.
    pub major: u32,
    /// Why Docker was passed over, when both were open.
    pub notice: Option<String>,
}

/// Chooses the runtime: the one asked for, or Docker when its engine answers and
/// the image is there or can be pulled, or else native.
///
/// `image` is `postgres:<version>` unless one is given. `progress` hears of a pull.
///
/// # Errors
/// `Unavailable` without the runtime asked for; `NoServer` without that version.
pub async fn choose(
    kind: Option<RuntimeKind>,
    version: Option<u32>,
    image: Option<&str>,
    progress: &mut (dyn FnMut(PullProgress) + Send),
) -> Result<Choice, RuntimeError> {
    match kind {
        Some(RuntimeKind::Native) => native(version).await,
        Some(RuntimeKind::Docker) => docker(version, image, progress).await,
        None => match docker(version, image, progress).await {
            Err(no_docker @ (RuntimeError::Unavailable(_) | RuntimeError::NoServer { .. })) => {
                let version = version.or_else(|| image.and_then(version_in_tag));
                match native(version).await {
                    Ok(choice) => Ok(Choice {
                        notice: Some(no_docker.to_string()),
                        ..choice
                    }),
                    Err(RuntimeError::NoServer { message, hint }) => Err(RuntimeError::NoServer {
                        message: format!("{message}; and {no_docker}"),
                        hint,
                    }),
                    Err(other) => Err(other),
                }
            }
            done => done,
        },
    }
}

async fn native(version: Option<u32>) -> Result<Choice, RuntimeError> {
    let (server, major) = blocking(move || discover::server_for(version)).await?;
    Ok(Choice {
        runtime: Runtime::Native(Native),
        server,
        major,
        notice: None,
    })
}

async fn docker(
    version: Option<u32>,
    image: Option<&str>,
    progress: &mut (dyn FnMut(PullProgress) + Send),
) -> Result<Choice, RuntimeError> {
    let docker = Docker::connect().await?;
    let image = image.map_or_else(
        || format!("postgres:{}", version.unwrap_or(DEFAULT_MAJOR)),
        str::to_owned,
    );
    if !docker.image_present(&image).await? {
        docker.pull(&image, progress).await?;
    }
    let major = docker.major_of(&image).await?;
    let no_server = |message: String, hint: &str| RuntimeError::NoServer {
        message,
        hint: hint.into(),
    };
    if let Some(version) = version.filter(|version| *version != major) {
        return Err(no_server(
            format!("the image {image} holds PostgreSQL {major}, not {version}"),
            "make postgres.version and postgres.image agree",
        ));
    }
    if !discover::SUPPORTED.contains(&major) {
        return Err(no_server(
            format!("the image {image} holds PostgreSQL {major}"),
            "dbranch runs PostgreSQL 13 to 18; set postgres.image to one of these",
        ));
    }
    Ok(Choice {
        runtime: Runtime::Docker(docker),
        server: Server::Docker { image },
        major,
        notice: None,
    })
}

/// `postgis/postgis:16-3.4` -> 16. A guess, used only where the image is not.
fn version_in_tag(image: &str) -> Option<u32> {
    let (_, tag) = image.rsplit_once(':')?;
    discover::major_in(tag).filter(|major| discover::SUPPORTED.contains(major))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_version_is_guessed_from_an_images_tag() {
        assert_eq!(version_in_tag("postgis/postgis:16-3.4"), Some(16));
        assert_eq!(version_in_tag("postgres:17"), Some(17));
        assert_eq!(version_in_tag("localhost:5000/pg"), None);
        assert_eq!(version_in_tag("postgres:latest"), None);
    }
}
