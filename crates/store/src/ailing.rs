//! A decorator for trials of the whole daemon: a source that is slow, or broken for as long as a file exists. Tests inside the
//! house use [`crate::fault`], which can do far more; this one is steered from outside the process.

use crate::{Error, HostExtent, IoFuture, Limits, Operation, Store, ZeroMode};
use layout::{HostOffset, HostRange};
use ring::Iov;
use std::io;
use std::path::PathBuf;
use std::rc::Rc;
use std::time::Duration;

/// What ails a source.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Ailments {
    /// Every read takes this much longer.
    pub delay: Option<Duration>,
    /// Reads fail with `EIO` as long as this file exists.
    pub broken_while: Option<PathBuf>,
}

/// A store with [`Ailments`]. Only reads are affected.
pub struct AilingStore {
    inner: Rc<dyn Store>,
    ailments: Ailments,
}

impl AilingStore {
    /// `inner`, with what ails it.
    pub fn new(inner: Rc<dyn Store>, ailments: Ailments) -> Rc<Self> {
        Rc::new(Self { inner, ailments })
    }
}

impl Store for AilingStore {
    fn name(&self) -> &str {
        self.inner.name()
    }

    fn size(&self) -> u64 {
        self.inner.size()
    }

    fn limits(&self) -> Limits {
        self.inner.limits()
    }

    fn read(&self, at: HostOffset, into: Iov) -> IoFuture<'_, ()> {
        Box::pin(async move {
            if let Some(delay) = self.ailments.delay {
                ring::sleep(delay).await;
            }
            if self.ailments.broken_while.as_ref().is_some_and(|file| file.exists()) {
                let range = HostRange::new(at, into.len() as u64);
                let eio = io::Error::from_raw_os_error(libc::EIO);
                return Err(Error::from_io(Operation::Read, self.name(), Some(range), eio));
            }
            self.inner.read(at, into).await
        })
    }

    fn write(&self, at: HostOffset, from: Iov, fua: bool) -> IoFuture<'_, ()> {
        self.inner.write(at, from, fua)
    }

    fn flush(&self) -> IoFuture<'_, ()> {
        self.inner.flush()
    }

    fn zero(&self, range: HostRange, mode: ZeroMode) -> IoFuture<'_, ()> {
        self.inner.zero(range, mode)
    }

    fn set_size(&self, size: u64) -> IoFuture<'_, ()> {
        self.inner.set_size(size)
    }

    fn allocate(&self, range: HostRange) -> IoFuture<'_, ()> {
        self.inner.allocate(range)
    }

    fn extent(&self, range: HostRange) -> IoFuture<'_, HostExtent> {
        self.inner.extent(range)
    }

    fn locate(&self, at: HostOffset) -> (&str, HostOffset) {
        self.inner.locate(at)
    }

    fn files(&self) -> Vec<(&str, u64)> {
        self.inner.files()
    }

    fn close(&self) -> IoFuture<'_, ()> {
        self.inner.close()
    }
}
