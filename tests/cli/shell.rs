//! Commands for people and shells: env, psql, logs, doctor, list.

use crate::support::TestEnv;

#[test]
fn env_is_what_a_shell_can_eval() {
    let Some(env) = TestEnv::ready() else { return };
    let script = "set -eu; eval \"$(dbranch env)\"; psql -X -A -t -c 'select 1'; psql -X -A -t \"$DATABASE_URL\" -c 'select 2'";
    let mut bash = env.command("bash", &env.repo());
    bash.args(["-c", script]);
    let out = crate::support::process::run(bash, crate::support::LIMIT);
    assert_eq!(out.text(), "1\n2");
}

#[test]
fn psql_connects_to_the_active_branch_or_the_one_named() {
    let Some(env) = TestEnv::ready() else { return };
    env.sql("create table t as select 'main' as v");
    let _ = env.git(&["checkout", "-q", "-b", "b"]).ok();
    env.sql("update t set v = 'b'");
    let query = ["-X", "-A", "-t", "-c", "select v from t"];
    let ask = |args: &[&str]| env.dbranch(&[args, &["--"], &query].concat()).text();
    assert_eq!(ask(&["psql"]), "b");
    assert_eq!(ask(&["psql", "main"]), "main");
    // psql's own exit status is ours.
    let failed = env.dbranch(&[
        "psql",
        "--",
        "-X",
        "-v",
        "ON_ERROR_STOP=1",
        "-c",
        "select 1/0",
    ]);
    assert_ne!(failed.code, Some(0), "{failed}");
    let _ = failed.says(&["division by zero"]);
}

#[test]
fn logs_show_what_the_server_said() {
    let Some(env) = TestEnv::ready() else { return };
    let failed = env.psql(&env.url(), "select 'find me'::int");
    assert_eq!(failed.code, Some(1), "{failed}");
    crate::support::wait_until(crate::support::LIMIT, "the log has it", || {
        env.dbranch(&["logs"]).text().contains("find me")
    });
    let _ = env.dbranch(&["logs", "nope"]).fails(1, &["`nope`"]);
}

#[test]
fn doctor_finds_a_working_set_up_in_order() {
    let Some(env) = TestEnv::ready() else { return };
    let findings = env.dbranch(&["doctor", "--json"]).json();
    let findings = findings.as_array().expect("an array");
    assert!(findings.len() > 3, "{findings:#?}");
    for finding in findings {
        assert_ne!(finding["level"], "problem", "{finding}");
    }
    let _ = env.dbranch(&["doctor"]).ok();
    // Outside a project it looks at the machine.
    let _ = env.dbranch_in(&env.path("elsewhere"), &["doctor"]).ok();
}

#[test]
fn doctor_names_hooks_that_are_missing() {
    let Some(env) = TestEnv::ready() else { return };
    let _ = env.dbranch(&["uninstall-hooks"]).ok();
    let findings = env.dbranch(&["doctor", "--json"]);
    let text = findings.stdout.clone();
    assert!(text.contains("dbranch install-hooks"), "{findings}");
}

#[test]
fn list_marks_the_active_branch_and_names_states() {
    let Some(env) = TestEnv::ready() else { return };
    let _ = env.dbranch(&["create", "idle"]).ok();
    let _ = env.dbranch(&["stop", "idle"]).ok();
    let list = env.dbranch(&["list"]).text();
    let line = |name: &str| {
        list.lines()
            .find(|l| l.contains(name))
            .expect("listed")
            .to_owned()
    };
    assert!(
        line("main").contains('*') && line("main").contains("running"),
        "{list}"
    );
    assert!(
        !line("idle").contains('*') && line("idle").contains("stopped"),
        "{list}"
    );
    assert!(!list.contains('\u{1b}'), "no colours without a terminal");
}
