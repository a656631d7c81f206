//! [`Iov`]: the one buffer type of the whole house.
//!
//! An `Iov` is an ordered list of memory segments, counted and cheap to clone and to slice, that an operation reads from
//! or writes to. It is either memory of our own (aligned, from the thread's pool) or memory of somebody else's (a
//! guest's) with an owner that keeps it mapped.
//!
//! **Invariant.** Nobody ever holds a `&[u8]` or `&mut [u8]` into an `Iov`: the kernel, a guest or another clone may change
//! the bytes at any time, so they are only copied in and out through raw pointers. Whoever decides something from the
//! bytes copies them first. Fresh memory holds unspecified (but initialised) bytes.

use crate::memory::{self, BlockRef};
use smallvec::SmallVec;
use std::any::Any;
use std::fmt;
use std::ops::Range;
use std::ptr::{self, NonNull};
use std::rc::Rc;

/// What keeps a segment's memory alive.
#[derive(Clone)]
enum Owner {
    Pool(BlockRef),
    Foreign(Rc<dyn Any>),
}

impl Owner {
    fn same(&self, other: &Self) -> bool {
        match (self, other) {
            (Self::Pool(a), Self::Pool(b)) => a.ptr_eq(b),
            (Self::Foreign(a), Self::Foreign(b)) => Rc::ptr_eq(a, b),
            _ => false,
        }
    }
}

/// `len` bytes (never 0) at `start`, mapped, readable and writable while `owner` lives.
#[derive(Clone)]
struct Segment {
    start: NonNull<u8>,
    len: usize,
    owner: Owner,
}

impl Segment {
    /// The `len` bytes from `at`, which the caller has checked to lie inside.
    fn part(&self, at: usize, len: usize) -> Self {
        debug_assert!(at + len <= self.len);
        // SAFETY: `at` is at most the segment's length, so the sum stays within (or one past) its memory.
        let start = unsafe { self.start.add(at) };
        Self { start, len, owner: self.owner.clone() }
    }
}

/// Memory that takes part in I/O. Clones and slices share the bytes. `!Send`: it belongs to its shard.
///
/// The common case, one segment, is cloned and sliced without touching the allocator.
pub struct Iov {
    segments: SmallVec<[Segment; 1]>,
    /// The sum of the segments' lengths.
    len: usize,
}

impl Clone for Iov {
    fn clone(&self) -> Self {
        if let [one] = self.segments.as_slice() {
            return Self { segments: SmallVec::from_buf([one.clone()]), len: self.len };
        }
        Self { segments: self.segments.clone(), len: self.len }
    }
}

impl Default for Iov {
    fn default() -> Self {
        Self::empty()
    }
}

impl fmt::Debug for Iov {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Iov").field("len", &self.len).field("segments", &self.segments.len()).finish()
    }
}

impl Iov {
    /// `len` bytes of our own from this thread's pool, one segment, aligned to 4096, contents unspecified.
    pub fn alloc(len: usize) -> Self {
        Self::own(len).0
    }

    /// `len` zero bytes of our own, one segment, aligned to 4096.
    pub fn zeroed(len: usize) -> Self {
        let (iov, zero) = Self::own(len);
        if !zero {
            iov.fill(0);
        }
        iov
    }

    /// A copy of `bytes` in memory of our own.
    pub fn from_slice(bytes: &[u8]) -> Self {
        let iov = Self::alloc(bytes.len());
        iov.write(0, bytes);
        iov
    }

    /// An empty list.
    pub fn empty() -> Self {
        Self { segments: SmallVec::new(), len: 0 }
    }

    /// Memory that somebody else owns (a guest's), kept alive by `owner` for as long as any clone or slice lives.
    ///
    /// # Safety
    /// Every segment must stay mapped, readable and writable, while `owner` is alive. Other parties may read and write
    /// the bytes at any time.
    pub unsafe fn from_raw(segments: impl IntoIterator<Item = (*mut u8, usize)>, owner: Rc<dyn Any>) -> Self {
        let mut list = SmallVec::new();
        let mut total = 0_usize;
        for (start, len) in segments {
            if let Some(start) = NonNull::new(start)
                && len > 0
            {
                list.push(Segment { start, len, owner: Owner::Foreign(Rc::clone(&owner)) });
                total = total.checked_add(len).expect("segments that fit the address space");
            }
        }
        Self { segments: list, len: total }
    }

    fn own(len: usize) -> (Self, bool) {
        if len == 0 {
            return (Self::empty(), true);
        }
        let (block, zero) = memory::take(len);
        let segment = Segment { start: block.start(), len, owner: Owner::Pool(block) };
        (Self { segments: SmallVec::from_buf([segment]), len }, zero)
    }

    /// Total length in bytes.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether it holds no byte.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Number of segments.
    pub fn segments(&self) -> usize {
        self.segments.len()
    }

    /// The bytes of `range` (within `0..len`; panics outside, as slices do), sharing memory.
    pub fn slice(&self, range: Range<usize>) -> Self {
        assert!(
            range.start <= range.end && range.end <= self.len,
            "range {}..{} of {} bytes",
            range.start,
            range.end,
            self.len
        );
        let len = range.end - range.start;
        if len == 0 {
            return Self::empty();
        }
        if let [one] = self.segments.as_slice() {
            return Self { segments: SmallVec::from_buf([one.part(range.start, len)]), len };
        }
        let mut segments = SmallVec::new();
        self.walk(range.start, len, |segment, at, part| {
            segments.push(segment.part(at, part));
            true
        });
        Self { segments, len }
    }

    /// This followed by `tail`, sharing memory with both. Parts that lie side by side become one segment again.
    pub fn join(&self, tail: &Iov) -> Self {
        let mut whole = self.clone();
        whole.append(tail);
        whole
    }

    /// Makes `tail` the end of this list, sharing its memory: [`Iov::join`] in place, for lists of many parts.
    pub fn append(&mut self, tail: &Iov) {
        for segment in &tail.segments {
            match self.segments.last_mut() {
                Some(last)
                    if last.start.as_ptr() as usize + last.len == segment.start.as_ptr() as usize
                        && last.owner.same(&segment.owner) =>
                {
                    last.len += segment.len;
                }
                _ => self.segments.push(segment.clone()),
            }
        }
        self.len = self.len.checked_add(tail.len).expect("segments that fit the address space");
    }

    /// Whether every segment's address and length is a multiple of `unit`.
    pub fn is_aligned(&self, unit: usize) -> bool {
        self.segments
            .iter()
            .all(|segment| (segment.start.as_ptr() as usize).is_multiple_of(unit) && segment.len.is_multiple_of(unit))
    }

    /// Copies `bytes` in at `at`. Panics past the end.
    pub fn write(&self, at: usize, bytes: &[u8]) {
        let mut from = bytes;
        self.walk(at, bytes.len(), |segment, at, part| {
            let (now, rest) = from.split_at(part);
            // SAFETY: `walk` keeps `at + part` within the segment, whose memory its owner keeps mapped and writable;
            // `now` has `part` bytes and is a Rust slice, which no `Iov` shares memory with (the module's invariant).
            unsafe { ptr::copy_nonoverlapping(now.as_ptr(), segment.start.as_ptr().add(at), part) }
            from = rest;
            true
        });
    }

    /// Copies out from `at` into `bytes`. Panics past the end.
    pub fn read(&self, at: usize, bytes: &mut [u8]) {
        let mut done = 0;
        self.walk(at, bytes.len(), |segment, at, part| {
            let into = &mut bytes[done..done + part];
            // SAFETY: as in `write`, the other way round.
            unsafe { ptr::copy_nonoverlapping(segment.start.as_ptr().add(at), into.as_mut_ptr(), part) }
            done += part;
            true
        });
    }

    /// All bytes, copied out.
    pub fn to_vec(&self) -> Vec<u8> {
        let mut bytes = vec![0; self.len()];
        self.read(0, &mut bytes);
        bytes
    }

    /// Copies all of `from` (same length) into this. Where the two share memory the result is as if through a copy
    /// segment by segment.
    pub fn copy_from(&self, from: &Iov) {
        assert_eq!(self.len, from.len, "copy between lists of different lengths");
        let mut at = 0;
        for segment in &from.segments {
            let mut taken = 0;
            self.walk(at, segment.len, |into, at, part| {
                // SAFETY: `walk` keeps `at + part` within `into`, and the parts handed out sum up to `segment.len`;
                // both owners keep their memory mapped. `copy` allows for shared memory.
                unsafe { ptr::copy(segment.start.as_ptr().add(taken), into.start.as_ptr().add(at), part) }
                taken += part;
                true
            });
            at += segment.len;
        }
    }

    /// Sets every byte.
    pub fn fill(&self, byte: u8) {
        for segment in &self.segments {
            // SAFETY: the segment's owner keeps `len` bytes mapped and writable.
            unsafe { ptr::write_bytes(segment.start.as_ptr(), byte, segment.len) }
        }
    }

    /// Whether every byte is zero (fast; early out).
    pub fn is_zero(&self) -> bool {
        self.segments.iter().all(|segment| {
            // SAFETY: the segment's owner keeps `len` bytes mapped and readable.
            unsafe { is_zero(segment.start.as_ptr(), segment.len) }
        })
    }

    /// Whether both hold the same bytes (no copy; early out).
    pub fn holds(&self, other: &Iov) -> bool {
        if self.len != other.len {
            return false;
        }
        let (mut at, mut same) = (0, true);
        other.walk(0, other.len, |segment, _, len| {
            let mut done = 0;
            self.walk(at, len, |mine, skip, part| {
                // SAFETY: `walk` hands out parts that lie in their segments, whose owners keep them mapped and readable. The C library
                // reads behind the compiler's back, as in `is_zero`.
                same = unsafe {
                    let (a, b) = (mine.start.as_ptr().add(skip), segment.start.as_ptr().add(done));
                    libc::memcmp(a.cast(), b.cast(), part) == 0
                };
                done += part;
                same
            });
            at += len;
            same
        });
        same
    }

    /// Calls `visit` with each segment that `at..at + len` touches, the offset in it and the length there, until it
    /// answers `false`. Panics past the end.
    fn walk(&self, at: usize, len: usize, mut visit: impl FnMut(&Segment, usize, usize) -> bool) {
        assert!(at.checked_add(len).is_some_and(|end| end <= self.len), "{len} bytes at {at} of {} bytes", self.len);
        let (mut skip, mut left) = (at, len);
        for segment in &self.segments {
            if left == 0 {
                break;
            }
            if skip >= segment.len {
                skip -= segment.len;
                continue;
            }
            let part = left.min(segment.len - skip);
            if !visit(segment, skip, part) {
                break;
            }
            left -= part;
            skip = 0;
        }
    }

    /// The one segment, if there is but one.
    pub(crate) fn single(&self) -> Option<(*mut u8, usize)> {
        match self.segments.as_slice() {
            [one] => Some((one.start.as_ptr(), one.len)),
            _ => None,
        }
    }

    /// Writes at most `max` segments into `list` as the kernel wants them.
    pub(crate) fn describe(&self, list: &mut Vec<libc::iovec>, max: usize) {
        list.clear();
        list.extend(
            self.segments
                .iter()
                .take(max)
                .map(|segment| libc::iovec { iov_base: segment.start.as_ptr().cast(), iov_len: segment.len }),
        );
    }
}

/// What [`is_zero`] compares with: as much as the first level cache holds easily.
static ZEROS: [u8; 4096] = [0; 4096];

/// Whether the `len` bytes at `start` are zero.
///
/// # Safety
/// They must be mapped and readable.
unsafe fn is_zero(start: *const u8, len: usize) -> bool {
    let mut done = 0;
    while done < len {
        let part = ZEROS.len().min(len - done);
        // SAFETY: `done + part <= len`, which the caller vouches for; `ZEROS` has `part` bytes. The C library reads
        // the bytes behind the compiler's back, so a guest that changes them meanwhile yields some answer, no more.
        if unsafe { libc::memcmp(start.add(done).cast(), ZEROS.as_ptr().cast(), part) } != 0 {
            return false;
        }
        done += part;
    }
    true
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::cell::Cell;

    #[test]
    fn the_same_bytes_in_other_segments_are_the_same() {
        let bytes = counted(10_000);
        let pieces = |ends: &[usize]| {
            let mut all = Iov::empty();
            let mut start = 0;
            for end in ends.iter().copied().chain([bytes.len()]) {
                all.append(&Iov::from_slice(&bytes[start..end]));
                start = end;
            }
            all
        };
        let (one, other) = (pieces(&[1, 4096, 9999]), pieces(&[5000]));
        assert!(one.holds(&other) && other.holds(&one) && Iov::empty().holds(&Iov::empty()));
        assert!(!one.holds(&other.slice(0..9999)));
        for at in [0, 1, 4095, 4096, 5000, 9998, 9999] {
            let mut changed = bytes.clone();
            changed[at] ^= 1;
            assert!(!one.holds(&Iov::from_slice(&changed)), "{at}");
            assert!(!Iov::from_slice(&changed).holds(&other), "{at}");
        }
    }

    fn counted(len: usize) -> Vec<u8> {
        (0..len).map(|at| (at % 251) as u8).collect()
    }

    /// Foreign memory in segments of the given lengths, filled with `counted`.
    fn foreign(lens: &[usize], gone: Rc<Cell<bool>>) -> Iov {
        struct Owner {
            _memory: Vec<Box<[u8]>>,
            gone: Rc<Cell<bool>>,
        }
        impl Drop for Owner {
            fn drop(&mut self) {
                self.gone.set(true);
            }
        }
        let mut memory: Vec<Box<[u8]>> = lens.iter().map(|len| vec![0; *len].into_boxed_slice()).collect();
        let segments: Vec<_> = memory.iter_mut().map(|part| (part.as_mut_ptr(), part.len())).collect();
        let total = lens.iter().sum();
        // SAFETY: the boxes stay where they are until the owner is dropped.
        let iov = unsafe { Iov::from_raw(segments, Rc::new(Owner { _memory: memory, gone })) };
        iov.write(0, &counted(total));
        iov
    }

    #[test]
    fn own_memory_is_one_aligned_segment() {
        let iov = Iov::alloc(5000);
        assert_eq!((iov.len(), iov.segments()), (5000, 1));
        assert!(!iov.is_aligned(512), "its length is no multiple");
        assert!(iov.slice(0..4096).is_aligned(4096));
        assert!(!iov.slice(1..513).is_aligned(512));
        assert!(Iov::empty().is_aligned(4096));
        assert!(Iov::alloc(0).is_empty());
    }

    #[test]
    fn zeroed_is_zero_even_when_reused() {
        let iov = Iov::alloc(8192);
        iov.fill(0xff);
        drop(iov);
        let iov = Iov::zeroed(8192);
        assert!(iov.is_zero());
        assert_eq!(iov.to_vec(), vec![0; 8192]);
    }

    #[test]
    fn clones_and_slices_share_bytes() {
        let iov = Iov::from_slice(b"hello world");
        let world = iov.slice(6..11);
        iov.write(6, b"W");
        assert_eq!(world.to_vec(), b"World");
        world.clone().fill(b'-');
        assert_eq!(iov.to_vec(), b"hello -----");
    }

    #[test]
    fn segments_slice_copy_and_join_like_one() {
        let gone = Rc::new(Cell::new(false));
        let iov = foreign(&[3, 0, 700, 1, 4096, 200], Rc::clone(&gone));
        assert_eq!((iov.len(), iov.segments()), (5000, 5), "empty segments are left out");
        let bytes = counted(5000);
        assert_eq!(iov.to_vec(), bytes);
        for (start, end) in [(0, 5000), (0, 0), (5000, 5000), (2, 4), (3, 703), (702, 706), (704, 4800), (4999, 5000)] {
            let part = iov.slice(start..end);
            assert_eq!(part.to_vec(), bytes[start..end], "{start}..{end}");
            let joined = iov.slice(0..start).join(&part).join(&iov.slice(end..5000));
            assert_eq!(joined.to_vec(), bytes);
            assert_eq!(joined.segments(), 5, "cut and joined at {start} and {end}, it is what it was");
        }
        let other = foreign(&[4000, 1000], Rc::new(Cell::new(false)));
        other.fill(0);
        other.copy_from(&iov);
        assert_eq!(other.to_vec(), bytes);
        let part = iov.slice(10..11);
        drop(iov);
        assert!(!gone.get(), "a slice keeps the owner");
        drop(part);
        assert!(gone.get());
    }

    #[test]
    fn is_zero_finds_a_single_bit_anywhere() {
        for len in [1, 7, 64, 4095, 4096, 4097, 10_000] {
            let iov = Iov::zeroed(len);
            assert!(iov.is_zero());
            for at in [0, len / 2, len - 1] {
                iov.write(at, &[1]);
                assert!(!iov.is_zero(), "byte {at} of {len}");
                iov.write(at, &[0]);
            }
        }
        assert!(Iov::empty().is_zero());
    }

    #[test]
    #[should_panic(expected = "range 4..9 of 8 bytes")]
    fn slicing_past_the_end_panics() {
        let _ = Iov::alloc(8).slice(4..9);
    }

    #[test]
    #[should_panic(expected = "2 bytes at 18446744073709551615 of 8 bytes")]
    fn writing_past_the_end_panics() {
        Iov::alloc(8).write(usize::MAX, b"ab");
    }

    #[test]
    fn a_list_is_no_larger_than_a_cache_line() {
        assert!(size_of::<Iov>() <= 64, "{}", size_of::<Iov>());
    }
}
