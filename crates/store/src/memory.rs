//! Bytes in memory: for tests, for the simulation, and for scratch disks.
//!
//! Pages of zeros are not held. Every operation gives other tasks a turn first, so that operations interleave as they do
//! on a real medium.

use crate::{Backing, Error, ErrorKind, HostExtent, IoFuture, Limits, Operation, Result, Store, ZeroMode};
use layout::{HostOffset, HostRange};
use ring::Iov;
use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::rc::Rc;

/// Bytes held together; a page that becomes zero as a whole is given up.
const PAGE: u64 = 4096;

#[derive(Default)]
struct Bytes {
    pages: RefCell<BTreeMap<u64, Box<[u8]>>>,
    size: Cell<u64>,
}

/// Bytes in memory, sparse (pages of zeros are not held).
pub struct MemoryStore {
    name: String,
    bytes: Rc<Bytes>,
    limits: Limits,
}

impl MemoryStore {
    /// `size` bytes of zeros, called `name` in messages.
    pub fn new(name: &str, size: u64) -> Rc<Self> {
        let bytes = Rc::new(Bytes::default());
        bytes.size.set(size);
        let limits = Limits { offset_align: 1, memory_align: 1, read_only: false, sparse: true, fixed_size: false };
        Rc::new(Self { name: name.to_owned(), bytes, limits })
    }

    /// Holding a copy of `bytes`.
    pub fn from_bytes(name: &str, bytes: &[u8]) -> Rc<Self> {
        let store = Self::new(name, 0);
        store.bytes.write(0, bytes);
        store
    }

    /// The same bytes under other limits (what a device with them would refuse is refused; alignment only shows).
    pub fn with_limits(&self, limits: Limits) -> Rc<Self> {
        Rc::new(Self { name: self.name.clone(), bytes: self.bytes.clone(), limits })
    }

    /// All bytes, copied out (for stores that fit in memory twice).
    pub fn to_vec(&self) -> Vec<u8> {
        let mut out = vec![0; self.bytes.size.get() as usize];
        self.bytes.read(0, &mut out);
        out
    }

    /// The same bytes behind a store that refuses writes.
    pub fn read_only(&self) -> Rc<Self> {
        self.with_limits(Limits { read_only: true, ..self.limits })
    }

    fn writable(&self, operation: Operation, range: Option<HostRange>, end: u64) -> Result<()> {
        let refuse = |kind, why: &str| Err(Error::new(kind, operation, &self.name, range, why));
        if self.limits.read_only {
            return refuse(ErrorKind::ReadOnly, "it was opened read-only");
        }
        if self.limits.fixed_size && end > self.bytes.size.get() {
            return refuse(ErrorKind::OutOfRange, "its size is fixed");
        }
        Ok(())
    }
}

impl Bytes {
    fn read(&self, at: u64, out: &mut [u8]) {
        out.fill(0);
        let pages = self.pages.borrow();
        let end = at + out.len() as u64;
        for (page, bytes) in pages.range(at / PAGE..end.div_ceil(PAGE)) {
            let start = (page * PAGE).max(at);
            let stop = ((page + 1) * PAGE).min(end);
            let from = (start - page * PAGE) as usize;
            let len = (stop - start) as usize;
            out[(start - at) as usize..][..len].copy_from_slice(&bytes[from..from + len]);
        }
    }

    fn write(&self, at: u64, bytes: &[u8]) {
        let mut pages = self.pages.borrow_mut();
        let mut done = 0;
        while done < bytes.len() {
            let here = at + done as u64;
            let within = (here % PAGE) as usize;
            let len = (PAGE as usize - within).min(bytes.len() - done);
            let page = pages.entry(here / PAGE).or_insert_with(|| vec![0; PAGE as usize].into_boxed_slice());
            page[within..within + len].copy_from_slice(&bytes[done..done + len]);
            done += len;
        }
        self.size.set(self.size.get().max(at + bytes.len() as u64));
    }

    fn clear(&self, start: u64, end: u64) {
        let mut pages = self.pages.borrow_mut();
        let touched: Vec<u64> = pages.range(start / PAGE..end.div_ceil(PAGE)).map(|(page, _)| *page).collect();
        for page in touched {
            let from = start.saturating_sub(page * PAGE).min(PAGE) as usize;
            let to = (end - page * PAGE).min(PAGE) as usize;
            if let Some(bytes) = pages.get_mut(&page) {
                bytes[from..to].fill(0);
                if bytes.iter().all(|byte| *byte == 0) {
                    pages.remove(&page);
                }
            }
        }
    }
}

impl Store for MemoryStore {
    fn name(&self) -> &str {
        &self.name
    }

    fn size(&self) -> u64 {
        self.bytes.size.get()
    }

    fn limits(&self) -> Limits {
        self.limits
    }

    fn read(&self, at: HostOffset, into: Iov) -> IoFuture<'_, ()> {
        Box::pin(async move {
            ring::yield_now().await;
            let mut out = vec![0; into.len()];
            self.bytes.read(at.get(), &mut out);
            into.write(0, &out);
            Ok(())
        })
    }

    fn write(&self, at: HostOffset, from: Iov, _fua: bool) -> IoFuture<'_, ()> {
        Box::pin(async move {
            let range = HostRange::new(at, from.len() as u64);
            self.writable(Operation::Write, Some(range), range.end().get())?;
            ring::yield_now().await;
            self.bytes.write(at.get(), &from.to_vec());
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
            self.writable(Operation::Zero, Some(range), range.end().get())?;
            ring::yield_now().await;
            self.bytes.clear(range.start().get(), range.end().get());
            self.bytes.size.set(self.bytes.size.get().max(range.end().get()));
            Ok(())
        })
    }

    fn set_size(&self, size: u64) -> IoFuture<'_, ()> {
        Box::pin(async move {
            self.writable(Operation::SetSize, None, size)?;
            if self.limits.fixed_size && size != self.bytes.size.get() {
                return Err(Error::new(ErrorKind::OutOfRange, Operation::SetSize, &self.name, None, "its size is fixed"));
            }
            ring::yield_now().await;
            self.bytes.clear(size, self.bytes.size.get().max(size));
            self.bytes.size.set(size);
            Ok(())
        })
    }

    fn allocate(&self, range: HostRange) -> IoFuture<'_, ()> {
        Box::pin(async move {
            self.writable(Operation::Allocate, Some(range), range.end().get())?;
            ring::yield_now().await;
            self.bytes.size.set(self.bytes.size.get().max(range.end().get()));
            Ok(())
        })
    }

    fn extent(&self, range: HostRange) -> IoFuture<'_, HostExtent> {
        Box::pin(async move {
            ring::yield_now().await;
            let (start, end) = (range.start().get(), range.end().get());
            let pages = self.bytes.pages.borrow();
            let first = start / PAGE;
            let (backing, stop) = if pages.contains_key(&first) {
                let mut page = first;
                while page * PAGE < end && pages.contains_key(&page) {
                    page += 1;
                }
                (Backing::Data, page * PAGE)
            } else {
                let next = pages.range(first..).next().map_or(u64::MAX, |(page, _)| page * PAGE);
                (Backing::Hole, next)
            };
            Ok(HostExtent { len: stop.min(end) - start, backing })
        })
    }

    fn close(&self) -> IoFuture<'_, ()> {
        Box::pin(async { Ok(()) })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pages_of_zeros_are_given_up_and_ends_are_kept() {
        let store = MemoryStore::from_bytes("m", &[1; 10000]);
        store.bytes.clear(5, 9000);
        let bytes = store.to_vec();
        assert_eq!(&bytes[..5], &[1; 5]);
        assert!(bytes[5..9000].iter().all(|b| *b == 0));
        assert_eq!(&bytes[9000..], &[1; 1000]);
        assert_eq!(store.bytes.pages.borrow().len(), 2);
    }
}
