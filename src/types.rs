//! Names and values that every room shares, each valid by construction.

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// Why a name or value was not accepted. The text is fit for users.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct Invalid(pub String);

/// Longest branch name, in bytes: what one path component may hold, as git itself
/// stores a ref in a file of that name.
pub const BRANCH_NAME_MAX_BYTES: usize = 255;

/// A branch's name: the git branch's, verbatim (`feature/login`).
///
/// Nothing on disk or in Docker is ever named after it, so two names can't
/// collide by looking alike. It is still checked for what git forbids in a ref
/// (git-check-ref-format(1)).
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct BranchName(String);

impl BranchName {
    /// Accepts what git accepts as a branch name.
    pub fn new(name: impl Into<String>) -> Result<Self, Invalid> {
        let name = name.into();
        match reason_against(&name) {
            None => Ok(Self(name)),
            Some(why) => Err(Invalid(format!(
                "`{}` is no branch name: {why}",
                name.escape_debug()
            ))),
        }
    }

    pub fn as_str(&self) -> &str {
        &self.0
    }
}

fn reason_against(name: &str) -> Option<String> {
    if name.is_empty() {
        return Some("it is empty".into());
    }
    if name.len() > BRANCH_NAME_MAX_BYTES {
        return Some(format!(
            "it has {} bytes, {BRANCH_NAME_MAX_BYTES} are allowed",
            name.len()
        ));
    }
    if let Some(c) = name
        .chars()
        .find(|c| c.is_ascii_control() || " ~^:?*[\\".contains(*c))
    {
        return Some(format!("git forbids {c:?} in it"));
    }
    for bad in ["..", "@{", "//"] {
        if name.contains(bad) {
            return Some(format!("git forbids `{bad}` in it"));
        }
    }
    if name == "@" || name == "HEAD" || name.starts_with('-') {
        return Some("git keeps that word for itself".into());
    }
    if name.starts_with('/') || name.ends_with('/') || name.ends_with('.') {
        return Some("it may not begin with `/` nor end with `/` or `.`".into());
    }
    name.split('/')
        .any(|part| {
            part.starts_with('.')
                || std::path::Path::new(part)
                    .extension()
                    .is_some_and(|e| e == "lock")
        })
        .then(|| "no part of it may begin with `.` or end with `.lock`".into())
}

impl fmt::Display for BranchName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl FromStr for BranchName {
    type Err = Invalid;
    fn from_str(s: &str) -> Result<Self, Invalid> {
        Self::new(s)
    }
}

impl TryFrom<String> for BranchName {
    type Error = Invalid;
    fn try_from(s: String) -> Result<Self, Invalid> {
        Self::new(s)
    }
}

impl From<BranchName> for String {
    fn from(name: BranchName) -> Self {
        name.0
    }
}

/// Letters of ids: no vowels and no look-alikes, so that an id is never a word.
const ID_ALPHABET: &[u8; 32] = b"0123456789bcdfghjkmnpqrstvwxyzab";
const ID_LENGTH: usize = 12;

fn random_id() -> String {
    let mut bytes = [0u8; ID_LENGTH];
    getrandom::fill(&mut bytes).expect("the operating system's random source answers");
    bytes
        .iter()
        .map(|b| char::from(ID_ALPHABET[usize::from(b % 32)]))
        .collect()
}

macro_rules! id_type {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
        #[serde(try_from = "String", into = "String")]
        pub struct $name(String);

        impl $name {
            /// A new id, random.
            pub fn random() -> Self {
                Self(random_id())
            }

            /// Accepts 1 to 32 lower-case letters and digits: safe as a file or container name.
            pub fn new(id: impl Into<String>) -> Result<Self, Invalid> {
                let id = id.into();
                let fits = (1..=32).contains(&id.len())
                    && id.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit());
                if fits { Ok(Self(id)) } else { Err(Invalid(format!("`{}` is no id", id.escape_debug()))) }
            }

            pub fn as_str(&self) -> &str {
                &self.0
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }

        impl TryFrom<String> for $name {
            type Error = Invalid;
            fn try_from(s: String) -> Result<Self, Invalid> {
                Self::new(s)
            }
        }

        impl From<$name> for String {
            fn from(id: $name) -> Self {
                id.0
            }
        }
    };
}

id_type! {
    /// Identifies a project for good; its name and its place on disk may change.
    ProjectId
}
id_type! {
    /// Identifies a branch for good; its name may change.
    BranchId
}
id_type! {
    /// Identifies a volume in its pool, and is the name of its folder there.
    VolumeId
}

/// Where an instance accepts connections.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum BackendAddress {
    /// The folder that holds `.s.PGSQL.<port>`.
    Unix {
        dir: PathBuf,
        port: u16,
    },
    Tcp {
        host: String,
        port: u16,
    },
}

impl BackendAddress {
    /// The socket file of a Unix address.
    pub fn socket_path(&self) -> Option<PathBuf> {
        match self {
            Self::Unix { dir, port } => Some(dir.join(format!(".s.PGSQL.{port}"))),
            Self::Tcp { .. } => None,
        }
    }
}

impl fmt::Display for BackendAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unix { dir, port } => write!(f, "{}:{port}", dir.display()),
            Self::Tcp { host, port } => write!(f, "{host}:{port}"),
        }
    }
}

/// The user and group that own data directories and run postgres.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Owner {
    pub uid: u32,
    pub gid: u32,
}

/// A password. `Debug` hides it; there is no `Display`.
#[derive(Clone, PartialEq, Eq)]
pub struct Password(String);

impl Password {
    pub fn new(text: impl Into<String>) -> Self {
        Self(text.into())
    }

    /// 24 random letters and digits (120 bits), which need no escaping in a URL.
    pub fn random() -> Self {
        Self(random_id() + &random_id())
    }

    /// The password itself, to be sent or stored with mode 0600, never logged.
    pub fn reveal(&self) -> &str {
        &self.0
    }
}

impl fmt::Debug for Password {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Password(…)")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn branch_names_that_git_accepts_are_accepted() {
        for name in [
            "main",
            "feature/login",
            "a..b".replace("..", ".").as_str(),
            "ünï/код",
            "FEATURE",
            "x@y",
        ] {
            assert!(BranchName::new(name).is_ok(), "{name}");
        }
    }

    #[test]
    fn branch_names_that_git_refuses_are_refused() {
        let long = "x".repeat(256);
        for name in [
            "",
            "a b",
            "a..b",
            "/a",
            "a/",
            "a//b",
            ".a",
            "a/.b",
            "a.lock",
            "a.lock/b",
            "HEAD",
            "@",
            "a@{b",
            "-a",
            "a~",
            "a^",
            "a:b",
            "a\\b",
            "a\n",
            long.as_str(),
        ] {
            assert!(BranchName::new(name).is_err(), "{name}");
        }
    }

    #[test]
    fn ids_are_distinct_and_valid() {
        let (a, b) = (BranchId::random(), BranchId::random());
        assert_ne!(a, b);
        assert_eq!(BranchId::new(a.as_str()), Ok(a));
        assert!(VolumeId::new("../x").is_err());
    }

    #[test]
    fn debug_of_a_password_hides_it() {
        assert!(!format!("{:?}", Password::new("sesame")).contains("sesame"));
    }
}
