//! What this machine decides: how volumes are made, how postgres runs, where the pool is.

use std::ffi::OsString;
use std::fmt;
use std::fs;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use serde::Deserialize;
use serde_json::{Map, Value};

use super::json::{Key, Source};
use super::{ConfigError, Paths};
use crate::fsx::write_atomic;

/// The word that leaves a choice to dbranch.
const AUTO: &str = "auto";
/// The names of the storage drivers and of the runtimes. They stand here, and not only in those
/// rooms, so that a wrong one is an error of the setting, with its place.
const STORAGE: &[&str] = &[AUTO, "btrfs", "zfs", "reflink", "copy"];
const RUNTIME: &[&str] = &[AUTO, "docker", "native"];

const KEYS: &[Key] = &[
    Key {
        path: "storage",
        allowed: "\"auto\", \"btrfs\", \"zfs\", \"reflink\" or \"copy\" (default \"auto\")",
    },
    Key {
        path: "runtime",
        allowed: "\"auto\", \"docker\" or \"native\" (default \"auto\")",
    },
    Key {
        path: "pool",
        allowed: "a folder's full path (default: beside dbranch's other data)",
    },
];

/// Where a value came from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Origin {
    Default,
    File(PathBuf),
    Variable(&'static str),
}

impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Default => f.write_str("default"),
            Self::File(path) => write!(f, "{}", path.display()),
            Self::Variable(name) => f.write_str(name),
        }
    }
}

/// A value, and where it came from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Setting<T> {
    pub value: T,
    pub origin: Origin,
}

/// This machine's settings.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Machine {
    /// `auto` or a driver's name.
    pub storage: Setting<String>,
    /// `auto` or a runtime's name.
    pub runtime: Setting<String>,
    /// The folder that holds the volumes; none: [`Paths::default_pool`].
    pub pool: Setting<Option<PathBuf>>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct File {
    storage: Option<String>,
    runtime: Option<String>,
    pool: Option<PathBuf>,
}

impl Machine {
    /// Reads the machine's file, if there is one, and `DBRANCH_STORAGE`, `DBRANCH_RUNTIME`
    /// and `DBRANCH_POOL`, which win.
    pub fn load(paths: &Paths) -> Result<Self, ConfigError> {
        Self::load_with(paths, |name| std::env::var_os(name))
    }

    /// The pool that the machine's file names, whatever variables say.
    pub fn pool_in_file(paths: &Paths) -> Result<Option<PathBuf>, ConfigError> {
        Ok(Self::load_with(paths, |_| None)?.pool.value)
    }

    /// Writes the pool into the machine's file, or with `None` takes it out; all else stays.
    /// Whatever is wrong with the file is an error, and then it is not touched.
    pub fn save_pool(paths: &Paths, pool: Option<&Path>) -> Result<(), ConfigError> {
        // Without the variables: they are not the file's.
        Self::load_with(paths, |_| None)?;
        let path = paths.machine_file();
        let text = match fs::read_to_string(&path) {
            Ok(text) => text,
            Err(e) if e.kind() == ErrorKind::NotFound => "{}".into(),
            Err(e) => return Err(ConfigError::io("read", &path, &e)),
        };
        let mut settings: Map<String, Value> = serde_json::from_str(&text)
            .map_err(|e| ConfigError::invalid(format!("{}: {e}", path.display())))?;
        match pool {
            Some(pool) => settings.insert("pool".into(), pool.display().to_string().into()),
            None => settings.remove("pool"),
        };
        let text = format!("{:#}\n", Value::Object(settings));
        write_atomic(&path, text.as_bytes(), 0o600, None)
            .map_err(|e| ConfigError::io("write", &path, &e))
    }

    fn load_with(
        paths: &Paths,
        variable: impl Fn(&str) -> Option<OsString>,
    ) -> Result<Self, ConfigError> {
        let path = paths.machine_file();
        let name = path.display().to_string();
        let text = match fs::read_to_string(&path) {
            Ok(text) => text,
            Err(e) if e.kind() == ErrorKind::NotFound => "{}".into(),
            Err(e) => return Err(ConfigError::io("read", &path, &e)),
        };
        let source = Source {
            text: &text,
            file: &name,
            keys: KEYS,
        };
        let file: File = source.read()?;
        for (key, value, names) in [
            ("storage", &file.storage, STORAGE),
            ("runtime", &file.runtime, RUNTIME),
        ] {
            if let Some(value) = value.as_deref().filter(|v| !names.contains(v)) {
                return Err(source.reject(key, format!("there is no `{value}`")));
            }
        }
        if let Some(pool) = file.pool.as_ref().filter(|pool| !pool.is_absolute()) {
            let why = format!("`{}` is not a full path", pool.display());
            return Err(source.reject("pool", why));
        }

        let origin = Origin::File(path);
        let choice = |name: &'static str, from_file: Option<String>, names: &[&str]| {
            let (value, origin) = match (variable(name).filter(|v| !v.is_empty()), from_file) {
                (Some(value), _) => {
                    let known = value.to_str().filter(|v| names.contains(v));
                    let value = known.ok_or_else(|| {
                        let value = value.to_string_lossy();
                        ConfigError::invalid(format!("{name}: there is no `{value}`"))
                            .with_hint(format!("set {name} to {}", names.join(", ")))
                    })?;
                    (value.to_owned(), Origin::Variable(name))
                }
                (None, Some(value)) => (value, origin.clone()),
                (None, None) => (AUTO.to_owned(), Origin::Default),
            };
            Ok(Setting { value, origin })
        };
        let pool = match (
            variable("DBRANCH_POOL").filter(|v| !v.is_empty()),
            file.pool,
        ) {
            (Some(value), _) => {
                let pool = PathBuf::from(value);
                if !pool.is_absolute() {
                    return Err(ConfigError::invalid(format!(
                        "DBRANCH_POOL is `{}`, which is not a full path",
                        pool.display()
                    ))
                    .with_hint("set DBRANCH_POOL to a folder's full path, or unset it"));
                }
                Setting {
                    value: Some(pool),
                    origin: Origin::Variable("DBRANCH_POOL"),
                }
            }
            (None, Some(pool)) => Setting {
                value: Some(pool),
                origin: origin.clone(),
            },
            (None, None) => Setting {
                value: None,
                origin: Origin::Default,
            },
        };
        Ok(Self {
            storage: choice("DBRANCH_STORAGE", file.storage, STORAGE)?,
            runtime: choice("DBRANCH_RUNTIME", file.runtime, RUNTIME)?,
            pool,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn load(file: Option<&str>, variables: &[(&str, &str)]) -> Result<Machine, ConfigError> {
        let dir = tempfile::tempdir().unwrap();
        let paths = Paths::under(dir.path());
        paths.create().unwrap();
        if let Some(text) = file {
            fs::write(paths.machine_file(), text).unwrap();
        }
        Machine::load_with(&paths, |name| {
            let found = variables.iter().find(|(n, _)| *n == name);
            found.map(|(_, value)| value.into())
        })
    }

    #[test]
    fn without_file_and_variables_all_is_auto() {
        let machine = load(None, &[]).unwrap();
        assert_eq!(
            (machine.storage.value.as_str(), machine.storage.origin),
            ("auto", Origin::Default)
        );
        assert_eq!(machine.pool.value, None);
        assert_eq!(
            load(Some("{}"), &[("DBRANCH_POOL", "")])
                .unwrap()
                .pool
                .value,
            None
        );
    }

    #[test]
    fn variables_win_over_the_file_and_each_value_knows_where_it_came_from() {
        let file = r#"{"storage": "copy", "pool": "/a"}"#;
        let machine = load(Some(file), &[("DBRANCH_STORAGE", "btrfs")]).unwrap();
        assert_eq!(machine.storage.value, "btrfs");
        assert_eq!(machine.storage.origin, Origin::Variable("DBRANCH_STORAGE"));
        assert_eq!(machine.pool.value, Some("/a".into()));
        assert!(matches!(machine.pool.origin, Origin::File(_)));
    }

    #[test]
    fn the_pool_is_written_beside_the_other_settings() {
        let dir = tempfile::tempdir().unwrap();
        let paths = Paths::under(dir.path());
        paths.create().unwrap();
        Machine::save_pool(&paths, Some(Path::new("/a b"))).unwrap();
        let pool = || Machine::pool_in_file(&paths).unwrap();
        assert_eq!(pool(), Some("/a b".into()));

        fs::write(
            paths.machine_file(),
            r#"{"runtime": "native", "pool": "/x"}"#,
        )
        .unwrap();
        Machine::save_pool(&paths, Some(Path::new("/y"))).unwrap();
        assert_eq!(pool(), Some("/y".into()));
        Machine::save_pool(&paths, None).unwrap();
        assert_eq!(pool(), None);
        let machine = Machine::load_with(&paths, |_| None).unwrap();
        assert_eq!(machine.runtime.value, "native");

        let broken = r#"{"pool": "/x", "storge": "copy"}"#;
        fs::write(paths.machine_file(), broken).unwrap();
        Machine::save_pool(&paths, Some(Path::new("/y"))).unwrap_err();
        assert_eq!(fs::read_to_string(paths.machine_file()).unwrap(), broken);
    }

    #[test]
    fn wrong_settings_say_where_they_stand() {
        let e = load(Some(r#"{"storge": "copy"}"#), &[]).unwrap_err();
        assert!(
            e.message
                .contains("config.json, line 1, column 2: unknown key `storge`"),
            "{e}"
        );
        assert_eq!(e.hint.as_deref(), Some("did you mean `storage`?"));
        assert!(load(Some(r#"{"pool": "a"}"#), &[]).is_err());
        let e = load(None, &[("DBRANCH_POOL", "a")]).unwrap_err();
        assert!(e.message.contains("DBRANCH_POOL"), "{e}");

        let e = load(None, &[("DBRANCH_STORAGE", "ntfs")]).unwrap_err();
        assert_eq!(e.message, "DBRANCH_STORAGE: there is no `ntfs`");
        assert_eq!(
            e.hint.as_deref(),
            Some("set DBRANCH_STORAGE to auto, btrfs, zfs, reflink, copy")
        );
        let e = load(Some(r#"{"runtime": "podman"}"#), &[]).unwrap_err();
        assert!(e.message.contains("`runtime`: there is no `podman`"), "{e}");
    }
}
