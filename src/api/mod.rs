//! The one HTTP+JSON contract: types, server, client. Decides nothing.

pub mod client;
pub mod types;
