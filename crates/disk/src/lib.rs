//! What a guest sees. Floor 4: a [`Disk`] is a chain of images; it moves the guest's bytes, copies on read, populates, and
//! makes flushes durable. It knows no protocol and no format.
//!
//! # Invariants
//! * Every guest write holds its range in the lock table: shared when it goes in place, exclusively (whole clusters) when it
//!   allocates, zeroes or discards. Reads hold nothing. Populate holds nothing either: it looks once more when it links and
//!   leaves alone whatever is allocated by then or held exclusively by a guest.
//! * A guest write never waits for a stream or for a fetch it does not need.
//! * A layer shows nothing past its own end, even where a layer below is longer: what lies below a short middle is zeros.
//! * What populate copies is durable before its mapping is ([`image::Image::commit`] sees to it).
//! * The backing reference is dropped or rewritten only after every byte it stood for is durable.
#![forbid(unsafe_code)]

pub mod chain;

mod stream;

pub use chain::{ChainOptions, FileOpener, Layer, Opener};
pub use image::{Error, ErrorKind, Result};
pub use stream::{Copied, Missing, StreamBase};

use layout::{GuestOffset, GuestRange};
use ring::Iov;
use std::rc::Rc;

/// How a disk behaves; what can change while it runs has a method too.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DiskOptions {
    /// What the guest reads from below is kept in the top image.
    pub copy_on_read: bool,
    /// Every write is durable when it returns (`cache=writethrough`, `directsync`).
    pub write_through: bool,
    /// Discards are carried out (`discard=unmap`, the default) or only accepted.
    pub discard: bool,
}

impl Default for DiskOptions {
    fn default() -> Self {
        Self { copy_on_read: false, write_through: false, discard: true }
    }
}

/// One run of the guest's bytes, as `map` and NBD's block status show it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Status {
    /// Length in bytes, at least 1.
    pub len: u64,
    /// Reads as zeros for certain.
    pub zero: bool,
    /// Some layer has it allocated (for raw: not a hole in the file).
    pub allocated: bool,
    /// Index of the layer that decides, 0 the top; the chain's length if none.
    pub depth: usize,
    /// Where the bytes are in that layer's store, if they are data.
    pub host: Option<layout::HostOffset>,
}

/// Counters since the disk was opened. Bytes and operations of guests, and of copying.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[expect(missing_docs, reason = "the names are the field's own (query-blockstats)")]
pub struct Stats {
    pub rd_bytes: u64,
    pub wr_bytes: u64,
    pub unmap_bytes: u64,
    pub rd_operations: u64,
    pub wr_operations: u64,
    pub flush_operations: u64,
    pub unmap_operations: u64,
    pub failed_rd_operations: u64,
    pub failed_wr_operations: u64,
    pub failed_flush_operations: u64,
    pub failed_unmap_operations: u64,
    pub rd_total_time_ns: u64,
    pub wr_total_time_ns: u64,
    pub flush_total_time_ns: u64,
    pub unmap_total_time_ns: u64,
    /// Bytes fetched from below the top (for guests and for populate).
    pub fetched_bytes: u64,
    /// Bytes that copy-on-read has put into the top image.
    pub copy_on_read_bytes: u64,
    /// Highest offset written to in the top image's store.
    pub wr_highest_offset: u64,
}

/// A virtual machine's disk. Lives on one shard; every method is called there.
pub struct Disk {
    _todo: Rc<()>,
}

impl Disk {
    /// Puts a disk over an opened chain (top first).
    pub fn new(name: &str, chain: Vec<Layer>, options: DiskOptions) -> Rc<Self> {
        let _ = (name, chain, options);
        todo!()
    }

    /// Its name (`device` in QMP).
    pub fn name(&self) -> &str {
        todo!()
    }

    /// Size in bytes.
    pub fn size(&self) -> u64 {
        todo!()
    }

    /// Whether guests may not write.
    pub fn read_only(&self) -> bool {
        todo!()
    }

    /// How it behaves now.
    pub fn options(&self) -> DiskOptions {
        todo!()
    }

    /// Turns copy-on-read on or off.
    pub fn set_copy_on_read(&self, on: bool) {
        let _ = on;
        todo!()
    }

    /// Alignment (bytes, a power of two) below which requests cost a read-modify-write.
    pub fn request_alignment(&self) -> u32 {
        todo!()
    }

    /// The layers now, top first.
    pub fn chain(&self) -> Rc<[Layer]> {
        todo!()
    }

    /// Counters.
    pub fn stats(&self) -> Stats {
        todo!()
    }

    /// Reads `into.len()` bytes at `at`. Any alignment. Past the end: [`ErrorKind::InvalidArgument`].
    pub async fn read(&self, at: GuestOffset, into: Iov) -> Result<()> {
        let _ = (at, into);
        todo!()
    }

    /// Writes `from` at `at`; with `fua` it is durable when it returns.
    pub async fn write(&self, at: GuestOffset, from: Iov, fua: bool) -> Result<()> {
        let _ = (at, from, fua);
        todo!()
    }

    /// Makes the range read as zeros; `unmap` allows giving space back.
    pub async fn write_zeroes(&self, range: GuestRange, unmap: bool, fua: bool) -> Result<()> {
        let _ = (range, unmap, fua);
        todo!()
    }

    /// Gives the space of whole clusters back; they read as zeros afterwards (what lies below never shows through again);
    /// parts of clusters are left as they are. A hint.
    pub async fn discard(&self, range: GuestRange) -> Result<()> {
        let _ = range;
        todo!()
    }

    /// Makes every completed write durable. Concurrent flushes share barriers. Allowed on a read-only disk.
    pub async fn flush(&self) -> Result<()> {
        todo!()
    }

    /// The first run of `range` (not empty), all alike.
    pub async fn status(&self, range: GuestRange) -> Result<Status> {
        let _ = range;
        todo!()
    }

    /// Fetches what of `range` is not in the top image yet and keeps it there (NBD's cache request).
    pub async fn prefetch(&self, range: GuestRange) -> Result<()> {
        let _ = range;
        todo!()
    }

    /// Grows the disk; what is new reads as zeros even over a longer backing file. [`ErrorKind::Busy`] while a job runs.
    pub async fn resize(&self, size: u64) -> Result<()> {
        let _ = size;
        todo!()
    }

    /// Waits for guest requests in flight, stops background work, settles and closes every layer. Further requests fail.
    pub async fn close(&self) -> Result<()> {
        todo!()
    }
}

/// What a job needs of a disk (implemented by [`Disk`]; see [`stream`]).
impl Disk {
    /// The first run at or after `from` that a stream above `base` still has to bring in (or mask with zeros); `None` when
    /// nothing is left up to the disk's end. Holes below are skipped, except where `base` would show through.
    pub async fn next_missing(&self, from: GuestOffset, base: &StreamBase) -> Result<Option<Missing>> {
        let _ = (from, base);
        todo!()
    }

    /// Brings `range` in from above `base`: fetch, detect zeros, write where still unallocated, link. Single-flight with
    /// copy-on-read. Not durable before the next flush.
    pub async fn populate(&self, range: GuestRange, base: &StreamBase) -> Result<Copied> {
        let _ = (range, base);
        todo!()
    }

    /// Publishes the end of a stream: everything durable, then the top's header refers to `base` (recorded as
    /// `backing_name` if given, else as it was known in the chain) or to nothing, durably; then the layers between are let
    /// go. Refuses ([`ErrorKind::Busy`]) if something is still missing above `base`.
    pub async fn finish_stream(&self, base: &StreamBase, backing_name: Option<&str>) -> Result<()> {
        let _ = (base, backing_name);
        todo!()
    }

    /// Finds a layer below the top by the name of its file (as recorded or as opened) or by its node name.
    pub fn find_base(&self, name: &str) -> Option<StreamBase> {
        let _ = name;
        todo!()
    }

    /// Takes the disk for a job (one at a time); given back when the token is dropped. [`ErrorKind::Busy`] otherwise.
    pub fn claim(&self, job: &str) -> Result<Claim> {
        let _ = job;
        todo!()
    }
}

/// A job's hold on a disk.
pub struct Claim {
    _todo: Rc<()>,
}
