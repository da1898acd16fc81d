//! What git does, and where the database is afterwards.

mod checkout;
mod hooks;
mod names;
mod sync;
mod trouble;
mod worktrees;
