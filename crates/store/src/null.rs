//! A store that keeps nothing: reads are zeros, writes are forgotten. For measuring what is above it.

use crate::{Backing, Error, ErrorKind, HostExtent, IoFuture, Limits, Operation, Store, ZeroMode};
use layout::{HostOffset, HostRange};
use ring::Iov;
use std::rc::Rc;
use std::time::Duration;

/// See the module.
pub struct NullStore {
    name: String,
    size: u64,
    latency: Duration,
    read_only: bool,
}

impl NullStore {
    /// `size` bytes; every request takes `latency`.
    pub fn new(name: &str, size: u64, latency: Duration, read_only: bool) -> Rc<Self> {
        Rc::new(Self { name: name.to_owned(), size, latency, read_only })
    }

    fn done(&self) -> IoFuture<'_, ()> {
        Box::pin(async {
            if !self.latency.is_zero() {
                ring::sleep(self.latency).await;
            }
            Ok(())
        })
    }

    /// A change up to `end`, which fits or is an error.
    fn change(&self, operation: Operation, end: Option<u64>) -> IoFuture<'_, ()> {
        let (kind, why) = match end {
            _ if self.read_only => (ErrorKind::ReadOnly, "it was opened read-only"),
            Some(end) if end <= self.size => return self.done(),
            _ => (ErrorKind::OutOfRange, "its size cannot change"),
        };
        let error = Error::new(kind, operation, &self.name, None, why);
        Box::pin(async { Err(error) })
    }
}

impl Store for NullStore {
    fn name(&self) -> &str {
        &self.name
    }

    fn protocol(&self) -> &'static str {
        "null-co"
    }

    fn size(&self) -> u64 {
        self.size
    }

    fn limits(&self) -> Limits {
        Limits { offset_align: 1, memory_align: 1, read_only: self.read_only, sparse: false, fixed_size: true }
    }

    fn read(&self, _: HostOffset, into: Iov) -> IoFuture<'_, ()> {
        into.fill(0);
        self.done()
    }

    fn write(&self, at: HostOffset, from: Iov, _: bool) -> IoFuture<'_, ()> {
        self.change(Operation::Write, at.get().checked_add(from.len() as u64))
    }

    fn flush(&self) -> IoFuture<'_, ()> {
        self.done()
    }

    fn zero(&self, range: HostRange, _: ZeroMode) -> IoFuture<'_, ()> {
        self.change(Operation::Zero, Some(range.end().get()))
    }

    fn set_size(&self, size: u64) -> IoFuture<'_, ()> {
        self.change(Operation::SetSize, (size == self.size).then_some(size))
    }

    fn allocate(&self, _: HostRange) -> IoFuture<'_, ()> {
        self.done()
    }

    fn extent(&self, range: HostRange) -> IoFuture<'_, HostExtent> {
        Box::pin(async move { Ok(HostExtent { len: range.len(), backing: Backing::Hole }) })
    }

    fn close(&self) -> IoFuture<'_, ()> {
        Box::pin(async { Ok(()) })
    }
}
