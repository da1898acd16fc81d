//! Black-box tests: the built `dbranch`, real git, real PostgreSQL, real Docker.
//!
//! One binary, so that all share one build. `tests/run` gives it what it needs;
//! under plain `cargo test` it skips by name what this machine can't offer.

mod support;

mod branches;
mod cli;
mod daemon;
mod doctor;
mod faults;
mod git;
mod pools;
mod rooms;
mod sessions;
