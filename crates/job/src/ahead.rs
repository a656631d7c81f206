//! What is done ahead of something that is not.
//!
//! **Invariant.** Neighbours are one entry: there are no more entries than gaps between them, however long what lies in front takes.

use layout::{GuestOffset, GuestRange};
use std::collections::BTreeMap;

/// Ranges that do not touch, by where they begin; the value is the end.
#[derive(Debug, Default)]
pub(crate) struct Ahead(BTreeMap<GuestOffset, GuestOffset>);

impl Ahead {
    /// `range`, which none of them touches, is done.
    pub(crate) fn add(&mut self, range: GuestRange) {
        let (mut start, mut end) = (range.start(), range.end());
        if let Some((before, _)) = self.0.range(..start).next_back().filter(|(_, end)| **end == start) {
            start = *before;
        }
        if let Some(behind) = self.0.remove(&end) {
            end = behind;
        }
        self.0.insert(start, end);
    }

    /// Takes out the first that begins in front of `front`: everything there is done.
    pub(crate) fn passed(&mut self, front: GuestOffset) -> Option<GuestRange> {
        let first = self.0.first_entry().filter(|first| *first.key() < front)?;
        let (start, end) = first.remove_entry();
        Some(GuestRange::between(start, end))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn range(start: u64, end: u64) -> GuestRange {
        GuestRange::between(GuestOffset(start), GuestOffset(end))
    }

    #[test]
    fn neighbours_are_one_and_come_out_when_what_was_in_front_is_done() {
        let mut ahead = Ahead::default();
        // Every second one, backwards, then those between.
        for n in (10..110).rev().filter(|n| n % 2 == 0).chain((10..110).filter(|n| n % 2 == 1)) {
            ahead.add(range(n * 8, n * 8 + 8));
        }
        ahead.add(range(2000, 2008));
        assert_eq!(ahead.0.len(), 2);
        assert_eq!(ahead.passed(GuestOffset(80)), None);
        assert_eq!(ahead.passed(GuestOffset(880)), Some(range(80, 880)));
        assert_eq!(ahead.passed(GuestOffset(1000)), None);
        assert_eq!(ahead.passed(GuestOffset(5000)), Some(range(2000, 2008)));
        assert_eq!(ahead.passed(GuestOffset(5000)), None);
    }
}
