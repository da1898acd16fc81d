//! A small file system of one test's own: an image in a file, mounted.

use std::path::{Path, PathBuf};
use std::process::Command;

use tempfile::TempDir;

use super::{LIMIT, Missing, need_root, required, wait_until};

/// A file system that can be made here.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Fs {
    Btrfs,
    /// Without reflinks, so that a copy is a copy.
    Xfs,
    Ext4,
}

impl Fs {
    fn name(self) -> &'static str {
        match self {
            Self::Btrfs => "btrfs",
            Self::Xfs => "xfs",
            Self::Ext4 => "ext4",
        }
    }

    fn mkfs(self) -> Command {
        let mut command = Command::new(format!("mkfs.{}", self.name()));
        command.arg("-q");
        if self == Self::Xfs {
            command.args(["-m", "reflink=0"]);
        }
        command
    }
}

/// A mounted image. Dropping it unmounts it, whoever still works there, and removes the file.
pub(crate) struct Image {
    fs: Fs,
    folder: TempDir,
    point: PathBuf,
    options: String,
}

impl Image {
    /// Makes and mounts a sparse image of that size, or nothing where that can't be done.
    pub(crate) fn make(fs: Fs, mib: u64) -> Option<Self> {
        Self::make_with(fs, mib, &[], "")
    }

    /// [`Image::make`] with arguments for mkfs and options for mount.
    pub(crate) fn make_with(fs: Fs, mib: u64, mkfs: &[&str], options: &str) -> Option<Self> {
        let parent = std::env::var_os("DBRANCH_TEST_TMP").unwrap_or_else(|| "/tmp".into());
        Self::make_at(Path::new(&parent), fs, mib, mkfs, options)
    }

    /// [`Image::make`] with the file on a disk of its own.
    pub(crate) fn make_in(parent: &Path, fs: Fs, mib: u64) -> Option<Self> {
        Self::make_at(parent, fs, mib, &[], "")
    }

    fn make_at(parent: &Path, fs: Fs, mib: u64, mkfs: &[&str], options: &str) -> Option<Self> {
        need_root()?;
        let folder = tempfile::Builder::new()
            .prefix("img-")
            .rand_bytes(5)
            .tempdir_in(parent)
            .expect("a folder for tests is writable");
        super::env::set_mode(folder.path(), 0o711);
        let image = Self {
            fs,
            point: folder.path().join("m"),
            folder,
            options: options.into(),
        };
        std::fs::create_dir(&image.point).expect("ours");
        let file = std::fs::File::create(image.file()).expect("ours");
        file.set_len(mib << 20)
            .expect("a sparse file takes nothing");
        let made = fs.mkfs().args(mkfs).arg(image.file()).output();
        if let Some(missing) = made.as_ref().err() {
            let missing = Missing(fs.name(), format!("mkfs.{}: {missing}", fs.name()));
            required::<()>(Err(missing))?;
        }
        assert!(made.is_ok_and(|out| out.status.success()), "mkfs works");
        if let Err(why) = image.try_mount() {
            required::<()>(Err(Missing(fs.name(), why)))?;
        }
        Some(image)
    }

    /// Where it is mounted. The folder beneath is empty.
    pub(crate) fn point(&self) -> &Path {
        &self.point
    }

    pub(crate) fn file(&self) -> PathBuf {
        self.folder.path().join("i")
    }

    fn try_mount(&self) -> Result<(), String> {
        let mut options = vec!["loop"];
        options.extend((!self.options.is_empty()).then_some(self.options.as_str()));
        let out = Command::new("mount")
            .args(["-t", self.fs.name(), "-o", &options.join(",")])
            .args([self.file(), self.point.clone()])
            .output()
            .map_err(|e| e.to_string())?;
        if !out.status.success() {
            return Err(String::from_utf8_lossy(&out.stderr).into_owned());
        }
        let mode = std::os::unix::fs::PermissionsExt::from_mode(0o711);
        std::fs::set_permissions(&self.point, mode).map_err(|e| e.to_string())
    }

    /// Mounts it again, anew: a mount that something else keeps for a moment may be a broken one.
    #[track_caller]
    pub(crate) fn mount(&self) {
        wait_until(LIMIT, "it is mounted again", || {
            self.try_mount().is_ok() || {
                self.run("umount", &[]);
                false
            }
        });
    }

    /// Unmounts it as soon as nobody works there any more.
    #[track_caller]
    pub(crate) fn unmount(&self) {
        wait_until(LIMIT, "nobody uses the file system any more", || {
            self.run("umount", &[])
        });
    }

    /// Takes the mount away under whoever works there; they keep what they have open.
    #[track_caller]
    pub(crate) fn unmount_lazily(&self) {
        assert!(self.run("umount", &["-l"]), "it is mounted");
    }

    #[track_caller]
    pub(crate) fn remount(&self, options: &str) {
        let options = format!("remount,{options}");
        wait_until(LIMIT, "it can be remounted", || {
            self.run("mount", &["-o", &options])
        });
    }

    #[track_caller]
    pub(crate) fn freeze(&self) {
        assert!(self.run("fsfreeze", &["-f"]), "it can be frozen");
    }

    #[track_caller]
    pub(crate) fn thaw(&self) {
        assert!(self.run("fsfreeze", &["-u"]), "it was frozen");
    }

    /// Takes all free room but `leave_mib`, at once, with a file of that name.
    #[track_caller]
    pub(crate) fn fill(&self, name: &str, leave_mib: u64) {
        let stat = nix::sys::statvfs::statvfs(&self.point).expect("it is mounted");
        let free = stat.blocks_available() * stat.fragment_size();
        let bytes = free.saturating_sub(leave_mib << 20);
        if bytes == 0 {
            return;
        }
        let bytes = bytes.to_string();
        let file = self.point.join(name);
        let out = Command::new("fallocate")
            .args(["-l", &bytes])
            .arg(&file)
            .output();
        let out = out.expect("fallocate is a part of util-linux");
        let said = String::from_utf8_lossy(&out.stderr);
        assert!(out.status.success() || said.contains("No space"), "{said}");
    }

    /// A program's success, with the mount point as its last argument.
    fn run(&self, program: &str, args: &[&str]) -> bool {
        let out = Command::new(program).args(args).arg(&self.point).output();
        out.is_ok_and(|out| out.status.success())
    }
}

impl Drop for Image {
    fn drop(&mut self) {
        // A test that failed may have left it frozen, or twice mounted.
        self.run("fsfreeze", &["-u"]);
        while self.run("umount", &["-l"]) {}
    }
}
