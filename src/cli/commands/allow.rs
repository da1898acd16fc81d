use anyhow::anyhow;

use crate::api::types::Request;
use crate::cli::context::{self, Context};
use crate::cli::report::{ExitStatus, Report};
use crate::config::{FILE_NAME, ProjectConfig};

const EXAMPLES: &str = "\
Examples:
  dbranch allow           show the commands, then ask
  dbranch allow --yes";

/// Let the commands of the config file run
///
/// Shows them and, on a terminal, asks.
/// They come with the repository, so they run only once you have seen them; a change to them
/// asks again.
#[derive(Debug, clap::Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct Args {
    /// Don't ask
    #[arg(long, short)]
    yes: bool,
}

pub(crate) fn run(cx: &Context, args: &Args) -> Result<ExitStatus, Report> {
    let at = cx.at()?;
    let file = context::config_file(&cx.location()?).ok_or_else(|| {
        Report::new(ExitStatus::Config, anyhow!("there is no {FILE_NAME} here"))
            .hint("make it with `dbranch init`")
    })?;
    let config = ProjectConfig::load(&file)?;
    let digest = config.commands_digest();
    let commands = config.commands;
    if commands.is_empty() {
        cx.ui
            .status(format_args!("{} has no commands", file.display()));
        if cx.ui.json {
            cx.ui.answer_json(&commands)?;
        }
        return Ok(ExitStatus::Done);
    }
    for (when, list) in [
        ("after a branch is created", &commands.after_create),
        ("after a switch", &commands.after_switch),
    ] {
        for command in list {
            // Escapes would let a repository show one command and run another.
            cx.ui.err(format_args!("{when}: {}", visible(command)));
        }
    }
    // Nothing is lost by it, so without a terminal the command itself is the word.
    if cx.ui.can_ask() {
        cx.ui
            .confirm("these commands will run with your rights", args.yes)?;
    }
    let value = cx.call(&Request::Allow { at, digest })?;
    if cx.ui.json {
        cx.ui.answer_json(&value)?;
    } else {
        cx.ui
            .status(format_args!("allowed the commands of {}", file.display()));
    }
    Ok(ExitStatus::Done)
}

fn visible(command: &str) -> String {
    command
        .chars()
        .flat_map(|c| {
            let hidden = c.is_control() || matches!(c, '\u{200b}'..='\u{200f}' | '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}');
            if hidden { c.escape_default().collect::<Vec<_>>() } else { vec![c] }
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_command_can_hide_nothing() {
        assert_eq!(visible("a\x1b[2K\u{202e}b\n"), "a\\u{1b}[2K\\u{202e}b\\n");
        assert_eq!(visible("npm run ünï"), "npm run ünï");
    }
}
