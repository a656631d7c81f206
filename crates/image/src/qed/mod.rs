//! QED, the QEMU Enhanced Disk format.
//!
//! * `open`, `create`: the header's way in and out;
//! * `resolve`: where a guest's bytes are;
//! * `allocate`: reservations;
//! * `commit`: what was linked becomes durable;
//! * `header`: need-check, size and backing reference;
//! * `check`, `repair`, `compact`: consistency of what is on disk.
//!
//! # What is written, and in which order
//! 1. The need-check bit, with a barrier, before the first reservation of a session is handed out.
//! 2. The guest's data, by whoever holds the reservation.
//! 3. (commit) barrier → slices of L2 tables → barrier → L1 entries of new tables → barrier.
//! 4. (settle) when nothing is reserved and nothing is dirty: the unused tail is cut off, barrier, need-check is cleared, barrier.
//!
//! A new table lies where the store reads as zeros, so only the slices that have entries are ever written: tables of up to
//! 1 GiB cost what they hold. An allocated cluster that becomes zeros is zeroed where it is; its mapping stays.
//!
//! **Invariant.** Whatever must not stop half way (a commit, growing and cutting off, every header write) runs in a task of its
//! own; a caller that goes away leaves it running.

mod allocate;
mod check;
mod commit;
mod compact;
mod create;
mod header;
mod open;
mod repair;
mod resolve;

pub(crate) use create::{create, validate};
pub(crate) use open::open;
pub use open::open_with_table_memory;

use crate::commits::Commits;
use crate::health::Health;
use crate::reservation::Active;
use crate::room::Room;
use crate::slices::Shelf;
use crate::space::Space;
use crate::tables::{L1Form, Tables};
use crate::{
    BackingRef, CheckReport, Error, Format, Image, ImageFuture, ImageInfo, Mapped, Purpose, Repair, Reservation, Result,
};
use header::HeaderZone;
use layout::qed::{Features, Geometry, Header, SLICE_ENTRIES, Slice, TableRules};
use layout::{GuestOffset, GuestRange, HostOffset};
use ring::sync::{Event, Mutex};
use std::cell::{Cell, RefCell};
use std::future::Future;
use std::rc::Rc;
use store::Store;

/// Runs `work` to its end even if the caller's future is dropped.
fn detached<T: 'static>(work: impl Future<Output = T> + 'static) -> ring::JoinHandle<T> {
    ring::spawn(work)
}

/// Everything an open image knows. Shared by the image, its reservations and its tasks; no borrow of a cell lasts over an
/// await.
struct Core {
    store: Rc<dyn Store>,
    health: Health,
    for_check: bool,
    /// The header as it is on disk.
    header: Cell<Header>,
    geometry: Geometry,
    /// How far reservations may reach; past the size only while zeros are marked there.
    reach: Cell<u64>,
    rules: TableRules,
    /// Whoever writes the header holds this.
    zone: Mutex<HeaderZone>,
    backing: RefCell<Option<BackingRef>>,
    /// Need-check is durable and will stay so: reservations may be handed out.
    marked: Cell<bool>,
    /// Reservations handed out or in the making.
    active: Active,
    tables: RefCell<Tables>,
    cache: Rc<Shelf<Slice>>,
    /// A slice was unpinned.
    unpinned: Rc<Event>,
    room: Rc<Room>,
    /// Whoever makes a fresh table holds this.
    making_table: Mutex<()>,
    commits: Commits,
    /// Something was linked whose data must be durable before its mapping is.
    barrier_due: Cell<bool>,
    /// Need-check was set when the image was opened, and is not repaired.
    found_dirty: Cell<bool>,
}

/// How QED writes its L1 table.
const L1_FORM: L1Form = L1Form { slice: SLICE_ENTRIES, entry: HostOffset::get, bytes: u64::to_le_bytes };

impl Core {
    fn size(&self) -> u64 {
        self.header.get().image_size
    }
}

/// An open QED image.
pub(crate) struct QedImage {
    core: Rc<Core>,
}

impl Image for QedImage {
    fn format(&self) -> Format {
        Format::Qed
    }

    fn store(&self) -> &Rc<dyn Store> {
        &self.core.store
    }

    fn size(&self) -> u64 {
        self.core.size()
    }

    fn cluster_size(&self) -> u64 {
        self.core.geometry.cluster_size()
    }

    fn read_only(&self) -> bool {
        self.core.health.read_only()
    }

    fn backing(&self) -> Option<BackingRef> {
        self.core.backing.borrow().clone()
    }

    fn info(&self) -> ImageInfo {
        let header = self.core.header.get();
        let mut warnings = Vec::new();
        if self.core.found_dirty.get() {
            warnings.push("the image was not closed cleanly; it is repaired when it is opened for writing".to_owned());
        }
        if header.autoclear_features != 0 {
            warnings.push(format!("unknown autoclear features {:#x} are set", header.autoclear_features));
        }
        let cluster_size = Some(header.geometry.cluster_size());
        ImageInfo { cluster_size, dirty: self.core.found_dirty.get(), warnings, ..ImageInfo::default() }
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
        Box::pin(detached(async move { core.settle().await }))
    }

    fn resize(&self, size: u64) -> ImageFuture<'_, ()> {
        let core = self.core.clone();
        Box::pin(detached(async move { core.resize(size).await }))
    }

    fn mask_behind_end(&self, until: GuestOffset) -> ImageFuture<'_, ()> {
        let core = self.core.clone();
        Box::pin(detached(async move { core.mask_behind_end(until).await }))
    }

    fn set_backing(&self, backing: Option<BackingRef>) -> ImageFuture<'_, ()> {
        let core = self.core.clone();
        Box::pin(detached(async move { core.set_backing(backing).await }))
    }

    fn check(&self, repair: Repair) -> ImageFuture<'_, CheckReport> {
        let core = self.core.clone();
        Box::pin(detached(async move { core.check(repair).await }))
    }

    fn poisoned(&self) -> Option<Error> {
        self.core.health.poison()
    }

    fn close(&self) -> ImageFuture<'_, ()> {
        let core = self.core.clone();
        Box::pin(detached(async move { core.close().await }))
    }
}

impl Core {
    /// Settles, fills the holes of this session, and closes the store, in any case.
    async fn close(self: &Rc<Self>) -> Result<()> {
        let settled =
            if self.health.read_only() || self.health.is_poisoned() { Ok(()) } else { self.settle_for_good().await };
        let closed = self.store.close().await.map_err(Error::from);
        settled.and(closed)
    }

    async fn settle_for_good(self: &Rc<Self>) -> Result<()> {
        self.settle().await?;
        let holes = { self.room.space.borrow().growable() && self.room.space.borrow().has_holes() };
        if holes && self.active.get() == 0 {
            self.fill_holes().await?;
        }
        Ok(())
    }

    fn needs_check(&self) -> bool {
        self.header.get().features.contains(Features::NEED_CHECK)
    }
}
