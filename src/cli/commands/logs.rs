use std::fs::File;
use std::io::{ErrorKind, Read, Seek, SeekFrom};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::anyhow;
use clap_complete::ArgValueCompleter;

use crate::api::types::{LogInfo, Request};
use crate::cli::complete;
use crate::cli::context::Context;
use crate::cli::report::{ExitStatus, Report};
use crate::types::BranchName;

const EXAMPLES: &str = "\
Examples:
  dbranch logs                     what the active branch's postgres wrote
  dbranch logs feature/login -n 5
  dbranch logs --follow
  dbranch logs --daemon            what dbranch itself wrote";

/// Read backwards in pieces of this many bytes.
const PIECE: u64 = 64 << 10;
const LOOK_EVERY: Duration = Duration::from_millis(200);

/// Print what a branch's postgres has logged
#[derive(Debug, clap::Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct Args {
    /// Branch whose log to print [default: the active one]
    #[arg(add = ArgValueCompleter::new(complete::branches), conflicts_with = "daemon")]
    name: Option<BranchName>,
    /// Go on with what is written from now on
    #[arg(long, short)]
    follow: bool,
    /// Begin that many lines before the end
    #[arg(short = 'n', long, value_name = "N", default_value_t = 100)]
    lines: usize,
    /// Print the daemon's log
    #[arg(long)]
    daemon: bool,
}

pub(crate) fn run(cx: &Context, args: Args) -> Result<ExitStatus, Report> {
    let path = if args.daemon {
        cx.paths.daemon_log()
    } else {
        let request = Request::Logs {
            at: cx.at()?,
            name: args.name,
        };
        let info: LogInfo = cx.call_as(&request)?;
        info.log_file
    };
    if cx.ui.json {
        cx.ui
            .answer_json(&serde_json::json!({ "log_file": path }))?;
        return Ok(ExitStatus::Done);
    }
    let mut log = match Log::open(path.clone()) {
        Ok(log) => log,
        Err(e) if e.kind() == ErrorKind::NotFound && !args.follow => {
            cx.ui
                .status(format_args!("nothing was logged yet in {}", path.display()));
            return Ok(ExitStatus::Done);
        }
        Err(e) => return Err(unreadable(&path, &e)),
    };
    log.seek_lines(args.lines)
        .map_err(|e| unreadable(&path, &e))?;
    loop {
        let piece = log.read().map_err(|e| unreadable(&path, &e))?;
        if !piece.is_empty() {
            if !cx.ui.bytes(&piece)? {
                return Ok(ExitStatus::Done);
            }
        } else if args.follow {
            std::thread::sleep(LOOK_EVERY);
            log.reopen_if_replaced()
                .map_err(|e| unreadable(&path, &e))?;
        } else {
            return Ok(ExitStatus::Done);
        }
    }
}

fn unreadable(path: &Path, e: &std::io::Error) -> Report {
    Report::refused(anyhow!("read {}: {e}", path.display()))
        .hint("see what keeps you from it with `dbranch doctor`")
}

struct Log {
    path: PathBuf,
    file: File,
    at: u64,
}

impl Log {
    fn open(path: PathBuf) -> std::io::Result<Self> {
        let file = File::open(&path)?;
        Ok(Self { path, file, at: 0 })
    }

    /// Goes to where the last `n` lines begin.
    fn seek_lines(&mut self, n: usize) -> std::io::Result<()> {
        let end = self.file.metadata()?.len();
        let mut start = end;
        let mut seen = 0;
        let mut buffer = Vec::new();
        while start > 0 {
            let from = start.saturating_sub(PIECE);
            buffer.clear();
            self.file.seek(SeekFrom::Start(from))?;
            (&self.file).take(start - from).read_to_end(&mut buffer)?;
            for (offset, _) in buffer
                .iter()
                .enumerate()
                .rev()
                .filter(|(_, b)| **b == b'\n')
            {
                let after = from + offset as u64 + 1;
                // The last line's own end doesn't begin a line.
                if after == end {
                    continue;
                }
                seen += 1;
                if seen >= n {
                    return self.go(if n == 0 { end } else { after });
                }
            }
            start = from;
        }
        self.go(if n == 0 { end } else { 0 })
    }

    fn go(&mut self, to: u64) -> std::io::Result<()> {
        self.at = self.file.seek(SeekFrom::Start(to))?;
        Ok(())
    }

    fn read(&mut self) -> std::io::Result<Vec<u8>> {
        let mut piece = Vec::new();
        let n = (&self.file).take(PIECE).read_to_end(&mut piece)?;
        self.at += n as u64;
        Ok(piece)
    }

    /// Begins anew when the file was cut off or another one stands in its place.
    fn reopen_if_replaced(&mut self) -> std::io::Result<()> {
        let Ok(now) = std::fs::metadata(&self.path) else {
            return Ok(());
        };
        let ours = self.file.metadata()?;
        if (now.dev(), now.ino()) != (ours.dev(), ours.ino()) {
            self.file = File::open(&self.path)?;
            self.at = 0;
        } else if now.len() < self.at {
            self.go(0)?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::fmt::Write;

    use super::*;

    fn last(text: &str, n: usize) -> String {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), text).unwrap();
        let mut log = Log::open(file.path().into()).unwrap();
        log.seek_lines(n).unwrap();
        let mut all = Vec::new();
        loop {
            let piece = log.read().unwrap();
            if piece.is_empty() {
                return String::from_utf8(all).unwrap();
            }
            all.extend(piece);
        }
    }

    #[test]
    fn the_last_lines_are_found_from_the_end() {
        assert_eq!(last("a\nb\nc\n", 2), "b\nc\n");
        assert_eq!(last("a\nb\nc", 2), "b\nc");
        assert_eq!(last("a\nb\n", 9), "a\nb\n");
        assert_eq!(last("a\nb\n", 0), "");
        assert_eq!(last("", 3), "");
        let long = (0..20_000).fold(String::new(), |mut text, i| {
            writeln!(text, "line {i}").unwrap();
            text
        });
        assert_eq!(last(&long, 2), "line 19998\nline 19999\n");
        assert_eq!(last(&long, 15_000).lines().next(), Some("line 5000"));
    }

    #[test]
    fn a_log_that_is_replaced_or_cut_off_is_read_from_its_beginning() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("log");
        std::fs::write(&path, "old\n").unwrap();
        let mut log = Log::open(path.clone()).unwrap();
        assert_eq!(log.read().unwrap(), b"old\n");
        std::fs::write(dir.path().join("new"), "new\n").unwrap();
        std::fs::rename(dir.path().join("new"), &path).unwrap();
        log.reopen_if_replaced().unwrap();
        assert_eq!(log.read().unwrap(), b"new\n");
        std::fs::write(&path, "x\n").unwrap();
        log.reopen_if_replaced().unwrap();
        assert_eq!(log.read().unwrap(), b"x\n");
    }
}
