//! Commands that messages tell people to type.

use std::path::Path;

/// A path as one word of a shell's command line.
pub fn shell_word(path: &Path) -> String {
    let text = path.to_string_lossy();
    let plain = |c: char| c.is_alphanumeric() || "/._-+:@,=".contains(c);
    if !text.is_empty() && text.chars().all(plain) {
        text.into_owned()
    } else {
        format!("'{}'", text.replace('\'', r"'\''"))
    }
}

/// A command that only root may run, as this user has to type it.
pub fn as_root(command: &str) -> String {
    if nix::unistd::geteuid().is_root() {
        command.to_owned()
    } else {
        format!("sudo {command}")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_word_is_quoted_where_a_shell_would_split_it() {
        for (path, word) in [
            ("/mnt/a-b_1.2", "/mnt/a-b_1.2"),
            ("/mnt/my pool", "'/mnt/my pool'"),
            ("/it's", r"'/it'\''s'"),
            ("/a$b", "'/a$b'"),
            ("", "''"),
        ] {
            assert_eq!(shell_word(Path::new(path)), word);
        }
    }
}
