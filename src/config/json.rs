//! Reads a JSON file into a type, with errors that name key, place and what is allowed.

use serde::de::DeserializeOwned;

use super::ConfigError;

/// One key a file may hold.
pub(super) struct Key {
    /// Dotted: `postgres.version`.
    pub(super) path: &'static str,
    /// What its value may be, as in "a port from 1 to 65535".
    pub(super) allowed: &'static str,
}

/// A file's text, its name for messages and the keys it may hold.
#[derive(Clone, Copy)]
pub(super) struct Source<'a> {
    pub(super) text: &'a str,
    pub(super) file: &'a str,
    pub(super) keys: &'static [Key],
}

impl Source<'_> {
    pub(super) fn read<T: DeserializeOwned>(&self) -> Result<T, ConfigError> {
        let mut json = serde_json::Deserializer::from_str(self.text);
        let value: T = serde_path_to_error::deserialize(&mut json).map_err(|e| {
            let path: Vec<String> = e.path().iter().map(ToString::to_string).collect();
            self.explain(&path, e.inner())
        })?;
        json.end().map_err(|e| self.explain(&[], &e))?;
        Ok(value)
    }

    /// The error of a value that reads well but isn't allowed.
    pub(super) fn reject(&self, path: &str, why: impl std::fmt::Display) -> ConfigError {
        let steps: Vec<String> = path.split('.').map(str::to_owned).collect();
        self.at(&steps, &format!("`{path}`: {why}"))
            .with_hint(self.allowed(path).unwrap_or_default())
    }

    fn explain(&self, path: &[String], e: &serde_json::Error) -> ConfigError {
        if e.is_syntax() || e.is_eof() {
            if self.text.trim().is_empty() {
                return ConfigError::invalid(format!("{} is empty", self.file))
                    .with_hint("remove it, and let `dbranch init` make a new one");
            }
            let (file, line, column) = (self.file, e.line(), e.column().max(1));
            let text = bare(e);
            return ConfigError::invalid(format!(
                "{file}, line {line}, column {column}: not JSON: {text}"
            ))
            .with_hint(
                "write it as in .dbranch.config.example.json, or let `dbranch init` make it",
            );
        }
        let text = bare(e);
        if let Some(key) = between(&text, "unknown field `") {
            return self.unknown(path, key);
        }
        if let Some(key) = between(&text, "missing field `") {
            let error = self.at(path, &format!("the key `{}` is missing", join(path, key)));
            return match self.allowed(&join(path, key)) {
                Some(allowed) => error.with_hint(allowed),
                None => error,
            };
        }
        let dotted = path.join(".");
        if dotted.is_empty() {
            return ConfigError::invalid(format!("{}: {text}", self.file))
                .with_hint("the file holds one JSON object, `{ … }`");
        }
        let error = self.at(path, &format!("`{dotted}`: {text}"));
        match self.allowed(&dotted) {
            Some(allowed) => error.with_hint(allowed),
            None => error,
        }
    }

    fn unknown(&self, path: &[String], key: &str) -> ConfigError {
        // The path may or may not end with the unknown key itself.
        let parent = match path.split_last() {
            Some((last, parent)) if last == key => parent,
            _ => path,
        };
        let mut steps = parent.to_vec();
        steps.push(key.to_owned());
        let known = self.known_under(parent);
        let error = self.at(&steps, &format!("unknown key `{}`", join(parent, key)));
        match nearest(key, &known) {
            Some(near) => error.with_hint(format!("did you mean `{near}`?")),
            None => error.with_hint(format!("the keys there are {}", known.join(", "))),
        }
    }

    fn known_under(&self, parent: &[String]) -> Vec<&'static str> {
        let prefix = parent.iter().fold(String::new(), |p, step| p + step + ".");
        let mut known: Vec<&'static str> = Vec::new();
        for key in self.keys {
            if let Some(rest) = key.path.strip_prefix(&prefix) {
                let first = rest.split('.').next().unwrap_or(rest);
                if !known.contains(&first) {
                    known.push(first);
                }
            }
        }
        known
    }

    fn allowed(&self, path: &str) -> Option<String> {
        // `settings.work_mem` is described by `settings`, `ignore.0` by `ignore`.
        let mut path = path;
        loop {
            if let Some(key) = self.keys.iter().find(|key| key.path == path) {
                return Some(format!("`{}` is {}", key.path, key.allowed));
            }
            path = path.rsplit_once(['.', '['])?.0;
        }
    }

    fn at(&self, path: &[String], what: &str) -> ConfigError {
        let place = (0..path.len())
            .rev()
            .find_map(|n| position(self.text, &path[..=n]));
        let (line, column) = place.unwrap_or((1, 1));
        ConfigError::invalid(format!(
            "{}, line {line}, column {column}: {what}",
            self.file
        ))
    }
}

fn join(path: &[String], key: &str) -> String {
    let mut steps = path.to_vec();
    steps.push(key.to_owned());
    steps.join(".")
}

/// The message without serde's own " at line 1 column 2".
fn bare(e: &serde_json::Error) -> String {
    let text = e.to_string();
    text.split(" at line ").next().unwrap_or(&text).to_owned()
}

fn between<'a>(text: &'a str, before: &str) -> Option<&'a str> {
    text.strip_prefix(before)?.split('`').next()
}

/// The known word that is fewest edits away, if that is few.
pub fn nearest<'a>(key: &str, known: &[&'a str]) -> Option<&'a str> {
    let key = key.to_lowercase().replace('-', "_");
    known
        .iter()
        .map(|k| (distance(&key, k), *k))
        .filter(|(d, k)| *d <= 1 + k.len() / 4)
        .min()
        .map(|(_, k)| k)
}

/// Levenshtein's distance.
fn distance(a: &str, b: &str) -> usize {
    let b: Vec<char> = b.chars().collect();
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, ca) in a.chars().enumerate() {
        let mut diagonal = row[0];
        row[0] = i + 1;
        for (j, cb) in b.iter().enumerate() {
            let substitute = diagonal + usize::from(ca != *cb);
            diagonal = row[j + 1];
            row[j + 1] = substitute.min(row[j] + 1).min(diagonal + 1);
        }
    }
    row[b.len()]
}

/// Line and column (from 1) of the key, or array element, at a path.
fn position(text: &str, path: &[String]) -> Option<(usize, usize)> {
    let mut scan = Scan {
        bytes: text.as_bytes(),
        at: 0,
    };
    let offset = scan.find(path)?;
    let before = &text[..offset];
    let line = before.matches('\n').count() + 1;
    let column = before.rsplit('\n').next().unwrap_or("").chars().count() + 1;
    Some((line, column))
}

/// Walks JSON whose syntax has been checked up to the place looked for.
struct Scan<'a> {
    bytes: &'a [u8],
    at: usize,
}

impl Scan<'_> {
    fn find(&mut self, path: &[String]) -> Option<usize> {
        let (step, rest) = path.split_first()?;
        let open = self.token()?;
        let mut index = 0;
        loop {
            self.skip_space();
            let start = self.at;
            let here = match open {
                b'{' => {
                    let key = self.string()?;
                    if self.token()? != b':' {
                        return None;
                    }
                    key == *step
                }
                b'[' => step.trim_matches(['[', ']']) == index.to_string(),
                _ => return None,
            };
            if here {
                return if rest.is_empty() {
                    Some(start)
                } else {
                    self.find(rest)
                };
            }
            self.value()?;
            if self.token()? != b',' {
                return None;
            }
            index += 1;
        }
    }

    fn skip_space(&mut self) {
        while self.bytes.get(self.at).is_some_and(u8::is_ascii_whitespace) {
            self.at += 1;
        }
    }

    fn token(&mut self) -> Option<u8> {
        self.skip_space();
        let byte = *self.bytes.get(self.at)?;
        self.at += 1;
        Some(byte)
    }

    fn string(&mut self) -> Option<String> {
        self.skip_space();
        let start = self.at;
        if self.token()? != b'"' {
            return None;
        }
        loop {
            match self.bytes.get(self.at)? {
                b'\\' => self.at += 2,
                b'"' => break,
                _ => self.at += 1,
            }
        }
        self.at += 1;
        serde_json::from_slice(self.bytes.get(start..self.at)?).ok()
    }

    fn value(&mut self) -> Option<()> {
        self.skip_space();
        match self.bytes.get(self.at)? {
            b'"' => self.string().map(drop),
            b'{' | b'[' => {
                let mut depth = 0_usize;
                loop {
                    self.skip_space();
                    match self.bytes.get(self.at)? {
                        b'"' => {
                            self.string()?;
                            continue;
                        }
                        b'{' | b'[' => depth += 1,
                        b'}' | b']' => depth -= 1,
                        _ => {}
                    }
                    self.at += 1;
                    if depth == 0 {
                        return Some(());
                    }
                }
            }
            _ => {
                while !matches!(self.bytes.get(self.at)?, b',' | b'}' | b']') {
                    self.at += 1;
                }
                Some(())
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn place(path: &str) -> Option<(usize, usize)> {
        let text =
            "{\n  \"a\": [1, {\"x\": \"}\\\"\"}],\n  \"b\": {\n    \"c\": true, \"d\": 2\n  }\n}";
        let steps: Vec<String> = path.split('.').map(str::to_owned).collect();
        position(text, &steps)
    }

    #[test]
    fn keys_are_found_where_they_stand() {
        assert_eq!(place("a"), Some((2, 3)));
        assert_eq!(place("a.1"), Some((2, 12)));
        assert_eq!(place("a.1.x"), Some((2, 13)));
        assert_eq!(place("b.d"), Some((4, 16)));
        assert_eq!(place("b.e"), None);
    }

    #[test]
    fn the_nearest_key_is_near() {
        let known = ["proxy_port", "port_min", "port_max", "name"];
        assert_eq!(nearest("proxyport", &known), Some("proxy_port"));
        assert_eq!(nearest("proxy-port", &known), Some("proxy_port"));
        assert_eq!(nearest("nmae", &known), Some("name"));
        assert_eq!(nearest("colour", &known), None);
    }
}
