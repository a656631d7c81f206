//! [`Iov`]: the one buffer type of the whole house.
//!
//! An `Iov` is an ordered list of memory segments, counted and cheap to clone and to slice, that an operation reads from
//! or writes to. It is either memory of our own (aligned, from the thread's pool) or memory of somebody else's (a
//! guest's) with an owner that keeps it mapped.
//!
//! **Invariant.** Nobody ever holds a `&[u8]` or `&mut [u8]` into an `Iov`: the kernel, a guest or another clone may change
//! the bytes at any time, so they are only copied in and out through raw pointers. Whoever decides something from the
//! bytes copies them first. Fresh memory holds unspecified (but initialised) bytes.

use std::ops::Range;
use std::rc::Rc;

/// Memory that takes part in I/O. Clones and slices share the bytes. `!Send`: it belongs to its shard.
#[derive(Clone)]
pub struct Iov {
    _todo: Rc<()>,
}

impl Iov {
    /// `len` bytes of our own from this thread's pool, one segment, aligned to 4096, contents unspecified.
    pub fn alloc(len: usize) -> Self {
        let _ = len;
        todo!()
    }

    /// `len` zero bytes of our own, one segment, aligned to 4096.
    pub fn zeroed(len: usize) -> Self {
        let _ = len;
        todo!()
    }

    /// A copy of `bytes` in memory of our own.
    pub fn from_slice(bytes: &[u8]) -> Self {
        let _ = bytes;
        todo!()
    }

    /// An empty list.
    pub fn empty() -> Self {
        todo!()
    }

    /// Memory that somebody else owns (a guest's), kept alive by `owner` for as long as any clone or slice lives.
    ///
    /// # Safety
    /// Every segment must stay mapped, readable and writable, while `owner` is alive. Other parties may read and write
    /// the bytes at any time.
    pub unsafe fn from_raw(segments: impl IntoIterator<Item = (*mut u8, usize)>, owner: Rc<dyn std::any::Any>) -> Self {
        let _ = (segments.into_iter().count(), owner);
        todo!()
    }

    /// Total length in bytes.
    pub fn len(&self) -> usize {
        todo!()
    }

    /// Whether it holds no byte.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Number of segments.
    pub fn segments(&self) -> usize {
        todo!()
    }

    /// The bytes of `range` (within `0..len`; panics outside, as slices do), sharing memory.
    pub fn slice(&self, range: Range<usize>) -> Self {
        let _ = range;
        todo!()
    }

    /// This followed by `tail`, sharing memory with both.
    pub fn join(&self, tail: &Iov) -> Self {
        let _ = tail;
        todo!()
    }

    /// Whether every segment's address and length is a multiple of `unit`.
    pub fn is_aligned(&self, unit: usize) -> bool {
        let _ = unit;
        todo!()
    }

    /// Copies `bytes` in at `at`. Panics past the end.
    pub fn write(&self, at: usize, bytes: &[u8]) {
        let _ = (at, bytes);
        todo!()
    }

    /// Copies out from `at` into `bytes`. Panics past the end.
    pub fn read(&self, at: usize, bytes: &mut [u8]) {
        let _ = (at, bytes);
        todo!()
    }

    /// All bytes, copied out.
    pub fn to_vec(&self) -> Vec<u8> {
        let mut bytes = vec![0; self.len()];
        self.read(0, &mut bytes);
        bytes
    }

    /// Copies all of `from` (same length) into this; the two must not share memory.
    pub fn copy_from(&self, from: &Iov) {
        let _ = from;
        todo!()
    }

    /// Sets every byte.
    pub fn fill(&self, byte: u8) {
        let _ = byte;
        todo!()
    }

    /// Whether every byte is zero (fast; early out).
    pub fn is_zero(&self) -> bool {
        todo!()
    }
}
