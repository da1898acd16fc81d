//! A client that is quick to start: what it takes is the server's and the proxy's time.

use std::path::Path;
use std::time::Instant;

use anyhow::{Context as _, Result, bail, ensure};
use tokio_postgres::{Client, Config, NoTls, SimpleQueryMessage};

/// When a new session was authenticated, and when it had its first answer.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Answered {
    pub(crate) connected: Instant,
    pub(crate) answered: Instant,
}

/// The same user and database at an instance's own socket.
pub(crate) fn at_socket(url: &Config, dir: &Path, port: u16) -> Config {
    let mut config = Config::new();
    config
        .host_path(dir)
        .port(port)
        .user(url.get_user().unwrap_or_default())
        .password(url.get_password().unwrap_or_default())
        .dbname(url.get_dbname().unwrap_or_default());
    config
}

pub(crate) async fn connect(config: &Config) -> Result<Client> {
    let (client, connection) = config.connect(NoTls).await.context("connect")?;
    tokio::spawn(async move {
        // Whoever uses the client sees its error.
        let _ = connection.await;
    });
    Ok(client)
}

/// Connects and asks which branch answers; it must be `branch`.
pub(crate) async fn first_answer(config: &Config, branch: &str) -> Result<Answered> {
    let client = connect(config).await?;
    let connected = Instant::now();
    let name = value(&client, "show cluster_name").await?;
    let answered = Instant::now();
    ensure!(name == branch, "`{name}` answered instead of `{branch}`");
    Ok(Answered {
        connected,
        answered,
    })
}

/// The one value that a query returns.
pub(crate) async fn value(client: &Client, query: &str) -> Result<String> {
    let messages = client
        .simple_query(query)
        .await
        .with_context(|| format!("run {query}"))?;
    for message in messages {
        if let SimpleQueryMessage::Row(row) = message {
            return Ok(row.get(0).unwrap_or_default().to_owned());
        }
    }
    bail!("no row: {query}")
}

pub(crate) async fn number(client: &Client, query: &str) -> Result<u64> {
    let text = value(client, query).await?;
    text.parse()
        .with_context(|| format!("no number: {query}: {text}"))
}
