//! `.dbranch.config.json`: what a team shares, committed with the code.

use std::collections::BTreeMap;
use std::fs;
use std::io::ErrorKind;
use std::path::Path;
use std::time::Duration;

use glob::{MatchOptions, Pattern};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use super::json::Source;
use super::rules::KEYS;
use super::{ConfigError, ConfigErrorKind, values};
use crate::types::BranchName;

/// The file's name, at the top of the repository.
pub const FILE_NAME: &str = ".dbranch.config.json";

/// The whole file, checked.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ProjectConfig {
    pub name: String,
    /// Where applications connect.
    #[serde(default = "default_proxy_port")]
    pub proxy_port: u16,
    /// Where the browser connects; none: no page.
    #[serde(default)]
    pub api_port: Option<u16>,
    /// The branches' own ports, both ends included.
    #[serde(default = "default_port_min")]
    pub port_min: u16,
    #[serde(default = "default_port_max")]
    pub port_max: u16,
    #[serde(default)]
    pub postgres: PostgresConfig,
    #[serde(default)]
    pub git: GitConfig,
    /// Whether the main port shows a client the branch of the linked worktree it works in.
    #[serde(default = "default_route_by_process")]
    pub route_by_process: bool,
    /// How long an open transaction may hold back a switch.
    #[serde(
        default = "default_switch_grace",
        deserialize_with = "values::duration"
    )]
    pub switch_grace: Duration,
    #[serde(default)]
    pub commands: Commands,
}

#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct PostgresConfig {
    /// Major version; none: the newest found.
    pub version: Option<u32>,
    /// Docker only; none: `postgres:<version>`.
    pub image: Option<String>,
    pub user: String,
    pub database: String,
    pub locale: String,
    /// In the order of their names, values as text.
    #[serde(deserialize_with = "values::settings")]
    pub settings: BTreeMap<String, String>,
    /// Bytes, per instance.
    #[serde(rename = "memory", deserialize_with = "values::size")]
    pub memory_bytes: Option<u64>,
    /// Processors, per instance.
    pub cpus: Option<f64>,
}

impl Default for PostgresConfig {
    fn default() -> Self {
        Self {
            version: None,
            image: None,
            user: "app".into(),
            database: "app".into(),
            locale: "C.UTF-8".into(),
            settings: BTreeMap::new(),
            memory_bytes: None,
            cpus: None,
        }
    }
}

#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct GitConfig {
    /// Patterns of the git branches that get a database.
    pub branches: Vec<String>,
    /// Patterns of those that don't after all.
    pub ignore: Vec<String>,
    pub detached_head: DetachedHead,
}

impl Default for GitConfig {
    fn default() -> Self {
        Self {
            branches: vec!["*".into()],
            ignore: Vec::new(),
            detached_head: DetachedHead::Stay,
        }
    }
}

/// What the endpoint does on a detached HEAD.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum DetachedHead {
    #[default]
    Stay,
}

/// Shell commands of the repository. They run only once the user has allowed their content.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Commands {
    pub after_create: Vec<String>,
    pub after_switch: Vec<String>,
}

impl Commands {
    pub fn is_empty(&self) -> bool {
        self.after_create.is_empty() && self.after_switch.is_empty()
    }
}

fn default_proxy_port() -> u16 {
    15432
}

fn default_port_min() -> u16 {
    15500
}

fn default_port_max() -> u16 {
    17499
}

fn default_route_by_process() -> bool {
    true
}

fn default_switch_grace() -> Duration {
    Duration::from_secs(30)
}

impl ProjectConfig {
    /// A config of defaults.
    pub fn new(name: impl Into<String>) -> Self {
        Self {
            name: name.into(),
            proxy_port: default_proxy_port(),
            api_port: None,
            port_min: default_port_min(),
            port_max: default_port_max(),
            postgres: PostgresConfig::default(),
            git: GitConfig::default(),
            route_by_process: default_route_by_process(),
            switch_grace: default_switch_grace(),
            commands: Commands::default(),
        }
    }

    /// Reads and checks the file's text; `file_name` is for messages.
    pub fn parse(text: &str, file_name: &str) -> Result<Self, ConfigError> {
        let source = Source {
            // Some editors begin a file with a byte order mark.
            text: text.strip_prefix('\u{feff}').unwrap_or(text),
            file: file_name,
            keys: KEYS,
        };
        let config: Self = source.read()?;
        config.check(&source)?;
        Ok(config)
    }

    /// Reads and checks a file. [`ConfigError::is_missing`] tells when there is none.
    pub fn load(path: &Path) -> Result<Self, ConfigError> {
        let text = fs::read_to_string(path).map_err(|e| match e.kind() {
            ErrorKind::NotFound => ConfigError {
                kind: ConfigErrorKind::Missing(path.into()),
                message: format!("there is no {}", path.display()),
                hint: Some("make it with `dbranch init`".into()),
            },
            ErrorKind::InvalidData => {
                ConfigError::invalid(format!("{} is not UTF-8 text", path.display()))
                    .with_hint("save it as UTF-8")
            }
            _ => {
                ConfigError::io("read", path, &e).with_hint("make the file readable for your user")
            }
        })?;
        Self::parse(&text, &path.display().to_string())
    }

    /// Whether a git branch of this name gets a database.
    pub fn matches(&self, branch: &BranchName) -> bool {
        let any = |patterns: &[String]| {
            patterns
                .iter()
                .filter_map(|p| Pattern::new(p).ok())
                .any(|p| p.matches_with(branch.as_str(), PATTERN_OPTIONS))
        };
        any(&self.git.branches) && !any(&self.git.ignore)
    }

    /// SHA-256 of the commands' content, hexadecimal: what `dbranch allow` allows.
    pub fn commands_digest(&self) -> String {
        let content = serde_json::to_vec(&self.commands).expect("strings are JSON");
        values::hex(&Sha256::digest(content))
    }

    /// The text of a new file: the keys a team will want to see.
    pub fn to_json(&self) -> String {
        let file = NewFile {
            name: &self.name,
            proxy_port: self.proxy_port,
            postgres: NewPostgres {
                version: self.postgres.version,
                image: self.postgres.image.as_deref(),
                user: &self.postgres.user,
                database: &self.postgres.database,
            },
        };
        serde_json::to_string_pretty(&file).expect("strings and numbers are JSON") + "\n"
    }
}

/// `*` matches `/` too, and case counts, as it does for git.
const PATTERN_OPTIONS: MatchOptions = MatchOptions {
    case_sensitive: true,
    require_literal_separator: false,
    require_literal_leading_dot: false,
};

#[derive(Serialize)]
struct NewFile<'a> {
    name: &'a str,
    proxy_port: u16,
    postgres: NewPostgres<'a>,
}

#[derive(Serialize)]
struct NewPostgres<'a> {
    #[serde(skip_serializing_if = "Option::is_none")]
    version: Option<u32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    image: Option<&'a str>,
    user: &'a str,
    database: &'a str,
}

#[cfg(test)]
mod tests {
    use super::super::rules::{check_name, name_from};
    use super::*;

    fn parse(text: &str) -> Result<ProjectConfig, ConfigError> {
        ProjectConfig::parse(text, "c.json")
    }

    fn refusal(text: &str) -> (String, String) {
        let e = parse(text).expect_err(text);
        (e.message, e.hint.unwrap_or_default())
    }

    #[test]
    fn a_name_is_enough() {
        assert_eq!(
            parse(r#"{"name": "shop"}"#).unwrap(),
            ProjectConfig::new("shop")
        );
        assert_eq!(
            parse("\u{feff}{\"name\": \"shop\"}").unwrap().proxy_port,
            15432
        );
    }

    #[test]
    fn an_unknown_key_is_named_with_its_place_and_the_nearest_known_one() {
        let (message, hint) =
            refusal("{\n  \"name\": \"a\",\n  \"postgres\": {\n    \"verison\": 15\n  }\n}");
        assert_eq!(
            message,
            "c.json, line 4, column 5: unknown key `postgres.verison`"
        );
        assert_eq!(hint, "did you mean `version`?");
        let (message, hint) = refusal("{\"name\": \"a\", \"colour\": 1}");
        assert_eq!(message, "c.json, line 1, column 15: unknown key `colour`");
        assert!(
            hint.starts_with("the keys there are name, proxy_port,"),
            "{hint}"
        );
        let (message, _) = refusal("{\"name\": \"a\", \"git\": {\"x\": 1}}");
        assert_eq!(message, "c.json, line 1, column 23: unknown key `git.x`");
    }

    #[test]
    #[expect(clippy::too_many_lines, reason = "a table")]
    fn a_wrong_value_is_named_with_its_place_and_what_is_allowed() {
        for (text, says, allows) in [
            (
                r#"{"name": "a", "proxy_port": "x"}"#,
                "c.json, line 1, column 15: `proxy_port`: invalid type",
                "`proxy_port` is the port",
            ),
            (
                r#"{"name": "a", "proxy_port": 70000}"#,
                "c.json, line 1, column 15: `proxy_port`: invalid value",
                "`proxy_port` is the port",
            ),
            (
                r#"{"name": "a", "proxy_port": 0}"#,
                "c.json, line 1, column 15: `proxy_port`: 0 is no port",
                "1 to 65535",
            ),
            (
                r#"{"name": "a", "proxy_port": 15600}"#,
                "`proxy_port`: 15600 lies among",
                "outside of",
            ),
            (
                r#"{"name": "a", "port_min": 9, "port_max": 8}"#,
                "`port_min`: 9 is above port_max, 8",
                "first",
            ),
            (
                r#"{"name": "a", "api_port": 15432}"#,
                "`api_port`: it is the proxy_port",
                "browser",
            ),
            (
                r#"{"name": ""}"#,
                "c.json, line 1, column 2: `name`: it is empty",
                "1 to 63",
            ),
            (
                r#"{"name": "a/b"}"#,
                "`name`: '/' is not allowed in it",
                "letters",
            ),
            (
                r#"{"name": "a", "postgres": {"version": 12}}"#,
                "c.json, line 1, column 28: `postgres.version`: 12 is not supported",
                "13 to 18",
            ),
            (
                r#"{"name": "a", "postgres": {"user": "pg_x"}}"#,
                "`postgres.user`",
                "63 bytes",
            ),
            (
                r#"{"name": "a", "postgres": {"database": "a@b"}}"#,
                "`postgres.database`",
                "without `@`",
            ),
            (
                r#"{"name": "a", "postgres": {"memory": "512"}}"#,
                "`postgres.memory`: `512` is no size",
                "\"512MB\"",
            ),
            (
                r#"{"name": "a", "postgres": {"memory": "1MB"}}"#,
                "`postgres.memory`: 1048576 bytes",
                "64MB",
            ),
            (
                r#"{"name": "a", "postgres": {"cpus": 0}}"#,
                "`postgres.cpus`: 0 is out of range",
                "above 0",
            ),
            (
                r#"{"name": "a", "postgres": {"settings": {"port": 1}}}"#,
                "c.json, line 1, column 41: `postgres.settings.port`: dbranch sets it",
                "own settings",
            ),
            (
                r#"{"name": "a", "postgres": {"settings": {"a b": 1}}}"#,
                "`postgres.settings.a b`: it is no name",
                "own settings",
            ),
            (
                r#"{"name": "a", "postgres": {"settings": {"work_mem": []}}}"#,
                "`postgres.settings.work_mem`: invalid type",
                "a string, a number or a boolean",
            ),
            (
                r#"{"name": "a", "git": {"ignore": ["ok", "[a"]}}"#,
                "c.json, line 1, column 40: `git.ignore.1`: `[a` is no pattern",
                "patterns",
            ),
            (
                r#"{"name": "a", "git": {"branches": "main"}}"#,
                "`git.branches`: invalid type",
                "an array of patterns",
            ),
            (
                r#"{"name": "a", "git": {"detached_head": "follow"}}"#,
                "`git.detached_head`: unknown variant `follow`",
                "\"stay\"",
            ),
            (
                r#"{"name": "a", "switch_grace": "soon"}"#,
                "`switch_grace`: `soon` is no duration",
                "0s to 1h",
            ),
            (
                r#"{"name": "a", "switch_grace": "2h"}"#,
                "`switch_grace`: it is more than 1h",
                "0s to 1h",
            ),
            (
                r#"{"name": "a", "commands": {"after_create": [" "]}}"#,
                "`commands.after_create.0`: it is no command",
                "shell commands",
            ),
            ("{}", "the key `name` is missing", "the project's name"),
        ] {
            let (message, hint) = refusal(text);
            assert!(message.contains(says), "{text}\n{message}");
            assert!(hint.contains(allows), "{text}\n{hint}");
            assert!(message.starts_with("c.json, line "), "{message}");
        }
    }

    #[test]
    fn what_is_not_json_is_refused_with_its_place() {
        for (text, says) in [
            ("", "c.json is empty"),
            (
                "{\"name\": \"a\",\n}",
                "c.json, line 2, column 1: not JSON: trailing comma",
            ),
            (
                "{\"name\": \"a\"} x",
                "c.json, line 1, column 15: not JSON: trailing characters",
            ),
            (
                "{\"name\": \"a\"",
                "c.json, line 1, column 12: not JSON: EOF",
            ),
            ("[]", "c.json"),
        ] {
            let (message, hint) = refusal(text);
            assert!(message.contains(says), "{text}: {message}");
            assert!(!hint.is_empty(), "{text}");
        }
    }

    #[test]
    fn patterns_decide_which_git_branch_gets_a_database() {
        let config = parse(
            r#"{"name": "a", "git": {"branches": ["main", "feature/*"], "ignore": ["*/tmp-*"]}}"#,
        )
        .unwrap();
        let matches = |name: &str| config.matches(&BranchName::new(name).unwrap());
        assert!(matches("main") && matches("feature/a/b"));
        assert!(!matches("Main") && !matches("other") && !matches("feature/tmp-1"));
        assert!(ProjectConfig::new("a").matches(&BranchName::new("a/b/c").unwrap()));
    }

    #[test]
    fn the_digest_changes_with_the_commands_only() {
        let of = |text: &str| parse(text).unwrap().commands_digest();
        let plain = of(r#"{"name": "a"}"#);
        assert_eq!(plain, of(r#"{"name": "b", "proxy_port": 1}"#));
        let create = of(r#"{"name": "a", "commands": {"after_create": ["x"]}}"#);
        assert_ne!(plain, create);
        assert_ne!(
            create,
            of(r#"{"name": "a", "commands": {"after_switch": ["x"]}}"#)
        );
        assert_eq!(create.len(), 64);
    }

    #[test]
    fn what_init_writes_reads_back() {
        let mut config = ProjectConfig::new("shop");
        config.proxy_port = 15440;
        config.postgres.version = Some(15);
        assert_eq!(parse(&config.to_json()).unwrap(), config);
    }

    #[test]
    fn settings_become_text() {
        let config = parse(
            r#"{"name": "a", "postgres": {"settings": {"work_mem": "8MB", "max_connections": 50, "jit": false, "pg_stat_statements.track": "all"}}}"#,
        )
        .unwrap();
        let values: Vec<&str> = config
            .postgres
            .settings
            .values()
            .map(String::as_str)
            .collect();
        assert_eq!(values, ["off", "50", "all", "8MB"]);
    }

    #[test]
    fn names_of_folders_become_names_of_projects() {
        for (folder, name) in [
            ("my-app", "my-app"),
            (".dotfiles", "dotfiles"),
            ("a:b", "a-b"),
            ("§", "project"),
        ] {
            assert_eq!(name_from(folder), name);
            assert_eq!(check_name(&name_from(folder)), Ok(()));
        }
    }

    #[test]
    fn the_example_file_holds_every_key_and_reads() {
        let text = include_str!("../../.dbranch.config.example.json");
        parse(text).unwrap();
        let value: serde_json::Value = serde_json::from_str(text).unwrap();
        for key in KEYS {
            let pointer = format!("/{}", key.path.replace('.', "/"));
            assert!(
                value.pointer(&pointer).is_some(),
                "{} is missing in the example",
                key.path
            );
        }
    }

    #[test]
    fn a_file_that_is_not_there_is_told_apart() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join(FILE_NAME);
        assert!(ProjectConfig::load(&path).unwrap_err().is_missing());
        fs::write(&path, [0xff, 0xfe]).unwrap();
        let e = ProjectConfig::load(&path).unwrap_err();
        assert!(!e.is_missing() && e.message.contains("UTF-8"), "{e}");
    }
}
