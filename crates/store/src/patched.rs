//! A store some of whose bytes are others, read only: what a journal says that has not reached its place yet, without writing it there.
//!
//! **Invariants.** Later patches lie over earlier ones. What is not patched shows the store below; it must not change meanwhile. The
//! memory held is that of the patches' bytes; stretches of zeros cost nothing but their entry.

use crate::{Backing, Error, ErrorKind, HostExtent, IoFuture, Limits, Operation, Store, ZeroMode};
use layout::{HostOffset, HostRange};
use ring::Iov;
use std::collections::BTreeMap;
use std::rc::Rc;

/// What lies over a store.
#[derive(Clone, Debug, Default)]
pub struct Patches {
    /// By their starts; no two overlap.
    stretches: BTreeMap<u64, Stretch>,
}

#[derive(Clone, Debug)]
struct Stretch {
    len: u64,
    /// None: zeros.
    bytes: Option<Rc<[u8]>>,
    /// Where in the bytes it begins.
    skip: usize,
}

impl Stretch {
    /// What is left behind its first `len` bytes.
    fn behind(&self, len: u64) -> Self {
        Self { len: self.len - len, bytes: self.bytes.clone(), skip: self.skip + len as usize }
    }

    fn backing(&self) -> Backing {
        if self.bytes.is_some() { Backing::Data } else { Backing::Hole }
    }
}

impl Patches {
    /// Bytes from `at` on; those past the end of the address space are left out.
    pub fn write(&mut self, at: HostOffset, bytes: &[u8]) {
        let range = at.range(bytes.len() as u64);
        self.put(range, Stretch { len: range.len(), bytes: Some(bytes.into()), skip: 0 });
    }

    /// Zeros.
    pub fn zero(&mut self, range: HostRange) {
        self.put(range, Stretch { len: range.len(), bytes: None, skip: 0 });
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.stretches.is_empty()
    }

    /// How many stretches there are: what it costs to hold them, besides their bytes.
    pub fn stretches(&self) -> usize {
        self.stretches.len()
    }

    fn put(&mut self, range: HostRange, stretch: Stretch) {
        if range.is_empty() {
            return;
        }
        let (start, end) = (range.start().get(), range.end().get());
        // What reaches over the new one's ends is cut off there.
        for cut in [start, end] {
            let before = self.stretches.range_mut(..cut).next_back();
            if let Some((at, old)) = before.filter(|(at, old)| **at + old.len > cut) {
                let rest = old.behind(cut - at);
                old.len = cut - at;
                self.stretches.insert(cut, rest);
            }
        }
        let covered: Vec<u64> = self.stretches.range(start..end).map(|(at, _)| *at).collect();
        for at in covered {
            self.stretches.remove(&at);
        }
        self.stretches.insert(start, stretch);
    }

    /// Those that touch `range`: where they touch it, and what they hold there.
    fn touching(&self, range: HostRange) -> impl Iterator<Item = (HostRange, Stretch)> {
        let first = self.stretches.range(..range.start().get()).next_back().map_or(0, |(at, _)| *at);
        self.stretches.range(first..range.end().get()).filter_map(move |(at, stretch)| {
            let whole = HostOffset(*at).range(stretch.len);
            let part = whole.intersect(range);
            (!part.is_empty())
                .then(|| (part, Stretch { len: part.len(), ..stretch.behind(part.start() - whole.start()) }))
        })
    }
}

/// A store with patches over it.
pub struct PatchedStore {
    inner: Rc<dyn Store>,
    patches: Patches,
    size: u64,
}

impl PatchedStore {
    /// `inner` with `patches` over it, `size` bytes long (or as long as it is, if that is more).
    pub fn new(inner: Rc<dyn Store>, patches: Patches, size: u64) -> Rc<Self> {
        let size = size.max(inner.size());
        Rc::new(Self { inner, patches, size })
    }

    fn refuse(&self, operation: Operation, range: Option<HostRange>) -> IoFuture<'_, ()> {
        let why = "what a journal lies over is only read";
        let error = Error::new(ErrorKind::ReadOnly, operation, self.inner.name(), range, why);
        Box::pin(async { Err(error) })
    }
}

impl Store for PatchedStore {
    fn name(&self) -> &str {
        self.inner.name()
    }

    fn size(&self) -> u64 {
        self.size
    }

    fn limits(&self) -> Limits {
        Limits { read_only: true, ..self.inner.limits() }
    }

    fn read(&self, at: HostOffset, into: Iov) -> IoFuture<'_, ()> {
        Box::pin(async move {
            let range = at.range(into.len() as u64);
            self.inner.read(at, into.clone()).await?;
            for (part, stretch) in self.patches.touching(range) {
                let inside = (part.start() - at) as usize;
                match &stretch.bytes {
                    Some(bytes) => into.write(inside, &bytes[stretch.skip..][..part.len() as usize]),
                    None => into.slice(inside..inside + part.len() as usize).fill(0),
                }
            }
            Ok(())
        })
    }

    fn write(&self, at: HostOffset, from: Iov, _: bool) -> IoFuture<'_, ()> {
        self.refuse(Operation::Write, Some(at.range(from.len() as u64)))
    }

    fn flush(&self) -> IoFuture<'_, ()> {
        Box::pin(async { Ok(()) })
    }

    fn zero(&self, range: HostRange, _: ZeroMode) -> IoFuture<'_, ()> {
        self.refuse(Operation::Zero, Some(range))
    }

    fn set_size(&self, _: u64) -> IoFuture<'_, ()> {
        self.refuse(Operation::SetSize, None)
    }

    fn allocate(&self, range: HostRange) -> IoFuture<'_, ()> {
        self.refuse(Operation::Allocate, Some(range))
    }

    fn extent(&self, range: HostRange) -> IoFuture<'_, HostExtent> {
        Box::pin(async move {
            match self.patches.touching(range).next() {
                Some((part, stretch)) if part.start() == range.start() => {
                    Ok(HostExtent { len: part.len(), backing: stretch.backing() })
                }
                Some((part, _)) => self.inner.extent(HostRange::between(range.start(), part.start())).await,
                None => self.inner.extent(range).await,
            }
        })
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::MemoryStore;
    use proptest::prelude::*;
    use ring::sim::Sim;

    const LEN: usize = 400;

    async fn bytes(store: &PatchedStore, at: usize, len: usize) -> Vec<u8> {
        let into = Iov::from_slice(&vec![0xee; len]);
        store.read(HostOffset(at as u64), into.clone()).await.unwrap();
        into.to_vec()
    }

    proptest! {
        /// Whatever lies over whatever: it reads as if the patches had been written.
        #[test]
        fn it_reads_as_if_it_had_been_written(
            patches in prop::collection::vec((0..LEN, 0..120_usize, any::<Option<u8>>()), 0..12),
            (at, len) in (0..LEN, 0..LEN),
        ) {
            let mut model: Vec<u8> = (0..LEN).map(|n| n as u8).collect();
            let inner = MemoryStore::from_bytes("m", &model);
            model.resize(3 * LEN, 0);
            let mut over = Patches::default();
            for (start, len, fill) in patches {
                model[start..start + len].fill(fill.unwrap_or(0));
                let range = HostOffset(start as u64).range(len as u64);
                match fill {
                    Some(fill) => over.write(range.start(), &vec![fill; len]),
                    None => over.zero(range),
                }
            }
            let store = PatchedStore::new(inner, over, 2 * LEN as u64);
            prop_assert_eq!(store.size(), 2 * LEN as u64);
            Sim::new(1).block_on(async {
                assert_eq!(bytes(&store, at, len).await, &model[at..at + len]);
                let extent = store.extent(HostOffset(at as u64).range(len as u64 + 1)).await.unwrap();
                assert!(extent.len >= 1 && extent.len <= len as u64 + 1);
                let run = &model[at..at + extent.len as usize];
                assert!(extent.backing == Backing::Data || run.iter().all(|byte| *byte == 0));
            });
        }
    }

    #[test]
    fn nothing_is_written() {
        let inner = MemoryStore::from_bytes("m", &[1; 100]);
        let mut patches = Patches::default();
        assert!(patches.is_empty());
        patches.write(HostOffset(u64::MAX - 2), &[1; 10]);
        patches.zero(HostOffset(5).range(0));
        assert_eq!(patches.stretches(), 1);
        let store = PatchedStore::new(inner.clone(), patches, 0);
        Sim::new(1).block_on(async {
            let refused = store.write(HostOffset(0), Iov::zeroed(1), false).await.unwrap_err();
            assert_eq!((refused.kind(), store.limits().read_only), (ErrorKind::ReadOnly, true));
            store.flush().await.unwrap();
            store.close().await.unwrap();
            assert_eq!(inner.to_vec(), [1; 100]);
        });
    }
}
