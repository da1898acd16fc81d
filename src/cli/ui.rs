//! The terminal: the only place that prints.
//!
//! Standard output carries the answer, standard error everything else.

use std::fmt::Display;
use std::io::{self, BufRead, ErrorKind, IsTerminal, Write};
use std::time::{Duration, Instant};

use anyhow::anyhow;
use clap::ColorChoice;
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use serde::Serialize;

use super::render;
use super::report::Report;
use crate::api::types::Message;

const BAR_AFTER: Duration = Duration::from_millis(500);
const LINE_EVERY: Duration = Duration::from_secs(10);

/// How this run talks.
#[derive(Debug, Clone, Copy)]
#[expect(clippy::struct_excessive_bools, reason = "independent switches")]
pub(super) struct Ui {
    pub(super) json: bool,
    quiet: bool,
    color_out: bool,
    color_err: bool,
}

/// Emphasis, when there is colour.
#[derive(Debug, Clone, Copy)]
pub(super) enum Tone {
    Good,
    Bad,
    Warning,
    Faint,
    Strong,
}

impl Tone {
    fn code(self) -> &'static str {
        match self {
            Self::Good => "32",
            Self::Bad => "31",
            Self::Warning => "33",
            Self::Faint => "2",
            Self::Strong => "1",
        }
    }
}

impl Ui {
    pub(super) fn new(color: ColorChoice, quiet: bool, json: bool) -> Self {
        let wanted = |terminal: bool| match color {
            ColorChoice::Always => true,
            ColorChoice::Never => false,
            // https://no-color.org: set and not empty
            ColorChoice::Auto => {
                terminal
                    && std::env::var_os("NO_COLOR").is_none_or(|v| v.is_empty())
                    && std::env::var_os("TERM").is_none_or(|v| v != "dumb")
            }
        };
        Self {
            json,
            quiet,
            color_out: wanted(io::stdout().is_terminal()),
            color_err: wanted(io::stderr().is_terminal()),
        }
    }

    /// A line of the answer. Who closes the pipe has read enough.
    pub(super) fn answer(self, line: impl Display) -> Result<(), Report> {
        self.bytes(format!("{line}\n").as_bytes()).map(drop)
    }

    /// A piece of the answer, as it is; false when nobody reads any more.
    #[expect(clippy::unused_self, reason = "the one way to standard output")]
    pub(super) fn bytes(self, bytes: &[u8]) -> Result<bool, Report> {
        let mut out = io::stdout().lock();
        match out.write_all(bytes).and_then(|()| out.flush()) {
            Ok(()) => Ok(true),
            Err(e) if e.kind() == ErrorKind::BrokenPipe => Ok(false),
            Err(e) => Err(Report::refused(anyhow!("write the answer: {e}"))),
        }
    }

    /// The answer as JSON, for people to read too.
    pub(super) fn answer_json(self, value: &impl Serialize) -> Result<(), Report> {
        let text = serde_json::to_string_pretty(value)
            .map_err(|e| Report::refused(anyhow!("write the answer: {e}")))?;
        self.answer(text)
    }

    /// What was done, past tense.
    pub(super) fn status(self, line: impl Display) {
        if !self.quiet {
            self.err(line);
        }
    }

    pub(super) fn hint(self, line: impl Display) {
        if !self.quiet {
            self.err(format_args!(
                "{} {line}",
                self.paint_err(Tone::Faint, "hint:")
            ));
        }
    }

    pub(super) fn warn(self, line: impl Display) {
        self.err(format_args!(
            "{} {line}",
            self.paint_err(Tone::Warning, "warning:")
        ));
    }

    pub(super) fn report(self, report: &Report) {
        let label = self.paint_err(Tone::Bad, "error:");
        self.err(format_args!("{label} {:#}", report.error));
        if let Some(hint) = &report.hint {
            self.err(format_args!(
                "{} {hint}",
                self.paint_err(Tone::Faint, "hint:")
            ));
        }
    }

    /// One line on standard error. That it can't be written is nobody's concern.
    #[expect(clippy::unused_self, reason = "the one way to standard error")]
    pub(super) fn err(self, line: impl Display) {
        let _ = writeln!(io::stderr().lock(), "{line}");
    }

    /// Text of the answer, in colour where that is wanted.
    pub(super) fn paint(self, tone: Tone, text: &str) -> String {
        paint(self.color_out, tone, text)
    }

    /// [`Ui::paint`], but nothing stays nothing.
    pub(super) fn paint_some(self, tone: Tone, text: &str) -> String {
        if text.is_empty() {
            String::new()
        } else {
            self.paint(tone, text)
        }
    }

    /// How many characters a line of the answer has room for; none where nobody counts.
    #[expect(clippy::unused_self, reason = "a question of this terminal")]
    pub(super) fn width(self) -> Option<usize> {
        let (width, _) = terminal_size::terminal_size_of(io::stdout())?;
        Some(usize::from(width.0)).filter(|width| *width > 0)
    }

    fn paint_err(self, tone: Tone, text: &str) -> String {
        paint(self.color_err, tone, text)
    }

    /// Whether someone is there to be asked.
    #[expect(clippy::unused_self, reason = "a question of this terminal")]
    pub(super) fn can_ask(self) -> bool {
        io::stdin().is_terminal() && io::stderr().is_terminal()
    }

    /// Asks before something is lost. `consequence` says what; no terminal and no `yes`
    /// is a refusal.
    pub(super) fn confirm(self, consequence: &str, yes: bool) -> Result<(), Report> {
        if yes {
            return Ok(());
        }
        if !self.can_ask() {
            return Err(
                Report::refused(anyhow!("{consequence}; there is no terminal to ask on"))
                    .hint("add `--yes` if that is what you want"),
            );
        }
        let answer = self.ask(&format!("{consequence}. Go on? [y/N]"))?;
        if ["y", "yes"].contains(&answer.to_lowercase().as_str()) {
            Ok(())
        } else {
            Err(Report::refused(anyhow!("nothing was changed: you said no")))
        }
    }

    /// Asks for one line, trimmed.
    #[expect(clippy::unused_self, reason = "a question on this terminal")]
    pub(super) fn ask(self, question: &str) -> Result<String, Report> {
        let failed = |e: io::Error| Report::refused(anyhow!("ask on the terminal: {e}"));
        let mut err = io::stderr().lock();
        write!(err, "{question} ")
            .and_then(|()| err.flush())
            .map_err(failed)?;
        let mut line = String::new();
        io::stdin().lock().read_line(&mut line).map_err(failed)?;
        Ok(line.trim().to_owned())
    }

    /// Shows what a call says while it works.
    pub(super) fn progress(self) -> Progress {
        Progress {
            ui: self,
            terminal: io::stderr().is_terminal(),
            since: None,
            last_line: None,
            bar: None,
        }
    }
}

fn paint(color: bool, tone: Tone, text: &str) -> String {
    if color {
        format!("\x1b[{}m{text}\x1b[0m", tone.code())
    } else {
        text.to_owned()
    }
}

/// A bar on a terminal, else a line now and then; nothing for what is done at once.
pub(super) struct Progress {
    ui: Ui,
    terminal: bool,
    since: Option<Instant>,
    last_line: Option<Instant>,
    bar: Option<ProgressBar>,
}

impl Progress {
    pub(super) fn show(&mut self, message: Message) {
        match message {
            Message::Notice(text) => self.notice(&text),
            Message::Progress { what, done, total } => self.advance(what, done, total),
            Message::Done(_) | Message::Failed(_) => {}
        }
    }

    fn notice(&self, text: &str) {
        let line = || self.ui.status(format_args!("note: {text}"));
        match &self.bar {
            Some(bar) => bar.suspend(line),
            None => line(),
        }
    }

    fn advance(&mut self, what: String, done: u64, total: u64) {
        if self.ui.quiet {
            return;
        }
        let since = *self.since.get_or_insert_with(Instant::now);
        if self.terminal {
            if self.bar.is_none() && since.elapsed() >= BAR_AFTER {
                self.bar = Some(new_bar());
            }
            if let Some(bar) = &self.bar {
                // indicatif hides what it can't know when the length is 0.
                bar.set_length(total.max(done));
                bar.set_message(what);
                bar.set_position(done);
            }
        } else if self.last_line.unwrap_or(since).elapsed() >= LINE_EVERY {
            self.last_line = Some(Instant::now());
            self.ui.status(plain_line(&what, done, total));
        }
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }
}

fn plain_line(what: &str, done: u64, total: u64) -> String {
    if total == 0 {
        return format!("{what}: {}", render::bytes(done));
    }
    let percent = u128::from(done) * 100 / u128::from(total);
    format!(
        "{what}: {} of {} ({percent} %)",
        render::bytes(done),
        render::bytes(total)
    )
}

fn new_bar() -> ProgressBar {
    let style = ProgressStyle::with_template(
        "{msg} [{bar:30}] {binary_bytes}/{binary_total_bytes} ({eta})",
    )
    .expect("the template is valid")
    .progress_chars("=> ");
    ProgressBar::with_draw_target(None, ProgressDrawTarget::stderr()).with_style(style)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn progress_without_a_terminal_names_bytes_and_share() {
        assert_eq!(
            plain_line("copy", 512, 2048),
            "copy: 512 B of 2.0 KiB (25 %)"
        );
        assert_eq!(plain_line("pull", 2048, 0), "pull: 2.0 KiB");
    }

    #[test]
    fn without_colour_text_stays_as_it_is() {
        assert_eq!(paint(false, Tone::Bad, "x"), "x");
        assert_eq!(paint(true, Tone::Bad, "x"), "\x1b[31mx\x1b[0m");
    }

    #[test]
    fn without_a_terminal_nothing_is_lost_unless_yes_is_said() {
        let ui = Ui::new(ColorChoice::Never, false, false);
        assert!(ui.confirm("all is lost", true).is_ok());
        if !ui.can_ask() {
            let report = ui.confirm("all is lost", false).unwrap_err();
            assert!(report.hint.unwrap().contains("--yes"));
        }
    }
}
