//! A decorator that keeps requests to rates: bytes and operations a second, of reads, of writes and of both, with bursts.
//! (The options and what they mean are those of QEMU's `docs/throttle.txt`.)
//!
//! **Invariants.**
//! * Each limit is a leaky bucket: what goes through fills it, it leaks at the average rate, and a request waits while it is
//!   too full. A request that is larger than a bucket goes through when the bucket has room at all, so nothing waits for ever.
//! * Stores that share a [`Group`] share its buckets. Requests of one direction go in the order in which they came.
//! * A request that is dropped while it waits has used nothing up.

use crate::{Error, ErrorKind, HostExtent, IoFuture, Limits, Operation, Shared, Store, ZeroMode};
use layout::{HostOffset, HostRange};
use ring::sync::Mutex;
use ring::{Instant, Iov};
use std::cell::{Cell, RefCell};
use std::os::fd::OwnedFd;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

/// How much of a second's average a bucket without bursts holds.
const SLACK: f64 = 0.1;

/// One limit.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Rate {
    /// A second, on average; 0 is unlimited.
    pub average: u64,
    /// A second, in a burst; 0: no bursts.
    pub burst: u64,
    /// How long a burst may last, in seconds; at least 1.
    pub burst_seconds: u64,
}

/// What is limited: `[both, reads, writes]`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Rates {
    /// Bytes.
    pub bytes: [Rate; 3],
    /// Operations.
    pub operations: [Rate; 3],
    /// A request counts as one operation for each begun piece of this many bytes; 0: as one.
    pub operation_bytes: u64,
}

impl Rates {
    /// Whether they can be meant.
    pub fn check(&self) -> Result<(), &'static str> {
        for [both, reads, writes] in [self.bytes, self.operations] {
            if both.average > 0 && (reads.average > 0 || writes.average > 0) {
                return Err("a limit of the total and one of reads or writes cannot be combined");
            }
            for rate in [both, reads, writes] {
                match rate {
                    Rate { average: 0, burst: 1.., .. } => return Err("a burst needs an average rate"),
                    Rate { average, burst, .. } if burst > 0 && burst < average => {
                        return Err("a burst below the average rate makes no sense");
                    }
                    Rate { burst: 0, burst_seconds: 2.., .. } => return Err("a burst's length needs a burst rate"),
                    _ => {}
                }
            }
        }
        Ok(())
    }
}

/// One leaky bucket: what is in it, and when that was right.
#[derive(Clone, Copy, Debug)]
struct Bucket {
    rate: Rate,
    level: f64,
    /// What went through lately, at the rate of the burst.
    burst_level: f64,
}

impl Bucket {
    fn new(rate: Rate) -> Self {
        Self { rate, level: 0.0, burst_level: 0.0 }
    }

    fn leak(&mut self, seconds: f64) {
        self.level = (self.level - self.rate.average as f64 * seconds).max(0.0);
        self.burst_level = (self.burst_level - self.rate.burst as f64 * seconds).max(0.0);
    }

    /// Seconds until the next request may go.
    fn wait(&self) -> f64 {
        let (average, burst) = (self.rate.average as f64, self.rate.burst as f64);
        if self.rate.average == 0 {
            return 0.0;
        }
        let room = if burst > 0.0 { burst * self.rate.burst_seconds.max(1) as f64 } else { average * SLACK };
        let long = ((self.level - room) / average).max(0.0);
        let short = if self.rate.burst_seconds > 1 { (self.burst_level - burst * SLACK) / burst } else { 0.0 };
        long.max(short)
    }

    fn fill(&mut self, units: f64) {
        self.level += units;
        self.burst_level += units;
    }
}

/// The buckets that some stores share.
pub struct Group {
    rates: Cell<Rates>,
    buckets: RefCell<[[Bucket; 3]; 2]>,
    leaked: Cell<Option<Instant>>,
    /// Who goes next: reads, writes.
    lines: [Mutex<()>; 2],
}

impl Group {
    /// Empty buckets.
    pub fn new(rates: Rates) -> Rc<Self> {
        Rc::new(Self {
            rates: Cell::new(rates),
            buckets: RefCell::new([rates.bytes.map(Bucket::new), rates.operations.map(Bucket::new)]),
            leaked: Cell::new(None),
            lines: [Mutex::new(()), Mutex::new(())],
        })
    }

    /// The rates.
    pub fn rates(&self) -> Rates {
        self.rates.get()
    }

    /// Other rates, from now on.
    pub fn set_rates(&self, rates: Rates) {
        self.rates.set(rates);
        *self.buckets.borrow_mut() = [rates.bytes.map(Bucket::new), rates.operations.map(Bucket::new)];
    }

    /// Waits until a request of `len` bytes may go, and lets it go.
    async fn pass(&self, write: bool, len: u64) {
        let _turn = self.lines[usize::from(write)].lock().await;
        loop {
            let now = ring::now();
            let passed = self.leaked.replace(Some(now)).map_or(Duration::ZERO, |then| now.since(then));
            let wait = {
                let mut buckets = self.buckets.borrow_mut();
                buckets.iter_mut().flatten().for_each(|bucket| bucket.leak(passed.as_secs_f64()));
                let waits = buckets.iter().flat_map(|kind| [kind[0].wait(), kind[1 + usize::from(write)].wait()]);
                waits.fold(0.0, f64::max)
            };
            if wait <= 0.0 {
                break;
            }
            // An hour at a time: no rate makes it panic.
            ring::sleep(Duration::from_secs_f64(wait.min(3600.0)).max(Duration::from_micros(100))).await;
        }
        let piece = self.rates.get().operation_bytes;
        let operations = if piece > 0 { len.div_ceil(piece).max(1) } else { 1 };
        let mut buckets = self.buckets.borrow_mut();
        for (kind, units) in buckets.iter_mut().zip([len as f64, operations as f64]) {
            kind[0].fill(units);
            kind[1 + usize::from(write)].fill(units);
        }
    }
}

/// A store whose requests pass a group.
pub struct ThrottleStore {
    inner: Rc<dyn Store>,
    group: Rc<Group>,
}

impl ThrottleStore {
    /// `inner`, kept to the group's rates.
    pub fn new(inner: Rc<dyn Store>, group: Rc<Group>) -> Rc<Self> {
        Rc::new(Self { inner, group })
    }
}

impl Store for ThrottleStore {
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
            self.group.pass(false, into.len() as u64).await;
            self.inner.read(at, into).await
        })
    }

    fn write(&self, at: HostOffset, from: Iov, fua: bool) -> IoFuture<'_, ()> {
        Box::pin(async move {
            self.group.pass(true, from.len() as u64).await;
            self.inner.write(at, from, fua).await
        })
    }

    fn flush(&self) -> IoFuture<'_, ()> {
        self.inner.flush()
    }

    fn zero(&self, range: HostRange, mode: ZeroMode) -> IoFuture<'_, ()> {
        Box::pin(async move {
            self.group.pass(true, range.len()).await;
            self.inner.zero(range, mode).await
        })
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

    fn sharable(&self) -> Option<Arc<OwnedFd>> {
        None
    }

    fn share(&self, _: Arc<OwnedFd>, _: HostRange, _: HostOffset) -> IoFuture<'_, Shared> {
        Box::pin(async { Ok(Shared::Never) })
    }

    fn close(&self) -> IoFuture<'_, ()> {
        self.inner.close()
    }
}

/// What a group that nobody made is called for: an error that names it.
pub fn unknown_group(store: &str, group: &str) -> Error {
    let why = format!("there is no throttle group '{group}': make it with --object throttle-group,id={group}");
    Error::new(ErrorKind::NotFound, Operation::Open, store, None, why)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::MemoryStore;
    use ring::sim::Sim;

    fn rates(bytes: Rate, operations: Rate) -> Rates {
        Rates {
            bytes: [bytes, Rate::default(), Rate::default()],
            operations: [operations, Rate::default(), Rate::default()],
            operation_bytes: 0,
        }
    }

    /// Seconds of the virtual clock that `count` reads of `len` bytes take.
    fn reads(limit: Rates, count: u64, len: usize) -> f64 {
        Sim::new(1).block_on(async {
            let store = ThrottleStore::new(MemoryStore::new("m", 1 << 20), Group::new(limit));
            let start = ring::now();
            for _ in 0..count {
                store.read(HostOffset::ZERO, Iov::alloc(len)).await.unwrap();
            }
            ring::now().since(start).as_secs_f64()
        })
    }

    #[test]
    fn averages_are_kept() {
        let megabyte = Rate { average: 1 << 20, ..Rate::default() };
        let took = reads(rates(megabyte, Rate::default()), 100, 64 << 10);
        assert!((6.0..=6.25).contains(&took), "{took}");
        let hundred = Rate { average: 100, ..Rate::default() };
        let took = reads(rates(Rate::default(), hundred), 500, 512);
        assert!((4.8..=5.0).contains(&took), "{took}");
        assert!(reads(Rates::default(), 1000, 512) < 0.001);
    }

    #[test]
    fn a_burst_is_let_through_and_then_the_average() {
        let bursty = Rate { average: 100, burst: 1000, burst_seconds: 2 };
        let limit = rates(Rate::default(), bursty);
        let took = reads(limit, 1900, 512);
        assert!((1.7..=2.0).contains(&took), "within the burst {took}");
        let took = reads(limit, 3000, 512);
        assert!((8.0..=12.0).contains(&took), "after the burst {took}");
    }

    #[test]
    fn what_contradicts_itself_is_refused() {
        let some = Rate { average: 5, ..Rate::default() };
        let both = Rates { bytes: [some, some, Rate::default()], ..Rates::default() };
        assert!(both.check().is_err());
        let burst = rates(Rate { average: 0, burst: 5, burst_seconds: 1 }, Rate::default());
        assert!(burst.check().is_err());
        assert!(rates(some, some).check().is_ok());
    }

    #[test]
    fn a_request_that_left_while_it_waited_has_used_nothing() {
        Sim::new(1).block_on(async {
            let slow = Rate { average: 10, ..Rate::default() };
            let group = Group::new(rates(Rate::default(), slow));
            let store = ThrottleStore::new(MemoryStore::new("m", 1 << 20), Rc::clone(&group));
            let read = || store.read(HostOffset::ZERO, Iov::alloc(512));
            read().await.unwrap();
            read().await.unwrap();
            let start = ring::now();
            for _ in 0..100 {
                let _ = ring::timeout(Duration::from_micros(1), read()).await;
            }
            read().await.unwrap();
            assert!(ring::now().since(start).as_secs_f64() < 0.3);
        });
    }
}
