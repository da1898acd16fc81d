//! Shows what is to be done to a pool, asks, and has it done: the user's part by the user, the
//! rest by root, however that can be had.

use std::os::fd::AsFd;
use std::process::{Command, Stdio};

use anyhow::{Context as _, anyhow};

use super::{Via, Ways};
use crate::api::types::{At, PoolChange, PoolJob, PoolPlan, PoolScript, Request};
use crate::cli::context::{self, Context};
use crate::cli::report::{ExitStatus, Report};
use crate::fsx::{LockError, LockFile};
use crate::git::Location;

/// A job that is being carried out. While it lives no other command works on a pool.
pub(super) struct Work<'a> {
    cx: &'a Context,
    ways: &'a Ways,
    job: PoolJob,
    pub(super) plan: PoolPlan,
    _lock: LockFile,
}

/// How root's part is done.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Root {
    /// By this process: it is root.
    Self_,
    /// `password` may be asked for.
    Sudo {
        may_ask: bool,
    },
    Container {
        image: String,
    },
    /// Not by us.
    Nobody,
}

impl<'a> Work<'a> {
    /// Asks what is to be done.
    pub(super) fn plan(
        cx: &'a Context,
        ways: &'a Ways,
        change: PoolChange,
        force: bool,
    ) -> Result<Self, Report> {
        let beside = |path: &std::path::PathBuf| cx.dir.join(path);
        let job = PoolJob {
            // The daemon stands elsewhere.
            path: ways.path.as_ref().map(beside),
            change,
            force,
            unit_dir: ways.at_start.unit_dir.as_ref().map(beside),
            fstab: ways.at_start.fstab.as_ref().map(beside),
        };
        let plan = ask(cx, &job)?;
        let lock = LockFile::acquire(&cx.paths.storage_lock()).map_err(|e| match e {
            LockError::Held { pid, .. } => {
                let who = pid.map_or(String::new(), |pid| format!(" (process {pid})"));
                Report::refused(anyhow!("another `dbranch storage` command is at work{who}"))
                    .hint("wait for it, then try again")
            }
            e @ LockError::Io { .. } => Report::refused(e),
        })?;
        for note in &plan.notes {
            cx.ui.status(format_args!("note: {note}"));
        }
        Ok(Self {
            cx,
            ways,
            job,
            plan,
            _lock: lock,
        })
    }

    pub(super) fn is_done(&self) -> bool {
        self.plan.groups.is_empty()
    }

    /// What `--dry-run` answers.
    pub(super) fn show_only(&self) -> Result<ExitStatus, Report> {
        let ui = self.cx.ui;
        if ui.json {
            ui.answer_json(&self.plan)?;
            return Ok(ExitStatus::Done);
        }
        for group in &self.plan.groups {
            let who = if group.as_root { "root" } else { "you" };
            ui.answer(format_args!("# ---- as {who}\n{}", group.script.trim_end()))?;
        }
        if self.is_done() {
            ui.status("nothing to do");
        }
        Ok(ExitStatus::Done)
    }

    /// Shows what will be done, and asks.
    pub(super) fn ask(&self, consequence: &str) -> Result<(), Report> {
        let root = self.root()?;
        for group in &self.plan.groups {
            let who = match (group.as_root, &root) {
                (false, _) => "as you".to_owned(),
                (true, Root::Self_) => "as root".to_owned(),
                (true, Root::Sudo { .. }) => "as root, by sudo".to_owned(),
                (true, Root::Container { image }) => {
                    format!(
                        "as root, by a container of {image} that may mount and sees this machine"
                    )
                }
                (true, Root::Nobody) => "as root, which is left to you".to_owned(),
            };
            // As it is: a blank more could change what the lines mean.
            self.cx.ui.err(format_args!("---- {who}\n{}", group.script));
        }
        self.cx.ui.confirm(consequence, self.ways.yes)
    }

    /// Does what was shown, one group after the other. Before each it is looked again what is
    /// still to be done; only what was shown is ever run.
    pub(super) fn carry_out(&mut self) -> Result<(), Report> {
        let shown = std::mem::take(&mut self.plan.groups);
        let root = self.root()?;
        for group in &shown {
            self.plan = ask(self.cx, &self.job)?;
            match self.plan.groups.first() {
                Some(next) if next == group => self.run(group, &root)?,
                // Somebody else did it meanwhile.
                Some(next) if shown.contains(next) => {}
                None => {}
                Some(_) => {
                    return Err(Report::refused(anyhow!(
                        "what is to be done has changed since it was shown"
                    ))
                    .hint("look at it again: the same command once more"));
                }
            }
        }
        Ok(())
    }

    fn run(&self, group: &PoolScript, root: &Root) -> Result<(), Report> {
        if !group.as_root || *root == Root::Self_ {
            return run_here(Command::new("sh").args(["-c", &group.script]));
        }
        match root {
            Root::Sudo { may_ask } => {
                let mut sudo = Command::new("sudo");
                if !may_ask {
                    sudo.arg("-n");
                }
                run_here(sudo.args(["--", "sh", "-c", &group.script])).map_err(|report| {
                    if self.plan.container_image.is_some() {
                        report.hint("if `sudo` is not for you: `--via docker`")
                    } else {
                        report
                    }
                })
            }
            Root::Container { .. } => {
                let request = Request::PoolRun {
                    job: self.job.clone(),
                    script: group.script.clone(),
                    at: here(self.cx),
                };
                let said: String = self.cx.call_as(&request)?;
                if !said.trim().is_empty() {
                    self.cx.ui.status(said.trim());
                }
                Ok(())
            }
            Root::Self_ | Root::Nobody => Err(Report::refused(anyhow!(
                "the rest takes root, and there is neither `sudo` nor a Docker image to do it with"
            ))
            .hint(
                "let root run with `sh` what is shown above under `as root`; then the same command again, which \
                 goes on from there",
            )),
        }
    }

    fn root(&self) -> Result<Root, Report> {
        let container = || {
            self.plan
                .container_image
                .clone()
                .map(|image| Root::Container { image })
        };
        if nix::unistd::geteuid().is_root() {
            return Ok(Root::Self_);
        }
        let may_ask = self.cx.ui.can_ask();
        match self.ways.via {
            Some(Via::Sudo) => Ok(Root::Sudo { may_ask }),
            Some(Via::Docker) => container().ok_or_else(|| {
                Report::refused(anyhow!(
                    "Docker can't be used for it: no engine answers on this machine, or it has no image with a \
                     shell and nsenter, such as postgres or debian"
                ))
                .hint("`docker pull postgres`, or `--via sudo`")
            }),
            None if may_ask && has_sudo() => Ok(Root::Sudo { may_ask }),
            None if sudo_needs_no_password() => Ok(Root::Sudo { may_ask: false }),
            None => Ok(container().unwrap_or(Root::Nobody)),
        }
    }
}

fn ask(cx: &Context, job: &PoolJob) -> Result<PoolPlan, Report> {
    cx.call_as(&Request::PoolPlan {
        job: job.clone(),
        at: here(cx),
    })
}

/// The project the user stands in, if it is one: its image may serve.
fn here(cx: &Context) -> Option<At> {
    let location = Location::discover(&cx.dir).ok()?;
    context::is_marked(&location).then(|| context::at(&location))
}

fn has_sudo() -> bool {
    std::env::var_os("PATH")
        .is_some_and(|path| std::env::split_paths(&path).any(|dir| dir.join("sudo").is_file()))
}

fn sudo_needs_no_password() -> bool {
    Command::new("sudo")
        .args(["-n", "true"])
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .status()
        .is_ok_and(|status| status.success())
}

/// Runs a program to its end. All it says goes to standard error: the answer is ours to give.
fn run_here(command: &mut Command) -> Result<(), Report> {
    let err = std::io::stderr()
        .as_fd()
        .try_clone_to_owned()
        .context("share standard error")?;
    let program = command.get_program().to_string_lossy().into_owned();
    let status = command
        .stdin(Stdio::null())
        .stdout(Stdio::from(err))
        .status()
        .with_context(|| format!("run {program}"))?;
    if status.success() {
        return Ok(());
    }
    Err(Report::refused(anyhow!("that did not work ({program}: {status})")).hint(
        "the same command again goes on from there; `dbranch storage status` shows how far it came",
    ))
}
