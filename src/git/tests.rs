//! What git does, by the real program, against what this room says of it.

use std::fs;

use super::testing::{TestRepo, git_can, name};
use super::*;

/// A row: what is done, in which folder it is asked, and what must be the answer.
struct Row {
    commands: &'static [&'static str],
    folder: &'static str,
    head: &'static str,
    /// The branch whose origin is asked for, and the origin.
    origin: (&'static str, &'static str),
    nearest: Option<&'static str>,
}

const fn row(
    commands: &'static [&'static str],
    head: &'static str,
    origin: (&'static str, &'static str),
    nearest: Option<&'static str>,
) -> Row {
    Row {
        commands,
        folder: "repo",
        head,
        origin,
        nearest,
    }
}

const fn in_worktree(mut row: Row) -> Row {
    row.folder = "linked";
    row
}

/// `main` has three commits, the tag `v1` is on its second, `dev` is one commit
/// further than `main`, the remote's `far` is on `main`'s first.
fn prepared() -> TestRepo {
    let repo = TestRepo::new();
    repo.git(&["tag", "v1", "HEAD~1"]);
    repo.git(&["update-ref", "refs/remotes/origin/far", "HEAD~2"]);
    repo.git(&["checkout", "-q", "-b", "dev"]);
    repo.commit("dev");
    repo.git(&["checkout", "-q", "main"]);
    repo
}

/// In `nearest`, the candidates are `main` and `dev`. Ids are written as `#`.
const ROWS: &[Row] = &[
    row(&[], "main", ("main", "-"), Some("dev")),
    row(&["checkout -b f"], "f", ("f", "main"), Some("main")),
    row(&["switch -c f"], "f", ("f", "main"), Some("main")),
    row(
        &["checkout dev", "switch -c f"],
        "f",
        ("f", "dev"),
        Some("dev"),
    ),
    row(&["checkout -B f"], "f", ("f", "main"), Some("main")),
    row(
        &["checkout -b f", "checkout -B f dev"],
        "f",
        ("f", "dev"),
        Some("dev"),
    ),
    row(
        &["checkout -b f", "checkout -B f"],
        "f",
        ("f", "main"),
        Some("main"),
    ),
    row(&["checkout -b f dev"], "f", ("f", "dev"), Some("dev")),
    row(&["checkout -b f heads/dev"], "f", ("f", "dev"), Some("dev")),
    row(
        &["checkout -b f refs/heads/dev"],
        "f",
        ("f", "dev"),
        Some("dev"),
    ),
    row(&["checkout -b f dev^0"], "f", ("f", "dev"), Some("dev")),
    row(
        &["checkout -b f HEAD~2"],
        "f",
        ("f", "HEAD~2"),
        Some("main"),
    ),
    row(&["checkout -b f dev~1"], "f", ("f", "dev~1"), Some("main")),
    row(&["checkout -b f v1"], "f", ("f", "v1"), Some("main")),
    row(
        &["checkout -b f --no-track origin/far"],
        "f",
        ("f", "origin/far"),
        Some("main"),
    ),
    row(
        &["checkout -b f dev", "checkout main", "checkout -b g -"],
        "g",
        ("g", "f"),
        Some("dev"),
    ),
    row(
        &["checkout dev", "checkout main", "branch f @{-1}"],
        "main",
        ("f", "dev"),
        Some("dev"),
    ),
    row(&["branch f"], "main", ("f", "main"), Some("main")),
    row(
        &["checkout dev", "branch f"],
        "dev",
        ("f", "dev"),
        Some("dev"),
    ),
    row(&["branch f @"], "main", ("f", "main"), Some("main")),
    row(
        &["branch f dev", "checkout f"],
        "f",
        ("f", "dev"),
        Some("dev"),
    ),
    row(
        &["checkout --detach dev", "checkout -b f"],
        "f",
        ("f", "#"),
        Some("dev"),
    ),
    row(&["checkout v1", "branch f"], "#", ("f", "#"), Some("main")),
    row(&["checkout v1"], "#", ("dev", "main"), Some("main")),
    row(&["checkout --orphan f"], "(f)", ("f", "-"), None),
    row(
        &["checkout --orphan f", "commit -m own"],
        "f",
        ("f", "-"),
        None,
    ),
    row(
        &["checkout -b f", "branch -m g"],
        "g",
        ("g", "main"),
        Some("main"),
    ),
    row(
        &["checkout -b f dev", "branch -m dev old"],
        "f",
        ("f", "old"),
        Some("main"),
    ),
    row(
        &["checkout dev", "checkout -b f", "branch -m dev old"],
        "f",
        ("f", "old"),
        Some("main"),
    ),
    row(
        &["checkout -b f dev", "branch -M main"],
        "main",
        ("main", "dev"),
        Some("dev"),
    ),
    row(&["branch -c dev f"], "main", ("f", "dev"), Some("dev")),
    row(
        &["checkout -b f", "branch -D dev"],
        "f",
        ("f", "main"),
        Some("main"),
    ),
    row(
        &["checkout -b f dev", "branch -D dev"],
        "f",
        ("f", "dev"),
        Some("main"),
    ),
    row(
        &["checkout -b f", "pack-refs --all --prune"],
        "f",
        ("f", "main"),
        Some("main"),
    ),
    row(
        &["checkout -b a/b/c"],
        "a/b/c",
        ("a/b/c", "main"),
        Some("main"),
    ),
    row(
        &["checkout -b ünï/код"],
        "ünï/код",
        ("ünï/код", "main"),
        Some("main"),
    ),
    row(
        &["checkout -b dev2 dev", "rebase main"],
        "dev2",
        ("dev2", "dev"),
        Some("dev"),
    ),
    row(
        &["-c core.logAllRefUpdates=false checkout -b f"],
        "f",
        ("f", "-"),
        Some("main"),
    ),
    row(
        &["checkout dev", "reset --hard HEAD~1", "checkout -b f"],
        "f",
        ("f", "dev"),
        Some("main"),
    ),
    row(
        &["worktree add ../linked -b f"],
        "main",
        ("f", "main"),
        Some("main"),
    ),
    in_worktree(row(
        &["worktree add ../linked -b f"],
        "f",
        ("f", "main"),
        Some("main"),
    )),
    in_worktree(row(
        &["worktree add ../linked -b f dev"],
        "f",
        ("f", "dev"),
        Some("dev"),
    )),
    in_worktree(row(
        &["worktree add ../linked"],
        "linked",
        ("linked", "main"),
        Some("main"),
    )),
    in_worktree(row(
        &["worktree add ../linked dev", "-C ../linked checkout -b f"],
        "f",
        ("f", "dev"),
        Some("dev"),
    )),
    in_worktree(row(
        &[
            "worktree add --detach ../linked",
            "-C ../linked checkout -b f",
        ],
        "f",
        ("f", "#"),
        Some("main"),
    )),
];

fn head_text(head: &Head) -> String {
    match head {
        Head::Branch(branch) => branch.to_string(),
        Head::Unborn(branch) => format!("({branch})"),
        Head::Detached(id) => hide(id),
    }
}

fn hide(text: &str) -> String {
    if refs::is_id(text) { "#" } else { text }.to_owned()
}

fn check(row: &Row) {
    let what = row.commands;
    let repo = prepared();
    for command in what {
        let mut arguments: Vec<_> = command.split(' ').collect();
        if arguments[0] == "commit" {
            arguments.push("--allow-empty");
        }
        repo.git(&arguments);
    }
    let location = repo.location_in(row.folder);
    let found = head(&location.git_dir).unwrap();
    assert_eq!(head_text(&found), row.head, "HEAD after {what:?}");
    let branch = name(row.origin.0);
    let found = match origin(&location, &branch).unwrap() {
        None => "-".to_owned(),
        Some(Origin::Branch(branch)) => branch.to_string(),
        Some(Origin::Other(text)) => hide(&text),
    };
    assert_eq!(found, row.origin.1, "origin after {what:?}");
    let asked = if what.is_empty() || row.origin.0 == "dev" {
        name("dev")
    } else {
        branch
    };
    let candidates = [name("main"), name("dev"), name("absent")];
    if row.origin.0 != "main" {
        let found = nearest(&location, &asked, &candidates).unwrap();
        let found = found.as_ref().map(BranchName::as_str);
        assert_eq!(found, row.nearest, "nearest after {what:?}");
    }
    let all = branches(&location.common_dir).unwrap();
    assert_eq!(
        all.iter().map(BranchName::as_str).collect::<Vec<_>>(),
        repo.git(&["for-each-ref", "--format=%(refname:lstrip=2)", "refs/heads"])
            .lines()
            .collect::<Vec<_>>(),
        "branches after {what:?}"
    );
}

#[test]
fn head_origin_and_nearest_are_right_after_each_git_command() {
    std::thread::scope(|scope| {
        for rows in ROWS.chunks(ROWS.len().div_ceil(4)) {
            scope.spawn(move || rows.iter().for_each(check));
        }
    });
}

#[test]
fn a_branch_name_of_250_bytes_is_read() {
    let repo = TestRepo::new();
    let long = "x".repeat(250);
    repo.git(&["checkout", "-q", "-b", &long]);
    assert_eq!(head(&repo.git_dir()).unwrap(), Head::Branch(name(&long)));
    let origin = origin(&repo.location(), &name(&long)).unwrap();
    assert_eq!(origin, Some(Origin::Branch(name("main"))));
}

#[test]
fn a_branch_name_that_is_not_utf8_is_refused_as_head_and_left_out_as_branch() {
    let repo = TestRepo::new();
    fs::write(repo.git_dir().join("HEAD"), b"ref: refs/heads/\xff\n").unwrap();
    assert!(matches!(
        head(&repo.git_dir()),
        Err(GitError::Unreadable { .. })
    ));
    assert_eq!(branches(&repo.git_dir()).unwrap(), [name("main")]);
}

#[test]
fn a_fresh_repository_has_an_unborn_branch() {
    let repo = TestRepo::empty();
    assert_eq!(head(&repo.git_dir()).unwrap(), Head::Unborn(name("main")));
    assert_eq!(branches(&repo.git_dir()).unwrap(), []);
    assert_eq!(default_branch(&repo.git_dir()).unwrap(), Some(name("main")));
    assert_eq!(origin(&repo.location(), &name("main")).unwrap(), None);
}

#[test]
fn each_operation_is_seen_while_it_lasts() {
    let repo = TestRepo::new();
    let git_dir = repo.git_dir();
    let change = |branch: &str| {
        repo.git(&["checkout", "-q", branch]);
        fs::write(repo.top().join("one"), branch).unwrap();
        repo.git(&["commit", "-qam", branch]);
    };
    repo.git(&["branch", "f"]);
    change("main");
    change("f");
    assert_eq!(operation(&git_dir), None);
    let all: [(&[&str], &[&str], Operation); 6] = [
        (
            &["rebase", "main"],
            &["rebase", "--abort"],
            Operation::Rebase,
        ),
        (
            &["rebase", "--apply", "main"],
            &["rebase", "--abort"],
            Operation::Rebase,
        ),
        (&["merge", "main"], &["merge", "--abort"], Operation::Merge),
        (
            &["cherry-pick", "main"],
            &["cherry-pick", "--abort"],
            Operation::CherryPick,
        ),
        (
            &["revert", "main"],
            &["revert", "--abort"],
            Operation::Revert,
        ),
        (
            &["bisect", "start"],
            &["bisect", "reset"],
            Operation::Bisect,
        ),
    ];
    for (begin, end, operation) in all {
        repo.try_git_in("repo", begin);
        assert_eq!(super::operation(&git_dir), Some(operation), "{begin:?}");
        repo.git(end);
        assert_eq!(super::operation(&git_dir), None, "{end:?}");
    }
    let patch = repo.git(&["format-patch", "-1", "main", "--stdout"]);
    fs::write(repo.dir.join("patch"), patch + "\n").unwrap();
    repo.try_git_in("repo", &["am", "../patch"]);
    assert_eq!(super::operation(&git_dir), Some(Operation::Am));
}

#[test]
fn a_rebase_detaches_head_and_returns_to_the_branch() {
    let repo = TestRepo::new();
    repo.git(&["checkout", "-q", "-b", "f", "HEAD~1"]);
    repo.commit("f1");
    repo.try_git_in("repo", &["rebase", "--exec", "false", "main"]);
    assert!(matches!(head(&repo.git_dir()), Ok(Head::Detached(_))));
    assert_eq!(operation(&repo.git_dir()), Some(Operation::Rebase));
    repo.git(&["rebase", "--continue"]);
    assert_eq!(head(&repo.git_dir()).unwrap(), Head::Branch(name("f")));
    assert_eq!(operation(&repo.git_dir()), None);
}

#[test]
fn the_last_rename_is_told() {
    let repo = TestRepo::new();
    repo.git(&["branch", "a"]);
    assert_eq!(renamed_from(&repo.git_dir(), &name("a")).unwrap(), None);
    repo.git(&["branch", "-m", "a", "b"]);
    repo.git(&["branch", "-m", "b", "c"]);
    let renamed = renamed_from(&repo.git_dir(), &name("c")).unwrap();
    assert_eq!(renamed, Some(name("b")));
}

#[test]
fn a_branch_made_again_under_its_name_has_its_new_origin() {
    let repo = TestRepo::new();
    repo.git(&["branch", "dev"]);
    repo.git(&["checkout", "-q", "-b", "f"]);
    repo.git(&["checkout", "-q", "dev"]);
    repo.git(&["branch", "-q", "-D", "f"]);
    repo.git(&["checkout", "-q", "-b", "f"]);
    let found = origin(&repo.location(), &name("f")).unwrap();
    assert_eq!(found, Some(Origin::Branch(name("dev"))));
}

#[test]
fn a_later_checkout_is_not_taken_for_the_creation() {
    let repo = TestRepo::new();
    let at = |time: &str, arguments: &[&str]| {
        let mut command = repo.command("repo", arguments);
        let output = command.env("GIT_COMMITTER_DATE", time).output().unwrap();
        assert!(output.status.success(), "{output:?}");
    };
    at("1700000000 +0000", &["branch", "dev"]);
    at("1700000010 +0000", &["checkout", "-q", "-b", "f"]);
    at("1700000020 +0000", &["checkout", "-q", "dev"]);
    at("1700000030 +0000", &["branch", "g"]);
    at("1700000040 +0000", &["checkout", "-q", "f"]);
    let of = |branch: &str| origin(&repo.location(), &name(branch)).unwrap();
    assert_eq!(of("f"), Some(Origin::Branch(name("main"))));
    assert_eq!(of("g"), Some(Origin::Branch(name("dev"))));
}

#[test]
fn the_default_branch_is_the_remotes_then_the_usual_names_then_the_only_one() {
    let repo = TestRepo::new();
    let default = || default_branch(&repo.git_dir()).unwrap().map(String::from);
    repo.git(&["branch", "trunk"]);
    assert_eq!(default().as_deref(), Some("main"));
    repo.git(&["config", "init.defaultBranch", "trunk"]);
    assert_eq!(default().as_deref(), Some("trunk"));
    repo.git(&["branch", "theirs"]);
    repo.git(&["update-ref", "refs/remotes/origin/theirs", "HEAD"]);
    let (from, to) = ("refs/remotes/origin/HEAD", "refs/remotes/origin/theirs");
    repo.git(&["symbolic-ref", from, to]);
    assert_eq!(default().as_deref(), Some("theirs"));
    repo.git(&["config", "init.defaultBranch", "main"]);
    repo.git(&["checkout", "-q", "theirs"]);
    repo.git(&["branch", "-q", "-D", "main", "trunk"]);
    repo.git(&["branch", "-m", "own"]);
    assert_eq!(default().as_deref(), Some("own"));
}

#[test]
fn a_worktree_is_found_from_below_and_from_within_its_git_directory() {
    let repo = TestRepo::new();
    let (top, git_dir) = (repo.top(), repo.git_dir());
    fs::create_dir_all(top.join("a/b")).unwrap();
    for path in [
        "repo",
        "repo/a/b",
        "repo/one",
        "repo/.git",
        "repo/.git/refs",
    ] {
        let location = repo.location_in(path);
        assert_eq!(location.git_dir, git_dir, "{path}");
        assert_eq!(location.common_dir, git_dir, "{path}");
        assert_eq!(location.worktree.as_deref(), Some(top.as_path()), "{path}");
        assert_eq!(
            location.main_worktree.as_deref(),
            Some(top.as_path()),
            "{path}"
        );
    }
    assert_eq!(Location::from_git_dir(&git_dir).unwrap(), repo.location());
    assert_eq!(worktrees(&git_dir).unwrap(), [repo.location()]);
}

#[test]
fn linked_worktrees_share_the_common_directory() {
    let repo = TestRepo::new();
    repo.git(&["worktree", "add", "-q", "../linked"]);
    repo.git(&["worktree", "add", "-q", "../gone"]);
    let location = repo.location_in("linked");
    assert!(location.is_linked_worktree());
    assert_eq!(location.common_dir, repo.git_dir());
    assert_eq!(location.git_dir, repo.git_dir().join("worktrees/linked"));
    assert_eq!(location.worktree, Some(repo.dir.join("linked")));
    assert_eq!(location.main_worktree, Some(repo.top()));
    assert_eq!(
        head(&location.git_dir).unwrap(),
        Head::Branch(name("linked"))
    );
    fs::remove_dir_all(repo.dir.join("gone")).unwrap();
    let all = worktrees(&repo.git_dir()).unwrap();
    assert_eq!(all, [repo.location(), location]);
}

#[test]
fn a_bare_repository_has_no_worktree_but_those_linked_to_it() {
    let repo = TestRepo::init(&["--bare"]);
    let location = repo.location();
    assert_eq!(location.worktree, None);
    assert_eq!(location.git_dir, repo.top());
    let seed = TestRepo::new();
    let url = seed.top();
    repo.git(&["fetch", "-q", url.to_str().unwrap(), "main:main"]);
    repo.git(&["worktree", "add", "-q", "../linked", "main"]);
    let linked = repo.location_in("linked");
    assert_eq!(linked.main_worktree, None);
    assert_eq!(linked.common_dir, repo.top());
    assert_eq!(worktrees(&repo.top()).unwrap(), [location, linked]);
}

#[test]
fn a_git_file_that_leads_to_a_bare_repository_makes_no_worktree() {
    let repo = TestRepo::new();
    repo.git_in("", &["clone", "-q", "--bare", "repo", "proj/.bare"]);
    fs::write(repo.dir.join("proj/.git"), "gitdir: ./.bare\n").unwrap();
    repo.git_in("proj", &["worktree", "add", "-q", "wt", "main"]);
    let location = repo.location_in("proj");
    assert_eq!(location.worktree, None);
    assert_eq!(location.common_dir, repo.dir.join("proj/.bare"));
    let linked = repo.location_in("proj/wt");
    assert_eq!(linked.common_dir, location.common_dir);
    assert_eq!(linked.worktree, Some(repo.dir.join("proj/wt")));
}

#[test]
fn a_submodule_is_a_repository_of_its_own() {
    let repo = TestRepo::new();
    let other = TestRepo::new();
    let url = other.top();
    let allow = "protocol.file.allow=always";
    let url = url.to_str().unwrap();
    repo.git(&["-c", allow, "submodule", "--quiet", "add", url, "sub"]);
    let location = repo.location_in("repo/sub");
    assert_eq!(location.common_dir, repo.git_dir().join("modules/sub"));
    assert_eq!(location.worktree, Some(repo.top().join("sub")));
    let again = Location::from_git_dir(&location.common_dir).unwrap();
    assert_eq!(again, location);
}

#[test]
fn a_separate_git_directory_is_followed() {
    let repo = TestRepo::init(&["--separate-git-dir=store"]);
    let location = repo.location();
    assert_eq!(location.git_dir, repo.dir.join("store"));
    assert_eq!(location.worktree, Some(repo.top()));
}

#[test]
fn what_is_no_repository_says_so() {
    let dir = tempfile::tempdir().unwrap();
    let found = Location::discover(dir.path());
    assert!(
        matches!(found, Err(GitError::NotARepository(_))),
        "{found:?}"
    );
    fs::create_dir(dir.path().join(".git")).unwrap();
    let found = Location::discover(dir.path());
    assert!(
        matches!(found, Err(GitError::NotARepository(_))),
        "{found:?}"
    );
    fs::remove_dir(dir.path().join(".git")).unwrap();
    fs::write(dir.path().join(".git"), "gitdir: /nowhere\n").unwrap();
    let found = Location::discover(dir.path());
    assert!(
        matches!(found, Err(GitError::Unreadable { .. })),
        "{found:?}"
    );
    assert!(matches!(
        head(&dir.path().join("absent")),
        Err(GitError::NotARepository(_))
    ));
}

#[cfg(unix)]
#[test]
fn a_repository_of_another_user_is_read_by_root() {
    if !nix::unistd::geteuid().is_root() {
        return skip(
            "a_repository_of_another_user_is_read_by_root",
            "root",
            "not root",
        );
    }
    let repo = TestRepo::new();
    for path in [repo.top(), repo.git_dir(), repo.git_dir().join("HEAD")] {
        std::os::unix::fs::chown(path, Some(65534), Some(65534)).unwrap();
    }
    assert_eq!(repo.location().common_dir, repo.git_dir());
    repo.git(&["-c", "safe.directory=*", "branch", "f", "main"]);
    let candidates = [name("main")];
    let found = nearest(&repo.location(), &name("f"), &candidates).unwrap();
    assert_eq!(found, Some(name("main")));
}

fn skip(test: &str, capability: &str, reason: &str) {
    let required = std::env::var("DBRANCH_TEST_REQUIRE").unwrap_or_default();
    let is_required = required.split(',').any(|c| c.trim() == capability);
    assert!(!is_required, "{test}: {reason}");
    #[expect(clippy::print_stderr, reason = "how a test says that it was skipped")]
    {
        eprintln!("skipped: {test}: {reason}");
    }
}

#[test]
fn history_borrowed_from_another_repository_or_cut_off_is_walked() {
    let repo = prepared();
    repo.git(&["gc", "-q"]);
    repo.git_in("", &["clone", "-q", "--shared", "repo", "borrows"]);
    let url = format!("file://{}", repo.top().display());
    repo.git_in(
        "",
        &[
            "clone",
            "-q",
            "--depth=1",
            "--no-single-branch",
            &url,
            "shallow",
        ],
    );
    for folder in ["borrows", "shallow"] {
        repo.git_in(folder, &["branch", "-q", "dev", "origin/dev"]);
        repo.git_in(folder, &["checkout", "-q", "-b", "f", "dev"]);
        repo.commit_in(folder, "more");
        let location = repo.location_in(folder);
        let candidates = [name("main"), name("dev")];
        let found = nearest(&location, &name("f"), &candidates).unwrap();
        assert_eq!(found, Some(name("dev")), "{folder}");
    }
}

#[test]
fn repositories_that_libgit2_can_not_read_are_read_by_the_git_program() {
    let test = "repositories_that_libgit2_can_not_read_are_read_by_the_git_program";
    for option in ["--object-format=sha256", "--ref-format=reftable"] {
        if !git_can(test, option, &["init", "-q", option, "x"]) {
            continue;
        }
        let repo = TestRepo::init(&[option]);
        assert_eq!(head(&repo.git_dir()).unwrap(), Head::Unborn(name("main")));
        repo.commit("one");
        repo.git(&["checkout", "-q", "-b", "dev"]);
        repo.commit("two");
        repo.git(&["checkout", "-q", "-b", "f"]);
        let location = repo.location();
        assert_eq!(head(&location.git_dir).unwrap(), Head::Branch(name("f")));
        assert_eq!(
            branches(&location.common_dir).unwrap(),
            [name("dev"), name("f"), name("main")]
        );
        let found = origin(&location, &name("f")).unwrap();
        assert_eq!(found, Some(Origin::Branch(name("dev"))), "{option}");
        let candidates = [name("main"), name("dev")];
        let found = nearest(&location, &name("f"), &candidates).unwrap();
        assert_eq!(found, Some(name("dev")), "{option}");
        assert_eq!(
            default_branch(&location.common_dir).unwrap(),
            Some(name("main"))
        );
        repo.git(&["branch", "-m", "g"]);
        let renamed = renamed_from(&location.common_dir, &name("g")).unwrap();
        assert_eq!(renamed, Some(name("f")), "{option}");
        repo.git(&["checkout", "-q", "--detach"]);
        assert!(matches!(head(&location.git_dir), Ok(Head::Detached(_))));
    }
}
