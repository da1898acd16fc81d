//! A throw-away repository, driven by the real git program and nothing of the
//! environment around the test.

use std::path::{Path, PathBuf};
use std::process::Command;

use super::Location;
use crate::types::BranchName;

pub(super) fn name(text: &str) -> BranchName {
    BranchName::new(text).unwrap()
}

/// The git program under test: `DBRANCH_TEST_GIT`, else the one on PATH.
fn git_program() -> String {
    std::env::var("DBRANCH_TEST_GIT").unwrap_or_else(|_| "git".to_owned())
}

/// Whether the git program can do something that came later than others, told by
/// whether a command succeeds. Says so on stderr where it can't.
pub(super) fn git_can(test: &str, what: &str, arguments: &[&str]) -> bool {
    let dir = tempfile::tempdir().unwrap();
    let output = hermetic(dir.path(), dir.path(), arguments).output();
    let can = output.is_ok_and(|o| o.status.success());
    if !can {
        #[expect(clippy::print_stderr, reason = "how a test says that it was skipped")]
        {
            eprintln!("skipped: {test}: this git has no {what}");
        }
    }
    can
}

fn hermetic(home: &Path, dir: &Path, arguments: &[&str]) -> Command {
    let mut command = Command::new(git_program());
    command
        .args(arguments)
        .current_dir(dir)
        .env_clear()
        .env("PATH", std::env::var_os("PATH").unwrap_or_default())
        .env("HOME", home)
        .env("LC_ALL", "C")
        .env("GIT_CONFIG_NOSYSTEM", "1")
        .env("GIT_CONFIG_GLOBAL", "/dev/null")
        .env("GIT_EDITOR", "true")
        .env("GIT_AUTHOR_NAME", "A")
        .env("GIT_AUTHOR_EMAIL", "a@example.org")
        .env("GIT_COMMITTER_NAME", "C")
        .env("GIT_COMMITTER_EMAIL", "c@example.org");
    command
}

/// Gives a program that this process wrote to another file of the same name and bytes. A child
/// that a test beside this one has just forked may hold the written one open for
/// writing, and nobody could run it (`ETXTBSY`, execve(2)).
pub(super) fn settle(program: &Path) {
    let is_file = program
        .symlink_metadata()
        .is_ok_and(|metadata| metadata.is_file());
    if is_file {
        let copied = Command::new("sh")
            .args(["-c", "cp -p \"$0\" \"$0.new\" && mv \"$0.new\" \"$0\""])
            .arg(program)
            .status();
        assert!(copied.is_ok_and(|status| status.success()));
    }
}

pub(super) struct TestRepo {
    /// The folder around everything, canonical; the repository is `repo` in it.
    pub(super) dir: PathBuf,
    _guard: tempfile::TempDir,
}

impl TestRepo {
    /// A repository whose branch is `main`, without a commit.
    pub(super) fn empty() -> Self {
        Self::init(&[])
    }

    /// A repository with three commits on `main`.
    pub(super) fn new() -> Self {
        let repo = Self::empty();
        for text in ["one", "two", "three"] {
            repo.commit(text);
        }
        repo
    }

    pub(super) fn init(options: &[&str]) -> Self {
        let guard = tempfile::tempdir().unwrap();
        let dir = guard.path().canonicalize().unwrap();
        let repo = Self { dir, _guard: guard };
        let mut arguments = vec!["init", "-q", "-b", "main"];
        arguments.extend(options);
        arguments.push("repo");
        repo.git_in("", &arguments);
        // So that a developer's own setting does not get in.
        repo.git(&["config", "init.defaultBranch", "main"]);
        repo
    }

    pub(super) fn top(&self) -> PathBuf {
        self.dir.join("repo")
    }

    pub(super) fn git_dir(&self) -> PathBuf {
        self.dir.join("repo/.git")
    }

    pub(super) fn location(&self) -> Location {
        self.location_in("repo")
    }

    pub(super) fn location_in(&self, folder: &str) -> Location {
        Location::discover(&self.dir.join(folder)).unwrap()
    }

    /// Runs git in the main worktree; it must succeed. Returns what it printed.
    pub(super) fn git(&self, arguments: &[&str]) -> String {
        self.git_in("repo", arguments)
    }

    pub(super) fn git_in(&self, folder: &str, arguments: &[&str]) -> String {
        let output = self.try_git_in(folder, arguments);
        assert!(output.status.success(), "git {arguments:?}: {output:?}");
        String::from_utf8(output.stdout).unwrap().trim().to_owned()
    }

    pub(super) fn try_git_in(&self, folder: &str, arguments: &[&str]) -> std::process::Output {
        self.command(folder, arguments).output().unwrap()
    }

    pub(super) fn command(&self, folder: &str, arguments: &[&str]) -> Command {
        settle(&self.git_dir().join("hooks/post-checkout"));
        hermetic(&self.dir, &self.dir.join(folder), arguments)
    }

    /// Commits a file of its own on the current branch. Returns the commit's id.
    pub(super) fn commit(&self, text: &str) -> String {
        self.commit_in("repo", text)
    }

    pub(super) fn commit_in(&self, folder: &str, text: &str) -> String {
        std::fs::write(self.dir.join(folder).join(text), text).unwrap();
        self.git_in(folder, &["add", text]);
        self.git_in(folder, &["commit", "-q", "-m", text]);
        self.git_in(folder, &["rev-parse", "HEAD"])
    }
}
