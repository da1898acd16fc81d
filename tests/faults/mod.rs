//! Disks that fail under a running dbranch: a clear error, nothing lost, and all works again when the
//! cause is gone.

mod frozen;
mod gone;
mod readonly;
mod room;

use std::path::Path;

use crate::support::{Fs, Image, Storage, TestEnv};

/// A project on a small file system, with a table `t` in `main`.
fn ready_on(fs: Fs, mib: u64) -> Option<TestEnv> {
    let storage = match fs {
        Fs::Btrfs => Storage::Btrfs,
        Fs::Xfs | Fs::Ext4 => Storage::Copy,
    };
    let env = TestEnv::on(Image::make(fs, mib)?, storage)?;
    env.set_up();
    env.sql("create table t as select 7 as v");
    Some(env)
}

/// A git branch `b` with its database, and back to `main`. Only `main` runs.
#[track_caller]
fn with_branch_b(env: &TestEnv) {
    let _ = env.git(&["checkout", "-q", "-b", "b"]).ok();
    assert_eq!(env.sql("select v from t"), "7");
    let _ = env.git(&["checkout", "-q", "main"]).ok();
    let _ = env.dbranch(&["stop", "b"]).ok();
    assert_eq!(env.sql("select v from t"), "7");
}

#[track_caller]
fn is_empty(folder: &Path) -> bool {
    let mut entries = std::fs::read_dir(folder).expect("it is there");
    entries.next().is_none()
}

/// The notes of `dbranch status`.
#[track_caller]
fn notes(env: &TestEnv) -> String {
    env.dbranch(&["status", "--json"]).json()["notes"].to_string()
}
