//! Set-ups and removals that were killed: the same command again completes them.

use std::fs;
use std::process::Command;

use super::{Pools, unmount};

/// The commands of a script, each with its comment lines and further lines.
fn commands(script: &str) -> Vec<String> {
    let mut found: Vec<String> = Vec::new();
    for line in script.lines() {
        match found.last_mut() {
            Some(last) if last.ends_with('\\') || last.ends_with("||") || last.ends_with("&&") => {
                last.push('\n');
                last.push_str(line);
            }
            _ if line.is_empty() || line.starts_with('#') => {}
            _ => found.push(line.to_owned()),
        }
    }
    found
}

fn run(commands: &[String]) {
    let done = Command::new("sh")
        .args(["-c", &commands.join("\n")])
        .output()
        .expect("sh runs");
    assert!(done.status.success(), "{commands:#?}: {done:?}");
}

#[test]
fn a_set_up_or_removal_that_was_killed_anywhere_is_completed() {
    let Some(pools) = Pools::new() else { return };
    let script = |job: &[&str]| commands(&pools.storage(&[job, &["--dry-run"]].concat()).text());
    let setup = script(&["setup", "--size", "1G"]);
    assert!(setup.len() > 10, "{setup:#?}");
    // The first two set the shell up.
    for done in 2..=setup.len() {
        run(&setup[..done]);
        let _ = pools.set_up();
        let _ = pools.set_up().says(&["nothing to do"]);
        assert!(pools.is_mounted());
        assert_eq!(pools.status()["problem"], serde_json::Value::Null);

        let remove = script(&["remove"]);
        // A removal for every set-up, so that each of its places comes up too.
        run(&remove[..done.min(remove.len())]);
        if pools.storage(&["remove", "--yes"]).code != Some(0) {
            // All was removed but the setting, which only the command takes back.
            assert_eq!(done.min(remove.len()), remove.len());
            fs::remove_file(pools.env.path("home/config/config.json")).expect("there");
        }
        pools.nothing_is_left();
    }
}

#[test]
fn a_file_that_was_being_formatted_is_made_anew() {
    let Some(pools) = Pools::new() else { return };
    let _ = pools.env.dbranch(&["start", "--detach"]).ok();
    let part = pools.image().with_extension("img.part");
    fs::write(&part, "half a file system").expect("ours");
    let _ = pools.set_up();
    assert!(!part.exists());
    // One without data, whoever made it, is as good as none.
    let _ = pools.storage(&["remove", "--yes"]).ok();
    let empty = fs::File::create(pools.image()).expect("ours");
    empty.set_len(600 << 20).expect("ours");
    let _ = pools.storage(&["setup", "--yes"]).ok();
    assert_eq!(fs::metadata(pools.image()).expect("there").len(), 600 << 20);
    let _ = pools.env.dbranch(&["shutdown"]).ok();
    unmount(&pools.pool());
}
