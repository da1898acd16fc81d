//! The proxy between real clients and real servers.

use std::collections::HashMap;
use std::future::Future;
use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::process::Stdio;
use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::process::Command;
use tokio::sync::watch;
use tokio_postgres::NoTls;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use super::{Listener, Proxy, ProxySettings, Route, RouteError, Router, Startup};
use crate::types::{BackendAddress, BranchId, BranchName};

const PASSWORD: &str = "correct horse";
const LIMIT: Duration = Duration::from_secs(60);

/// The folder with the server programs; skips or fails the test without one.
fn server_programs(test: &str) -> Option<PathBuf> {
    let newest = || {
        let version = |p: &PathBuf| p.parent()?.file_name()?.to_str()?.parse::<u32>().ok();
        let found = glob::glob("/usr/lib/postgresql/*/bin").ok()?;
        found.flatten().max_by_key(version)
    };
    let bin = std::env::var_os("DBRANCH_TEST_PG_BIN")
        .map(PathBuf::from)
        .or_else(newest);
    if bin.is_none() {
        let required = std::env::var("DBRANCH_TEST_REQUIRE").unwrap_or_default();
        assert!(
            !required.split(',').any(|c| c.trim() == "postgres"),
            "no PostgreSQL, which is required"
        );
        skipped(test, "no PostgreSQL under /usr/lib/postgresql");
    }
    bin
}

#[expect(clippy::print_stderr, reason = "a skipped test must say so")]
fn skipped(test: &str, reason: &str) {
    eprintln!("skipped: {test}: {reason}");
}

/// A server of its own in a temporary folder, on a Unix socket.
struct Server {
    dir: tempfile::TempDir,
    bin: PathBuf,
}

impl Server {
    /// Without passwords: SCRAM in a debug build takes a client a third of a second.
    async fn start(bin: &Path) -> Self {
        Self::start_with(bin, "--auth=trust").await
    }

    async fn start_with(bin: &Path, auth: &str) -> Self {
        let dir = tempfile::Builder::new().prefix("pg").tempdir().unwrap();
        if let Some(user) = server_user() {
            std::os::unix::fs::chown(dir.path(), Some(user.uid.as_raw()), Some(user.gid.as_raw()))
                .unwrap();
        }
        let server = Self {
            dir,
            bin: bin.to_owned(),
        };
        std::fs::write(server.path("password"), PASSWORD).unwrap();
        std::fs::set_permissions(
            server.path("password"),
            std::os::unix::fs::PermissionsExt::from_mode(0o644),
        )
        .unwrap();
        let pwfile = format!("--pwfile={}", server.path("password"));
        let data = server.path("data");
        server
            .run(
                "initdb",
                &[
                    "-D",
                    &data,
                    "-U",
                    "app",
                    auth,
                    &pwfile,
                    "--no-sync",
                    "--locale=C",
                    "-E",
                    "UTF8",
                ],
            )
            .await;
        let options = format!(
            "-c listen_addresses= -c unix_socket_directories={} -c fsync=off -c max_connections=60",
            server.dir.path().display()
        );
        let log = server.path("log");
        server
            .run(
                "pg_ctl",
                &["-D", &data, "-l", &log, "-w", "-o", &options, "start"],
            )
            .await;
        server
    }

    fn path(&self, name: &str) -> String {
        self.dir.path().join(name).to_str().unwrap().to_owned()
    }

    fn address(&self) -> BackendAddress {
        BackendAddress::Unix {
            dir: self.dir.path().to_owned(),
            port: 5432,
        }
    }

    async fn run(&self, program: &str, arguments: &[&str]) {
        let mut command = Command::new(self.bin.join(program));
        command
            .args(arguments)
            .stdin(Stdio::null())
            .current_dir(self.dir.path());
        if let Some(user) = server_user() {
            command.uid(user.uid.as_raw()).gid(user.gid.as_raw());
        }
        // Not piped: the server would inherit and keep the pipe open.
        let status = command
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .status()
            .await
            .unwrap();
        assert!(
            status.success(),
            "{program}: {}",
            std::fs::read_to_string(self.path("log")).unwrap_or_default()
        );
    }

    /// A query's answer, not through the proxy.
    async fn ask(&self, query: &str) -> String {
        let out = self
            .psql(self.dir.path().to_str().unwrap(), 5432, &["-c", query])
            .output()
            .await
            .unwrap();
        assert!(
            out.status.success(),
            "{query}: {}",
            String::from_utf8_lossy(&out.stderr)
        );
        String::from_utf8(out.stdout).unwrap().trim().to_owned()
    }

    async fn wait_until(&self, query: &str, answer: &str) {
        let begun = Instant::now();
        loop {
            let got = self.ask(query).await;
            if got == answer {
                return;
            }
            assert!(begun.elapsed() < LIMIT, "{query}: {got} and never {answer}");
        }
    }

    fn psql(&self, host: &str, port: u16, arguments: &[&str]) -> Command {
        let mut command = self.client("psql", host, port);
        command.args(["-X", "-A", "-t", "-q"]).args(arguments);
        command
    }

    fn client(&self, program: &str, host: &str, port: u16) -> Command {
        let mut command = Command::new(self.bin.join(program));
        command
            .env("PGPASSWORD", PASSWORD)
            .env("PGHOST", host)
            .env("PGPORT", port.to_string())
            .env("PGUSER", "app")
            .env("PGDATABASE", "postgres")
            .env("PGCONNECT_TIMEOUT", "20")
            .stdin(Stdio::null())
            .kill_on_drop(true);
        command
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let mut stop = std::process::Command::new(self.bin.join("pg_ctl"));
        stop.args(["-D", &self.path("data"), "-m", "immediate", "-w", "stop"])
            .current_dir("/");
        if let Some(user) = server_user() {
            std::os::unix::process::CommandExt::uid(&mut stop, user.uid.as_raw());
        }
        let _ = stop.stdout(Stdio::null()).stderr(Stdio::null()).status();
    }
}

/// Whom the server runs as; `None` for ourselves.
fn server_user() -> Option<nix::unistd::User> {
    nix::unistd::geteuid().is_root().then(|| {
        nix::unistd::User::from_name("postgres")
            .unwrap()
            .expect("a user postgres")
    })
}

/// Branches by name and the one that is shown.
struct Branches {
    servers: HashMap<BranchId, (BranchName, BackendAddress)>,
    show: watch::Sender<Option<BranchId>>,
    grace: Duration,
}

impl Branches {
    fn of(servers: &[(&str, &Server)], grace: Duration) -> Arc<Self> {
        let named = |(name, server): &(&str, &Server)| {
            (
                BranchId::new(*name).unwrap(),
                (BranchName::new(*name).unwrap(), server.address()),
            )
        };
        Arc::new(Self {
            servers: servers.iter().map(named).collect(),
            show: watch::Sender::new(Some(BranchId::new(servers[0].0).unwrap())),
            grace,
        })
    }

    fn show(&self, name: &str) {
        self.show.send_replace(Some(BranchId::new(name).unwrap()));
    }
}

impl Router for Branches {
    fn route<'a>(
        &'a self,
        _startup: &'a Startup,
    ) -> Pin<Box<dyn Future<Output = Result<Route, RouteError>> + Send + 'a>> {
        Box::pin(async move {
            let branch = self.show.borrow().clone().expect("a branch is shown");
            let (branch_name, backend) = self.servers[&branch].clone();
            let active = self.show.subscribe();
            let grace = self.grace;
            Ok(Route {
                branch,
                branch_name,
                backend,
                active,
                grace,
                lease: Box::new(()),
            })
        })
    }

    fn branch_name(&self, branch: &BranchId) -> Option<BranchName> {
        Some(self.servers.get(branch)?.0.clone())
    }
}

/// A proxy that serves `branches` on a port of its own until dropped.
struct Running {
    proxy: Proxy,
    port: u16,
    stop: CancellationToken,
    tracker: TaskTracker,
}

impl Running {
    fn start(branches: Arc<Branches>) -> Self {
        let proxy = Proxy::start(&ProxySettings::default()).unwrap();
        let listener = Listener::bind("127.0.0.1:0".parse().unwrap()).unwrap();
        let port = listener.address().port();
        let (stop, tracker) = (CancellationToken::new(), TaskTracker::new());
        tokio::spawn(proxy.serve(listener, branches, stop.clone(), tracker.clone()));
        Self {
            proxy,
            port,
            stop,
            tracker,
        }
    }

    fn config(&self) -> tokio_postgres::Config {
        let mut config = tokio_postgres::Config::new();
        config
            .host("127.0.0.1")
            .port(self.port)
            .user("app")
            .password(PASSWORD)
            .dbname("postgres");
        config
    }

    /// A client, and how its connection ended.
    async fn connect(&self) -> Result<Client, tokio_postgres::Error> {
        let (client, connection) = self.config().connect(NoTls).await?;
        Ok((client, tokio::spawn(connection)))
    }

    async fn wait_for_sessions(&self, count: usize) {
        let begun = Instant::now();
        while self.proxy.sessions() != count {
            assert!(
                begun.elapsed() < LIMIT,
                "{} sessions and never {count}",
                self.proxy.sessions()
            );
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    }
}

type Client = (
    tokio_postgres::Client,
    tokio::task::JoinHandle<Result<(), tokio_postgres::Error>>,
);

async fn succeeds(command: &mut Command) -> String {
    let out = tokio::time::timeout(LIMIT, command.output())
        .await
        .unwrap()
        .unwrap();
    let stderr = String::from_utf8_lossy(&out.stderr);
    assert!(out.status.success(), "{command:?}: {stderr}");
    String::from_utf8(out.stdout).unwrap().trim().to_owned()
}

#[tokio::test]
async fn psql_and_pgbench_work_in_every_mode() {
    let Some(bin) = server_programs("psql_and_pgbench_work_in_every_mode") else {
        return;
    };
    let server = Server::start_with(&bin, "--auth=scram-sha-256").await;
    let running = Running::start(Branches::of(&[("main", &server)], Duration::ZERO));
    let host = "127.0.0.1";
    assert_eq!(
        succeeds(&mut server.psql(host, running.port, &["-c", "select 40 + 2"])).await,
        "42"
    );

    let mut wrong = server.psql(host, running.port, &["-c", "select 1"]);
    let out = wrong.env("PGPASSWORD", "wrong").output().await.unwrap();
    assert!(String::from_utf8_lossy(&out.stderr).contains("password authentication failed"));

    let pgbench = |arguments: &[&str]| {
        let mut command = server.client("pgbench", host, running.port);
        command.args(arguments);
        command
    };
    succeeds(&mut pgbench(&["-i", "-q", "-s", "1"])).await;
    let pipeline = server.path("pipeline.sql");
    std::fs::write(
        &pipeline,
        "\\startpipeline\nbegin;\nselect 1;\ninsert into pgbench_history values (1);\nend;\nselect 2;\n\\endpipeline\n",
    )
    .unwrap();
    for mode in ["simple", "extended", "prepared"] {
        succeeds(&mut pgbench(&[
            "-M", mode, "-c", "4", "-j", "2", "-t", "50",
        ]))
        .await;
        succeeds(&mut pgbench(&[
            "-M", mode, "-S", "-n", "-c", "8", "-t", "100",
        ]))
        .await;
    }
    succeeds(&mut pgbench(&[
        "-M", "extended", "-n", "-c", "4", "-t", "50", "-f", &pipeline,
    ]))
    .await;
    succeeds(&mut pgbench(&["-C", "-S", "-n", "-c", "2", "-t", "20"])).await;
    assert_eq!(
        server.ask("select count(*) from pgbench_history").await,
        "400"
    );
    running.wait_for_sessions(0).await;
    server
        .wait_until(
            "select count(*) from pg_stat_activity where backend_type = 'client backend'",
            "1",
        )
        .await;
}

#[tokio::test]
async fn a_hundred_megabytes_pass_by_copy_in_both_directions() {
    let Some(bin) = server_programs("a_hundred_megabytes_pass_by_copy_in_both_directions") else {
        return;
    };
    let server = Server::start(&bin).await;
    let running = Running::start(Branches::of(&[("main", &server)], Duration::ZERO));
    server
        .ask("create table t(v text); create table u(v text)")
        .await;
    server
        .ask("insert into t select repeat(md5(i::text), 1 + i % 60) from generate_series(1, 105000) i")
        .await;
    let file = server.path("copy");
    let out = format!("\\copy t to '{file}'");
    let back = format!("\\copy u from '{file}'");
    for command in [&out, &back] {
        succeeds(&mut server.psql("127.0.0.1", running.port, &["-c", command])).await;
    }
    assert!(std::fs::metadata(&file).unwrap().len() > 100_000_000);
    let sum = |table| format!("select count(*), sum(hashtext(v)::bigint) from {table}");
    assert_eq!(server.ask(&sum("t")).await, server.ask(&sum("u")).await);
}

#[tokio::test]
async fn control_c_in_psql_cancels_its_query() {
    let Some(bin) = server_programs("control_c_in_psql_cancels_its_query") else {
        return;
    };
    let server = Server::start(&bin).await;
    let running = Running::start(Branches::of(&[("main", &server)], Duration::ZERO));
    let mut psql = server.psql("127.0.0.1", running.port, &["-c", "select pg_sleep(600)"]);
    let psql = psql.stderr(Stdio::piped()).spawn().unwrap();
    let sleeping = "select count(*) from pg_stat_activity where query = 'select pg_sleep(600)' and state = 'active'";
    server.wait_until(sleeping, "1").await;
    let pid = nix::unistd::Pid::from_raw(psql.id().unwrap().try_into().unwrap());
    nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGINT).unwrap();
    let out = tokio::time::timeout(LIMIT, psql.wait_with_output())
        .await
        .unwrap()
        .unwrap();
    let stderr = String::from_utf8_lossy(&out.stderr);
    assert!(
        stderr.contains("canceling statement due to user request"),
        "{stderr}"
    );
}

#[tokio::test]
async fn a_client_that_vanishes_leaves_no_backend_session() {
    let Some(bin) = server_programs("a_client_that_vanishes_leaves_no_backend_session") else {
        return;
    };
    let server = Server::start(&bin).await;
    let running = Running::start(Branches::of(&[("main", &server)], Duration::ZERO));
    let (client, connection) = running.connect().await.unwrap();
    client
        .batch_execute("begin; create table gone()")
        .await
        .unwrap();
    // Without Terminate, as when a process is killed.
    connection.abort();
    running.wait_for_sessions(0).await;
    server
        .wait_until(
            "select count(*) from pg_stat_activity where backend_type = 'client backend'",
            "1",
        )
        .await;
    assert_eq!(server.ask("select to_regclass('gone') is null").await, "t");
}

async fn ended_with(
    connection: tokio::task::JoinHandle<Result<(), tokio_postgres::Error>>,
) -> (String, String) {
    let end = tokio::time::timeout(LIMIT, connection)
        .await
        .unwrap()
        .unwrap();
    let error = end.expect_err("the session was ended");
    let error = error
        .as_db_error()
        .unwrap_or_else(|| panic!("{error:?}"))
        .clone();
    (error.code().code().to_owned(), error.message().to_owned())
}

#[tokio::test]
async fn a_switch_ends_idle_sessions_at_once_and_others_after_their_transaction() {
    let Some(bin) =
        server_programs("a_switch_ends_idle_sessions_at_once_and_others_after_their_transaction")
    else {
        return;
    };
    let (main, feature) = tokio::join!(Server::start(&bin), Server::start(&bin));
    let branches = Branches::of(&[("main", &main), ("feature", &feature)], LIMIT);
    let running = Running::start(branches.clone());
    let expected = (
        "57P01".to_owned(),
        "terminating connection: this endpoint now shows branch `feature`".to_owned(),
    );

    let (idle, idle_end) = running.connect().await.unwrap();
    let (busy, busy_end) = running.connect().await.unwrap();
    main.ask("create table t(v int)").await;
    busy.batch_execute("begin; insert into t values (1)")
        .await
        .unwrap();
    branches.show("feature");
    assert_eq!(ended_with(idle_end).await, expected);
    assert!(idle.is_closed());

    // The one inside its transaction goes on where it began.
    for v in 2..5 {
        busy.execute("insert into t values ($1)", &[&v])
            .await
            .unwrap();
    }
    // A new session is already there.
    let (new, _connection) = running.connect().await.unwrap();
    assert!(new.batch_execute("select * from t").await.is_err());
    busy.batch_execute("commit").await.unwrap();
    assert_eq!(ended_with(busy_end).await, expected);
    assert_eq!(main.ask("select count(*) from t").await, "4");
    main.wait_until(
        "select count(*) from pg_stat_activity where backend_type = 'client backend'",
        "1",
    )
    .await;
}

#[tokio::test]
async fn a_transaction_that_outlives_its_grace_is_rolled_back() {
    let Some(bin) = server_programs("a_transaction_that_outlives_its_grace_is_rolled_back") else {
        return;
    };
    let (main, feature) = tokio::join!(Server::start(&bin), Server::start(&bin));
    let branches = Branches::of(
        &[("main", &main), ("feature", &feature)],
        Duration::from_millis(200),
    );
    let running = Running::start(branches.clone());
    main.ask("create table t(v int)").await;

    let (waiting, waiting_end) = running.connect().await.unwrap();
    waiting
        .batch_execute("begin; insert into t values (1)")
        .await
        .unwrap();
    let (computing, computing_end) = running.connect().await.unwrap();
    computing
        .batch_execute("begin; insert into t values (2)")
        .await
        .unwrap();
    let query = tokio::spawn(async move { computing.batch_execute("select pg_sleep(600)").await });
    let sleeping = "select count(*) from pg_stat_activity where query = 'select pg_sleep(600)' and state = 'active'";
    main.wait_until(sleeping, "1").await;

    branches.show("feature");
    assert_eq!(ended_with(waiting_end).await.0, "57P01");
    let error = query.await.unwrap().unwrap_err();
    assert_eq!(
        error.code().map(|c| c.code().to_owned()).as_deref(),
        Some("57P01"),
        "{error:?}"
    );
    drop(computing_end);
    main.wait_until(
        "select count(*) from pg_stat_activity where backend_type = 'client backend'",
        "1",
    )
    .await;
    assert_eq!(main.ask("select count(*) from t").await, "0");
}

#[tokio::test]
async fn a_stop_ends_idle_sessions_and_waits_for_transactions() {
    let Some(bin) = server_programs("a_stop_ends_idle_sessions_and_waits_for_transactions") else {
        return;
    };
    let server = Server::start(&bin).await;
    let running = Running::start(Branches::of(&[("main", &server)], LIMIT));
    let (_idle, idle_end) = running.connect().await.unwrap();
    let (busy, busy_end) = running.connect().await.unwrap();
    busy.batch_execute("begin").await.unwrap();
    running.stop.cancel();
    running.tracker.close();
    assert_eq!(ended_with(idle_end).await.0, "57P01");
    assert_eq!(
        busy.query_one("select 1", &[])
            .await
            .unwrap()
            .get::<_, i32>(0),
        1
    );
    assert!(running.connect().await.is_err());
    busy.batch_execute("commit").await.unwrap();
    assert_eq!(ended_with(busy_end).await.0, "57P01");
    drop(busy);
    tokio::time::timeout(LIMIT, running.tracker.wait())
        .await
        .unwrap();
}

/// One transaction of the switching test: notes where it began, twice.
async fn transaction(
    client: &mut tokio_postgres::Client,
    id: i64,
) -> Result<(), (bool, tokio_postgres::Error)> {
    let begun = client.transaction().await.map_err(|e| (false, e))?;
    let inside = |e| (true, e);
    // The row goes before the commit: its statement's Close would else be what the error answers.
    let name: String = begun
        .query_one("select name from branch", &[])
        .await
        .map_err(inside)?
        .get(0);
    for part in 1..3 {
        begun
            .execute("insert into done values ($1, $2, $3)", &[&id, &part, &name])
            .await
            .map_err(inside)?;
    }
    begun.commit().await.map_err(inside)
}

#[tokio::test]
async fn no_transaction_is_torn_by_switches_under_load() {
    const CLIENTS: i64 = 8;
    const SWITCHES: usize = 60;
    let Some(bin) = server_programs("no_transaction_is_torn_by_switches_under_load") else {
        return;
    };
    let (main, feature) = tokio::join!(Server::start(&bin), Server::start(&bin));
    for (name, server) in [("main", &main), ("feature", &feature)] {
        server
            .ask(&format!("create table branch as select '{name}' as name"))
            .await;
        server
            .ask("create table done(id bigint, part int, name text)")
            .await;
    }
    let branches = Branches::of(&[("main", &main), ("feature", &feature)], LIMIT);
    let running = Arc::new(Running::start(branches.clone()));
    let stop = CancellationToken::new();
    let clients: Vec<_> = (0..CLIENTS)
        .map(|number| {
            let (running, stop) = (running.clone(), stop.clone());
            tokio::spawn(async move {
                let (mut done, mut ended) = (0_i64, 0_u32);
                'sessions: while !stop.is_cancelled() {
                    let Ok((mut client, connection)) = running.connect().await else {
                        // Ended before its first ReadyForQuery reached the client.
                        ended += 1;
                        continue;
                    };
                    while !stop.is_cancelled() {
                        match transaction(&mut client, number * 1_000_000 + done).await {
                            Ok(()) => done += 1,
                            Err((inside, error)) => {
                                assert!(!inside, "a transaction was torn: {error:?}");
                                // Told to the request that met it, or else to the connection.
                                match error.code() {
                                    Some(code) => assert_eq!(code.code(), "57P01"),
                                    None => assert_eq!(ended_with(connection).await.0, "57P01"),
                                }
                                ended += 1;
                                continue 'sessions;
                            }
                        }
                    }
                }
                (done, ended)
            })
        })
        .collect();
    let count = "select count(*) > (select coalesce(max(id), 0) from seen) from done";
    for server in [&main, &feature] {
        server.ask("create table seen(id bigint)").await;
    }
    for switch in 0..SWITCHES {
        let (name, server) = [("feature", &feature), ("main", &main)][switch % 2];
        branches.show(name);
        // Until something new was done there.
        server.wait_until(count, "t").await;
        server
            .ask("insert into seen select count(*) from done")
            .await;
    }
    stop.cancel();
    let (mut done, mut ended) = (0, 0);
    for client in clients {
        let (d, e) = client.await.unwrap();
        done += d;
        ended += e;
    }
    assert!(ended > 0, "no switch met a session");
    let whole = "select count(*) from (select id from done group by id having count(*) = 2 and count(distinct name) = 1) x";
    let mut found = 0;
    for (name, server) in [("main", &main), ("feature", &feature)] {
        assert_eq!(
            server
                .ask(&format!("select count(*) from done where name <> '{name}'"))
                .await,
            "0"
        );
        let ids = server.ask("select count(distinct id) from done").await;
        assert_eq!(server.ask(whole).await, ids);
        found += ids.parse::<i64>().unwrap();
    }
    assert_eq!(found, done, "what clients were told and what is there");
}
