//! Files that other rooms trust: replaced in one piece, or locked by one process.
//!
//! A leaf: it knows nothing of branches, volumes or daemons.

mod atomic;
mod lock;

pub use atomic::{sync_folder, write_atomic};
pub use lock::{LockError, LockFile};
