//! The range-lock table: which guest operation has which bytes, and how.
//!
//! Two modes are enough. **Shared** is a write in place: it moves bytes and no mapping, so any number may overlap (the
//! guest orders its own writes). **Exclusive** covers whole clusters whose mapping changes: an allocating write ("fill"),
//! zeroing and discarding ("drop"). So a mapping never changes under a write in place, and two allocations never meet in
//! one cluster.
//!
//! **Invariants.** An entry is granted when no *earlier* entry that overlaps it is of a conflicting mode, so nobody is
//! starved and two conflicting operations run in the order they came. A request holds one entry and never waits for a second
//! one while it holds it: no deadlock.
//!
//! The table is a list in order of arrival, scanned as a whole: there are as many entries as requests in flight, a few
//! hundred at most, and a scan of that beats any tree.

use layout::{GuestOffset, GuestRange};
use ring::sync::Event;
use std::cell::RefCell;
use std::future::Future;
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll, Waker};

/// How a range is held.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Mode {
    Shared,
    Exclusive,
}

impl Mode {
    fn conflicts(self, other: Self) -> bool {
        self == Self::Exclusive || other == Self::Exclusive
    }
}

struct Entry {
    id: u64,
    range: GuestRange,
    mode: Mode,
    granted: bool,
    waker: Option<Waker>,
}

impl Entry {
    fn is_in_the_way_of(&self, range: GuestRange, mode: Mode) -> bool {
        self.mode.conflicts(mode) && self.range.overlaps(range)
    }
}

#[derive(Default)]
struct Table {
    next: u64,
    /// In order of arrival.
    entries: Vec<Entry>,
    waiting: usize,
}

impl Table {
    fn add(&mut self, range: GuestRange, mode: Mode, granted: bool, waker: Option<Waker>) -> u64 {
        let id = self.next;
        self.next += 1;
        self.waiting += usize::from(!granted);
        self.entries.push(Entry { id, range, mode, granted, waker });
        id
    }

    fn is_free(&self, range: GuestRange, mode: Mode) -> bool {
        !self.entries.iter().any(|entry| entry.is_in_the_way_of(range, mode))
    }

    fn entry(&mut self, id: u64) -> Option<&mut Entry> {
        self.entries.iter_mut().find(|entry| entry.id == id)
    }

    /// Takes an entry out and grants what it held up. Hands back who is to be woken and whether anything was held.
    fn remove(&mut self, id: u64) -> (Vec<Waker>, Option<Entry>) {
        let Some(at) = self.entries.iter().position(|entry| entry.id == id) else { return (Vec::new(), None) };
        let gone = self.entries.remove(at);
        self.waiting -= usize::from(!gone.granted);
        let mut woken = Vec::new();
        if self.waiting > 0 {
            for i in 0..self.entries.len() {
                let (before, rest) = self.entries.split_at_mut(i);
                let this = &mut rest[0];
                if !this.granted && !before.iter().any(|entry| entry.is_in_the_way_of(this.range, this.mode)) {
                    this.granted = true;
                    self.waiting -= 1;
                    woken.extend(this.waker.take());
                }
            }
        }
        (woken, Some(gone))
    }
}

/// The table of one disk. Clones share it.
#[derive(Clone, Default)]
pub(crate) struct RangeLocks {
    table: Rc<RefCell<Table>>,
    released: Event,
}

impl RangeLocks {
    /// Takes the range for a write in place, if nobody is in the way.
    pub(crate) fn try_shared(&self, range: GuestRange) -> Option<Held> {
        self.try_take(range, Mode::Shared)
    }

    /// Takes the range alone, if nobody is in the way.
    pub(crate) fn try_exclusive(&self, range: GuestRange) -> Option<Held> {
        self.try_take(range, Mode::Exclusive)
    }

    /// Takes the range for a write in place, in line.
    pub(crate) async fn shared(&self, range: GuestRange) -> Held {
        self.take(range, Mode::Shared).await
    }

    /// Takes whole clusters to change what they map to, in line.
    pub(crate) async fn exclusive(&self, range: GuestRange) -> Held {
        self.take(range, Mode::Exclusive).await
    }

    /// Whether a guest is changing the mapping of `at`'s cluster: populate then leaves it alone.
    pub(crate) fn is_exclusively_held(&self, at: GuestOffset) -> bool {
        self.is_exclusively_held_in(at.range(1))
    }

    /// Waits until nobody changes mappings in `range`. Takes no place in line: no guest ever waits for the caller.
    pub(crate) async fn until_not_exclusive(&self, range: GuestRange) {
        loop {
            let wait = self.released.wait();
            if !self.is_exclusively_held_in(range) {
                return;
            }
            wait.await;
        }
    }

    fn is_exclusively_held_in(&self, range: GuestRange) -> bool {
        let table = self.table.borrow();
        table.entries.iter().any(|entry| entry.granted && entry.mode == Mode::Exclusive && entry.range.overlaps(range))
    }

    fn try_take(&self, range: GuestRange, mode: Mode) -> Option<Held> {
        let mut table = self.table.borrow_mut();
        if !table.is_free(range, mode) {
            return None;
        }
        let id = table.add(range, mode, true, None);
        Some(Held { locks: self.clone(), id })
    }

    async fn take(&self, range: GuestRange, mode: Mode) -> Held {
        match self.try_take(range, mode) {
            Some(held) => held,
            None => Waiting { locks: self, range, mode, held: None }.await,
        }
    }

    fn release(&self, id: u64) {
        let (woken, gone) = self.table.borrow_mut().remove(id);
        woken.into_iter().for_each(Waker::wake);
        if gone.is_some_and(|entry| entry.granted && entry.mode == Mode::Exclusive) {
            self.released.notify_all();
        }
    }
}

/// A range held, or a place in line; given up when dropped.
pub(crate) struct Held {
    locks: RangeLocks,
    id: u64,
}

impl Drop for Held {
    fn drop(&mut self) {
        self.locks.release(self.id);
    }
}

/// Waits in line.
struct Waiting<'a> {
    locks: &'a RangeLocks,
    range: GuestRange,
    mode: Mode,
    /// The place in line, once taken.
    held: Option<Held>,
}

impl Future for Waiting<'_> {
    type Output = Held;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Held> {
        let this = &mut *self;
        let mut table = this.locks.table.borrow_mut();
        let Some(held) = this.held.take() else {
            // The first poll follows the failed try at once, but between the two anything may have been released.
            let granted = table.is_free(this.range, this.mode);
            let waker = (!granted).then(|| cx.waker().clone());
            let held = Held { locks: this.locks.clone(), id: table.add(this.range, this.mode, granted, waker) };
            if granted {
                return Poll::Ready(held);
            }
            this.held = Some(held);
            return Poll::Pending;
        };
        let granted = table.entry(held.id).is_none_or(|entry| entry.granted);
        if granted {
            return Poll::Ready(held);
        }
        let old = table.entry(held.id).and_then(|entry| entry.waker.replace(cx.waker().clone()));
        drop(table);
        drop(old);
        this.held = Some(held);
        Poll::Pending
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use futures_util::FutureExt;
    use std::pin::pin;

    fn range(start: u64, end: u64) -> GuestRange {
        GuestRange::between(GuestOffset(start), GuestOffset(end))
    }

    #[test]
    fn writes_in_place_overlap_and_exclusive_ones_do_not() {
        let locks = RangeLocks::default();
        let a = locks.shared(range(0, 100)).now_or_never().unwrap();
        let b = locks.shared(range(50, 150)).now_or_never().unwrap();
        assert!(locks.exclusive(range(0, 64)).now_or_never().is_none());
        assert!(locks.exclusive(range(150, 200)).now_or_never().is_some());
        drop((a, b));
        let c = locks.exclusive(range(0, 64)).now_or_never().unwrap();
        assert!(locks.try_shared(range(63, 64)).is_none());
        assert!(locks.try_shared(range(64, 65)).is_some());
        drop(c);
        assert!(locks.try_shared(range(63, 64)).is_some());
    }

    #[test]
    fn a_waiting_exclusive_is_not_starved_by_later_shared_ones() {
        let locks = RangeLocks::default();
        let first = locks.try_shared(range(0, 10)).unwrap();
        let mut exclusive = pin!(locks.exclusive(range(0, 10)));
        assert!(exclusive.as_mut().now_or_never().is_none());
        let mut late = pin!(locks.shared(range(5, 6)));
        assert!(late.as_mut().now_or_never().is_none(), "the exclusive one came first");
        assert!(locks.try_shared(range(10, 11)).is_some(), "no conflict, no wait");
        drop(first);
        let held = exclusive.as_mut().now_or_never().expect("its turn");
        assert!(late.as_mut().now_or_never().is_none());
        drop(held);
        assert!(late.as_mut().now_or_never().is_some());
    }

    #[test]
    fn leaving_the_line_lets_those_behind_pass() {
        let locks = RangeLocks::default();
        let first = locks.try_shared(range(0, 10)).unwrap();
        let mut behind = pin!(locks.shared(range(0, 10)));
        {
            let mut exclusive = pin!(locks.exclusive(range(0, 10)));
            assert!(exclusive.as_mut().now_or_never().is_none());
            assert!(behind.as_mut().now_or_never().is_none());
        }
        assert!(behind.as_mut().now_or_never().is_some());
        drop(first);
        assert!(locks.table.borrow().entries.is_empty());
    }

    #[test]
    fn only_a_granted_exclusive_entry_counts_as_held() {
        let locks = RangeLocks::default();
        let first = locks.try_shared(range(0, 10)).unwrap();
        let mut exclusive = pin!(locks.exclusive(range(0, 10)));
        assert!(exclusive.as_mut().now_or_never().is_none());
        assert!(!locks.is_exclusively_held(GuestOffset(5)));
        drop(first);
        let held = exclusive.as_mut().now_or_never().unwrap();
        assert!(locks.is_exclusively_held(GuestOffset(5)));
        assert!(!locks.is_exclusively_held(GuestOffset(10)));
        let mut over = pin!(locks.until_not_exclusive(range(9, 12)));
        assert!(over.as_mut().now_or_never().is_none());
        assert!(locks.until_not_exclusive(range(10, 12)).now_or_never().is_some());
        drop(held);
        assert!(over.as_mut().now_or_never().is_some());
    }
}
