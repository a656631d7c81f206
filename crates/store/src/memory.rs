//! Bytes in memory: for tests, for the simulation, and for scratch disks.

use crate::{HostExtent, IoFuture, Limits, Store, ZeroMode};
use layout::{HostOffset, HostRange};
use ring::Iov;
use std::rc::Rc;

/// Bytes in memory, sparse (pages of zeros are not held).
pub struct MemoryStore {
    _todo: (),
}

impl MemoryStore {
    /// `size` bytes of zeros, called `name` in messages.
    pub fn new(name: &str, size: u64) -> Rc<Self> {
        let _ = (name, size);
        todo!()
    }

    /// Holding a copy of `bytes`.
    pub fn from_bytes(name: &str, bytes: &[u8]) -> Rc<Self> {
        let _ = (name, bytes);
        todo!()
    }

    /// All bytes, copied out (for stores that fit in memory twice).
    pub fn to_vec(&self) -> Vec<u8> {
        todo!()
    }

    /// The same bytes behind a store that refuses writes.
    pub fn read_only(&self) -> Rc<Self> {
        todo!()
    }
}

impl Store for MemoryStore {
    fn name(&self) -> &str {
        todo!()
    }
    fn size(&self) -> u64 {
        todo!()
    }
    fn limits(&self) -> Limits {
        todo!()
    }
    fn read(&self, _at: HostOffset, _into: Iov) -> IoFuture<'_, ()> {
        todo!()
    }
    fn write(&self, _at: HostOffset, _from: Iov, _fua: bool) -> IoFuture<'_, ()> {
        todo!()
    }
    fn flush(&self) -> IoFuture<'_, ()> {
        todo!()
    }
    fn zero(&self, _range: HostRange, _mode: ZeroMode) -> IoFuture<'_, ()> {
        todo!()
    }
    fn set_size(&self, _size: u64) -> IoFuture<'_, ()> {
        todo!()
    }
    fn allocate(&self, _range: HostRange) -> IoFuture<'_, ()> {
        todo!()
    }
    fn extent(&self, _range: HostRange) -> IoFuture<'_, HostExtent> {
        todo!()
    }
    fn close(&self) -> IoFuture<'_, ()> {
        todo!()
    }
}
