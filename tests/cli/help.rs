//! Help, version, and command lines that can't be.

use crate::support::TestEnv;

const COMMANDS: [&str; 28] = [
    "init",
    "init-postgres",
    "start",
    "shutdown",
    "install-hooks",
    "uninstall-hooks",
    "create",
    "use",
    "list",
    "show",
    "status",
    "usage",
    "storage",
    "delete",
    "undelete",
    "forget",
    "delete-project",
    "stop",
    "resume",
    "sync",
    "url",
    "env",
    "psql",
    "logs",
    "doctor",
    "demo",
    "completions",
    "help",
];

#[test]
fn every_command_is_in_the_help_and_has_help_of_its_own() {
    let env = TestEnv::bare();
    let help = env.dbranch(&["--help"]).text();
    for command in COMMANDS {
        let listed = help
            .lines()
            .any(|l| l.trim_start().starts_with(&format!("{command} ")));
        assert!(listed, "`{command}` is not in the help:\n{help}");
        if command != "help" {
            let own = env.dbranch(&[command, "--help"]).text();
            assert!(own.contains(&format!("dbranch {command}")), "{own}");
        }
    }
}

#[test]
fn the_version_is_one_line() {
    let version = TestEnv::bare().dbranch(&["--version"]).text();
    assert_eq!(version, format!("dbranch {}", env!("CARGO_PKG_VERSION")));
}

#[test]
fn a_wrong_command_line_exits_with_2_and_starts_nothing() {
    let env = TestEnv::bare();
    for args in [
        &["frobnicate"][..],
        &["create"],
        &["use"],
        &["show"],
        &["list", "--nope"],
        &["init", "--proxy-port", "0"],
        &["init", "--proxy-port", "65536"],
        &["init", "--proxy-port", "http"],
        &["completions", "tcsh"],
        &[],
    ] {
        let out = env.dbranch(args);
        assert_eq!(out.code, Some(2), "{out}");
        assert_eq!(out.stdout, "", "{out}");
        assert!(!out.stderr.is_empty(), "{out}");
    }
    let home = std::fs::read_dir(env.path("home")).expect("ours");
    assert_eq!(home.count(), 0, "nothing was made");
}

#[test]
fn completions_are_scripts_the_shells_accept() {
    let env = TestEnv::bare();
    for shell in ["bash", "zsh", "fish"] {
        let script = env.dbranch(&["completions", shell]).text();
        assert!(script.contains("dbranch"), "{shell}: {script}");
        let file = env.path("elsewhere").join(shell);
        std::fs::write(&file, script).expect("ours");
        if shell == "bash" {
            let _ = env.run("bash", &["-n", &file.display().to_string()]).ok();
        }
    }
}

#[test]
fn bash_completes_commands_and_branches() {
    let Some(env) = TestEnv::ready() else { return };
    let _ = env.dbranch(&["create", "feature/login"]).ok();
    let complete = |words: &str| {
        let script = format!(
            "source <(dbranch completions bash); COMP_WORDS=({words}); \
             COMP_CWORD=$((${{#COMP_WORDS[@]}} - 1)); COMP_TYPE=9; \
             call=$(complete -p dbranch | sed -E 's/.*-F ([^ ]+).*/\\1/'); \
             $call dbranch \"${{COMP_WORDS[-1]}}\" \"${{COMP_WORDS[-2]}}\"; \
             printf '%s\\n' \"${{COMPREPLY[@]}}\""
        );
        let mut bash = env.command("bash", &env.repo());
        bash.args(["-c", &script]);
        crate::support::process::run(bash, crate::support::LIMIT).text()
    };
    assert!(complete("dbranch init-p").contains("init-postgres"));
    assert!(complete("dbranch use feat").contains("feature/login"));
}

#[test]
fn a_reader_that_leaves_early_is_no_error() {
    let env = TestEnv::bare();
    let piped = env.run(
        "bash",
        &[
            "-c",
            "set -o pipefail; dbranch completions zsh | head -n 1 >/dev/null",
        ],
    );
    assert_eq!(piped.ok().stderr, "");
}
