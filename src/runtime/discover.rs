//! Finds the PostgreSQL server programs that are installed here.

use std::collections::HashSet;
use std::env;
use std::ffi::OsString;
use std::fmt::Write as _;
use std::ops::RangeInclusive;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use super::{RuntimeError, Server};

/// Major versions that dbranch runs.
pub const SUPPORTED: RangeInclusive<u32> = 13..=18;

/// One set of server programs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Installed {
    pub major: u32,
    /// What `postgres --version` says, without its "postgres (PostgreSQL)".
    pub version_text: String,
    /// Holds `postgres` and `initdb`.
    pub bin_dir: PathBuf,
    /// Where it was looked for: `DBRANCH_PG_BIN`, `PATH`, `pg_config`, `Debian`, ...
    pub source: &'static str,
}

/// Finds server programs of every version, newest first, each once.
///
/// `DBRANCH_PG_BIN` (folders, separated by `:`) replaces all other places.
/// Blocks: runs `postgres --version` of each.
pub fn installed() -> Vec<Installed> {
    Places::of_this_system().search()
}

/// Chooses the programs of `version`, or the newest supported ones. Blocks.
pub fn server_for(version: Option<u32>) -> Result<(Server, u32), RuntimeError> {
    choose_from(installed(), version)
}

fn choose_from(found: Vec<Installed>, version: Option<u32>) -> Result<(Server, u32), RuntimeError> {
    let fits = |one: &&Installed| match version {
        Some(version) => one.major == version,
        None => SUPPORTED.contains(&one.major),
    };
    if let Some(one) = found.iter().find(fits) {
        let server = Server::Native {
            bin_dir: one.bin_dir.clone(),
        };
        return Ok((server, one.major));
    }
    let mut message = match version {
        Some(version) => format!("no server programs of PostgreSQL {version} here"),
        None => format!(
            "no server programs of PostgreSQL {} to {} here",
            SUPPORTED.start(),
            SUPPORTED.end()
        ),
    };
    if found.is_empty() {
        message.push_str(" (nor of another version)");
    } else {
        message.push_str("; found");
        for (i, one) in found.iter().enumerate() {
            let comma = if i == 0 { "" } else { "," };
            let _ = write!(
                message,
                "{comma} {} in {}",
                one.version_text,
                one.bin_dir.display()
            );
        }
    }
    Err(RuntimeError::NoServer {
        message,
        hint: how_to_install(version),
    })
}

fn how_to_install(version: Option<u32>) -> String {
    let version = version.unwrap_or(17);
    let install = if cfg!(target_os = "macos") {
        format!("`brew install postgresql@{version}`")
    } else if Path::new("/usr/bin/apt-get").exists() {
        format!(
            "`apt-get install postgresql-{version}` (versions your release lacks: apt.postgresql.org)"
        )
    } else if Path::new("/usr/bin/dnf").exists() {
        format!("`dnf install postgresql{version}-server` (from yum.postgresql.org)")
    } else {
        format!("PostgreSQL {version}'s server programs")
    };
    format!(
        "install {install}, point DBRANCH_PG_BIN at the folder with `postgres` and `initdb`, \
         or start Docker"
    )
}

/// Where to look; a value, so that tests need not change the environment.
#[derive(Debug, Default)]
struct Places {
    only: Option<OsString>,
    path: Option<OsString>,
    /// Patterns for `glob`, with the name of the source.
    patterns: Vec<(&'static str, String)>,
}

impl Places {
    fn of_this_system() -> Self {
        let pattern = |source, pattern: &str| (source, pattern.to_owned());
        Self {
            only: env::var_os("DBRANCH_PG_BIN").filter(|v| !v.is_empty()),
            path: env::var_os("PATH"),
            patterns: vec![
                pattern("Debian", "/usr/lib/postgresql/*/bin"),
                pattern("yum.postgresql.org", "/usr/pgsql-*/bin"),
                pattern("Homebrew", "/opt/homebrew/opt/postgresql*/bin"),
                pattern("Homebrew", "/usr/local/opt/postgresql*/bin"),
                pattern("Homebrew", "/home/linuxbrew/.linuxbrew/opt/postgresql*/bin"),
                pattern(
                    "Postgres.app",
                    "/Applications/Postgres.app/Contents/Versions/*/bin",
                ),
                pattern("EnterpriseDB", "/Library/PostgreSQL/*/bin"),
                pattern("local build", "/usr/local/pgsql/bin"),
            ],
        }
    }

    fn search(&self) -> Vec<Installed> {
        let mut seen = HashSet::new();
        let mut found: Vec<Installed> = self
            .candidates()
            .into_iter()
            .filter_map(|(source, dir)| {
                let postgres = dir.join("postgres");
                if !(is_program(&postgres) && is_program(&dir.join("initdb"))) {
                    return None;
                }
                // Homebrew and update-alternatives reach one installation by several names.
                if !seen.insert(postgres.canonicalize().ok()?) {
                    return None;
                }
                let version_text = version_of(&postgres)?;
                Some(Installed {
                    major: major_in(&version_text)?,
                    version_text,
                    bin_dir: dir,
                    source,
                })
            })
            .collect();
        // Stable: of equal versions the place that was looked at first wins.
        found.sort_by_key(|one| std::cmp::Reverse(one.major));
        found
    }

    fn candidates(&self) -> Vec<(&'static str, PathBuf)> {
        if let Some(only) = &self.only {
            return env::split_paths(only)
                .map(|dir| ("DBRANCH_PG_BIN", dir))
                .collect();
        }
        let path: Vec<PathBuf> = self.path.iter().flat_map(env::split_paths).collect();
        let mut all: Vec<_> = path.iter().map(|dir| ("PATH", dir.clone())).collect();
        if let Some(dir) = path.iter().find_map(|dir| pg_config_bindir(dir)) {
            all.push(("pg_config", dir));
        }
        for (source, pattern) in &self.patterns {
            all.extend(
                glob::glob(pattern)
                    .into_iter()
                    .flatten()
                    .flatten()
                    .map(|dir| (*source, dir)),
            );
        }
        all.retain(|(_, dir)| dir.is_absolute());
        all
    }
}

fn is_program(path: &Path) -> bool {
    use std::os::unix::fs::PermissionsExt as _;
    std::fs::metadata(path)
        .is_ok_and(|meta| meta.is_file() && meta.permissions().mode() & 0o111 != 0)
}

/// First line of what a program prints; `None` when it does not run here.
fn first_line(program: &Path, arg: &str) -> Option<String> {
    let output = Command::new(program)
        .arg(arg)
        .stdin(Stdio::null())
        .stderr(Stdio::null())
        .output()
        .ok()?;
    let text = String::from_utf8(output.stdout).ok()?;
    let line = text.lines().next()?.trim().to_owned();
    (output.status.success() && !line.is_empty()).then_some(line)
}

fn pg_config_bindir(dir: &Path) -> Option<PathBuf> {
    let program = dir.join("pg_config");
    is_program(&program)
        .then(|| first_line(&program, "--bindir"))?
        .map(PathBuf::from)
}

/// The version of a `postgres` program, as its `--version` tells: `15.18 (Debian 15.18-0+deb12u1)`.
fn version_of(postgres: &Path) -> Option<String> {
    version_in(&first_line(postgres, "--version")?)
}

/// `postgres (PostgreSQL) 17rc1` -> `17rc1`.
pub(super) fn version_in(line: &str) -> Option<String> {
    let (_, version) = line.split_once(") ")?;
    Some(version.trim().to_owned())
}

/// `17rc1` -> 17; `9.6.24` -> 9.
pub(super) fn major_in(version: &str) -> Option<u32> {
    let digits = version
        .find(|c: char| !c.is_ascii_digit())
        .unwrap_or(version.len());
    version[..digits].parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    fn fake(root: &Path, name: &str, version: &str, programs: &[&str]) -> PathBuf {
        let dir = root.join(name);
        std::fs::create_dir_all(&dir).unwrap();
        for program in programs {
            let path = dir.join(program);
            // Written by another process: a child forked by a test beside this
            // one may hold the file open for writing, and exec would fail.
            let script = format!("#!/bin/sh\necho 'postgres (PostgreSQL) {version}'\n");
            let written = Command::new("sh")
                .args(["-c", "printf %s \"$1\" > \"$2\"", "sh", &script])
                .arg(&path)
                .status()
                .unwrap();
            assert!(written.success());
            std::fs::set_permissions(&path, PermissionsExt::from_mode(0o755)).unwrap();
        }
        dir
    }

    const BOTH: &[&str] = &["postgres", "initdb"];

    #[test]
    fn versions_are_read_in_every_spelling() {
        for (line, major) in [
            ("postgres (PostgreSQL) 15.18 (Debian 15.18-0+deb12u1)", 15),
            ("postgres (PostgreSQL) 17rc1", 17),
            ("postgres (PostgreSQL) 18beta2", 18),
            ("postgres (PostgreSQL) 14.20 (Homebrew)", 14),
            ("postgres (PostgreSQL) 9.6.24", 9),
        ] {
            let version = version_in(line).unwrap();
            assert_eq!(major_in(&version), Some(major), "{line}");
        }
        assert_eq!(version_in("command not found"), None);
        assert_eq!(major_in("devel"), None);
    }

    #[test]
    fn newest_comes_first_and_each_installation_once() {
        let root = tempfile::tempdir().unwrap();
        let old = fake(root.path(), "15/bin", "15.2", BOTH);
        let new = fake(root.path(), "18/bin", "18.0", BOTH);
        let link = root.path().join("link");
        std::os::unix::fs::symlink(&old, &link).unwrap();
        let found = Places {
            path: Some(env::join_paths([&old, &link]).unwrap()),
            patterns: vec![("Debian", format!("{}/*/bin", root.path().display()))],
            ..Places::default()
        }
        .search();
        let dirs: Vec<_> = found.iter().map(|one| (one.major, &one.bin_dir)).collect();
        assert_eq!(dirs, [(18, &new), (15, &old)]);
        assert_eq!(found[1].source, "PATH");
    }

    #[test]
    fn the_override_hides_all_other_places() {
        let root = tempfile::tempdir().unwrap();
        let mine = fake(root.path(), "mine", "16.1", BOTH);
        let other = fake(root.path(), "other", "17.1", BOTH);
        let found = Places {
            only: Some(mine.clone().into()),
            path: Some(other.into()),
            patterns: Vec::new(),
        }
        .search();
        assert_eq!(found.len(), 1);
        assert_eq!(found[0].bin_dir, mine);
    }

    #[test]
    fn a_folder_without_initdb_or_with_broken_programs_is_skipped() {
        let root = tempfile::tempdir().unwrap();
        let half = fake(root.path(), "half", "16.1", &["postgres"]);
        let broken = root.path().join("broken");
        std::fs::create_dir(&broken).unwrap();
        for program in BOTH {
            std::os::unix::fs::symlink("/bin/false", broken.join(program)).unwrap();
        }
        let places = Places {
            only: Some(env::join_paths([&half, &broken]).unwrap()),
            ..Places::default()
        };
        assert_eq!(places.search(), []);
    }

    #[test]
    fn the_version_asked_for_or_an_error_that_lists_what_there_is() {
        let one = |major: u32| Installed {
            major,
            version_text: format!("{major}.1"),
            bin_dir: format!("/pg/{major}/bin").into(),
            source: "PATH",
        };
        let all = || vec![one(19), one(17), one(12)];
        assert_eq!(choose_from(all(), Some(17)).unwrap().1, 17);
        assert_eq!(choose_from(all(), None).unwrap().1, 17);
        let Err(RuntimeError::NoServer { message, hint }) = choose_from(all(), Some(16)) else {
            panic!("16 is not there");
        };
        assert!(
            message.contains("PostgreSQL 16") && message.contains("17.1 in /pg/17/bin"),
            "{message}"
        );
        assert!(hint.contains("DBRANCH_PG_BIN"), "{hint}");
        assert!(choose_from(Vec::new(), None).is_err());
    }
}
