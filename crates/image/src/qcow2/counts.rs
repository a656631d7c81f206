//! How many references there are to each cluster, as a walk over all tables finds them.
//!
//! **Invariant.** Memory follows what is referred to, not how long the store claims to be, and has a limit of its own.

use std::collections::BTreeMap;

/// Clusters in one chunk (128 KiB of numbers).
const CHUNK: u64 = 1 << 15;

/// Most memory for chunks: enough for 8 TiB at 64 KiB a cluster.
const MAX_CHUNKS: usize = (512 << 20) / (CHUNK as usize * 4);

/// More memory would be needed than may be taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct TooScattered;

/// References to clusters, by number.
#[derive(Default)]
pub(super) struct Counts {
    chunks: Vec<Box<[u32]>>,
    index: BTreeMap<u64, usize>,
    /// The chunk looked at last.
    last: Option<(u64, usize)>,
}

impl Counts {
    /// Counts one more reference to each of `len` clusters from `first` on.
    pub(super) fn add_run(&mut self, first: u64, len: u64) -> Result<(), TooScattered> {
        let mut at = first;
        while at < first + len {
            let chunk = self.chunk(at / CHUNK)?;
            let inside = (at % CHUNK) as usize;
            let end = (CHUNK as usize).min(inside + (first + len - at) as usize);
            for count in &mut self.chunks[chunk][inside..end] {
                *count = count.saturating_add(1);
            }
            at += (end - inside) as u64;
        }
        Ok(())
    }

    /// Counts one more reference; how many there are now.
    pub(super) fn add(&mut self, cluster: u64) -> Result<u32, TooScattered> {
        let at = self.chunk(cluster / CHUNK)?;
        let count = &mut self.chunks[at][(cluster % CHUNK) as usize];
        *count = count.saturating_add(1);
        Ok(*count)
    }

    /// The chunk with this key, made if there is none.
    fn chunk(&mut self, key: u64) -> Result<usize, TooScattered> {
        Ok(match self.last {
            Some((last, at)) if last == key => at,
            _ => {
                let next = self.chunks.len();
                let at = *self.index.entry(key).or_insert(next);
                if at == next {
                    if next >= MAX_CHUNKS {
                        self.index.remove(&key);
                        return Err(TooScattered);
                    }
                    self.chunks.push(vec![0; CHUNK as usize].into());
                }
                self.last = Some((key, at));
                at
            }
        })
    }

    /// The references to a cluster.
    pub(super) fn get(&self, cluster: u64) -> u32 {
        self.index.get(&(cluster / CHUNK)).map_or(0, |at| self.chunks[*at][(cluster % CHUNK) as usize])
    }

    /// The references to the clusters from `first` on, up to the end of its chunk; `None`: none to any of them.
    pub(super) fn run(&self, first: u64) -> (Option<&[u32]>, u64) {
        let inside = (first % CHUNK) as usize;
        (self.index.get(&(first / CHUNK)).map(|at| &self.chunks[*at][inside..]), CHUNK - inside as u64)
    }

    /// One past the highest cluster that is referred to, 0 if there is none.
    pub(super) fn end(&self) -> u64 {
        let last = self.index.iter().rev().find_map(|(key, at)| {
            self.chunks[*at].iter().rposition(|count| *count != 0).map(|last| key * CHUNK + last as u64 + 1)
        });
        last.unwrap_or(0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn references_are_counted_wherever_they_are() {
        let mut counts = Counts::default();
        assert_eq!(counts.end(), 0);
        for cluster in [5, 5, 70_000, u64::MAX / 2, 5] {
            counts.add(cluster).unwrap();
        }
        assert_eq!((counts.get(5), counts.get(6), counts.get(70_000)), (3, 0, 1));
        assert_eq!(counts.end(), u64::MAX / 2 + 1);
        assert_eq!(counts.run(4).0.unwrap()[..3], [0, 3, 0]);
        assert_eq!(counts.run(CHUNK), (None, CHUNK));
        counts.add_run(CHUNK - 2, CHUNK + 4).unwrap();
        assert_eq!([CHUNK - 3, CHUNK - 2, CHUNK, 2 * CHUNK + 1, 2 * CHUNK + 2].map(|n| counts.get(n)), [0, 1, 1, 1, 0]);
    }

    #[test]
    fn memory_has_a_limit() {
        let mut counts = Counts::default();
        let full = (0..u64::MAX).find(|n| counts.add(n * CHUNK).is_err()).unwrap();
        assert_eq!(full, MAX_CHUNKS as u64);
        assert_eq!(counts.add(0), Ok(2), "what is there is counted on");
    }
}
