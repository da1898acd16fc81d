//! Words typed, words shown. A thin client of the api: parse, call, render.
//!
//! `args` is the command line, `commands` one file a command, `context` what they share,
//! `ui` the only place that prints, `report` how a command ends. The only user of `clap`.

mod args;
mod commands;
mod complete;
mod context;
mod grid;
mod render;
mod report;
mod ui;

use std::panic::{self, AssertUnwindSafe};
use std::process::ExitCode;

use anyhow::anyhow;
use clap::{CommandFactory, Parser};

use args::{Cli, Command};
use context::Context;
pub use report::{ExitStatus, Report};
use ui::Ui;

/// Runs the command line of this process.
pub fn main() -> ExitCode {
    let args: Vec<_> = std::env::args_os().collect();
    // Before anything else: git waits for this one.
    if let Some(hook) = commands::hook::fast_path(&args) {
        return hook.into();
    }
    match complete::answer() {
        Ok(false) => {}
        Ok(true) => return ExitStatus::Done.into(),
        Err(_) => return ExitStatus::Refused.into(),
    }
    match Cli::try_parse_from(args) {
        Ok(cli) => run(cli).into(),
        Err(e) => {
            // A closed pipe is no reason to complain.
            let _ = e.print();
            ExitCode::from(u8::try_from(e.exit_code()).unwrap_or(2))
        }
    }
}

fn run(cli: Cli) -> ExitStatus {
    let ui = Ui::new(cli.global.color, cli.global.quiet, cli.global.json);
    // The daemon has signal handling and logging of its own.
    if let Command::Start(args) = &cli.command
        && args.is_daemon()
    {
        let run = AssertUnwindSafe(|| {
            let cx = Context::new(ui, cli.global.directory.clone())?;
            commands::start::run_daemon(&cx, args)
        });
        return match panic::catch_unwind(run) {
            Ok(outcome) => conclude(ui, outcome),
            Err(_) => bug(ui),
        };
    }
    log_warnings();
    // Cleans up on Ctrl-C, so it must see it itself.
    if let Command::Demo(args) = &cli.command {
        let shown = Context::new(ui, cli.global.directory.clone())
            .and_then(|cx| commands::demo::run(&cx, args));
        return conclude(ui, shown);
    }
    interruptible(ui, move || {
        conclude(
            ui,
            Context::new(ui, cli.global.directory.clone()).and_then(|cx| dispatch(&cx, cli)),
        )
    })
}

fn conclude(ui: Ui, outcome: Result<ExitStatus, Report>) -> ExitStatus {
    match outcome {
        Ok(status) => status,
        Err(report) => {
            ui.report(&report);
            report.status
        }
    }
}

fn bug(ui: Ui) -> ExitStatus {
    let report = Report::new(ExitStatus::Bug, anyhow!("this is a bug in dbranch"))
        .hint("report it with the lines above; `dbranch doctor` tells more of this machine");
    ui.report(&report);
    report.status
}

/// Runs a command on a thread of its own, so that Ctrl-C ends the process whatever the
/// command waits for. The daemon finishes or undoes what it was asked.
fn interruptible(ui: Ui, command: impl FnOnce() -> ExitStatus + Send + 'static) -> ExitStatus {
    let (done, outcome) = tokio::sync::oneshot::channel();
    let runtime = match tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
    {
        Ok(runtime) => runtime,
        Err(e) => return conclude(ui, Err(Report::refused(anyhow!("start a runtime: {e}")))),
    };
    let thread = std::thread::Builder::new()
        .name("command".into())
        .spawn(move || {
            // Dropped by a panic, which the other side takes for what it is.
            let _ = done.send(command());
        });
    if let Err(e) = thread {
        return conclude(ui, Err(Report::refused(anyhow!("start a thread: {e}"))));
    }
    runtime.block_on(async {
        tokio::select! {
            biased;
            outcome = outcome => outcome.unwrap_or_else(|_| bug(ui)),
            Ok(()) = tokio::signal::ctrl_c() => ExitStatus::Interrupted,
        }
    })
}

fn log_warnings() {
    // Fails only when a subscriber is set already, which is as good.
    let _ = tracing_subscriber::fmt()
        .with_max_level(tracing::Level::WARN)
        .with_writer(std::io::stderr)
        .without_time()
        .with_target(false)
        .try_init();
}

fn dispatch(cx: &Context, cli: Cli) -> Result<ExitStatus, Report> {
    use commands as c;
    match cli.command {
        Command::Init(args) => c::init::run(cx, args),
        Command::InitPostgres(args) => c::init_postgres::run(cx, args),
        Command::InstallHooks(args) => c::install_hooks::run(cx, &args),
        Command::UninstallHooks(args) => c::uninstall_hooks::run(cx, &args),
        Command::Create(args) => c::create::run(cx, args),
        Command::Use(args) => c::r#use::run(cx, args),
        Command::List(args) => c::list::run(cx, &args),
        Command::Show(args) => c::show::run(cx, args),
        Command::Status(args) => c::status::run(cx, &args),
        Command::Usage(args) => c::usage::run(cx, &args),
        Command::Storage(args) => c::storage::run(cx, args),
        Command::Url(args) => c::url::run(cx, args),
        Command::Env(args) => c::env::run(cx, args),
        Command::Psql(args) => c::psql::run(cx, args),
        Command::Logs(args) => c::logs::run(cx, args),
        Command::Delete(args) => c::delete::run(cx, &args),
        Command::Undelete(args) => c::undelete::run(cx, args),
        Command::Forget(args) => c::forget::run(cx, &args),
        Command::DeleteProject(args) => c::delete_project::run(cx, &args),
        Command::Stop(args) => c::stop::run(cx, args),
        Command::Resume(args) => c::resume::run(cx, args),
        Command::Sync(args) => c::sync::run(cx, &args),
        Command::Allow(args) => c::allow::run(cx, &args),
        Command::Start(args) => c::start::run(cx, &args),
        Command::Shutdown(args) => c::shutdown::run(cx, &args),
        Command::Doctor(args) => c::doctor::run(cx, &args),
        Command::Completions(args) => c::completions::run(cx, &args),
        Command::Demo(args) => c::demo::run(cx, &args),
        Command::Hook(args) => Ok(c::hook::run(&args)),
    }
}

/// The whole command line, for documentation and completions.
fn command() -> clap::Command {
    Cli::command()
}
