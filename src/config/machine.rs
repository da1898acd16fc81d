//! What this machine decides: how volumes are made, how postgres runs, where the pool is.

use std::ffi::OsString;
use std::fmt;
use std::fs;
use std::io::ErrorKind;
use std::path::PathBuf;
use std::str::FromStr;

use serde::Deserialize;

use super::json::{Key, Source};
use super::{ConfigError, Paths};
use crate::types::Invalid;

/// The word that leaves a choice to dbranch.
const AUTO: &str = "auto";

const KEYS: &[Key] = &[
    Key {
        path: "storage",
        allowed: "\"auto\" or a storage driver's name such as \"btrfs\" or \"copy\" (default \"auto\")",
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

impl Setting<String> {
    /// The choice made; none when it is `auto`. The error names where the value came from.
    pub fn choice<T: FromStr<Err = Invalid>>(&self) -> Result<Option<T>, ConfigError> {
        if self.value == AUTO {
            return Ok(None);
        }
        self.value.parse().map(Some).map_err(|e: Invalid| {
            ConfigError::invalid(format!("{}: {e}", self.origin))
                .with_hint("use one of these names, or `auto`")
        })
    }
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
        for (key, value) in [("storage", &file.storage), ("runtime", &file.runtime)] {
            if value.as_deref().is_some_and(|v| v.trim().is_empty()) {
                return Err(source.reject(key, "it is empty"));
            }
        }
        if let Some(pool) = file.pool.as_ref().filter(|pool| !pool.is_absolute()) {
            let why = format!("`{}` is not a full path", pool.display());
            return Err(source.reject("pool", why));
        }

        let origin = Origin::File(path);
        let text_of = |name: &'static str, from_file: Option<String>| {
            let (value, origin) = match (variable(name).filter(|v| !v.is_empty()), from_file) {
                (Some(value), _) => {
                    let value = value.into_string().map_err(|_| {
                        ConfigError::invalid(format!("{name} is not UTF-8 text"))
                            .with_hint(format!("set {name} to `auto`, or unset it"))
                    })?;
                    (value, Origin::Variable(name))
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
            storage: text_of("DBRANCH_STORAGE", file.storage)?,
            runtime: text_of("DBRANCH_RUNTIME", file.runtime)?,
            pool,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Colour;

    impl FromStr for Colour {
        type Err = Invalid;
        fn from_str(s: &str) -> Result<Self, Invalid> {
            if s == "red" {
                Ok(Self)
            } else {
                Err(Invalid(format!("`{s}` is no colour")))
            }
        }
    }

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
    fn wrong_settings_say_where_they_stand() {
        let e = load(Some(r#"{"storge": "copy"}"#), &[]).unwrap_err();
        assert!(
            e.message.contains("config.json:1:2: unknown key `storge`"),
            "{e}"
        );
        assert_eq!(e.hint.as_deref(), Some("did you mean `storage`?"));
        assert!(load(Some(r#"{"pool": "a"}"#), &[]).is_err());
        let e = load(None, &[("DBRANCH_POOL", "a")]).unwrap_err();
        assert!(e.message.contains("DBRANCH_POOL"), "{e}");

        let machine = load(
            None,
            &[("DBRANCH_STORAGE", "blue"), ("DBRANCH_RUNTIME", "red")],
        )
        .unwrap();
        let e = machine.storage.choice::<Colour>().err().unwrap();
        assert_eq!(e.message, "DBRANCH_STORAGE: `blue` is no colour");
        assert!(machine.runtime.choice::<Colour>().unwrap().is_some());
    }
}
