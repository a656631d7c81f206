//! Places that hold bytes. Floor 2: a store knows nothing of what its bytes mean.
//!
//! The contract is [`Store`]. [`mod@file`] holds a local file or block device, [`memory`] holds bytes in memory, [`null`] holds none,
//! [`mod@nbd`] is an export of somebody else's server; [`fault`], [`trace`], [`throttle`] and [`debug`] are decorators around any of them,
//! [`joined`] is several of them as one, [`patched`] one with some bytes changed.
#![forbid(unsafe_code)]

mod abandoned;
pub mod ailing;
pub mod cipher;
pub mod debug;
pub mod error;
pub mod fault;
pub mod file;
pub mod joined;
pub mod memory;
pub mod nbd;
pub mod null;
pub mod part;
pub mod patched;
pub mod throttle;
pub mod trace;

pub use error::{Error, ErrorKind, Operation, Result};

use futures_util::future::LocalBoxFuture;
use layout::{HostOffset, HostRange};
use ring::Iov;
use std::os::fd::OwnedFd;
use std::sync::Arc;

/// What an operation of a [`Store`] returns.
pub type IoFuture<'a, T> = LocalBoxFuture<'a, Result<T>>;

/// What a run of bytes is backed by.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Backing {
    /// Bytes are stored (they may be zeros).
    Data,
    /// Nothing is stored: it reads as zeros.
    Hole,
}

/// The first run of a range, all backed alike.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HostExtent {
    /// Length in bytes, at least 1, at most what was asked for.
    pub len: u64,
    /// What backs it.
    pub backing: Backing,
}

/// How [`Store::zero`] may go about it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ZeroMode {
    /// The space may be given back to the file system (a discard); otherwise it stays allocated where that is possible.
    pub unmap: bool,
}

/// What became of [`Store::share`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Shared {
    /// Done.
    Done,
    /// Not here: places or lengths do not fit. Nothing has changed.
    NotThis,
    /// Never between these two: another file system, or one that cannot. Nothing has changed.
    Never,
}

/// What a store can do and wants.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Offsets and lengths that are a multiple of this (a power of two, bytes) are served without read-modify-write.
    pub offset_align: u32,
    /// Memory aligned to this (a power of two, bytes) is used in place; other memory is copied.
    pub memory_align: u32,
    /// Writes, zeroing and growing are refused.
    pub read_only: bool,
    /// What lies past the old end reads as zeros after growing, at no cost: true of files, false of block devices.
    pub sparse: bool,
    /// The size cannot change (a block device).
    pub fixed_size: bool,
}

/// A place that holds bytes: a file, a block device, memory, a remote object.
///
/// * **Any offset, any length, any memory** is accepted; alignment is the store's own affair (see [`Limits`] for what is fast).
/// * **Reads** fill the buffer whole or fail; what lies past the end reads as zeros. Short reads of the system are continued.
/// * **Writes** write whole or fail; past the end they grow the store (a gap reads as zeros). After a failed write the range
///   holds old or new bytes, sector by sector.
/// * **Order**: none between operations in flight. An operation that has completed is seen by every later one.
/// * **[`Store::flush`]** makes durable what had *completed* when it was called, length included. Concurrent flushes are
///   allowed. After a failed flush the store is *poisoned*: writes and flushes fail with [`ErrorKind::Poisoned`] and the
///   first cause; reads go on. A failed flush is never retried as if its data were still dirty.
/// * **Cancellation**: dropping a future gives up the answer; the operation may still take effect, whole or in part, but it
///   is over before any later operation touches its range.
pub trait Store: 'static {
    /// What messages call it: the path as the user wrote it.
    fn name(&self) -> &str;

    /// What kind of place it is, in QEMU's words.
    fn protocol(&self) -> &'static str {
        "file"
    }

    /// Length in bytes, now.
    fn size(&self) -> u64;

    /// What it can do and wants; constant.
    fn limits(&self) -> Limits;

    /// Fills `into` from `at` on.
    fn read(&self, at: HostOffset, into: Iov) -> IoFuture<'_, ()>;

    /// Writes `from` at `at`. With `fua` these bytes (and the length) are durable when it returns.
    fn write(&self, at: HostOffset, from: Iov, fua: bool) -> IoFuture<'_, ()>;

    /// Makes every completed write, zeroing and change of size durable.
    fn flush(&self) -> IoFuture<'_, ()>;

    /// Makes `range` read as zeros, by the cheapest means there is; past the end it grows the store as a write would.
    fn zero(&self, range: HostRange, mode: ZeroMode) -> IoFuture<'_, ()>;

    /// Sets the length; what is cut off is gone, what is added reads as zeros.
    fn set_size(&self, size: u64) -> IoFuture<'_, ()>;

    /// Backs `range` with space if that helps later writes; only a hint: an error is no failure, except
    /// [`ErrorKind::NoSpace`]. Does change the length when the range ends past the end.
    fn allocate(&self, range: HostRange) -> IoFuture<'_, ()>;

    /// The first run of `range` (not empty), all backed alike. Past the end is a hole. A store that cannot tell says data.
    fn extent(&self, range: HostRange) -> IoFuture<'_, HostExtent>;

    /// The file (as messages call it) that holds the byte at `at`, and where that is in it. A store that is one file is that file.
    fn locate(&self, at: HostOffset) -> (&str, HostOffset) {
        (self.name(), at)
    }

    /// The files (as messages call them) that it is made of, and their lengths, for people to look at.
    fn files(&self) -> Vec<(&str, u64)> {
        vec![(self.name(), self.size())]
    }

    /// The file whose extents another one may share, if this is a plain file.
    fn sharable(&self) -> Option<Arc<OwnedFd>> {
        None
    }

    /// Makes the bytes from `to` on hold what the file `source` ([`Store::sharable`]) holds in `from`, by sharing its extents: nothing
    /// is copied. Counts as a write. A store that cannot says so.
    fn share(&self, source: Arc<OwnedFd>, from: HostRange, to: HostOffset) -> IoFuture<'_, Shared> {
        let _ = (source, from, to);
        Box::pin(async { Ok(Shared::Never) })
    }

    /// Gives up locks and descriptors once all operations have ended; a no-op the second time. Does not flush.
    fn close(&self) -> IoFuture<'_, ()>;
}
