//! Image formats. Floor 3: an image turns guest ranges into host ranges and publishes changes to its tables; it never moves
//! guest data itself.
//!
//! # Resolve → payload → complete
//! * A **read** asks [`Image::lookup`] (and [`Image::load`] when the tables are not in memory) and moves the bytes itself.
//! * A **write** to an allocated range writes where `lookup` says. A write to an unallocated range takes a
//!   [`Reservation`] (space nobody sees), writes payload *and* copy-on-write fill there, and then links it: from then on it is
//!   visible in memory. It becomes durable with the next [`Image::commit`].
//! * Dropping a reservation gives the space back.
//!
//! # One publish order, in every format
//! reserve → data → visible in memory → refcounts (where the format has them) → barrier → mapping → barrier → pointer to the
//! mapping. [`Image::commit`] writes exactly those table entries that were linked when it began, after a barrier that covers
//! their data. After a failed metadata write or barrier the image is poisoned.
//!
//! # One owner
//! An image lives on one shard. Everything that is not `async` is atomic: [`Image::lookup`], [`Reservation::link`].
#![forbid(unsafe_code)]

pub mod amend;
pub mod backing;
pub mod bitmap;
pub mod check;
mod cluster_set;
mod commits;
pub mod create;
pub mod error;
mod grid;
mod health;
mod inflate;
mod kept;
mod luks;
mod master;
pub mod open;
mod packed;
pub mod probe;
mod qcow;
pub mod qcow2;
pub mod qed;
pub mod raw;
pub mod reservation;
mod room;
mod slices;
pub mod snapshot;
mod space;
mod tables;
mod vhdx;
pub mod vmdk;
mod vpc;

pub use backing::BackingRef;
pub use bitmap::{Bitmap, BitmapAction, Bits};
pub use check::{CheckReport, Repair};
pub use error::{Error, ErrorKind, Result};
pub use luks::{KeySlots, Passphrase, SlotChange};
pub use open::{Companions, NoCompanions, OpenOptions, Surroundings, open, open_in};
pub use probe::Format;
pub use reservation::{Keep, Linked, Purpose, Reservation};
pub use snapshot::{Snapshot, SnapshotAction};

use futures_util::future::LocalBoxFuture;
use layout::{GuestOffset, GuestRange, HostOffset};
use ring::Iov;
use std::rc::Rc;
use store::Store;

/// What an operation of an [`Image`] returns.
pub type ImageFuture<'a, T> = LocalBoxFuture<'a, Result<T>>;

/// What one image (not its backing file) says about a run of the guest's bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mapping {
    /// The bytes are in [`Image::store`] from this offset on, and are written there.
    Data(HostOffset),
    /// The bytes are in [`Image::store`] from this offset on, and somebody else's, too (a snapshot's): they are read there; a write
    /// goes to new clusters.
    Shared(HostOffset),
    /// The image says these are zeros, whatever lies below.
    Zero,
    /// The bytes are in [`Image::store`], packed: [`Image::unpack`] reads them.
    Packed,
    /// The image says nothing: what lies below shows through, zeros if there is nothing below.
    Unallocated,
}

impl Mapping {
    /// Where the bytes can be read in [`Image::store`], if they can be read there as they are.
    pub fn stored(self) -> Option<HostOffset> {
        match self {
            Self::Data(host) | Self::Shared(host) => Some(host),
            Self::Zero | Self::Packed | Self::Unallocated => None,
        }
    }
}

/// The first run of a range, all mapped alike (contiguous in the store, where it is data).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Mapped {
    /// Length in bytes, at least 1, at most what was asked for. As long as the tables in memory tell.
    pub len: u64,
    /// How.
    pub mapping: Mapping,
}

/// What `info` shows of an image beyond what the trait's other methods say.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ImageInfo {
    /// Allocation unit in bytes; `None` where the format has none.
    pub cluster_size: Option<u64>,
    /// The image was not closed cleanly (QED's need-check, QCOW2's dirty bit).
    pub dirty: bool,
    /// Things a user should know that are no error.
    pub warnings: Vec<String>,
    /// Guests' data are encrypted.
    pub encrypted: bool,
    /// QCOW2: what it alone has.
    pub qcow2: Option<qcow2::Qcow2Info>,
    /// VMDK: what it alone has.
    pub vmdk: Option<vmdk::VmdkInfo>,
}

/// A disk image: tables that say where the guest's bytes are.
///
/// Ranges given must lie within `0..size` (rounded up to whole clusters for [`Image::reserve`] and [`Image::write_zeroes`]).
/// Out-of-range requests are [`ErrorKind::InvalidArgument`], never a panic. Dropping a future is safe: what it had begun
/// ends or is undone.
pub trait Image: 'static {
    /// Which format.
    fn format(&self) -> Format;

    /// Where its bytes are. Payload goes there directly.
    fn store(&self) -> &Rc<dyn Store>;

    /// The file that is the image: what its name is, and what other names are relative to. Where the guest's data are in a file of
    /// their own, this is the other one.
    fn file(&self) -> &Rc<dyn Store> {
        self.store()
    }

    /// Whether a cluster's place in [`Image::store`] follows from where the guest sees it. Then a reservation is nobody's alone:
    /// whoever writes to its place holds the guest's range against every other writer, until it is linked or dropped.
    fn has_fixed_places(&self) -> bool {
        false
    }

    /// The size the guest sees, in bytes.
    fn size(&self) -> u64;

    /// Allocation unit in bytes (a power of two): what [`Image::reserve`] hands out multiples of. 1 for raw.
    fn cluster_size(&self) -> u64;

    /// Whether writes are refused.
    fn read_only(&self) -> bool;

    /// What the header says lies below, if anything.
    fn backing(&self) -> Option<BackingRef>;

    /// What `info` shows.
    fn info(&self) -> ImageInfo;

    /// The first run of `range` (not empty), from tables in memory; `None` when they must be [`Image::load`]ed first. Never
    /// blocks, never evicts. For raw it is always data: holes are the affair of [`Store::extent`].
    fn lookup(&self, range: GuestRange) -> Result<Option<Mapped>>;

    /// Reads `range`, which [`Image::lookup`] has called [`Mapping::Packed`], into `into` (as long). Whole or an error.
    fn unpack(&self, range: GuestRange, into: Iov) -> ImageFuture<'_, ()> {
        let what = format!("the format packs nothing ({range}, {} bytes)", into.len());
        let error = Error::new(ErrorKind::Unsupported, self.store().name(), None, what);
        Box::pin(async { Err(error) })
    }

    /// Whether a backing file whose format the header leaves open may be probed: a guest that writes its own first sector
    /// decides what a probe finds.
    fn may_probe_backing(&self) -> bool {
        true
    }

    /// What images made over this one record of it, so that they notice when it was changed or is another one; `None` where the
    /// format has nothing of the kind.
    fn identity(&self) -> Option<String> {
        None
    }

    /// What [`Image::identity`] the backing file must have, if this image recorded one.
    fn backing_identity(&self) -> Option<String> {
        None
    }

    /// Whether its data may be a hole of its store, which [`Store::extent`] tells: where a disk's bytes lie in a file as they are.
    fn lies_plainly(&self) -> bool {
        self.format() == Format::Raw
    }

    /// Brings the tables into memory that `lookup` needs for the start of `range`. Single-flight. A caller alternates
    /// `lookup` and `load` until it has an answer; a loaded table stays at least until the caller's next await.
    fn load(&self, range: GuestRange) -> ImageFuture<'_, ()>;

    /// Reserves what is needed to make the start of `range` allocated (or, with [`Purpose::Zero`], an explicit zero): whole
    /// clusters, contiguous in guest and host, from the cluster that holds `range`'s start. May cover less than asked
    /// (at least one cluster): ask again for the rest. Loads and pins the tables, so that [`Reservation::link`] needs no
    /// await. What the clusters map to *now* does not matter here; `link` decides.
    fn reserve(&self, range: GuestRange, purpose: Purpose) -> ImageFuture<'_, Reservation>;

    /// Makes whole clusters (`range` is cluster-aligned; its end may be the image's size instead) read as zeros, whatever lies
    /// below. The caller holds the range exclusively: no write or link of its own is in flight there. What was allocated
    /// is zeroed in place or unlinked, as suits the format; `unmap` allows giving space back. Where `masked` is false
    /// nothing below shows through anyway, and unallocated clusters are left alone.
    fn write_zeroes(&self, range: GuestRange, unmap: bool, masked: bool) -> ImageFuture<'_, ()>;

    /// Whether [`Image::commit`] has table changes to write. A completed write to a range that was allocated all along
    /// is durable after [`Store::flush`] alone when this is false.
    fn is_dirty(&self) -> bool;

    /// Makes durable what was completed when it was called: payload, tables, pointers, in publish order. Calls may
    /// overlap; they are carried out one after the other, and one may serve several callers.
    fn commit(&self) -> ImageFuture<'_, ()>;

    /// Commits and, if nothing is in flight, marks the image as clean (QED: clears need-check). Called when idle.
    fn settle(&self) -> ImageFuture<'_, ()>;

    /// Changes the size the guest sees; durable when it returns. QED only grows. Shrinking wants nothing else in flight. New bytes
    /// are unallocated, but where [`Image::mask_behind_end`] has marked them as zeros.
    fn resize(&self, size: u64) -> ImageFuture<'_, ()>;

    /// Before growing over a longer backing file: marks as zeros the clusters from the first that lies behind the end as a
    /// whole up to the one before `until`. Nobody sees them yet; [`Image::commit`] makes them durable. Marks that no growth
    /// followed do no harm.
    fn mask_behind_end(&self, until: GuestOffset) -> ImageFuture<'_, ()> {
        let what = format!("the format cannot mark zeros behind its end (up to {until})");
        Box::pin(async move { Err(Error::new(ErrorKind::Unsupported, self.store().name(), None, what)) })
    }

    /// Publishes a new backing reference: everything durable → header → barrier. The caller sees to it that the guest's
    /// view does not change. Durable when it returns.
    fn set_backing(&self, backing: Option<BackingRef>) -> ImageFuture<'_, ()>;

    /// Changes how the image says what it says; the guest sees the same. Nothing else is in flight; durable when it returns.
    fn amend<'a>(&'a self, change: &'a amend::Amendment) -> ImageFuture<'a, ()> {
        let _ = change;
        let what = format!("Format driver '{}' does not support option amendment", self.format());
        let error = Error::new(ErrorKind::Unsupported, self.store().name(), None, what);
        Box::pin(async { Err(error) })
    }

    /// The slots for passphrases, if the image is encrypted and unlocked.
    fn key_slots(&self) -> Option<KeySlots> {
        None
    }

    /// Checks the tables against the specification and, as asked, repairs. Nothing else is in flight. Progress is a fraction.
    fn check(&self, repair: Repair) -> ImageFuture<'_, CheckReport>;

    /// Writes one whole cluster (`bytes` is as long) packed, if the format can and it saves anything; false where it was not
    /// written. The caller holds the cluster exclusively. For images that are made at one go: a packed cluster is never written
    /// over in place.
    fn pack(&self, at: GuestOffset, bytes: Iov) -> ImageFuture<'_, bool> {
        let what = format!("the format packs nothing ({} bytes at {at})", bytes.len());
        let error = Error::new(ErrorKind::Unsupported, self.store().name(), None, what);
        Box::pin(async { Err(error) })
    }

    /// Gives every cluster from `from` on, where nothing is allocated (a new image, or what has grown), its place. Nothing else is in
    /// flight; durable when it returns.
    fn preallocate(&self, from: GuestOffset, how: create::Preallocation) -> ImageFuture<'_, ()> {
        let _ = from;
        let what = format!("the format '{}' has no preallocation '{how:?}'", self.format());
        let error = Error::new(ErrorKind::Unsupported, self.store().name(), None, what);
        Box::pin(async move { if how == create::Preallocation::Off { Ok(()) } else { Err(error) } })
    }

    /// Makes everything unallocated: what lies below shows through again. Nothing else is in flight; durable when it returns.
    fn empty(&self) -> ImageFuture<'_, ()> {
        let what = format!("the format '{}' cannot be emptied", self.format());
        let error = Error::new(ErrorKind::Unsupported, self.store().name(), None, what);
        Box::pin(async { Err(error) })
    }

    /// The internal snapshots, oldest first.
    fn snapshots(&self) -> ImageFuture<'_, Vec<Snapshot>> {
        Box::pin(async { Ok(Vec::new()) })
    }

    /// Takes, applies or deletes an internal snapshot. Nothing else is in flight; durable when it returns.
    fn snapshot(&self, action: SnapshotAction) -> ImageFuture<'_, ()> {
        let what = format!("the format '{}' has no internal snapshots ({action:?})", self.format());
        let error = Error::new(ErrorKind::Unsupported, self.store().name(), None, what);
        Box::pin(async { Err(error) })
    }

    /// The persistent bitmaps.
    fn bitmaps(&self) -> ImageFuture<'_, Vec<Bitmap>> {
        Box::pin(async { Ok(Vec::new()) })
    }

    /// What the bitmap of this name says.
    fn bitmap_bits<'a>(&'a self, name: &'a str) -> ImageFuture<'a, Bits> {
        Box::pin(async move { Err(bitmap::not_found(self.store().name(), name)) })
    }

    /// Changes bitmaps. Nothing else is in flight; durable when it returns.
    fn bitmap(&self, action: BitmapAction) -> ImageFuture<'_, ()> {
        let (what, name) = ("Operation not supported", self.store().name());
        let error = match action {
            BitmapAction::Add(..) => {
                Error::new(ErrorKind::Unsupported, name, None, format!("Can't store persistent bitmaps: {what}"))
            }
            other => bitmap::not_found(name, other.name()),
        };
        Box::pin(async { Err(error) })
    }

    /// The cause, once the image refuses writes after a failed metadata write or barrier.
    fn poisoned(&self) -> Option<Error>;

    /// Settles (unless read-only or poisoned), gives up preallocated space and closes the store. Nothing is in flight.
    fn close(&self) -> ImageFuture<'_, ()>;
}
