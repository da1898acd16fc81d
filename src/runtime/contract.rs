//! The contract of [`Runtime`], put to every runtime and server that is here.

use std::fmt::Debug;
use std::fs;
use std::future::Future;
use std::io::Write as _;
use std::os::unix::fs::{PermissionsExt as _, chown};
use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::process::Command;
use std::time::Duration;

use tempfile::TempDir;

use super::{
    Connect, Docker, Exit, Handle, InitSpec, Instance, InstanceSpec, Limits, Native, Runtime,
    RuntimeError, Server, StopMode, discover, process,
};
use crate::types::{BackendAddress, BranchId, BranchName, Owner, ProjectId};

const PASSWORD: &str = "sesame";
const LIMIT: Duration = Duration::from_secs(60);

/// One runtime with one server.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Case {
    Native,
    Native18,
    Docker,
    Docker18,
}

/// What a case can't run without, and why it is not here.
fn skip(test: &str, capability: &str, reason: &str) {
    let required = std::env::var("DBRANCH_TEST_REQUIRE").unwrap_or_default();
    assert!(
        !required.split(',').any(|name| name.trim() == capability),
        "{test} needs {capability}: {reason}"
    );
    // Written past the capture of the test's output, so that it is always seen.
    let _ = writeln!(std::io::stderr(), "skipped: {test}: {reason}");
}

fn owner() -> Owner {
    let own = nix::unistd::geteuid();
    if !own.is_root() {
        return Owner {
            uid: own.as_raw(),
            gid: nix::unistd::getegid().as_raw(),
        };
    }
    ["postgres", "nobody"]
        .iter()
        .find_map(|name| nix::unistd::User::from_name(name).ok().flatten())
        .map_or(
            Owner {
                uid: 65534,
                gid: 65534,
            },
            |user| Owner {
                uid: user.uid.as_raw(),
                gid: user.gid.as_raw(),
            },
        )
}

fn variable(name: &str) -> Option<String> {
    std::env::var(name).ok().filter(|value| !value.is_empty())
}

async fn server_of(case: Case, test: &str) -> Option<(Runtime, Server)> {
    match case {
        Case::Native | Case::Native18 => {
            let bin_dir = if case == Case::Native {
                variable("DBRANCH_TEST_PG_BIN")
                    .map(PathBuf::from)
                    .or_else(|| {
                        let found = discover::installed();
                        found.first().map(|one| one.bin_dir.clone())
                    })
            } else {
                variable("DBRANCH_TEST_PG_BIN_18").map(PathBuf::from)
            };
            let Some(bin_dir) = bin_dir else {
                let (capability, reason) = if case == Case::Native {
                    ("postgres", "no PostgreSQL server programs")
                } else {
                    ("postgres-18", "DBRANCH_TEST_PG_BIN_18 is not set")
                };
                skip(test, capability, reason);
                return None;
            };
            Some((Runtime::Native(Native), Server::Native { bin_dir }))
        }
        Case::Docker | Case::Docker18 => {
            let docker = match Docker::connect().await {
                Ok(docker) => docker,
                Err(e) => {
                    skip(test, "docker", &e.to_string());
                    return None;
                }
            };
            let (name, default) = if case == Case::Docker {
                ("DBRANCH_TEST_IMAGE", "dbranch-test/postgres:15")
            } else {
                ("DBRANCH_TEST_IMAGE_18", "dbranch-test/postgres:18")
            };
            let image = variable(name).unwrap_or_else(|| default.into());
            if !docker.image_present(&image).await.unwrap() {
                skip(test, "docker", &format!("no image {image}"));
                return None;
            }
            Some((Runtime::Docker(docker), Server::Docker { image }))
        }
    }
}

/// A cluster of its own and a place for everything; stops what runs when dropped.
struct Stage {
    runtime: Runtime,
    spec: InstanceSpec,
    _dir: TempDir,
}

fn open_dir() -> TempDir {
    let dir = match std::env::var_os("DBRANCH_TEST_BTRFS") {
        Some(root) => TempDir::new_in(root).unwrap(),
        None => tempfile::tempdir().unwrap(),
    };
    // The server's user passes through.
    fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o755)).unwrap();
    dir
}

fn give(path: &Path) {
    if nix::unistd::geteuid().is_root() {
        chown(path, Some(owner().uid), Some(owner().gid)).unwrap();
    }
}

async fn init(runtime: &Runtime, server: &Server, data_dir: &Path) -> Result<(), RuntimeError> {
    fs::create_dir(data_dir).unwrap();
    give(data_dir);
    let password_file = data_dir.with_extension("pw");
    fs::write(&password_file, PASSWORD).unwrap();
    fs::set_permissions(&password_file, fs::Permissions::from_mode(0o600)).unwrap();
    give(&password_file);
    runtime
        .init_cluster(&InitSpec {
            server: server.clone(),
            data_dir: data_dir.into(),
            owner: owner(),
            superuser: "app".into(),
            password_file,
            locale: "C.UTF-8".into(),
        })
        .await
}

impl Stage {
    async fn new(case: Case, test: &str) -> Option<Self> {
        let (runtime, server) = server_of(case, test).await?;
        let dir = open_dir();
        init(&runtime, &server, &dir.path().join("data"))
            .await
            .unwrap();
        Some(Self {
            spec: spec(&server, dir.path()),
            runtime,
            _dir: dir,
        })
    }

    /// The same server with a copy of this cluster, as it is while nothing runs.
    fn copy(&self) -> Self {
        let dir = open_dir();
        let data_dir = dir.path().join("data");
        let copied = Command::new("cp")
            .arg("-a")
            .args([&self.spec.data_dir, &data_dir])
            .status();
        assert!(copied.unwrap().success());
        Self {
            spec: spec(&self.spec.server, dir.path()),
            runtime: self.runtime.clone(),
            _dir: dir,
        }
    }

    async fn start(&self) -> Instance {
        let instance = self.runtime.start(&self.spec).await.unwrap();
        self.ready(&instance).await;
        instance
    }

    async fn ready(&self, instance: &Instance) {
        let ready = async {
            loop {
                // Line 8 is the postmaster's state (PostgreSQL's pidfile.h).
                let text = fs::read_to_string(self.spec.data_dir.join("postmaster.pid"));
                if text.is_ok_and(|t| t.lines().nth(7).is_some_and(|s| s.trim() == "ready")) {
                    return;
                }
                if let Some(exit) = instance.exit.borrow().clone() {
                    panic!(
                        "{exit:?}\n{}",
                        super::prepare::tail(&self.spec.log_file, 20)
                    );
                }
                tokio::time::sleep(Duration::from_millis(2)).await;
            }
        };
        soon("the server is ready", ready).await;
    }

    async fn stop(&self, instance: &Instance) {
        self.runtime
            .stop(&self.spec, instance, StopMode::Fast)
            .await
            .unwrap();
    }

    /// Pid of the postmaster in this system's numbers, in a container too.
    async fn postmaster(&self, instance: &Instance) -> u32 {
        match &instance.handle {
            Handle::Process { pid } => *pid,
            Handle::Container { id } => {
                let Runtime::Docker(docker) = &self.runtime else {
                    panic!("a container without Docker");
                };
                docker.pid_of(id).await
            }
        }
    }
}

impl Drop for Stage {
    fn drop(&mut self) {
        // Only after a failed test is anything left.
        for pid in process::users_of(&self.spec.data_dir) {
            let _ = process::send(pid, nix::sys::signal::Signal::SIGKILL);
        }
    }
}

fn spec(server: &Server, dir: &Path) -> InstanceSpec {
    InstanceSpec {
        project: ProjectId::random(),
        project_name: "Contract, Test".into(),
        branch: BranchId::random(),
        branch_name: BranchName::new("feature/ünï").unwrap(),
        server: server.clone(),
        data_dir: dir.join("data"),
        socket_dir: dir.join("run, 1/s"),
        log_file: dir.join("log/server.log"),
        owner: owner(),
        limits: Limits::default(),
    }
}

async fn soon<T>(what: &str, condition: impl Future<Output = T>) -> T {
    let result = tokio::time::timeout(LIMIT, condition).await;
    result.unwrap_or_else(|_| panic!("not within {LIMIT:?}: {what}"))
}

async fn exit_of(instance: &Instance) -> Exit {
    let mut exit = instance.exit.clone();
    let exit = soon("the exit is reported", exit.wait_for(Option::is_some));
    exit.await.unwrap().clone().unwrap()
}

async fn query(
    address: &BackendAddress,
    password: &str,
    sql: &str,
) -> Result<String, tokio_postgres::Error> {
    let mut config = tokio_postgres::Config::new();
    config.user("app").dbname("postgres").password(password);
    match address {
        BackendAddress::Unix { dir, port } => config.host_path(dir).port(*port),
        BackendAddress::Tcp { host, port } => config.host(host).port(*port),
    };
    let (client, connection) = config.connect(tokio_postgres::NoTls).await?;
    let task = tokio::spawn(connection);
    let rows = client.simple_query(sql).await?;
    drop(client);
    task.await.unwrap()?;
    Ok(rows
        .iter()
        .find_map(|message| match message {
            tokio_postgres::SimpleQueryMessage::Row(row) => row.get(0).map(str::to_owned),
            _ => None,
        })
        .unwrap_or_default())
}

fn assert_says(error: &impl Debug, part: &str) {
    let text = format!("{error:?}");
    assert!(text.contains(part), "{text}");
}

async fn a_new_cluster_takes_its_password_only(stage: Stage) {
    let instance = stage.start().await;
    let address = &instance.address;
    let sql = "select current_setting('data_checksums') || current_setting('server_encoding')
               || current_setting('password_encryption') || current_setting('cluster_name')";
    let answer = query(address, PASSWORD, sql).await.unwrap();
    assert_eq!(answer, "onUTF8scram-sha-256feature/?n?");
    assert!(query(address, "guess", "select 1").await.is_err());
    let hba = fs::read_to_string(stage.spec.data_dir.join("pg_hba.conf")).unwrap();
    assert!(
        hba.lines()
            .all(|line| line.starts_with('#') || !line.contains("trust"))
    );
    assert!(
        stage
            .runtime
            .log_tail(&stage.spec, 50)
            .await
            .contains("ready to accept")
    );
    stage.stop(&instance).await;
}

async fn a_second_start_returns_the_running_instance(stage: Stage) {
    let first = stage.start().await;
    let second = stage.runtime.start(&stage.spec).await.unwrap();
    assert_eq!(first.handle, second.handle);
    assert_eq!(first.address, second.address);
    stage.stop(&second).await;
    assert!(exit_of(&first).await.clean);
}

async fn stop_ends_it_for_certain_and_may_be_repeated(stage: Stage) {
    let instance = stage.start().await;
    let pid = stage.postmaster(&instance).await;
    stage.stop(&instance).await;
    assert!(!process::exists(pid));
    assert!(process::users_of(&stage.spec.data_dir).is_empty());
    assert!(!stage.spec.data_dir.join("postmaster.pid").exists());
    let exit = exit_of(&instance).await;
    assert!(exit.clean, "{exit:?}");
    stage.stop(&instance).await;
    assert!(stage.runtime.find(&stage.spec).await.unwrap().is_none());
    assert!(
        stage
            .runtime
            .log_tail(&stage.spec, 50)
            .await
            .contains("shut down")
    );
}

async fn an_immediate_stop_is_recovered_from(stage: Stage) {
    let instance = stage.start().await;
    query(
        &instance.address,
        PASSWORD,
        "create table t as select 7 as v",
    )
    .await
    .unwrap();
    stage
        .runtime
        .stop(&stage.spec, &instance, StopMode::Immediate)
        .await
        .unwrap();
    let again = stage.start().await;
    let answer = query(&again.address, PASSWORD, "select v from t").await;
    assert_eq!(answer.unwrap(), "7");
    stage.stop(&again).await;
}

async fn a_killed_server_is_reported_and_starts_again(stage: Stage) {
    let instance = stage.start().await;
    let found = stage.runtime.find(&stage.spec).await.unwrap().unwrap();
    let pid = stage.postmaster(&instance).await;
    process::send(pid, nix::sys::signal::Signal::SIGKILL).unwrap();
    let exit = exit_of(&instance).await;
    assert!(!exit.clean && exit.reason.contains("killed"), "{exit:?}");
    // Who only found it hears of it too.
    assert!(!exit_of(&found).await.clean);
    assert!(stage.runtime.find(&stage.spec).await.unwrap().is_none());
    let again = stage.start().await;
    stage.stop(&again).await;
    assert!(!process::exists(pid));
}

async fn a_stale_pid_file_does_not_stop_a_start(stage: Stage) {
    let instance = stage.start().await;
    let pid_file = stage.spec.data_dir.join("postmaster.pid");
    let text = fs::read_to_string(&pid_file).unwrap();
    stage.stop(&instance).await;
    // Its pid has become another process of the same user: a sleeping one.
    let mut sleeper = {
        use std::os::unix::process::CommandExt as _;
        let mut command = Command::new("sleep");
        command.arg("600");
        if nix::unistd::geteuid().is_root() {
            command.uid(owner().uid).gid(owner().gid);
        }
        command.spawn().unwrap()
    };
    let (_, rest) = text.split_once('\n').unwrap();
    fs::write(&pid_file, format!("{}\n{rest}", sleeper.id())).unwrap();
    give(&pid_file);
    assert!(stage.runtime.find(&stage.spec).await.unwrap().is_none());
    let again = stage.start().await;
    stage.stop(&again).await;
    assert!(
        sleeper.try_wait().unwrap().is_none(),
        "a stranger was killed"
    );
    sleeper.kill().unwrap();
    sleeper.wait().unwrap();
}

async fn a_server_that_fails_at_once_says_why(stage: Stage) {
    let conf = stage.spec.data_dir.join("postgresql.conf");
    fs::write(&conf, "no_such_setting = 1\n").unwrap();
    give(&conf);
    let instance = stage.runtime.start(&stage.spec).await.unwrap();
    let exit = exit_of(&instance).await;
    assert!(!exit.clean && exit.reason == "exit status 1", "{exit:?}");
    let log = stage.runtime.log_tail(&stage.spec, 10).await;
    assert!(log.contains("no_such_setting"), "{log}");
    stage.stop(&instance).await;
    assert!(stage.runtime.find(&stage.spec).await.unwrap().is_none());
}

async fn init_tells_why_it_failed(stage: Stage) {
    let data_dir = stage.spec.data_dir.with_file_name("second");
    fs::create_dir(&data_dir).unwrap();
    give(&data_dir);
    fs::write(data_dir.join("file"), "in the way").unwrap();
    let error = stage
        .runtime
        .init_cluster(&InitSpec {
            server: stage.spec.server.clone(),
            data_dir,
            owner: owner(),
            superuser: "app".into(),
            password_file: stage.spec.data_dir.join("PG_VERSION"),
            locale: "C.UTF-8".into(),
        })
        .await
        .unwrap_err();
    assert_says(&error, "exists but is not empty");
}

async fn nothing_runs_as_root(stage: Stage) {
    let spec = InstanceSpec {
        owner: Owner { uid: 0, gid: 0 },
        ..stage.spec.clone()
    };
    let error = stage.runtime.start(&spec).await.unwrap_err();
    assert_says(&error, "does not run as root");
}

/// A process that is killed, as by `kill -9`, when this goes.
struct Daemon(std::process::Child);

impl Drop for Daemon {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Starts an instance in a process of its own, kills that, and looks again.
async fn an_instance_survives_the_daemon_that_started_it(stage: Stage) {
    let mut daemon = Daemon(
        Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "runtime::contract::daemon", "--ignored"])
            .env("DBRANCH_TEST_DAEMON", stage.as_text())
            .stdout(std::process::Stdio::null())
            .stderr(std::process::Stdio::null())
            .spawn()
            .unwrap(),
    );
    soon("it is found", async {
        while stage.runtime.find(&stage.spec).await.unwrap().is_none() {
            assert!(daemon.0.try_wait().unwrap().is_none(), "the daemon failed");
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    })
    .await;
    drop(daemon);
    let found = stage.runtime.find(&stage.spec).await.unwrap().unwrap();
    stage.ready(&found).await;
    assert_eq!(
        query(&found.address, PASSWORD, "select 1").await.unwrap(),
        "1"
    );
    assert!(found.exit.borrow().is_none());
    stage.stop(&found).await;
    assert!(exit_of(&found).await.clean);
    assert!(process::users_of(&stage.spec.data_dir).is_empty());
}

impl Stage {
    fn as_text(&self) -> String {
        let server = match &self.spec.server {
            Server::Native { bin_dir } => bin_dir.display().to_string(),
            Server::Docker { image } => image.clone(),
        };
        let root = self.spec.data_dir.parent().unwrap().display();
        [
            self.runtime.kind().as_str(),
            &server,
            &root.to_string(),
            self.spec.project.as_str(),
            self.spec.branch.as_str(),
        ]
        .join("\n")
    }
}

/// Not a test: the process that [`an_instance_survives_the_daemon_that_started_it`] kills.
#[test]
#[ignore = "a part of another test"]
fn daemon() {
    let Some(text) = variable("DBRANCH_TEST_DAEMON") else {
        return;
    };
    let lines: Vec<&str> = text.lines().collect();
    let tokio = tokio::runtime::Runtime::new().unwrap();
    tokio.block_on(async {
        let (runtime, server) = match lines[0] {
            "native" => (
                Runtime::Native(Native),
                Server::Native {
                    bin_dir: lines[1].into(),
                },
            ),
            _ => (
                Runtime::Docker(Docker::connect().await.unwrap()),
                Server::Docker {
                    image: lines[1].into(),
                },
            ),
        };
        let spec = InstanceSpec {
            project: ProjectId::new(lines[3]).unwrap(),
            branch: BranchId::new(lines[4]).unwrap(),
            ..spec(&server, Path::new(lines[2]))
        };
        let _instance = runtime.start(&spec).await.unwrap();
        std::future::pending::<()>().await;
    });
}

fn run<F: Future<Output = ()>>(case: Case, test: &str, body: impl FnOnce(Stage) -> F) {
    let tokio = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .unwrap();
    tokio.block_on(async {
        if let Some(stage) = Stage::new(case, test).await {
            body(stage).await;
        }
    });
}

type Claim = fn(Stage) -> Pin<Box<dyn Future<Output = ()> + Send>>;

macro_rules! claims {
    ($($name:ident,)*) => {
        &[$((stringify!($name), |stage| Box::pin($name(stage)))),*]
    };
}

const CONTRACT: &[(&str, Claim)] = claims![
    a_new_cluster_takes_its_password_only,
    a_second_start_returns_the_running_instance,
    stop_ends_it_for_certain_and_may_be_repeated,
    an_immediate_stop_is_recovered_from,
    a_killed_server_is_reported_and_starts_again,
    a_stale_pid_file_does_not_stop_a_start,
    a_server_that_fails_at_once_says_why,
    init_tells_why_it_failed,
    nothing_runs_as_root,
    an_instance_survives_the_daemon_that_started_it,
];

/// Puts each claim to a copy of one new cluster, since initdb is slow.
fn contract(case: Case, test: &str) {
    run(case, test, |template| async move {
        let mut broken = Vec::new();
        for (name, claim) in CONTRACT {
            if tokio::spawn(claim(template.copy())).await.is_err() {
                broken.push(name);
            }
        }
        assert!(broken.is_empty(), "{case:?} breaks {broken:?}");
    });
}

#[test]
fn native_keeps_the_contract() {
    contract(Case::Native, "native_keeps_the_contract");
}

#[test]
fn native_keeps_the_contract_with_18() {
    contract(Case::Native18, "native_keeps_the_contract_with_18");
}

#[test]
fn docker_keeps_the_contract() {
    contract(Case::Docker, "docker_keeps_the_contract");
}

#[test]
fn docker_keeps_the_contract_with_18() {
    contract(Case::Docker18, "docker_keeps_the_contract_with_18");
}

#[test]
fn two_runtimes_never_serve_one_data_directory() {
    let test = "two_runtimes_never_serve_one_data_directory";
    run(Case::Docker, test, |in_docker| async move {
        let Some((native, server)) = server_of(Case::Native, test).await else {
            return;
        };
        let natively = InstanceSpec {
            server,
            ..in_docker.spec.clone()
        };
        let container = in_docker.start().await;
        assert!(native.find(&natively).await.unwrap().is_none());
        let error = native.start(&natively).await.unwrap_err();
        assert_says(&error, "is used by another server");
        in_docker.stop(&container).await;

        let process = native.start(&natively).await.unwrap();
        in_docker.ready(&process).await;
        assert!(
            in_docker
                .runtime
                .find(&in_docker.spec)
                .await
                .unwrap()
                .is_none()
        );
        let error = in_docker.runtime.start(&in_docker.spec).await.unwrap_err();
        assert_says(&error, "is used by another server");
        native
            .stop(&natively, &process, StopMode::Fast)
            .await
            .unwrap();
    });
}

#[test]
fn a_container_has_no_rights_no_network_and_no_volume_of_its_own() {
    for case in [Case::Docker, Case::Docker18] {
        run(case, "a_container_has_no_rights", |mut stage| async move {
            stage.spec.limits = Limits {
                memory_bytes: Some(256 << 20),
                cpus: Some(0.5),
            };
            let instance = stage.start().await;
            let Runtime::Docker(docker) = &stage.runtime else {
                panic!("not Docker");
            };
            let Handle::Container { id } = &instance.handle else {
                panic!("not a container");
            };
            docker.assert_confined(id, 256 << 20, 500_000_000).await;
            stage.stop(&instance).await;
        });
    }
}

#[test]
fn a_published_port_leads_to_the_server_where_sockets_cannot() {
    run(Case::Docker, "a_published_port", |mut stage| async move {
        if let Runtime::Docker(docker) = &stage.runtime {
            stage.runtime = Runtime::Docker(docker.clone().with_connect(Connect::Tcp));
        }
        let hba = stage.spec.data_dir.join("pg_hba.conf");
        fs::write(&hba, "host all all all scram-sha-256\n").unwrap();
        give(&hba);
        let instance = stage.start().await;
        let BackendAddress::Tcp { host, .. } = &instance.address else {
            panic!("{:?}", instance.address);
        };
        assert_eq!(host, "127.0.0.1");
        assert_eq!(
            query(&instance.address, PASSWORD, "select 1")
                .await
                .unwrap(),
            "1"
        );
        let found = stage.runtime.find(&stage.spec).await.unwrap().unwrap();
        assert_eq!(found.address, instance.address);
        stage.stop(&found).await;
    });
}

#[test]
fn an_image_that_cannot_be_had_is_no_server() {
    run(
        Case::Docker,
        "an_image_that_cannot_be_had",
        |stage| async move {
            let Runtime::Docker(docker) = &stage.runtime else {
                panic!("not Docker");
            };
            // A registry that nobody runs: the answer is the same without a network.
            let image = "127.0.0.1:1/nobody/postgres:15";
            assert!(!docker.image_present(image).await.unwrap());
            let error = docker.pull(image, &mut |_| {}).await.unwrap_err();
            assert!(matches!(error, RuntimeError::NoServer { .. }), "{error:?}");
            assert!(error.hint().unwrap().contains("docker pull"));
            let spec = InstanceSpec {
                server: Server::Docker {
                    image: image.into(),
                },
                ..stage.spec.clone()
            };
            let error = stage.runtime.start(&spec).await.unwrap_err();
            assert!(matches!(error, RuntimeError::NoServer { .. }), "{error:?}");
        },
    );
}
