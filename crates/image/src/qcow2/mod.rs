//! QCOW2, versions 2 and 3: read so far, not written.
//!
//! * `open`: the header is understood whole or the image is refused;
//! * `resolve`: from a guest's range to what the tables say, from slices of L2 tables in memory;
//! * `unpack`: packed clusters.
//!
//! Served as a backing file and, read-only, as a disk. All the kinds of clusters there are: plain, zero, packed (deflate and
//! zstd), with subclusters. Not served, and named when refused: encryption, an external data file.
//!
//! **Invariants.** Nothing is ever written. What the tables say is checked when it is used; a damaged entry is an error with its
//! place, and the rest of the image is served. Memory is bounded: the L1 table (32 MiB at most), [`resolve::CACHE_SLICES`]
//! slices, [`unpack::KEPT_BYTES`] of unpacked clusters.

mod open;
mod resolve;
mod unpack;

pub(crate) use open::open;

use crate::{
    BackingRef, CheckReport, Error, ErrorKind, Format, Image, ImageFuture, ImageInfo, Mapped, Purpose, Repair,
    Reservation, Result,
};
use layout::qcow2::{Features, Header};
use layout::{GuestRange, HostOffset};
use resolve::Slices;
use ring::Iov;
use std::cell::RefCell;
use std::rc::Rc;
use store::Store;
use unpack::Kept;

/// An open QCOW2 image.
pub(crate) struct Qcow2Image {
    store: Rc<dyn Store>,
    header: Header,
    backing: Option<BackingRef>,
    l1: Vec<u64>,
    slices: RefCell<Slices>,
    kept: RefCell<Kept>,
}

impl Qcow2Image {
    fn error(&self, kind: ErrorKind, offset: Option<HostOffset>, what: impl Into<String>) -> Error {
        Error::new(kind, self.store.name(), offset, what)
    }

    fn unwritten<T: 'static>(&self) -> ImageFuture<'_, T> {
        let error = self.error(ErrorKind::ReadOnly, None, "QCOW2 images are read, not written");
        Box::pin(async { Err(error) })
    }

    fn check_range(&self, range: GuestRange) -> Result<()> {
        if range.is_empty() || range.end().get() > self.header.size {
            let what = format!("the range {range} does not lie within the disk's {} bytes", self.header.size);
            return Err(self.error(ErrorKind::InvalidArgument, None, what));
        }
        Ok(())
    }
}

impl Image for Qcow2Image {
    fn format(&self) -> Format {
        Format::Qcow2
    }

    fn store(&self) -> &Rc<dyn Store> {
        &self.store
    }

    fn size(&self) -> u64 {
        self.header.size
    }

    fn cluster_size(&self) -> u64 {
        self.header.cluster_size()
    }

    fn read_only(&self) -> bool {
        true
    }

    fn backing(&self) -> Option<BackingRef> {
        self.backing.clone()
    }

    fn may_probe_backing(&self) -> bool {
        false
    }

    fn info(&self) -> ImageInfo {
        let has = |feature| self.header.features.contains(feature);
        let mut warnings = Vec::new();
        if has(Features::CORRUPT) {
            warnings.push("the image is marked as corrupt; run 'qemu-img check -r all' on it".to_owned());
        }
        ImageInfo { cluster_size: Some(self.header.cluster_size()), dirty: has(Features::DIRTY), warnings }
    }

    fn lookup(&self, range: GuestRange) -> Result<Option<Mapped>> {
        self.check_range(range)?;
        self.resolve(range)
    }

    fn load(&self, range: GuestRange) -> ImageFuture<'_, ()> {
        Box::pin(async move {
            self.check_range(range)?;
            self.load_slice(range.start()).await
        })
    }

    fn unpack(&self, range: GuestRange, into: Iov) -> ImageFuture<'_, ()> {
        Box::pin(async move {
            self.check_range(range)?;
            self.unpack_range(range, &into).await
        })
    }

    fn reserve(&self, _: GuestRange, _: Purpose) -> ImageFuture<'_, Reservation> {
        self.unwritten()
    }

    fn write_zeroes(&self, _: GuestRange, _: bool, _: bool) -> ImageFuture<'_, ()> {
        self.unwritten()
    }

    fn is_dirty(&self) -> bool {
        false
    }

    fn commit(&self) -> ImageFuture<'_, ()> {
        Box::pin(async { Ok(()) })
    }

    fn settle(&self) -> ImageFuture<'_, ()> {
        Box::pin(async { Ok(()) })
    }

    fn resize(&self, _: u64) -> ImageFuture<'_, ()> {
        self.unwritten()
    }

    fn set_backing(&self, _: Option<BackingRef>) -> ImageFuture<'_, ()> {
        self.unwritten()
    }

    fn check(&self, _: Repair) -> ImageFuture<'_, CheckReport> {
        let what = "QCOW2 images are not checked yet; use 'qemu-img check'";
        let error = self.error(ErrorKind::Unsupported, None, what);
        Box::pin(async { Err(error) })
    }

    fn poisoned(&self) -> Option<Error> {
        None
    }

    fn close(&self) -> ImageFuture<'_, ()> {
        Box::pin(async { Ok(self.store.close().await?) })
    }
}
