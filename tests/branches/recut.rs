//! Branches cut from a parent that has just written much: git does not wait for a checkpoint, and
//! the branch is small all the same, if nothing was written meanwhile.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use crate::support::{LIMIT, Server, Session, Storage, TestEnv, edit_config, is_alive, wait_until};

/// 8 MB in the table, and as much in the log.
const MUCH: &str = "insert into much select i, repeat(md5(i::text), 30) \
    from generate_series(1, 7700) i";

/// A parent that writes nothing by itself.
fn quiet_parent(server: Server) -> Option<TestEnv> {
    let env = TestEnv::with(server, Storage::Btrfs)?;
    env.write_config(&env.repo(), "shop", env.ports.first);
    edit_config(&env.repo(), |config| {
        config["postgres"]["settings"] = serde_json::json!({"autovacuum": "off"});
    });
    let _ = env.dbranch(&["init", "--yes"]).ok();
    let _ = env.dbranch(&["init-postgres"]).ok();
    let _ = env.dbranch(&["install-hooks"]).ok();
    env.sql("create table much(i bigint, v text)");
    env.sql("create table t(i bigint primary key)");
    Some(env)
}

fn owned_bytes(env: &TestEnv, branch: &str) -> u64 {
    let usage = env.dbranch(&["usage", "--json"]).json();
    let branches = usage["branches"].as_array().expect("an array");
    let found = branches.iter().find(|b| b["name"] == branch);
    found.expect("it is listed")["exclusive_bytes"]
        .as_u64()
        .expect("a number")
}

fn a_branch_of_a_parent_that_has_just_written_is_small(server: Server) {
    let Some(env) = quiet_parent(server) else {
        return;
    };
    for branch in ["one", "two"] {
        env.sql_on("main", MUCH);
        let _ = env.git(&["checkout", "-q", "-b", branch, "main"]).ok();
        env.sql("insert into t values (1)");
        // Before anything reads the new rows: the first to do so notes in each that it is visible.
        let owned = owned_bytes(&env, branch);
        assert!(owned < 1 << 20, "{branch} owns {owned} bytes");
        let all = "select count(*) || md5(string_agg(v, '' order by i)) from much";
        assert_eq!(env.sql(all), env.sql_on("main", all));
        let _ = env.git(&["checkout", "-q", "main"]).ok();
    }
    assert_eq!(env.sql("select count(*) from t"), "0");
    assert_eq!(env.volumes().len(), 3, "the first cuts are gone");
}

#[test]
fn a_branch_of_a_parent_that_has_just_written_is_small_15() {
    a_branch_of_a_parent_that_has_just_written_is_small(Server::Native);
}

#[test]
fn a_branch_of_a_parent_that_has_just_written_is_small_18() {
    a_branch_of_a_parent_that_has_just_written_is_small(Server::Native18);
}

/// How many branches are cut from a parent that is written to.
const ROUNDS: u32 = 12;

/// One session inserts number after number.
struct Writer {
    done: AtomicBool,
    rests: AtomicBool,
    committed: AtomicU64,
}

impl Writer {
    fn write(&self, mut session: Session) {
        let mut i = 0;
        while !self.done.load(Ordering::SeqCst) {
            if self.rests.load(Ordering::SeqCst) {
                std::thread::yield_now();
                continue;
            }
            i += 1;
            let inserted = session.run(&format!("insert into t values ({i})"));
            assert_eq!(inserted.as_deref(), Ok(""));
            self.committed.store(i, Ordering::SeqCst);
        }
    }

    fn committed(&self) -> u64 {
        self.committed.load(Ordering::SeqCst)
    }
}

fn a_branch_holds_what_was_committed_before_it_and_nothing_later(server: Server) {
    let Some(env) = quiet_parent(server) else {
        return;
    };
    let main = env.url_of("main");
    let writer = Writer {
        done: AtomicBool::new(false),
        rests: AtomicBool::new(false),
        committed: AtomicU64::new(0),
    };
    std::thread::scope(|scope| {
        let session = scope.spawn(|| writer.write(env.session(&main)));
        let tried = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            let mut until_ready = Duration::ZERO;
            for round in 0..ROUNDS {
                let _ = env.psql(&main, MUCH).ok();
                let ready = cut_beside(&writer, &env, round, until_ready);
                until_ready = if round == 0 { ready } else { until_ready };
            }
        }));
        writer.done.store(true, Ordering::SeqCst);
        session.join().expect("every insert is committed");
        if let Err(why) = tried {
            std::panic::resume_unwind(why);
        }
    });
}

/// In the first round the writer rests until the branch answers, in the second it never rests, and
/// from then on it begins again ever later on the way to a branch that answers.
fn cut_beside(writer: &Writer, env: &TestEnv, round: u32, until_ready: Duration) -> Duration {
    let branch = format!("b{round}");
    writer.rests.store(round != 1, Ordering::SeqCst);
    let before = writer.committed();
    let _ = env.git(&["checkout", "-q", "-b", &branch, "main"]).ok();
    let begun = Instant::now();
    // One insert may have been under way when git was done.
    let latest = writer.committed() + 1;
    if round == 0 {
        env.sql_on(&branch, "select 1");
    }
    let ready = begun.elapsed();
    while begun.elapsed() < until_ready * round.saturating_sub(2) / (ROUNDS - 2) {
        std::thread::yield_now();
    }
    writer.rests.store(false, Ordering::SeqCst);
    wait_until(LIMIT, "the parent has written more", || {
        writer.committed() > latest + 1
    });
    let shown = env.sql_on(
        &branch,
        "select coalesce(max(i), 0) || ' ' || count(*) from t",
    );
    let (last, count) = shown.split_once(' ').expect("two numbers");
    let (last, count): (u64, u64) = (last.parse().expect("one"), count.parse().expect("one"));
    assert_eq!(last, count, "{branch} has holes");
    assert!(
        (before..=latest).contains(&last),
        "{branch} shows {last}: {before} were committed before it, {latest} at most begun"
    );
    let _ = env.git(&["checkout", "-q", "main"]).ok();
    let _ = env.dbranch(&["delete", &branch, "--now", "--yes"]).ok();
    let _ = env.git(&["branch", "-q", "-D", &branch]).ok();
    ready
}

#[test]
fn a_branch_holds_what_was_committed_before_it_and_nothing_later_15() {
    a_branch_holds_what_was_committed_before_it_and_nothing_later(Server::Native);
}

#[test]
fn a_branch_holds_what_was_committed_before_it_and_nothing_later_18() {
    a_branch_holds_what_was_committed_before_it_and_nothing_later(Server::Native18);
}

#[test]
fn a_daemon_that_dies_while_it_cuts_again_leaves_one_volume() {
    let Some(mut env) = quiet_parent(Server::Native) else {
        return;
    };
    for (n, step) in [
        "recut:intent",
        "recut:cloned",
        "recut:taken",
        "recut:decided",
    ]
    .into_iter()
    .enumerate()
    {
        let branch = format!("b{n}");
        env.sql_on("main", MUCH);
        let rows = env.sql_on("main", "select count(*) from much");
        flush(&env);
        let _ = env.dbranch(&["shutdown"]).ok();
        env.set("DBRANCH_TEST_CRASH_AT", step);
        let _ = env.dbranch(&["start", "--detach"]).ok();
        let pid = env.daemon_pid();
        env.unset("DBRANCH_TEST_CRASH_AT");
        let _ = env.git(&["checkout", "-q", "-b", &branch, "main"]).ok();
        wait_until(LIMIT, step, || !is_alive(pid));
        let _ = env.dbranch(&["start", "--detach"]).ok();
        assert_eq!(
            env.sql_on(&branch, "select count(*) from much"),
            rows,
            "{step}"
        );
        assert_eq!(env.volumes().len(), n + 2, "{step}");
        let sync = env.dbranch(&["sync", "--dry-run"]).ok();
        assert!(!sync.stderr.contains("no branch knows"), "{step}: {sync}");
        env.sql_on(&branch, "insert into t values (1)");
    }
    assert_eq!(env.sql_on("main", "select count(*) from t"), "0");
}

/// Has the server write out its log: who reads rows the first time notes that in it, and leaves
/// it unwritten for a moment. A branch that is cut just then is not cut again.
fn flush(env: &TestEnv) {
    env.sql_on("main", "select pg_logical_emit_message(true, 'a', 'a')");
}

/// What others do to a branch, its parent and its children in the moments before its first start.
#[test]
fn other_operations_find_a_fresh_branch_in_order() {
    let Some(env) = quiet_parent(Server::Native) else {
        return;
    };
    let create = |name: &str, from: &str| env.dbranch(&["create", name, "--from", from]);
    let rows = |branch: &str| env.sql_on(branch, "select count(*) from much");

    env.sql_on("main", MUCH);
    for (name, from) in [
        ("a", "main"),
        ("b", "a"),
        ("c", "b"),
        ("d", "main"),
        ("e", "main"),
    ] {
        let _ = create(name, from).ok();
    }
    for branch in ["e", "d", "c", "b", "a"] {
        assert_eq!(rows(branch), "7700", "{branch}");
    }

    env.sql_on("main", MUCH);
    let _ = create("gone", "main").ok();
    let _ = env.dbranch(&["delete", "gone", "--now", "--yes"]).ok();
    let _ = create("trashed", "main").ok();
    let _ = env.dbranch(&["delete", "trashed", "--yes"]).ok();
    let _ = env.dbranch(&["undelete", "trashed"]).ok();
    assert_eq!(rows("trashed"), "15400");

    env.sql_on("main", MUCH);
    let _ = create("orphan", "main").ok();
    let _ = env.dbranch(&["stop", "main"]).ok();
    assert_eq!(rows("orphan"), "23100");
    env.sql_on("main", MUCH);
    let _ = create("alone", "main").ok();
    let _ = env
        .dbranch(&["delete", "main", "--now", "--yes", "--force"])
        .ok();
    assert_eq!(rows("alone"), "30800");
    let branches = ["a", "alone", "b", "c", "d", "e", "orphan", "trashed"];
    assert_eq!(env.branches(), branches);
    assert_eq!(env.volumes().len(), branches.len());
}
