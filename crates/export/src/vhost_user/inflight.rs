//! Requests in flight, remembered outside of this process: a shared memory region that the front end keeps, so that a
//! server that was killed finds what it had taken from a ring and not yet given back.
//!
//! # Invariants
//! * A head is marked before its request is begun, and unmarked only after it is in the used ring.
//! * Completions are published one by one: mark the last batch (of one), used ring, unmark, used index. Whatever instant
//!   a kill picks, at most the last batch is in doubt, and the used ring's own index decides it.
//! * The region's contents are somebody else's word: every index is checked, every walk is bounded.
//!
//! Layout for split rings: `vhost-user.rst`, "Inflight I/O tracking". All fields are in native byte order. Behind the queues'
//! parts lies one of our own (see [`super::ledger`]), which a region made by somebody else lacks.

use rustix::fs::{MemfdFlags, SealFlags};
use std::cell::Cell;
use std::fmt;
use std::fs::File;
use std::io;
use std::num::NonZeroU16;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, AtomicU16, AtomicU64, Ordering};
use vm_memory::{FileOffset, MmapRegion, VolatileMemory};

use super::config::{MAX_QUEUE_SIZE, MAX_QUEUES};
use super::ledger::Ledger;

/// The one version of the layout there is.
const VERSION: u16 = 1;

// Offsets in a queue's region.
const AT_VERSION: usize = 8;
const AT_DESC_NUM: usize = 10;
const AT_LAST_BATCH_HEAD: usize = 12;
const AT_USED_IDX: usize = 14;
/// Size of a queue region's header.
const HEADER: usize = 16;

// Offsets in a descriptor's state.
const OF_INFLIGHT: usize = 0;
const OF_NEXT: usize = 6;
const OF_COUNTER: usize = 8;
/// Size of a descriptor's state.
const STATE: usize = 16;

/// Queue regions start at multiples of this (a cache line).
const ALIGN: usize = 64;

/// What the front end says about a region.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Layout {
    /// Queues.
    pub queues: u16,
    /// Entries of each queue.
    pub queue_size: u16,
}

impl Layout {
    /// Checks against what this server supports.
    pub(super) fn new(queues: u16, queue_size: u16) -> Option<Self> {
        let sane = (1..=MAX_QUEUES).contains(&queues) && (1..=MAX_QUEUE_SIZE).contains(&queue_size);
        sane.then_some(Self { queues, queue_size })
    }

    fn stride(self) -> usize {
        (HEADER + STATE * usize::from(self.queue_size)).next_multiple_of(ALIGN)
    }

    /// Bytes the queues take.
    fn queues_len(self) -> u64 {
        (self.stride() * usize::from(self.queues)) as u64
    }

    /// Bytes it takes.
    pub(super) fn len(self) -> u64 {
        self.queues_len() + ALIGN as u64
    }
}

/// The region: one part for each queue.
#[derive(Clone)]
pub(super) struct Region {
    mapping: Arc<MmapRegion<()>>,
    layout: Layout,
}

impl Region {
    /// A new one, of zeros, with the file to hand to the front end.
    pub(super) fn create(layout: Layout) -> io::Result<(Self, File)> {
        let file = rustix::fs::memfd_create("vhost-inflight", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)?;
        let file = File::from(file);
        file.set_len(layout.len())?;
        rustix::fs::fcntl_add_seals(&file, SealFlags::GROW | SealFlags::SHRINK | SealFlags::SEAL)?;
        let region = Self::map(layout, file.try_clone()?, 0, layout.len())?;
        Ok((region, file))
    }

    /// One that the front end has kept.
    pub(super) fn map(layout: Layout, file: File, offset: u64, len: u64) -> io::Result<Self> {
        let invalid = |what| Err(io::Error::new(io::ErrorKind::InvalidInput, what));
        if len < layout.queues_len() {
            return invalid("the inflight region is too short for its queues");
        }
        let len = len.min(layout.len());
        let Some(end) = offset.checked_add(len) else {
            return invalid("the inflight region's addresses wrap around");
        };
        if file.metadata()?.len() < end {
            return invalid("the inflight region's file is too short");
        }
        let mapping = MmapRegion::from_file(FileOffset::new(file, offset), len as usize)
            .map_err(|e| io::Error::other(e.to_string()))?;
        Ok(Self { mapping: Arc::new(mapping), layout })
    }

    /// The part that is our own, if it has one.
    pub(super) fn ledger(&self) -> Option<Ledger> {
        let at = self.layout.queues_len() as usize;
        (self.mapping.len() >= at + ALIGN).then(|| Ledger::new(Arc::clone(&self.mapping), at))
    }

    /// The part of queue `index`, if it has one and it fits a queue of `size` entries. Makes it ready if it is new.
    pub(super) fn queue(&self, index: u16, size: u16) -> Option<Tracker> {
        if index >= self.layout.queues || size > self.layout.queue_size {
            return None;
        }
        let tracker = Tracker {
            mapping: Arc::clone(&self.mapping),
            base: usize::from(index) * self.layout.stride(),
            entries: NonZeroU16::new(self.layout.queue_size)?,
            counter: Cell::new(0),
        };
        match tracker.get16(AT_VERSION) {
            0 => {
                tracker.set16(AT_DESC_NUM, self.layout.queue_size);
                tracker.set16(AT_VERSION, VERSION);
            }
            VERSION if tracker.get16(AT_DESC_NUM) == self.layout.queue_size => {}
            _ => return None,
        }
        Some(tracker)
    }
}

/// The region contradicts itself or the used ring; nobody can say what was in flight.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Inconsistent;

impl fmt::Display for Inconsistent {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("the inflight region does not match the used ring")
    }
}

/// One queue's part of the region.
pub(super) struct Tracker {
    mapping: Arc<MmapRegion<()>>,
    base: usize,
    entries: NonZeroU16,
    counter: Cell<u64>,
}

impl Tracker {
    /// Marks `head` as taken from the ring.
    pub(super) fn begin(&self, head: u16) {
        let counter = self.counter.get();
        self.counter.set(counter.wrapping_add(1));
        if let Some(cell) = self.cell64(state(head) + OF_COUNTER)
            && kill::survived()
        {
            cell.store(counter, Ordering::Release);
        }
        self.mark(head, true);
    }

    /// Says that `head` is about to go into the used ring.
    pub(super) fn publish(&self, head: u16) {
        self.set16(state(head) + OF_NEXT, self.get16(AT_LAST_BATCH_HEAD));
        self.set16(AT_LAST_BATCH_HEAD, head);
    }

    /// Unmarks `head`; the used ring's index is `used` now.
    pub(super) fn end(&self, head: u16, used: u16) {
        self.mark(head, false);
        self.set16(AT_USED_IDX, used);
    }

    /// Finds what was in flight when the ring's last server went away: heads in the order in which they were taken.
    /// `used` is the used ring's index.
    pub(super) fn recover(&self, used: u16) -> Result<Vec<u16>, Inconsistent> {
        let entries = self.entries.get();
        if self.marked().next().is_none() {
            // Nothing was in flight, whatever the index says: the region is new, or the guest was reset.
            self.set16(AT_USED_IDX, used);
            return Ok(Vec::new());
        }
        let mut doubtful = used.wrapping_sub(self.get16(AT_USED_IDX));
        if doubtful > entries {
            return Err(Inconsistent);
        }
        let mut head = self.get16(AT_LAST_BATCH_HEAD);
        while doubtful > 0 {
            if head >= entries {
                return Err(Inconsistent);
            }
            self.mark(head, false);
            head = self.get16(state(head) + OF_NEXT);
            doubtful -= 1;
        }
        self.set16(AT_USED_IDX, used);
        let mut taken: Vec<(u64, u16)> = self
            .marked()
            .map(|head| (self.cell64(state(head) + OF_COUNTER).map_or(0, |c| c.load(Ordering::Acquire)), head))
            .collect();
        taken.sort_unstable();
        self.counter.set(taken.last().map_or(0, |&(counter, _)| counter.wrapping_add(1)));
        Ok(taken.into_iter().map(|(_, head)| head).collect())
    }

    fn marked(&self) -> impl Iterator<Item = u16> + '_ {
        (0..self.entries.get())
            .filter(|&head| self.cell8(state(head) + OF_INFLIGHT).is_some_and(|c| c.load(Ordering::Acquire) == 1))
    }

    fn mark(&self, head: u16, inflight: bool) {
        if let Some(cell) = self.cell8(state(head) + OF_INFLIGHT)
            && kill::survived()
        {
            cell.store(u8::from(inflight), Ordering::Release);
        }
    }

    // The cells below lie within the mapping and are aligned by construction; a `None` cannot come up.

    fn get16(&self, at: usize) -> u16 {
        self.mapping.get_atomic_ref::<AtomicU16>(self.base + at).map_or(0, |cell| cell.load(Ordering::Acquire))
    }

    fn set16(&self, at: usize, value: u16) {
        if let Ok(cell) = self.mapping.get_atomic_ref::<AtomicU16>(self.base + at)
            && kill::survived()
        {
            cell.store(value, Ordering::Release);
        }
    }

    fn cell8(&self, at: usize) -> Option<&AtomicU8> {
        self.mapping.get_atomic_ref(self.base + at).ok()
    }

    fn cell64(&self, at: usize) -> Option<&AtomicU64> {
        self.mapping.get_atomic_ref(self.base + at).ok()
    }
}

/// Where a kill may come: before every store.
#[cfg(not(test))]
mod kill {
    #[inline(always)]
    pub(super) fn survived() -> bool {
        true
    }
}

#[cfg(test)]
mod kill {
    use std::cell::Cell;

    thread_local!(static LEFT: Cell<usize> = const { Cell::new(usize::MAX) });

    /// From now on only so many stores happen.
    pub(super) fn comes_after(stores: usize) {
        LEFT.set(stores);
    }

    pub(super) fn survived() -> bool {
        let left = LEFT.get();
        LEFT.set(left.saturating_sub(1));
        left > 0
    }
}

/// Offset of a descriptor's state within its queue's region. Heads are below the queue's size, which is at most the
/// region's number of entries (see [`Region::queue`]).
fn state(head: u16) -> usize {
    HEADER + STATE * usize::from(head)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tracker(queue_size: u16) -> (Region, Tracker) {
        let (region, _) = Region::create(Layout::new(2, queue_size).unwrap()).unwrap();
        let tracker = region.queue(1, queue_size).unwrap();
        (region, tracker)
    }

    #[test]
    fn what_was_taken_and_not_given_back_comes_back_in_order() {
        let (region, tracker) = tracker(8);
        for head in [5, 2, 7, 0] {
            tracker.begin(head);
        }
        tracker.publish(2);
        tracker.end(2, 1);
        let again = region.queue(1, 8).unwrap();
        assert_eq!(again.recover(1).unwrap(), [5, 7, 0]);
        again.begin(2);
        assert_eq!(again.recover(1).unwrap(), [5, 7, 0, 2], "the counter goes on");
        assert_eq!(region.queue(0, 8).unwrap().recover(0).unwrap(), [0_u16; 0], "queues are apart");
    }

    #[test]
    fn the_used_ring_decides_about_the_last_one() {
        // Killed between `publish` and the used ring: still in flight. After it: done.
        for (used, want) in [(0, vec![3, 4]), (1, vec![3])] {
            let (region, tracker) = tracker(8);
            tracker.begin(3);
            tracker.begin(4);
            tracker.publish(4);
            assert_eq!(region.queue(1, 8).unwrap().recover(used).unwrap(), want);
        }
    }

    /// A queue and its server, of which every store is the last one some time.
    struct Life {
        tracker: Tracker,
        /// Heads as they were made available, and the used ring with its index.
        available: Vec<u16>,
        used: Vec<u16>,
        used_index: u16,
    }

    impl Life {
        fn take(&mut self, head: u16) {
            self.available.push(head);
            self.tracker.begin(head);
        }

        /// As [`super::super::vring`] gives back.
        fn give_back(&mut self, head: u16) {
            self.tracker.publish(head);
            if kill::survived() {
                self.used.push(head);
            }
            if kill::survived() {
                self.used_index += 1;
            }
            self.tracker.end(head, self.used.len() as u16);
        }
    }

    /// Whatever store is the last one, and however the next server dies over what it takes up: every request is either in
    /// the used ring, or taken up again, or still to be taken; none of them twice.
    #[test]
    fn a_kill_between_any_two_stores_loses_and_doubles_nothing() {
        type Step = (bool, u16);
        let lives: [&[Step]; 3] = [
            &[(true, 3), (true, 1), (false, 1), (true, 0), (false, 3), (true, 1), (false, 0), (false, 1)],
            &[(true, 0), (false, 0), (true, 0), (false, 0), (true, 2), (true, 3), (false, 2), (false, 3)],
            &[(true, 0), (true, 1), (true, 2), (true, 3), (false, 3), (false, 1), (true, 3), (false, 0)],
        ];
        for steps in lives {
            for stores in 0..80 {
                let (region, tracker) = tracker(4);
                let mut life = Life { tracker, available: Vec::new(), used: Vec::new(), used_index: 0 };
                kill::comes_after(stores);
                for (takes, head) in steps {
                    if *takes { life.take(*head) } else { life.give_back(*head) }
                }
                kill::comes_after(usize::MAX);
                // What stands in the used ring behind its index is not there.
                let used = &life.used[..usize::from(life.used_index)];
                let again = region.queue(1, 4).unwrap().recover(life.used_index).unwrap();
                // Where the next server goes on taking.
                let next = used.len() + again.len();
                let mut accounted: Vec<u16> = used.iter().chain(&again).copied().collect();
                assert!(next <= life.available.len(), "{steps:?}, {stores} stores: {used:?} {again:?}");
                let mut expected = life.available[..next].to_vec();
                accounted.sort_unstable();
                expected.sort_unstable();
                assert_eq!(accounted, expected, "{steps:?}, {stores} stores: used {used:?}, again {again:?}");
                // And once more, before the next server has done anything.
                assert_eq!(region.queue(1, 4).unwrap().recover(life.used_index).unwrap(), again);
            }
        }
    }

    #[test]
    fn what_another_server_left_as_one_batch_is_understood() {
        let (region, tracker) = tracker(8);
        for head in 0..5 {
            tracker.begin(head);
        }
        for head in [1, 3, 4] {
            tracker.publish(head);
        }
        assert_eq!(region.queue(1, 8).unwrap().recover(3).unwrap(), [0, 2]);
    }

    #[test]
    fn nonsense_is_told_apart_and_never_followed() {
        let (region, tracker) = tracker(8);
        assert_eq!(tracker.recover(500).unwrap(), [0_u16; 0], "nothing was in flight");
        assert_eq!(tracker.recover(0).unwrap(), [0_u16; 0]);
        tracker.begin(1);
        assert_eq!(tracker.recover(9), Err(Inconsistent), "more in the last batch than there are entries");
        tracker.set16(AT_LAST_BATCH_HEAD, 8);
        assert_eq!(tracker.recover(1), Err(Inconsistent));
        tracker.set16(AT_VERSION, 2);
        assert!(region.queue(1, 8).is_none());
        assert!(region.queue(2, 8).is_none());
        assert!(region.queue(0, 16).is_none());
    }

    #[test]
    fn a_region_is_checked_before_it_is_mapped() {
        let layout = Layout::new(1, 128).unwrap();
        let file = || tempfile::tempfile().unwrap();
        assert!(Region::map(layout, file(), 0, layout.len()).is_err());
        let long = file();
        long.set_len(layout.len()).unwrap();
        assert!(Region::map(layout, long.try_clone().unwrap(), 0, layout.queues_len() - 1).is_err());
        let short = Region::map(layout, long.try_clone().unwrap(), 0, layout.queues_len()).unwrap();
        assert!(short.ledger().is_none() && short.queue(0, 128).is_some(), "made by another server");
        assert!(Region::map(layout, long.try_clone().unwrap(), u64::MAX, layout.len()).is_err());
        assert!(Region::map(layout, long, 0, layout.len()).is_ok());
        assert!(Layout::new(0, 1).is_none() && Layout::new(1, 0).is_none());
        assert!(Layout::new(MAX_QUEUES + 1, 1).is_none() && Layout::new(1, MAX_QUEUE_SIZE + 1).is_none());
    }
}
