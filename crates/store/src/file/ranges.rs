//! Which ranges of one file are being written, so that a read-modify-write of a block and a write to the same block, or
//! a growing write and a change of the length, come one after the other.
//!
//! **Invariant.** A hold is granted once no earlier hold (granted or still waiting) overlaps it, unless both are shared.
//! So nobody is overtaken, and nobody waits for a later one. Whoever leaves, also by being dropped while waiting, lets
//! the others look again.

use layout::HostRange;
use ring::sync::Event;
use std::cell::RefCell;
use std::collections::BTreeMap;

/// The holds on one file, in order of arrival.
#[derive(Default)]
pub(super) struct Ranges {
    line: RefCell<Line>,
    left: Event,
}

#[derive(Default)]
struct Line {
    next: u64,
    holds: BTreeMap<u64, Hold>,
    /// How many of them are exclusive: without any, a shared one need not look.
    exclusive: usize,
}

struct Hold {
    range: HostRange,
    exclusive: bool,
}

/// A hold on a range, given up when dropped.
#[must_use = "the hold ends when this is dropped"]
pub(super) struct Held<'a> {
    ranges: &'a Ranges,
    ticket: u64,
}

impl Ranges {
    /// Waits until nothing that overlaps `range` is held exclusively.
    pub(super) async fn shared(&self, range: HostRange) -> Held<'_> {
        self.hold(range, false).await
    }

    /// Waits until nothing that overlaps `range` is held.
    pub(super) async fn exclusive(&self, range: HostRange) -> Held<'_> {
        self.hold(range, true).await
    }

    async fn hold(&self, range: HostRange, exclusive: bool) -> Held<'_> {
        let held = self.enter(range, exclusive);
        while self.blocked(held.ticket) {
            self.left.wait().await;
        }
        held
    }

    fn enter(&self, range: HostRange, exclusive: bool) -> Held<'_> {
        let mut line = self.line.borrow_mut();
        let ticket = line.next;
        line.next += 1;
        line.exclusive += usize::from(exclusive);
        line.holds.insert(ticket, Hold { range, exclusive });
        Held { ranges: self, ticket }
    }

    fn blocked(&self, ticket: u64) -> bool {
        let line = self.line.borrow();
        let Some(own) = line.holds.get(&ticket) else { return false };
        if line.exclusive == 0 {
            return false;
        }
        line.holds
            .range(..ticket)
            .any(|(_, earlier)| (own.exclusive || earlier.exclusive) && earlier.range.overlaps(own.range))
    }
}

impl Drop for Held<'_> {
    fn drop(&mut self) {
        let mut line = self.ranges.line.borrow_mut();
        if let Some(hold) = line.holds.remove(&self.ticket) {
            line.exclusive -= usize::from(hold.exclusive);
        }
        drop(line);
        self.ranges.left.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use futures_util::FutureExt;
    use layout::HostOffset;
    use std::pin::pin;
    use std::task::{Context, Waker};

    fn range(start: u64, end: u64) -> HostRange {
        HostRange::between(HostOffset(start), HostOffset(end))
    }

    #[test]
    fn shared_holds_overlap_exclusive_ones_do_not() {
        let ranges = Ranges::default();
        let a = ranges.shared(range(0, 10)).now_or_never().unwrap();
        let b = ranges.shared(range(5, 15)).now_or_never().unwrap();
        assert!(ranges.exclusive(range(9, 11)).now_or_never().is_none());
        let c = ranges.exclusive(range(15, 20)).now_or_never().unwrap();
        assert!(ranges.shared(range(19, 30)).now_or_never().is_none());
        drop((a, b, c));
        assert!(ranges.exclusive(range(0, 100)).now_or_never().is_some());
    }

    #[test]
    fn nobody_is_overtaken_and_who_leaves_gives_way() {
        let ranges = Ranges::default();
        let mut cx = Context::from_waker(Waker::noop());
        let first = ranges.shared(range(0, 10)).now_or_never().unwrap();
        let mut waiting = Box::pin(ranges.exclusive(range(0, 10)));
        assert!(waiting.as_mut().poll(&mut cx).is_pending());
        let mut late = pin!(ranges.shared(range(0, 10)));
        assert!(late.as_mut().poll(&mut cx).is_pending(), "an exclusive one came before");
        drop(waiting);
        assert!(late.as_mut().poll(&mut cx).is_ready());
        drop(first);
    }
}
