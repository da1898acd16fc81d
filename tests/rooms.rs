//! Who may know whom: the table of `src/lib.rs` and ARCHITECTURE.md, so that it can't rot.

use std::fs;
use std::path::{Path, PathBuf};

/// Each room, and the rooms it may name.
const MAY_NAME: [(&str, &[&str]); 13] = [
    ("types.rs", &[]),
    ("fsx", &["types"]),
    ("config", &["types", "fsx"]),
    ("git", &["types", "fsx"]),
    ("storage", &["types", "fsx"]),
    ("runtime", &["types", "fsx"]),
    ("postgres", &["types", "fsx"]),
    ("registry", &["types", "fsx"]),
    ("proxy", &["types", "fsx"]),
    ("api", &["types", "fsx", "config"]),
    (
        "engine",
        &[
            "types", "fsx", "config", "git", "storage", "runtime", "postgres", "registry",
        ],
    ),
    (
        "daemon",
        &[
            "types", "fsx", "config", "git", "storage", "runtime", "postgres", "registry",
            "engine", "proxy", "api",
        ],
    ),
    ("cli", &["types", "fsx", "config", "git", "api"]),
];

/// Exceptions: the one command that becomes the daemon, and the one that plays an app.
const EXCEPTIONS: [(&str, &str); 2] = [
    ("cli/commands/start.rs", "daemon"),
    ("cli/commands/demo.rs", "postgres"),
];

/// Packages that one room keeps to itself.
const ONLY_IN: [(&str, &str); 8] = [
    ("git2::", "git"),
    ("notify::", "git"),
    ("bollard::", "runtime"),
    ("rusqlite::", "registry"),
    ("tokio_postgres::", "postgres"),
    ("clap::", "cli"),
    ("indicatif::", "cli"),
    ("dirs::", "config"),
];

/// A source file's path below `src`, and its lines, without its tests and comments.
struct Source {
    path: PathBuf,
    lines: Vec<(usize, String)>,
}

fn sources() -> Vec<Source> {
    let src = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let mut found = Vec::new();
    let mut folders = vec![src.clone()];
    while let Some(dir) = folders.pop() {
        for entry in fs::read_dir(&dir).expect("a folder of ours").flatten() {
            let path = entry.path();
            let name = entry.file_name().to_string_lossy().into_owned();
            if path.is_dir() {
                folders.push(path);
            } else if path.extension().is_some_and(|e| e == "rs")
                && !name.ends_with("tests.rs")
                && name != "contract.rs"
            {
                let text = fs::read_to_string(&path).expect("a source file");
                let lines = text
                    .lines()
                    .map(str::trim)
                    .enumerate()
                    .take_while(|(_, line)| *line != "#[cfg(test)]")
                    .filter(|(_, line)| !line.starts_with("//"))
                    .map(|(n, line)| (n + 1, line.to_owned()))
                    .collect();
                let path = path.strip_prefix(&src).expect("below it").to_owned();
                found.push(Source { path, lines });
            }
        }
    }
    assert!(found.len() > 20, "the sources are where they were");
    found
}

fn room_of(path: &Path) -> &str {
    let first = path.components().next().expect("a path has a part");
    first.as_os_str().to_str().expect("our names are ASCII")
}

#[test]
fn rooms_name_only_the_rooms_they_may() {
    let mut wrong = Vec::new();
    for Source { path, lines } in sources() {
        let room = room_of(&path);
        let Some((_, allowed)) = MAY_NAME.iter().find(|(name, _)| *name == room) else {
            assert!(
                ["lib.rs", "main.rs"].contains(&room),
                "{room} is not in the table"
            );
            continue;
        };
        for (n, line) in lines {
            for named in line.split("crate::").skip(1) {
                let named: String = named
                    .chars()
                    .take_while(|c| c.is_ascii_lowercase() || *c == '_')
                    .collect();
                let excepted = EXCEPTIONS
                    .iter()
                    .any(|(file, room)| path == Path::new(file) && named == *room);
                let own = named == room.trim_end_matches(".rs");
                if !(own || excepted || allowed.contains(&named.as_str())) {
                    wrong.push(format!("{}:{n}: {line}", path.display()));
                }
            }
        }
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
}

#[test]
fn packages_stay_in_the_rooms_they_are_for() {
    let mut wrong = Vec::new();
    for Source { path, lines } in sources() {
        for (n, line) in lines {
            let used = |package: &str| {
                line.match_indices(package).any(|(at, _)| {
                    let before = line[..at].chars().next_back();
                    !before.is_some_and(|c| c.is_alphanumeric() || c == '_' || c == ':')
                })
            };
            for (package, room) in ONLY_IN {
                if used(package) && room_of(&path) != room {
                    wrong.push(format!("{}:{n}: {line}", path.display()));
                }
            }
        }
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
}
