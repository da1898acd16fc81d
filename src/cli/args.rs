//! The command line: global options and the list of commands.

use std::path::PathBuf;

use clap::{Args, ColorChoice, Parser, Subcommand, ValueHint};

use super::commands;

const AFTER_HELP: &str = "\
Examples:
  dbranch init                     make this repository a project
  dbranch init-postgres            make its first database
  dbranch install-hooks            let git's checkout switch the database
  psql \"$(dbranch url)\"            connect; the URL never changes

Exit status:
  0    done, or nothing to do
  1    refused or failed
  2    command line or configuration
  3    the daemon can't be reached
  70   a bug in dbranch
  130  interrupted";

/// PostgreSQL databases that branch with git
#[derive(Debug, Parser)]
#[command(name = "dbranch", version, after_help = AFTER_HELP, arg_required_else_help = true)]
#[command(max_term_width = 100)]
pub(super) struct Cli {
    #[command(flatten)]
    pub(super) global: Global,
    #[command(subcommand)]
    pub(super) command: Command,
}

#[derive(Debug, Args)]
#[command(next_help_heading = "Global options")]
pub(super) struct Global {
    /// Answer in JSON
    #[arg(long, global = true)]
    pub(super) json: bool,
    /// Leave out status and hints, but no warnings
    #[arg(long, short, global = true)]
    pub(super) quiet: bool,
    /// Act as if started in DIR
    #[arg(short = 'C', global = true, value_name = "DIR", value_hint = ValueHint::DirPath)]
    pub(super) directory: Option<PathBuf>,
    /// When to use colour
    #[arg(
        long,
        global = true,
        value_name = "WHEN",
        default_value = "auto",
        hide_possible_values = false
    )]
    pub(super) color: ColorChoice,
}

#[derive(Debug, Subcommand)]
pub(super) enum Command {
    Init(commands::init::Args),
    InitPostgres(commands::init_postgres::Args),
    InstallHooks(commands::install_hooks::Args),
    UninstallHooks(commands::uninstall_hooks::Args),
    Create(commands::create::Args),
    Use(commands::r#use::Args),
    List(commands::list::Args),
    Show(commands::show::Args),
    Status(commands::status::Args),
    Usage(commands::usage::Args),
    Storage(commands::storage::Args),
    Url(commands::url::Args),
    Env(commands::env::Args),
    Psql(commands::psql::Args),
    Logs(commands::logs::Args),
    Delete(commands::delete::Args),
    Undelete(commands::undelete::Args),
    Forget(commands::forget::Args),
    DeleteProject(commands::delete_project::Args),
    Stop(commands::stop::Args),
    Resume(commands::resume::Args),
    Sync(commands::sync::Args),
    Allow(commands::allow::Args),
    Start(commands::start::Args),
    Shutdown(commands::shutdown::Args),
    Doctor(commands::doctor::Args),
    Demo(commands::demo::Args),
    Completions(commands::completions::Args),
    #[command(hide = true)]
    Hook(commands::hook::Args),
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn the_help_of_every_command_has_examples_and_begins_without_a_period() {
        let mut cli = Cli::command();
        cli.build();
        for command in cli
            .get_subcommands_mut()
            .filter(|c| !c.is_hide_set() && c.get_name() != "help")
        {
            let name = command.get_name().to_owned();
            let help = command.render_help().to_string();
            assert!(help.contains("Examples:\n  "), "{name}: {help}");
            let first = help.lines().next().unwrap();
            assert!(
                !first.is_empty() && !first.ends_with('.'),
                "{name}: {first}"
            );
        }
        assert!(cli.render_help().to_string().contains("Exit status:"));
    }

    #[test]
    fn bad_branch_names_are_refused_with_the_reason() {
        let e = Cli::try_parse_from(["dbranch", "create", "a..b"]).unwrap_err();
        assert_eq!(e.exit_code(), 2);
        assert!(e.to_string().contains("git forbids `..` in it"), "{e}");
    }
}
