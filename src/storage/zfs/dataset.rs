//! Datasets as `zfs list` shows them, and what may be destroyed of them.

use super::program::{Failure, Program};
use crate::types::VolumeId;

/// The property that says a dataset is a volume of dbranch; its value is the volume's id.
pub(super) const MARK: &str = "dbranch:volume";

/// What the snapshots of dbranch begin with; the id of the clone they were made for follows.
const SNAPSHOT: &str = "dbranch-";

/// A dataset or a snapshot.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Dataset {
    pub(super) name: String,
    /// The snapshot it is a clone of.
    pub(super) origin: Option<String>,
    pub(super) is_mounted: bool,
    mark: String,
}

impl Dataset {
    /// Lists a dataset and what lies `depth` levels below it: 0 itself, 1 its snapshots and
    /// children too. Snapshots of one dataset come oldest first (zfs-list(8)).
    pub(super) fn list(
        program: &Program,
        name: &str,
        depth: &str,
        types: &str,
    ) -> Result<Vec<Self>, Failure> {
        let columns = format!("name,origin,mounted,{MARK}");
        let printed = program.run(&[
            "list", "-H", "-r", "-d", depth, "-t", types, "-o", &columns, name,
        ])?;
        Ok(parse(&printed))
    }

    pub(super) fn is_snapshot(&self) -> bool {
        self.name.contains('@')
    }

    /// Whether dbranch made it: marked with its own name. What lies inside a volume inherits
    /// the mark, and so differs.
    pub(super) fn is_ours(&self) -> bool {
        let name = self.name.rsplit('/').next().unwrap_or_default();
        !self.mark.is_empty() && self.mark == name
    }

    /// The volume that it is.
    pub(super) fn volume(&self) -> Option<VolumeId> {
        self.is_ours()
            .then(|| VolumeId::new(self.mark.as_str()).ok())
            .flatten()
    }
}

fn parse(printed: &str) -> Vec<Dataset> {
    let text = |field: Option<&str>| field.filter(|f| *f != "-").unwrap_or_default().to_owned();
    let dataset = |line: &str| {
        let mut fields = line.split('\t');
        let name = text(fields.next());
        let origin = Some(text(fields.next())).filter(|o| !o.is_empty());
        let is_mounted = fields.next() == Some("yes");
        Dataset {
            name,
            origin,
            is_mounted,
            mark: text(fields.next()),
        }
    };
    let lines = printed.lines().filter(|l| !l.is_empty());
    lines.map(dataset).collect()
}

/// The snapshot of a source that its clone is made from.
pub(super) fn snapshot_for(source: &str, clone: &str) -> String {
    format!("{source}@{SNAPSHOT}{clone}")
}

/// Whether a snapshot is one that dbranch made, of a volume right below the pool's dataset.
pub(super) fn is_our_snapshot(snapshot: &str, pool: &str) -> bool {
    let Some((dataset, name)) = snapshot.split_once('@') else {
        return false;
    };
    let below = dataset
        .strip_prefix(pool)
        .and_then(|rest| rest.strip_prefix('/'));
    // The clones that probing makes bear a dash in their names.
    let id = name.strip_prefix(SNAPSHOT).unwrap_or_default();
    let id = id.strip_prefix(super::PROBE).unwrap_or(id);
    below.is_some_and(|name| !name.contains('/')) && VolumeId::new(id).is_ok()
}

/// What the next step is on the way to destroying a volume.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Step {
    /// Nothing depends on it: it can be destroyed.
    Destroy,
    /// A snapshot that no clone needs.
    DestroySnapshot(String),
    /// A clone that takes over the volume's snapshots up to its own origin.
    Promote(String),
    /// Others' snapshots, clones or datasets stand in the way.
    Refuse(Vec<String>),
}

/// Decides it. `below` is what lies below the volume, snapshots oldest first; `siblings` are the
/// datasets of the pool.
///
/// The clone of the newest snapshot is promoted: all older snapshots go along with it (zfs-promote(8)),
/// so once is enough however many children there are.
pub(super) fn next_step(below: &[Dataset], siblings: &[Dataset], pool: &str) -> Step {
    let nested: Vec<String> = below
        .iter()
        .filter(|d| !d.is_snapshot())
        .map(|d| d.name.clone())
        .collect();
    if !nested.is_empty() {
        return Step::Refuse(nested);
    }
    let mut foreign = Vec::new();
    for snapshot in below.iter().rev() {
        let clones: Vec<&Dataset> = siblings
            .iter()
            .filter(|d| d.origin.as_deref() == Some(&snapshot.name))
            .collect();
        if let Some(clone) = clones.iter().find(|d| d.is_ours()) {
            if foreign.is_empty() {
                return Step::Promote(clone.name.clone());
            }
            break;
        }
        if !clones.is_empty() {
            foreign.extend(clones.iter().map(|d| d.name.clone()));
        } else if is_our_snapshot(&snapshot.name, pool) {
            if foreign.is_empty() {
                return Step::DestroySnapshot(snapshot.name.clone());
            }
        } else {
            foreign.push(snapshot.name.clone());
        }
    }
    if foreign.is_empty() {
        Step::Destroy
    } else {
        Step::Refuse(foreign)
    }
}

/// Snapshots of dbranch's on its own volumes of which no listed dataset is a clone.
pub(super) fn orphans<'a>(all: &'a [Dataset], pool: &str) -> Vec<&'a str> {
    let is_needed = |snapshot: &str| all.iter().any(|d| d.origin.as_deref() == Some(snapshot));
    all.iter()
        .filter(|d| is_our_snapshot(&d.name, pool) && !is_needed(&d.name))
        .filter(|d| {
            let of = d.name.split('@').next().unwrap_or_default();
            all.iter().any(|v| v.name == of && v.is_ours())
        })
        .map(|d| d.name.as_str())
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parsed(lines: &[&str]) -> Vec<Dataset> {
        parse(&lines.join("\n").replace(' ', "\t"))
    }

    #[test]
    fn what_zfs_lists_is_read() {
        let all = parsed(&[
            "t/p - yes -",
            "t/p/a t/p/b@dbranch-a no a",
            "t/p/a@dbranch-c - - a",
            "t/p/a/sub - yes a",
            "t/p/b - yes -",
            "",
        ]);
        assert_eq!(all.len(), 5);
        assert_eq!(all[1].origin.as_deref(), Some("t/p/b@dbranch-a"));
        assert!(!all[1].is_mounted && all[4].is_mounted);
        assert_eq!(all[1].volume().unwrap().as_str(), "a");
        // Inherited or without a mark: not ours.
        assert_eq!((all[3].volume(), all[4].volume()), (None, None));
        assert!(all[2].is_snapshot() && !all[2].is_ours());
    }

    #[test]
    fn only_our_snapshots_of_volumes_in_the_pool_are_ours() {
        for (name, is_ours) in [
            ("t/p/a@dbranch-b", true),
            ("t/p/a@dbranch-probe-b", true),
            ("t/p/a@dbranch-", false),
            ("t/p/a@daily", false),
            ("t/p/a@dbranch-B/x", false),
            ("t/p@dbranch-b", false),
            ("t/p/a/b@dbranch-b", false),
            ("t/pp/a@dbranch-b", false),
            ("t/p/a", false),
        ] {
            assert_eq!(is_our_snapshot(name, "t/p"), is_ours, "{name}");
        }
    }

    #[test]
    fn the_clone_of_the_newest_snapshot_takes_over() {
        let below = parsed(&[
            "t/p/a@dbranch-b - - a",
            "t/p/a@daily - - a",
            "t/p/a@dbranch-c - - a",
        ]);
        let siblings = parsed(&[
            "t/p - yes -",
            "t/p/a - yes a",
            "t/p/b t/p/a@dbranch-b yes b",
            "t/p/c t/p/a@dbranch-c yes c",
        ]);
        assert_eq!(
            next_step(&below, &siblings, "t/p"),
            Step::Promote("t/p/c".into())
        );
        assert_eq!(next_step(&[], &siblings, "t/p"), Step::Destroy);
        // What no clone needs goes first; what is not ours is named and stays.
        let without_c = &siblings[..3];
        assert_eq!(
            next_step(&below, without_c, "t/p"),
            Step::DestroySnapshot("t/p/a@dbranch-c".into())
        );
        assert_eq!(
            next_step(&below[..2], without_c, "t/p"),
            Step::Refuse(vec!["t/p/a@daily".into()])
        );
    }

    #[test]
    fn what_others_made_of_a_volume_is_never_promoted_nor_destroyed() {
        let siblings = parsed(&["t/p/a - yes a", "t/p/mine t/p/a@dbranch-b yes -"]);
        assert_eq!(
            next_step(&parsed(&["t/p/a@dbranch-b - - a"]), &siblings, "t/p"),
            Step::Refuse(vec!["t/p/mine".into()])
        );
        assert_eq!(
            next_step(&parsed(&["t/p/a/sub - yes a"]), &siblings, "t/p"),
            Step::Refuse(vec!["t/p/a/sub".into()])
        );
    }

    #[test]
    fn orphans_are_snapshots_of_ours_that_nothing_was_cloned_from() {
        let all = parsed(&[
            "t/p - yes -",
            "t/p/a - yes a",
            "t/p/a@dbranch-b - - a",
            "t/p/a@dbranch-gone - - a",
            "t/p/a@daily - - a",
            "t/p/b t/p/a@dbranch-b yes b",
            "t/p/x - yes -",
            "t/p/x@dbranch-gone - - -",
        ]);
        assert_eq!(orphans(&all, "t/p"), ["t/p/a@dbranch-gone"]);
    }
}
