//! Hooks beside what is there, and gone without a trace.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use crate::support::TestEnv;

/// Every file of a folder with its bytes and mode.
fn tree(dir: &Path) -> BTreeMap<PathBuf, (Vec<u8>, u32)> {
    let mut found = BTreeMap::new();
    for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
        let mode = entry.metadata().expect("there").permissions().mode();
        found.insert(
            entry.path(),
            (fs::read(entry.path()).unwrap_or_default(), mode),
        );
    }
    found
}

fn write_hook(env: &TestEnv, text: &str) -> PathBuf {
    let hook = env.repo().join(".git/hooks/post-checkout");
    fs::create_dir_all(hook.parent().expect("a folder")).expect("ours");
    fs::write(&hook, text).expect("ours");
    fs::set_permissions(&hook, fs::Permissions::from_mode(0o755)).expect("ours");
    // Another file of the same bytes: a child forked by a test beside this one may hold the written
    // one open, and git could not run it (`ETXTBSY`, execve(2)).
    let copy = hook.with_extension("new");
    let copied = std::process::Command::new("cp")
        .arg("-p")
        .args([&hook, &copy])
        .status();
    assert!(copied.is_ok_and(|status| status.success()), "cp copies");
    fs::rename(copy, &hook).expect("ours");
    hook
}

#[test]
fn install_twice_is_install_once_and_uninstall_restores() {
    let env = TestEnv::bare();
    env.write_config(&env.repo(), "shop", env.ports.first);
    let _ = env.dbranch(&["init", "--yes"]).ok();
    let hooks = env.repo().join(".git/hooks");
    let before = tree(&hooks);
    let _ = env.dbranch(&["install-hooks"]).ok();
    let installed = tree(&hooks);
    assert_ne!(before, installed);
    let _ = env.dbranch(&["install-hooks"]).ok();
    assert_eq!(tree(&hooks), installed);
    let _ = env.dbranch(&["uninstall-hooks"]).ok();
    assert_eq!(tree(&hooks), before);
    let _ = env.dbranch(&["uninstall-hooks"]).ok();
    assert_eq!(tree(&hooks), before);
}

#[test]
fn a_hook_that_is_there_runs_as_before() {
    let Some(env) = TestEnv::ready() else { return };
    let _ = env.dbranch(&["uninstall-hooks"]).ok();
    let mark = env.path("elsewhere/mark");
    let hook = write_hook(
        &env,
        &format!(
            "#!/bin/sh\necho \"$1 $2 $3\" > {}\nexit 0\n",
            mark.display()
        ),
    );
    let before = tree(hook.parent().expect("a folder"));
    let _ = env.dbranch(&["install-hooks"]).ok();
    let _ = env
        .git(&["checkout", "-q", "-b", "b"])
        .ok()
        .says(&["b <- main"]);
    let head = env.git(&["rev-parse", "HEAD"]).text();
    assert_eq!(
        fs::read_to_string(&mark).expect("it ran").trim(),
        format!("{head} {head} 1")
    );
    let _ = env.dbranch(&["uninstall-hooks"]).ok();
    assert_eq!(tree(hook.parent().expect("a folder")), before);
}

#[test]
fn a_hook_in_another_language_runs_as_before() {
    let Some(env) = TestEnv::ready() else { return };
    let _ = env.dbranch(&["uninstall-hooks"]).ok();
    let mark = env.path("elsewhere/mark");
    let python =
        format!("#!/usr/bin/env python3\nimport sys\nopen({mark:?}, 'w').write(sys.argv[3])\n");
    let hook = write_hook(&env, &python);
    let before = tree(hook.parent().expect("a folder"));
    let _ = env.dbranch(&["install-hooks"]).ok();
    let _ = env
        .git(&["checkout", "-q", "-b", "b"])
        .ok()
        .says(&["b <- main"]);
    assert_eq!(fs::read_to_string(&mark).expect("it ran"), "1");
    let _ = env.dbranch(&["uninstall-hooks"]).ok();
    assert_eq!(tree(hook.parent().expect("a folder")), before);
}

#[test]
fn a_hooks_folder_of_the_repositorys_own_is_honoured() {
    let Some(env) = TestEnv::ready() else { return };
    let _ = env.dbranch(&["uninstall-hooks"]).ok();
    let _ = env.git(&["config", "core.hooksPath", ".husky"]).ok();
    let _ = env.dbranch(&["install-hooks"]).ok();
    let _ = env
        .git(&["checkout", "-q", "-b", "b"])
        .ok()
        .says(&["b <- main"]);
    assert_eq!(env.git(&["config", "core.hooksPath"]).text(), ".husky");
    let _ = env.dbranch(&["uninstall-hooks"]).ok();
    assert!(!env.repo().join(".husky/post-checkout").exists());
}

#[test]
fn a_linked_worktree_shares_the_hooks_and_leaves_the_main_endpoint_alone() {
    let Some(env) = TestEnv::ready() else { return };
    env.sql("create table t as select 'main' as v");
    let linked = env.path("linked").display().to_string();
    let _ = env
        .git(&["worktree", "add", "-q", "-b", "side", &linked])
        .ok();
    assert_eq!(env.active(), "main");
    assert_eq!(env.sql("select v from t"), "main");
    let _ = env.git(&["checkout", "-q", "-b", "b"]).ok();
    assert_eq!(env.active(), "b");
}

#[test]
fn install_hooks_needs_no_daemon_and_no_config() {
    let env = TestEnv::bare();
    let _ = env.dbranch(&["install-hooks"]).ok();
    // In a repository that is no project the hook does nothing and says nothing.
    assert_eq!(env.git(&["checkout", "-q", "-b", "b"]).ok().stderr, "");
    let _ = env.dbranch(&["uninstall-hooks"]).ok();
}
