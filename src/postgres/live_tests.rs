//! This room against a real server, and the one thing that only two rooms show
//! together: a clone of a cluster that is being written to is consistent.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use nix::sys::signal::Signal;
use tokio_postgres::NoTls;

use super::test_server::{LIMIT, Programs, ROLE, Server, programs, skip};
use super::*;
use crate::storage::{self, Choice, Consistency, DriverKind, Omit, StorageDriver};
use crate::types::{BackendAddress, Password, VolumeId};

async fn connect(server: &Server, password: &Password) -> tokio_postgres::Client {
    let BackendAddress::Unix { dir, port } = server.address() else {
        unreachable!("the test server has a socket")
    };
    let (client, connection) = tokio_postgres::Config::new()
        .host_path(dir)
        .port(port)
        .user(ROLE)
        .password(password.reveal())
        .dbname("postgres")
        .connect(NoTls)
        .await
        .unwrap();
    tokio::spawn(connection);
    client
}

#[tokio::test]
async fn a_role_and_its_database_are_set_up_once_and_again() {
    let Some(programs) = programs("a_role_and_its_database_are_set_up_once_and_again") else {
        return;
    };
    let folder = programs.folder(None);
    let data = folder.path().join("data");
    let password = Password::random();
    programs.init(&data, &password);
    assert!(major(&data).unwrap() >= 13);
    refuse_external(&data).unwrap();
    let server = programs.start(&data).await;
    let admin = server.admin(&password).await;
    assert_eq!(
        admin.version_num().await.unwrap() / 10_000,
        major(&data).unwrap()
    );
    let (role, database) = ("o'neil \"x\" \\", "app \"db\" 'ü'");
    let secret = Password::new("s3cret 'ü' \\");
    for _ in 0..2 {
        admin
            .set_up(role, &secret, database, Some("C"))
            .await
            .unwrap();
    }
    let address = server.address();
    let owner = Admin::connect(&address, role, database, &secret)
        .await
        .unwrap();
    assert!(!owner.is_closed());
    let wrong = Admin::connect(&address, role, database, &Password::new("other"))
        .await
        .unwrap_err();
    assert!(!wrong.is_not_ready_yet());
    assert!(wrong.to_string().contains("28P01"), "{wrong}");
    let nobody = Admin::connect(&address, role, "nothing", &secret)
        .await
        .unwrap_err();
    assert!(nobody.to_string().contains("nothing"), "{nobody}");
    assert!(!server.log().contains(secret.reveal()));
    server.stop(Signal::SIGQUIT);
    tokio::time::timeout(LIMIT, async {
        while !owner.is_closed() {
            tokio::task::yield_now().await;
        }
    })
    .await
    .expect("a session notices that its server has gone");
}

#[tokio::test]
async fn a_checkpoint_pays_after_much_writing_and_not_before() {
    let Some(programs) = programs("a_checkpoint_pays_after_much_writing_and_not_before") else {
        return;
    };
    let folder = programs.folder(None);
    let data = folder.path().join("data");
    let password = Password::random();
    programs.init(&data, &password);
    let server = programs.start(&data).await;
    let admin = server.admin(&password).await;
    assert!(!checkpoint_pays(&data).unwrap());
    connect(&server, &password)
        .await
        .batch_execute(
            "CREATE TABLE big AS SELECT i, repeat('x', 200) FROM generate_series(1, 10000) i",
        )
        .await
        .unwrap();
    assert!(checkpoint_pays(&data).unwrap());
    admin.checkpoint().await.unwrap();
    assert!(!checkpoint_pays(&data).unwrap());
}

#[tokio::test]
async fn a_backup_keeps_its_wal_until_it_ends_and_a_dropped_one_ends() {
    let Some(programs) = programs("a_backup_keeps_its_wal_until_it_ends_and_a_dropped_one_ends")
    else {
        return;
    };
    let folder = programs.folder(None);
    let data = folder.path().join("data");
    let password = Password::random();
    programs.init(&data, &password);
    let server = programs.start(&data).await;
    let client = connect(&server, &password).await;
    let mut backup = server.admin(&password).await.start_backup().await.unwrap();
    client
        .batch_execute("SELECT pg_switch_wal(); CHECKPOINT; SELECT pg_switch_wal(); CHECKPOINT")
        .await
        .unwrap();
    let label = backup.stop().await.unwrap();
    assert!(label.text.contains("LABEL: dbranch"), "{}", label.text);
    let needed: Vec<PathBuf> = label.wal_files().collect();
    client.batch_execute("CHECKPOINT").await.unwrap();
    assert!(!needed.is_empty());
    for file in &needed {
        assert!(folder.path().join(file).exists(), "{}", file.display());
    }
    let admin = backup.end().await.unwrap();
    drop(admin.start_backup().await.unwrap());
    let slots = "SELECT count(*) FROM pg_replication_slots";
    tokio::time::timeout(LIMIT, async {
        while client.query_one(slots, &[]).await.unwrap().get::<_, i64>(0) != 0 {}
    })
    .await
    .expect("the slot goes with its session");
}

#[tokio::test]
async fn settings_and_passwords_reach_the_server() {
    let Some(programs) = programs("settings_and_passwords_reach_the_server") else {
        return;
    };
    let folder = programs.folder(None);
    let data = folder.path().join("data");
    let password = Password::random();
    programs.init(&data, &password);
    let odd = "it's a \\n 'test'\nof \\ two lines";
    let conf = Conf {
        max_connections: 17,
        copy_on_write: true,
        settings: [
            ("dbranch_test.odd".to_owned(), odd.to_owned()),
            ("work_mem".to_owned(), "7MB".to_owned()),
        ]
        .into(),
        ..Conf::default()
    };
    assert!(conf.write(&data, Some(programs.owner)).unwrap());
    let server = programs.start(&data).await;
    let client = connect(&server, &password).await;
    for (name, value) in [
        ("dbranch_test.odd", odd),
        ("work_mem", "7MB"),
        ("max_connections", "17"),
        ("listen_addresses", ""),
        ("wal_recycle", "off"),
        ("shared_buffers", "32MB"),
        ("data_checksums", "on"),
    ] {
        let row = client
            .query_one("SELECT current_setting($1)", &[&name])
            .await
            .unwrap();
        assert_eq!(row.get::<_, &str>(0), value, "{name}");
    }
    let bad = "SELECT count(*) FROM pg_hba_file_rules WHERE auth_method <> 'scram-sha-256'";
    assert_eq!(
        client.query_one(bad, &[]).await.unwrap().get::<_, i64>(0),
        0
    );
}

/// Sessions that move money between accounts, each step noted in a journal, while
/// others make, shrink, index and drop tables and force checkpoints.
struct Load {
    stop: Arc<AtomicBool>,
    done: Arc<AtomicU64>,
    tasks: Vec<tokio::task::JoinHandle<()>>,
}

impl Load {
    async fn start(server: &Server, password: &Password) -> Self {
        connect(server, password)
            .await
            .batch_execute(
                "CREATE TABLE account(id int PRIMARY KEY, balance bigint NOT NULL, pad text);
                 INSERT INTO account SELECT i, 1000, repeat('p', 100) FROM generate_series(1, 20000) i;
                 CREATE TABLE journal(id bigserial PRIMARY KEY, source int, target int, amount bigint);
                 CREATE INDEX ON journal(source);",
            )
            .await
            .unwrap();
        let mut load = Self {
            stop: Arc::default(),
            done: Arc::default(),
            tasks: Vec::new(),
        };
        for worker in 0..4 {
            let client = connect(server, password).await;
            let (stop, done) = (load.stop.clone(), load.done.clone());
            load.tasks.push(tokio::spawn(async move {
                let mut n: u32 = worker * 7919;
                while !stop.load(Ordering::Relaxed) {
                    n = n.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                    let (a, b) = (n / 7 % 20_000 + 1, n / 31 % 20_000 + 1);
                    let (low, high) = (a.min(b), a.max(b));
                    let amount = n % 100;
                    let transfer = format!(
                        "BEGIN; UPDATE account SET balance = balance - {amount} WHERE id = {low};
                         UPDATE account SET balance = balance + {amount} WHERE id = {high};
                         INSERT INTO journal(source, target, amount) VALUES ({low}, {high}, {amount}); COMMIT"
                    );
                    client.batch_execute(&transfer).await.unwrap();
                    done.fetch_add(1, Ordering::Relaxed);
                }
            }));
        }
        let client = connect(server, password).await;
        let stop = load.stop.clone();
        load.tasks.push(tokio::spawn(async move {
            while !stop.load(Ordering::Relaxed) {
                for step in [
                    "CREATE TABLE passing AS SELECT i FROM generate_series(1, 5000) i",
                    "CREATE TEMPORARY TABLE brief AS SELECT 1; DROP TABLE brief",
                    "DELETE FROM passing WHERE i > 100",
                    "VACUUM passing",
                    "CHECKPOINT",
                    "DROP TABLE passing",
                    "SELECT pg_switch_wal()",
                ] {
                    client.batch_execute(step).await.unwrap();
                }
            }
        }));
        load
    }

    /// Waits until so many more steps were taken.
    async fn wait_for(&self, steps: u64) {
        let from = self.done.load(Ordering::Relaxed);
        tokio::time::timeout(LIMIT, async {
            while self.done.load(Ordering::Relaxed) < from + steps {
                tokio::time::sleep(std::time::Duration::from_millis(1)).await;
            }
        })
        .await
        .expect("the load goes on");
    }

    async fn end(self) {
        self.stop.store(true, Ordering::Relaxed);
        for task in self.tasks {
            task.await.unwrap();
        }
    }
}

/// The clone as the engine makes it, of whatever consistency.
async fn clone_running(
    driver: &Arc<dyn StorageDriver>,
    programs: &Programs,
    server: &Server,
    password: &Password,
    from: &VolumeId,
) -> VolumeId {
    let to = VolumeId::random();
    let (source, made) = (from.clone(), to.clone());
    let storage = driver.clone();
    let data = driver.volume_path(&to).join(DATA_FOLDER);
    match driver.consistency() {
        Consistency::Atomic => {
            let clone = move || storage.clone_volume(&source, &made, Omit::NOTHING, &|_, _| {});
            tokio::task::spawn_blocking(clone).await.unwrap().unwrap();
        }
        Consistency::NeedsBackup => {
            let mut backup = server.admin(password).await.start_backup().await.unwrap();
            let clone = move || {
                storage.clone_volume(&source, &made, Omit(omit), &|_, _| {})?;
                storage.catch_up(&source, &made, Path::new(CONTROL_FILE))
            };
            tokio::task::spawn_blocking(clone).await.unwrap().unwrap();
            let label = backup.stop().await.unwrap();
            write_backup_label(&data, &label, Some(programs.owner)).unwrap();
            for file in label.wal_files() {
                driver.catch_up(from, &to, &file).unwrap();
            }
            drop(backup.end().await.unwrap());
        }
    }
    shed(&data).unwrap();
    to
}

async fn assert_sound(client: &tokio_postgres::Client, at_least: u64) {
    let row = client
        .query_one(
            "SELECT (SELECT sum(balance)::bigint FROM account), (SELECT count(*) FROM account),
                    (SELECT count(*) FROM journal), (SELECT count(DISTINCT id) FROM journal)",
            &[],
        )
        .await
        .unwrap();
    assert_eq!(row.get::<_, i64>(0), 20_000_000);
    assert_eq!(row.get::<_, i64>(1), 20_000);
    assert_eq!(row.get::<_, i64>(2), row.get::<_, i64>(3));
    assert!(u64::try_from(row.get::<_, i64>(2)).unwrap() >= at_least);
    let moved = client
        .query_one(
            "SELECT count(*) FROM account a WHERE balance <> 1000
                + coalesce((SELECT sum(amount) FROM journal WHERE target = a.id), 0)
                - coalesce((SELECT sum(amount) FROM journal WHERE source = a.id), 0)
                AND a.id <= 200",
            &[],
        )
        .await
        .unwrap();
    assert_eq!(
        moved.get::<_, i64>(0),
        0,
        "balances the journal can't explain"
    );
    // Every page with its checksum, and every index against its table.
    client
        .batch_execute("SELECT * FROM account, LATERAL (SELECT 1) x; ANALYZE")
        .await
        .unwrap();
    if client
        .batch_execute("CREATE EXTENSION amcheck")
        .await
        .is_ok()
    {
        client
            .batch_execute(
                "SELECT bt_index_check(c.oid, true) FROM pg_class c JOIN pg_am a ON a.oid = c.relam
                 WHERE a.amname = 'btree' AND c.relkind = 'i' AND c.relpersistence = 'p'",
            )
            .await
            .unwrap();
    }
}

async fn clones_of_a_busy_parent_are_sound(
    programs: &Programs,
    kind: DriverKind,
    parent: Option<&Path>,
) {
    let folder = programs.folder(parent);
    let pool = folder.path().join("pool");
    let driver = storage::open(Choice::Driver(kind), &pool, programs.owner).unwrap();
    let password = Password::random();
    let from = VolumeId::random();
    let volume = driver.create_volume(&from).unwrap();
    programs.init(&volume.join(DATA_FOLDER), &password);
    let server = programs.start(&volume.join(DATA_FOLDER)).await;
    let load = Load::start(&server, &password).await;
    let mut clones = Vec::new();
    for _ in 0..2 {
        load.wait_for(100).await;
        let before = load.done.load(Ordering::Relaxed);
        clones.push((
            clone_running(&driver, programs, &server, &password, &from).await,
            before,
        ));
    }
    load.wait_for(50).await;
    load.end().await;
    for (id, at_least) in &clones {
        let clone = programs
            .start(&driver.volume_path(id).join(DATA_FOLDER))
            .await;
        assert_sound(&connect(&clone, &password).await, *at_least).await;
        clone.stop(Signal::SIGINT);
    }
    assert_sound(&connect(&server, &password).await, 0).await;
    server.stop(Signal::SIGINT);
    for id in driver.list().unwrap() {
        driver.destroy(&id).unwrap();
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_copy_made_under_load_in_backup_mode_is_consistent() {
    let test = "a_copy_made_under_load_in_backup_mode_is_consistent";
    let Some(programs) = programs(test) else {
        return;
    };
    clones_of_a_busy_parent_are_sound(&programs, DriverKind::Copy, None).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_reflink_made_under_load_in_backup_mode_is_consistent() {
    let test = "a_reflink_made_under_load_in_backup_mode_is_consistent";
    let Some(programs) = programs(test) else {
        return;
    };
    match std::env::var_os("DBRANCH_TEST_XFS").map(PathBuf::from) {
        Some(parent) => {
            clones_of_a_busy_parent_are_sound(&programs, DriverKind::Reflink, Some(&parent)).await;
        }
        None => skip(test, "xfs", "DBRANCH_TEST_XFS names no folder"),
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_snapshot_made_under_load_without_backup_mode_is_consistent() {
    let test = "a_snapshot_made_under_load_without_backup_mode_is_consistent";
    let Some(programs) = programs(test) else {
        return;
    };
    match std::env::var_os("DBRANCH_TEST_BTRFS").map(PathBuf::from) {
        Some(parent) => {
            clones_of_a_busy_parent_are_sound(&programs, DriverKind::Btrfs, Some(&parent)).await;
            clones_of_a_busy_parent_are_sound(&programs, DriverKind::Reflink, Some(&parent)).await;
            clones_of_a_busy_parent_are_sound(&programs, DriverKind::Copy, Some(&parent)).await;
        }
        None => skip(test, "btrfs", "DBRANCH_TEST_BTRFS names no folder"),
    }
}

#[tokio::test]
async fn a_clone_of_a_stopped_parent_starts() {
    let Some(programs) = programs("a_clone_of_a_stopped_parent_starts") else {
        return;
    };
    let folder = programs.folder(None);
    let pool = folder.path().join("pool");
    let choice = Choice::Driver(DriverKind::Copy);
    let driver = storage::open(choice, &pool, programs.owner).unwrap();
    let password = Password::random();
    let (from, to) = (VolumeId::random(), VolumeId::random());
    let data = driver.create_volume(&from).unwrap().join(DATA_FOLDER);
    programs.init(&data, &password);
    // Killed, not stopped: its lock file stays and goes into the clone.
    programs.start(&data).await.stop(Signal::SIGKILL);
    driver
        .clone_volume(&from, &to, Omit::NOTHING, &|_, _| {})
        .unwrap();
    let data = driver.volume_path(&to).join(DATA_FOLDER);
    assert!(PidFile::read(&data).unwrap().is_some());
    shed(&data).unwrap();
    assert_eq!(PidFile::read(&data).unwrap(), None);
    let clone = programs.start(&data).await;
    assert_eq!(PidFile::read(&data).unwrap().unwrap().status, Status::Ready);
    clone.stop(Signal::SIGINT);
}
