use std::ffi::OsStr;
use std::fmt::Display;
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Instant;

use anyhow::{Context as _, anyhow, bail};
use serde::Serialize;
use tokio::process::Command;

use crate::api::types::{Created, UsageInfo};
use crate::cli::context::Context;
use crate::cli::render;
use crate::cli::report::{ExitStatus, Report};
use crate::cli::ui::Tone;
use crate::config::Machine;
use crate::postgres::query;
use crate::types::ProjectId;

const EXAMPLES: &str = "\
Examples:
  dbranch demo
  DBRANCH_POOL=/mnt/btrfs/pool dbranch demo
  DBRANCH_RUNTIME=docker dbranch demo";

const SCHEMA: &str = "
    create table customers (
        id int generated always as identity primary key, name text not null, email text unique, city text not null,
        joined date not null);
    create table orders (
        id bigint generated always as identity primary key, customer int not null references customers,
        placed timestamptz not null, total numeric(10, 2) not null, paid bool not null);
    insert into customers (name, email, city, joined)
    select (array['Ada','Grace','Edsger','Barbara','Donald','Frances','Tony','Radia'])[1 + i % 8] || ' ' ||
           (array['Okafor','Lindqvist','Moreau','Tanaka','Alvarez','Novak','Haddad'])[1 + i % 7],
           'customer' || i || '@example.com',
           (array['Lagos','Oslo','Lyon','Osaka','Lima','Brno','Amman'])[1 + (i * 5) % 7],
           date '2021-01-01' + i % 1500
    from generate_series(1, 5000) i;
    insert into orders (customer, placed, total, paid)
    select 1 + (i * 7919) % 5000, timestamptz '2024-01-01' + i * interval '11 minutes', 5 + (i * 37) % 400 + 0.99,
           i % 9 <> 0
    from generate_series(1, 50000) i;
    create index on orders (customer);
    analyze";

const MIGRATION: &str = "
    alter table customers add column points int not null default 0;
    update customers c set points = o.points
    from (select customer, floor(sum(total))::int as points from orders where paid group by customer) o
    where o.customer = c.id;
    delete from orders where not paid";

const LOOK: &str = "
    select (select string_agg(attname, ' ' order by attnum) from pg_attribute
            where attrelid = 'customers'::regclass and attnum > 0),
           (select count(*) from orders)";

/// Show what dbranch does, in a folder of its own that is removed again
///
/// Makes a repository and a database, branches both with git, migrates the branch and
/// goes back. Touches nothing else of yours.
#[derive(Debug, clap::Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct Args {}

/// What was measured, in milliseconds.
#[derive(Debug, Default, Serialize)]
struct Timings {
    init_postgres_ms: f64,
    load_ms: f64,
    checkout_new_ms: f64,
    first_answer_ms: f64,
    checkout_back_ms: f64,
    answer_back_ms: f64,
    storage: String,
    runtime: String,
    branch_own_bytes: u64,
    branch_bytes: u64,
}

/// Plays the demo. An interrupt cleans up too.
pub(crate) fn run(cx: &Context, _: &Args) -> Result<ExitStatus, Report> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(|e| Report::refused(anyhow!("start a runtime: {e}")))?;
    runtime.block_on(async {
        let stage = Stage::set(cx).map_err(Report::refused)?;
        let played = tokio::select! {
            played = stage.play(cx) => Some(played),
            Ok(()) = tokio::signal::ctrl_c() => None,
        };
        let struck = stage.strike().await;
        match played {
            None => Ok(ExitStatus::Interrupted),
            Some(played) => {
                let timings = played.map_err(|e| Report::refused(e).hint("dbranch doctor"))?;
                struck.map_err(Report::refused)?;
                if cx.ui.json {
                    cx.ui.answer_json(&timings)?;
                } else {
                    cx.ui.answer(
                        "\nAll of it is removed again. In a repository of yours: dbranch init",
                    )?;
                }
                Ok(ExitStatus::Done)
            }
        }
    })
}

/// The demo's own home, repository and pool.
struct Stage {
    home: PathBuf,
    pool: PathBuf,
    program: PathBuf,
    proxy_port: u16,
}

impl Stage {
    fn set(cx: &Context) -> anyhow::Result<Self> {
        use std::os::unix::fs::DirBuilderExt;
        let name = format!("dbranch-demo-{}", ProjectId::random());
        let home = std::env::temp_dir().join(&name);
        // Others may pass through, as postgres must when root plays.
        std::fs::DirBuilder::new()
            .mode(0o711)
            .create(&home)
            .with_context(|| format!("make {}", home.display()))?;
        let machine = Machine::load(&cx.paths)?;
        let pool = machine
            .pool
            .value
            .unwrap_or_else(|| cx.paths.default_pool().to_owned())
            .join(name);
        let free = TcpListener::bind("127.0.0.1:0").context("find a free port")?;
        Ok(Self {
            home,
            pool,
            program: std::env::current_exe().context("find this program")?,
            proxy_port: free.local_addr().context("find a free port")?.port(),
        })
    }

    fn repository(&self) -> PathBuf {
        self.home.join("shop")
    }

    async fn play(&self, cx: &Context) -> anyhow::Result<Timings> {
        let mut t = Timings::default();
        say(
            cx,
            "A shop's database, branched with git. One URL throughout.",
        )?;
        let url = self.open_the_shop(cx, &mut t).await?;
        let branch = self.branch_and_migrate(cx, &url, &mut t).await?;

        say_typed(cx, "git checkout main")?;
        let begun = Instant::now();
        let said = self.git(&["checkout", "-q", "main"]).await?;
        t.checkout_back_ms = millis(begun);
        let main = look(&url).await?;
        t.answer_back_ms = millis(begun);
        say(
            cx,
            format!(
                "  {}\n  main answered after {}",
                said.trim(),
                render::millis(t.answer_back_ms)
            ),
        )?;
        if main == branch {
            bail!("both branches show the same: {main:?}");
        }
        self.compare(cx, main, branch, &mut t).await?;
        Ok(t)
    }

    /// Makes repository, project and database; the URL.
    async fn open_the_shop(&self, cx: &Context, t: &mut Timings) -> anyhow::Result<String> {
        std::fs::create_dir(self.repository()).context("make the repository's folder")?;
        self.git(&["init", "-q", "-b", "main"]).await?;
        self.git(&["commit", "-q", "--allow-empty", "-m", "A shop"])
            .await?;
        say_typed(
            cx,
            "dbranch init && dbranch init-postgres && dbranch install-hooks",
        )?;
        let port = self.proxy_port.to_string();
        self.dbranch(&["init", "--yes", "--name", "shop", "--proxy-port", &port])
            .await?;
        let begun = Instant::now();
        let (created, notes) = self.init_postgres().await?;
        t.init_postgres_ms = millis(begun);
        t.storage.clone_from(&created.storage);
        t.runtime.clone_from(&created.runtime);
        self.dbranch(&["install-hooks"]).await?;
        let url = self.dbranch(&["url"]).await?.trim().to_owned();
        say(
            cx,
            format!(
                "  main: PostgreSQL {}, {} runtime, {} storage: {}{notes}\n  {url}",
                created.postgres_version,
                created.runtime,
                created.storage,
                render::millis(t.init_postgres_ms)
            ),
        )?;
        let begun = Instant::now();
        query(&url, SCHEMA).await?;
        t.load_ms = millis(begun);
        say(
            cx,
            format!(
                "  5,000 customers and 50,000 orders loaded: {}",
                render::millis(t.load_ms)
            ),
        )?;
        Ok(url)
    }

    /// What the new branch shows after its migration.
    async fn branch_and_migrate(
        &self,
        cx: &Context,
        url: &str,
        t: &mut Timings,
    ) -> anyhow::Result<[String; 2]> {
        say_typed(cx, "git checkout -b feature/loyalty")?;
        let begun = Instant::now();
        let said = self
            .git(&["checkout", "-q", "-b", "feature/loyalty"])
            .await?;
        t.checkout_new_ms = millis(begun);
        query(url, "select 1").await?;
        t.first_answer_ms = millis(begun);
        say(
            cx,
            format!(
                "  {}\n  git was back after {}, the new branch answered after {}",
                said.trim(),
                render::millis(t.checkout_new_ms),
                render::millis(t.first_answer_ms)
            ),
        )?;
        say_typed(
            cx,
            "psql \"$(dbranch url)\" -f migrations/2_loyalty_points.sql",
        )?;
        query(url, MIGRATION).await?;
        look(url).await
    }

    async fn compare(
        &self,
        cx: &Context,
        main: [String; 2],
        branch: [String; 2],
        t: &mut Timings,
    ) -> anyhow::Result<()> {
        say(cx, "\nThe same URL, on each branch:")?;
        let rows = [("main", main), ("feature/loyalty", branch)]
            .map(|(name, [columns, orders])| vec![name.to_owned(), orders, columns]);
        for line in render::table(&["", "ORDERS", "COLUMNS OF CUSTOMERS"], &rows) {
            say(cx, format!("  {line}"))?;
        }
        let usage: UsageInfo = serde_json::from_str(&self.dbranch(&["usage", "--json"]).await?)?;
        if let Some(of_branch) = usage
            .branches
            .iter()
            .find(|b| b.name.as_str() == "feature/loyalty")
        {
            t.branch_bytes = of_branch.logical_bytes;
            t.branch_own_bytes = of_branch.exclusive_bytes;
            say(
                cx,
                format!(
                    "  feature/loyalty has {}, of which {} are its own",
                    render::bytes(t.branch_bytes),
                    render::bytes(t.branch_own_bytes)
                ),
            )?;
        }
        Ok(())
    }

    /// Native postgres where there is one, unless the user says otherwise. With what was noted,
    /// such as why branches are full copies here.
    async fn init_postgres(&self) -> anyhow::Result<(Created, String)> {
        let arguments = ["init-postgres", "--json"];
        let mut made = Err(anyhow!("DBRANCH_RUNTIME decides"));
        if std::env::var_os("DBRANCH_RUNTIME").is_none() {
            let native = [&arguments[..], &["--runtime", "native"]].concat();
            made = self.run(&self.program, &native).await;
        }
        let (answer, said) = match made {
            Ok(made) => made,
            Err(no_native) => self
                .run(&self.program, &arguments)
                .await
                .map_err(|e| anyhow!("{e}; {no_native}"))?,
        };
        let notes = said.lines().filter(|line| line.starts_with("note:"));
        let notes: Vec<_> = notes.map(|line| format!("\n  {line}")).collect();
        Ok((serde_json::from_str(&answer)?, notes.concat()))
    }

    /// Takes everything down. Runs whatever happened before.
    async fn strike(self) -> anyhow::Result<()> {
        let mut gone = Ok(());
        if self.repository().join(".git/dbranch").exists() {
            gone = self
                .dbranch(&["delete-project", "--now", "--yes"])
                .await
                .map(drop);
        }
        let down = self
            .dbranch(&["shutdown", "--stop-branches"])
            .await
            .map(drop);
        for dir in [&self.pool, &self.home] {
            match std::fs::remove_dir_all(dir) {
                Err(e) if e.kind() != std::io::ErrorKind::NotFound => {
                    gone = gone.and(Err(anyhow!(e).context(format!("remove {}", dir.display()))));
                }
                _ => {}
            }
        }
        gone.and(down)
    }

    /// Runs this very program on the stage; its answer.
    async fn dbranch(&self, arguments: &[&str]) -> anyhow::Result<String> {
        let (answer, _) = self.run(&self.program, arguments).await?;
        Ok(answer)
    }

    /// Runs git; what it and its hook said.
    async fn git(&self, arguments: &[&str]) -> anyhow::Result<String> {
        let (_, said) = self.run(Path::new("git"), arguments).await?;
        Ok(said)
    }

    async fn run(&self, program: &Path, arguments: &[&str]) -> anyhow::Result<(String, String)> {
        let here = self.program.parent().unwrap_or(Path::new("/"));
        let path = std::env::var_os("PATH").unwrap_or_default();
        let path = std::env::join_paths(
            [here.to_owned()]
                .into_iter()
                .chain(std::env::split_paths(&path)),
        )
        .context("extend PATH")?;
        let mut command = Command::new(program);
        for (name, _) in std::env::vars_os() {
            if name.to_string_lossy().starts_with("GIT_") {
                command.env_remove(name);
            }
        }
        let output = command
            .args(arguments)
            .current_dir(if self.repository().exists() {
                self.repository()
            } else {
                self.home.clone()
            })
            .env("DBRANCH_HOME", &self.home)
            .env("DBRANCH_POOL", &self.pool)
            .env("PATH", path)
            .env("GIT_CONFIG_GLOBAL", "/dev/null")
            .envs(["GIT_AUTHOR_NAME", "GIT_COMMITTER_NAME"].map(|name| (name, "dbranch demo")))
            .envs(["GIT_AUTHOR_EMAIL", "GIT_COMMITTER_EMAIL"].map(|name| (name, "demo@localhost")))
            .stdin(Stdio::null())
            .kill_on_drop(true)
            .output()
            .await
            .with_context(|| format!("run {}", program.display()))?;
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        if !output.status.success() {
            let name = program
                .file_name()
                .and_then(OsStr::to_str)
                .unwrap_or("program");
            bail!(
                "`{name} {}` ended with {}: {}",
                arguments.join(" "),
                output.status,
                said.trim()
            );
        }
        Ok((String::from_utf8_lossy(&output.stdout).into_owned(), said))
    }
}

fn say(cx: &Context, line: impl Display) -> anyhow::Result<()> {
    if cx.ui.json {
        return Ok(());
    }
    cx.ui.answer(line).map_err(|report| report.error)
}

fn say_typed(cx: &Context, command: &str) -> anyhow::Result<()> {
    say(cx, format!("\n{} {command}", cx.ui.paint(Tone::Faint, "$")))
}

/// What an app sees through the URL: columns of `customers`, number of orders.
async fn look(url: &str) -> anyhow::Result<[String; 2]> {
    let row = query(url, LOOK)
        .await?
        .into_iter()
        .next()
        .unwrap_or_default();
    row.try_into()
        .map_err(|row| anyhow!("an odd answer: {row:?}"))
}

fn millis(since: Instant) -> f64 {
    since.elapsed().as_secs_f64() * 1000.0
}
