//! A target in memory: what is missing, how long a request takes, and what goes wrong.

use crate::stream::Target;
use disk::{Copied, Error, ErrorKind, Missing, Result};
use futures_util::future::LocalBoxFuture;
use layout::{GuestOffset, GuestRange, HostOffset, HostRange};
use ring::Instant;
use ring::sync::Event;
use std::cell::{Cell, RefCell};
use std::rc::Rc;
use std::time::Duration;

pub(super) const CLUSTER: u64 = 64 << 10;
pub(super) const MIB: u64 = 1 << 20;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Cluster {
    There,
    Missing,
    /// Missing, and zeros.
    Zero,
}

/// See the module.
pub(super) struct Sketch {
    pub(super) clusters: RefCell<Vec<Cluster>>,
    /// How long a populate takes.
    pub(super) latency: Cell<Duration>,
    /// Clusters whose populate fails, how often still, and with what.
    pub(super) faults: RefCell<Vec<(usize, usize, store::ErrorKind, store::Operation)>>,
    /// Clusters where a guest is in the way, how often still.
    pub(super) in_the_way: RefCell<Vec<(usize, usize)>>,
    /// `next_missing` fails this often at or behind this cluster.
    pub(super) blind: Cell<(usize, usize)>,
    /// Populates wait here while it is set.
    pub(super) held: Cell<bool>,
    pub(super) released: Event,
    /// Every populate that began: when, and what.
    pub(super) begun: RefCell<Vec<(Instant, GuestRange)>>,
    pub(super) in_flight: Cell<usize>,
    pub(super) most_in_flight: Cell<usize>,
    pub(super) finished: Cell<bool>,
    pub(super) finish_fails: Cell<bool>,
    pub(super) finish_takes: Cell<Duration>,
    /// The next populate's task dies.
    pub(super) dies: Cell<bool>,
}

impl Sketch {
    /// All of `mib` MiB is missing.
    pub(super) fn new(mib: u64) -> Rc<Self> {
        Rc::new(Self {
            clusters: RefCell::new(vec![Cluster::Missing; (mib * MIB / CLUSTER) as usize]),
            latency: Cell::new(Duration::from_millis(1)),
            faults: RefCell::default(),
            in_the_way: RefCell::default(),
            blind: Cell::new((0, 0)),
            held: Cell::new(false),
            released: Event::new(),
            begun: RefCell::default(),
            in_flight: Cell::new(0),
            most_in_flight: Cell::new(0),
            finished: Cell::new(false),
            finish_fails: Cell::new(false),
            finish_takes: Cell::new(Duration::ZERO),
            dies: Cell::new(false),
        })
    }

    pub(super) fn set(&self, clusters: std::ops::Range<usize>, to: Cluster) {
        self.clusters.borrow_mut()[clusters].fill(to);
    }

    /// Bytes still missing.
    pub(super) fn missing(&self) -> u64 {
        self.clusters.borrow().iter().filter(|cluster| **cluster != Cluster::There).count() as u64 * CLUSTER
    }

    pub(super) fn fail(&self, cluster: usize, times: usize, kind: store::ErrorKind) {
        let operation =
            if kind == store::ErrorKind::NoSpace { store::Operation::Write } else { store::Operation::Read };
        self.faults.borrow_mut().push((cluster, times, kind, operation));
    }

    pub(super) fn hold(&self, on: bool) {
        self.held.set(on);
        self.released.notify_all();
    }

    fn indices(&self, range: GuestRange) -> std::ops::Range<usize> {
        let end = range.end().get().div_ceil(CLUSTER).min(self.clusters.borrow().len() as u64);
        (range.start().get() / CLUSTER) as usize..end as usize
    }

    fn fault(&self, clusters: &std::ops::Range<usize>) -> Result<()> {
        let mut faults = self.faults.borrow_mut();
        let Some(fault) = faults.iter_mut().find(|(at, times, ..)| clusters.contains(at) && *times > 0) else {
            return Ok(());
        };
        fault.1 -= 1;
        let range = HostRange::new(HostOffset(fault.0 as u64 * CLUSTER), CLUSTER);
        Err(store::Error::new(fault.2, fault.3, "base.img", Some(range), "as the test says").into())
    }
}

struct Counted<'a>(&'a Cell<usize>);

impl Drop for Counted<'_> {
    fn drop(&mut self) {
        self.0.set(self.0.get() - 1);
    }
}

impl Target for Sketch {
    fn size(&self) -> u64 {
        self.clusters.borrow().len() as u64 * CLUSTER
    }

    fn cluster_size(&self) -> u64 {
        CLUSTER
    }

    fn next_missing(&self, from: GuestOffset) -> LocalBoxFuture<'_, Result<Option<Missing>>> {
        Box::pin(async move {
            ring::yield_now().await;
            let clusters = self.clusters.borrow();
            let from = (from.get() / CLUSTER) as usize;
            let (blind, times) = self.blind.get();
            if times > 0 && from >= blind {
                self.blind.set((blind, times - 1));
                return Err(Error::new(ErrorKind::Corrupt, "mid.qed", None, "as the test says"));
            }
            let Some(start) = (from..clusters.len()).find(|at| clusters[*at] != Cluster::There) else {
                return Ok(None);
            };
            let end = (start..clusters.len()).find(|at| clusters[*at] != clusters[start]).unwrap_or(clusters.len());
            let range = GuestRange::new(GuestOffset(start as u64 * CLUSTER), (end - start) as u64 * CLUSTER);
            Ok(Some(Missing { range, zero: clusters[start] == Cluster::Zero }))
        })
    }

    fn populate(&self, range: GuestRange) -> LocalBoxFuture<'_, Result<Copied>> {
        Box::pin(async move {
            assert!(range.is_aligned(CLUSTER), "{range}");
            self.begun.borrow_mut().push((ring::now(), range));
            self.in_flight.set(self.in_flight.get() + 1);
            self.most_in_flight.set(self.most_in_flight.get().max(self.in_flight.get()));
            let _counted = Counted(&self.in_flight);
            assert!(!self.dies.replace(false), "as the test says");
            ring::sleep(self.latency.get()).await;
            while self.held.get() {
                self.released.wait().await;
            }
            let indices = self.indices(range);
            self.fault(&indices)?;
            let mut copied = Copied::default();
            for at in indices {
                let mut ways = self.in_the_way.borrow_mut();
                let way = ways.iter_mut().find(|(there, times)| *there == at && *times > 0);
                let cluster = &mut self.clusters.borrow_mut()[at];
                match (way, &cluster) {
                    (Some(way), _) => {
                        way.1 -= 1;
                        copied.skipped += CLUSTER;
                        continue;
                    }
                    (None, Cluster::There) => copied.skipped += CLUSTER,
                    (None, Cluster::Missing) => copied.data += CLUSTER,
                    (None, Cluster::Zero) => copied.zero += CLUSTER,
                }
                *cluster = Cluster::There;
            }
            Ok(copied)
        })
    }

    fn finish(&self) -> LocalBoxFuture<'_, Result<()>> {
        Box::pin(async move {
            ring::sleep(self.finish_takes.get()).await;
            assert_eq!(self.in_flight.get(), 0, "nothing is in flight when the end is published");
            if self.missing() > 0 || self.finish_fails.get() {
                return Err(Error::new(ErrorKind::Busy, "my.qed", None, "something is still missing"));
            }
            self.finished.set(true);
            Ok(())
        })
    }
}
