//! What dbranch knows about PostgreSQL itself: data directories, settings,
//! readiness, and the few statements it sends as administrator.
//!
//! Starts and stops nothing; knows no branch.
