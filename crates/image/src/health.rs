//! Whether an image may still be written to.
//!
//! **Invariants.**
//! * The first failure of a metadata write or a barrier stays: from then on every change is refused with it. Reads go on.
//! * A barrier that has returned `Ok` covers everything that had completed when it was called.

use crate::{Error, ErrorKind, Result};
use futures_util::StreamExt;
use futures_util::stream::FuturesUnordered;
use layout::{GuestRange, HostOffset};
use ring::Iov;
use ring::sync::Event;
use std::cell::RefCell;
use std::rc::Rc;
use store::Store;

/// Writes of metadata under way at once.
const WRITES: usize = 8;

/// The health of one image.
pub(crate) struct Health {
    store: Rc<dyn Store>,
    read_only: bool,
    poison: RefCell<Option<Error>>,
    /// Told when the image is poisoned.
    failed: Rc<Event>,
}

impl Health {
    /// Of an image in `store`; `failed` is told when it is poisoned.
    pub(crate) fn new(store: Rc<dyn Store>, read_only: bool, failed: Rc<Event>) -> Self {
        Self { store, read_only, poison: RefCell::new(None), failed }
    }

    /// Whether writes are refused from the start.
    pub(crate) fn read_only(&self) -> bool {
        self.read_only
    }

    /// The image's name.
    pub(crate) fn name(&self) -> &str {
        self.store.name()
    }

    /// An error of this image.
    pub(crate) fn error(&self, kind: ErrorKind, offset: Option<HostOffset>, what: impl Into<String>) -> Error {
        Error::new(kind, self.store.name(), offset, what)
    }

    /// What contradicts the specification.
    pub(crate) fn corrupt(&self, offset: HostOffset, what: impl Into<String>) -> Error {
        self.error(ErrorKind::Corrupt, Some(offset), what)
    }

    /// The first failure stays; returns the given one.
    pub(crate) fn fail(&self, error: Error) -> Error {
        let mut poison = self.poison.borrow_mut();
        if poison.is_none() {
            tracing::trace!(target: "image_poisoned", image = self.store.name(), %error);
            tracing::error!(image = self.store.name(), %error, "the image refuses writes from now on");
            *poison = Some(error.clone());
            self.failed.notify_all();
        }
        error
    }

    /// Whether it refuses writes after a failure.
    pub(crate) fn is_poisoned(&self) -> bool {
        self.poison.borrow().is_some()
    }

    /// That failure.
    pub(crate) fn poison(&self) -> Option<Error> {
        self.poison.borrow().clone()
    }

    /// What is answered to those who come after a failure.
    pub(crate) fn error_after(&self, first: &Error) -> Error {
        Error::poisoned(self.store.name(), first)
    }

    /// Fails when the image is read-only or poisoned.
    pub(crate) fn check_writable(&self) -> Result<()> {
        if self.read_only {
            return Err(self.error(ErrorKind::ReadOnly, None, "the image was opened read-only"));
        }
        self.check_poison()
    }

    /// Fails when the image is poisoned.
    pub(crate) fn check_poison(&self) -> Result<()> {
        match &*self.poison.borrow() {
            Some(first) => Err(self.error_after(first)),
            None => Ok(()),
        }
    }

    /// Fails when `range` is empty or does not lie within the first `size` bytes.
    pub(crate) fn check_range(&self, range: GuestRange, size: u64) -> Result<()> {
        if range.is_empty() || range.end().get() > size {
            let what = format!("the range {range} does not lie within the disk's {size} bytes");
            return Err(self.error(ErrorKind::InvalidArgument, None, what));
        }
        Ok(())
    }

    /// A barrier. Everything that completed is durable, or the image is poisoned.
    pub(crate) async fn barrier(&self) -> Result<()> {
        self.store.flush().await.map_err(|e| self.fail(e.into()))
    }

    /// A write of metadata. A failure poisons.
    pub(crate) async fn write(&self, at: HostOffset, bytes: Iov) -> Result<()> {
        self.store.write(at, bytes, false).await.map_err(|e| self.fail(e.into()))
    }

    /// Several writes of metadata at once. A failure poisons.
    pub(crate) async fn write_all(&self, writes: impl Iterator<Item = (HostOffset, Iov)>) -> Result<()> {
        let mut under_way = FuturesUnordered::new();
        let mut result = Ok(());
        for (at, bytes) in writes {
            if under_way.len() == WRITES {
                result = result.and(under_way.next().await.unwrap_or(Ok(())));
            }
            under_way.push(self.write(at, bytes));
        }
        while let Some(written) = under_way.next().await {
            result = result.and(written);
        }
        result
    }
}
