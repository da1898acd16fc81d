//! The one HTTP+JSON contract: types, server, client. Decides nothing.

pub mod serve;
pub mod types;
