//! Users without root's rights: by sudo, by Docker, or by somebody else's hand.

use std::io::Write;
use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};

use super::{Pools, is_mounted, unmount};
use crate::support::process::{Output, run};
use crate::support::{LIMIT, Server, Storage, TestEnv, need_root, wait_until};

/// `nobody` and its group, on every Linux.
const NOBODY: &str = "65534";

/// An environment that belongs to a user without rights, and the mounts that user sees.
struct User {
    pools: Pools,
    /// Holds a mount namespace with files of its own for sudo: what is written there, and all that
    /// is mounted, is gone with the last process in it, however that ends.
    namespace: Option<Child>,
    /// A further group.
    group: Option<u32>,
}

impl User {
    fn new(server: Server) -> Option<Self> {
        need_root()?;
        let env = TestEnv::with(server, Storage::Copy)?;
        // Not by this process, which may be forking elsewhere: nobody can run what is open for writing.
        let copied = Command::new("cp")
            .arg(env!("CARGO_BIN_EXE_dbranch"))
            .arg(env.path("user/dbranch"))
            .status();
        assert!(copied.is_ok_and(|s| s.success()), "cp copies");
        env.write_config(&env.repo(), "shop", env.ports.first);
        let pools = Pools::on(env);
        let owner = format!("{NOBODY}:{NOBODY}");
        let base = pools.env.base();
        let given = Command::new("chown")
            .args(["-R", &owner])
            .arg(base)
            .status();
        assert!(given.is_ok_and(|s| s.success()), "root gives files away");
        Some(Self {
            pools,
            namespace: None,
            group: None,
        })
    }

    /// Lets the user run anything by sudo, in a namespace where only this test is.
    fn allow_sudo(&mut self) {
        let rule = "mount -t tmpfs -o mode=750 sudoers /etc/sudoers.d && \
            echo 'nobody ALL=(ALL) NOPASSWD: ALL' > /etc/sudoers.d/nobody && \
            chmod 440 /etc/sudoers.d/nobody && echo ready && exec cat";
        let mut child = Command::new("unshare")
            .args(["--mount", "--propagation", "private", "sh", "-c", rule])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("unshare runs");
        let mut ready = [0; 6];
        let stdout = child.stdout.as_mut().expect("piped");
        std::io::Read::read_exact(stdout, &mut ready).expect("the namespace is there");
        self.namespace = Some(child);
    }

    #[track_caller]
    fn run(&self, program: &str, args: &[&str]) -> Output {
        let env = &self.pools.env;
        let repo = env.repo();
        let mut command = env.command(
            if self.namespace.is_some() {
                "nsenter"
            } else {
                "env"
            },
            &repo,
        );
        if let Some(child) = &self.namespace {
            command.arg(format!("--mount=/proc/{}/ns/mnt", child.id()));
        } else {
            command.arg("--");
        }
        command.args(["setpriv", "--reuid", NOBODY, "--regid", NOBODY]);
        match self.group {
            Some(group) => command.args(["--groups", &group.to_string()]),
            None => command.arg("--clear-groups"),
        };
        command
            .args(["env", "-C"])
            .arg(&repo)
            .arg(program)
            .args(args);
        run(command, LIMIT * 2)
    }

    #[track_caller]
    fn dbranch(&self, args: &[&str]) -> Output {
        let program = self.pools.env.path("user/dbranch");
        self.run(program.to_str().expect("text"), args)
    }

    #[track_caller]
    fn storage(&self, args: &[&str]) -> Output {
        let fstab: PathBuf = self.pools.fstab();
        let fstab = fstab.to_str().expect("text");
        self.dbranch(&[&["storage"], args, &["--fstab", fstab]].concat())
    }

    /// The main job in the new pool, without any rights.
    fn branches_are_instant(&self) {
        let env = &self.pools.env;
        let _ = self.dbranch(&["init", "--yes"]).ok();
        let _ = self.dbranch(&["init-postgres"]).ok();
        let _ = self.dbranch(&["install-hooks"]).ok();
        let url = self.dbranch(&["url"]).text();
        let _ = env.psql(&url, "create table t as select 1 as v").ok();
        let checkout = self.run("git", &["checkout", "-q", "-b", "x"]).ok();
        let _ = checkout.says(&["btrfs snapshot"]);
        let _ = env.psql(&url, "update t set v = 2").ok();
        let _ = self.run("git", &["checkout", "-q", "main"]).ok();
        assert_eq!(env.psql(&url, "select v from t").text(), "1");
        let pools = self.storage(&["status", "--json"]).json();
        assert_eq!(pools[0]["branches"][0]["branches"], 2, "{pools}");
        let _ = self.dbranch(&["delete", "x", "--now", "--yes"]).ok();
        let _ = self.dbranch(&["delete-project", "--now", "--yes"]).ok();
        wait_until(LIMIT, "the pool is let go of", || {
            self.storage(&["remove", "--yes"]).code == Some(0)
        });
        self.pools.nothing_is_left();
        let _ = self.dbranch(&["shutdown", "--stop-branches"]).ok();
    }
}

impl Drop for User {
    fn drop(&mut self) {
        if let Some(mut child) = self.namespace.take() {
            // Its standard input ends, and so does it.
            drop(child.stdin.take());
            let _ = child.wait();
        }
    }
}

#[test]
fn a_user_with_sudo_gets_a_pool_and_needs_no_rights_in_it() {
    let Some(mut user) = User::new(Server::Native) else {
        return;
    };
    user.allow_sudo();
    let setup = user.storage(&["setup", "--size", "1G", "--yes"]).ok();
    let setup = setup.says(&["as you", "as root, by sudo"]);
    let (own, roots) = setup.stderr.split_once("by sudo").expect("just seen");
    assert!(
        own.contains("mkfs.btrfs") && !roots.contains("mkfs.btrfs"),
        "{setup}"
    );
    let image = std::fs::metadata(user.pools.image()).expect("made");
    assert_eq!(image.uid().to_string(), NOBODY);
    let _ = user
        .storage(&["setup", "--size", "1G", "--yes"])
        .ok()
        .says(&["nothing to do"]);
    let _ = user.storage(&["grow", "--size", "2G", "--yes"]).ok();
    user.branches_are_instant();
}

#[test]
fn a_user_with_docker_gets_a_pool_too() {
    let Some(mut user) = User::new(Server::Docker) else {
        return;
    };
    let host = std::env::var("DOCKER_HOST").unwrap_or("unix:///var/run/docker.sock".into());
    let socket = host.strip_prefix("unix://").expect("tests use a socket");
    user.group = Some(std::fs::metadata(socket).expect("an engine answers").gid());
    let _ = user.dbranch(&["init", "--yes"]).ok();
    let setup = user
        .storage(&["setup", "--size", "1G", "--yes", "--via", "docker"])
        .ok();
    let image = std::env::var("DBRANCH_TEST_IMAGE").expect("the environment has one");
    let _ = setup.says(&["as you", &format!("by a container of {image}")]);
    assert!(is_mounted(&user.pools.pool()), "on the machine itself");
    let _ = user.storage(&["grow", "--size", "2G", "--yes"]).ok();
    user.branches_are_instant();
}

#[test]
fn without_any_rights_the_script_is_left_to_root() {
    let Some(mut user) = User::new(Server::Native) else {
        return;
    };
    let nowhere = user.pools.env.path("elsewhere/none.sock");
    user.pools
        .env
        .set("DOCKER_HOST", format!("unix://{}", nowhere.display()));
    let setup = ["setup", "--size", "1G", "--yes"];
    let shown = user.storage(&setup).fails(1, &["takes root", "as root"]);
    let script = shown
        .stderr
        .split_once("which is left to you\n")
        .expect("shown")
        .1;
    let script = script.split_once("error:").expect("then the error").0;
    assert!(user.pools.image().exists(), "the user's part is done");

    let mut root = Command::new("sh")
        .stdin(Stdio::piped())
        .spawn()
        .expect("sh runs");
    let mut stdin = root.stdin.take().expect("piped");
    stdin.write_all(script.as_bytes()).expect("sh reads it");
    drop(stdin);
    assert!(root.wait().expect("ours").success());
    let _ = user.storage(&setup).ok().says(&["new projects use it"]);
    let _ = user.dbranch(&["shutdown"]).ok();
    unmount(&user.pools.pool());
}
