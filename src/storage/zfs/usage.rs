//! What a volume takes, by ZFS's own counts (zfsprops(7)).
//!
//! They are of the last transaction group that was written: some seconds behind.

use super::program::{Failure, Kind, Program};
use crate::storage::Usage;

/// One dataset or snapshot, in bytes.
#[derive(Debug, Default, PartialEq, Eq)]
struct Counts {
    name: String,
    origin: Option<String>,
    used: u64,
    referenced: u64,
    of_dataset: u64,
    /// Since its last snapshot. zfs-fuse does not count it.
    written: Option<u64>,
}

pub(super) fn of(program: &Program, dataset: &str) -> Result<Usage, Failure> {
    const KNOWN: &str = "origin,used,referenced,usedbydataset";
    let get = |properties: &str, depth: &str, of: &str| {
        let columns = "name,property,value";
        program.run(&[
            "get", "-Hp", "-r", "-d", depth, "-o", columns, properties, of,
        ])
    };
    let printed = match get(&format!("{KNOWN},written"), "1", dataset) {
        // zfs-fuse knows no `written`, and says so with its whole manual.
        Err(e) if e.kind == Kind::Other && e.said().contains("invalid property") => {
            get(KNOWN, "1", dataset)?
        }
        printed => printed?,
    };
    let counts = parse(&printed);
    let origin = counts.first().and_then(|c| c.origin.as_deref());
    let origin_used = match origin {
        Some(snapshot) => parse(&get("used", "0", snapshot)?)
            .first()
            .map_or(0, |c| c.used),
        None => 0,
    };
    Ok(sum(&counts, dataset, origin_used))
}

fn parse(printed: &str) -> Vec<Counts> {
    let mut all: Vec<Counts> = Vec::new();
    for line in printed.lines() {
        let mut fields = line.split('\t');
        let (Some(name), Some(property), Some(value)) =
            (fields.next(), fields.next(), fields.next())
        else {
            continue;
        };
        if all.last().is_none_or(|c| c.name != name) {
            all.push(Counts {
                name: name.to_owned(),
                ..Counts::default()
            });
        }
        let Some(counts) = all.last_mut() else { break };
        let number = || value.parse().unwrap_or(0);
        match property {
            "origin" => counts.origin = Some(value.to_owned()).filter(|o| o != "-"),
            "used" => counts.used = number(),
            "referenced" => counts.referenced = number(),
            "usedbydataset" => counts.of_dataset = number(),
            "written" => counts.written = value.parse().ok(),
            _ => {}
        }
    }
    all
}

/// Destroying frees what was written since the last snapshot, which a clone lives on. Without
/// snapshots it frees all the dataset has of its own, and what its origin alone kept: blocks that
/// the parent has replaced since.
fn sum(counts: &[Counts], dataset: &str, origin_used: u64) -> Usage {
    let Some(own) = counts.iter().find(|c| c.name == dataset) else {
        return Usage::default();
    };
    let last = counts.iter().rev().find(|c| {
        c.name
            .strip_prefix(dataset)
            .is_some_and(|rest| rest.starts_with('@'))
    });
    let exclusive_bytes = match last {
        None => own.of_dataset + origin_used,
        // Without the count: what it grew by, and what the snapshot alone still has, was written.
        Some(last) => own
            .written
            .unwrap_or_else(|| (own.referenced + last.used).saturating_sub(last.referenced)),
    };
    Usage {
        logical_bytes: own.referenced,
        exclusive_bytes,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn usage(lines: &[&str], origin_used: u64) -> Usage {
        let counts = parse(&lines.join("\n").replace(' ', "\t"));
        sum(&counts, "t/a", origin_used)
    }

    #[test]
    fn a_leaf_owns_its_dataset_and_what_its_origin_alone_keeps() {
        let lines = [
            "t/a origin t/b@s",
            "t/a referenced 900",
            "t/a usedbydataset 40",
        ];
        assert_eq!(
            usage(&lines, 5),
            Usage {
                logical_bytes: 900,
                exclusive_bytes: 45
            }
        );
    }

    #[test]
    fn a_parent_owns_what_it_wrote_since_its_last_snapshot() {
        let mut lines = vec![
            "t/a referenced 900",
            "t/a usedbydataset 900",
            "t/a written 70",
            "t/a@s used 10",
            "t/a@s referenced 500",
            "t/a@t used 20",
            "t/a@t referenced 870",
        ];
        assert_eq!(usage(&lines, 0).exclusive_bytes, 70);
        lines.remove(2);
        assert_eq!(usage(&lines, 0).exclusive_bytes, 50);
    }

    #[test]
    fn a_dataset_that_is_gone_takes_nothing() {
        assert_eq!(usage(&[], 0), Usage::default());
    }
}
