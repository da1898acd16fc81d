//! A psql that stays connected, to watch what a switch does to a session.

use std::io::{BufRead, BufReader, Write};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};

use super::LIMIT;

/// One session. Dropping it disconnects.
pub(crate) struct Session {
    psql: Child,
    input: Option<ChildStdin>,
    lines: Receiver<String>,
    asked: u32,
}

impl Session {
    /// Starts `psql`; it connects by itself. Errors are verbose, so that they show SQLSTATEs.
    pub(crate) fn start(mut psql: Command) -> Self {
        let (reader, writer) = std::io::pipe().expect("a pipe can be made");
        psql.args(["-X", "-q", "-A", "-t", "-v", "VERBOSITY=verbose"])
            .stdin(Stdio::piped())
            .stdout(writer.try_clone().expect("a pipe can be cloned"))
            .stderr(writer);
        let mut child = psql.spawn().expect("psql starts");
        // The command holds the pipe's other end, which would never close.
        drop(psql);
        let (send, lines) = channel();
        std::thread::spawn(move || {
            for line in BufReader::new(reader).lines().map_while(Result::ok) {
                if send.send(line).is_err() {
                    break;
                }
            }
        });
        Self {
            input: child.stdin.take(),
            psql: child,
            lines,
            asked: 0,
        }
    }

    /// Sends SQL and returns the lines it prints, or those that came before the
    /// connection was lost as the error.
    #[track_caller]
    pub(crate) fn run(&mut self, sql: &str) -> Result<String, String> {
        self.send(sql);
        self.answer()
    }

    /// Sends SQL and does not wait for the answer.
    pub(crate) fn send(&mut self, sql: &str) {
        self.asked += 1;
        let input = self.input.as_mut().expect("taken only by drop");
        // A psql that is gone is found when its answer is read.
        let _ = writeln!(input, "{sql};\n\\echo done-{}", self.asked);
    }

    /// Waits for the answer to what was sent last.
    #[track_caller]
    pub(crate) fn answer(&mut self) -> Result<String, String> {
        let end = format!("done-{}", self.asked);
        let mut all = Vec::new();
        loop {
            match self.lines.recv_timeout(LIMIT) {
                Ok(line) if line == end => return Ok(all.join("\n")),
                Ok(line) => all.push(line),
                Err(RecvTimeoutError::Disconnected) => return Err(all.join("\n")),
                Err(RecvTimeoutError::Timeout) => panic!("no answer within {LIMIT:?}: {all:?}"),
            }
        }
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        drop(self.input.take());
        let _ = self.psql.kill();
        let _ = self.psql.wait();
    }
}
