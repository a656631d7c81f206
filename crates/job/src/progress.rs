//! How far a job is: bytes that must be copied, and how many of them are done.
//!
//! **Invariants.** Neither number ever runs backwards (but `len` gives back the cluster it keeps ahead of an unfinished count,
//! if nothing comes), `offset` never passes `len`, and a job that ends well ends with the two equal. What guests write before the job gets there counts as done: the job no longer has to copy it.
//!
//! A scan runs beside the copying and ahead of it. Each missing byte is counted once, by whoever of the two comes by first.
//! The disk is divided into segments, few enough to keep a counter each; what the job has passed is done, whoever did it.

use layout::{GuestOffset, GuestRange};
use std::cell::{Cell, RefCell};

/// No more segments than this, whatever the disk's size.
const SEGMENTS: u64 = 2048;

/// Segments smaller than this would tell nothing more: guests' writes show up when a segment is passed.
const SMALLEST_SEGMENT: u64 = 16 << 20;

#[derive(Clone, Copy, Default)]
struct Segment {
    /// Bytes that were missing.
    missing: u64,
    /// Bytes the copying has dealt with.
    copied: u64,
    /// The copying has passed it: whatever was missing is there.
    passed: bool,
}

impl Segment {
    fn offset(self) -> u64 {
        if self.passed { self.missing } else { self.copied.min(self.missing) }
    }
}

/// See the module.
pub(crate) struct Progress {
    size: u64,
    segment: u64,
    unit: u64,
    segments: RefCell<Vec<Segment>>,
    /// Segments before this one are passed.
    first_open: Cell<usize>,
    len: Cell<u64>,
    offset: Cell<u64>,
    /// Nothing is left to be counted.
    counted: Cell<bool>,
    /// The copying has looked at everything before this.
    copying_at: Cell<GuestOffset>,
    /// And so has the scan, or it was overtaken.
    scanning_at: Cell<GuestOffset>,
}

impl Progress {
    /// For a disk of `size` bytes with clusters of `cluster` bytes (a power of two).
    pub(crate) fn new(size: u64, cluster: u64) -> Self {
        let fitting = size.div_ceil(SEGMENTS).checked_next_power_of_two().unwrap_or(1 << 63);
        let segment = fitting.max(SMALLEST_SEGMENT).max(cluster);
        Self {
            size,
            segment,
            unit: cluster,
            segments: RefCell::new(vec![Segment::default(); size.div_ceil(segment) as usize]),
            first_open: Cell::new(0),
            len: Cell::new(0),
            offset: Cell::new(0),
            counted: Cell::new(false),
            copying_at: Cell::new(GuestOffset::ZERO),
            scanning_at: Cell::new(GuestOffset::ZERO),
        }
    }

    /// Bytes to copy in all, as far as known. While the count is unfinished it stays a cluster ahead of
    /// [`Progress::offset`], so that nobody takes a job for finished that is not.
    pub(crate) fn len(&self) -> u64 {
        let ahead = if self.counted.get() { 0 } else { self.offset() + self.unit };
        self.len.get().max(ahead)
    }

    /// As [`Progress::len`], at a job's end: no more than is known.
    pub(crate) fn final_len(&self) -> u64 {
        self.len.get()
    }

    /// Bytes done.
    pub(crate) fn offset(&self) -> u64 {
        self.offset.get()
    }

    /// Where the scan should go on: not where the copying has overtaken it.
    pub(crate) fn scan_from(&self) -> GuestOffset {
        self.scanning_at.get().max(self.copying_at.get())
    }

    /// The scan has found `range`, the first from where it stood; it is copied if `counts`.
    pub(crate) fn scanned(&self, range: GuestRange, counts: bool) {
        if counts {
            self.count(GuestRange::between(range.start().max(self.copying_at.get()), range.end()));
        }
        self.scanning_at.set(range.end().max(self.scanning_at.get()));
    }

    /// The scan is through.
    pub(crate) fn scan_ended(&self) {
        self.counted.set(true);
    }

    /// The copying has found `range`, the first from where it stood; it is copied if `counts`.
    pub(crate) fn found(&self, range: GuestRange, counts: bool) {
        if counts {
            self.count(GuestRange::between(range.start().max(self.scanning_at.get()), range.end()));
        }
        self.copying_at.set(range.end());
    }

    /// The copying has dealt with `range`.
    pub(crate) fn copied(&self, range: GuestRange) {
        self.each(range, |segment, bytes| segment.copied += bytes);
    }

    /// Everything before `at` is dealt with.
    pub(crate) fn passed(&self, at: GuestOffset) {
        let mut segments = self.segments.borrow_mut();
        let whole = if at.get() >= self.size { segments.len() } else { (at.get() / self.segment) as usize };
        let end = whole.min(segments.len());
        for segment in segments.get_mut(self.first_open.get()..end).unwrap_or_default() {
            self.offset.set(self.offset.get() - segment.offset());
            segment.passed = true;
            self.offset.set(self.offset.get() + segment.offset());
        }
        self.first_open.set(self.first_open.get().max(end));
    }

    /// The job has dealt with the whole disk.
    pub(crate) fn finished(&self) {
        self.counted.set(true);
        self.offset.set(self.len.get());
    }

    fn count(&self, range: GuestRange) {
        self.each(range, |segment, bytes| segment.missing += bytes);
    }

    fn each(&self, range: GuestRange, change: impl Fn(&mut Segment, u64)) {
        let mut segments = self.segments.borrow_mut();
        let mut rest = range;
        while !rest.is_empty() {
            let index = rest.start().get() / self.segment;
            let bytes = rest.len().min((index + 1).saturating_mul(self.segment) - rest.start().get());
            rest = rest.skip(bytes);
            let Some(segment) = segments.get_mut(index as usize) else { return };
            if segment.passed {
                continue;
            }
            let before = *segment;
            change(segment, bytes);
            self.len.set(self.len.get() + segment.missing - before.missing);
            self.offset.set(self.offset.get() + segment.offset() - before.offset());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;

    fn range(start: u64, len: u64) -> GuestRange {
        GuestRange::new(GuestOffset(start * MIB), len * MIB)
    }

    #[test]
    fn what_a_guest_wrote_first_counts_when_it_is_passed() {
        let progress = Progress::new(64 * MIB, 65536);
        progress.scanned(range(0, 64), true);
        progress.scan_ended();
        assert_eq!((progress.len(), progress.offset()), (64 * MIB, 0));
        // The first segment was half written by a guest by the time the copying came.
        progress.found(range(8, 8), true);
        progress.copied(range(8, 4));
        assert_eq!((progress.len(), progress.offset()), (64 * MIB, 4 * MIB));
        progress.passed(GuestOffset(16 * MIB));
        assert_eq!((progress.len(), progress.offset()), (64 * MIB, 16 * MIB));
        progress.finished();
        assert_eq!((progress.final_len(), progress.offset()), (64 * MIB, 64 * MIB));
    }

    #[test]
    fn each_byte_is_counted_by_who_comes_first() {
        let progress = Progress::new(64 * MIB, 65536);
        progress.scanned(range(0, 4), true);
        progress.found(range(0, 10), true);
        assert_eq!(progress.scan_from(), GuestOffset(10 * MIB));
        progress.copied(range(0, 10));
        assert!(progress.len() > progress.offset(), "not finished: the count is not");
        // The scan had looked from 4 on when the copying went by.
        progress.scanned(range(4, 16), true);
        progress.scanned(range(20, 10), false);
        progress.scanned(range(40, 4), true);
        progress.found(range(10, 10), true);
        progress.scan_ended();
        assert_eq!((progress.len(), progress.offset()), (24 * MIB, 10 * MIB));
    }

    #[test]
    fn a_second_pass_changes_nothing_that_is_passed() {
        let progress = Progress::new(32 * MIB, 65536);
        progress.found(range(0, 16), true);
        progress.copied(range(0, 16));
        progress.passed(GuestOffset(16 * MIB));
        progress.found(range(0, 2), true);
        progress.copied(range(0, 2));
        assert_eq!((progress.final_len(), progress.offset()), (16 * MIB, 16 * MIB));
    }

    #[test]
    fn an_empty_job_has_nothing_to_copy() {
        let progress = Progress::new(0, 65536);
        progress.passed(GuestOffset(0));
        progress.finished();
        assert_eq!((progress.final_len(), progress.offset()), (0, 0));
        let huge = Progress::new(u64::MAX, 65536);
        assert_eq!((huge.len(), huge.offset()), (65536, 0));
        huge.finished();
        assert_eq!((huge.len(), huge.offset()), (0, 0));
    }
}
