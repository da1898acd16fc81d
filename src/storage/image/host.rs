//! What this machine brings along for a pool: kernel, programs, room.

use std::env;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use super::FileSystem;
use crate::storage::pool::space_of;

/// Whether the kernel knows a file system or can load it. Yes, where that can't be told:
/// mounting tells then.
pub fn kernel_has(file_system: FileSystem) -> bool {
    let known = fs::read_to_string("/proc/filesystems").unwrap_or_default();
    if known.lines().any(|l| l.trim() == file_system.as_str()) {
        return true;
    }
    let release = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    let modules = Path::new("/lib/modules").join(release.trim());
    let lists: Vec<String> = ["modules.dep", "modules.builtin"]
        .iter()
        .filter_map(|list| fs::read_to_string(modules.join(list)).ok())
        .collect();
    let module = format!("/{file_system}.ko");
    lists.is_empty() || lists.iter().any(|list| list.contains(&module))
}

/// Whether a program can be started by a script of ours.
pub fn has_program(name: &str) -> bool {
    let path = env::var_os("PATH").unwrap_or_default();
    env::split_paths(&path)
        .chain(["/usr/sbin", "/sbin"].map(PathBuf::from))
        .any(|dir| dir.join(name).is_file())
}

/// The command that installs a package here.
pub fn install_command(package: &str) -> String {
    [
        ("apt-get", "apt-get install"),
        ("dnf", "dnf install"),
        ("zypper", "zypper install"),
        ("pacman", "pacman -S"),
        ("apk", "apk add"),
    ]
    .iter()
    .find(|(program, _)| has_program(program))
    .map_or_else(
        || format!("install {package}"),
        |(_, command)| format!("sudo {command} {package}"),
    )
}

/// Bytes a user may still write where a path is, or would be.
pub fn free_bytes(path: &Path) -> io::Result<u64> {
    let there = path
        .ancestors()
        .find(|p| p.exists())
        .unwrap_or(Path::new("/"));
    Ok(space_of(there)?.free_bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_missing_is_not_found() {
        assert!(has_program("sh"));
        assert!(!has_program("mkfs.nothing"));
        assert!(install_command("btrfs-progs").ends_with("btrfs-progs"));
        assert!(free_bytes(Path::new("/nowhere/at/all")).unwrap() > 0);
    }
}
