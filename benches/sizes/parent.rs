//! A parent with data, and branches of it made through the storage driver.

use std::collections::BTreeMap;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Context as _, Result};
use dbranch::postgres::{self, Admin, CONTROL_FILE, Conf, DATA_FOLDER};
use dbranch::storage::{Choice, Consistency, Omit, StorageDriver, open};
use dbranch::types::{Password, VolumeId};
use tempfile::TempDir;

use crate::client;
use crate::pool;
use crate::server::{self, PASSWORD, Programs, SUPERUSER, Server};

/// How the parent's cluster is made.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Variant {
    Standard,
    NoChecksums,
    SmallLogFiles,
}

impl Variant {
    pub(crate) const ALL: &[Self] = &[Self::Standard, Self::NoChecksums, Self::SmallLogFiles];

    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Standard => "as dbranch makes it",
            Self::NoChecksums => "without data checksums",
            Self::SmallLogFiles => "log files of 1 MiB",
        }
    }

    fn initdb(self, major: u32) -> &'static [&'static str] {
        match self {
            Self::Standard => &["--data-checksums"],
            Self::NoChecksums if major >= 18 => &["--no-data-checksums"],
            Self::NoChecksums => &[],
            Self::SmallLogFiles => &["--data-checksums", "--wal-segsize=1"],
        }
    }
}

/// A running server with data.
pub(crate) struct Parent<'a> {
    programs: &'a Programs,
    driver: Arc<dyn StorageDriver>,
    variant: Variant,
    volume: VolumeId,
    // Ended before its folders go.
    server: Option<Server>,
    folder: TempDir,
    scratch: TempDir,
}

impl<'a> Parent<'a> {
    pub(crate) async fn make(
        programs: &'a Programs,
        place: &Path,
        variant: Variant,
        scale: u32,
    ) -> Result<Self> {
        let folder = pool::temp_folder(place)?;
        let driver = open(Choice::Auto, &folder.path().join("pool"), server::owner()?)?;
        let mut parent = Self {
            programs,
            driver,
            variant,
            volume: VolumeId::random(),
            server: None,
            folder,
            // Short: a Unix socket's path may have 107 bytes.
            scratch: pool::temp_folder(Path::new("/tmp"))?,
        };
        let volume = parent.driver.create_volume(&parent.volume)?;
        let data_dir = volume.join(DATA_FOLDER);
        programs.initdb(
            &data_dir,
            parent.scratch.path(),
            variant.initdb(programs.major),
        )?;
        parent.configure(&data_dir, &[])?;
        let server = Server::start(programs, &data_dir, parent.scratch.path(), "parent").await?;
        let mut pgbench = programs.command("pgbench")?;
        pgbench
            .args(server.client_args())
            .args(["--initialize", "--quiet", "--init-steps=dtgvp"])
            .arg(format!("--scale={scale}"))
            .arg("postgres");
        pool::run(&mut pgbench)?;
        let session = client::connect(&server.config()).await?;
        // Rows that nobody has read or vacuumed since they were written: their hint bits are still to be set.
        session
            .batch_execute(
                "create table unread (id bigint, payload text) with (autovacuum_enabled = off);
                 insert into unread select i, repeat(md5(i::text), 28) from generate_series(1, 8000) i",
            )
            .await?;
        session.batch_execute("checkpoint").await?;
        parent.server = Some(server);
        Ok(parent)
    }

    fn configure(&self, data_dir: &Path, settings: &[(&str, &str)]) -> Result<()> {
        let conf = Conf {
            copy_on_write: self.driver.shares_blocks(),
            settings: settings
                .iter()
                .map(|(name, value)| ((*name).to_owned(), (*value).to_owned()))
                .collect::<BTreeMap<_, _>>(),
            ..Conf::default()
        };
        conf.write(data_dir, Some(server::owner()?))?;
        Ok(())
    }

    pub(crate) fn driver_name(&self) -> &'static str {
        self.driver.kind().as_str()
    }

    pub(crate) fn variant_name(&self) -> &'static str {
        self.variant.name()
    }

    pub(crate) fn bytes(&self) -> Result<u64> {
        Ok(self.driver.usage(&self.volume)?.logical_bytes)
    }

    /// Brings the file system to rest: what was written is on disk (syncfs(2)).
    pub(crate) fn settle(&self) -> Result<()> {
        nix::unistd::syncfs(&File::open(self.folder.path())?).context("sync the file system")
    }

    /// Makes and starts a branch with these settings over dbranch's.
    pub(crate) async fn branch(&self, settings: &[(&str, &str)]) -> Result<Branch<'_>> {
        let volume = VolumeId::random();
        let data_dir = self.clone_volume(&volume).await?;
        postgres::shed(&data_dir)?;
        self.configure(&data_dir, settings)?;
        let server = Server::start(
            self.programs,
            &data_dir,
            self.scratch.path(),
            &volume.as_str()[..8],
        )
        .await?;
        Ok(Branch {
            parent: self,
            volume,
            server,
        })
    }

    /// Clones the running parent, as dbranch does.
    async fn clone_volume(&self, to: &VolumeId) -> Result<PathBuf> {
        let (driver, from) = (&self.driver, &self.volume);
        let data_dir = driver.volume_path(to).join(DATA_FOLDER);
        if driver.consistency() == Consistency::Atomic {
            driver.clone_volume(from, to, Omit::NOTHING, &|_, _| ())?;
            return Ok(data_dir);
        }
        let server = self.server.as_ref().context("the parent does not run")?;
        let password = Password::new(PASSWORD);
        let admin = Admin::connect(&server.address(), SUPERUSER, "postgres", &password).await?;
        let mut backup = admin.start_backup().await?;
        driver.clone_volume(from, to, Omit(postgres::omit), &|_, _| ())?;
        driver.catch_up(from, to, Path::new(CONTROL_FILE))?;
        let label = backup.stop().await?;
        postgres::write_backup_label(&data_dir, &label, Some(server::owner()?))?;
        for file in label.wal_files() {
            driver.catch_up(from, to, &file)?;
        }
        drop(backup.end().await?);
        Ok(data_dir)
    }
}

impl Drop for Parent<'_> {
    fn drop(&mut self) {
        drop(self.server.take());
        for volume in self.driver.list().unwrap_or_default() {
            if let Err(e) = self.driver.destroy(&volume) {
                eprintln!("sizes: {e}");
            }
        }
    }
}

/// A branch with its server.
pub(crate) struct Branch<'a> {
    parent: &'a Parent<'a>,
    volume: VolumeId,
    server: Server,
}

impl Branch<'_> {
    pub(crate) async fn run(&self, statement: &str) -> Result<()> {
        let session = client::connect(&self.server.config()).await?;
        Ok(session.batch_execute(statement).await?)
    }

    /// The first answer.
    pub(crate) async fn answer(&self) -> Result<()> {
        self.run("select 1").await
    }

    /// Reads every table once and 1,000 rows by their keys.
    pub(crate) async fn select(&self) -> Result<()> {
        let session = client::connect(&self.server.config()).await?;
        let tables = "select quote_ident(nspname) || '.' || quote_ident(relname) from pg_class c \
                      join pg_namespace n on n.oid = relnamespace where relkind in ('r', 'm')";
        for row in session.query(tables, &[]).await? {
            let table: String = row.get(0);
            let count = format!("select count(*) from (select * from {table}) t");
            session.batch_execute(&count).await?;
        }
        let by_key = session
            .prepare("select abalance from pgbench_accounts where aid = $1")
            .await?;
        for i in 0..1000 {
            session.query(&by_key, &[&(i * 61 + 1)]).await?;
        }
        Ok(())
    }

    /// Updates 1 % of the accounts in one range, or one in 1,000 all over the table.
    pub(crate) async fn update(&self, scattered: bool, scale: u32) -> Result<()> {
        let accounts = u64::from(scale) * 100_000;
        let which = if scattered {
            "aid % 1000 = 7".to_owned()
        } else {
            format!(
                "aid between {} and {}",
                accounts / 2,
                accounts / 2 + accounts / 100 - 1
            )
        };
        self.run(&format!(
            "update pgbench_accounts set abalance = abalance + 1 where {which}"
        ))
        .await
    }

    pub(crate) fn owned_bytes(&self) -> Result<u64> {
        Ok(self.parent.driver.usage(&self.volume)?.exclusive_bytes)
    }
}
