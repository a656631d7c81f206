//! Which clusters of a store are referred to.
//!
//! **Invariant.** Memory follows what is in the set, not how long the store claims to be, and has a limit of its own.

use std::collections::BTreeMap;
use std::ops::Range;

/// Clusters in one chunk of the set (4 KiB of bits).
const CHUNK: u64 = 1 << 15;

/// Most memory for chunks: enough for 16 TiB at 4 KiB a cluster.
const MAX_CHUNKS: usize = (512 << 20) / (CHUNK as usize / 8);

/// The set would need more memory than it may take.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct TooScattered;

/// A set of cluster numbers.
#[derive(Default)]
pub(crate) struct ClusterSet {
    chunks: BTreeMap<u64, Box<[u64; CHUNK as usize / 64]>>,
    len: u64,
}

impl ClusterSet {
    /// Adds a cluster; false if it was there.
    pub(crate) fn insert(&mut self, cluster: u64) -> Result<bool, TooScattered> {
        let (key, bit) = (cluster / CHUNK, cluster % CHUNK);
        if self.chunks.len() >= MAX_CHUNKS && !self.chunks.contains_key(&key) {
            return Err(TooScattered);
        }
        let chunk = self.chunks.entry(key).or_insert_with(|| Box::new([0; CHUNK as usize / 64]));
        let word = &mut chunk[bit as usize / 64];
        let mask = 1 << (bit % 64);
        let new = *word & mask == 0;
        *word |= mask;
        self.len += u64::from(new);
        Ok(new)
    }

    /// Takes a cluster out.
    pub(crate) fn remove(&mut self, cluster: u64) {
        let (key, bit) = (cluster / CHUNK, cluster % CHUNK);
        if let Some(chunk) = self.chunks.get_mut(&key) {
            let word = &mut chunk[bit as usize / 64];
            let mask = 1 << (bit % 64);
            self.len -= u64::from(*word & mask != 0);
            *word &= !mask;
        }
    }

    /// Whether a cluster is in.
    pub(crate) fn contains(&self, cluster: u64) -> bool {
        let (key, bit) = (cluster / CHUNK, cluster % CHUNK);
        self.chunks.get(&key).is_some_and(|chunk| chunk[bit as usize / 64] >> (bit % 64) & 1 == 1)
    }

    /// Clusters in the set.
    pub(crate) fn len(&self) -> u64 {
        self.len
    }

    /// One past the highest cluster, 0 if there is none.
    pub(crate) fn end(&self) -> u64 {
        for (key, chunk) in self.chunks.iter().rev() {
            if let Some(word) = chunk.iter().rposition(|word| *word != 0) {
                return key * CHUNK + word as u64 * 64 + (64 - u64::from(chunk[word].leading_zeros()));
            }
        }
        0
    }

    /// How many of `range` are in.
    pub(crate) fn count(&self, range: Range<u64>) -> u64 {
        range.filter(|cluster| self.contains(*cluster)).count() as u64
    }

    /// The first run of clusters within `range` that are not in the set.
    pub(crate) fn next_gap(&self, range: Range<u64>) -> Option<Range<u64>> {
        let start = self.seek(range.start, range.end, false)?;
        Some(start..self.seek(start, range.end, true).unwrap_or(range.end))
    }

    /// The first cluster of `at..end` that is (or is not) in the set.
    pub(crate) fn seek(&self, mut at: u64, end: u64, present: bool) -> Option<u64> {
        while at < end {
            let (key, bit) = (at / CHUNK, at % CHUNK);
            let Some(chunk) = self.chunks.get(&key) else {
                if !present {
                    return Some(at);
                }
                at = self.chunks.range(key..).next().map(|(key, _)| key * CHUNK)?;
                continue;
            };
            let word = chunk[bit as usize / 64];
            let wanted = if present { word } else { !word } >> (bit % 64);
            if wanted != 0 {
                at += u64::from(wanted.trailing_zeros());
                return (at < end).then_some(at);
            }
            at = (at / 64 + 1) * 64;
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeSet;

    #[test]
    fn gaps_of_far_apart_clusters_are_found_at_once() {
        let mut set = ClusterSet::default();
        set.insert(5).unwrap();
        set.insert(1 << 50).unwrap();
        assert_eq!(set.next_gap(0..1 << 51), Some(0..5));
        assert_eq!(set.next_gap(5..1 << 51), Some(6..1 << 50));
        assert_eq!(set.next_gap(1 << 50..1 << 51), Some((1 << 50) + 1..1 << 51));
        assert_eq!((set.end(), set.len()), ((1 << 50) + 1, 2));
    }

    proptest! {
        #[test]
        fn behaves_as_a_set(steps in proptest::collection::vec((any::<bool>(), 0u64..300, 0u64..3), 0..300)) {
            let (mut set, mut model) = (ClusterSet::default(), BTreeSet::new());
            for (add, small, far) in steps {
                let cluster = small + far * (CHUNK * 3 - 100);
                if add {
                    prop_assert_eq!(set.insert(cluster), Ok(model.insert(cluster)));
                } else {
                    set.remove(cluster);
                    model.remove(&cluster);
                }
                prop_assert_eq!(set.contains(cluster), add);
            }
            prop_assert_eq!(set.len(), model.len() as u64);
            prop_assert_eq!(set.end(), model.last().map_or(0, |last| last + 1));
            let end = CHUNK * 7;
            let (mut at, mut free) = (0, 0);
            while let Some(gap) = set.next_gap(at..end) {
                prop_assert!(gap.start < gap.end && !model.contains(&gap.start) && model.range(gap.clone()).next().is_none());
                prop_assert!(gap.end == end || model.contains(&gap.end));
                free += gap.end - gap.start;
                at = gap.end;
            }
            prop_assert_eq!(free + model.len() as u64, end);
        }
    }
}
