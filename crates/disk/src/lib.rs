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

mod background;
mod carry;
mod dirty;
mod disk;
mod exchange;
mod fetch;
mod flush;
mod gate;
mod hold;
mod locks;
mod missing;
mod names;
mod pieces;
mod populate;
mod read;
mod resize;
mod root;
mod shield;
mod stacked;
mod stats;
mod status;
mod stream;
mod threshold;
mod view;
mod walk;
mod write;
mod zero;

pub use chain::{Below, ChainOptions, FileOpener, Layer, Opened, Opener};
pub use dirty::Dirty;
pub use exchange::{LetGo, Sharers};
pub use image::{Error, ErrorKind, Result};
pub use root::Drained;
pub use stacked::DiskStore;
pub use stream::{Claim, Copied, Missing, StreamBase};
pub use threshold::{Threshold, Thresholds, Told};

use crate::disk::{Inner, Kept};
use crate::root::Root;
use crate::shield::shield;
use crate::stats::Request;
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
    /// Some layer decides it (`present` in `qemu-img map`): as data, as explicit zeros, or, in a raw file, as a hole.
    /// Bytes are stored where this is true and `zero` is not.
    pub allocated: bool,
    /// Index of the layer that decides, 0 the top; of the last one that reaches so far if none does.
    pub depth: usize,
    /// The bytes are stored packed.
    pub compressed: bool,
    /// The place in that layer's store (of a raw file's holes too).
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
    /// Bytes that a stream took over from below by sharing them, uncopied (reflink).
    pub shared_bytes: u64,
    /// Bytes that copy-on-read has put into the top image.
    pub copy_on_read_bytes: u64,
    /// Highest offset written to in the top image's store.
    pub wr_highest_offset: u64,
}

/// A virtual machine's disk. Lives on one shard; every method is called there, and every future of it is dropped there.
///
/// **Cancellation.** Dropping the future of a request that changes something (write, zero, discard, populate, resize, finish)
/// gives up the answer: the request goes on to its end. Dropping a read leaves its memory to operations in flight, as
/// [`ring`] says.
///
/// **One owner.** A disk cannot leave its thread, so nobody can have caches of his own over the same image:
///
/// ```compile_fail,E0277
/// fn leaves_its_thread<T: Send>() {}
/// leaves_its_thread::<headwater_disk::Disk>();
/// ```
pub struct Disk {
    root: Rc<Root>,
}

impl Disk {
    /// Puts a disk over an opened chain (top first, not empty).
    pub fn new(name: &str, chain: Vec<Layer>, options: DiskOptions) -> Rc<Self> {
        Rc::new(Self { root: Root::new(name, Inner::new(name, chain, options, Kept::default())) })
    }

    /// Its name (`device` in QMP).
    pub fn name(&self) -> &str {
        self.root.name()
    }

    /// Size in bytes.
    pub fn size(&self) -> u64 {
        self.root.now().top.size()
    }

    /// Whether guests may not write: the top was opened read-only, or without the backing file it names.
    pub fn read_only(&self) -> bool {
        self.root.now().read_only()
    }

    /// How it behaves now.
    pub fn options(&self) -> DiskOptions {
        self.root.now().options.get()
    }

    /// Turns copy-on-read on or off.
    pub fn set_copy_on_read(&self, on: bool) {
        let inner = self.root.now();
        inner.options.set(DiskOptions { copy_on_read: on, ..inner.options.get() });
    }

    /// Copy-on-read keeps nothing of what comes from below this layer (its node); `None`: it keeps all. A cluster that holds both is
    /// kept whole.
    pub fn set_copies_down_to(&self, node: Option<String>) {
        *self.root.now().kept.copies_down_to.borrow_mut() = node;
    }

    /// Alignment (bytes, a power of two) below which requests cost a read-modify-write.
    pub fn request_alignment(&self) -> u32 {
        self.root.now().top.store().limits().offset_align
    }

    /// The layers now, top first.
    pub fn chain(&self) -> Rc<[Layer]> {
        Rc::clone(&self.root.now().view().layers)
    }

    /// Counters.
    pub fn stats(&self) -> Stats {
        self.root.now().counters.get()
    }

    /// Reads `into.len()` bytes at `at`. Any alignment. Past the end: [`ErrorKind::InvalidArgument`]. While a source below
    /// does not answer ([`Error::is_unavailable`]) the request is held.
    pub async fn read(&self, at: GuestOffset, into: Iov) -> Result<()> {
        let len = into.len() as u64;
        self.counted(Request::Read, "read", at, len, async {
            self.root.inside(async |inner| inner.read(inner.check_range(at, len)?, into.clone()).await).await
        })
        .await
    }

    /// Writes `from` at `at`; with `fua` it is durable when it returns. Where only part of a cluster is written that lies
    /// below so far, the rest is fetched (and held, as a read is).
    pub async fn write(&self, at: GuestOffset, from: Iov, fua: bool) -> Result<()> {
        let len = from.len() as u64;
        let work = self.change(at, len, async move |inner: &Rc<Inner>, range| {
            inner.reaches(range);
            inner.write(range, from.clone(), fua).await
        });
        self.counted(Request::Write, "write", at, len, work).await
    }

    /// Makes the range read as zeros; `unmap` allows giving space back.
    pub async fn write_zeroes(&self, range: GuestRange, unmap: bool, fua: bool) -> Result<()> {
        let work = self.change(range.start(), range.len(), async move |inner: &Rc<Inner>, range| {
            inner.reaches(range);
            inner.write_zeroes(range, unmap, fua).await
        });
        self.counted(Request::Write, "write zeroes", range.start(), range.len(), work).await
    }

    /// Gives the space of whole clusters back; they read as zeros afterwards (what lies below never shows through again);
    /// parts of clusters are left as they are. A hint: without [`DiskOptions::discard`] nothing happens.
    pub async fn discard(&self, range: GuestRange) -> Result<()> {
        let work =
            self.change(range.start(), range.len(), async move |inner: &Rc<Inner>, range| inner.discard(range).await);
        self.counted(Request::Unmap, "discard", range.start(), range.len(), work).await
    }

    /// Makes every completed write durable. Concurrent flushes share barriers. Allowed on a read-only disk.
    pub async fn flush(&self) -> Result<()> {
        self.counted(Request::Flush, "flush", GuestOffset::ZERO, 0, async {
            self.root.inside(async |inner| inner.commit().await).await
        })
        .await
    }

    /// Whether a write that was answered would be lost if this *process* ended now: bytes in the page cache survive that,
    /// tables that are changed in memory do not. (In a power cut everything since the last flush may be lost.)
    pub fn has_unsettled_writes(&self) -> bool {
        let inner = self.root.now();
        inner.flusher.has_unsettled() && !inner.options.get().write_through
    }

    /// Ends when tables have been made durable the next time.
    pub fn settled(&self) -> impl Future<Output = ()> + use<> {
        self.root.now().flusher.settled.wait()
    }

    /// The first run of `range` (not empty, within the disk), all alike. Held like a read while a source does not answer.
    pub async fn status(&self, range: GuestRange) -> Result<Status> {
        let status = async |inner: &Rc<Inner>| {
            let range = inner.check_range(range.start(), range.len())?;
            inner.held(async || inner.status(range).await).await
        };
        self.root.inside(status).await
    }

    /// Fetches what of `range` is not in the top image yet and keeps it there (NBD's cache request). Nothing happens where
    /// there is nothing to keep it in (a read-only disk).
    pub async fn prefetch(&self, range: GuestRange) -> Result<()> {
        let range = self.root.now().check_range(range.start(), range.len())?;
        if !self.root.now().read_only() {
            self.populate(range, &StreamBase::Nothing).await?;
        }
        Ok(())
    }

    /// Grows the disk; what is new reads as zeros even over a longer backing file. [`ErrorKind::Busy`] while a job runs.
    pub async fn resize(&self, size: u64) -> Result<()> {
        let root = Rc::clone(&self.root);
        shield(async move { root.inside(async |inner| inner.resize(size).await).await }).await
    }

    /// Waits for guest requests in flight, stops background work, settles and closes every layer. Further requests fail.
    /// Requests that are held for want of a source fail with its error. The first failure is reported; all is closed anyway.
    pub async fn close(&self) -> Result<()> {
        let root = Rc::clone(&self.root);
        shield(async move { root.close(false).await }).await
    }

    /// [`Disk::close`], but every layer stays open, as if all of them were lent.
    pub async fn retire(&self) -> Result<()> {
        let root = Rc::clone(&self.root);
        shield(async move { root.close(true).await }).await
    }

    /// Shuts the door: requests wait, and those inside have left when this returns. For whoever puts another chain in place.
    /// Nobody else may wait for the disk meanwhile who holds what the caller needs. Given up, it opens the door again when they have
    /// left.
    pub async fn drain(&self) -> Result<Drained> {
        let root = Rc::clone(&self.root);
        shield(async move { Drained::of(&root).await }).await
    }

    /// A guest's request that changes `len` bytes at `at`.
    fn change(
        &self,
        at: GuestOffset,
        len: u64,
        work: impl AsyncFn(&Rc<Inner>, GuestRange) -> Result<()> + 'static,
    ) -> shield::Shielded<Result<()>> {
        let root = Rc::clone(&self.root);
        shield(async move {
            let work = async |inner: &Rc<Inner>| {
                inner.check_writable()?;
                let range = inner.check_range(at, len)?;
                let done = work(inner, range).await;
                // Whatever has become of it: what failed may have written something. And before it leaves: when nobody is
                // inside any more, every change is marked.
                root.changed(range);
                done
            };
            root.inside(work).await
        })
    }

    /// Runs a guest's request and counts it.
    async fn counted(
        &self,
        request: Request,
        what: &'static str,
        offset: GuestOffset,
        bytes: u64,
        work: impl Future<Output = Result<()>>,
    ) -> Result<()> {
        let began = ring::now();
        let disk = self.name();
        tracing::trace!(target: "disk_request", disk, what, %offset, bytes);
        let result = work.await;
        self.root.now().counters.ended(request, bytes, began, &result);
        match &result {
            Ok(()) => tracing::trace!(target: "disk_request_done", disk, what, %offset, bytes),
            Err(error) => tracing::trace!(target: "disk_request_failed", disk, what, %offset, bytes, %error),
        }
        result
    }
}

/// What a job needs of a disk.
impl Disk {
    /// The first run at or after `from` that a stream above `base` still has to bring in (or mask with zeros); `None` when
    /// nothing is left up to the disk's end. Holes below are skipped, except where `base` would show through. A long run may
    /// be handed out in several parts.
    pub async fn next_missing(&self, from: GuestOffset, base: &StreamBase) -> Result<Option<Missing>> {
        self.root.inside(async |inner| inner.next_missing(from, base).await).await
    }

    /// Brings `range` in from above `base`: fetch, detect zeros, write where still unallocated, link. Single-flight with
    /// copy-on-read. Not durable before the next flush. What guests are writing at that moment is waited for and looked at
    /// again. A source that does not answer is an error here ([`Error::is_unavailable`]).
    pub async fn populate(&self, range: GuestRange, base: &StreamBase) -> Result<Copied> {
        let root = Rc::clone(&self.root);
        let base = base.clone();
        shield(async move {
            let (inner, _inside) = root.enter().await?;
            inner.check_writable()?;
            inner.populate(range, &base).await
        })
        .await
    }

    /// Publishes the end of a stream: everything durable, then the top's header refers to `base` (recorded as
    /// `backing_name` if given, else as it was known in the chain) or to nothing, durably; then the layers between are let
    /// go. Refuses ([`ErrorKind::Busy`]) if something is still missing above `base`.
    pub async fn finish_stream(&self, base: &StreamBase, backing_name: Option<&str>) -> Result<()> {
        let root = Rc::clone(&self.root);
        let (base, backing_name) = (base.clone(), backing_name.map(str::to_owned));
        shield(async move {
            let (inner, _inside) = root.enter().await?;
            inner.check_writable()?;
            inner.finish_stream(&base, backing_name.as_deref()).await
        })
        .await
    }

    /// Finds a layer below the top by the name of its file (as recorded or as opened) or by its node name.
    pub fn find_base(&self, name: &str) -> Option<StreamBase> {
        self.root.now().find_base(name)
    }

    /// The same disk as it looks from the layer `node` down, with every layer lent. While it is in use nobody else puts another
    /// chain under this one. For whoever moves data between the layers ([`Disk::carry`]); see [`Disk::set_changes_below`].
    pub fn from_layer(&self, node: &str) -> Option<Rc<Self>> {
        let inner = self.root.now();
        let view = inner.view();
        let at = view.layers.iter().position(|layer| layer.node == node)?;
        let layers = view.layers[at..].iter().map(|layer| Layer { lent: true, ..layer.clone() }).collect();
        let kept = Kept {
            drops: Rc::clone(&inner.kept.drops),
            changes_below: Rc::clone(&inner.kept.changes_below),
            ..Kept::default()
        };
        let options = DiskOptions { copy_on_read: false, write_through: false, discard: true };
        Some(Rc::new(Self { root: Root::new(node, Inner::new(node, layers, options, kept)) }))
    }

    /// Says that a layer below the top is written to from now on, or no longer: so reads look twice.
    pub fn set_changes_below(&self, on: bool) {
        self.root.now().kept.changes_below.set(on);
    }

    /// Marks in `dirty` what guests change from now on.
    pub fn watch(&self, dirty: &Rc<Dirty>) {
        self.root.watch(dirty);
    }

    /// The first run at or after `from` of which a layer above the layer `base` says something: data, or zeros. What the base
    /// shows already is none of it.
    pub async fn next_above(&self, from: GuestOffset, base: &str) -> Result<Option<Missing>> {
        let (inner, _inside) = self.root.enter().await?;
        inner.next_above(GuestRange::between(from, GuestOffset(inner.top.size()).max(from)), base).await
    }

    /// Writes what the layers above `base` say of `range` to `into`, which is this disk from that layer down, and reads it back. Not
    /// durable before `into` is flushed. A source that does not answer is an error here ([`Error::is_unavailable`]).
    pub async fn carry(&self, range: GuestRange, base: &str, into: &Rc<Self>) -> Result<Copied> {
        let (root, into, base) = (Rc::clone(&self.root), Rc::clone(into), base.to_owned());
        shield(async move {
            let (inner, _inside) = root.enter().await?;
            inner.carry(range, &base, &into).await
        })
        .await
    }

    /// Whether a job has it.
    pub fn claimed(&self) -> bool {
        self.root.now().kept.claim.borrow().is_some()
    }

    /// Takes the disk for a job (one at a time); given back when the token is dropped. [`ErrorKind::Busy`] otherwise.
    pub fn claim(&self, job: &str) -> Result<Claim> {
        Claim::take(&self.root.now(), job)
    }
}
