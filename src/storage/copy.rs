//! The copy driver: every clone is a full copy, written again file by file.
//!
//! It works on any file system, and is what remains where blocks can't be shared.

use super::files::{self, Done, FileByFile, Way};
use super::pool::{self, Pool};
use super::{CloneMethod, DriverKind};

#[derive(Debug)]
pub(super) struct Copy {
    /// Told users when the better drivers were tried in vain.
    why_no_better: Option<String>,
    could_share: bool,
}

impl Way for Copy {
    const KIND: DriverKind = DriverKind::Copy;
    const SHARES: bool = false;

    fn method(done: Done) -> CloneMethod {
        CloneMethod::FullCopy {
            bytes: done.shared_bytes + done.written_bytes,
        }
    }

    fn advice(&self, pool: &Pool) -> Option<String> {
        let name = pool::file_system_name(pool.path());
        let (why, better) = match &self.why_no_better {
            Some(why) => (why.clone(), BETTER_POOL),
            None if self.could_share => (
                format!("the storage driver is `copy`, though {name} shares blocks"),
                "with the storage driver `auto`, branches of a new project take milliseconds and \
                 next to no room",
            ),
            None => (format!("the file system is {name}"), BETTER_POOL),
        };
        Some(format!(
            "every branch is a full copy of its parent's data in {} ({why}); {better}",
            pool.path().display()
        ))
    }

    fn may_be_shared(&self) -> bool {
        // Before there was the driver `reflink`, this one shared where it could.
        self.could_share
    }
}

const BETTER_POOL: &str = "on btrfs, ZFS or XFS a branch takes milliseconds and next to no room, \
                           whatever the size: `dbranch storage setup` makes such a pool on any disk";

pub(super) fn open(pool: Pool, why_no_better: Option<String>) -> FileByFile<Copy> {
    // Only for what is said: a disk that is full, for example, is no reason not to open.
    let could_share = why_no_better.is_none() && matches!(files::why_not_shared(&pool), Ok(None));
    let way = Copy {
        why_no_better,
        could_share,
    };
    FileByFile::new(pool, way)
}
