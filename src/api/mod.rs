//! The one HTTP+JSON contract: types, server, client. Decides nothing.

pub mod client;
pub mod serve;
pub mod types;
