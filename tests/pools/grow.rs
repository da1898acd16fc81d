//! `dbranch storage grow`.

use super::Pools;

fn a_pool_grows_under_load(file_system: &str) {
    let Some(pools) = Pools::new() else { return };
    let env = &pools.env;
    let _ = pools
        .storage(&["setup", "--size", "1G", "--fs", file_system, "--yes"])
        .ok();
    env.set_up();
    let url = env.url();
    let _ = env
        .run("pgbench", &["-i", "-q", "-s", "1", "-d", &url])
        .ok();
    let total = || pools.status()["total_bytes"].as_u64().expect("a number");
    let before = total();
    std::thread::scope(|scope| {
        let load = scope.spawn(|| {
            env.run("pgbench", &["-n", "-c", "2", "-T", "3", "-d", &url])
                .ok()
        });
        let _ = pools.storage(&["grow", "--size", "2G", "--yes"]).ok();
        let said = load.join().expect("pgbench ran").stdout;
        assert!(said.contains("number of failed transactions: 0 "), "{said}");
    });
    assert!(total() > before + (900 << 20), "{before} -> {}", total());
    let _ = pools
        .storage(&["grow", "--size", "2G", "--yes"])
        .ok()
        .says(&["nothing to do"]);
    let _ = pools
        .storage(&["grow", "--size", "1G", "--yes"])
        .fails(1, &["smaller"]);
    let _ = pools
        .storage(&["setup", "--size", "3G", "--yes"])
        .fails(1, &["storage grow --size 3G"]);
    assert_eq!(env.sql("select count(*) from pgbench_accounts"), "100000");
    pools.halt();
}

#[test]
fn a_btrfs_pool_grows_under_load() {
    a_pool_grows_under_load("btrfs");
}

#[test]
fn an_xfs_pool_grows_under_load() {
    a_pool_grows_under_load("xfs");
}
