use std::fs::{self, OpenOptions};
use std::io::{ErrorKind, Write};
use std::net::{Ipv4Addr, TcpListener};
use std::path::{Path, PathBuf};

use anyhow::anyhow;

use super::{doctor, install_hooks};
use crate::api::types::{At, Finding, Level, ProjectInfo, Request};
use crate::cli::context::{self, Context};
use crate::cli::report::{ExitStatus, Report};
use crate::config::{FILE_NAME, Machine, ProjectConfig, name_from};
use crate::git::{self, Head, Location};

const EXAMPLES: &str = "\
Examples:
  dbranch init
  dbranch init --yes                            ask nothing
  dbranch init --name shop --proxy-port 15433";

/// Make this repository a project
///
/// Writes .dbranch.config.json, or takes the one that is there as it is, and tells what this
/// machine offers. A second run changes nothing.
#[derive(Debug, clap::Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct Args {
    /// Ask nothing
    #[arg(long, short)]
    yes: bool,
    /// Name of the project [default: the folder's]
    #[arg(long)]
    name: Option<String>,
    /// Port that applications connect to [default: the first free one from 15432 on]
    #[arg(long, value_name = "PORT", value_parser = clap::value_parser!(u16).range(1..))]
    proxy_port: Option<u16>,
}

pub(crate) fn run(cx: &Context, args: Args) -> Result<ExitStatus, Report> {
    let location = cx.location()?;
    let ask_anything = !args.yes;
    // A daemon that runs already has not seen this shell's variables.
    Machine::load(&cx.paths)?;
    let Some(top) = location.worktree.clone() else {
        return Err(Report::refused(anyhow!(
            "{} is a bare repository, with no place for {FILE_NAME}",
            location.git_dir.display()
        ))
        .hint("run it in a worktree of it: `git worktree add <folder>`"));
    };
    let (file, created) = match context::config_file(&location) {
        Some(file) => {
            ProjectConfig::load(&file)?;
            if args.name.is_some() || args.proxy_port.is_some() {
                cx.ui.warn(format_args!(
                    "{} is there already and stays as it is",
                    file.display()
                ));
                cx.ui
                    .hint("change name and port in the file, then run `dbranch init` again");
            }
            (file, false)
        }
        None => (make_config(cx, &location, &top, args)?, true),
    };

    let at = at_of(&file, &location)?;
    let project: ProjectInfo = match cx.call_as(&Request::Register { at }) {
        Ok(project) => project,
        Err(report) => {
            // What nobody knows of is no use, and would stop a second try from being a first.
            if created {
                let _ = fs::remove_file(&file);
            }
            return Err(report);
        }
    };
    let mut findings = found_in_git(&location);
    findings.push(install_hooks::finding(&location));
    match doctor::remote(cx) {
        Ok(more) => findings.extend(more),
        Err(report) => cx.ui.warn(format_args!("{:#}", report.error)),
    }
    if cx.ui.json {
        cx.ui.answer_json(&serde_json::json!({
            "project": project,
            "config_file": file,
            "created": created,
            "findings": findings,
        }))?;
    } else {
        tell(cx, &project, &file, created);
        doctor::show(cx.ui, &findings)?;
    }
    if ask_anything && project.branches == 0 {
        super::storage::setup::offer(cx)?;
    }
    cx.ui.hint(if project.branches == 0 {
        "make the first database branch with `dbranch init-postgres`"
    } else {
        "see the branches with `dbranch list`"
    });
    Ok(ExitStatus::Done)
}

fn tell(cx: &Context, project: &ProjectInfo, file: &Path, created: bool) {
    if created {
        cx.ui.status(format_args!(
            "wrote {}; commit it to share it",
            file.display()
        ));
    }
    let (name, port) = (&project.name, project.proxy_port);
    match &project.moved_from {
        Some(from) => cx.ui.status(format_args!(
            "found project `{name}` again, which was in {}",
            from.display()
        )),
        None if project.new => {
            cx.ui
                .status(format_args!("registered project `{name}` on port {port}"));
        }
        None => cx.ui.status(format_args!(
            "project `{name}` is registered already, on port {port}"
        )),
    }
}

/// Where the file lies: this worktree, or the main one.
fn at_of(file: &Path, location: &Location) -> Result<At, Report> {
    match file.parent() {
        Some(top) if location.worktree.as_deref() != Some(top) => {
            Ok(context::at(&Location::discover(top)?))
        }
        _ => Ok(context::at(location)),
    }
}

fn make_config(
    cx: &Context,
    location: &Location,
    top: &Path,
    args: Args,
) -> Result<PathBuf, Report> {
    // The daemon must be there anyway; without it nothing is written.
    let others: Vec<ProjectInfo> = cx.call_as(&Request::Projects)?;
    let taken = |port: u16| {
        let other = others
            .iter()
            .find(|p| p.proxy_port == port && p.common_dir != location.common_dir);
        other.is_some() || TcpListener::bind((Ipv4Addr::LOCALHOST, port)).is_err()
    };
    let ask = cx.ui.can_ask() && !args.yes;
    let folder = location.main_worktree.as_deref().unwrap_or(top).file_name();
    let mut name = name_from(&folder.unwrap_or_default().to_string_lossy());
    if let Some(given) = args.name {
        name = given;
    } else if ask {
        let said = cx.ui.ask(&format!("Name of the project [{name}]:"))?;
        if !said.is_empty() {
            name = said;
        }
    }
    let mut config = ProjectConfig::new(name);
    // The branches' own ports follow; a handful before them is enough for a machine's projects.
    config.proxy_port = match args.proxy_port {
        Some(port) => port,
        None => free_port(config.proxy_port..config.port_min, taken, cx, ask)?,
    };
    if (config.port_min..=config.port_max).contains(&config.proxy_port) {
        return Err(Report::new(
            ExitStatus::Config,
            anyhow!(
                "port {} is one of the branches' own, {}..{}",
                config.proxy_port,
                config.port_min,
                config.port_max
            ),
        )
        .hint("give `--proxy-port` another one, such as 15432"));
    }
    let text = config.to_json();
    // Checks the name as it will be checked from now on.
    ProjectConfig::parse(&text, FILE_NAME)?;
    let file = top.join(FILE_NAME);
    write_new(&file, &text).map_err(|e| {
        Report::refused(anyhow!("write {}: {e}", file.display()))
            .hint("make the folder writable for your user")
    })?;
    Ok(file)
}

fn free_port(
    mut range: std::ops::Range<u16>,
    taken: impl Fn(u16) -> bool,
    cx: &Context,
    ask: bool,
) -> Result<u16, Report> {
    let first = range.start;
    let port = range.find(|port| !taken(*port)).unwrap_or(first);
    if !ask {
        return Ok(port);
    }
    loop {
        let said = cx
            .ui
            .ask(&format!("Port that applications connect to [{port}]:"))?;
        if said.is_empty() {
            return Ok(port);
        }
        match said.parse() {
            Ok(0) | Err(_) => cx.ui.warn("a port is a number from 1 to 65535"),
            Ok(said) => return Ok(said),
        }
    }
}

/// Writes a file that must not be there yet, whole or not at all.
fn write_new(file: &Path, text: &str) -> std::io::Result<()> {
    let part = file.with_file_name(format!("{FILE_NAME}.{}.part", std::process::id()));
    let written = OpenOptions::new()
        .write(true)
        .create_new(true)
        .open(&part)
        .and_then(|mut f| f.write_all(text.as_bytes()).and_then(|()| f.sync_all()));
    // Unlike rename(2), link(2) never replaces.
    let linked = written.and_then(|()| match fs::hard_link(&part, file) {
        Err(e) if e.kind() == ErrorKind::AlreadyExists => Err(e),
        Err(_) => OpenOptions::new()
            .write(true)
            .create_new(true)
            .open(file)
            .and_then(|mut f| f.write_all(text.as_bytes())),
        Ok(()) => Ok(()),
    });
    let _ = fs::remove_file(&part);
    linked
}

fn found_in_git(location: &Location) -> Vec<Finding> {
    let head = match git::head(&location.git_dir) {
        Ok(Head::Branch(name)) => format!("on branch `{name}`"),
        Ok(Head::Unborn(name)) => format!("on branch `{name}`, which has no commit yet"),
        Ok(Head::Detached(commit)) => format!("HEAD is detached at {commit:.10}"),
        Err(e) => return vec![doctor::finding_of("git", e.into())],
    };
    let top = location.worktree.as_ref().unwrap_or(&location.git_dir);
    vec![Finding {
        what: "git".into(),
        level: Level::Ok,
        detail: format!("{}, {head}", top.display()),
        fix: None,
    }]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_existing_config_is_never_overwritten() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join(FILE_NAME);
        write_new(&file, "one").unwrap();
        let e = write_new(&file, "two").unwrap_err();
        assert_eq!(e.kind(), ErrorKind::AlreadyExists);
        assert_eq!(fs::read_to_string(&file).unwrap(), "one");
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
    }
}
