//! A decorator that records every operation on a store, for tests that check order and for `--trace`.
//!
//! **Invariants.** Records stand in the order in which things happened: an operation starts when its future is first
//! polled, and ends when it has its answer or is dropped. The hash covers every record since the beginning, also those
//! no longer kept: two runs that did the same in the same order have the same hash. A [`Trace`] that is off costs one
//! look per operation.

use crate::{ErrorKind, HostExtent, IoFuture, Limits, Operation, Result, Store, ZeroMode};
use layout::{HostOffset, HostRange};
use ring::Iov;
use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::fmt;
use std::os::fd::OwnedFd;
use std::rc::Rc;
use std::sync::Arc;

/// What happened to an operation.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Moment {
    /// It began.
    Started,
    /// It succeeded.
    Succeeded,
    /// It failed.
    Failed(ErrorKind),
    /// Its future was dropped before it had an answer.
    Dropped,
}

/// One moment of one operation.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Record {
    /// The operation's number, in order of start, from 0.
    pub number: u64,
    /// What happened.
    pub moment: Moment,
    /// Whose operation: [`Store::name`].
    pub store: Rc<str>,
    /// Which.
    pub operation: Operation,
    /// Where, if it is about a range; for a change of length, from 0 up to the new length.
    pub range: Option<HostRange>,
    /// A write that is to be durable when it completes (FUA), or zeroing that may give space back.
    pub flagged: bool,
}

impl fmt::Display for Record {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "#{} {} '{}'", self.number, self.operation.verb(), self.store)?;
        if let Some(range) = self.range {
            write!(f, " {range}")?;
        }
        match (self.operation, self.flagged) {
            (Operation::Write, true) => write!(f, " fua")?,
            (Operation::Zero, true) => write!(f, " unmap")?,
            _ => {}
        }
        match self.moment {
            Moment::Started => write!(f, " started"),
            Moment::Succeeded => write!(f, " succeeded"),
            Moment::Failed(kind) => write!(f, " failed: {kind:?}"),
            Moment::Dropped => write!(f, " dropped"),
        }
    }
}

/// What was recorded. Clones share it; one trace may serve several stores.
#[derive(Clone)]
pub struct Trace {
    shared: Rc<Shared>,
}

struct Shared {
    on: Cell<bool>,
    keep: usize,
    watcher: Option<Box<Watcher>>,
    records: RefCell<VecDeque<Record>>,
    next: Cell<u64>,
    hash: Cell<u64>,
    counts: RefCell<[Count; OPERATIONS]>,
}

type Watcher = dyn Fn(&Record);

/// How often, and how much.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Count {
    /// Operations started.
    pub started: u64,
    /// Operations failed.
    pub failed: u64,
    /// Bytes of the ranges started.
    pub bytes: u64,
}

/// Kinds of operations, for arrays.
const OPERATIONS: usize = Operation::Extent as usize + 1;

impl Trace {
    /// Records nothing until it is switched on, and keeps nothing then but counts and the hash.
    pub fn off() -> Self {
        let trace = Self::build(0, None);
        trace.switch(false);
        trace
    }

    /// Keeps the last `records`.
    pub fn keeping(records: usize) -> Self {
        Self::build(records, None)
    }

    /// Hands each record to `watcher` as it is made.
    pub fn calling(watcher: impl Fn(&Record) + 'static) -> Self {
        Self::build(0, Some(Box::new(watcher)))
    }

    fn build(keep: usize, watcher: Option<Box<Watcher>>) -> Self {
        let shared = Shared {
            on: Cell::new(true),
            keep,
            watcher,
            records: RefCell::default(),
            next: Cell::new(0),
            hash: Cell::new(0),
            counts: RefCell::default(),
        };
        Self { shared: Rc::new(shared) }
    }

    /// Switches recording on or off. Operations that had started while it was on are still recorded when they end.
    pub fn switch(&self, on: bool) {
        self.shared.on.set(on);
    }

    /// The records that are kept, oldest first.
    pub fn records(&self) -> Vec<Record> {
        self.shared.records.borrow().iter().cloned().collect()
    }

    /// A hash of everything recorded, in its order.
    pub fn hash(&self) -> u64 {
        self.shared.hash.get()
    }

    /// How many operations of this kind there were.
    pub fn count(&self, operation: Operation) -> Count {
        self.shared.counts.borrow()[operation as usize]
    }

    fn is_on(&self) -> bool {
        self.shared.on.get()
    }

    fn start(&self, store: &Rc<str>, operation: Operation, range: Option<HostRange>, flagged: bool) -> Span {
        let number = self.shared.next.get();
        self.shared.next.set(number + 1);
        {
            let count = &mut self.shared.counts.borrow_mut()[operation as usize];
            count.started += 1;
            count.bytes = count.bytes.saturating_add(range.map_or(0, HostRange::len));
        }
        let record = Record { number, moment: Moment::Started, store: Rc::clone(store), operation, range, flagged };
        self.note(record.clone());
        Span { trace: self.clone(), record, ended: false }
    }

    fn note(&self, record: Record) {
        let shared = &self.shared;
        let mut hash = shared.hash.get();
        let mut mix = |value: u64| hash = (hash.rotate_left(5) ^ value).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        record.store.bytes().for_each(|byte| mix(byte.into()));
        let (start, len) = record.range.map_or((u64::MAX, u64::MAX), |range| (range.start().get(), range.len()));
        let moment = match record.moment {
            Moment::Started => 0,
            Moment::Succeeded => 1,
            Moment::Dropped => 2,
            Moment::Failed(kind) => 3 + kind as u64,
        };
        [record.number, moment, record.operation as u64, start, len, record.flagged.into()].into_iter().for_each(mix);
        shared.hash.set(hash);
        if let Some(watcher) = &shared.watcher {
            watcher(&record);
        }
        if shared.keep > 0 {
            let mut records = shared.records.borrow_mut();
            if records.len() == shared.keep {
                records.pop_front();
            }
            records.push_back(record);
        }
    }
}

/// An operation under way.
struct Span {
    trace: Trace,
    record: Record,
    ended: bool,
}

impl Span {
    fn end<T>(mut self, result: Result<T>) -> Result<T> {
        self.ended = true;
        self.record.moment = match &result {
            Ok(_) => Moment::Succeeded,
            Err(error) => {
                self.trace.shared.counts.borrow_mut()[self.record.operation as usize].failed += 1;
                Moment::Failed(error.kind())
            }
        };
        self.trace.note(self.record.clone());
        result
    }
}

impl Drop for Span {
    fn drop(&mut self) {
        if !self.ended {
            self.record.moment = Moment::Dropped;
            self.trace.note(self.record.clone());
        }
    }
}

/// A store all of whose operations are recorded.
pub struct TraceStore {
    inner: Rc<dyn Store>,
    name: Rc<str>,
    trace: Trace,
}

impl TraceStore {
    /// Records the operations on `inner` in `trace`.
    pub fn new(inner: Rc<dyn Store>, trace: Trace) -> Rc<Self> {
        let name = inner.name().into();
        Rc::new(Self { inner, name, trace })
    }

    /// Where the records go.
    pub fn trace(&self) -> &Trace {
        &self.trace
    }

    fn record<'a, T: 'a>(
        &'a self,
        operation: Operation,
        range: Option<HostRange>,
        flagged: bool,
        inner: IoFuture<'a, T>,
    ) -> IoFuture<'a, T> {
        if !self.trace.is_on() {
            return inner;
        }
        Box::pin(async move {
            let span = self.trace.start(&self.name, operation, range, flagged);
            let result = inner.await;
            span.end(result)
        })
    }
}

impl Store for TraceStore {
    fn name(&self) -> &str {
        &self.name
    }

    fn size(&self) -> u64 {
        self.inner.size()
    }

    fn limits(&self) -> Limits {
        self.inner.limits()
    }

    fn read(&self, at: HostOffset, into: Iov) -> IoFuture<'_, ()> {
        let range = at.range(into.len() as u64);
        self.record(Operation::Read, Some(range), false, self.inner.read(at, into))
    }

    fn write(&self, at: HostOffset, from: Iov, fua: bool) -> IoFuture<'_, ()> {
        let range = at.range(from.len() as u64);
        self.record(Operation::Write, Some(range), fua, self.inner.write(at, from, fua))
    }

    fn flush(&self) -> IoFuture<'_, ()> {
        self.record(Operation::Flush, None, false, self.inner.flush())
    }

    fn zero(&self, range: HostRange, mode: ZeroMode) -> IoFuture<'_, ()> {
        self.record(Operation::Zero, Some(range), mode.unmap, self.inner.zero(range, mode))
    }

    fn set_size(&self, size: u64) -> IoFuture<'_, ()> {
        let range = HostRange::new(HostOffset::ZERO, size);
        self.record(Operation::SetSize, Some(range), false, self.inner.set_size(size))
    }

    fn allocate(&self, range: HostRange) -> IoFuture<'_, ()> {
        self.record(Operation::Allocate, Some(range), false, self.inner.allocate(range))
    }

    fn extent(&self, range: HostRange) -> IoFuture<'_, HostExtent> {
        self.record(Operation::Extent, Some(range), false, self.inner.extent(range))
    }

    fn locate(&self, at: HostOffset) -> (&str, HostOffset) {
        self.inner.locate(at)
    }

    fn files(&self) -> Vec<(&str, u64)> {
        self.inner.files()
    }

    fn sharable(&self) -> Option<Arc<OwnedFd>> {
        self.inner.sharable()
    }

    fn share(&self, source: Arc<OwnedFd>, from: HostRange, to: HostOffset) -> IoFuture<'_, crate::Shared> {
        self.inner.share(source, from, to)
    }

    fn close(&self) -> IoFuture<'_, ()> {
        self.inner.close()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::MemoryStore;
    use futures_util::future::join;
    use ring::sim::Sim;

    fn run(seed: u64, trace: &Trace) {
        Sim::new(seed).block_on(async {
            let store = TraceStore::new(MemoryStore::new("m", 0), trace.clone());
            let task = |at: u64| {
                let store = Rc::clone(&store);
                ring::spawn(async move {
                    store.write(HostOffset(at), Iov::zeroed(10), false).await.unwrap();
                    store.read(HostOffset(at), Iov::alloc(10)).await.unwrap();
                })
            };
            let (a, b) = (task(0), task(100));
            join(a, b).await;
        });
    }

    #[test]
    fn one_seed_one_hash_other_orders_other_hashes() {
        let hashes: Vec<u64> = (0..20)
            .map(|seed| {
                let traces = [Trace::keeping(1), Trace::keeping(100)];
                for trace in &traces {
                    run(seed, trace);
                }
                assert_eq!(traces[0].hash(), traces[1].hash(), "what is kept does not matter");
                traces[0].hash()
            })
            .collect();
        assert!(hashes.iter().any(|hash| *hash != hashes[0]), "seeds differ in their order");
    }

    #[test]
    fn records_tell_order_and_outcome_within_bounds() {
        let trace = Trace::keeping(3);
        Sim::new(0).block_on(async {
            let store = TraceStore::new(MemoryStore::new("m", 100).read_only(), trace.clone());
            store.read(HostOffset(5), Iov::alloc(7)).await.unwrap();
            store.write(HostOffset(0), Iov::zeroed(1), true).await.unwrap_err();
            let mut read = store.read(HostOffset(0), Iov::alloc(1));
            let _ = futures_util::poll!(&mut read);
            drop(read);
            trace.switch(false);
            store.flush().await.unwrap();
        });
        let told: Vec<String> = trace.records().iter().map(ToString::to_string).collect();
        assert_eq!(
            told,
            ["#1 write 'm' 0x0+0x1 fua failed: ReadOnly", "#2 read 'm' 0x0+0x1 started", "#2 read 'm' 0x0+0x1 dropped"]
        );
        assert_eq!(trace.count(Operation::Read), Count { started: 2, failed: 0, bytes: 8 });
        assert_eq!(trace.count(Operation::Write), Count { started: 1, failed: 1, bytes: 1 });
        assert_eq!(trace.count(Operation::Flush), Count::default());
    }

    #[test]
    fn a_watcher_sees_everything() {
        let seen = Rc::new(Cell::new(0));
        let counting = Rc::clone(&seen);
        let trace = Trace::calling(move |_| counting.set(counting.get() + 1));
        run(1, &trace);
        assert_eq!((seen.get(), trace.records().len()), (8, 0));
    }
}
