//! Who holds what: lays the pieces of all volumes over each other.

use std::collections::HashMap;
use std::sync::Arc;

use super::pieces::{Chunk, Piece};

/// A set of volumes, by their numbers.
type Members = Box<[u64]>;

/// Every set of volumes that was met, numbered.
#[derive(Debug)]
struct Sets {
    words: usize,
    all: Vec<Members>,
    numbers: HashMap<Members, usize>,
}

impl Sets {
    /// The first numbers, up to `volumes`, are the sets of just one volume.
    fn new(volumes: usize) -> Self {
        let mut sets = Self {
            words: volumes.div_ceil(64),
            all: Vec::new(),
            numbers: HashMap::new(),
        };
        for volume in 0..volumes {
            let mut members = vec![0; sets.words];
            members[volume / 64] |= 1 << (volume % 64);
            sets.number(&members);
        }
        sets
    }

    fn number(&mut self, members: &[u64]) -> usize {
        if let Some(known) = self.numbers.get(members) {
            return *known;
        }
        let members: Members = members.into();
        self.all.push(members.clone());
        self.numbers.insert(members, self.all.len() - 1);
        self.all.len() - 1
    }

    fn members(&self, set: usize) -> impl Iterator<Item = usize> {
        self.all[set].iter().enumerate().flat_map(|(at, word)| {
            let mut word = *word;
            std::iter::from_fn(move || {
                let bit = word.trailing_zeros();
                (bit < 64).then(|| {
                    word &= word - 1;
                    at * 64 + bit as usize
                })
            })
        })
    }
}

/// What is held by a set of volumes, and by no other. Bytes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Held {
    /// Numbers of the volumes, ascending.
    pub(super) by: Vec<usize>,
    pub(super) bytes: u64,
}

/// The sum of all. Bytes.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Laid {
    /// Per volume: the data it alone has.
    pub(super) used_alone: Vec<u64>,
    /// Each set once, in their order.
    pub(super) held: Vec<Held>,
}

/// A piece of all the volumes of a set.
#[derive(Debug, Clone, Copy)]
struct Layer {
    start: u64,
    end: u64,
    used: u32,
    set: usize,
}

/// Lays the volumes' pieces over each other.
pub(super) fn lay(volumes: &[Vec<Chunk>]) -> Laid {
    let mut sets = Sets::new(volumes.len());
    let mut layers = layers(volumes, &mut sets);
    layers.sort_unstable_by_key(|layer| (layer.start, layer.end));
    let mut sums = Sums {
        held: vec![0; sets.all.len()],
        used_alone: vec![0; volumes.len()],
    };
    let mut counts = vec![0_u32; volumes.len()];
    let mut now = vec![0_u64; sets.words];
    let mut rest = &layers[..];
    while let Some(first) = rest.first() {
        let mut end = first.end;
        let overlapping = rest
            .iter()
            .take_while(|layer| {
                let overlaps = layer.start < end;
                end = end.max(layer.end);
                overlaps
            })
            .count();
        let (group, others) = rest.split_at(overlapping.max(1));
        rest = others;
        // Extents of one file system coincide, as a rule, and only differ in who has them.
        if group
            .iter()
            .all(|layer| (layer.start, layer.end) == (first.start, first.end))
        {
            now.fill(0);
            for layer in group {
                let members = sets.all[layer.set].iter();
                now.iter_mut().zip(members).for_each(|(all, of)| *all |= of);
            }
            let used = group.iter().map(|layer| u64::from(layer.used)).sum();
            sums.add(sets.number(&now), first.end - first.start, used);
        } else {
            cut(group, &mut sets, &mut counts, &mut sums);
        }
    }
    let mut held: Vec<Held> = sums
        .held
        .iter()
        .enumerate()
        .filter(|(_, bytes)| **bytes > 0)
        .map(|(set, bytes)| Held {
            by: sets.members(set).collect(),
            bytes: *bytes,
        })
        .collect();
    held.sort_unstable_by(|a, b| a.by.cmp(&b.by));
    Laid {
        used_alone: sums.used_alone,
        held,
    }
}

#[derive(Debug)]
struct Sums {
    /// By the number of the set.
    held: Vec<u64>,
    used_alone: Vec<u64>,
}

impl Sums {
    fn add(&mut self, set: usize, held: u64, used: u64) {
        if self.held.len() <= set {
            self.held.resize(set + 1, 0);
        }
        self.held[set] += held;
        if let Some(alone) = self.used_alone.get_mut(set) {
            *alone += used.min(held);
        }
    }
}

/// Each different chunk once, with the set of those that have it.
fn layers(volumes: &[Vec<Chunk>], sets: &mut Sets) -> Vec<Layer> {
    let mut numbers: HashMap<*const Piece, usize> = HashMap::new();
    let mut chunks: Vec<(&Chunk, Members)> = Vec::new();
    let mut room = 0;
    for (volume, of_volume) in volumes.iter().enumerate() {
        for chunk in of_volume {
            let number = *numbers.entry(Arc::as_ptr(chunk).cast()).or_insert_with(|| {
                room += chunk.len();
                chunks.push((chunk, vec![0; sets.words].into()));
                chunks.len() - 1
            });
            chunks[number].1[volume / 64] |= 1 << (volume % 64);
        }
    }
    let mut layers = Vec::with_capacity(room);
    for (chunk, owners) in chunks {
        let set = sets.number(&owners);
        let with_place = chunk.iter().filter(|piece| piece.held > 0);
        layers.extend(with_place.map(|piece| Layer {
            start: piece.start,
            end: piece.end(),
            used: piece.used,
            set,
        }));
    }
    layers
}

/// Sums layers that overlap in part, from border to border. `counts` is all 0, before and after.
fn cut(group: &[Layer], sets: &mut Sets, counts: &mut [u32], sums: &mut Sums) {
    let mut borders: Vec<(u64, bool, usize)> = group
        .iter()
        .flat_map(|layer| {
            [
                (layer.start, true, layer.set),
                (layer.end, false, layer.set),
            ]
        })
        .collect();
    borders.sort_unstable();
    let mut now = vec![0_u64; sets.words];
    let mut before = None;
    for (at, begins, set) in borders {
        if let Some(before) = before.filter(|before| *before < at)
            && now.iter().any(|word| *word != 0)
        {
            let holders = sets.number(&now);
            sums.add(holders, at - before, at - before);
        }
        before = Some(at);
        for volume in sets.members(set) {
            let bit = 1 << (volume % 64);
            if begins {
                counts[volume] += 1;
                now[volume / 64] |= bit;
            } else {
                counts[volume] -= 1;
                if counts[volume] == 0 {
                    now[volume / 64] &= !bit;
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn piece(start: u64, held: u32, used: u32) -> Piece {
        Piece {
            at: 0,
            start,
            held,
            used,
        }
    }

    fn chunk(pieces: &[(u64, u32)]) -> Chunk {
        pieces
            .iter()
            .map(|&(start, len)| piece(start, len, len))
            .collect()
    }

    fn held(laid: &Laid) -> Vec<(Vec<usize>, u64)> {
        let held = laid.held.iter();
        held.map(|held| (held.by.clone(), held.bytes)).collect()
    }

    #[test]
    fn what_all_have_is_shared_and_the_rest_is_each_ones_own() {
        let common = chunk(&[(0, 100), (100, 50)]);
        let laid = lay(&[
            vec![common.clone(), chunk(&[(200, 10)])],
            vec![common.clone(), chunk(&[(300, 20)])],
            vec![common],
        ]);
        assert_eq!(
            held(&laid),
            [(vec![0], 10), (vec![0, 1, 2], 150), (vec![1], 20)]
        );
        assert_eq!(laid.used_alone, [10, 20, 0]);
    }

    #[test]
    fn an_extent_that_is_used_in_part_is_held_whole() {
        let laid = lay(&[vec![[piece(0, 100, 8), piece(0, 100, 8)].into()]]);
        assert_eq!(held(&laid), [(vec![0], 100)]);
        assert_eq!(laid.used_alone, [16]);
    }

    #[test]
    fn a_block_that_two_files_of_a_volume_share_counts_once() {
        let laid = lay(&[vec![chunk(&[(0, 100)]), chunk(&[(0, 100), (500, 1)])]]);
        assert_eq!(held(&laid), [(vec![0], 101)]);
        assert_eq!(laid.used_alone, [101]);
    }

    #[test]
    fn data_inside_the_metadata_has_no_place() {
        let laid = lay(&[vec![[piece(0, 0, 700)].into()], vec![chunk(&[(0, 5)])]]);
        assert_eq!(held(&laid), [(vec![1], 5)]);
    }

    /// Against the plainest way: a set of volumes for each byte.
    #[test]
    fn pieces_that_overlap_in_any_way_are_cut_rightly() {
        let mut seed = 1_u64;
        let mut random = |below: u64| {
            seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            (seed >> 33) % below
        };
        for _ in 0..300 {
            // More than 64, so that sets are longer than a word.
            let count = if random(2) == 0 { 70 } else { 4 };
            let volumes: Vec<Vec<Chunk>> = (0..count)
                .map(|_| {
                    (0..random(3))
                        .map(|_| {
                            let pieces: Vec<(u64, u32)> = (0..random(4))
                                .map(|_| (random(60), u32::try_from(random(20)).unwrap()))
                                .collect();
                            chunk(&pieces)
                        })
                        .collect()
                })
                .collect();
            let mut expected: HashMap<Vec<usize>, u64> = HashMap::new();
            for byte in 0..80 {
                let holders: Vec<usize> = (0..count)
                    .filter(|v| {
                        let mut pieces = volumes[*v].iter().flat_map(|chunk| chunk.iter());
                        pieces.any(|p| (p.start..p.end()).contains(&byte))
                    })
                    .collect();
                if !holders.is_empty() {
                    *expected.entry(holders).or_default() += 1;
                }
            }
            let mut expected: Vec<_> = expected.into_iter().collect();
            expected.sort();
            assert_eq!(held(&lay(&volumes)), expected);
        }
    }
}
