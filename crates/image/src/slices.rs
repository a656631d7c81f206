//! Slices of L2 tables in memory.
//!
//! A slice is a page of a table (or all of it, where it is smaller), as its format decodes it. Its number counts slices over all
//! tables, so it follows from the guest's offset.
//!
//! **Invariants.**
//! * A slice that is dirty, being committed or pinned stays; any other one may be evicted whenever room is made.
//! * A slice in memory is the truth; what the store holds may lag behind only while the slice is dirty or being committed.

use ring::sync::Event;
use std::cell::{Cell, Ref, RefCell, RefMut};
use std::collections::{BTreeSet, HashMap, VecDeque};
use std::rc::Rc;

/// Memory for slices: 8192 of 4 KiB describe 256 GiB at 64 KiB a cluster, 16 GiB at 4 KiB.
pub(crate) const CACHE_BYTES: usize = 32 << 20;

/// How much of it may wait for a commit before reservations do, too.
const DIRTY_SHARE: usize = 2;

struct Cached<S> {
    slice: S,
    pins: u32,
    dirty: bool,
    committing: bool,
    /// Looked at since the clock's hand passed.
    used: Cell<bool>,
}

impl<S> Cached<S> {
    fn evictable(&self) -> bool {
        self.pins == 0 && !self.dirty && !self.committing
    }
}

/// What must happen before another slice fits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Room {
    /// Nothing.
    Free,
    /// A commit: some are dirty.
    Commit,
    /// All are pinned: reservations must end.
    Wait,
}

/// The slices of one image.
pub(crate) struct SliceCache<S> {
    slices: HashMap<u64, Cached<S>>,
    /// Second-chance clock over the numbers in `slices`.
    clock: VecDeque<u64>,
    /// Slices on their way from the store; the event tells when one has arrived or failed.
    loading: HashMap<u64, Event>,
    capacity: usize,
    dirty: BTreeSet<u64>,
}

impl<S: Clone> SliceCache<S> {
    /// Room for `bytes` in slices of `slice_bytes`, at least for a few of them.
    pub(crate) fn new(bytes: usize, slice_bytes: usize) -> Self {
        Self {
            slices: HashMap::new(),
            clock: VecDeque::new(),
            loading: HashMap::new(),
            capacity: (bytes / slice_bytes).max(4),
            dirty: BTreeSet::new(),
        }
    }

    /// The slice, if it is in memory.
    #[inline]
    pub(crate) fn get(&self, number: u64) -> Option<&S> {
        let cached = self.slices.get(&number)?;
        cached.used.set(true);
        Some(&cached.slice)
    }

    /// Whether the slice is in memory.
    pub(crate) fn contains(&self, number: u64) -> bool {
        self.slices.contains_key(&number)
    }

    /// Keeps the slice in memory until [`SliceCache::unpin`]; false when it is not there.
    pub(crate) fn pin(&mut self, number: u64) -> bool {
        match self.slices.get_mut(&number) {
            Some(cached) => {
                cached.pins += 1;
                true
            }
            None => false,
        }
    }

    /// Undoes one [`SliceCache::pin`].
    pub(crate) fn unpin(&mut self, number: u64) {
        if let Some(cached) = self.slices.get_mut(&number) {
            debug_assert!(cached.pins > 0);
            cached.pins = cached.pins.saturating_sub(1);
        }
    }

    /// Changes a slice that is in memory (it is pinned) and marks it dirty.
    pub(crate) fn change(&mut self, number: u64, change: impl FnOnce(&mut S)) {
        let Some(cached) = self.slices.get_mut(&number) else {
            debug_assert!(false, "slice {number} is not in memory");
            return;
        };
        change(&mut cached.slice);
        cached.dirty = true;
        self.dirty.insert(number);
    }

    /// Makes room for one slice, or says what must happen first.
    pub(crate) fn make_room(&mut self) -> Room {
        // Two rounds of the hand: the first takes the second chances away.
        let mut turns = 2 * self.clock.len();
        while self.slices.len() >= self.capacity {
            if turns == 0 {
                return if self.dirty.is_empty() && !self.slices.values().any(|c| c.committing) {
                    Room::Wait
                } else {
                    Room::Commit
                };
            }
            turns -= 1;
            let Some(number) = self.clock.pop_front() else { break };
            match self.slices.get(&number) {
                Some(cached) if !cached.evictable() || cached.used.replace(false) => self.clock.push_back(number),
                _ => drop(self.slices.remove(&number)),
            }
        }
        Room::Free
    }

    /// Adds a slice that came from the store (or is known to be all zeros there).
    pub(crate) fn insert(&mut self, number: u64, slice: S) {
        let cached = Cached { slice, pins: 0, dirty: false, committing: false, used: Cell::new(true) };
        let before = self.slices.insert(number, cached);
        debug_assert!(before.is_none(), "slice {number} came twice");
        self.clock.push_back(number);
    }

    /// Whoever brings the slice now, if anybody.
    pub(crate) fn loading(&self, number: u64) -> Option<&Event> {
        self.loading.get(&number)
    }

    /// The caller brings the slice.
    pub(crate) fn begin_load(&mut self, number: u64) {
        self.loading.insert(number, Event::new());
    }

    /// The caller has brought the slice or given up.
    pub(crate) fn end_load(&mut self, number: u64) {
        if let Some(event) = self.loading.remove(&number) {
            event.notify_all();
        }
    }

    /// Whether there is something to commit.
    pub(crate) fn is_dirty(&self) -> bool {
        !self.dirty.is_empty()
    }

    /// Whether so much is dirty that reservations should wait for a commit.
    pub(crate) fn is_crowded(&self) -> bool {
        self.dirty.len() > self.capacity / DIRTY_SHARE
    }

    /// Copies of all dirty slices as they are on disk, in order; what is changed from now on is dirty again.
    pub(crate) fn begin_commit(&mut self) -> Vec<(u64, S)> {
        let mut copies = Vec::with_capacity(self.dirty.len());
        for number in std::mem::take(&mut self.dirty) {
            if let Some(cached) = self.slices.get_mut(&number) {
                cached.dirty = false;
                cached.committing = true;
                copies.push((number, cached.slice.clone()));
            }
        }
        copies
    }

    /// The copies are durable, or (`failed`) may not be: then the slices stay in memory as the only truth.
    pub(crate) fn end_commit(&mut self, numbers: impl IntoIterator<Item = u64>, failed: bool) {
        for number in numbers {
            if let Some(cached) = self.slices.get_mut(&number) {
                cached.committing = false;
                if failed {
                    cached.dirty = true;
                    self.dirty.insert(number);
                }
            }
        }
    }

    /// Forgets everything: the tables on disk were rewritten. Nothing is dirty or pinned.
    pub(crate) fn clear(&mut self) {
        debug_assert!(self.dirty.is_empty() && self.slices.values().all(Cached::evictable));
        self.slices.clear();
        self.clock.clear();
    }

    /// Slices in memory.
    #[cfg(test)]
    pub(crate) fn len(&self) -> usize {
        self.slices.len()
    }
}

/// The slices of one image, where those who keep some of them in memory find them again.
pub(crate) struct Shelf<S> {
    slices: RefCell<SliceCache<S>>,
    /// A slice was unpinned.
    unpinned: Rc<Event>,
}

impl<S: Clone> Shelf<S> {
    /// Around `slices`; `unpinned` is told when one is given up.
    pub(crate) fn new(slices: SliceCache<S>, unpinned: Rc<Event>) -> Rc<Self> {
        Rc::new(Self { slices: RefCell::new(slices), unpinned })
    }

    pub(crate) fn borrow(&self) -> Ref<'_, SliceCache<S>> {
        self.slices.borrow()
    }

    pub(crate) fn borrow_mut(&self) -> RefMut<'_, SliceCache<S>> {
        self.slices.borrow_mut()
    }

    /// Keeps slice `number` in memory, if it is there.
    pub(crate) fn pin(self: &Rc<Self>, number: u64) -> Option<SlicePin<S>> {
        self.borrow_mut().pin(number).then(|| SlicePin { shelf: Rc::clone(self), number })
    }

    /// Says that the caller brings slice `number`, as long as the answer lives.
    pub(crate) fn begin_load(&self, number: u64) -> Loading<'_, S> {
        self.borrow_mut().begin_load(number);
        Loading { shelf: self, number }
    }
}

/// Keeps a slice in memory.
pub(crate) struct SlicePin<S: Clone> {
    shelf: Rc<Shelf<S>>,
    number: u64,
}

impl<S: Clone> SlicePin<S> {
    /// Which slice.
    pub(crate) fn number(&self) -> u64 {
        self.number
    }
}

impl<S: Clone> Drop for SlicePin<S> {
    fn drop(&mut self) {
        self.shelf.borrow_mut().unpin(self.number);
        self.shelf.unpinned.notify_all();
    }
}

/// Whoever brings a slice; when this is dropped, those who wait look for themselves.
pub(crate) struct Loading<'a, S: Clone> {
    shelf: &'a Shelf<S>,
    number: u64,
}

impl<S: Clone> Drop for Loading<'_, S> {
    fn drop(&mut self) {
        self.shelf.borrow_mut().end_load(self.number);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use layout::qed::{SLICE_BYTES, Slice};

    fn cache(slices: usize) -> SliceCache<Slice> {
        SliceCache::new(slices * SLICE_BYTES, SLICE_BYTES)
    }

    fn fill(cache: &mut SliceCache<Slice>, numbers: std::ops::Range<u64>) {
        for number in numbers {
            assert_eq!(cache.make_room(), Room::Free);
            cache.insert(number, Slice::zeroed());
        }
    }

    #[test]
    fn budget_is_kept_and_the_used_survive() {
        let mut cache = cache(8);
        fill(&mut cache, 0..8);
        for round in 8..100 {
            assert!(cache.get(3).is_some(), "evicted though in use, round {round}");
            fill(&mut cache, round..round + 1);
            assert_eq!(cache.len(), 8);
        }
    }

    #[test]
    fn dirty_and_pinned_stay_and_say_what_to_wait_for() {
        let mut cache = cache(4);
        fill(&mut cache, 0..4);
        for number in 0..4 {
            assert!(cache.pin(number));
        }
        assert_eq!(cache.make_room(), Room::Wait);
        cache.change(2, |slice| slice.set(0, 1));
        for number in 0..4 {
            cache.unpin(number);
        }
        fill(&mut cache, 4..7);
        assert!(cache.contains(2));
        for number in 4..7 {
            cache.change(number, |slice| slice.set(0, 1));
        }
        assert_eq!(cache.make_room(), Room::Commit);
        let copies = cache.begin_commit();
        assert_eq!(cache.make_room(), Room::Commit, "in flight counts as dirty");
        cache.end_commit(copies.iter().map(|c| c.0), false);
        assert_eq!(cache.make_room(), Room::Free);
    }

    #[test]
    fn changed_while_committing_is_dirty_again() {
        let mut cache = cache(4);
        fill(&mut cache, 0..1);
        cache.change(0, |slice| slice.set(7, 1));
        let copies = cache.begin_commit();
        assert!(!cache.is_dirty());
        cache.change(0, |slice| slice.set(8, 1));
        assert_eq!((copies[0].1.raw()[7], copies[0].1.raw()[8]), (1, 0));
        cache.end_commit([0], false);
        assert!(cache.is_dirty());
        assert_eq!(cache.begin_commit()[0].1.raw()[8], 1);
    }

    #[test]
    fn failed_commit_keeps_the_truth() {
        let mut cache = cache(4);
        fill(&mut cache, 0..4);
        cache.change(0, |slice| slice.set(7, 1));
        let copies = cache.begin_commit();
        cache.end_commit(copies.iter().map(|c| c.0), true);
        assert!(cache.is_dirty());
        fill(&mut cache, 4..20);
        assert_eq!(cache.get(0).unwrap().raw()[7], 1);
    }
}
