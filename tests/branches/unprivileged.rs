//! A user without rights, as most are.

use std::path::Path;
use std::process::Command;

use crate::support::process::{Output, run};
use crate::support::{LIMIT, Server, Storage, TestEnv, need_root};

/// `nobody` and its group, on every Linux.
const NOBODY: &str = "65534";

/// An environment that belongs to an unprivileged user, with the program in it: where the
/// sources lie, that user may have no business.
fn env_of_nobody(storage: Storage) -> Option<TestEnv> {
    given_to_nobody(TestEnv::with(Server::Native, storage)?)
}

pub(crate) fn given_to_nobody(env: TestEnv) -> Option<TestEnv> {
    need_root()?;
    // Not by this process, which may be forking elsewhere: nobody can run what is open for writing.
    let copied = Command::new("cp")
        .arg(env!("CARGO_BIN_EXE_dbranch"))
        .arg(env.path("user/dbranch"))
        .status();
    assert!(copied.is_ok_and(|s| s.success()), "cp copies");
    env.write_config(&env.repo(), "shop", env.ports.first);
    for dir in [env.base(), env.pool().as_path()] {
        if dir.exists() {
            let owner = format!("{NOBODY}:{NOBODY}");
            let given = Command::new("chown").args(["-R", &owner]).arg(dir).status();
            assert!(given.is_ok_and(|s| s.success()), "root gives files away");
        }
    }
    Some(env)
}

#[track_caller]
pub(crate) fn as_nobody(env: &TestEnv, program: &Path, args: &[&str]) -> Output {
    let mut command = env.command("setpriv", &env.repo());
    command
        .args([&format!("--reuid={NOBODY}"), &format!("--regid={NOBODY}")])
        .args(["--clear-groups", "--no-new-privs", "--bounding-set=-all"])
        .arg(program)
        .args(args);
    run(command, LIMIT)
}

fn the_main_job_needs_no_rights(storage: Storage) {
    let Some(env) = env_of_nobody(storage) else {
        return;
    };
    let dbranch = env.path("user/dbranch");
    let _ = as_nobody(&env, &dbranch, &["init", "--yes"]).ok();
    let _ = as_nobody(&env, &dbranch, &["init-postgres"]).ok();
    let _ = as_nobody(&env, &dbranch, &["install-hooks"]).ok();
    let url = as_nobody(&env, &dbranch, &["url"]).text();
    let _ = env.psql(&url, "create table t as select 1 as v").ok();
    let git = Path::new("git");
    let checkout = as_nobody(&env, git, &["checkout", "-q", "-b", "feature"]).ok();
    let _ = checkout.says(&["feature <- main"]);
    let _ = env.psql(&url, "update t set v = 2").ok();
    let _ = as_nobody(&env, git, &["checkout", "-q", "main"]).ok();
    assert_eq!(env.psql(&url, "select v from t").text(), "1");
    let show = as_nobody(&env, &dbranch, &["show", "feature", "--json"]).json();
    assert_eq!(show["storage"], storage.name(), "{show}");
    let volume = std::path::PathBuf::from(show["volume"].as_str().expect("a path"));
    let _ = as_nobody(&env, &dbranch, &["delete", "feature", "--now", "--yes"]).ok();
    assert!(!volume.exists(), "a user may destroy what is the user's");
    let _ = as_nobody(&env, &dbranch, &["shutdown", "--stop-branches"]).ok();
}

#[test]
fn the_main_job_needs_no_rights_on_btrfs() {
    the_main_job_needs_no_rights(Storage::Btrfs);
}

#[test]
fn the_main_job_needs_no_rights_on_xfs() {
    the_main_job_needs_no_rights(Storage::Reflink);
}

#[test]
fn the_main_job_needs_no_rights_with_copies() {
    the_main_job_needs_no_rights(Storage::Copy);
}

#[test]
fn zfs_without_permission_is_said_with_what_to_allow() {
    let Some(mut env) = env_of_nobody(Storage::Zfs) else {
        return;
    };
    let dbranch = env.path("user/dbranch");
    let _ = as_nobody(&env, &dbranch, &["init", "--yes"]).ok();
    let allow = format!(
        "zfs allow nobody create,clone,destroy,mount,promote,snapshot,userprop {}",
        env.dataset().name()
    );
    let _ = as_nobody(&env, &dbranch, &["init-postgres"]).fails(1, &[&allow, "sudoers"]);
    assert_eq!(env.dataset().tree(), []);
    let _ = as_nobody(&env, &dbranch, &["shutdown"]).ok();
    // Where the choice is dbranch's own, it goes on with what works, and says why.
    env.set("DBRANCH_STORAGE", "auto");
    let made = as_nobody(&env, &dbranch, &["init-postgres"]).ok();
    let _ = made.says(&["full copy", &allow]);
    let _ = as_nobody(&env, &dbranch, &["shutdown", "--stop-branches"]).ok();
}

#[test]
fn a_docker_socket_without_permission_is_named_with_what_to_do() {
    let Some(mut env) = env_of_nobody(Storage::Copy) else {
        return;
    };
    let socket = env.path("elsewhere/docker.sock");
    let _listener = std::os::unix::net::UnixListener::bind(&socket).expect("ours");
    {
        use std::os::unix::fs::PermissionsExt;
        let private = std::fs::Permissions::from_mode(0o600);
        std::fs::set_permissions(&socket, private).expect("ours");
    }
    env.set("DOCKER_HOST", format!("unix://{}", socket.display()));
    env.set("DBRANCH_RUNTIME", "docker");
    let dbranch = env.path("user/dbranch");
    let _ = as_nobody(&env, &dbranch, &["init", "--yes"]).ok();
    let socket = socket.display().to_string();
    let _ = as_nobody(&env, &dbranch, &["init-postgres"]).fails(1, &["no permission", &socket]);
    let _ = as_nobody(&env, &dbranch, &["shutdown"]).ok();
    assert!(env.volumes().is_empty());
}
