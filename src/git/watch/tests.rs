use super::*;
use crate::git::testing::TestRepo;

const LIMIT: Duration = Duration::from_secs(20);

async fn wait_for(events: &mut mpsc::Receiver<WatchEvent>, git_dir: &Path, change: Change) {
    let expected = WatchEvent {
        git_dir: git_dir.to_owned(),
        change,
    };
    let arrival = async {
        while let Some(event) = events.recv().await {
            if event == expected {
                return;
            }
        }
        panic!("the watch ended before {expected:?}");
    };
    tokio::time::timeout(LIMIT, arrival)
        .await
        .unwrap_or_else(|_| panic!("no {expected:?}"));
}

/// Waits out what earlier commands caused.
async fn drain(events: &mut mpsc::Receiver<WatchEvent>) {
    while tokio::time::timeout(LONGEST_BURST * 3, events.recv())
        .await
        .is_ok()
    {}
}

#[tokio::test]
async fn every_way_to_move_head_is_reported() {
    let repo = TestRepo::new();
    repo.git(&["checkout", "-q", "-b", "f", "HEAD~1"]);
    repo.commit("f1");
    let (watch, mut events) = Watch::new().unwrap();
    let git_dir = repo.git_dir();
    assert_eq!(watch.add(&git_dir).unwrap(), Method::Events);
    for command in [
        "checkout -q -b g",
        "checkout -q main",
        "checkout -q --detach",
        "rebase -q main f",
        "branch -m h",
        "bisect start",
        "bisect reset",
        "checkout -q --orphan o",
    ] {
        repo.git(&command.split(' ').collect::<Vec<_>>());
        wait_for(&mut events, &git_dir, Change::Head).await;
        drain(&mut events).await;
    }
}

#[tokio::test]
async fn a_burst_is_one_report_and_reading_is_none() {
    let repo = TestRepo::new();
    let (watch, mut events) = Watch::new().unwrap();
    let git_dir = repo.git_dir();
    watch.add(&git_dir).unwrap();
    repo.git(&["checkout", "-q", "-b", "f"]);
    wait_for(&mut events, &git_dir, Change::Head).await;
    drain(&mut events).await;
    for _ in 0..100 {
        super::super::head(&git_dir).unwrap();
    }
    repo.git(&["status"]);
    let quiet = tokio::time::timeout(LONGEST_BURST * 3, events.recv()).await;
    assert!(quiet.is_err(), "{quiet:?}");
}

#[tokio::test]
async fn branches_and_worktrees_that_come_and_go_are_reported() {
    let repo = TestRepo::new();
    let (watch, mut events) = Watch::new().unwrap();
    let git_dir = repo.git_dir();
    watch.add(&git_dir).unwrap();
    for command in [
        "branch a/b",
        "branch -m a/b c",
        "branch -D c",
        "pack-refs --all",
    ] {
        repo.git(&command.split(' ').collect::<Vec<_>>());
        wait_for(&mut events, &git_dir, Change::Branches).await;
        drain(&mut events).await;
    }
    for command in [
        "worktree add ../one",
        "worktree add ../two",
        "worktree remove ../two",
        "worktree remove ../one",
        "worktree add ../three",
    ] {
        repo.git(&command.split(' ').collect::<Vec<_>>());
        wait_for(&mut events, &git_dir, Change::Worktrees).await;
        drain(&mut events).await;
    }
    let linked = git_dir.join("worktrees/three");
    watch.add(&linked).unwrap();
    repo.git_in("three", &["checkout", "-q", "-b", "g"]);
    wait_for(&mut events, &linked, Change::Head).await;
    repo.git(&["worktree", "remove", "../three"]);
    wait_for(&mut events, &linked, Change::Gone).await;
}

#[tokio::test]
async fn a_repository_that_is_deleted_or_moved_is_reported_gone() {
    let repo = TestRepo::new();
    let (watch, mut events) = Watch::new().unwrap();
    watch.add(&repo.git_dir()).unwrap();
    fs::rename(repo.git_dir(), repo.dir.join("moved")).unwrap();
    wait_for(&mut events, &repo.git_dir(), Change::Gone).await;
    let moved = repo.dir.join("moved");
    watch.add(&moved).unwrap();
    fs::remove_dir_all(&moved).unwrap();
    wait_for(&mut events, &moved, Change::Gone).await;
}

#[test]
fn a_move_of_a_folder_above_is_seen_by_looking() {
    let repo = TestRepo::new();
    let git_dir = repo.git_dir();
    let dir = Dir {
        identity: identity(&git_dir).unwrap(),
        is_common: true,
        folders: folders(&git_dir, true),
        method: Method::Events,
        seen: Vec::new(),
    };
    let mut state = State::default();
    state.dirs.insert(git_dir.clone(), dir);
    let now = Instant::now();
    state.look_for_presence(now);
    assert_eq!(state.take_due(now + QUIET).0, []);
    fs::rename(repo.top(), repo.dir.join("elsewhere")).unwrap();
    state.look_for_presence(now);
    let (due, gone) = state.take_due(now + QUIET);
    let change = Change::Gone;
    assert_eq!(due, [WatchEvent { git_dir, change }]);
    assert_eq!(gone.len(), 1);
}

#[tokio::test]
async fn what_is_removed_is_reported_no_more_and_can_be_added_again() {
    let repo = TestRepo::new();
    let (watch, mut events) = Watch::new().unwrap();
    let git_dir = repo.git_dir();
    watch.add(&git_dir).unwrap();
    watch.add(&git_dir).unwrap();
    watch.remove(&git_dir);
    repo.git(&["checkout", "-q", "-b", "f"]);
    let quiet = tokio::time::timeout(LONGEST_BURST * 3, events.recv()).await;
    assert!(quiet.is_err(), "{quiet:?}");
    watch.add(&git_dir).unwrap();
    repo.git(&["checkout", "-q", "main"]);
    wait_for(&mut events, &git_dir, Change::Head).await;
    drop(watch);
    while events.recv().await.is_some() {}
}

#[tokio::test]
async fn without_events_changes_are_found_by_polling() {
    let repo = TestRepo::new();
    let (watch, mut events) = Watch::new().unwrap();
    // As where the system's watches are used up.
    *lock(&watch.shared.watcher) = Err("too many watches".to_owned());
    let git_dir = repo.git_dir();
    let method = watch.add(&git_dir).unwrap();
    let reason = "too many watches".to_owned();
    assert_eq!(method, Method::Polling { reason });
    repo.git(&["checkout", "-q", "-b", "f"]);
    wait_for(&mut events, &git_dir, Change::Head).await;
    repo.git(&["worktree", "add", "-q", "../linked", "main"]);
    wait_for(&mut events, &git_dir, Change::Worktrees).await;
    repo.git(&["branch", "g"]);
    wait_for(&mut events, &git_dir, Change::Branches).await;
    fs::remove_dir_all(git_dir.join("worktrees")).unwrap();
    wait_for(&mut events, &git_dir, Change::Worktrees).await;
}

#[test]
fn a_directory_that_is_not_there_is_no_repository() {
    let (watch, _events) = Watch::new().unwrap();
    let absent = watch.add(Path::new("/nowhere/.git"));
    assert!(matches!(absent, Err(GitError::NotARepository(_))));
}

#[test]
fn a_burst_is_quiet_time_long_but_has_an_end() {
    let first = Instant::now();
    let at = |ms| first + Duration::from_millis(ms);
    let burst = |last| Burst {
        first,
        last: at(last),
    };
    assert_eq!(burst(0).due(), at(10));
    assert_eq!(burst(50).due(), at(60));
    assert_eq!(burst(99).due(), at(100));
}
