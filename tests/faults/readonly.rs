//! A file system that becomes read-only.

use super::{notes, ready_on, with_branch_b};
use crate::support::Fs;

fn a_read_only_pool(fs: Fs) {
    let Some(env) = ready_on(fs, 1024) else {
        return;
    };
    with_branch_b(&env);
    // The kernel refuses it while files are open for writing.
    let _ = env.dbranch(&["stop", "--all"]).ok();
    env.image().remount("ro");

    for restarted in [false, true] {
        if restarted {
            let _ = env.dbranch(&["shutdown"]).ok();
            let _ = env.dbranch(&["start", "--detach"]).ok();
        }
        let refused = env.psql(&env.url(), "select 1");
        assert_eq!(refused.code, Some(2), "{refused}");
        let _ = refused.says(&["FATAL", "ead-only", "HINT", "mount -o remount,rw"]);
        let _ = env
            .dbranch(&["create", "c", "--from", "main"])
            .fails(1, &["ead-only", "mount -o remount,rw"]);
        let checkout = env.git(&["checkout", "-q", "-b", "c"]).ok();
        let _ = checkout.says(&["dbranch: ", "ead-only", "STAYS on `main`"]);
        let _ = env.git(&["checkout", "-q", "main"]).ok();
        let _ = env.git(&["branch", "-q", "-D", "c"]).ok();
        let _ = env
            .dbranch(&["delete", "b", "--now", "--yes"])
            .fails(1, &["ead-only", "mount -o remount,rw"]);
        let _ = notes(&env);
    }
    env.image().remount("rw");
    assert_eq!(env.sql("select v from t"), "7");
    let _ = env.git(&["checkout", "-q", "-b", "d"]).ok();
    assert_eq!(env.sql("select v from t"), "7");
    assert_eq!(env.active(), "d");
    assert_eq!(env.sql_on("b", "select v from t"), "7");
    let _ = env.dbranch(&["delete", "b", "--now", "--yes"]).ok();
    assert_eq!(env.branches(), ["d", "main"]);
    assert_eq!(env.volumes().len(), 2);
}

#[test]
fn a_read_only_btrfs_pool_is_named_and_works_again() {
    a_read_only_pool(Fs::Btrfs);
}

#[test]
fn a_read_only_xfs_pool_is_named_and_works_again() {
    a_read_only_pool(Fs::Xfs);
}
