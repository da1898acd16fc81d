use anyhow::anyhow;
use clap::ValueEnum;
use clap_complete::env::{Bash, EnvCompleter, Fish, Zsh};

use crate::cli::complete;
use crate::cli::context::Context;
use crate::cli::report::{ExitStatus, Report};

const EXAMPLES: &str = "\
Examples:
  dbranch completions bash > ~/.local/share/bash-completion/completions/dbranch
  dbranch completions zsh > \"${fpath[1]}/_dbranch\"
  dbranch completions fish > ~/.config/fish/completions/dbranch.fish";

/// Print the completion script of a shell
///
/// It completes the names of branches too.
#[derive(Debug, clap::Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct Args {
    /// Which shell
    shell: Shell,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum Shell {
    Bash,
    Zsh,
    Fish,
}

pub(crate) fn run(cx: &Context, args: &Args) -> Result<ExitStatus, Report> {
    let completer: &dyn EnvCompleter = match args.shell {
        Shell::Bash => &Bash,
        Shell::Zsh => &Zsh,
        Shell::Fish => &Fish,
    };
    let mut script = Vec::new();
    completer
        .write_registration(
            complete::VARIABLE,
            "dbranch",
            "dbranch",
            "dbranch",
            &mut script,
        )
        .map_err(|e| Report::refused(anyhow!("write the script: {e}")))?;
    cx.ui.bytes(&script)?;
    Ok(ExitStatus::Done)
}
