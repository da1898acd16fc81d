//! The main job, end to end, as a user does it.

use serde_json::{Value, json};

use crate::support::{LIMIT, Server, Storage, TestEnv, wait_until};

/// `git checkout -b` branches the database; the URL stays; what is done on one branch is
/// not seen on the other; all of it outlives the daemon, and a machine that restarts.
fn the_main_job_works(server: Server, storage: Storage) {
    let Some(env) = TestEnv::with(server, storage) else {
        return;
    };
    let port = env.ports.first.to_string();
    let init = ["init", "--yes", "--name", "myapp", "--proxy-port", &port];
    let _ = env.dbranch(&init).ok();
    env.adapt_config(&env.repo());
    let _ = env.dbranch(&["init-postgres"]).ok();
    let _ = env.dbranch(&["install-hooks"]).ok();
    let url = env.url();
    assert_eq!(url.lines().count(), 1, "{url}");
    assert!(
        url.starts_with("postgresql://") && url.contains(&format!(":{port}/")),
        "{url}"
    );
    assert_eq!(env.branches(), ["main"]);

    env.sql("create table t(v int); insert into t values (1)");
    let checkout = env.git(&["checkout", "-q", "-b", "feature/login"]).ok();
    says_how(&checkout.stderr, "feature/login <- main", storage);
    assert_eq!(env.url(), url, "the connection string stays");
    assert_eq!(
        env.sql("select v from t"),
        "1",
        "the branch has its parent's data"
    );
    env.sql("alter table t add w text; insert into t values (2)");

    let _ = env.git(&["checkout", "-q", "main"]).ok();
    assert_eq!(env.url(), url);
    assert_eq!(env.sql("select * from t"), "1", "main is as it was");
    env.sql("insert into t values (10)");

    // The second time it only switches, and a second branch is cut as the first was.
    let _ = env.git(&["checkout", "-q", "feature/login"]).ok();
    assert_eq!(env.sql("select count(*), count(w) from t"), "2|0");
    assert_eq!(env.branches(), ["feature/login", "main"]);
    let switch = env.git(&["switch", "-q", "-c", "from-feature"]).ok();
    says_how(&switch.stderr, "from-feature <- feature/login", storage);
    assert_eq!(env.sql("select count(*), count(w) from t"), "2|0");
    env.sql("drop table t");
    let _ = env.git(&["checkout", "-q", "main"]).ok();
    assert_eq!(env.sql("select sum(v) from t"), "11");

    is_recorded(&env, "feature/login", &json!("main"));
    is_recorded(&env, "main", &Value::Null);
    instances_outlive_the_daemon(&env);
    data_outlives_everything(&env);
}

fn says_how(stderr: &str, who: &str, storage: Storage) {
    let line = stderr
        .lines()
        .find(|l| l.contains(who))
        .unwrap_or_else(|| panic!("git says nothing of `{who}`: {stderr}"));
    assert_eq!(stderr.matches(who).count(), 1, "said once: {stderr}");
    assert!(line.contains(storage.method()), "{line}");
    let time = line.rsplit([',', '(']).next().unwrap_or_default();
    assert!(time.contains(" ms") || time.contains(" s)"), "{line}");
}

fn is_recorded(env: &TestEnv, branch: &str, parent: &Value) {
    let show = env.show(branch);
    assert_eq!(&show["parent"], parent, "{show}");
    assert_eq!(show["storage"], env.storage.name(), "{show}");
    assert_eq!(show["runtime"], env.server.runtime(), "{show}");
    let volume = show["volume"].as_str().expect("a path");
    assert!(
        std::path::Path::new(volume).starts_with(env.pool()),
        "{show}"
    );
    // The branch's own port shows it whatever is active.
    let url = show["url"].as_str().expect("a URL");
    assert!(url.contains(&format!(":{}/", show["port"])), "{show}");
    assert!(
        env.psql(url, "select count(*) from t")
            .text()
            .parse::<u32>()
            .is_ok()
    );
}

fn instances_outlive_the_daemon(env: &TestEnv) {
    let started = "select pg_postmaster_start_time()";
    let before = (
        env.sql_on("main", started),
        env.sql_on("feature/login", started),
    );
    env.kill_daemon();
    let after = (
        env.sql_on("main", started),
        env.sql_on("feature/login", started),
    );
    assert_eq!(before, after, "the next daemon finds the same instances");
    assert_eq!(env.active(), "main");
}

/// What a restart of the machine does: nothing runs, all is there.
fn data_outlives_everything(env: &TestEnv) {
    let url = env.url();
    let _ = env.dbranch(&["shutdown", "--stop-branches"]).ok();
    wait_until(LIMIT, "all instances are gone", || {
        env.servers() == 0 && env.containers().is_empty()
    });
    let _ = env.dbranch(&["start", "--detach"]).ok();
    assert_eq!(env.psql(&url, "select sum(v) from t").text(), "11");
    let _ = env.git(&["checkout", "-q", "feature/login"]).ok();
    assert_eq!(env.psql(&url, "select sum(v) from t").text(), "3");
}

/// One test for each server, on each storage driver.
macro_rules! the_main_job_works_on {
    ($($name:ident: $storage:ident),* $(,)?) => {$(
        mod $name {
            use super::*;

            #[test]
            fn the_main_job_works_natively() {
                the_main_job_works(Server::Native, Storage::$storage);
            }

            #[test]
            fn the_main_job_works_natively_with_18() {
                the_main_job_works(Server::Native18, Storage::$storage);
            }

            #[test]
            fn the_main_job_works_in_docker() {
                the_main_job_works(Server::Docker, Storage::$storage);
            }

            #[test]
            fn the_main_job_works_in_docker_with_18() {
                the_main_job_works(Server::Docker18, Storage::$storage);
            }
        }
    )*};
}

the_main_job_works_on! {
    btrfs: Btrfs,
    reflink: Reflink,
    copy: Copy,
}

/// On ZFS with one version of the server: zfs-fuse is slow, and the driver knows nothing of versions.
mod zfs {
    use super::*;

    #[test]
    fn the_main_job_works_natively() {
        the_main_job_works(Server::Native, Storage::Zfs);
    }

    #[test]
    fn the_main_job_works_in_docker() {
        the_main_job_works(Server::Docker, Storage::Zfs);
    }
}
