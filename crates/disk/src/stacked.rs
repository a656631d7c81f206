//! A disk as a store: what one stack of images shows is the bytes in which another one lies (a filter over a format, a format within a
//! format).

use crate::{Disk, Error, ErrorKind};
use layout::{GuestOffset, GuestRange, HostOffset, HostRange};
use ring::Iov;
use std::rc::Rc;
use store::{Backing, HostExtent, IoFuture, Limits, Operation, Store, ZeroMode};

/// See the module.
pub struct DiskStore {
    disk: Rc<Disk>,
}

impl DiskStore {
    /// What `disk` shows; closing it closes the disk.
    pub fn new(disk: Rc<Disk>) -> Rc<Self> {
        Rc::new(Self { disk })
    }

    /// The disk's error as a store's.
    fn error(&self, operation: Operation, range: Option<HostRange>, error: &Error) -> store::Error {
        let kind = match error.kind() {
            ErrorKind::Store => error.store_error().map_or(store::ErrorKind::Io, store::Error::kind),
            ErrorKind::ReadOnly => store::ErrorKind::ReadOnly,
            ErrorKind::Unsupported => store::ErrorKind::Unsupported,
            ErrorKind::InvalidArgument => store::ErrorKind::OutOfRange,
            _ => store::ErrorKind::Io,
        };
        store::Error::new(kind, operation, self.name(), range, error.to_string())
    }

    /// What of `range` lies within the disk.
    fn inside(&self, range: HostRange) -> GuestRange {
        let start = range.start().get();
        GuestRange::new(GuestOffset(start), self.size().saturating_sub(start).min(range.len()))
    }

    /// Grows the disk so far that `end` lies within.
    async fn reach(&self, end: HostOffset) -> Result<(), Error> {
        if end.get() > self.size() { self.disk.resize(end.get()).await } else { Ok(()) }
    }
}

impl Store for DiskStore {
    fn name(&self) -> &str {
        self.disk.name()
    }

    fn size(&self) -> u64 {
        self.disk.size()
    }

    fn limits(&self) -> Limits {
        Limits {
            offset_align: self.disk.request_alignment(),
            memory_align: 1,
            read_only: self.disk.read_only(),
            sparse: true,
            fixed_size: false,
        }
    }

    fn read(&self, at: HostOffset, into: Iov) -> IoFuture<'_, ()> {
        Box::pin(async move {
            let range = at.range(into.len() as u64);
            let inside = self.inside(range);
            let len = inside.len() as usize;
            into.slice(len..into.len()).fill(0);
            if len == 0 {
                return Ok(());
            }
            let read = self.disk.read(inside.start(), into.slice(0..len)).await;
            read.map_err(|error| self.error(Operation::Read, Some(range), &error))
        })
    }

    fn write(&self, at: HostOffset, from: Iov, fua: bool) -> IoFuture<'_, ()> {
        Box::pin(async move {
            let range = at.range(from.len() as u64);
            let written = async {
                self.reach(range.end()).await?;
                self.disk.write(GuestOffset(at.get()), from, fua).await
            };
            written.await.map_err(|error| self.error(Operation::Write, Some(range), &error))
        })
    }

    fn flush(&self) -> IoFuture<'_, ()> {
        Box::pin(async move { self.disk.flush().await.map_err(|error| self.error(Operation::Flush, None, &error)) })
    }

    fn zero(&self, range: HostRange, mode: ZeroMode) -> IoFuture<'_, ()> {
        Box::pin(async move {
            let zeroed = async {
                self.reach(range.end()).await?;
                self.disk.write_zeroes(self.inside(range), mode.unmap, false).await
            };
            zeroed.await.map_err(|error| self.error(Operation::Zero, Some(range), &error))
        })
    }

    fn set_size(&self, size: u64) -> IoFuture<'_, ()> {
        Box::pin(
            async move { self.disk.resize(size).await.map_err(|error| self.error(Operation::SetSize, None, &error)) },
        )
    }

    fn allocate(&self, range: HostRange) -> IoFuture<'_, ()> {
        Box::pin(async move {
            self.reach(range.end()).await.map_err(|error| self.error(Operation::Allocate, Some(range), &error))
        })
    }

    fn extent(&self, range: HostRange) -> IoFuture<'_, HostExtent> {
        Box::pin(async move {
            let inside = self.inside(range);
            if inside.is_empty() {
                return Ok(HostExtent { len: range.len(), backing: Backing::Hole });
            }
            let status = self.disk.status(inside).await;
            let status = status.map_err(|error| self.error(Operation::Extent, Some(range), &error))?;
            let backing = if status.zero { Backing::Hole } else { Backing::Data };
            Ok(HostExtent { len: status.len, backing })
        })
    }

    fn close(&self) -> IoFuture<'_, ()> {
        Box::pin(async move {
            let closed = self.disk.close().await;
            closed.map_err(|error| self.error(Operation::Flush, None, &error))
        })
    }
}
