//! Bytes in memory: for tests, for the simulation, and for scratch disks.
//!
//! **Invariants.** An operation takes effect in one piece, at one moment between its start and its completion; before that
//! moment it gives way once, so that a deterministic executor can put others first. An operation whose future is dropped
//! before that moment never takes effect. Only pages that were written are held.

mod pages;

pub use pages::Snapshot;

use crate::{Backing, Error, ErrorKind, HostExtent, IoFuture, Limits, Operation, Result, Store, ZeroMode};
use layout::{HostOffset, HostRange};
use ring::Iov;
use std::cell::{Ref, RefCell};
use std::rc::Rc;

/// The longest a store can be, in bytes: what a file's length can say.
pub(crate) const SIZE_MAX: u64 = i64::MAX as u64;

/// Bytes in memory, sparse (what was never written, or zeroed, is not held).
pub struct MemoryStore {
    name: String,
    limits: Limits,
    content: Rc<RefCell<Snapshot>>,
}

impl MemoryStore {
    /// `size` bytes of zeros, called `name` in messages.
    pub fn new(name: &str, size: u64) -> Rc<Self> {
        Self::from_snapshot(name, Snapshot::zeros(size))
    }

    /// Holding a copy of `bytes`.
    pub fn from_bytes(name: &str, bytes: &[u8]) -> Rc<Self> {
        let mut content = Snapshot::zeros(bytes.len() as u64);
        content.write(0, bytes);
        Self::from_snapshot(name, content)
    }

    /// Holding what `content` holds. Costs no copy; pages are copied when they are first written.
    pub fn from_snapshot(name: &str, content: Snapshot) -> Rc<Self> {
        let limits = Limits { offset_align: 1, memory_align: 1, read_only: false, sparse: true, fixed_size: false };
        Rc::new(Self { name: name.to_owned(), limits, content: Rc::new(RefCell::new(content)) })
    }

    /// All bytes, copied out (for stores that fit in memory twice).
    pub fn to_vec(&self) -> Vec<u8> {
        self.content.borrow().to_vec()
    }

    /// What the store holds now, at no cost but one counter per page; later writes do not show in it.
    pub fn snapshot(&self) -> Snapshot {
        self.content.borrow().clone()
    }

    /// Puts back what `snapshot` holds, length included. Operations in flight take effect on top of it.
    pub fn restore(&self, snapshot: &Snapshot) {
        *self.content.borrow_mut() = snapshot.clone();
    }

    /// The same bytes behind a store that refuses writes.
    pub fn read_only(&self) -> Rc<Self> {
        self.with_limits(Limits { read_only: true, ..self.limits })
    }

    /// The same bytes behind a store that states (and as far as `read_only` and `fixed_size` go: keeps) other limits, to
    /// see what those above make of them. Any alignment goes on being served.
    pub fn with_limits(&self, limits: Limits) -> Rc<Self> {
        Rc::new(Self { name: self.name.clone(), limits, content: Rc::clone(&self.content) })
    }

    /// The bytes now, for looking at without an operation.
    pub fn peek(&self) -> Ref<'_, Snapshot> {
        self.content.borrow()
    }

    fn refuse(&self, kind: ErrorKind, operation: Operation, range: HostRange, why: &str) -> Error {
        Error::new(kind, operation, &self.name, Some(range), why)
    }

    /// The end of a change to `len` bytes at `at`, if such a change is possible here.
    fn end_of(&self, operation: Operation, at: HostOffset, len: u64) -> Result<u64> {
        let range = at.range(len);
        if self.limits.read_only {
            return Err(self.refuse(ErrorKind::ReadOnly, operation, range, "the store is read-only"));
        }
        match at.get().checked_add(len) {
            Some(end) if self.limits.fixed_size && end > self.size() => {
                Err(self.refuse(ErrorKind::OutOfRange, operation, range, "the store's size cannot change"))
            }
            Some(end) if end <= SIZE_MAX => Ok(end),
            _ => Err(self.refuse(ErrorKind::OutOfRange, operation, range, "no store can be that long")),
        }
    }
}

impl Store for MemoryStore {
    fn name(&self) -> &str {
        &self.name
    }

    fn size(&self) -> u64 {
        self.content.borrow().size()
    }

    fn limits(&self) -> Limits {
        self.limits
    }

    fn read(&self, at: HostOffset, into: Iov) -> IoFuture<'_, ()> {
        Box::pin(async move {
            ring::yield_now().await;
            self.content.borrow().read_iov(at.get(), &into);
            Ok(())
        })
    }

    fn write(&self, at: HostOffset, from: Iov, _fua: bool) -> IoFuture<'_, ()> {
        Box::pin(async move {
            ring::yield_now().await;
            self.end_of(Operation::Write, at, from.len() as u64)?;
            self.content.borrow_mut().write_iov(at.get(), &from);
            Ok(())
        })
    }

    fn flush(&self) -> IoFuture<'_, ()> {
        Box::pin(async move {
            ring::yield_now().await;
            Ok(())
        })
    }

    fn zero(&self, range: HostRange, _mode: ZeroMode) -> IoFuture<'_, ()> {
        Box::pin(async move {
            ring::yield_now().await;
            let end = self.end_of(Operation::Zero, range.start(), range.len())?;
            let mut content = self.content.borrow_mut();
            content.zero(range.start().get(), range.len());
            if !range.is_empty() && end > content.size() {
                content.set_size(end);
            }
            Ok(())
        })
    }

    fn set_size(&self, size: u64) -> IoFuture<'_, ()> {
        Box::pin(async move {
            ring::yield_now().await;
            if size == self.size() && !self.limits.read_only {
                return Ok(());
            }
            if self.limits.fixed_size {
                let range = HostRange::new(HostOffset::ZERO, size);
                return Err(self.refuse(ErrorKind::OutOfRange, Operation::SetSize, range, "its size cannot change"));
            }
            self.end_of(Operation::SetSize, HostOffset::ZERO, size)?;
            self.content.borrow_mut().set_size(size);
            Ok(())
        })
    }

    fn allocate(&self, range: HostRange) -> IoFuture<'_, ()> {
        Box::pin(async move {
            ring::yield_now().await;
            let end = self.end_of(Operation::Allocate, range.start(), range.len())?;
            let mut content = self.content.borrow_mut();
            if !range.is_empty() && end > content.size() {
                content.set_size(end);
            }
            Ok(())
        })
    }

    fn extent(&self, range: HostRange) -> IoFuture<'_, HostExtent> {
        Box::pin(async move {
            ring::yield_now().await;
            if range.is_empty() {
                return Err(self.refuse(
                    ErrorKind::OutOfRange,
                    Operation::Extent,
                    range,
                    "an empty range has no extent",
                ));
            }
            let (len, data) = self.content.borrow().run(range.start().get(), range.len());
            Ok(HostExtent { len, backing: if data { Backing::Data } else { Backing::Hole } })
        })
    }

    fn close(&self) -> IoFuture<'_, ()> {
        Box::pin(async { Ok(()) })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use ring::sim::Sim;

    #[test]
    fn snapshots_stand_still_and_come_back() {
        Sim::new(1).block_on(async {
            let store = MemoryStore::from_bytes("m", &[7; 10_000]);
            let before = store.snapshot();
            store.write(HostOffset(9_990), Iov::from_slice(&[1; 100]), false).await.unwrap();
            assert_eq!(store.size(), 10_090);
            assert_eq!(before.to_vec(), vec![7; 10_000]);
            assert_ne!(store.snapshot(), before);
            store.restore(&before);
            assert_eq!(store.to_vec(), vec![7; 10_000]);
        });
    }

    #[test]
    fn a_read_only_view_shares_the_bytes_and_refuses_every_change() {
        Sim::new(1).block_on(async {
            let store = MemoryStore::new("m", 100);
            let view = store.read_only();
            store.write(HostOffset(3), Iov::from_slice(b"x"), false).await.unwrap();
            assert_eq!(view.to_vec()[3], b'x');
            let all = HostRange::new(HostOffset(0), 10);
            for result in [
                view.write(HostOffset(0), Iov::zeroed(1), false).await,
                view.zero(all, ZeroMode::default()).await,
                view.set_size(7).await,
                view.allocate(all).await,
            ] {
                assert_eq!(result.unwrap_err().kind(), ErrorKind::ReadOnly);
            }
        });
    }

    #[test]
    fn a_fixed_size_stays() {
        Sim::new(1).block_on(async {
            let store = MemoryStore::new("m", 4096);
            let store = store.with_limits(Limits { fixed_size: true, sparse: false, ..store.limits() });
            let past = store.write(HostOffset(4090), Iov::zeroed(7), false).await;
            assert_eq!(past.unwrap_err().kind(), ErrorKind::OutOfRange);
            assert_eq!(store.set_size(4097).await.unwrap_err().kind(), ErrorKind::OutOfRange);
            store.set_size(4096).await.unwrap();
            store.write(HostOffset(4090), Iov::zeroed(6), false).await.unwrap();
            assert_eq!(store.size(), 4096);
        });
    }

    #[test]
    fn offsets_past_any_file_are_refused() {
        Sim::new(1).block_on(async {
            let store = MemoryStore::new("m", 0);
            for at in [SIZE_MAX, u64::MAX - 1, u64::MAX] {
                let error = store.write(HostOffset(at), Iov::zeroed(1), false).await.unwrap_err();
                assert_eq!(error.kind(), ErrorKind::OutOfRange);
            }
            let into = Iov::from_slice(&[9; 10]);
            store.read(HostOffset(u64::MAX - 3), into.clone()).await.unwrap();
            assert!(into.is_zero());
        });
    }

    #[test]
    fn operations_give_way() {
        Sim::new(1).block_on(async {
            let store = MemoryStore::new("m", 100);
            let mut write = store.write(HostOffset(0), Iov::from_slice(b"a"), false);
            assert!(futures_util::poll!(&mut write).is_pending());
            drop(write);
            assert_eq!(store.to_vec()[0], 0, "dropped before its moment, it never takes effect");
        });
    }
}
