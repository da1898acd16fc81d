//! The daemon: puts the parts together, keeps them running, takes them down.
//!
//! One a user. It owns registry, volumes, instances and endpoints, and is the only
//! writer of all of them. It holds no use case of its own.

mod answers;
mod control;
mod heads;
mod pools;
mod ports;
mod requests;
mod tcp;

use std::io::IsTerminal;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tracing::{info, warn};

use crate::api::serve;
use crate::config::{Machine, Paths};
use crate::engine::Engine;
use crate::fsx::{LockError, LockFile};
use crate::registry::Registry;
use control::Control;
use ports::ProxyPorts;
use requests::Requests;

/// How long operations under way may take when the daemon is told to end.
const DRAIN_LIMIT: Duration = Duration::from_secs(20);
/// How often the trash is looked through.
const TRASH_ROUND: Duration = Duration::from_secs(60 * 60);

/// How often the daemon looks whether its socket and its ports are still there.
const TEND_ROUND: Duration = Duration::from_secs(5);

/// How the daemon came to its end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ended {
    /// It was told to.
    Stopped,
    /// Another daemon of this user runs, with this pid where it is known.
    AlreadyRunning { pid: Option<u32> },
}

/// Runs the daemon until it is told to stop.
pub fn run(paths: &Paths) -> anyhow::Result<Ended> {
    paths.create()?;
    log_to_stderr();
    let _lock = match LockFile::acquire(&paths.lock_file()) {
        Ok(lock) => lock,
        Err(LockError::Held { pid, .. }) => return Ok(Ended::AlreadyRunning { pid }),
        Err(e) => return Err(e.into()),
    };
    raise_file_limit();
    tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
        .context("start the daemon's threads")?
        .block_on(serve_until_told(paths))
}

async fn serve_until_told(paths: &Paths) -> anyhow::Result<Ended> {
    let machine = Machine::load(paths)?;
    let registry = Registry::open(&paths.registry_file())?;
    let stop = CancellationToken::new();
    let ports = Arc::new(ProxyPorts::new(stop.child_token())?);
    let engine = Engine::new(paths.clone(), machine, registry, ports.clone())?;
    ports.serve_for(&engine);

    let listener = control::listen(paths)?;

    engine.recover().await?;
    let heads = heads::Heads::new(engine.clone())?;
    heads.watch_all();
    info!(
        pid = std::process::id(),
        version = env!("CARGO_PKG_VERSION"),
        "dbranch is up"
    );

    let requests = Requests::new(engine.clone(), paths.clone(), heads.clone(), stop.clone());
    let tcp = tcp::TcpApi::new(serve::router(requests.clone()), paths, stop.child_token())?;
    tcp.listen_on(&engine.api_ports());
    let serving = TaskTracker::new();
    let routes = serve::router(requests.with_tcp(tcp));
    let control = Control::serve(paths, listener, routes, &serving, &stop);
    let tending = tokio::spawn(tend(engine.clone(), control));
    let engine_of_trash = engine.clone();
    let trash = tokio::spawn(async move {
        loop {
            if let Err(e) = engine_of_trash.empty_trash().await {
                warn!("empty the trash: {e}");
            }
            tokio::time::sleep(TRASH_ROUND).await;
        }
    });
    let engine_of_heads = engine.clone();
    tokio::spawn(async move { engine_of_heads.follow_all().await });

    tokio::select! {
        () = stop.cancelled() => {}
        () = told_by_signal() => stop.cancel(),
    }
    info!("stopping; instances keep running");
    engine.close();
    tending.abort();
    trash.abort();
    heads.stop();
    if tokio::time::timeout(DRAIN_LIMIT, async {
        serving.close();
        serving.wait().await;
        ports.drain().await;
        engine.drain().await;
    })
    .await
    .is_err()
    {
        warn!("operations were still under way; the next start finishes them or takes them back");
    }
    let _ = std::fs::remove_file(paths.daemon_socket());
    info!("stopped");
    Ok(Ended::Stopped)
}

/// Looks after what others may take away: the socket's file, ports that were not free.
async fn tend(engine: Engine, mut control: Control) {
    loop {
        tokio::time::sleep(TEND_ROUND).await;
        control.mend();
        engine.listen_again().await;
    }
}

/// SIGTERM or SIGINT. A second one ends the process at once, by the default action.
async fn told_by_signal() {
    use tokio::signal::unix::{SignalKind, signal};
    let (Ok(mut terminate), Ok(mut interrupt)) = (
        signal(SignalKind::terminate()),
        signal(SignalKind::interrupt()),
    ) else {
        return std::future::pending().await;
    };
    tokio::select! {
        _ = terminate.recv() => {}
        _ = interrupt.recv() => {}
    }
    tokio::spawn(async move {
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
        }
        warn!("told twice: ending at once");
        std::process::abort();
    });
}

fn log_to_stderr() {
    use tracing_subscriber::filter::LevelFilter;
    let level = match std::env::var("DBRANCH_LOG").as_deref() {
        Ok("debug") => LevelFilter::DEBUG,
        Ok("trace") => LevelFilter::TRACE,
        Ok("warn") => LevelFilter::WARN,
        _ => LevelFilter::INFO,
    };
    // A second call, in tests, changes nothing.
    let _ = tracing_subscriber::fmt()
        .with_writer(std::io::stderr)
        .with_max_level(level)
        .with_target(false)
        .with_ansi(std::io::stderr().is_terminal() && std::env::var_os("NO_COLOR").is_none())
        .try_init();
}

/// Sessions take two descriptors each; the soft limit of 1024 is too low for pools.
fn raise_file_limit() {
    use nix::sys::resource::{Resource, getrlimit, setrlimit};
    if let Ok((_, hard)) = getrlimit(Resource::RLIMIT_NOFILE)
        && let Err(e) = setrlimit(Resource::RLIMIT_NOFILE, hard, hard)
    {
        warn!("raise the limit of open files: {e}");
    }
}
