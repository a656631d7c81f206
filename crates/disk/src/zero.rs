//! Zeroing and discarding: operations that take mappings away.
//!
//! **Invariants.** Whole clusters are dropped under an exclusive lock, in steps, so that a request for the whole disk does not
//! keep everybody out until it ends. What was zeroed or discarded never lets anything below show through again, not even
//! after a stream lets go of layers in between: where *any* layer below reaches, the zeros are marked.

use crate::disk::Inner;
use crate::read::usize_of;
use crate::view::{Found, mapped};
use image::{Mapped, Mapping, Result};
use layout::{GuestOffset, GuestRange};
use ring::Iov;
use std::rc::Rc;

/// One step. Marking it takes table entries only; where data must be zeroed in place it is what a disk does in well under a
/// second.
const STEP: u64 = 256 << 20;
/// Zeros are written in parts of at most this, from memory.
const WRITE_STEP: u64 = 1 << 20;

impl Inner {
    /// Makes `range` (on the disk) read as zeros.
    pub(crate) async fn write_zeroes(self: &Rc<Self>, range: GuestRange, unmap: bool, fua: bool) -> Result<()> {
        let unmap = unmap && self.options.get().discard;
        let whole = self.whole_clusters(range);
        if whole.is_empty() {
            self.write_zeroes_to_part(range).await?;
        } else {
            self.write_zeroes_to_part(GuestRange::between(range.start(), whole.start())).await?;
            self.drop_clusters(whole, unmap).await?;
            self.write_zeroes_to_part(GuestRange::between(whole.end(), range.end())).await?;
        }
        if fua || self.options.get().write_through { self.commit().await } else { Ok(()) }
    }

    /// Gives the whole clusters of `range` back.
    pub(crate) async fn discard(self: &Rc<Self>, range: GuestRange) -> Result<()> {
        let whole = self.whole_clusters(range);
        if whole.is_empty() || !self.options.get().discard {
            return Ok(());
        }
        self.drop_clusters(whole, true).await?;
        if self.options.get().write_through { self.commit().await } else { Ok(()) }
    }

    /// The clusters that lie in `range` as a whole; the disk's last one may be cut off by its end.
    fn whole_clusters(&self, range: GuestRange) -> GuestRange {
        let end = if range.end().get() == self.top.size() { range.end() } else { range.end().align_down(self.unit) };
        let start = range.start().align_up(self.unit).min(end);
        GuestRange::between(start, end)
    }

    async fn drop_clusters(self: &Rc<Self>, whole: GuestRange, unmap: bool) -> Result<()> {
        let step = STEP.max(self.unit);
        let mut rest = whole;
        while !rest.is_empty() {
            let held = self.locks.exclusive(rest.first(step).align_outward(self.unit)).await;
            let part = self.whole_clusters(rest.first(step));
            if part.is_empty() {
                // The disk has grown while this waited: its end lies inside of a cluster no more, the request's does.
                drop(held);
                return self.write_zeroes_to_part(rest).await;
            }
            self.drop_held(part, unmap).await?;
            rest = rest.skip(part.len());
        }
        Ok(())
    }

    /// Makes whole clusters, which the caller holds exclusively, read as zeros.
    pub(crate) async fn drop_held(self: &Rc<Self>, whole: GuestRange, unmap: bool) -> Result<()> {
        let below_ends = GuestOffset(self.view().below_ends()).align_up(self.unit);
        let masked = GuestRange::between(whole.start(), whole.end().min(below_ends));
        let unmasked = whole.skip(masked.len());
        for (part, masked) in [(masked, true), (unmasked, false)] {
            if part.is_empty() {
                continue;
            }
            let dropping = self.drops.begin();
            let result = self.top.write_zeroes(part, unmap, masked).await;
            drop(dropping);
            self.flusher.changed();
            self.flusher.mapped();
            self.tables_changed(0);
            result?;
        }
        Ok(())
    }

    /// Makes a part of a cluster read as zeros: nothing is written where it does already.
    async fn write_zeroes_to_part(self: &Rc<Self>, part: GuestRange) -> Result<()> {
        let mut rest = part;
        while !rest.is_empty() {
            // At most two clusters: a request that holds no whole one may span a boundary.
            let cluster_end = (rest.start() + 1).align_up(self.unit);
            let edge = rest.intersect(GuestRange::between(rest.start(), cluster_end));
            rest = rest.skip(edge.len());
            if self.reads_as_zeros(edge).await? {
                continue;
            }
            let mut edge = edge;
            let zeros = Iov::zeroed(usize_of(edge.len().min(WRITE_STEP)));
            while !edge.is_empty() {
                let step = edge.first(WRITE_STEP);
                self.write_pieces(step, zeros.slice(0..usize_of(step.len()))).await?;
                edge = edge.skip(step.len());
            }
        }
        Ok(())
    }

    /// Whether the tables say that all of `part` (of one cluster, which may be mapped in parts) reads as zeros.
    async fn reads_as_zeros(&self, part: GuestRange) -> Result<bool> {
        let mut rest = part;
        while !rest.is_empty() {
            let Mapped { len, mapping } = mapped(&*self.top, rest).await?;
            match mapping {
                Mapping::Data(_) | Mapping::Shared(_) | Mapping::Packed => return Ok(false),
                Mapping::Zero => {}
                Mapping::Unallocated => {
                    let (run, view) = (rest.first(len), self.view());
                    let below = self.held(async || view.resolve(1, view.depth(), run).await).await?;
                    if below.len < run.len() || matches!(below.found, Found::Data(..) | Found::Packed(_)) {
                        return Ok(false);
                    }
                }
            }
            rest = rest.skip(len);
        }
        Ok(true)
    }
}
