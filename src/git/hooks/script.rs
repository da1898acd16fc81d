//! The text of hooks: where our lines are, where they may go, what is left without.

use std::ops::Range;
use std::path::Path;

/// Our lines as a whole hook, the way people can read them in the repository.
const TEMPLATE: &str = include_str!("../../../hooks/post-checkout");

/// What follows our lines where they run a hook that stands beside them.
const CHAIN: &str = include_str!("../../../hooks/chained");

const SHEBANG: &str = "#!/bin/sh\n";
const BEGIN: &str = "# >>> dbranch >>>";
const END: &str = "# <<< dbranch <<<";
const PROGRAM: &str = "'@DBRANCH@'";

/// Mark a hook as ours alone, so that taking our lines out removes it.
const MADE_FILE: &str = "# dbranch made this file.\n";
const MADE_FOLDER: &str = "# dbranch made this file, and the folder it is in.\n";

/// Shells that understand our lines.
const SHELLS: [&str; 7] = ["sh", "bash", "dash", "ash", "ksh", "mksh", "zsh"];

/// What a hook file is.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Content {
    /// It has our lines at `range`.
    Ours { range: Range<usize>, rest: Rest },
    /// A shell script that can hold our lines.
    Shell,
    /// A program that can't.
    Other,
}

/// What is left of a hook without our lines.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Rest {
    /// The hook that was there before.
    Foreign(Vec<u8>),
    /// Nothing: we made the file, perhaps its folder too.
    Nothing { made_folder: bool },
    /// The lines that run the hook beside it.
    Chain,
}

/// Our lines, markers and last newline included, with the path of the program.
pub(super) fn block(program: Option<&Path>) -> Vec<u8> {
    let lines = TEMPLATE
        .strip_prefix(SHEBANG)
        .expect("the hook script starts with the line for sh");
    let program = quote(program.map_or(b"", |p| p.as_os_str().as_encoded_bytes()));
    let mut block = Vec::new();
    for (i, part) in lines.split(PROGRAM).enumerate() {
        if i > 0 {
            block.extend_from_slice(&program);
        }
        block.extend_from_slice(part.as_bytes());
    }
    block
}

/// Quotes for sh: within single quotes only they themselves are special.
fn quote(text: &[u8]) -> Vec<u8> {
    let mut quoted = vec![b'\''];
    for byte in text {
        match byte {
            b'\'' => quoted.extend_from_slice(br"'\''"),
            byte => quoted.push(*byte),
        }
    }
    quoted.push(b'\'');
    quoted
}

/// A hook that is ours alone.
pub(super) fn own_file(block: &[u8], made_folder: bool) -> Vec<u8> {
    let note = if made_folder { MADE_FOLDER } else { MADE_FILE };
    [SHEBANG.as_bytes(), note.as_bytes(), block].concat()
}

/// A hook that runs another after our lines.
pub(super) fn chaining_file(block: &[u8]) -> Vec<u8> {
    [SHEBANG.as_bytes(), block, CHAIN.as_bytes()].concat()
}

/// Puts our lines into a shell script: after its first line if that names the
/// shell, else in front.
pub(super) fn insert(script: &[u8], block: &[u8]) -> Vec<u8> {
    let at = if script.starts_with(b"#!") {
        match script.iter().position(|b| *b == b'\n') {
            Some(newline) => newline + 1,
            None => return [script, b"\n", without_newline(block)].concat(),
        }
    } else {
        0
    };
    [&script[..at], block, &script[at..]].concat()
}

/// Our lines as they must end in this file: `insert` leaves out the last newline
/// where the file had none.
pub(super) fn fit(block: &[u8], file: &[u8]) -> Vec<u8> {
    let is_last = file.ends_with(END.as_bytes());
    if is_last {
        without_newline(block)
    } else {
        block
    }
    .to_vec()
}

fn without_newline(block: &[u8]) -> &[u8] {
    block.strip_suffix(b"\n").unwrap_or(block)
}

/// Tells what a hook file is; or what is wrong with our lines in it.
pub(super) fn parse(file: &[u8]) -> Result<Content, &'static str> {
    let Some(range) = find_block(file)? else {
        return Ok(if holds_shell_lines(file) {
            Content::Shell
        } else {
            Content::Other
        });
    };
    let mut before = &file[..range.start];
    let after = &file[range.end..];
    if file.ends_with(END.as_bytes()) {
        before = without_newline(before);
    }
    let rest = [before, after].concat();
    let without = |note: &str| {
        let head = [SHEBANG.as_bytes(), note.as_bytes()].concat();
        rest.strip_prefix(head.as_slice()).map(<[u8]>::to_vec)
    };
    let rest = if let Some(added) = without(CHAIN) {
        if !added.is_empty() {
            return Err("lines were added below; move them into the hook in dbranch-chained");
        }
        Rest::Chain
    } else if let Some((added, made_folder)) = without(MADE_FILE)
        .map(|added| (added, false))
        .or_else(|| without(MADE_FOLDER).map(|added| (added, true)))
    {
        if added.is_empty() {
            Rest::Nothing { made_folder }
        } else {
            Rest::Foreign([SHEBANG.as_bytes(), &added].concat())
        }
    } else {
        Rest::Foreign(rest)
    };
    Ok(Content::Ours { range, rest })
}

fn find_block(file: &[u8]) -> Result<Option<Range<usize>>, &'static str> {
    let mut at = 0;
    let mut begin = None;
    let mut found = None;
    for line in file.split_inclusive(|b| *b == b'\n') {
        let text = without_newline(line);
        if text == BEGIN.as_bytes() {
            if begin.is_some() || found.is_some() {
                return Err("the first marker is there twice");
            }
            begin = Some(at);
        } else if text == END.as_bytes() {
            let start = begin.take().ok_or("the last marker has no first one")?;
            found = Some(start..at + line.len());
        }
        at += line.len();
    }
    match begin {
        Some(_) => Err("the last marker is missing"),
        None => Ok(found),
    }
}

/// Whether shell lines after the first would run, and would do no harm.
fn holds_shell_lines(file: &[u8]) -> bool {
    if file.contains(&0) {
        return false;
    }
    let text = String::from_utf8_lossy(file);
    let mut lines = text.split('\n');
    // git runs a file without `#!` by sh, as execvp(3) does.
    if let Some(shebang) = text.strip_prefix("#!") {
        let first = shebang.split('\n').next().unwrap_or_default();
        let is_shell = interpreter(first).is_some_and(|name| SHELLS.contains(&name));
        if !is_shell || first.ends_with('\r') {
            return false;
        }
        lines.next();
    }
    // A script that is sh for one line only, to find its true interpreter.
    let first = lines.find(|line| {
        let line = line.trim();
        !line.is_empty() && !line.starts_with('#')
    });
    first.is_none_or(|line| {
        let line = line.trim_start();
        let starts_another = line.contains("exec") && line.contains("$0");
        !starts_another && !line.starts_with(['\'', '"'])
    })
}

/// The program that `#!` names, without its folder; the one behind `env`.
fn interpreter(shebang: &str) -> Option<&str> {
    shebang
        .split_whitespace()
        .filter(|word| !word.starts_with('-') && !word.contains('='))
        .map(|word| word.rsplit('/').next().unwrap_or(word))
        .find(|name| !matches!(*name, "env" | "busybox"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn taking_our_lines_out_leaves_every_byte_that_was_there() {
        let scripts: [&[u8]; 9] = [
            b"#!/bin/sh\nexit 0\n",
            b"#!/bin/sh\n",
            b"#!/bin/sh",
            b"#!/usr/bin/env -S bash -e\n\n# \xff not UTF-8\nexit 3",
            b"echo no shebang\n",
            b"",
            b"\n\n",
            b"#!/bin/sh\n# >>> another tool >>>\n# <<< another tool <<<",
            b"#!/bin/sh\n# dbranch made this\n",
        ];
        for before in scripts {
            assert_eq!(parse(before), Ok(Content::Shell));
            let block = block(Some(Path::new("/opt/it's/dbranch")));
            let with = insert(before, &block);
            let Ok(Content::Ours { range, rest }) = parse(&with) else {
                panic!("{:?}", String::from_utf8_lossy(&with));
            };
            assert_eq!(rest, Rest::Foreign(before.to_vec()));
            assert_eq!(with[range], fit(&block, &with));
        }
    }

    #[test]
    fn scripts_for_other_interpreters_take_no_shell_lines() {
        let others: [&[u8]; 9] = [
            b"#!/usr/bin/env python3\n",
            b"#!/usr/bin/perl -w\n",
            b"#!/usr/bin/fish\n",
            b"#!/usr/bin/env ruby\n",
            b"#!/bin/sh\r\nexit 0\r\n",
            b"#!/bin/sh\n'''exec' python3 \"$0\" \"$@\"\n' '''\n",
            b"#!/bin/sh\n# the next line restarts with tclsh \\\nexec tclsh \"$0\" \"$@\"\n",
            b"#!/bin/sh\neval 'exec perl -x -wS $0 ${1+\"$@\"}'\n",
            b"\x7fELF\0\0",
        ];
        for file in others {
            assert_eq!(parse(file), Ok(Content::Other), "{file:?}");
        }
    }

    #[test]
    fn lines_added_to_our_own_file_stay() {
        let file = [own_file(&block(None), true), b"echo mine\n".to_vec()].concat();
        let Ok(Content::Ours { rest, .. }) = parse(&file) else {
            panic!();
        };
        assert_eq!(rest, Rest::Foreign(b"#!/bin/sh\necho mine\n".to_vec()));
    }

    #[test]
    fn markers_that_are_no_pair_are_not_guessed_at() {
        for file in [
            "#!/bin/sh\n# >>> dbranch >>>\n",
            "#!/bin/sh\n# <<< dbranch <<<\n",
            "# >>> dbranch >>>\n# >>> dbranch >>>\n# <<< dbranch <<<\n",
        ] {
            assert!(parse(file.as_bytes()).is_err(), "{file}");
        }
    }
}
