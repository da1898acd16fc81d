use std::collections::BTreeMap;
use std::os::unix::fs::{PermissionsExt, symlink};

use super::*;
use crate::git::testing::{TestRepo, settle};

/// Every path below a folder, with what it is: mode and bytes, or link target.
fn snapshot(folder: &Path) -> BTreeMap<PathBuf, (u32, Vec<u8>)> {
    let mut all = BTreeMap::new();
    let Ok(entries) = fs::read_dir(folder) else {
        return all;
    };
    for entry in entries {
        let path = entry.unwrap().path();
        let metadata = fs::symlink_metadata(&path).unwrap();
        let bytes = if metadata.is_symlink() {
            fs::read_link(&path)
                .unwrap()
                .into_os_string()
                .into_encoded_bytes()
        } else if metadata.is_dir() {
            all.extend(snapshot(&path));
            Vec::new()
        } else {
            fs::read(&path).unwrap()
        };
        all.insert(path, (metadata.permissions().mode(), bytes));
    }
    all
}

fn put(path: &Path, text: &str, mode: u32) {
    fs::create_dir_all(path.parent().unwrap()).unwrap();
    fs::write(path, text).unwrap();
    fs::set_permissions(path, Permissions::from_mode(mode)).unwrap();
    settle(path);
}

/// A program in the place of dbranch that notes how it was called, what it can
/// read, and fails.
fn fake_dbranch(repo: &TestRepo) -> PathBuf {
    let path = repo.dir.join("bin dir/it's/dbranch");
    let log = repo.dir.join("called");
    let text = format!(
        "#!/bin/sh\necho \"dbranch $* in=$(cat)\" >>'{}'\nexit 7\n",
        log.display()
    );
    put(&path, &text, 0o755);
    path
}

/// What was called since the last time, with the commits' ids left out.
fn calls(repo: &TestRepo) -> Vec<String> {
    let log = repo.dir.join("called");
    let text = fs::read_to_string(&log).unwrap_or_default();
    let _ = fs::remove_file(log);
    let hide = |word: &str| {
        let is_id = word.len() == 40 && word.bytes().all(|b| b.is_ascii_hexdigit());
        if is_id { "#" } else { word }.to_owned()
    };
    text.lines()
        .map(|line| line.split(' ').map(hide).collect::<Vec<_>>().join(" "))
        .collect()
}

const CALL: &str = "dbranch hook post-checkout # # 1 in=";

/// Installs, checks that git runs dbranch and then the old hook (if it has one that
/// runs), that a second run changes nothing, and that uninstalling restores all.
fn round_trip(repo: &TestRepo, expected: Installation, old_hook_runs: bool) {
    let location = repo.location();
    let before = snapshot(&repo.dir);
    let program = fake_dbranch(repo);
    let installed = install(&location, Some(&program)).unwrap();
    assert_eq!(installed.installation, expected);
    assert!(installed.is_active);
    assert_eq!(status(&location).unwrap().state, HookState::Active);

    let with = snapshot(&repo.dir);
    let again = install(&location, Some(&program)).unwrap();
    assert_eq!(again.installation, Installation::Unchanged);
    assert_eq!(snapshot(&repo.dir), with);

    let mut switch = repo.command("repo", &["switch", "-q", "-c", "f"]);
    let output = switch.output().unwrap();
    let mut expected_calls = vec![CALL.to_owned()];
    if old_hook_runs {
        expected_calls.push("old post-checkout # # 1".to_owned());
        // Its exit status is git's, as it was without us.
        assert_eq!(output.status.code(), Some(1));
    } else {
        assert_eq!(output.status.code(), Some(0));
    }
    assert_eq!(calls(repo), expected_calls);
    repo.try_git_in("repo", &["switch", "-q", "main"]);
    repo.git(&["branch", "-q", "-D", "f"]);
    calls(repo);

    let removed = uninstall(&location).unwrap();
    assert_eq!(removed.paths, [installed.path]);
    fs::remove_dir_all(repo.dir.join("bin dir")).unwrap();
    let mut after = snapshot(&repo.dir);
    let mut before = before;
    for all in [&mut before, &mut after] {
        all.retain(|path, _| {
            let changes_by_git = ["logs", "index", "HEAD", "refs", "packed-refs", "objects"];
            !path
                .iter()
                .any(|part| changes_by_git.iter().any(|c| part == *c))
        });
    }
    let changed: Vec<_> = (before.keys().chain(after.keys()))
        .filter(|path| before.get(*path) != after.get(*path))
        .collect();
    assert_eq!(changed, [] as [&PathBuf; 0]);
    assert_eq!(uninstall(&location).unwrap().paths, [] as [&Path; 0]);
}

fn old_hook(repo: &TestRepo, shebang: &str) -> String {
    format!(
        "{shebang}echo \"old ${{0##*/}} $*\" >>'{}'\nexit 3\n",
        repo.dir.join("called").display()
    )
}

#[test]
fn without_a_hooks_folder_both_are_made_and_removed() {
    let repo = TestRepo::new();
    fs::remove_dir_all(repo.git_dir().join("hooks")).unwrap();
    round_trip(&repo, Installation::Created, false);
}

#[test]
fn an_empty_hooks_folder_stays_when_the_hook_goes() {
    let repo = TestRepo::new();
    fs::remove_dir_all(repo.git_dir().join("hooks")).unwrap();
    fs::create_dir(repo.git_dir().join("hooks")).unwrap();
    round_trip(&repo, Installation::Created, false);
}

#[test]
fn a_shell_hook_that_exits_still_runs_after_our_lines() {
    for (shebang, mode) in [
        ("#!/bin/sh\n", 0o755),
        ("#!/bin/sh -eu\n", 0o744),
        ("#!/usr/bin/env bash\nset -euo pipefail\n", 0o775),
        ("", 0o700),
    ] {
        let repo = TestRepo::new();
        let path = repo.git_dir().join("hooks/post-checkout");
        put(&path, &old_hook(&repo, shebang), mode);
        round_trip(&repo, Installation::Added, true);
    }
}

#[test]
fn a_hook_in_another_language_is_chained_under_its_own_name() {
    let repo = TestRepo::new();
    let path = repo.git_dir().join("hooks/post-checkout");
    let log = repo.dir.join("called");
    let text = format!(
        "#!/usr/bin/env perl\nuse File::Basename;\nopen my $f, '>>', '{}';\nprint $f 'old ', basename($0), \" @ARGV\\n\";\nexit 3;\n",
        log.display()
    );
    put(&path, &text, 0o755);
    round_trip(&repo, Installation::Chained, true);
}

#[test]
fn a_linked_hook_is_chained_and_comes_back_as_the_same_link() {
    let repo = TestRepo::new();
    let script = repo.top().join("scripts/post-checkout");
    put(&script, &old_hook(&repo, "#!/bin/sh\n"), 0o755);
    let path = repo.git_dir().join("hooks/post-checkout");
    fs::create_dir_all(path.parent().unwrap()).unwrap();
    symlink("../../scripts/post-checkout", &path).unwrap();
    round_trip(&repo, Installation::Chained, true);

    fs::remove_file(&path).unwrap();
    symlink("nowhere", &path).unwrap();
    round_trip(&repo, Installation::Chained, false);
}

#[test]
fn a_hook_that_is_not_executable_is_not_brought_to_life() {
    let repo = TestRepo::new();
    let path = repo.git_dir().join("hooks/post-checkout");
    put(&path, &old_hook(&repo, "#!/bin/sh\n"), 0o644);
    round_trip(&repo, Installation::Chained, false);
}

#[test]
fn a_hooks_path_inside_the_worktree_is_honoured() {
    let repo = TestRepo::new();
    repo.git(&["config", "core.hooksPath", ".husky/_"]);
    let path = repo.top().join(".husky/_/post-checkout");
    put(&path, &old_hook(&repo, "#!/usr/bin/env sh\n"), 0o755);
    assert_eq!(status(&repo.location()).unwrap().manager, Some("husky"));
    round_trip(&repo, Installation::Added, true);
}

#[test]
fn a_hooks_path_that_other_repositories_share_is_refused() {
    let repo = TestRepo::new();
    let shared = repo.dir.join("shared");
    fs::create_dir(&shared).unwrap();
    symlink(&shared, repo.top().join("inside")).unwrap();
    for value in [
        shared.to_str().unwrap(),
        "../shared",
        "inside",
        "../absent/x",
    ] {
        repo.git(&["config", "core.hooksPath", value]);
        let refused = install(&repo.location(), None);
        assert!(
            matches!(refused, Err(GitError::SharedHooksPath { .. })),
            "{value}: {refused:?}"
        );
    }
    assert_eq!(fs::read_dir(&shared).unwrap().count(), 0);
    repo.git(&["config", "core.hooksPath", "/dev/null"]);
    let refused = install(&repo.location(), None);
    assert!(
        matches!(refused, Err(GitError::HooksSwitchedOff(_))),
        "{refused:?}"
    );
}

#[test]
fn what_was_installed_before_a_hooks_path_was_set_is_still_removed() {
    let repo = TestRepo::new();
    let installed = install(&repo.location(), None).unwrap();
    repo.git(&["config", "core.hooksPath", "/dev/null"]);
    assert_eq!(uninstall(&repo.location()).unwrap().paths, [installed.path]);
}

#[test]
fn linked_worktrees_share_one_installation() {
    let repo = TestRepo::new();
    repo.git(&["worktree", "add", "-q", "../linked"]);
    let program = fake_dbranch(&repo);
    install(&repo.location_in("linked"), Some(&program)).unwrap();
    let again = install(&repo.location(), Some(&program)).unwrap();
    assert_eq!(again.installation, Installation::Unchanged);
    repo.git_in("linked", &["switch", "-q", "-c", "f"]);
    assert_eq!(calls(&repo), [CALL]);
    repo.git(&["worktree", "add", "-q", "../third"]);
    assert_eq!(calls(&repo), [CALL]);
}

#[test]
fn dbranch_is_not_started_for_files_nor_when_it_is_switched_off() {
    let repo = TestRepo::new();
    install(&repo.location(), Some(&fake_dbranch(&repo))).unwrap();
    repo.git(&["checkout", "-q", "--", "one"]);
    assert_eq!(calls(&repo), [] as [&str; 0]);
    for (variable, value) in [("DBRANCH_SKIP", "1"), ("DBRANCH_HOOKS", "0")] {
        let mut switch = repo.command("repo", &["switch", "-q", "-c", variable]);
        assert!(switch.env(variable, value).status().unwrap().success());
        assert_eq!(calls(&repo), [] as [&str; 0]);
    }
}

#[test]
fn dbranch_on_path_goes_before_the_recorded_one_and_none_is_silence() {
    let repo = TestRepo::new();
    let fake = fake_dbranch(&repo);
    install(&repo.location(), Some(&repo.dir.join("gone/dbranch"))).unwrap();
    let silent = repo.try_git_in("repo", &["switch", "-q", "-c", "f"]);
    assert!(
        silent.status.success() && silent.stderr.is_empty(),
        "{silent:?}"
    );
    let path = format!(
        "{}:{}",
        fake.parent().unwrap().display(),
        std::env::var("PATH").unwrap()
    );
    let mut switch = repo.command("repo", &["switch", "-q", "-c", "g"]);
    assert!(switch.env("PATH", path).status().unwrap().success());
    assert_eq!(calls(&repo), [CALL]);
    let updated = install(&repo.location(), Some(&fake)).unwrap();
    assert_eq!(updated.installation, Installation::Updated);
    repo.git(&["switch", "-q", "main"]);
    assert_eq!(calls(&repo), [CALL]);
}

#[test]
fn the_rest_of_the_hook_keeps_its_standard_input() {
    let repo = TestRepo::new();
    let path = repo.git_dir().join("hooks/post-checkout");
    put(&path, "#!/bin/sh\ncat\n", 0o755);
    let fake = fake_dbranch(&repo);
    install(&repo.location(), Some(&fake)).unwrap();
    settle(&path);
    let mut hook = std::process::Command::new(&path)
        .args(["a", "b", "1"])
        .stdin(std::process::Stdio::piped())
        .stdout(std::process::Stdio::piped())
        .spawn()
        .unwrap();
    hook.stdin.take().unwrap().write_all(b"input").unwrap();
    assert_eq!(hook.wait_with_output().unwrap().stdout, b"input");
    assert_eq!(calls(&repo), ["dbranch hook post-checkout a b 1 in="]);
}

#[test]
fn a_hook_with_broken_markers_is_left_as_it_is() {
    let repo = TestRepo::new();
    let path = repo.git_dir().join("hooks/post-checkout");
    let text = "#!/bin/sh\n# >>> dbranch >>>\n";
    put(&path, text, 0o755);
    let location = repo.location();
    for failure in [install(&location, None).err(), uninstall(&location).err()] {
        assert!(
            matches!(failure, Some(GitError::DamagedHook { .. })),
            "{failure:?}"
        );
    }
    assert_eq!(fs::read_to_string(&path).unwrap(), text);
}

#[test]
fn a_hook_whose_executable_bit_was_taken_away_is_reported_inactive() {
    let repo = TestRepo::new();
    let path = repo.git_dir().join("hooks/post-checkout");
    put(&path, "#!/bin/sh\n:\n", 0o755);
    install(&repo.location(), None).unwrap();
    fs::set_permissions(&path, Permissions::from_mode(0o644)).unwrap();
    assert_eq!(status(&repo.location()).unwrap().state, HookState::Inactive);
    assert!(!install(&repo.location(), None).unwrap().is_active);
}

#[test]
fn a_hooks_folder_that_can_not_be_written_is_named() {
    let repo = TestRepo::new();
    let _ = fs::remove_dir_all(repo.git_dir().join("hooks"));
    fs::write(repo.git_dir().join("hooks"), "a file").unwrap();
    let failure = install(&repo.location(), None).unwrap_err();
    assert!(failure.to_string().contains("/hooks"), "{failure}");
}

#[test]
fn the_hooks_path_of_a_repository_of_another_user_is_found_by_root() {
    let repo = TestRepo::new();
    repo.git(&["config", "core.hooksPath", ".githooks"]);
    // Without effect but for root, and then as if the repository were someone's.
    let _ = std::os::unix::fs::chown(repo.top(), Some(65534), Some(65534));
    let _ = std::os::unix::fs::chown(repo.git_dir(), Some(65534), Some(65534));
    let path = status(&repo.location()).unwrap().path;
    assert_eq!(path, repo.top().join(".githooks/post-checkout"));
}
