//! The quick start's second half.

use crate::support::TestEnv;

#[test]
fn the_demo_shows_two_branches_behind_one_url_and_cleans_up() {
    let Some(env) = TestEnv::quick() else { return };
    let demo = env.dbranch_in(&env.path("elsewhere"), &["demo"]).ok();
    let shown = format!("{}{}", demo.stdout, demo.stderr);
    for word in ["git checkout", "postgresql://", " ms"] {
        assert!(shown.contains(word), "no `{word}`: {shown}");
    }
    assert_eq!(env.servers(), 0, "the demo leaves nothing behind");
    assert_eq!(env.volumes(), Vec::<std::path::PathBuf>::new());
    // It can be repeated, and beside a project it touches nothing of it.
    env.set_up();
    env.sql("create table t as select 7 as v");
    let _ = env.dbranch(&["demo"]).ok();
    assert_eq!(env.branches(), ["main"]);
    assert_eq!(env.sql("select v from t"), "7");
}
