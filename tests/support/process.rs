//! Runs programs with a time limit, and shows all they said when a test does not like it.

use std::fmt;
use std::io::Read;
use std::process::{Command, Stdio};
use std::sync::mpsc;
use std::time::Duration;

/// What a program said and how it ended.
#[must_use]
pub(crate) struct Output {
    command: String,
    /// The exit status; none when a signal ended it.
    pub(crate) code: Option<i32>,
    pub(crate) stdout: String,
    pub(crate) stderr: String,
}

impl Output {
    /// The output, when the program did what it should; panics otherwise.
    #[track_caller]
    pub(crate) fn ok(self) -> Self {
        assert_eq!(self.code, Some(0), "{self}");
        self
    }

    /// Standard output without the last line end, when the program did what it should.
    #[track_caller]
    pub(crate) fn text(self) -> String {
        let out = self.ok();
        out.stdout
            .strip_suffix('\n')
            .unwrap_or(&out.stdout)
            .to_owned()
    }

    #[track_caller]
    pub(crate) fn json(self) -> serde_json::Value {
        let out = self.ok();
        serde_json::from_str(&out.stdout).unwrap_or_else(|e| panic!("no JSON: {e}: {out}"))
    }

    /// Asserts a failure in our form: the exit status, nothing on standard output, and
    /// `error:` and `hint:` lines that contain all of `words`.
    #[track_caller]
    pub(crate) fn fails(self, code: i32, words: &[&str]) -> Self {
        assert_eq!(self.code, Some(code), "{self}");
        assert_eq!(self.stdout, "", "a failure answers nothing: {self}");
        assert!(self.stderr.contains("error: "), "no `error:` line: {self}");
        assert!(self.stderr.contains("hint: "), "no next step: {self}");
        assert!(!self.stderr.contains("panicked"), "{self}");
        self.says(words)
    }

    /// Asserts that standard error contains all of `words`.
    #[track_caller]
    pub(crate) fn says(self, words: &[&str]) -> Self {
        for word in words {
            assert!(self.stderr.contains(word), "does not say `{word}`: {self}");
        }
        self
    }
}

impl fmt::Display for Output {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            command,
            code,
            stdout,
            stderr,
        } = self;
        write!(
            f,
            "\n$ {command}\nexit status: {code:?}\n-- stdout\n{stdout}-- stderr\n{stderr}"
        )
    }
}

/// Runs a program to its end. It gets no input. Panics when it, or something it
/// started that holds its output open, is not done within `limit`.
#[track_caller]
pub(crate) fn run(mut command: Command, limit: Duration) -> Output {
    // Without the environment, which is the same for all and long.
    let program = command.get_program().to_string_lossy();
    let args = command.get_args().map(|arg| format!("'{}'", arg.display()));
    let shown = std::iter::once(program.into_owned())
        .chain(args)
        .collect::<Vec<_>>()
        .join(" ");
    let mut child = command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap_or_else(|e| panic!("{shown}: {e}"));
    let stdout = read_all(child.stdout.take().expect("piped"));
    let stderr = read_all(child.stderr.take().expect("piped"));
    let deadline = std::time::Instant::now() + limit;
    let rest = || deadline.saturating_duration_since(std::time::Instant::now());
    let (Ok(stdout), Ok(stderr)) = (stdout.recv_timeout(rest()), stderr.recv_timeout(rest()))
    else {
        let ended = child.try_wait().ok().flatten();
        let _ = child.kill();
        match ended {
            None => panic!("{shown} was not done within {limit:?}"),
            Some(_) => panic!("{shown} ended, but left a process that holds its output open"),
        }
    };
    let status = child.wait().expect("a child of ours can be waited for");
    Output {
        command: shown,
        code: status.code(),
        stdout,
        stderr,
    }
}

fn read_all(mut from: impl Read + Send + 'static) -> mpsc::Receiver<String> {
    let (send, receive) = mpsc::channel();
    std::thread::spawn(move || {
        let mut all = Vec::new();
        let _ = from.read_to_end(&mut all);
        let _ = send.send(String::from_utf8_lossy(&all).into_owned());
    });
    receive
}
