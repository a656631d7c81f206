//! QCOW2, versions 2 and 3.
//!
//! * `open`, `create`: the header's way in and out;
//! * `resolve`: where a guest's bytes are; `unpack`, `pack`: packed clusters;
//! * `allocate`: reservations; `refcount`: which clusters are in use, and by how many;
//! * `commit`: what was linked becomes durable;
//! * `header`: size, backing reference, where the tables are;
//! * `snapshot`: internal snapshots; `load_snapshot`: showing one; `bitmaps`, `bitmap_actions`: persistent bitmaps, which are not kept up while a guest writes, and
//!   say so;
//! * `check`, with `references`, `counts` and `flags`, and `repair`: consistency of what is on disk.
//!
//! All the kinds of clusters there are: plain, zero, packed (deflate and zstd), with subclusters, shared with internal snapshots.
//! An external data file (`data_file`): tables in the image, data in the other. Not served, and named when refused: encryption.
//!
//! # What is written, and in which order
//! 1. The guest's data, by whoever holds the reservation. Nothing refers to reserved clusters, on disk they are free.
//! 2. (commit) refcounts of what was linked (new blocks → barrier → the refcount table) → barrier → slices of L2 tables →
//!    barrier → L1 entries of new tables → barrier.
//! 3. Refcounts of what was replaced go down after that, with the next commit: a cluster is free once no table on disk refers
//!    to it. What a cut leaves behind is at worst a cluster that is counted and not used.
//!
//! Refcounts ride in front of the barrier that the data needs anyway, so an image is never left dirty: "lazy refcounts" are
//! allowed, and not needed.
//!
//! **Invariants.**
//! * A cluster or table is changed where it is only if its entry says that it is referred to once ("copied").
//! * A plain cluster that becomes zeros is zeroed where it is; its mapping stays.
//! * Whatever must not stop half way (a commit, every header write) runs in a task of its own.
//! * What the tables say is checked when it is used; a damaged entry is an error with its place, and the rest of the image is
//!   served.
//! * Memory is bounded: the L1 table (32 MiB at most), the refcount table (8 MiB), slices, some refcount blocks, a few
//!   unpacked clusters.

mod allocate;
mod amend;
mod bitmap_actions;
mod bitmaps;
mod check;
mod commit;
mod counts;
mod create;
mod data_file;
mod flags;
mod header;
mod load_snapshot;
mod open;
mod pack;
mod preallocate;
mod refcount;
mod references;
mod repair;
mod resolve;
mod shrink;
mod snapshot;
mod unpack;

pub use create::{Options, create_with_data_file, measure};
pub(crate) use create::{create, validate};
pub use data_file::DataFile;
pub use layout::qcow2::Compression;
pub(crate) use open::open;
pub use open::open_with_table_memory;

use crate::amend::Amendment;
use crate::bitmap::{Bitmap, BitmapAction, Bits};
use crate::commits::Commits;
use crate::create::Preallocation;
use crate::health::Health;
use crate::kept::Kept;
use crate::luks::KeySlots;
use crate::reservation::Active;
use crate::room::Room;
use crate::slices::Shelf;
use crate::snapshot::{Snapshot, SnapshotAction};
use crate::tables::{L1Form, Tables};
use crate::{
    BackingRef, CheckReport, Error, Format, Image, ImageFuture, ImageInfo, Mapped, Purpose, Repair, Reservation, Result,
};
use header::HeaderZone;
use layout::qcow2::{COMPATIBLE_LAZY_REFCOUNTS, COPIED, Features, Header, Slice};
use layout::{GuestOffset, GuestRange, HostRange};
use pack::Packing;
use refcount::Refcounts;
use ring::Iov;
use ring::sync::{Event, Mutex};
use std::cell::{Cell, RefCell};
use std::collections::BTreeSet;
use std::rc::Rc;
use store::Store;

/// Bytes of a table that are read, kept and written together (a whole table where it is smaller).
const SLICE_BYTES: u64 = 4096;

/// Everything an open image knows. Shared by the image, its reservations and its tasks; no borrow of a cell lasts over an
/// await.
struct Core {
    /// Where the tables are: the file that is the image.
    store: Rc<dyn Store>,
    /// Where guests' data are: the same, what lies encrypted in it, or the data file.
    payload: Rc<dyn Store>,
    /// New space in the payload reads as zeros.
    blank: bool,
    data_file: Option<DataFile>,
    health: Health,
    for_check: bool,
    /// The header as it is on disk.
    header: Cell<Header>,
    /// Whoever publishes anything (a commit, a header) holds this.
    zone: Mutex<HeaderZone>,
    backing: RefCell<Option<BackingRef>>,
    /// How far reservations may reach; past the size only while zeros are marked there.
    reach: Cell<u64>,
    /// Reservations handed out or in the making.
    active: Active,
    tables: RefCell<Tables>,
    cache: Rc<Shelf<Slice>>,
    /// A slice was unpinned.
    unpinned: Rc<Event>,
    room: Rc<Room>,
    refcounts: RefCell<Refcounts>,
    /// Clusters of tables, as they were when the image was opened for writing: no data may be there. What is given back goes.
    metadata: RefCell<BTreeSet<u64>>,
    /// Linked, and not counted yet.
    linked: RefCell<Vec<HostRange>>,
    /// Whoever makes a fresh table holds this.
    making_table: Mutex<()>,
    commits: Commits,
    kept: RefCell<Kept>,
    packing: RefCell<Packing>,
    /// If it is encrypted and unlocked.
    key_slots: Option<KeySlots>,
}

/// How QCOW2 writes its L1 table.
fn l1_form(cluster_size: u64) -> L1Form {
    L1Form { slice: SLICE_BYTES.min(cluster_size) as usize / 8, entry: |at| at.get() | COPIED, bytes: u64::to_be_bytes }
}

impl Core {
    fn size(&self) -> u64 {
        self.header.get().size
    }

    fn cluster_size(&self) -> u64 {
        self.header.get().cluster_size()
    }

    /// Whether a cluster can be said to be zeros without a place of its own.
    fn has_zero_clusters(&self) -> bool {
        let header = self.header.get();
        header.version > 2 && !header.data_file_is_raw()
    }

    /// Settles, unless there is a reason not to, and closes the store, in any case.
    async fn close(self: &Rc<Self>) -> Result<()> {
        let settled = if self.health.read_only() || self.health.is_poisoned() { Ok(()) } else { self.settle().await };
        let closed = self.store.close().await.map_err(Error::from);
        let data_closed = if self.has_data_file() { self.payload.close().await.map_err(Error::from) } else { Ok(()) };
        settled.and(closed).and(data_closed)
    }
}

/// What `info` shows of a QCOW2 image alone.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Qcow2Info {
    /// 2 or 3.
    pub version: u32,
    /// How packed clusters are packed.
    pub compression: Compression,
    /// Refcounts may be written late.
    pub lazy_refcounts: bool,
    /// Bits of a refcount.
    pub refcount_bits: u32,
    /// It is marked as corrupt.
    pub corrupt: bool,
    /// Its clusters have subclusters.
    pub extended_l2: bool,
    /// Where its data are, if not in the image itself.
    pub data_file: Option<DataFile>,
}

/// An open QCOW2 image.
pub(crate) struct Qcow2Image {
    core: Rc<Core>,
}

impl Image for Qcow2Image {
    fn format(&self) -> Format {
        Format::Qcow2
    }

    #[expect(clippy::misnamed_getters, reason = "guests' data may lie encrypted in the store of the tables")]
    fn store(&self) -> &Rc<dyn Store> {
        &self.core.payload
    }

    fn file(&self) -> &Rc<dyn Store> {
        &self.core.store
    }

    fn has_fixed_places(&self) -> bool {
        self.core.has_data_file()
    }

    fn size(&self) -> u64 {
        self.core.size()
    }

    fn cluster_size(&self) -> u64 {
        self.core.cluster_size()
    }

    fn read_only(&self) -> bool {
        self.core.health.read_only()
    }

    fn backing(&self) -> Option<BackingRef> {
        self.core.backing.borrow().clone()
    }

    fn may_probe_backing(&self) -> bool {
        false
    }

    fn info(&self) -> ImageInfo {
        let header = self.core.header.get();
        let has = |feature| header.features.contains(feature);
        let mut warnings = Vec::new();
        if has(Features::CORRUPT) {
            warnings.push("the image is marked as corrupt; run 'check -r all' on it".to_owned());
        }
        let qcow2 = Qcow2Info {
            version: header.version,
            compression: header.compression,
            lazy_refcounts: header.compatible_features & COMPATIBLE_LAZY_REFCOUNTS != 0,
            refcount_bits: 1 << header.refcount_order,
            corrupt: has(Features::CORRUPT),
            extended_l2: has(Features::EXTENDED_L2),
            data_file: self.core.data_file.clone(),
        };
        let encrypted = header.crypt != 0;
        let cluster_size = Some(header.cluster_size());
        ImageInfo {
            cluster_size,
            dirty: has(Features::DIRTY),
            warnings,
            encrypted,
            qcow2: Some(qcow2),
            ..ImageInfo::default()
        }
    }

    fn lookup(&self, range: GuestRange) -> Result<Option<Mapped>> {
        self.core.lookup(range)
    }

    fn load(&self, range: GuestRange) -> ImageFuture<'_, ()> {
        Box::pin(async move {
            self.core.health.check_range(range, self.core.size())?;
            self.core.load(range.start()).await
        })
    }

    fn unpack(&self, range: GuestRange, into: Iov) -> ImageFuture<'_, ()> {
        Box::pin(async move {
            self.core.health.check_range(range, self.core.size())?;
            self.core.unpack_range(range, &into).await
        })
    }

    fn reserve(&self, range: GuestRange, purpose: Purpose) -> ImageFuture<'_, Reservation> {
        Box::pin(self.core.reserve(range, purpose))
    }

    fn write_zeroes(&self, range: GuestRange, unmap: bool, masked: bool) -> ImageFuture<'_, ()> {
        Box::pin(self.core.write_zeroes(range, unmap, masked))
    }

    fn is_dirty(&self) -> bool {
        self.core.is_dirty()
    }

    fn commit(&self) -> ImageFuture<'_, ()> {
        Box::pin(self.core.commit())
    }

    fn settle(&self) -> ImageFuture<'_, ()> {
        let core = self.core.clone();
        Box::pin(ring::spawn(async move { core.settle().await }))
    }

    fn resize(&self, size: u64) -> ImageFuture<'_, ()> {
        let core = self.core.clone();
        Box::pin(ring::spawn(async move { core.resize(size).await }))
    }

    fn mask_behind_end(&self, until: GuestOffset) -> ImageFuture<'_, ()> {
        let core = self.core.clone();
        Box::pin(ring::spawn(async move { core.mask_behind_end(until).await }))
    }

    fn set_backing(&self, backing: Option<BackingRef>) -> ImageFuture<'_, ()> {
        let core = self.core.clone();
        Box::pin(ring::spawn(async move { core.set_backing(backing).await }))
    }

    fn key_slots(&self) -> Option<KeySlots> {
        self.core.key_slots.clone()
    }

    fn amend<'a>(&'a self, change: &'a Amendment) -> ImageFuture<'a, ()> {
        Box::pin(async move { self.core.amend(self, change).await })
    }

    fn check(&self, repair: Repair) -> ImageFuture<'_, CheckReport> {
        let core = self.core.clone();
        Box::pin(ring::spawn(async move { core.check(repair).await }))
    }

    fn pack(&self, at: GuestOffset, bytes: Iov) -> ImageFuture<'_, bool> {
        let core = self.core.clone();
        Box::pin(ring::spawn(async move { core.pack(at, bytes).await }))
    }

    fn preallocate(&self, from: GuestOffset, how: Preallocation) -> ImageFuture<'_, ()> {
        let core = self.core.clone();
        Box::pin(ring::spawn(async move { core.preallocate(from, how).await }))
    }

    fn empty(&self) -> ImageFuture<'_, ()> {
        let core = self.core.clone();
        Box::pin(ring::spawn(async move { core.empty().await }))
    }

    fn snapshots(&self) -> ImageFuture<'_, Vec<Snapshot>> {
        Box::pin(self.core.snapshots())
    }

    fn snapshot(&self, action: SnapshotAction) -> ImageFuture<'_, ()> {
        let core = self.core.clone();
        Box::pin(ring::spawn(async move { core.snapshot(action).await }))
    }

    fn bitmaps(&self) -> ImageFuture<'_, Vec<Bitmap>> {
        Box::pin(self.core.bitmaps())
    }

    fn bitmap_bits<'a>(&'a self, name: &'a str) -> ImageFuture<'a, Bits> {
        Box::pin(self.core.bitmap_bits(name))
    }

    fn bitmap(&self, action: BitmapAction) -> ImageFuture<'_, ()> {
        let core = self.core.clone();
        Box::pin(ring::spawn(async move { core.bitmap(action).await }))
    }

    fn poisoned(&self) -> Option<Error> {
        self.core.health.poison()
    }

    fn close(&self) -> ImageFuture<'_, ()> {
        let core = self.core.clone();
        Box::pin(ring::spawn(async move { core.close().await }))
    }
}
