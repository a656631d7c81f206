//! Which clusters of the store may be handed out.
//!
//! What no table refers to is free. In one session that is (a) everything behind the last cluster in use, and (b) the holes in
//! front of it that we know of: QED records none, QCOW2 counts references.
//!
//! **Invariants.**
//! * A cluster is in at most one place: in use or reserved, in `free`, in `unlinked`, or behind `end`.
//! * What lies in `free` or behind `end` is referred to by no table, in memory or on disk. (A replaced cluster waits in
//!   `unlinked` until the table that let go of it is durable.)
//! * What lies at or behind `fresh` was never handed out and reads as zeros.
//! * `end <= grown`; the store is at least `grown` bytes long.

use layout::{HostOffset, HostRange};
use std::collections::BTreeMap;

/// Clusters handed out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Taken {
    /// Which.
    pub(crate) range: HostRange,
    /// They read as zeros.
    pub(crate) zeroed: bool,
}

/// The space of one image. Plain data; offsets and lengths are multiples of the cluster size.
#[derive(Debug)]
pub(crate) struct Space {
    cluster: u64,
    /// The store can grow and shrink (it is a file).
    growable: bool,
    end: u64,
    grown: u64,
    fresh: u64,
    free: BTreeMap<u64, u64>,
    unlinked: Vec<HostRange>,
}

impl Space {
    /// Of a store of `length` bytes that is in use throughout. What lies behind the last whole cluster may be used.
    pub(crate) fn full(cluster: u64, length: u64, growable: bool) -> Self {
        let end = length - length % cluster;
        Self {
            cluster,
            growable,
            end,
            grown: end,
            fresh: if growable { length.next_multiple_of(cluster) } else { u64::MAX },
            free: BTreeMap::new(),
            unlinked: Vec::new(),
        }
    }

    /// Whether the store can grow and shrink.
    pub(crate) fn growable(&self) -> bool {
        self.growable
    }

    /// Behind the last cluster in use or reserved.
    pub(crate) fn end(&self) -> u64 {
        self.end
    }

    /// How far the store was grown.
    pub(crate) fn grown(&self) -> u64 {
        self.grown
    }

    /// Whether there are holes in front of `end`.
    pub(crate) fn has_holes(&self) -> bool {
        !self.free.is_empty()
    }

    /// Takes up to `want` bytes that lie side by side, at least one cluster; `None` when the store must grow first.
    ///
    /// One cluster comes from a hole where there is one, so that holes go away; a longer run only from a hole that holds
    /// it whole, so that what is written together stays together.
    pub(crate) fn take(&mut self, want: u64) -> Option<Taken> {
        let hole = self.free.iter().find(|(_, len)| **len >= want).map(|(at, len)| (*at, *len));
        let hole = if self.growable { hole } else { hole.or_else(|| self.largest_hole()) };
        if let Some((at, len)) = hole {
            let taken = want.min(len);
            self.free.remove(&at);
            if len > taken {
                self.free.insert(at + taken, len - taken);
            }
            return Some(Taken { range: HostOffset(at).range(taken), zeroed: false });
        }
        let room = self.grown - self.end;
        if room == 0 {
            return None;
        }
        Some(self.bump(want.min(room)))
    }

    /// Takes exactly `bytes` that lie side by side; `None` when there is no such run and the store must grow first.
    pub(crate) fn take_whole(&mut self, bytes: u64) -> Option<Taken> {
        if self.grown - self.end >= bytes {
            return Some(self.bump(bytes));
        }
        if self.growable {
            return None;
        }
        let (at, len) = self.free.iter().find(|(_, len)| **len >= bytes).map(|(at, len)| (*at, *len))?;
        self.free.remove(&at);
        if len > bytes {
            self.free.insert(at + bytes, len - bytes);
        }
        Some(Taken { range: HostOffset(at).range(bytes), zeroed: false })
    }

    fn bump(&mut self, bytes: u64) -> Taken {
        let at = self.end;
        self.end += bytes;
        let zeroed = at >= self.fresh;
        self.fresh = self.fresh.max(self.end);
        Taken { range: HostOffset(at).range(bytes), zeroed }
    }

    fn largest_hole(&self) -> Option<(u64, u64)> {
        self.free.iter().max_by_key(|(_, len)| **len).map(|(at, len)| (*at, *len))
    }

    /// Takes back what no table refers to, in memory or on disk.
    pub(crate) fn give_back(&mut self, range: HostRange) {
        if range.is_empty() {
            return;
        }
        debug_assert!(range.is_aligned(self.cluster) && range.end().get() <= self.end, "{range} of {:#x}", self.end);
        let (mut start, mut end) = (range.start().get(), range.end().get());
        if let Some((&at, &len)) = self.free.range(..start).next_back() {
            debug_assert!(at + len <= start, "given back twice");
            if at + len == start {
                self.free.remove(&at);
                start = at;
            }
        }
        if let Some(len) = self.free.remove(&end) {
            end += len;
        }
        if end == self.end && self.growable {
            self.end = start;
        } else {
            self.free.insert(start, end - start);
        }
    }

    /// Puts aside what a table in memory no longer refers to, but the one on disk may.
    pub(crate) fn unlink(&mut self, range: HostRange) {
        self.unlinked.push(range);
    }

    /// Whether something was put aside.
    pub(crate) fn has_unlinked(&self) -> bool {
        !self.unlinked.is_empty()
    }

    /// What was put aside so far: to be given back once the tables as they are now are durable.
    pub(crate) fn take_unlinked(&mut self) -> Vec<HostRange> {
        std::mem::take(&mut self.unlinked)
    }

    /// The store was grown to `length` bytes; what was added reads as zeros.
    pub(crate) fn grew(&mut self, length: u64) {
        self.grown = self.grown.max(length - length % self.cluster);
    }

    /// About to cut off what lies behind `end`; returns the length to cut to. From now on nothing is handed out from there
    /// until the store has grown again.
    pub(crate) fn trim(&mut self) -> u64 {
        self.grown = self.end;
        self.end
    }

    /// What [`Space::trim`] cut off is gone: what comes there next reads as zeros.
    pub(crate) fn trimmed(&mut self) {
        self.fresh = self.end;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const C: u64 = 4096;

    fn range(at: u64, clusters: u64) -> HostRange {
        HostOffset(at * C).range(clusters * C)
    }

    #[test]
    fn tail_is_fresh_once() {
        let mut space = Space::full(C, 10 * C, true);
        assert_eq!(space.take(C), None);
        space.grew(20 * C);
        let first = space.take(2 * C).unwrap();
        assert_eq!((first.range, first.zeroed), (range(10, 2), true));
        space.give_back(first.range);
        assert_eq!(space.end(), 10 * C);
        let again = space.take(3 * C).unwrap();
        assert_eq!((again.range, again.zeroed), (range(10, 3), false), "its first clusters may have been written");
        assert!(space.take(C).unwrap().zeroed);
    }

    #[test]
    fn partial_last_cluster_is_used_but_not_fresh() {
        let mut space = Space::full(C, 10 * C + 5, true);
        space.grew(20 * C);
        assert_eq!(space.take(C), Some(Taken { range: range(10, 1), zeroed: false }));
        assert_eq!(space.take(C), Some(Taken { range: range(11, 1), zeroed: true }));
    }

    #[test]
    fn holes_are_filled_and_merged_into_the_tail() {
        let mut space = Space::full(C, 10 * C, true);
        space.give_back(range(3, 1));
        space.give_back(range(5, 1));
        space.give_back(range(4, 1));
        assert_eq!(space.take(2 * C), Some(Taken { range: range(3, 2), zeroed: false }));
        assert_eq!(space.take(2 * C), None, "a run is not split over holes");
        space.give_back(range(6, 4));
        assert_eq!((space.end(), space.has_holes()), (5 * C, false));
    }

    #[test]
    fn trimmed_tail_is_fresh_again() {
        let mut space = Space::full(C, 10 * C, true);
        space.grew(20 * C);
        let taken = space.take(5 * C).unwrap();
        space.give_back(taken.range);
        assert_eq!(space.trim(), 10 * C);
        assert_eq!(space.take(C), None);
        space.trimmed();
        space.grew(20 * C);
        assert!(space.take(C).unwrap().zeroed);
    }

    proptest! {
        #[test]
        fn nothing_is_handed_out_twice(steps in proptest::collection::vec((0u8..4, 1u64..6), 1..200), growable: bool) {
            let mut space = Space::full(C, 16 * C, growable);
            if !growable {
                space.give_back(range(4, 12));
            }
            let mut held: Vec<HostRange> = Vec::new();
            for (step, n) in steps {
                match step {
                    0 => if let Some(taken) = space.take(n * C) {
                        prop_assert!(!taken.range.is_empty() && taken.range.len() <= n * C && taken.range.is_aligned(C));
                        prop_assert!(held.iter().all(|h| !h.overlaps(taken.range)), "{:?} {:?}", held, taken);
                        prop_assert!(taken.range.end().get() <= space.grown());
                        held.push(taken.range);
                    },
                    1 => if let Some(taken) = space.take_whole(n * C) {
                        prop_assert_eq!(taken.range.len(), n * C);
                        prop_assert!(held.iter().all(|h| !h.overlaps(taken.range)));
                        held.push(taken.range);
                    },
                    2 => if !held.is_empty() {
                        let range = held.swap_remove(n as usize % held.len());
                        space.give_back(range);
                    },
                    _ => if growable { space.grew(space.grown() + n * C) },
                }
                prop_assert!(space.end() <= space.grown());
            }
            for range in held.drain(..) {
                space.give_back(range);
            }
            if growable {
                prop_assert!(space.end() <= 16 * C && !space.has_holes());
            }
        }
    }
}
