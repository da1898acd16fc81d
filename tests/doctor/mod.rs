//! What doctor finds of storage: each finding is made to appear on a real file system, and the command
//! it names is run to make it go away.

mod data;
mod driver;
mod mounts;
mod owners;
mod room;

use serde_json::Value;

use crate::support::process::{self, Output};
use crate::support::{Fs, Image, LIMIT, Storage, TestEnv};

/// An environment whose pool lies on a small file system, without a branch.
fn env_on(fs: Fs, mib: u64) -> Option<TestEnv> {
    TestEnv::on(Image::make(fs, mib)?, storage_of(fs))
}

fn storage_of(fs: Fs) -> Storage {
    match fs {
        Fs::Btrfs => Storage::Btrfs,
        Fs::Xfs | Fs::Ext4 => Storage::Copy,
    }
}

/// What doctor finds, whatever its exit status.
#[track_caller]
fn doctor(env: &TestEnv) -> Vec<Value> {
    let out = env.dbranch(&["doctor", "--json"]);
    let findings: Vec<Value> =
        serde_json::from_str(&out.stdout).unwrap_or_else(|e| panic!("no JSON: {e}: {out}"));
    let problem = findings.iter().any(|f| f["level"] == "problem");
    assert_eq!(out.code, Some(i32::from(problem)), "{out}");
    findings
}

#[track_caller]
fn find(env: &TestEnv, what: &str) -> Option<Value> {
    doctor(env).into_iter().find(|f| f["what"] == what)
}

/// A finding of that kind and level that has all of `words` in what it says.
#[track_caller]
fn finds(env: &TestEnv, what: &str, level: &str, words: &[&str]) -> Value {
    let all = doctor(env);
    let found = all.iter().find(|f| f["what"] == what);
    let found = found.unwrap_or_else(|| panic!("no `{what}` in {all:#?}"));
    assert_eq!(found["level"], level, "{found}");
    for word in words {
        assert!(text(found, "detail").contains(word), "`{word}`: {found}");
    }
    assert!(!text(found, "fix").is_empty(), "{found}");
    found.clone()
}

#[track_caller]
fn finds_nothing(env: &TestEnv, what: &str) {
    assert_eq!(find(env, what), None);
}

fn text<'a>(finding: &'a Value, key: &str) -> &'a str {
    finding[key].as_str().unwrap_or_default()
}

/// Runs the command that a finding names, as root, who needs no sudo.
#[track_caller]
fn run_fix(env: &TestEnv, finding: &Value) -> Output {
    let fix = text(finding, "fix").replace("sudo ", "");
    let mut shell = env.command("sh", &env.repo());
    shell.args(["-ec", &fix]);
    process::run(shell, LIMIT).ok()
}

/// Finds it, does what it says, and finds it no more.
#[track_caller]
fn finds_and_mends(env: &TestEnv, what: &str, level: &str, words: &[&str]) {
    let found = finds(env, what, level, words);
    let _ = run_fix(env, &found);
    finds_nothing(env, what);
}

#[track_caller]
fn run(env: &TestEnv, program: &str, args: &[&str]) {
    let _ = env.run(program, args).ok();
}
