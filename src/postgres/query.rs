//! One question to a database by its URL, as an app would ask it.

use super::AdminError;
use crate::types::BackendAddress;

/// Connects, runs the statements in one go and disconnects. The rows of all of them, as text.
pub async fn query(url: &str, sql: &str) -> Result<Vec<Vec<String>>, AdminError> {
    let address = || BackendAddress::Tcp {
        host: "127.0.0.1".into(),
        port: 0,
    };
    let (client, connection) = tokio_postgres::connect(url, tokio_postgres::NoTls)
        .await
        .map_err(|source| AdminError::Connect {
            address: address(),
            source,
        })?;
    let connection = tokio::spawn(connection);
    let messages = client
        .simple_query(sql)
        .await
        .map_err(|source| AdminError::Query {
            action: "query",
            source,
        })?;
    drop(client);
    // The server is told goodbye before its answer is used.
    let _ = connection.await;
    Ok(messages
        .iter()
        .filter_map(|message| match message {
            tokio_postgres::SimpleQueryMessage::Row(row) => Some(
                (0..row.len())
                    .map(|i| row.get(i).unwrap_or_default().to_owned())
                    .collect(),
            ),
            _ => None,
        })
        .collect())
}
