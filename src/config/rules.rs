//! What the project's file may hold: its keys, and the checks a type can't make.

use std::time::Duration;

use glob::Pattern;

use super::ConfigError;
use super::json::{Key, Source};
use super::project::{PostgresConfig, ProjectConfig};

const NAME_MAX_CHARS: usize = 63;
/// PostgreSQL's `NAMEDATALEN` less one (manual, section 4.1.1).
const IDENTIFIER_MAX_BYTES: usize = 63;
const SWITCH_GRACE_MAX: Duration = Duration::from_secs(60 * 60);
const VERSIONS: std::ops::RangeInclusive<u32> = 13..=18;
const MEMORY_MIN_BYTES: u64 = 64 << 20;

/// Settings that make a branch reachable or say where its files are. dbranch sets them.
const MANAGED_SETTINGS: [&str; 10] = [
    "config_file",
    "data_directory",
    "external_pid_file",
    "hba_file",
    "ident_file",
    "listen_addresses",
    "port",
    "unix_socket_directories",
    "unix_socket_group",
    "unix_socket_permissions",
];

/// Every key of the file. A test holds the example file against it.
pub(super) const KEYS: &[Key] = &[
    key(
        "name",
        "the project's name: 1 to 63 letters, digits, spaces, `-`, `_` or `.`",
    ),
    key(
        "proxy_port",
        "the port applications connect to, 1 to 65535 and outside of port_min..port_max (default 15432)",
    ),
    key(
        "api_port",
        "the port of the browser's page, 1 to 65535 (default: none)",
    ),
    key(
        "port_min",
        "the first of the branches' own ports, 1 to 65535 (default 15500)",
    ),
    key(
        "port_max",
        "the last of the branches' own ports, port_min to 65535 (default 17499)",
    ),
    key(
        "postgres.version",
        "a major version from 13 to 18 (default: the newest found)",
    ),
    key(
        "postgres.image",
        "a Docker image such as \"postgres:18\" (default: the official one of the version)",
    ),
    key(
        "postgres.user",
        "the role applications use, at most 63 bytes and not beginning with `pg_` (default \"app\")",
    ),
    key(
        "postgres.database",
        "the database applications use, at most 63 bytes and without `@` (default \"app\")",
    ),
    key(
        "postgres.locale",
        "a locale name of the server's system (default \"C.UTF-8\")",
    ),
    key(
        "postgres.settings",
        "an object of postgres' own settings, each a string, a number or a boolean; where files lie and what is listened on is dbranch's",
    ),
    key(
        "postgres.memory",
        "a size of at least 64MB such as \"512MB\" or \"2GB\" (default: no limit)",
    ),
    key(
        "postgres.cpus",
        "a number of processors above 0 such as 1.5 (default: no limit)",
    ),
    key(
        "git.branches",
        "an array of patterns; a git branch that matches one gets a database (default [\"*\"]; `*` matches `/` too)",
    ),
    key(
        "git.ignore",
        "an array of patterns; a git branch that matches one gets no database (default none)",
    ),
    key(
        "git.detached_head",
        "\"stay\": on a detached HEAD the database stays on the last branch",
    ),
    key(
        "route_by_process",
        "true or false: whether a program that runs in a linked worktree reaches that worktree's branch on the main port too (default true)",
    ),
    key(
        "switch_grace",
        "a duration from 0s to 1h such as \"30s\": how long an open transaction may hold back a switch (default 30s)",
    ),
    key(
        "commands.after_create",
        "an array of shell commands, run in the new branch's worktree once you have allowed them (default none)",
    ),
    key(
        "commands.after_switch",
        "an array of shell commands, run in the worktree once you have allowed them (default none)",
    ),
];

const fn key(path: &'static str, allowed: &'static str) -> Key {
    Key { path, allowed }
}

impl ProjectConfig {
    pub(super) fn check(&self, source: &Source<'_>) -> Result<(), ConfigError> {
        if let Err(why) = check_name(&self.name) {
            return Err(source.reject("name", why));
        }
        for (path, port) in [
            ("proxy_port", Some(self.proxy_port)),
            ("api_port", self.api_port),
            ("port_min", Some(self.port_min)),
            ("port_max", Some(self.port_max)),
        ] {
            if port == Some(0) {
                return Err(source.reject(path, "0 is no port"));
            }
        }
        if self.port_min > self.port_max {
            let why = format!("{} is above port_max, {}", self.port_min, self.port_max);
            return Err(source.reject("port_min", why));
        }
        let range = self.port_min..=self.port_max;
        for (path, port) in [
            ("proxy_port", Some(self.proxy_port)),
            ("api_port", self.api_port),
        ] {
            if let Some(port) = port.filter(|port| range.contains(port)) {
                let why = format!(
                    "{port} lies among the branches' own ports, {}..{}",
                    self.port_min, self.port_max
                );
                return Err(source.reject(path, why));
            }
        }
        if self.api_port == Some(self.proxy_port) {
            return Err(source.reject("api_port", "it is the proxy_port already"));
        }
        if self.switch_grace > SWITCH_GRACE_MAX {
            return Err(source.reject("switch_grace", "it is more than 1h"));
        }
        self.postgres.check(source)?;
        for (path, patterns) in [
            ("git.branches", &self.git.branches),
            ("git.ignore", &self.git.ignore),
        ] {
            for (i, pattern) in patterns.iter().enumerate() {
                if let Err(e) = Pattern::new(pattern) {
                    let why = format!("`{pattern}` is no pattern: {}", e.msg);
                    return Err(source.reject(&format!("{path}.{i}"), why));
                }
            }
        }
        for (path, commands) in [
            ("commands.after_create", &self.commands.after_create),
            ("commands.after_switch", &self.commands.after_switch),
        ] {
            if let Some(i) = commands
                .iter()
                .position(|c| c.trim().is_empty() || c.contains('\0'))
            {
                return Err(source.reject(&format!("{path}.{i}"), "it is no command"));
            }
        }
        Ok(())
    }
}

impl PostgresConfig {
    fn check(&self, source: &Source<'_>) -> Result<(), ConfigError> {
        let reject = |key: &str, why: String| Err(source.reject(&format!("postgres.{key}"), why));
        if let Some(version) = self.version
            && !VERSIONS.contains(&version)
        {
            return reject("version", format!("{version} is not supported"));
        }
        if let Err(why) = check_identifier(&self.user) {
            return reject("user", why);
        }
        // CREATE ROLE refuses names that begin so (PostgreSQL manual, CREATE ROLE).
        if self.user.starts_with("pg_") {
            return reject("user", format!("postgres keeps `{}` for itself", self.user));
        }
        if let Err(why) = check_identifier(&self.database) {
            return reject("database", why);
        }
        // `app@feature/login` asks the proxy for a branch by name.
        if self.database.contains('@')
            || ["template0", "template1"].contains(&self.database.as_str())
        {
            return reject("database", format!("`{}` can't be used", self.database));
        }
        if self.locale.is_empty()
            || self
                .locale
                .contains(|c: char| c.is_control() || c.is_whitespace())
        {
            return reject("locale", format!("{:?} is no locale name", self.locale));
        }
        if let Some(image) = &self.image
            && (image.is_empty() || image.contains(|c: char| c.is_control() || c.is_whitespace()))
        {
            return reject("image", format!("{image:?} is no image name"));
        }
        for (name, value) in &self.settings {
            if let Err(why) = check_setting(name, value) {
                return Err(source.reject(&format!("postgres.settings.{name}"), why));
            }
        }
        if let Some(bytes) = self.memory_bytes.filter(|bytes| *bytes < MEMORY_MIN_BYTES) {
            return reject("memory", format!("{bytes} bytes are too few for postgres"));
        }
        match self.cpus {
            Some(cpus) if !(cpus > 0.0 && cpus <= 1024.0) => {
                reject("cpus", format!("{cpus} is out of range"))
            }
            _ => Ok(()),
        }
    }
}

pub(super) fn check_name(name: &str) -> Result<(), String> {
    if name.is_empty() {
        return Err("it is empty".into());
    }
    if name.chars().count() > NAME_MAX_CHARS {
        return Err(format!("it is longer than {NAME_MAX_CHARS} characters"));
    }
    if !name.starts_with(char::is_alphanumeric) {
        return Err("it does not begin with a letter or digit".into());
    }
    match name
        .chars()
        .find(|c| !(c.is_alphanumeric() || " -_.".contains(*c)))
    {
        Some(c) => Err(format!("{c:?} is not allowed in it")),
        None => Ok(()),
    }
}

fn check_identifier(name: &str) -> Result<(), String> {
    if name.is_empty() {
        return Err("it is empty".into());
    }
    if name.len() > IDENTIFIER_MAX_BYTES {
        return Err(format!(
            "it has {} bytes, {IDENTIFIER_MAX_BYTES} are allowed",
            name.len()
        ));
    }
    match name.chars().find(|c| c.is_control()) {
        Some(c) => Err(format!("{c:?} is not allowed in it")),
        None => Ok(()),
    }
}

/// The name as PostgreSQL's configuration file takes it (guc-file.l: `ID` and `QUALIFIED_ID`).
fn check_setting(name: &str, value: &str) -> Result<(), String> {
    let part_fits = |part: &str| {
        part.starts_with(|c: char| c.is_ascii_alphabetic() || c == '_')
            && part
                .chars()
                .all(|c| c.is_ascii_alphanumeric() || c == '_' || c == '$')
    };
    let mut parts = name.split('.');
    if !parts.clone().all(part_fits) || parts.by_ref().count() > 2 {
        return Err("it is no name of a setting".into());
    }
    if MANAGED_SETTINGS.contains(&name.to_ascii_lowercase().as_str()) {
        return Err("dbranch sets it itself".into());
    }
    if value.contains(['\0', '\n', '\r']) {
        return Err("its value has more than one line".into());
    }
    Ok(())
}

/// A project name made from a folder's name.
pub fn name_from(folder: &str) -> String {
    let name: String = folder
        .chars()
        .map(|c| {
            if c.is_alphanumeric() || " -_.".contains(c) {
                c
            } else {
                '-'
            }
        })
        .skip_while(|c| !c.is_alphanumeric())
        .take(NAME_MAX_CHARS)
        .collect();
    if name.is_empty() {
        "project".into()
    } else {
        name
    }
}
