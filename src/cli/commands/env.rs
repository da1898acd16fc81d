use clap::ValueEnum;
use clap_complete::ArgValueCompleter;

use crate::api::types::{Request, UrlInfo};
use crate::cli::complete;
use crate::cli::context::Context;
use crate::cli::report::{ExitStatus, Report};
use crate::types::BranchName;

const EXAMPLES: &str = "\
Examples:
  eval \"$(dbranch env)\"                             sh, bash, zsh
  dbranch env --shell fish | source
  dbranch env --shell powershell | Invoke-Expression
  dbranch env --json";

/// Print the connection as environment variables
#[derive(Debug, clap::Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct Args {
    /// Branch to connect to, whatever is active
    #[arg(add = ArgValueCompleter::new(complete::branches))]
    name: Option<BranchName>,
    /// Whose syntax to print
    #[arg(long, value_enum, default_value_t = Shell::Sh)]
    shell: Shell,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Shell {
    Sh,
    Fish,
    Powershell,
}

impl Shell {
    fn line(self, name: &str, value: &str) -> String {
        match self {
            Self::Sh => format!("export {name}='{}'", value.replace('\'', r"'\''")),
            Self::Fish => {
                let value = value.replace('\\', r"\\").replace('\'', r"\'");
                format!("set -gx {name} '{value}'")
            }
            Self::Powershell => format!("$env:{name} = '{}'", value.replace('\'', "''")),
        }
    }
}

/// The variables libpq and most frameworks read (PostgreSQL manual, section 34.15).
pub(super) fn variables(url: &UrlInfo) -> [(&'static str, String); 6] {
    [
        ("DATABASE_URL", url.url.clone()),
        ("PGHOST", url.host.clone()),
        ("PGPORT", url.port.to_string()),
        ("PGUSER", url.user.clone()),
        ("PGPASSWORD", url.password.clone()),
        ("PGDATABASE", url.database.clone()),
    ]
}

pub(crate) fn run(cx: &Context, args: Args) -> Result<ExitStatus, Report> {
    let request = Request::Url {
        at: cx.at()?,
        name: args.name,
    };
    let url: UrlInfo = cx.call_as(&request)?;
    let variables = variables(&url);
    if cx.ui.json {
        let map: serde_json::Map<_, _> = variables
            .into_iter()
            .map(|(name, value)| (name.to_owned(), value.into()))
            .collect();
        cx.ui.answer_json(&map)?;
    } else {
        for (name, value) in variables {
            cx.ui.answer(args.shell.line(name, &value))?;
        }
    }
    Ok(ExitStatus::Done)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_are_quoted_for_each_shell() {
        let v = r"a'b\c";
        assert_eq!(Shell::Sh.line("X", v), r"export X='a'\''b\c'");
        assert_eq!(Shell::Fish.line("X", v), r"set -gx X 'a\'b\\c'");
        assert_eq!(Shell::Powershell.line("X", v), r"$env:X = 'a''b\c'");
    }
}
