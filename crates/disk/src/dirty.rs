//! Which parts of a disk a guest has changed since somebody last looked: what a job that copies a disk in use has to copy again.
//!
//! **Invariant.** A range is marked when the change has ended, well or not: whoever takes a mark away and *then* reads sees the
//! change, or finds the mark again.

use layout::{GuestOffset, GuestRange};
use ring::sync::Event;
use std::cell::{Cell, RefCell};

/// What one mark stands for, in bytes: small enough not to copy much in vain, a terabyte's marks fit into two MiB.
const GRAIN: u64 = 64 << 10;

/// See the module.
#[derive(Default)]
pub struct Dirty {
    words: RefCell<Vec<u64>>,
    count: Cell<u64>,
    /// Told when something is marked.
    marked: Event,
}

impl Dirty {
    /// Marks whatever `range` touches.
    pub fn mark(&self, range: GuestRange) {
        if range.is_empty() {
            return;
        }
        let mut words = self.words.borrow_mut();
        for grain in range.start().get() / GRAIN..range.end().get().div_ceil(GRAIN) {
            let at = usize::try_from(grain / 64).unwrap_or(usize::MAX - 1);
            if words.len() <= at {
                words.resize(at + 1, 0);
            }
            let bit = 1 << (grain % 64);
            self.count.set(self.count.get() + u64::from(words[at] & bit == 0));
            words[at] |= bit;
        }
        drop(words);
        self.marked.notify_all();
    }

    /// Whether nothing is marked.
    pub fn is_empty(&self) -> bool {
        self.count.get() == 0
    }

    /// Ends when something is marked the next time.
    pub fn marked(&self) -> impl Future<Output = ()> + use<> {
        self.marked.wait()
    }

    /// The first marked run at or after `from` and before `end`.
    pub fn next(&self, from: GuestOffset, end: GuestOffset) -> Option<GuestRange> {
        let words = self.words.borrow();
        let is_marked = |grain: u64| {
            let word = usize::try_from(grain / 64).ok().and_then(|at| words.get(at));
            word.is_some_and(|word| word & (1 << (grain % 64)) != 0)
        };
        let (mut grain, last) = (from.get() / GRAIN, (words.len() as u64 * 64).min(end.get().div_ceil(GRAIN)));
        while grain < last && !is_marked(grain) {
            // Whole words of nothing at one go.
            let whole = grain % 64 == 0 && words.get(usize::try_from(grain / 64).unwrap_or(usize::MAX)) == Some(&0);
            grain += if whole { 64 } else { 1 };
        }
        if grain >= last {
            return None;
        }
        let start = grain;
        while grain < last && is_marked(grain) {
            grain += 1;
        }
        let run = GuestRange::between(GuestOffset(start * GRAIN), GuestOffset(grain * GRAIN));
        let run = run.intersect(GuestRange::between(from, end));
        (!run.is_empty()).then_some(run)
    }

    /// Takes away the marks of what lies in `range` as a whole (the disk's `end` makes a part of one whole).
    pub fn clear(&self, range: GuestRange, end: GuestOffset) {
        let last = if range.end() >= end { range.end().get().div_ceil(GRAIN) } else { range.end().get() / GRAIN };
        let mut words = self.words.borrow_mut();
        for grain in range.start().get().div_ceil(GRAIN)..last {
            let Some(word) = usize::try_from(grain / 64).ok().and_then(|at| words.get_mut(at)) else { return };
            let bit = 1 << (grain % 64);
            self.count.set(self.count.get() - u64::from(*word & bit != 0));
            *word &= !bit;
        }
    }

    /// Bytes that are marked.
    pub fn bytes(&self) -> u64 {
        self.count.get() * GRAIN
    }

    /// What ranges are best cut by, in bytes.
    pub const fn grain() -> u64 {
        GRAIN
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn range(start: u64, end: u64) -> GuestRange {
        GuestRange::between(GuestOffset(start), GuestOffset(end))
    }

    #[test]
    fn marks_come_and_go_by_the_grain() {
        let (dirty, end) = (Dirty::default(), GuestOffset(100 * GRAIN + 7));
        assert!(dirty.is_empty() && dirty.next(GuestOffset::ZERO, end).is_none());
        dirty.mark(range(70 * GRAIN + 5, 71 * GRAIN + 1));
        dirty.mark(range(100 * GRAIN + 1, 100 * GRAIN + 3));
        assert_eq!(dirty.bytes(), 3 * GRAIN);
        assert_eq!(dirty.next(GuestOffset::ZERO, end), Some(range(70 * GRAIN, 72 * GRAIN)));
        assert_eq!(dirty.next(GuestOffset(71 * GRAIN + 1), end), Some(range(71 * GRAIN + 1, 72 * GRAIN)));
        assert_eq!(dirty.next(GuestOffset(72 * GRAIN), end), Some(range(100 * GRAIN, 100 * GRAIN + 7)));
        dirty.clear(range(70 * GRAIN + 1, 72 * GRAIN), end);
        assert_eq!(dirty.next(GuestOffset::ZERO, end), Some(range(70 * GRAIN, 71 * GRAIN)), "a part is not enough");
        dirty.clear(range(0, 100 * GRAIN + 7), end);
        assert!(dirty.is_empty());
    }
}
