//! dbranch makes PostgreSQL branch with git.
//!
//! This library serves the `dbranch` program, its tests and its benchmarks; it
//! promises no stable interface. The folders are the parts, and arrows between
//! them go downward only:
//!
//! ```text
//!   cli ── api client ──┐            psql, apps
//!                       v                v
//!                      api             proxy
//!                       └──> daemon <────┘
//!                              │
//!                            engine
//!            ┌─────────┬───────┼───────┬──────────┐
//!        registry     git   storage  runtime   postgres
//! ```
//!
//! `types`, `fsx` and `config` are leaves that everyone may use. The five parts
//! in the lowest row don't know each other.

pub mod api;
pub mod cli;
pub mod config;
pub mod daemon;
pub mod engine;
pub mod fsx;
pub mod git;
pub mod postgres;
pub mod proxy;
pub mod registry;
pub mod runtime;
pub mod storage;
pub mod types;
