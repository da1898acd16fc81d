use clap_complete::ArgValueCompleter;

use super::state;
use crate::api::types::{Backend, BranchDetails, Request, StatusInfo};
use crate::cli::complete;
use crate::cli::context::Context;
use crate::cli::render;
use crate::cli::report::{ExitStatus, Report};
use crate::cli::ui::Ui;
use crate::types::BranchName;

const EXAMPLES: &str = "\
Examples:
  dbranch show                       the active branch
  dbranch show feature/login
  dbranch show main --json | jq -r .volume";

/// Show all of one branch
#[derive(Debug, clap::Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct Args {
    /// Branch to show [default: the active one]
    #[arg(add = ArgValueCompleter::new(complete::branches))]
    name: Option<BranchName>,
}

pub(crate) fn run(cx: &Context, args: Args) -> Result<ExitStatus, Report> {
    let at = cx.at()?;
    let name = match args.name {
        Some(name) => name,
        None => active(cx)?,
    };
    cx.answer(&Request::Show { at, name }, |ui, branch: &BranchDetails| {
        for line in render::fields(&fields(ui, branch)) {
            ui.answer(line)?;
        }
        Ok(())
    })?;
    Ok(ExitStatus::Done)
}

/// The branch that this worktree's URL shows.
pub(super) fn active(cx: &Context) -> Result<BranchName, Report> {
    let status: StatusInfo = cx.call_as(&Request::Status { at: cx.at()? })?;
    status.branch.ok_or_else(|| {
        Report::refused(anyhow::anyhow!("there is no active branch here"))
            .hint("make the first with `dbranch init-postgres`, or name one")
    })
}

fn fields(ui: Ui, branch: &BranchDetails) -> Vec<(&'static str, String)> {
    let info = &branch.info;
    let mut fields = vec![
        ("name", info.name.to_string()),
        ("state", state(ui, info.state)),
    ];
    let mut add = |name, value: Option<String>| fields.extend(value.map(|value| (name, value)));
    add("failure", info.failure.clone());
    add("next", info.failure_hint.clone());
    add("active", info.active.then(|| "yes".into()));
    add("parent", info.parent.as_ref().map(ToString::to_string));
    let children: Vec<&str> = branch.children.iter().map(BranchName::as_str).collect();
    add(
        "children",
        (!children.is_empty()).then(|| children.join(", ")),
    );
    add("url", Some(branch.url.clone()));
    add("sessions", Some(branch.sessions.to_string()));
    add("postgres", Some(branch.postgres_version.to_string()));
    add("runtime", Some(branch.runtime.clone()));
    add(
        "backend",
        Some(match &branch.backend {
            Backend::Unix { unix, port } => format!("{}:{port}", unix.display()),
            Backend::Tcp { tcp, port } => format!("{tcp}:{port}"),
        }),
    );
    add("storage", Some(branch.storage.clone()));
    add("volume", Some(branch.volume.display().to_string()));
    let size = branch
        .logical_bytes
        .map(|all| match branch.exclusive_bytes {
            Some(own) => format!("{} ({} its own)", render::bytes(all), render::bytes(own)),
            None => render::bytes(all),
        });
    add("size", size);
    add("log", Some(branch.log_file.display().to_string()));
    add(
        "created",
        Some(format!(
            "{} ({})",
            render::when(&info.created_at),
            info.created_at
        )),
    );
    add("id", Some(info.id.to_string()));
    fields
}
