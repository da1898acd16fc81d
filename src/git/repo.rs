//! Finds repositories, their worktrees and their branches.
//!
//! By git's own rules (gitrepository-layout(5), git-worktree(1)) but by reading
//! alone: nothing of the repository is executed, so the ownership check with which
//! git and libgit2 guard against foreign repositories is not needed, and does not
//! stop a daemon of root. `GIT_*` variables are not heeded: a hook's are about
//! another repository as soon as we look at one.

use std::fs;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use git2::Config;

use super::{GitError, Head, Location, head, refs};
use crate::types::BranchName;

impl Location {
    /// Finds the repository that a folder or file lies in, as git would when run there.
    ///
    /// `NotARepository` where there is none, `Unreadable` where one is in the way
    /// that can't be read. Like git, the search ends at the file system's border.
    pub fn discover(path: &Path) -> Result<Self, GitError> {
        let start = fs::canonicalize(path).map_err(|e| GitError::io("find", path, e))?;
        let device = device(&start);
        for dir in start.ancestors() {
            if self::device(dir) != device {
                break;
            }
            if let Some(git_dir) = dot_git(dir)? {
                return Self::open(&git_dir, Some(dir));
            }
            if is_git_dir(dir)? {
                return Self::open(dir, None);
            }
        }
        Err(GitError::NotARepository(path.to_owned()))
    }

    /// The worktree of a git directory, main or linked, or the bare repository.
    ///
    /// A main worktree made with `git init --separate-git-dir` is not known to its
    /// git directory, so it is none here; `discover` from inside it finds it.
    pub fn from_git_dir(git_dir: &Path) -> Result<Self, GitError> {
        if !is_git_dir(git_dir)? {
            return Err(GitError::NotARepository(git_dir.to_owned()));
        }
        Self::open(git_dir, None)
    }

    /// `top` is the folder whose `.git` led here.
    fn open(git_dir: &Path, top: Option<&Path>) -> Result<Self, GitError> {
        let git_dir = canonical(git_dir)?;
        let common_dir = common_dir(&git_dir)?;
        let main_worktree = |top| main_worktree(&common_dir, top);
        if git_dir == common_dir {
            let worktree = main_worktree(top)?;
            return Ok(Self {
                common_dir,
                git_dir,
                main_worktree: worktree.clone(),
                worktree,
            });
        }
        let worktree = match top {
            Some(top) => Some(top.to_owned()),
            None => linked_worktree_top(&git_dir)?,
        };
        Ok(Self {
            main_worktree: main_worktree(None)?,
            common_dir,
            git_dir,
            worktree,
        })
    }
}

#[cfg(unix)]
fn device(path: &Path) -> Option<u64> {
    use std::os::unix::fs::MetadataExt;
    fs::metadata(path).ok().map(|m| m.dev())
}

#[cfg(not(unix))]
fn device(_: &Path) -> Option<u64> {
    None
}

fn canonical(path: &Path) -> Result<PathBuf, GitError> {
    fs::canonicalize(path).map_err(|e| GitError::io("find", path, e))
}

/// The git directory that `dir/.git` is or names.
fn dot_git(dir: &Path) -> Result<Option<PathBuf>, GitError> {
    let dot_git = dir.join(".git");
    let metadata = match fs::metadata(&dot_git) {
        Ok(metadata) => metadata,
        Err(e) if e.kind() == ErrorKind::PermissionDenied => return Err(denied(&dot_git)),
        Err(_) => return Ok(None),
    };
    if metadata.is_dir() {
        // Like git, go on upwards from a folder that only has the name.
        return Ok(is_git_dir(&dot_git)?.then_some(dot_git));
    }
    let text = read_line(&dot_git)?.unwrap_or_default();
    let Some(target) = text.strip_prefix("gitdir: ") else {
        return Err(GitError::Unreadable {
            path: dot_git,
            reason: "it is a file without a `gitdir:` line".to_owned(),
        });
    };
    let target = dir.join(target);
    if is_git_dir(&target)? {
        return Ok(Some(target));
    }
    Err(GitError::Unreadable {
        path: dot_git,
        reason: format!(
            "it leads to {}, which is no git directory",
            target.display()
        ),
    })
}

fn denied(path: &Path) -> GitError {
    GitError::Unreadable {
        path: path.to_owned(),
        reason: "permission denied".to_owned(),
    }
}

/// Whether a folder is a git directory, by the three things git looks for.
fn is_git_dir(dir: &Path) -> Result<bool, GitError> {
    let head = dir.join("HEAD");
    match fs::symlink_metadata(&head) {
        Ok(metadata) if metadata.is_dir() => return Ok(false),
        Ok(_) => {}
        Err(e) if e.kind() == ErrorKind::PermissionDenied => return Err(denied(dir)),
        Err(_) => return Ok(false),
    }
    let common_dir = match read_line(&dir.join("commondir"))? {
        Some(relative) => dir.join(relative),
        None => dir.to_owned(),
    };
    Ok(common_dir.join("objects").is_dir() && common_dir.join("refs").is_dir())
}

/// The first line of a small file of git's; none where there is no file.
fn read_line(path: &Path) -> Result<Option<String>, GitError> {
    match fs::read_to_string(path) {
        Ok(text) => Ok(Some(text.lines().next().unwrap_or_default().to_owned())),
        Err(e) if matches!(e.kind(), ErrorKind::NotFound | ErrorKind::NotADirectory) => Ok(None),
        Err(e) if e.kind() == ErrorKind::PermissionDenied => Err(denied(path)),
        Err(e) => Err(GitError::io("read", path, e)),
    }
}

/// The common git directory of a git directory, canonical.
pub(super) fn common_dir(git_dir: &Path) -> Result<PathBuf, GitError> {
    match read_line(&git_dir.join("commondir"))? {
        Some(relative) => canonical(&git_dir.join(relative)),
        None => canonical(git_dir),
    }
}

/// Where the main worktree is: as `core.worktree` says (submodules), else where
/// the `.git` stood that led here, else the folder around `.git`. None if bare.
fn main_worktree(common_dir: &Path, top: Option<&Path>) -> Result<Option<PathBuf>, GitError> {
    let config = local_config(common_dir)?;
    if config.get_bool("core.bare").unwrap_or(false) {
        return Ok(None);
    }
    if let Ok(path) = config.get_path("core.worktree") {
        let path = common_dir.join(path);
        return Ok(Some(fs::canonicalize(&path).unwrap_or(path)));
    }
    let around = || {
        let parent = common_dir.parent()?;
        (common_dir.file_name()? == ".git").then(|| parent.to_owned())
    };
    Ok(top.map(Path::to_owned).or_else(around))
}

/// The repository's own configuration, the main worktree's part included.
fn local_config(common_dir: &Path) -> Result<Config, GitError> {
    let unreadable = |path: &Path, e: &git2::Error| GitError::Unreadable {
        path: path.to_owned(),
        reason: e.message().to_owned(),
    };
    let path = common_dir.join("config");
    let mut config = Config::new().map_err(|e| unreadable(&path, &e))?;
    let mut add = |path: &Path, level| match config.add_file(path, level, false) {
        Ok(()) => Ok(()),
        Err(e) if e.code() == git2::ErrorCode::NotFound => Ok(()),
        Err(e) => Err(unreadable(path, &e)),
    };
    add(&path, git2::ConfigLevel::Local)?;
    let of_worktree = common_dir.join("config.worktree");
    if of_worktree.exists() {
        add(&of_worktree, git2::ConfigLevel::Worktree)?;
    }
    Ok(config)
}

/// The top of a linked worktree: its `gitdir` file names the `.git` file there.
/// None where that is gone, as on a disk that is not mounted.
fn linked_worktree_top(git_dir: &Path) -> Result<Option<PathBuf>, GitError> {
    let Some(dot_git) = read_line(&git_dir.join("gitdir"))? else {
        return Ok(None);
    };
    let dot_git = git_dir.join(dot_git);
    Ok(fs::canonicalize(&dot_git)
        .ok()
        .and_then(|path| path.parent().map(Path::to_owned)))
}

/// The top of a linked worktree by its git directory, if it is there.
pub fn worktree_top(git_dir: &Path) -> Option<PathBuf> {
    linked_worktree_top(git_dir).ok().flatten()
}

/// The main worktree (or the bare repository) first, then the linked ones by
/// name. Those whose folder is gone, which `git worktree prune` would clear, are
/// left out.
pub fn worktrees(common_dir: &Path) -> Result<Vec<Location>, GitError> {
    let main = Location::from_git_dir(common_dir)?;
    let mut linked = Vec::new();
    for git_dir in linked_git_dirs(&main.common_dir)? {
        let Ok(git_dir) = fs::canonicalize(&git_dir) else {
            continue;
        };
        let Some(worktree) = linked_worktree_top(&git_dir)? else {
            continue;
        };
        linked.push(Location {
            common_dir: main.common_dir.clone(),
            git_dir,
            worktree: Some(worktree),
            main_worktree: main.main_worktree.clone(),
        });
    }
    linked.sort_by(|a, b| a.git_dir.cmp(&b.git_dir));
    linked.insert(0, main);
    Ok(linked)
}

/// The git directories of linked worktrees, whether their folders are there or not.
pub(super) fn linked_git_dirs(common_dir: &Path) -> Result<Vec<PathBuf>, GitError> {
    let dir = common_dir.join("worktrees");
    match fs::read_dir(&dir) {
        Ok(entries) => Ok(entries.filter_map(|e| Some(e.ok()?.path())).collect()),
        Err(e) if e.kind() == ErrorKind::NotFound => Ok(Vec::new()),
        Err(e) => Err(GitError::io("list", &dir, e)),
    }
}

/// All branches, sorted. Names dbranch can't carry (not UTF-8) are left out.
pub fn branches(common_dir: &Path) -> Result<Vec<BranchName>, GitError> {
    refs::branch_names(common_dir)
}

/// Whether the branch exists. One without a commit yet does not.
pub fn branch_exists(common_dir: &Path, branch: &BranchName) -> Result<bool, GitError> {
    refs::exists(common_dir, &refs::full_name(branch))
}

/// The branch that others are normally made from, if the repository lets one guess.
///
/// In this order, the first that exists: the remote's HEAD (`origin` before other
/// remotes), `init.defaultBranch`, `main`, `master`, the only branch there is, the
/// branch of the main worktree's HEAD (which may be unborn).
pub fn default_branch(common_dir: &Path) -> Result<Option<BranchName>, GitError> {
    let mut guesses = remote_heads(common_dir)?;
    guesses.extend(configured_default(common_dir));
    guesses.extend(["main", "master"].map(str::to_owned));
    for guess in guesses {
        if let Ok(branch) = BranchName::new(guess)
            && branch_exists(common_dir, &branch)?
        {
            return Ok(Some(branch));
        }
    }
    let mut all = branches(common_dir)?;
    if all.len() == 1 {
        return Ok(all.pop());
    }
    match head(common_dir)? {
        Head::Branch(branch) | Head::Unborn(branch) => Ok(Some(branch)),
        Head::Detached(_) => Ok(None),
    }
}

fn remote_heads(common_dir: &Path) -> Result<Vec<String>, GitError> {
    let mut remotes = vec!["origin".to_owned()];
    if let Ok(entries) = fs::read_dir(common_dir.join("refs/remotes")) {
        let mut others: Vec<_> = entries
            .filter_map(|e| e.ok()?.file_name().into_string().ok())
            .filter(|name| name != "origin")
            .collect();
        others.sort();
        remotes.extend(others);
    }
    let mut branches = Vec::new();
    for remote in remotes {
        let prefix = format!("refs/remotes/{remote}/");
        let target = refs::symbolic_target(common_dir, &format!("{prefix}HEAD"))?;
        branches.extend(target.and_then(|t| t.strip_prefix(&prefix).map(str::to_owned)));
    }
    Ok(branches)
}

fn configured_default(common_dir: &Path) -> Option<String> {
    let key = "init.defaultBranch";
    let local = local_config(common_dir).ok();
    local
        .and_then(|config| config.get_string(key).ok())
        .or_else(|| Config::open_default().ok()?.get_string(key).ok())
}
