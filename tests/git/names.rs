//! Branch names of every shape.

use crate::support::TestEnv;

#[test]
fn names_that_git_takes_are_taken_as_they_are() {
    let Some(env) = TestEnv::ready() else { return };
    // As long as a file's name may be, in parts, in other scripts, alike but for case or one letter.
    let long = "x".repeat(250);
    let names = [
        long.as_str(),
        "feature/foo",
        "feature-foo",
        "Feature-Foo",
        "größe/данные/字",
        "a'b\"c$d;e`f&(g)",
        "100%",
        "é",
        "e\u{301}",
    ];
    env.sql("create table t(v text)");
    for name in names {
        let _ = env.git(&["checkout", "-q", "-b", name, "main"]).ok();
        env.psql(&env.url(), "insert into t select 'here'").text();
        assert_eq!(env.active(), name);
        assert_eq!(
            env.sql("select count(*) from t"),
            "1",
            "{name} is a branch of its own"
        );
        // Few run at a time: the test is about names.
        let _ = env.dbranch(&["stop", name]).ok();
    }
    let mut expected: Vec<String> = names.iter().map(ToString::to_string).collect();
    expected.push("main".into());
    expected.sort();
    assert_eq!(env.branches(), expected);
    for name in names {
        let show = env.show(name);
        assert_eq!(show["name"], name);
        let url = show["url"].as_str().expect("a text");
        assert!(url.is_ascii(), "{url}");
    }
}

#[test]
fn names_that_git_refuses_are_refused() {
    let Some(env) = TestEnv::ready() else { return };
    let long = "x".repeat(256);
    for name in [
        "", "a b", "a..b", "../up", "/a", "a/", "a//b", ".a", "a.lock", "@", "a~1", "a:b", "a\\b",
        "a\nb", &long,
    ] {
        let out = env.dbranch(&["create", "--", name]);
        assert!(matches!(out.code, Some(1 | 2)), "{out}");
        assert_eq!(out.stdout, "");
        assert!(out.stderr.contains("error"), "{out}");
    }
    assert_eq!(env.branches(), ["main"]);
    assert_eq!(env.volumes().len(), 1);
}

#[test]
fn a_branch_may_be_named_like_a_command_or_an_id() {
    let Some(env) = TestEnv::ready() else { return };
    let id = env.show("main")["id"].as_str().expect("a text").to_owned();
    for name in ["list", "all", "previous", "null", &id] {
        let _ = env.git(&["checkout", "-q", "-b", name, "main"]).ok();
        assert_eq!(env.active(), name);
        assert_eq!(env.show(name)["name"], *name);
        let _ = env.dbranch(&["stop", name]).ok();
    }
}
