//! Which of several branches a branch is nearest to in history.

use std::collections::{BinaryHeap, HashMap, HashSet};
use std::fs;
use std::path::{Path, PathBuf};

use git2::{ErrorCode, ObjectType, Odb, Oid};

use super::{GitError, Location, program, refs, repo};
use crate::types::BranchName;

/// Commits looked at before the best found so far must do. Without it a branch
/// made from a very old commit would hold up a checkout for seconds.
const WALK_LIMIT: usize = 30_000;

/// Commits between two looks at whether more walking can change the answer.
const CHECK_EVERY: usize = 64;

/// How deep alternates of alternates are followed, as in git.
const ALTERNATES_DEPTH: usize = 5;

/// Returns the candidate nearest to the branch in history; none where the branch
/// has no commit yet, or no history in common with any candidate.
///
/// Nearest is the one that lacks the fewest of the branch's commits; then the one
/// with the fewest commits of its own; then the default branch; then the first by
/// name. After `WALK_LIMIT` commits the best found by then is taken.
pub fn nearest(
    location: &Location,
    branch: &BranchName,
    candidates: &[BranchName],
) -> Result<Option<BranchName>, GitError> {
    let common_dir = &location.common_dir;
    let Some(tip) = refs::resolve(common_dir, &refs::full_name(branch))? else {
        return Ok(None);
    };
    // Several candidates on one commit count as one until the end.
    let mut tips: Vec<(String, Vec<&BranchName>)> = Vec::new();
    let mut indices = HashMap::new();
    let unique: HashSet<_> = candidates.iter().filter(|c| *c != branch).collect();
    let unique: Vec<_> = unique.into_iter().collect();
    for (candidate, id) in unique.iter().zip(refs::tips(common_dir, &unique)?) {
        let Some(id) = id else { continue };
        let index = *indices.entry(id.clone()).or_insert_with(|| {
            tips.push((id, Vec::new()));
            tips.len() - 1
        });
        tips[index].1.push(candidate);
    }
    let ids: Vec<_> = tips.iter().map(|(id, _)| id.as_str()).collect();
    let winners = if tip.len() == 40 {
        let objects = open_objects(common_dir)?;
        Walk::new(tip.as_str(), &ids, |id| read_commit(&objects, id))?.run(WALK_LIMIT)?
    } else {
        nearest_by_program(common_dir, &tip, &ids)?
    };
    let mut names: Vec<_> = winners
        .into_iter()
        .flat_map(|i| &tips[i].1)
        .copied()
        .collect();
    names.sort();
    if names.len() > 1
        && let Some(default) = repo::default_branch(common_dir)?
        && names.contains(&&default)
    {
        return Ok(Some(default));
    }
    Ok(names.first().copied().cloned())
}

/// The same by the git program, for object names that libgit2 does not read
/// (SHA-256): a run for every candidate.
fn nearest_by_program(common_dir: &Path, tip: &str, ids: &[&str]) -> Result<Vec<usize>, GitError> {
    let mut best = Best::default();
    for (index, id) in ids.iter().enumerate() {
        if program::plumbing(common_dir, &["merge-base", tip, id])?.is_none() {
            continue;
        }
        let range = format!("{tip}...{id}");
        let arguments = ["rev-list", "--left-right", "--count", range.as_str(), "--"];
        let answer = program::plumbing(common_dir, &arguments)?.unwrap_or_default();
        let line = program::first_line(&answer).unwrap_or_default();
        let mut numbers = line.split_whitespace().map(str::parse);
        if let (Some(Ok(behind)), Some(Ok(ahead))) = (numbers.next(), numbers.next()) {
            best.offer(index, (behind, ahead));
        }
    }
    Ok(best.indices)
}

/// The candidates with the smallest distance.
#[derive(Debug, Default)]
struct Best {
    distance: Option<(usize, usize)>,
    indices: Vec<usize>,
}

impl Best {
    fn offer(&mut self, index: usize, distance: (usize, usize)) {
        if self.distance.is_none_or(|best| distance < best) {
            self.distance = Some(distance);
            self.indices.clear();
        }
        if self.distance == Some(distance) {
            self.indices.push(index);
        }
    }
}

/// What the walk needs of a commit.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Commit {
    /// Seconds since 1970, as the committer had it.
    time: i64,
    parents: Vec<Oid>,
}

/// Opens the object store alone. Opening the repository would cost more, would
/// check who owns it, and would refuse extensions that don't matter here.
fn open_objects(common_dir: &Path) -> Result<Odb<'static>, GitError> {
    let objects = Odb::new().map_err(|e| failed(&e))?;
    let mut stores = Vec::new();
    collect_stores(&common_dir.join("objects"), 0, &mut stores);
    for store in stores {
        let Some(path) = store.to_str() else { continue };
        objects.add_disk_alternate(path).map_err(|e| failed(&e))?;
    }
    Ok(objects)
}

/// An object store and those it borrows from (`objects/info/alternates`).
fn collect_stores(store: &Path, depth: usize, stores: &mut Vec<PathBuf>) {
    if depth > ALTERNATES_DEPTH || stores.iter().any(|s| s == store) {
        return;
    }
    stores.push(store.to_owned());
    let alternates = fs::read_to_string(store.join("info/alternates")).unwrap_or_default();
    for line in alternates.lines() {
        if !line.is_empty() && !line.starts_with('#') {
            collect_stores(&store.join(line), depth + 1, stores);
        }
    }
}

fn failed(e: &git2::Error) -> GitError {
    GitError::Failed {
        action: "read history".to_owned(),
        reason: e.message().to_owned(),
    }
}

/// Reads a commit. None where it is not there, as beyond the end of a shallow clone.
fn read_commit(objects: &Odb<'_>, id: Oid) -> Result<Option<Commit>, GitError> {
    match objects.read(id) {
        Ok(object) if object.kind() == ObjectType::Commit => Ok(parse_commit(object.data())),
        Ok(_) => Ok(None),
        Err(e) if e.code() == ErrorCode::NotFound => Ok(None),
        Err(e) => Err(failed(&e)),
    }
}

fn parse_commit(data: &[u8]) -> Option<Commit> {
    let mut parents = Vec::new();
    for line in data.split(|b| *b == b'\n') {
        if let Some(parent) = line.strip_prefix(b"parent ") {
            let parent = std::str::from_utf8(parent).ok()?;
            parents.push(Oid::from_str(parent).ok()?);
        } else if let Some(committer) = line.strip_prefix(b"committer ") {
            // `Name <mail> seconds zone`
            let mut fields = committer.rsplit(|b| *b == b' ');
            let time = std::str::from_utf8(fields.nth(1)?).ok()?.parse().ok()?;
            return Some(Commit { time, parents });
        } else if line.is_empty() {
            break;
        }
    }
    None
}

/// A set of tips; bit 0 is the branch, bit `i + 1` the candidate `i`.
type Tips = Box<[u64]>;

fn bits(set: &[u64]) -> impl Iterator<Item = usize> + '_ {
    set.iter().enumerate().flat_map(|(word, bits)| {
        let mut left = *bits;
        std::iter::from_fn(move || {
            let bit = left.trailing_zeros() as usize;
            left &= left.checked_sub(1)?;
            Some(word * 64 + bit)
        })
    })
}

fn has_bit(set: &[u64], bit: usize) -> bool {
    set[bit / 64] & (1 << (bit % 64)) != 0
}

struct Node {
    commit: Commit,
    /// The tips this commit is known to be reachable from.
    tips: Tips,
    /// The tips with which it went into the counts, once it did.
    counted: Option<Tips>,
    is_queued: bool,
}

/// Walks back from all tips at once, newest commits first, and notes from which
/// tips each commit can be reached.
///
/// A commit that only the branch reaches puts the candidate behind by one, and the
/// other way round. With clocks in order a commit comes up once, all its
/// descendants before it; where they were not, it is counted again, so only an
/// early end can make the numbers less than exact.
struct Walk<R> {
    read: R,
    nodes: HashMap<Oid, Node>,
    queue: BinaryHeap<(i64, Oid)>,
    /// For each candidate: commits of the branch that it lacks, commits of its own.
    distances: Vec<(usize, usize)>,
    /// Which candidates were found to share a commit with the branch.
    related: Vec<bool>,
}

impl<R> Walk<R>
where
    R: Fn(Oid) -> Result<Option<Commit>, GitError>,
{
    fn new(branch: &str, candidates: &[&str], read: R) -> Result<Self, GitError> {
        let mut walk = Self {
            read,
            nodes: HashMap::new(),
            queue: BinaryHeap::new(),
            distances: vec![(0, 0); candidates.len()],
            related: vec![false; candidates.len()],
        };
        let words = (candidates.len() + 1).div_ceil(64);
        for (bit, id) in std::iter::once(&branch).chain(candidates).enumerate() {
            let mut tips: Tips = vec![0; words].into();
            tips[bit / 64] |= 1 << (bit % 64);
            let id = Oid::from_str(id).map_err(|e| failed(&e))?;
            walk.reach(id, &tips)?;
        }
        Ok(walk)
    }

    /// Returns the nearest candidates, all at the same distance.
    fn run(mut self, limit: usize) -> Result<Vec<usize>, GitError> {
        let mut walked = 0;
        while let Some((_, id)) = self.queue.pop() {
            let node = self.nodes.get_mut(&id).expect("what is queued has a node");
            node.is_queued = false;
            let tips = node.tips.clone();
            let parents = node.commit.parents.clone();
            let before = node.counted.replace(tips.clone());
            if let Some(before) = before {
                self.count(&before, |n| *n -= 1);
            }
            self.count(&tips, |n| *n += 1);
            for parent in parents {
                self.reach(parent, &tips)?;
            }
            walked += 1;
            if walked >= limit {
                tracing::debug!(limit, "history walked to the limit");
                break;
            }
            // Most answers are found in the first few.
            let is_time = walked.is_power_of_two() || walked % CHECK_EVERY == 0;
            if is_time && self.is_settled() {
                break;
            }
        }
        Ok(self.best(|_| true).indices)
    }

    /// Notes that a commit can be reached from these tips, and queues it if that is new.
    fn reach(&mut self, id: Oid, tips: &Tips) -> Result<(), GitError> {
        if let Some(node) = self.nodes.get_mut(&id) {
            let mut changed = false;
            for (have, more) in node.tips.iter_mut().zip(tips) {
                changed |= *more & !*have != 0;
                *have |= more;
            }
            if changed && !node.is_queued {
                node.is_queued = true;
                self.queue.push((node.commit.time, id));
            }
            return Ok(());
        }
        let Some(commit) = (self.read)(id)? else {
            return Ok(());
        };
        self.queue.push((commit.time, id));
        let node = Node {
            commit,
            tips: tips.clone(),
            counted: None,
            is_queued: true,
        };
        self.nodes.insert(id, node);
        Ok(())
    }

    fn count(&mut self, tips: &Tips, change: impl Fn(&mut usize)) {
        if has_bit(tips, 0) {
            for (i, distance) in self.distances.iter_mut().enumerate() {
                if has_bit(tips, i + 1) {
                    self.related[i] = true;
                } else {
                    change(&mut distance.0);
                }
            }
        } else {
            for bit in bits(tips) {
                change(&mut self.distances[bit - 1].1);
            }
        }
    }

    fn best(&self, counts: impl Fn(usize) -> bool) -> Best {
        let mut best = Best::default();
        for (i, distance) in self.distances.iter().enumerate() {
            if self.related[i] && counts(i) {
                best.offer(i, *distance);
            }
        }
        best
    }

    /// Whether no commit still queued can change which candidates are nearest.
    ///
    /// Distances only grow. So it is settled when one candidate's is final, and all
    /// others that may still grow are already farther.
    fn is_settled(&self) -> bool {
        let mut open = vec![false; self.distances.len()];
        for (_, id) in &self.queue {
            let tips = &self.nodes[id].tips;
            if has_bit(tips, 0) {
                for (i, open) in open.iter_mut().enumerate() {
                    *open |= !has_bit(tips, i + 1);
                }
            } else {
                bits(tips).for_each(|bit| open[bit - 1] = true);
            }
        }
        self.best(|i| !open[i]).distance.is_some_and(|best| {
            let mut others = self.distances.iter().zip(&open);
            others.all(|(distance, open)| !open || *distance > best)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A history as `(commit, time, parents)`; ids are the numbers in hexadecimal.
    fn nearest_in(
        history: &[(u32, i64, &[u32])],
        branch: u32,
        candidates: &[u32],
        limit: usize,
    ) -> Vec<usize> {
        let id = |n: u32| format!("{n:040x}");
        let oid = |n: u32| Oid::from_str(&id(n)).unwrap();
        let commits: HashMap<_, _> = history
            .iter()
            .map(|(n, time, parents)| {
                let parents = parents.iter().map(|p| oid(*p)).collect();
                (
                    oid(*n),
                    Commit {
                        time: *time,
                        parents,
                    },
                )
            })
            .collect();
        let ids: Vec<_> = candidates.iter().map(|c| id(*c)).collect();
        let ids: Vec<_> = ids.iter().map(String::as_str).collect();
        let read = |id| Ok(commits.get(&id).cloned());
        let mut found = Walk::new(&id(branch), &ids, read)
            .unwrap()
            .run(limit)
            .unwrap();
        found.sort_unstable();
        found
    }

    /// 1-2-3-4-5 is main; 3-6-7 is dev; 7-8 is the branch.
    const FORKED: &[(u32, i64, &[u32])] = &[
        (1, 1, &[]),
        (2, 2, &[1]),
        (3, 3, &[2]),
        (4, 4, &[3]),
        (5, 9, &[4]),
        (6, 6, &[3]),
        (7, 7, &[6]),
        (8, 8, &[7]),
    ];

    #[test]
    fn the_branch_that_shares_most_is_nearest() {
        assert_eq!(nearest_in(FORKED, 8, &[5, 7], 100), [1]);
        assert_eq!(nearest_in(FORKED, 8, &[5, 2, 3], 100), [0, 2][1..]);
    }

    #[test]
    fn of_equally_near_ones_the_one_with_less_of_its_own_wins() {
        assert_eq!(nearest_in(FORKED, 3, &[5, 7, 8, 4], 100), [3]);
        assert_eq!(nearest_in(FORKED, 3, &[5, 7], 100), [0, 1]);
    }

    #[test]
    fn a_history_of_its_own_is_near_to_none() {
        let history: &[(u32, i64, &[u32])] = &[(1, 1, &[]), (2, 2, &[1]), (9, 3, &[])];
        assert_eq!(nearest_in(history, 9, &[2], 100), Vec::<usize>::new());
        assert_eq!(nearest_in(history, 9, &[2, 9], 100), [1]);
    }

    #[test]
    fn merges_count_all_that_they_bring() {
        // The branch, 5, merged 4 (of 3) into a line from 1; 2 is the other candidate.
        let history: &[(u32, i64, &[u32])] = &[
            (1, 1, &[]),
            (2, 2, &[1]),
            (3, 3, &[1]),
            (4, 4, &[3]),
            (5, 5, &[2, 4]),
        ];
        assert_eq!(nearest_in(history, 5, &[2, 4], 100), [1]);
    }

    #[test]
    fn clocks_out_of_order_do_not_change_the_answer() {
        // Times run backwards along every line.
        let skewed: Vec<_> = FORKED.iter().map(|(n, t, p)| (*n, -t, *p)).collect();
        assert_eq!(nearest_in(&skewed, 8, &[5, 7], 100), [1]);
        assert_eq!(nearest_in(&skewed, 3, &[5, 7, 8, 4], 100), [3]);
    }

    #[test]
    fn missing_history_ends_the_walk_as_in_a_shallow_clone() {
        let history: &[(u32, i64, &[u32])] = &[(5, 5, &[4]), (6, 6, &[5]), (7, 7, &[5])];
        assert_eq!(nearest_in(history, 7, &[6], 100), [0]);
    }

    #[test]
    fn the_limit_ends_the_walk_with_the_best_so_far() {
        assert_eq!(nearest_in(FORKED, 8, &[1, 8], 2), [1]);
        assert_eq!(nearest_in(FORKED, 8, &[1], 2), Vec::<usize>::new());
    }

    #[test]
    fn more_candidates_than_a_word_has_bits_are_told_apart() {
        let history: Vec<(u32, i64, Vec<u32>)> = (1..=200)
            .map(|n| (n, i64::from(n), if n == 1 { vec![] } else { vec![n - 1] }))
            .collect();
        let history: Vec<_> = history.iter().map(|(n, t, p)| (*n, *t, &p[..])).collect();
        let candidates: Vec<u32> = (1..=150).collect();
        assert_eq!(nearest_in(&history, 200, &candidates, 1000), [149]);
    }

    #[test]
    fn a_commit_is_read_with_its_parents_and_its_time() {
        let text = format!(
            "tree {0}\nparent {1}\nparent {2}\nauthor A <a> 1 +0000\ncommitter B C <b> 77 +0200\n\nparent no",
            "0".repeat(40),
            "1".repeat(40),
            "2".repeat(40)
        );
        let commit = parse_commit(text.as_bytes()).unwrap();
        assert_eq!(commit.time, 77);
        assert_eq!(commit.parents.len(), 2);
    }
}
