//! Populating: "keep these bytes where the top still has nothing". Copy-on-read, the stream job and prefetch are its callers.
//!
//! **Invariants.**
//! * What is written comes from memory of our own, never from a guest's.
//! * A guest is never in the way of itself: clusters that are allocated by the time of linking, or whose mapping a guest is
//!   changing at that moment, are left alone and the space reserved for them is given back.
//! * While the end of a stream is published, and against a chain that is no longer the disk's, nothing is populated.
//! * Clusters of zeros take no space: they are marked, so that nobody fetches them again.
//! * Where source and top lie on one file system that can share extents, a job's clusters are shared instead of copied; where it
//!   turns out that they cannot, the disk stops trying.

use crate::disk::Inner;
use crate::fetch::Cause;
use crate::read::usize_of;
use crate::view::{Found, View};
use crate::write::Fill;
use crate::{Copied, Missing, StreamBase};
use image::{ErrorKind, Keep, Linked, Mapping, Purpose, Reservation, Result};
use layout::{GuestOffset, GuestRange, HostOffset};
use ring::Iov;
use ring::sync::Event;
use std::cell::Cell;
use std::rc::Rc;
use store::Shared;

/// A job's request is fetched in parts of at most this (or one cluster, if that is larger), so that one large request does
/// not take all the memory there is for fetches.
const POPULATE_FETCH: u64 = 4 << 20;

/// What became of clusters that were to be populated, in bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Outcome {
    /// Written and linked.
    pub(crate) data: u64,
    /// Marked as zeros.
    pub(crate) zero: u64,
    /// Left alone.
    pub(crate) left: u64,
}

/// Keeps populating and the publishing of a stream's end apart.
#[derive(Default)]
pub(crate) struct Publishing {
    populating: Cell<usize>,
    quiet: Event,
    stopped: Cell<bool>,
}

impl Publishing {
    /// Begins to populate; `None` while the end of a stream is published.
    fn begin(&self) -> Option<Populating<'_>> {
        if self.stopped.get() {
            return None;
        }
        self.populating.set(self.populating.get() + 1);
        Some(Populating { publishing: self })
    }

    /// Lets nobody begin any more and waits for those who have begun; until the token is dropped.
    pub(crate) async fn stop(&self) -> Stopped<'_> {
        self.stopped.set(true);
        let stopped = Stopped { publishing: self };
        while self.populating.get() > 0 {
            self.quiet.wait().await;
        }
        stopped
    }
}

/// Populates, until dropped.
struct Populating<'a> {
    publishing: &'a Publishing,
}

impl Drop for Populating<'_> {
    fn drop(&mut self) {
        let left = self.publishing.populating.get() - 1;
        self.publishing.populating.set(left);
        if left == 0 {
            self.publishing.quiet.notify_all();
        }
    }
}

/// Nobody populates, until dropped.
pub(crate) struct Stopped<'a> {
    publishing: &'a Publishing,
}

impl Drop for Stopped<'_> {
    fn drop(&mut self) {
        self.publishing.stopped.set(false);
    }
}

/// What to do with a fetched cluster.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fate {
    Write,
    Mark,
    Leave,
}

impl Inner {
    /// Brings in what of `range` is missing above `base`.
    pub(crate) async fn populate(self: &Rc<Self>, range: GuestRange, base: &StreamBase) -> Result<Copied> {
        let view = self.view();
        let above = view.base_index(base).ok_or_else(|| self.no_such_base(base))?;
        let range = self.clip(range.align_outward(self.unit));
        let most = POPULATE_FETCH.max(self.unit);
        let mut copied = Copied::default();
        let mut at = range.start();
        // Where sharing was tried in vain.
        let mut copy_until = at;
        while at < range.end() {
            // Before looking: from the look to the start of the fetch there shall be no await.
            let permit = self.populate_budget.acquire(usize_of(most.min(range.end() - at))).await;
            let Some(Missing { range: missing, zero }) = self.missing_in(&view, at, range.end(), above).await? else {
                break;
            };
            let outcome = if zero {
                drop(permit);
                at = missing.end();
                self.mark(&view, missing).await?
            } else if self.is_in_parts(missing).await? {
                drop(permit);
                at = missing.start() + self.unit;
                self.complete(&view, missing.start().range(self.unit)).await?
            } else if self.may_share.get() && !self.top.has_fixed_places() && missing.start() >= copy_until {
                drop(permit);
                at = missing.start();
                let (outcome, tried) = self.share(&view, missing).await?;
                copy_until = at + tried;
                at = at + outcome.map_or(0, |outcome| outcome.data + outcome.left);
                let Some(outcome) = outcome else { continue };
                outcome
            } else {
                at = missing.start();
                if let Some(other) = self.fetches.covering(at) {
                    drop(permit);
                    // Its failure is its own: look again and find out.
                    let _ = other.outcome().await;
                    continue;
                }
                let chunk = self.fetches.free_part(self.still_unallocated(missing.first(most))?);
                if chunk.is_empty() {
                    continue;
                }
                at = chunk.end();
                self.start_fetch(&view, chunk, permit, Cause::Job).outcome().await?
            };
            copied.data += outcome.data;
            copied.zero += outcome.zero;
            if outcome.left > 0 {
                if !self.is_current(&view) || self.publishing.stopped.get() {
                    break;
                }
                // A guest was at it. Its write may yet fail, so what it leaves is looked at again.
                let again = missing.start().max(range.start());
                self.locks.until_not_exclusive(GuestRange::between(again, at)).await;
                at = again;
            }
        }
        copied.skipped = range.len().saturating_sub(copied.data + copied.zero);
        Ok(copied)
    }

    /// Takes over the first part of `missing` by sharing what holds it below, where that is possible; and how far it tried.
    async fn share(self: &Rc<Self>, view: &Rc<View>, missing: GuestRange) -> Result<(Option<Outcome>, u64)> {
        let nothing = |tried: u64| Ok((None, tried.max(1)));
        let Some(_populating) = self.publishing.begin() else { return nothing(missing.len()) };
        let clusters = missing.align_outward(self.unit);
        let below = view.resolve(1, view.depth(), clusters.intersect(self.clip(clusters))).await?;
        let whole = below.len & !(self.unit - 1);
        let Found::Data(layer, host) = below.found else { return nothing(below.len) };
        let (true, Some(source)) = (whole > 0, view.image(layer).store().sharable()) else { return nothing(below.len) };
        if !self.is_current(view) || self.fetches.covering(missing.start()).is_some() {
            return nothing(self.unit);
        }
        let reservation = self.reserve(clusters.first(whole), Purpose::Data).await?;
        let part = reservation.range();
        let to = self.place(&reservation)?;
        let shared = self.top.store().share(source, host.range(part.len()), to).await?;
        match shared {
            Shared::Done => {}
            Shared::NotThis => return nothing(part.len()),
            Shared::Never => {
                self.may_share.set(false);
                return nothing(part.len());
            }
        }
        self.flusher.changed();
        self.counters.update(|s| s.shared_bytes += part.len());
        let linked = self.link_where_unallocated(reservation);
        Ok((Some(Outcome { data: linked.linked, zero: 0, left: linked.dropped }), part.len()))
    }

    /// Fills in what is missing of a cluster that the top has parts of (subclusters): it is put together anew, while guests'
    /// writes to it wait.
    async fn complete(self: &Rc<Self>, view: &Rc<View>, cluster: GuestRange) -> Result<Outcome> {
        let nothing = Outcome { left: cluster.len(), ..Outcome::default() };
        let _held = self.locks.exclusive(cluster).await;
        let Some(_populating) = self.publishing.begin() else { return Ok(nothing) };
        if !self.is_current(view) || !self.is_in_parts(cluster).await? {
            return Ok(nothing);
        }
        match self.fill(cluster).await? {
            Fill::Bytes(bytes) => self.rewrite(cluster, bytes).await?,
            Fill::Zeros => self.drop_held(self.clip(cluster), false).await?,
        }
        Ok(Outcome { data: cluster.len(), ..Outcome::default() })
    }

    /// The front part of `range`, as whole clusters, that the top still has nothing of, as far as tables in memory tell.
    fn still_unallocated(&self, range: GuestRange) -> Result<GuestRange> {
        let free = match self.top.lookup(range)? {
            Some(now) if now.mapping == Mapping::Unallocated => range.first(now.len),
            Some(_) => range.first(0),
            None => range,
        };
        Ok(if free.is_empty() { free } else { free.align_outward(self.unit) })
    }

    /// Whether `view` is the disk's chain still.
    fn is_current(&self, view: &Rc<View>) -> bool {
        Rc::ptr_eq(view, &self.view())
    }

    /// Marks whole clusters as zeros where the top has nothing.
    async fn mark(self: &Rc<Self>, view: &Rc<View>, range: GuestRange) -> Result<Outcome> {
        self.mark_unless(view, range, &|at| self.locks.is_exclusively_held(at)).await
    }

    async fn mark_unless(
        self: &Rc<Self>,
        view: &Rc<View>,
        range: GuestRange,
        veto: &dyn Fn(GuestOffset) -> bool,
    ) -> Result<Outcome> {
        let clusters = range.align_outward(self.unit);
        let nothing = Outcome { left: clusters.len(), ..Outcome::default() };
        let Some(_populating) = self.publishing.begin() else { return Ok(nothing) };
        if !self.is_current(view) {
            return Ok(nothing);
        }
        let mut outcome = Outcome::default();
        let mut rest = clusters;
        while !rest.is_empty() {
            let reservation = self.reserve(rest, Purpose::Zero).await?;
            rest = rest.skip(reservation.range().len());
            let linked = self.link_unless(reservation, veto);
            outcome.zero += linked.linked;
            outcome.left += linked.dropped;
        }
        Ok(outcome)
    }

    /// Keeps `data`, which is what the layers below show of the whole clusters `clusters`.
    pub(crate) async fn populate_from(
        self: &Rc<Self>,
        view: &Rc<View>,
        clusters: GuestRange,
        data: &Iov,
    ) -> Result<Outcome> {
        let nothing = Outcome { left: clusters.len(), ..Outcome::default() };
        let Some(_populating) = self.publishing.begin() else { return Ok(nothing) };
        if !self.is_current(view) {
            return Ok(nothing);
        }
        // Where clusters have fixed places, what is written there must be nobody else's meanwhile.
        let mut alone = None;
        if self.top.has_fixed_places() {
            alone = self.locks.try_exclusive(clusters);
            if alone.is_none() {
                return Ok(nothing);
            }
        }
        let bytes = |part: GuestRange| {
            let from = usize_of(part.start() - clusters.start());
            data.slice(from..from + usize_of(part.len()))
        };
        let mut outcome = Outcome::default();
        let mut rest = clusters;
        while !rest.is_empty() {
            let veto = |at: GuestOffset| alone.is_none() && self.locks.is_exclusively_held(at);
            let fate = self.fate(rest.first(self.unit), &bytes, &veto)?;
            let mut run = rest.first(self.unit);
            while run.len() < rest.len() && self.fate(rest.skip(run.len()).first(self.unit), &bytes, &veto)? == fate {
                run = rest.first(run.len() + self.unit);
            }
            rest = rest.skip(run.len());
            match fate {
                Fate::Leave => outcome.left += run.len(),
                Fate::Mark => {
                    let marked = self.mark_unless(view, run, &veto).await?;
                    outcome.zero += marked.zero;
                    outcome.left += marked.left;
                }
                Fate::Write => {
                    let mut run = run;
                    while !run.is_empty() {
                        let reservation = self.reserve(run, Purpose::Data).await?;
                        let part = reservation.range();
                        self.write_store(self.place(&reservation)?, bytes(part), false).await?;
                        let linked = self.link_unless(reservation, &veto);
                        outcome.data += linked.linked;
                        outcome.left += linked.dropped;
                        run = run.skip(part.len());
                    }
                }
            }
        }
        Ok(outcome)
    }

    /// What is to be done with a fetched cluster, as things stand now.
    fn fate(
        &self,
        cluster: GuestRange,
        bytes: &impl Fn(GuestRange) -> Iov,
        veto: &dyn Fn(GuestOffset) -> bool,
    ) -> Result<Fate> {
        let cluster_on_disk = self.clip(cluster);
        let now = self.top.lookup(cluster_on_disk)?;
        // A cluster in parts is taken, too, whatever its first part is.
        let taken = now.is_some_and(|now| now.mapping != Mapping::Unallocated || now.len < cluster_on_disk.len());
        Ok(if taken || veto(cluster.start()) {
            Fate::Leave
        } else if bytes(cluster).is_zero() {
            Fate::Mark
        } else {
            Fate::Write
        })
    }

    fn link_where_unallocated(self: &Rc<Self>, reservation: Reservation) -> Linked {
        self.link_unless(reservation, &|at| self.locks.is_exclusively_held(at))
    }

    fn link_unless(self: &Rc<Self>, reservation: Reservation, veto: &dyn Fn(GuestOffset) -> bool) -> Linked {
        let linked = reservation.link(Keep::Unallocated, veto);
        self.linked(linked);
        linked
    }

    /// Reserves clusters for the start of `range`, which begins on a cluster boundary.
    pub(crate) async fn reserve(&self, range: GuestRange, purpose: Purpose) -> Result<Reservation> {
        let clusters = range.align_outward(self.unit);
        let reservation = self.top.reserve(clusters, purpose).await?;
        let got = reservation.range();
        // The format's contract; a buffer is cut by it, so it is not taken on trust.
        if got.start() != clusters.start() || got.is_empty() || got.len() > clusters.len() {
            return Err(self
                .refuse(ErrorKind::Corrupt, format!("clusters {got} were reserved where {clusters} were asked for")));
        }
        Ok(reservation)
    }

    /// Where the data of a reservation goes.
    pub(crate) fn place(&self, reservation: &Reservation) -> Result<HostOffset> {
        reservation
            .host()
            .ok_or_else(|| self.refuse(ErrorKind::Corrupt, "clusters for data were reserved without a place"))
    }

    /// A link has changed tables.
    pub(crate) fn linked(self: &Rc<Self>, linked: Linked) {
        if linked.linked > 0 {
            self.flusher.changed();
            self.tables_changed(linked.linked);
        }
    }

    /// For prefetching and jobs: the first run at or after `from` that is missing above `base`.
    pub(crate) async fn next_missing(self: &Rc<Self>, from: GuestOffset, base: &StreamBase) -> Result<Option<Missing>> {
        let view = self.view();
        let above = view.base_index(base).ok_or_else(|| self.no_such_base(base))?;
        self.missing_in(&view, from, GuestOffset(self.top.size()), above).await
    }
}
