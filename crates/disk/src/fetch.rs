//! Fetching from below the top, single-flight: each cluster is under way at most once for all who want to keep it.
//!
//! A fetch brings whole clusters into memory of our own, hands them to everybody who waits (copy-on-read, guest writes that
//! fill the rest of a cluster, jobs), and then populates the top from that memory. It is a task of its own, so it
//! does not matter who goes away.
//!
//! **Invariants.** No two fetches in the table overlap. A fetch stays in the table until its clusters are linked or given
//! up, so between fetching and linking nobody fetches again. A failed fetch links nothing. Layers below never change, so what
//! was fetched stays true for every cluster that the top still has not.

use crate::disk::Inner;
use crate::populate::Outcome;
use crate::read::usize_of;
use crate::view::View;
use image::Result;
use layout::{GuestOffset, GuestRange};
use ring::Iov;
use ring::sync::{Event, Permit};
use std::cell::RefCell;
use std::rc::Rc;

/// A copy-on-read fetch rounds up to whole clusters, but does not grow beyond this (unless one cluster does): a guest that reads
/// a large range gets its first bytes without waiting for the last.
const COPY_ON_READ_FETCH: u64 = 1 << 20;

/// Who wanted a fetch first, for the counters.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Cause {
    /// A guest's read, with copy-on-read on.
    Guest,
    /// A job, or a prefetch.
    Job,
}

/// Whole clusters on their way.
pub(crate) struct Fetch {
    range: GuestRange,
    data: RefCell<Option<Result<Iov>>>,
    arrived: Event,
    outcome: RefCell<Option<Result<Outcome>>>,
    ended: Event,
}

impl Fetch {
    /// The whole clusters it brings; what lies past the disk's end comes as zeros.
    pub(crate) fn range(&self) -> GuestRange {
        self.range
    }

    /// The bytes, as soon as they are there.
    pub(crate) async fn data(&self) -> Result<Iov> {
        loop {
            let wait = self.arrived.wait();
            if let Some(data) = &*self.data.borrow() {
                return data.clone();
            }
            wait.await;
        }
    }

    /// What became of the clusters, once all is over.
    pub(crate) async fn outcome(&self) -> Result<Outcome> {
        loop {
            let wait = self.ended.wait();
            if let Some(outcome) = &*self.outcome.borrow() {
                return outcome.clone();
            }
            wait.await;
        }
    }
}

/// The fetches of one disk that are under way.
#[derive(Default)]
pub(crate) struct Fetches {
    active: RefCell<Vec<Rc<Fetch>>>,
}

impl Fetches {
    /// The fetch that brings the byte at `at`.
    pub(crate) fn covering(&self, at: GuestOffset) -> Option<Rc<Fetch>> {
        self.active.borrow().iter().find(|fetch| fetch.range.contains(at)).cloned()
    }

    /// The front part of `range` (whose first byte no fetch covers) up to where the next fetch begins.
    pub(crate) fn free_part(&self, range: GuestRange) -> GuestRange {
        let active = self.active.borrow();
        let next = active.iter().filter(|fetch| fetch.range.overlaps(range)).map(|fetch| fetch.range.start()).min();
        next.map_or(range, |next| GuestRange::between(range.start(), next))
    }

    fn add(&self, range: GuestRange) -> Rc<Fetch> {
        debug_assert!(self.active.borrow().iter().all(|fetch| !fetch.range.overlaps(range)), "two fetches of {range}");
        let fetch = Rc::new(Fetch {
            range,
            data: RefCell::new(None),
            arrived: Event::new(),
            outcome: RefCell::new(None),
            ended: Event::new(),
        });
        self.active.borrow_mut().push(Rc::clone(&fetch));
        fetch
    }

    fn remove(&self, fetch: &Rc<Fetch>) {
        self.active.borrow_mut().retain(|other| !Rc::ptr_eq(other, fetch));
    }
}

impl Inner {
    /// A fetch for copy-on-read that covers the start of `wanted` (unallocated in the top just now): one that is under way,
    /// or a new one. `None` when the memory for such is used up.
    pub(crate) fn fetch_to_keep(self: &Rc<Self>, view: &Rc<View>, wanted: GuestRange) -> Option<Rc<Fetch>> {
        if let Some(fetch) = self.fetches.covering(wanted.start()) {
            return Some(fetch);
        }
        let most = COPY_ON_READ_FETCH.max(self.unit);
        let clusters = self.fetches.free_part(wanted.align_outward(self.unit).first(most));
        let permit = self.copy_on_read_budget.try_acquire(usize_of(clusters.len()))?;
        Some(self.start_fetch(view, clusters, permit, Cause::Guest))
    }

    /// Starts a fetch of whole clusters that no other fetch covers, and populates the top with them.
    pub(crate) fn start_fetch(
        self: &Rc<Self>,
        view: &Rc<View>,
        clusters: GuestRange,
        permit: Permit,
        cause: Cause,
    ) -> Rc<Fetch> {
        let fetch = self.fetches.add(clusters);
        let (inner, view, this) = (Rc::clone(self), Rc::clone(view), Rc::clone(&fetch));
        let inside = self.gate.enter_behind();
        drop(ring::spawn(async move {
            tracing::trace!(target: "disk_fetch", disk = inner.name, %clusters, ?cause);
            let data = inner.fetch(&view, clusters).await;
            *this.data.borrow_mut() = Some(data.clone());
            this.arrived.notify_all();
            let outcome = match data {
                Ok(data) => inner.populate_from(&view, clusters, &data).await,
                Err(error) => Err(error),
            };
            match &outcome {
                Ok(outcome) => {
                    let (kept, zero, left) = (outcome.data, outcome.zero, outcome.left);
                    tracing::trace!(target: "disk_fetch_done", disk = inner.name, %clusters, kept, zero, left);
                }
                Err(error) => tracing::trace!(target: "disk_fetch_failed", disk = inner.name, %clusters, %error),
            }
            match &outcome {
                Ok(outcome) if cause == Cause::Guest => {
                    inner.counters.update(|s| s.copy_on_read_bytes += outcome.data + outcome.zero);
                }
                Ok(_) => {}
                // Whoever waits is told; a guest's read has its bytes already or learns of the failure itself.
                Err(error) => tracing::debug!(disk = inner.name, %clusters, %error, "nothing was kept of a fetch"),
            }
            inner.fetches.remove(&this);
            *this.outcome.borrow_mut() = Some(outcome);
            this.ended.notify_all();
            drop((permit, inside));
        }));
        fetch
    }

    /// Reads whole clusters as the layers below show them, zeros past the disk's end.
    async fn fetch(self: &Rc<Self>, view: &Rc<View>, clusters: GuestRange) -> Result<Iov> {
        let data = Iov::alloc(usize_of(clusters.len()));
        let on_disk = self.clip(clusters);
        let len = usize_of(on_disk.len());
        data.slice(len..data.len()).fill(0);
        self.read_below(view, on_disk, &data.slice(0..len)).await?;
        Ok(data)
    }
}
