//! Files that other rooms trust: replaced in one piece, or locked by one process; and the
//! commands that messages name.
//!
//! A leaf: it knows nothing of branches, volumes or daemons.

mod atomic;
mod command;
mod lock;

pub use atomic::{sync_folder, write_atomic};
pub use command::{as_root, shell_word};
pub use lock::{LockError, LockFile};

use std::io;
use std::path::Path;

use crate::types::Owner;

/// Makes a folder that isn't there yet, and gives it away where an owner is named.
pub fn make_folder(path: &Path, mode: u32, owner: Option<Owner>) -> io::Result<()> {
    use std::os::unix::fs::{DirBuilderExt, chown};
    std::fs::DirBuilder::new().mode(mode).create(path)?;
    match owner {
        Some(owner) => chown(path, Some(owner.uid), Some(owner.gid)),
        None => Ok(()),
    }
}
