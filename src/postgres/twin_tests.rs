//! Two clones of a real server, cut one after the other: what counts as the same, and whether
//! what counts as the same is the same.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;

use nix::sys::signal::Signal;
use tokio_postgres::Client;

use super::live_tests::connect;
use super::test_server::{LIMIT, Programs, Server, programs, programs_18, skip};
use super::*;
use crate::storage::{self, Choice, DriverKind, Omit, StorageDriver};
use crate::types::{Password, VolumeId};

/// A running parent whose clones are atomic.
struct Parent {
    programs: Programs,
    driver: Arc<dyn StorageDriver>,
    volume: VolumeId,
    password: Password,
    server: Server,
    admin: Admin,
    _folder: tempfile::TempDir,
}

impl Parent {
    async fn start(test: &str, programs: Programs) -> Option<Self> {
        let Some(parent) = std::env::var_os("DBRANCH_TEST_BTRFS").map(PathBuf::from) else {
            skip(test, "btrfs", "DBRANCH_TEST_BTRFS names no folder");
            return None;
        };
        let folder = programs.folder(Some(&parent));
        let choice = Choice::Driver(DriverKind::Btrfs);
        let driver = storage::open(choice, &folder.path().join("pool"), programs.owner).unwrap();
        let (volume, password) = (VolumeId::random(), Password::random());
        let data = driver.create_volume(&volume).unwrap().join(DATA_FOLDER);
        programs.init(&data, &password);
        let conf = Conf {
            copy_on_write: true,
            settings: [
                ("autovacuum", "off"),
                ("max_prepared_transactions", "5"),
                // What nobody flushes stays unflushed for the length of a case.
                ("wal_writer_delay", "10s"),
                ("bgwriter_delay", "10s"),
            ]
            .map(|(name, value)| (name.to_owned(), value.to_owned()))
            .into(),
            ..Conf::default()
        };
        conf.write(&data, Some(programs.owner)).unwrap();
        let server = programs.start(&data).await;
        let admin = server.admin(&password).await;
        Some(Self {
            programs,
            driver,
            volume,
            password,
            server,
            admin,
            _folder: folder,
        })
    }

    async fn session(&self) -> Client {
        connect(&self.server, &self.password).await
    }

    fn data_dir(&self, volume: &VolumeId) -> PathBuf {
        self.driver.volume_path(volume).join(DATA_FOLDER)
    }

    fn cut(&self) -> VolumeId {
        let to = VolumeId::random();
        self.driver
            .clone_volume(&self.volume, &to, Omit::NOTHING, &|_, _| {})
            .unwrap();
        to
    }

    /// What a clone shows once it has started.
    async fn shown_by(&self, volume: &VolumeId, sql: &str) -> String {
        let data = self.data_dir(volume);
        shed(&data).unwrap();
        let server = self.programs.start(&data).await;
        let shown = value(&connect(&server, &self.password).await, sql).await;
        server.stop(Signal::SIGINT);
        shown
    }
}

impl Drop for Parent {
    fn drop(&mut self) {
        for id in self.driver.list().unwrap() {
            if id != self.volume {
                self.driver.destroy(&id).unwrap();
            }
        }
    }
}

async fn value(client: &Client, sql: &str) -> String {
    let text = format!("SELECT ({sql})::text");
    client.query_one(&text, &[]).await.unwrap().get(0)
}

/// All that the cases below change.
const ALL: &str = "SELECT (SELECT count(*) || ' ' || coalesce(sum(i), 0) FROM t)
    || (SELECT '; ' || count(*) FROM u) || (SELECT '; ' || count(*) FROM pg_prepared_xacts)";

/// Steps of the parent before the first cut, between it and the checkpoint, between that
/// and the second cut; and whether the second clone then counts as the same. None where that hangs
/// on what the server flushed by itself; in any case, what counts as the same must be.
struct Case {
    what: &'static str,
    steps: [&'static str; 3],
    same: Option<bool>,
}

const CASES: &[Case] = &[
    Case {
        what: "nothing happens",
        steps: ["", "", ""],
        same: Some(true),
    },
    Case {
        what: "a commit before the checkpoint",
        steps: ["", "INSERT INTO t VALUES (1)", ""],
        same: Some(false),
    },
    Case {
        what: "a commit behind the checkpoint",
        steps: ["", "", "INSERT INTO t VALUES (2)"],
        same: Some(false),
    },
    Case {
        what: "a commit that was not flushed when the first clone was cut",
        steps: [
            "SET synchronous_commit = off; INSERT INTO t VALUES (3)",
            "SET synchronous_commit = on",
            "",
        ],
        same: None,
    },
    Case {
        what: "more checkpoints than one",
        steps: ["", "CHECKPOINT; CHECKPOINT", "CHECKPOINT"],
        same: Some(true),
    },
    Case {
        what: "an open transaction that wrote before",
        steps: [
            "BEGIN; INSERT INTO t SELECT i FROM generate_series(1, 100) i; \
             SELECT pg_switch_wal(); SELECT pg_logical_emit_message(false, 'x', 'x')",
            "",
            "",
        ],
        // Its last record lies in the buffers only, as a rule.
        same: None,
    },
    Case {
        what: "an open transaction goes on writing",
        steps: ["", "INSERT INTO t VALUES (4)", "ROLLBACK"],
        same: Some(false),
    },
    Case {
        what: "a row of an unlogged table",
        steps: ["", "INSERT INTO u VALUES (1)", ""],
        same: Some(false),
    },
    Case {
        what: "a setting by ALTER SYSTEM",
        steps: ["", "ALTER SYSTEM SET work_mem = '7MB'", ""],
        same: Some(false),
    },
    Case {
        what: "a sequence within what it logged ahead",
        steps: [
            "SELECT nextval('s'); SELECT nextval('s')",
            "SELECT nextval('s')",
            "",
        ],
        same: Some(true),
    },
    Case {
        what: "a transaction that was prepared before",
        steps: [
            "BEGIN; INSERT INTO t VALUES (5); PREPARE TRANSACTION 'p'",
            "",
            "",
        ],
        same: Some(true),
    },
    Case {
        what: "a prepared transaction's commit",
        steps: ["", "COMMIT PREPARED 'p'", ""],
        same: Some(false),
    },
    Case {
        what: "a table is dropped",
        steps: ["CREATE TABLE d AS SELECT 1", "DROP TABLE d", ""],
        same: Some(false),
    },
    Case {
        what: "a switch to the next file of the log",
        steps: ["", "SELECT pg_switch_wal()", ""],
        same: Some(false),
    },
    Case {
        what: "a switch before the first clone is cut",
        steps: [
            "SELECT pg_switch_wal(); INSERT INTO t VALUES (6)",
            "SELECT 1",
            "SELECT 1",
        ],
        same: Some(true),
    },
];

async fn only_what_is_the_same_counts_as_the_same(test: &str, programs: Programs) {
    let Some(parent) = Parent::start(test, programs).await else {
        return;
    };
    let client = parent.session().await;
    client
        .batch_execute(
            "CREATE TABLE t(i bigint); CREATE UNLOGGED TABLE u(i bigint); CREATE SEQUENCE s;
             INSERT INTO t SELECT i FROM generate_series(1, 50000) i",
        )
        .await
        .unwrap();
    for Case { what, steps, same } in CASES {
        client.batch_execute(steps[0]).await.unwrap();
        let first = parent.cut();
        let cut = Cut::of(&parent.data_dir(&first));
        client.batch_execute(steps[1]).await.unwrap();
        parent.admin.checkpoint().await.unwrap();
        client.batch_execute(steps[2]).await.unwrap();
        let second = parent.cut();
        let found = cut.and_then(|cut| cut.holds_what(&parent.data_dir(&second)));
        let counts = found.as_ref().is_ok_and(|same| *same);
        assert_eq!(counts, same.unwrap_or(counts), "{what}: {found:?}");
        if counts {
            assert_eq!(
                parent.shown_by(&second, ALL).await,
                parent.shown_by(&first, ALL).await,
                "{what}"
            );
            let next = "SELECT last_value FROM s";
            let (now, on_second): (i64, i64) = (
                value(&client, next).await.parse().unwrap(),
                parent.shown_by(&second, next).await.parse().unwrap(),
            );
            assert!(on_second >= now, "{what}: numbers would be given out again");
        }
        for volume in [first, second] {
            parent.driver.destroy(&volume).unwrap();
        }
        client.batch_execute("ROLLBACK").await.unwrap();
    }
    let other = parent.session().await;
    let open = "BEGIN; INSERT INTO t SELECT i FROM generate_series(1, 100) i";
    other.batch_execute(open).await.unwrap();
    // A commit, which flushes what the open transaction wrote.
    client
        .batch_execute("INSERT INTO t VALUES (7)")
        .await
        .unwrap();
    let first = parent.cut();
    parent.admin.checkpoint().await.unwrap();
    let second = parent.cut();
    let cut = Cut::of(&parent.data_dir(&first)).unwrap();
    assert!(cut.holds_what(&parent.data_dir(&second)).unwrap());
    other.batch_execute("COMMIT").await.unwrap();
    for volume in [&first, &second] {
        let shown = parent
            .shown_by(volume, "SELECT count(*) FROM t WHERE i <= 100")
            .await;
        let before = value(&client, "SELECT count(*) - 100 FROM t WHERE i <= 100").await;
        assert_eq!(shown, before, "what was not committed");
    }

    client
        .batch_execute("INSERT INTO t VALUES (8)")
        .await
        .unwrap();
    let [first, second] = [parent.cut(), parent.cut()];
    let cut = Cut::of(&parent.data_dir(&first)).unwrap();
    let found = cut.holds_what(&parent.data_dir(&second)).unwrap();
    assert!(!found, "without a checkpoint nothing is gained");
}

#[tokio::test]
async fn only_what_is_the_same_counts_as_the_same_15() {
    let test = "only_what_is_the_same_counts_as_the_same_15";
    if let Some(programs) = programs(test) {
        only_what_is_the_same_counts_as_the_same(test, programs).await;
    }
}

#[tokio::test]
async fn only_what_is_the_same_counts_as_the_same_18() {
    let test = "only_what_is_the_same_counts_as_the_same_18";
    if let Some(programs) = programs_18(test) {
        only_what_is_the_same_counts_as_the_same(test, programs).await;
    }
}

/// The end of the log as its files tell, against the server's own word.
async fn the_logs_end_is_found_wherever_it_lies(programs: Programs) {
    let folder = programs.folder(None);
    let data = folder.path().join("data");
    let password = Password::random();
    programs.init(&data, &password);
    let server = programs.start(&data).await;
    let admin = server.admin(&password).await;
    let client = connect(&server, &password).await;
    let write = async |bytes: u64| {
        let message = format!(
            "SELECT pg_logical_emit_message(true, '', repeat('x', {bytes})); \
             SELECT 1 FROM pg_current_xact_id()"
        );
        client.batch_execute(&message).await.unwrap();
    };
    let mut at_boundary = 0;
    let mut sizes: u64 = 1;
    for round in 0..150 {
        let before = admin.insert_position().await.unwrap();
        write(0).await;
        let step = admin.insert_position().await.unwrap() - before;
        if round % 3 == 0 {
            // To the end of a page, exactly.
            let left = 8192 - (before + step) % 8192;
            write(left.saturating_sub(step)).await;
        } else {
            sizes = sizes * 7919 % 50_021;
            write(sizes).await;
        }
        let end = agreed_end(&admin, &data).await;
        at_boundary += u32::from([24, 40].contains(&(end % 8192)));
        if round % 40 == 20 {
            client
                .batch_execute("SELECT pg_switch_wal()")
                .await
                .unwrap();
            write(1).await;
            agreed_end(&admin, &data).await;
        }
    }
    assert!(at_boundary > 5, "only {at_boundary} ends at a page's end");
    assert!(Cut::of(&data).unwrap().checkpoint_pays());
    admin.checkpoint().await.unwrap();
    agreed_end(&admin, &data).await;
    assert!(!Cut::of(&data).unwrap().checkpoint_pays());
}

/// The server flushes what it adds by itself a moment later.
async fn agreed_end(admin: &Admin, data: &Path) -> u64 {
    let begun = Instant::now();
    loop {
        let end = admin.insert_position().await.unwrap();
        match Cut::of(data) {
            Ok(cut) if cut.end() == end => return end,
            found if begun.elapsed() > LIMIT => panic!("{end:x}: {found:x?}"),
            _ => {}
        }
    }
}

#[tokio::test]
async fn the_logs_end_is_found_wherever_it_lies_15() {
    if let Some(programs) = programs("the_logs_end_is_found_wherever_it_lies_15") {
        the_logs_end_is_found_wherever_it_lies(programs).await;
    }
}

#[tokio::test]
async fn the_logs_end_is_found_wherever_it_lies_18() {
    if let Some(programs) = programs_18("the_logs_end_is_found_wherever_it_lies_18") {
        the_logs_end_is_found_wherever_it_lies(programs).await;
    }
}
