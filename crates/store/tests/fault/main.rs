//! The fault store: its rules, and what its power cuts leave behind.

extern crate headwater_store as store;

mod power;
mod rules;

use layout::{HostOffset, HostRange};
use ring::Iov;
use ring::sim::Sim;
use std::rc::Rc;
use store::Store;
use store::fault::FaultStore;
use store::memory::MemoryStore;

/// Runs `test` on a fault store over `bytes`.
pub(crate) fn over<T>(bytes: &[u8], test: impl AsyncFnOnce(Rc<FaultStore>, Rc<MemoryStore>) -> T) -> T {
    let memory = MemoryStore::from_bytes("disk", bytes);
    Sim::new(7).block_on(async move { test(FaultStore::new(memory.clone(), 42), memory).await })
}

pub(crate) fn range(start: u64, len: u64) -> HostRange {
    HostRange::new(HostOffset(start), len)
}

pub(crate) async fn write(store: &FaultStore, at: u64, bytes: &[u8]) -> store::Result<()> {
    store.write(HostOffset(at), Iov::from_slice(bytes), false).await
}

/// Lets all that can run do so.
pub(crate) async fn settle() {
    for _ in 0..20 {
        ring::yield_now().await;
    }
}
