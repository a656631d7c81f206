//! Raw: the guest's bytes as they are.
//!
//! * `open`, `create`: nothing is read, nothing but a length is written;
//! * `resolve`: every byte is where it is;
//! * `commit`: a barrier.
//!
//! There are no tables: nothing to reserve, nothing to repair, no room for a backing reference. A file whose length is no multiple
//! of 512 is served up to the next one; what is missing reads as zeros, as with QEMU.

mod create;
mod open;

pub(crate) use create::{create, validate};
pub(crate) use open::{open, open_as};

use crate::create::Preallocation;
use crate::luks::KeySlots;
use crate::{
    BackingRef, CheckReport, Error, ErrorKind, Format, Image, ImageFuture, ImageInfo, Mapped, Mapping, Purpose, Repair,
    Reservation, Result,
};
use layout::{GuestOffset, GuestRange, HostOffset, HostRange};
use ring::Iov;
use std::cell::{Cell, RefCell};
use std::rc::Rc;
use store::{Store, ZeroMode};

/// The size of a guest's disk is a multiple of this, bytes.
const SECTOR: u64 = 512;

/// Largest disk we serve, bytes: what a signed 64-bit file offset reaches, in whole sectors.
const MAX_SIZE: u64 = i64::MAX as u64 & !(SECTOR - 1);

/// An open raw image.
pub(crate) struct RawImage {
    store: Rc<dyn Store>,
    read_only: bool,
    size: Cell<u64>,
    /// What the bytes lie in.
    format: Format,
    /// If they are encrypted.
    key_slots: Option<KeySlots>,
    poison: RefCell<Option<Error>>,
}

impl RawImage {
    fn error(&self, kind: ErrorKind, what: impl Into<String>) -> Error {
        Error::new(kind, self.store.name(), None, what)
    }

    fn check_range(&self, range: GuestRange) -> Result<()> {
        if range.is_empty() || range.end().get() > self.size.get() {
            let what = format!("the range {range} does not lie within the disk's {} bytes", self.size.get());
            return Err(self.error(ErrorKind::InvalidArgument, what));
        }
        Ok(())
    }

    fn check_writable(&self) -> Result<()> {
        if self.read_only {
            return Err(self.error(ErrorKind::ReadOnly, "the image was opened read-only"));
        }
        match &*self.poison.borrow() {
            Some(first) => Err(Error::poisoned(self.store.name(), first)),
            None => Ok(()),
        }
    }

    async fn barrier(&self) -> Result<()> {
        self.store.flush().await.map_err(|error| {
            let error = Error::from(error);
            self.poison.borrow_mut().get_or_insert_with(|| error.clone());
            error
        })
    }
}

impl Image for RawImage {
    fn key_slots(&self) -> Option<KeySlots> {
        self.key_slots.clone()
    }

    fn format(&self) -> Format {
        self.format
    }

    fn store(&self) -> &Rc<dyn Store> {
        &self.store
    }

    fn size(&self) -> u64 {
        self.size.get()
    }

    fn cluster_size(&self) -> u64 {
        1
    }

    fn read_only(&self) -> bool {
        self.read_only
    }

    fn backing(&self) -> Option<BackingRef> {
        None
    }

    fn info(&self) -> ImageInfo {
        ImageInfo::default()
    }

    fn lookup(&self, range: GuestRange) -> Result<Option<Mapped>> {
        self.check_range(range)?;
        Ok(Some(Mapped { len: range.len(), mapping: Mapping::Data(HostOffset(range.start().get())) }))
    }

    fn load(&self, range: GuestRange) -> ImageFuture<'_, ()> {
        Box::pin(async move { self.check_range(range) })
    }

    fn reserve(&self, _: GuestRange, _: Purpose) -> ImageFuture<'_, Reservation> {
        Box::pin(async {
            Err(self
                .error(ErrorKind::Unsupported, "every byte of a raw image is allocated; there is nothing to reserve"))
        })
    }

    fn write_zeroes(&self, range: GuestRange, unmap: bool, _: bool) -> ImageFuture<'_, ()> {
        Box::pin(async move {
            self.check_writable()?;
            self.check_range(range)?;
            let host = HostRange::new(HostOffset(range.start().get()), range.len());
            Ok(self.store.zero(host, ZeroMode { unmap }).await?)
        })
    }

    fn is_dirty(&self) -> bool {
        false
    }

    fn commit(&self) -> ImageFuture<'_, ()> {
        Box::pin(async {
            if self.read_only {
                return Ok(());
            }
            self.check_writable()?;
            self.barrier().await
        })
    }

    fn settle(&self) -> ImageFuture<'_, ()> {
        self.commit()
    }

    fn preallocate(&self, from: GuestOffset, how: Preallocation) -> ImageFuture<'_, ()> {
        Box::pin(async move {
            self.check_writable()?;
            let all = HostRange::between(HostOffset(from.get()), HostOffset(self.size.get()));
            match how {
                Preallocation::Off => return Ok(()),
                Preallocation::Metadata => {
                    let what = "raw images have no metadata to preallocate; 'falloc' and 'full' are what there is";
                    return Err(self.error(ErrorKind::InvalidArgument, what));
                }
                Preallocation::Falloc => self.store.allocate(all).await?,
                Preallocation::Full => {
                    let zeros = Iov::zeroed(1 << 20);
                    let mut rest = all;
                    while !rest.is_empty() {
                        let part = rest.first(zeros.len() as u64);
                        self.store.write(part.start(), zeros.slice(0..part.len() as usize), false).await?;
                        rest = rest.skip(part.len());
                    }
                }
            }
            self.barrier().await
        })
    }

    fn resize(&self, size: u64) -> ImageFuture<'_, ()> {
        Box::pin(async move {
            self.check_writable()?;
            let old = self.size.get();
            if !size.is_multiple_of(SECTOR) || size > MAX_SIZE {
                let what = format!("the size of a disk is a multiple of {SECTOR} bytes ({size} were asked for)");
                return Err(self.error(ErrorKind::InvalidArgument, what));
            }
            if self.store.size() < size || size < old {
                self.store.set_size(size).await?;
            }
            self.barrier().await?;
            self.size.set(size);
            Ok(())
        })
    }

    fn set_backing(&self, backing: Option<BackingRef>) -> ImageFuture<'_, ()> {
        Box::pin(async move {
            match backing {
                None => self.commit().await,
                Some(_) => Err(self.error(ErrorKind::Unsupported, "a raw image cannot name a backing file; use QED")),
            }
        })
    }

    fn check(&self, _: Repair) -> ImageFuture<'_, CheckReport> {
        Box::pin(async { Err(self.error(ErrorKind::Unsupported, "this image format does not support checks")) })
    }

    fn poisoned(&self) -> Option<Error> {
        self.poison.borrow().clone()
    }

    fn close(&self) -> ImageFuture<'_, ()> {
        Box::pin(async {
            let settled = if self.read_only || self.poison.borrow().is_some() { Ok(()) } else { self.commit().await };
            let closed = self.store.close().await.map_err(Error::from);
            settled.and(closed)
        })
    }
}
