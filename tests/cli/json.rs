//! The shapes that scripts rely on.

use serde_json::Value;

use crate::support::TestEnv;

#[track_caller]
fn has_keys(value: &Value, keys: &[&str]) {
    for key in keys {
        assert!(value.get(key).is_some(), "no `{key}` in {value:#}");
    }
}

const BRANCH: [&str; 7] = [
    "id",
    "name",
    "parent",
    "state",
    "active",
    "port",
    "created_at",
];

#[test]
fn list_is_an_array_of_branches() {
    let Some(env) = TestEnv::ready() else { return };
    let _ = env.git(&["checkout", "-q", "-b", "b"]).ok();
    let list = env.dbranch(&["list", "--json"]).json();
    let list = list.as_array().expect("an array");
    assert_eq!(list.len(), 2);
    for branch in list {
        has_keys(branch, &BRANCH);
        assert!(
            branch["id"].is_string() && branch["active"].is_boolean(),
            "{branch}"
        );
        let port = branch["port"].as_u64().expect("a number");
        let range = u64::from(env.ports.first + 4)..=u64::from(env.ports.last());
        assert!(range.contains(&port), "{branch}");
        let state = branch["state"].as_str().expect("a text");
        assert!(
            ["creating", "running", "stopped", "failed"].contains(&state),
            "{branch}"
        );
        let created = branch["created_at"].as_str().expect("a text");
        assert!(
            created.starts_with("20") && created.ends_with('Z'),
            "{branch}"
        );
    }
    let by_name = |name: &str| {
        list.iter()
            .find(|b| b["name"] == name)
            .expect("both are listed")
    };
    assert_eq!(by_name("b")["parent"], "main");
    assert_eq!(by_name("b")["active"], true);
    assert!(by_name("main")["parent"].is_null());
    assert_eq!(by_name("main")["active"], false);
    assert_ne!(by_name("main")["port"], by_name("b")["port"]);
}

#[test]
fn show_is_a_branch_with_where_it_lies_and_listens() {
    let Some(env) = TestEnv::ready() else { return };
    let show = env.show("main");
    has_keys(&show, &BRANCH);
    has_keys(&show, &["storage", "runtime", "url", "volume", "backend"]);
    let dir = show["backend"]["unix"]
        .as_str()
        .expect("a native server has a Unix socket");
    let port = show["backend"]["port"].as_u64().expect("a number");
    let socket = std::path::Path::new(dir).join(format!(".s.PGSQL.{port}"));
    assert!(socket.exists(), "{}", socket.display());
    assert_eq!(env.url_of("main"), show["url"].as_str().expect("a text"));
}

#[test]
fn status_tells_where_one_stands() {
    let Some(env) = TestEnv::ready() else { return };
    let status = env.dbranch(&["status", "--json"]).json();
    has_keys(
        &status,
        &["project", "branch", "git_branch", "proxy_port", "daemon"],
    );
    assert_eq!(status["project"], "shop");
    assert_eq!(status["branch"], "main");
    assert_eq!(status["git_branch"], "main");
    assert_eq!(status["proxy_port"], env.ports.first);
    assert_eq!(status["daemon"]["version"], env!("CARGO_PKG_VERSION"));
    assert!(status["daemon"]["pid"].is_u64());
    let _ = env.git(&["checkout", "-q", "--detach"]).ok();
    let status = env.dbranch(&["status", "--json"]).json();
    assert!(status["git_branch"].is_null(), "{status}");
    assert_eq!(status["branch"], "main");
}

#[test]
fn usage_counts_bytes_of_branches_and_pool() {
    let Some(env) = TestEnv::ready() else { return };
    let _ = env.dbranch(&["create", "b"]).ok();
    let usage = env.dbranch(&["usage", "--json"]).json();
    let branches = usage["branches"].as_array().expect("an array");
    assert_eq!(branches.len(), 2);
    for branch in branches {
        has_keys(branch, &["name", "logical_bytes", "exclusive_bytes"]);
        let bytes = |key: &str| branch[key].as_u64().expect("a number");
        assert!(
            bytes("logical_bytes") > 5_000_000,
            "a cluster is larger: {branch}"
        );
        assert!(
            bytes("exclusive_bytes") <= bytes("logical_bytes"),
            "{branch}"
        );
    }
    assert_eq!(usage["pool"]["driver"], env.storage.name());
    assert!(usage["pool"]["free_bytes"].as_u64().expect("a number") > 0);
}

#[test]
fn usage_says_who_shares_what_and_what_deleting_frees() {
    let Some(env) = TestEnv::ready() else { return };
    let _ = env.dbranch(&["create", "b"]).ok();
    let _ = env.dbranch(&["create", "gone"]).ok();
    let _ = env.dbranch(&["delete", "gone", "--yes"]).ok();
    let usage = env.dbranch(&["usage", "--sort", "age", "--json"]).json();
    let names: Vec<&str> = usage["branches"]
        .as_array()
        .expect("an array")
        .iter()
        .filter_map(|branch| branch["name"].as_str())
        .collect();
    assert_eq!(names, ["main", "b", "gone"]);
    assert_eq!(usage["trash"]["branches"], 1);
    let bytes = |value: &Value| value.as_u64().expect("a number");
    let total = bytes(&usage["total"]["freed_by_delete_bytes"]);
    let mut largest = 0;
    for branch in usage["branches"].as_array().expect("an array") {
        has_keys(
            branch,
            &["shared_bytes", "freed_by_delete_bytes", "trashed"],
        );
        assert_eq!(branch["trashed"], branch["name"] == "gone", "{branch}");
        assert!(bytes(&branch["freed_by_delete_bytes"]) <= total, "{usage}");
        largest = largest.max(bytes(&branch["logical_bytes"]));
        for with in branch["shared_with"].as_array().expect("an array") {
            assert!(
                bytes(&with["bytes"]) <= bytes(&branch["shared_bytes"]),
                "{branch}"
            );
            let kind = if with["name"] == "gone" {
                "trash"
            } else {
                "branch"
            };
            assert_eq!(with["kind"], kind, "{branch}");
        }
    }
    let b = &usage["branches"][1];
    // On other file systems a copy may or may not share.
    if env.storage.name() == "btrfs" {
        assert_eq!(b["shared_with"].as_array().map(Vec::len), Some(2), "{b}");
        assert!(bytes(&b["shared_bytes"]) > largest / 2, "{b}");
        assert!(
            total < 2 * largest,
            "three branches, hardly more than one: {usage}"
        );
    }
    // For people: a line each, in columns, and the pool's state beside the answer.
    let table = env.dbranch(&["usage"]).ok();
    assert_eq!(table.stdout.lines().count(), 6, "{table}");
    assert!(table.stdout.starts_with("NAME"), "{table}");
    assert!(!table.stdout.contains('\x1b'), "{table}");
    assert!(table.stderr.starts_with("pool: "), "{table}");
}

#[test]
fn url_is_one_line_on_standard_output_and_nothing_else() {
    let Some(env) = TestEnv::ready() else { return };
    let url = env.dbranch(&["url"]).ok();
    assert!(
        url.stdout.starts_with("postgresql://") && url.stdout.ends_with('\n'),
        "{url}"
    );
    assert_eq!(url.stdout.lines().count(), 1, "{url}");
    assert_eq!(url.stderr, "");
    // The daemon that has to be started first adds nothing to it.
    let _ = env.dbranch(&["shutdown", "--stop-branches"]).ok();
    assert_eq!(env.dbranch(&["url"]).ok().stdout, url.stdout);
    let _ = env.dbranch(&["url", "nope"]).fails(1, &["`nope`"]);
}

#[test]
fn every_reporting_command_speaks_json() {
    let Some(env) = TestEnv::ready() else { return };
    for args in [
        &["list", "--json"][..],
        &["show", "main", "--json"],
        &["status", "--json"],
        &["usage", "--json"],
        &["doctor", "--json"],
        &["create", "b", "--json"],
        &["use", "b", "--json"],
        &["stop", "b", "--json"],
        &["resume", "b", "--json"],
        &["sync", "--dry-run", "--json"],
        &["sync", "--json"],
        &["env", "--json"],
        &["delete", "b", "--yes", "--force", "--json"],
        &["undelete", "b", "--json"],
        &["start", "--detach", "--json"],
    ] {
        let out = env.dbranch(args);
        let answer = out.json();
        assert!(
            answer.is_object() || answer.is_array(),
            "{args:?}: {answer}"
        );
    }
    // A failure answers nothing on standard output, so that no script takes it for an answer.
    let _ = env
        .dbranch(&["show", "nope", "--json"])
        .fails(1, &["`nope`"]);
}
