//! A folder on btrfs, for dbranch's pool and the floor's snapshots.

use std::fs::{self, File, Permissions};
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result, bail, ensure};
use nix::sys::statfs::{BTRFS_SUPER_MAGIC, statfs};
use tempfile::TempDir;

use crate::ioctl;

const NEED: &str = "a folder on btrfs is needed: name one with DBRANCH_TEST_BTRFS, or run this as root with \
                    mkfs.btrfs (btrfs-progs) installed, and it mounts a file system of its own";

/// The file system of our own is a sparse file: it takes what is written.
const OWN_BYTES: u64 = 64 << 30;

/// The folder. Dropping it destroys all that is in it, and unmounts what was mounted.
pub(crate) struct Pool {
    dir: PathBuf,
    folder: Option<TempDir>,
    mount: Option<Mount>,
}

struct Mount {
    at: PathBuf,
    /// Holds the image and the mount point.
    _folder: TempDir,
}

impl Pool {
    pub(crate) fn open() -> Result<Self> {
        let (parent, mount) = if let Some(dir) = std::env::var_os("DBRANCH_TEST_BTRFS") {
            (PathBuf::from(dir), None)
        } else {
            let mount = Mount::make().context(NEED)?;
            (mount.at.clone(), Some(mount))
        };
        let found = statfs(&parent)
            .with_context(|| format!("look at {}", parent.display()))?
            .filesystem_type();
        ensure!(
            found == BTRFS_SUPER_MAGIC,
            "{} is not on btrfs; {NEED}",
            parent.display()
        );
        let folder = temp_folder(&parent)?;
        let dir = folder.path().canonicalize()?;
        for sub in ["pool", "floor"] {
            fs::create_dir(dir.join(sub))?;
            fs::set_permissions(dir.join(sub), Permissions::from_mode(0o711))?;
        }
        Ok(Self {
            dir,
            folder: Some(folder),
            mount,
        })
    }

    /// Where everything of this run lies.
    pub(crate) fn dir(&self) -> &Path {
        &self.dir
    }

    /// dbranch's.
    pub(crate) fn volumes(&self) -> PathBuf {
        self.dir.join("pool")
    }

    /// Ours.
    pub(crate) fn floor(&self) -> PathBuf {
        self.dir.join("floor")
    }

    /// Brings the file system to rest: what was written is on disk (syncfs(2)).
    pub(crate) fn settle(&self) -> Result<()> {
        let dir = File::open(&self.dir)?;
        nix::unistd::syncfs(&dir).context("sync the file system")
    }

    pub(crate) fn is_own(&self) -> bool {
        self.mount.is_some()
    }

    /// Destroys what a finished part of the run has left.
    pub(crate) fn clear(&self) {
        for sub in [self.volumes(), self.floor()] {
            for entry in fs::read_dir(&sub).into_iter().flatten().flatten() {
                let _ = ioctl::destroy(&entry.path());
            }
        }
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        self.clear();
        drop(self.folder.take());
    }
}

impl Mount {
    fn make() -> Result<Self> {
        ensure!(nix::unistd::geteuid().is_root(), "not root");
        let folder = temp_folder(&std::env::temp_dir())?;
        let image = folder.path().join("btrfs.img");
        File::create(&image)?.set_len(OWN_BYTES)?;
        run(Command::new("mkfs.btrfs").arg("-q").arg(&image))?;
        let at = folder.path().join("btrfs");
        fs::create_dir(&at)?;
        run(Command::new("mount")
            .args(["-o", "loop"])
            .arg(&image)
            .arg(&at))?;
        let mount = Self {
            at,
            _folder: folder,
        };
        fs::set_permissions(&mount.at, Permissions::from_mode(0o711))?;
        Ok(mount)
    }
}

impl Drop for Mount {
    fn drop(&mut self) {
        // A server that was killed may take a moment to let go of its files.
        for _ in 0..50 {
            if run(Command::new("umount").arg(&self.at)).is_ok() {
                return;
            }
            std::thread::sleep(std::time::Duration::from_millis(100));
        }
        eprintln!("branching: could not unmount {}", self.at.display());
    }
}

/// A folder that the server's user can pass through.
pub(crate) fn temp_folder(parent: &Path) -> Result<TempDir> {
    let folder = tempfile::Builder::new()
        .prefix("dbb-")
        .rand_bytes(5)
        .tempdir_in(parent)
        .with_context(|| format!("make a folder in {}", parent.display()))?;
    fs::set_permissions(folder.path(), Permissions::from_mode(0o711))?;
    Ok(folder)
}

/// Runs a program to its end and returns its standard output.
pub(crate) fn run(command: &mut Command) -> Result<String> {
    let out = command
        .stdin(std::process::Stdio::null())
        .output()
        .with_context(|| format!("run {command:?}"))?;
    if !out.status.success() {
        bail!(
            "{command:?}: {}: {}",
            out.status,
            String::from_utf8_lossy(&out.stderr).trim()
        );
    }
    Ok(String::from_utf8_lossy(&out.stdout).into_owned())
}
