//! Branches cut from a parent that is being written to.

use std::fs;
use std::sync::atomic::{AtomicBool, Ordering};

use crate::support::{LIMIT, Server, Storage, TestEnv, wait_until};

const BRANCHES: [&str; 3] = ["one", "two", "three"];

/// pgbench keeps four sums equal in every transaction: a clone that tore one shows it.
const SUMS: &str = "select (select sum(abalance) from pgbench_accounts) \
    = all(array[(select sum(bbalance) from pgbench_branches), \
    (select sum(tbalance) from pgbench_tellers), (select coalesce(sum(delta), 0) from pgbench_history)])";

fn a_branch_of_a_busy_parent_is_whole(server: Server, storage: Storage) {
    let Some(env) = TestEnv::with(server, storage) else {
        return;
    };
    env.set_up();
    let main = env.url_of("main");
    let _ = env
        .run("pgbench", &["-i", "-q", "-s", "2", "-d", &main])
        .ok();
    env.sql("create extension amcheck");

    // A line a transaction: client, number, microseconds, ...
    let log = env.path("elsewhere/transactions");
    let log = log.to_str().expect("a short path");
    let load = [
        "-n",
        "-c",
        "4",
        "-T",
        "3",
        "-l",
        "--log-prefix",
        log,
        "-d",
        &main,
    ];
    // Rounds of load until all branches are cut, however long that takes here.
    let done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let load = scope.spawn(|| {
            while !done.load(Ordering::Relaxed) {
                let load = env.run("pgbench", &load).ok();
                assert!(
                    load.stdout.contains("number of failed transactions: 0 "),
                    "the parent's clients saw something: {load}"
                );
            }
        });
        let cut = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            cut_branches_under_load(&env, &main);
        }));
        done.store(true, Ordering::Relaxed);
        load.join().expect("pgbench ran without an error");
        if let Err(why) = cut {
            std::panic::resume_unwind(why);
        }
    });

    says_the_longest_stall(&env, storage);
    let history = "select count(*) from pgbench_history";
    let on_main: u64 = env.sql_on("main", history).parse().expect("a number");
    for branch in BRANCHES {
        assert_eq!(env.sql_on(branch, SUMS), "t", "{branch} is torn");
        let rows: u64 = env.sql_on(branch, history).parse().expect("a number");
        assert!(0 < rows && rows < on_main, "{branch}: {rows} of {on_main}");
        let check = "select count(bt_index_check(c.oid, true)) from pg_class c \
            where relkind = 'i' and relpersistence = 'p' and relam = (select oid from pg_am where amname = 'btree')";
        assert!(
            env.sql_on(branch, check)
                .parse::<u32>()
                .is_ok_and(|n| n > 10)
        );
        let damage = "select count(*) from pg_class c, verify_heapam(c.oid) where relkind in ('r', 't', 'm')";
        assert_eq!(env.sql_on(branch, damage), "0", "{branch} is damaged");
        // It is a parent like any other.
        env.sql_on(
            branch,
            "insert into pgbench_history(tid, bid, aid, delta) values (1, 1, 1, 0)",
        );
    }
    assert_eq!(env.sql_on("main", SUMS), "t");
    every_page_bears_its_checksum(&env);
}

/// How long the parent's clients waited for one transaction at most: with `--nocapture`, or with a
/// failure, that is shown.
#[expect(clippy::print_stderr, reason = "a measurement says what it found")]
fn says_the_longest_stall(env: &TestEnv, storage: Storage) {
    let mut times = Vec::new();
    for log in fs::read_dir(env.path("elsewhere")).expect("ours").flatten() {
        let text = fs::read_to_string(log.path()).expect("pgbench wrote it");
        let micros = |line: &str| line.split(' ').nth(2)?.parse::<u64>().ok();
        times.extend(text.lines().filter_map(micros));
    }
    times.sort_unstable();
    let longest = times.last().expect("transactions were logged");
    eprintln!(
        "{} ({} runtime): {} transactions, half of them within {} us, the longest took {} us",
        storage.name(),
        env.server.runtime(),
        times.len(),
        times[times.len() / 2],
        longest
    );
    // Far from what cutting a branch costs, near to what a client gives up at.
    assert!(*longest < 15_000_000, "a client waited for {longest} us");
}

fn every_page_bears_its_checksum(env: &TestEnv) {
    let volume = |branch: &str| env.show(branch)["volume"].as_str().map(str::to_owned);
    let volumes = BRANCHES.map(|branch| volume(branch).expect("a path"));
    let _ = env.dbranch(&["shutdown", "--stop-branches"]).ok();
    // The oldest program checks what a server of its own version wrote.
    if env.server == Server::Native {
        for volume in volumes {
            let data = format!("{volume}/data");
            let _ = env.run("pg_checksums", &["--check", "-D", &data]).ok();
        }
    }
}

fn cut_branches_under_load(env: &TestEnv, main: &str) {
    let mut before = 0;
    for branch in BRANCHES {
        wait_until(LIMIT, "pgbench writes", || {
            let written = env
                .psql(main, "select count(*) from pgbench_history")
                .text();
            let now: u64 = written.parse().expect("a number");
            std::mem::replace(&mut before, now) < now && now > 0
        });
        let _ = env.git(&["checkout", "-q", "-b", branch, "main"]).ok();
        let _ = env.git(&["checkout", "-q", "main"]).ok();
    }
}

#[test]
fn a_btrfs_branch_of_a_busy_native_parent_is_whole() {
    a_branch_of_a_busy_parent_is_whole(Server::Native, Storage::Btrfs);
}

#[test]
fn a_reflinked_branch_of_a_busy_native_parent_is_whole() {
    a_branch_of_a_busy_parent_is_whole(Server::Native, Storage::Reflink);
}

#[test]
fn a_reflinked_branch_of_a_busy_docker_parent_is_whole() {
    a_branch_of_a_busy_parent_is_whole(Server::Docker, Storage::Reflink);
}

#[test]
fn a_copied_branch_of_a_busy_native_parent_is_whole() {
    a_branch_of_a_busy_parent_is_whole(Server::Native, Storage::Copy);
}

#[test]
fn a_copied_branch_of_a_busy_native_18_parent_is_whole() {
    a_branch_of_a_busy_parent_is_whole(Server::Native18, Storage::Copy);
}

#[test]
fn a_copied_branch_of_a_busy_docker_parent_is_whole() {
    a_branch_of_a_busy_parent_is_whole(Server::Docker, Storage::Copy);
}
