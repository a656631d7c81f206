//! Writing: in place where the top has the bytes, into reserved clusters where it has not.
//!
//! **Invariants.**
//! * A write in place holds its range shared; a write that allocates holds its whole clusters exclusively, from the look-up
//!   it relies on to the link.
//! * New clusters are linked only after all their bytes are written, the guest's and the fill around them, in one go. A write
//!   that fails links nothing; its clusters are given back.
//! * The guest's memory is handed to the store and never looked at: it may change while the write is in flight.
//! * Fill comes from below, or from a fetch of the same cluster that is under way. A write of whole clusters needs none and
//!   waits for nobody's fetch.

use crate::disk::Inner;
use crate::pieces::run_all;
use crate::read::usize_of;
use crate::view::mapped;
use futures_util::future::try_join;
use image::{Keep, Mapped, Mapping, Purpose, Reservation, Result};
use layout::{GuestRange, HostOffset, HostRange};
use ring::Iov;
use smallvec::SmallVec;
use std::rc::Rc;

/// A part of a write, as the tables looked when it was planned.
#[derive(Clone, Copy, Debug)]
struct Piece {
    range: GuestRange,
    in_place: bool,
}

impl Inner {
    /// Writes `from` to `range`, which lies on the disk and is as long.
    pub(crate) async fn write(self: &Rc<Self>, range: GuestRange, from: Iov, fua: bool) -> Result<()> {
        let durable = fua || self.options.get().write_through;
        if !range.is_empty() {
            if let Some(held) = self.locks.try_shared(range)
                && let Some(Mapped { len, mapping: Mapping::Data(host) }) = self.top.lookup(range)?
                && len == range.len()
            {
                // The mapping is durable, so these bytes are all there is to make durable.
                let through = durable && self.mappings_are_durable();
                self.write_store(host, from, through).await?;
                self.wrote_in_place();
                if through || !durable {
                    return Ok(());
                }
                drop(held);
                return self.commit().await;
            }
            self.write_pieces(range, from).await?;
        }
        if durable { self.commit().await } else { Ok(()) }
    }

    /// Writes to the top's store.
    pub(crate) async fn write_store(&self, host: HostOffset, from: Iov, through: bool) -> Result<()> {
        let range = HostRange::new(host, from.len() as u64);
        if let Some(thresholds) = &self.thresholds {
            thresholds.file.reaches(range.end().get());
        }
        let result = self.top.store().write(host, from, through).await;
        self.counters.wrote(range);
        if !through || result.is_err() {
            self.flusher.changed();
        }
        Ok(result?)
    }

    /// A write in place hangs on tables in memory all the same, if what it wrote to was brought in and not committed yet.
    fn wrote_in_place(&self) {
        if !self.mappings_are_durable() {
            self.flusher.mapped();
        }
    }

    /// The general case: parts in place, parts into new clusters, side by side. Each part takes one lock and looks again
    /// under it, so the plan is only a guess at where to cut.
    pub(crate) async fn write_pieces(self: &Rc<Self>, range: GuestRange, from: Iov) -> Result<()> {
        let mut pieces: SmallVec<[Piece; 4]> = SmallVec::new();
        let mut rest = range;
        while !rest.is_empty() {
            let Mapped { len, mapping } = mapped(&*self.top, rest).await?;
            let run = rest.first(len);
            let in_place = matches!(mapping, Mapping::Data(_));
            match pieces.last_mut() {
                // Zeros next to nothing, say: one allocation.
                Some(last) if !last.in_place && !in_place => {
                    last.range = last.range.start().range(last.range.len() + len);
                }
                _ => pieces.push(Piece { range: run, in_place }),
            }
            rest = rest.skip(len);
        }
        let write = |piece: Piece| {
            let at = usize_of(piece.range.start() - range.start());
            self.write_piece(piece, from.slice(at..at + usize_of(piece.range.len())))
        };
        match *pieces {
            [piece] => write(piece).await,
            _ => run_all(pieces.iter().copied().map(write)).await,
        }
    }

    async fn write_piece(self: &Rc<Self>, piece: Piece, from: Iov) -> Result<()> {
        let range = piece.range;
        if piece.in_place {
            let _held = self.locks.shared(range).await;
            let now = mapped(&*self.top, range).await?;
            if let Mapping::Data(host) = now.mapping
                && now.len == range.len()
            {
                self.write_store(host, from, false).await?;
                self.wrote_in_place();
                return Ok(());
            }
        }
        let _held = self.locks.exclusive(range.align_outward(self.unit)).await;
        self.write_held(range, from).await
    }

    /// Writes `range`, whose clusters the caller holds exclusively.
    async fn write_held(self: &Rc<Self>, range: GuestRange, from: Iov) -> Result<()> {
        let mut rest = range;
        while !rest.is_empty() {
            let first = mapped(&*self.top, rest).await?;
            let mut run = rest.first(first.len);
            let at = usize_of(rest.start() - range.start());
            if let Mapping::Data(host) = first.mapping {
                self.write_store(host, from.slice(at..at + usize_of(run.len())), false).await?;
                self.wrote_in_place();
            } else {
                // As far as the top has no data: one allocation, if space allows.
                while run.len() < rest.len() {
                    let next = mapped(&*self.top, rest.skip(run.len())).await?;
                    if matches!(next.mapping, Mapping::Data(_)) {
                        break;
                    }
                    run = rest.first(run.len() + next.len);
                }
                let from = from.slice(at..at + usize_of(run.len()));
                self.write_new(run, from).await?;
            }
            rest = rest.skip(run.len());
        }
        Ok(())
    }

    /// Writes `run`, of which the top has no data that may be written over, into new clusters.
    async fn write_new(self: &Rc<Self>, run: GuestRange, from: Iov) -> Result<()> {
        let clusters = run.align_outward(self.unit);
        let before = GuestRange::between(clusters.start(), run.start());
        let after = GuestRange::between(run.end(), clusters.end());
        // Fetched before anything is reserved: a source may take its time, and reservations hold tables in memory.
        let _budget = self.fill_budget.acquire(usize_of(before.len() + after.len())).await;
        let (head, tail) = try_join(self.fill(before), self.fill(after)).await?;
        let replaces = self.holds_something(clusters).await?;
        let mut rest = clusters;
        while !rest.is_empty() {
            let reservation = self.reserve(rest, Purpose::Data).await?;
            let part = reservation.range();
            // Fill of zeros needs no writing where there are zeros.
            let head_part = if head.is_there(reservation.zeroed()) { before.first(0) } else { before.intersect(part) };
            let tail_part = if tail.is_there(reservation.zeroed()) { after.first(0) } else { after.intersect(part) };
            let guest_part = run.intersect(part);
            let guest_at = usize_of(guest_part.start() - run.start());
            let bytes = head
                .bytes(before, head_part)
                .join(&from.slice(guest_at..guest_at + usize_of(guest_part.len())))
                .join(&tail.bytes(after, tail_part));
            let at = guest_part.start() - part.start() - head_part.len();
            self.write_store(self.place(&reservation)? + at, bytes, false).await?;
            self.flusher.mapped();
            self.link_new(reservation, replaces);
            rest = rest.skip(part.len());
        }
        Ok(())
    }

    /// Publishes what was written; `replaces`: something that reads may be looking at goes away.
    fn link_new(self: &Rc<Self>, reservation: Reservation, replaces: bool) {
        let dropping = replaces.then(|| self.drops.begin());
        self.linked(reservation.link(Keep::New, |_| false));
        drop(dropping);
    }

    /// Whether the top has stored anything of `clusters`: packed, shared, or a part of one.
    async fn holds_something(&self, clusters: GuestRange) -> Result<bool> {
        let mut rest = self.clip(clusters);
        while !rest.is_empty() {
            let Mapped { len, mapping } = mapped(&*self.top, rest).await?;
            if !matches!(mapping, Mapping::Unallocated | Mapping::Zero) {
                return Ok(true);
            }
            rest = rest.skip(len);
        }
        Ok(false)
    }

    /// Puts whole clusters, which the caller holds exclusively, as they read now into new clusters: `bytes`.
    pub(crate) async fn rewrite(self: &Rc<Self>, clusters: GuestRange, bytes: Iov) -> Result<()> {
        let mut rest = clusters;
        while !rest.is_empty() {
            let reservation = self.reserve(rest, Purpose::Data).await?;
            let part = reservation.range();
            let at = usize_of(part.start() - clusters.start());
            let bytes = bytes.slice(at..at + usize_of(part.len()));
            self.write_store(self.place(&reservation)?, bytes, false).await?;
            self.link_new(reservation, true);
            rest = rest.skip(part.len());
        }
        Ok(())
    }

    /// What `part` of a cluster reads as now; zeros past the disk's end.
    pub(crate) async fn fill(self: &Rc<Self>, part: GuestRange) -> Result<Fill> {
        let on_disk = self.clip(part);
        if on_disk.is_empty() {
            return Ok(Fill::Zeros);
        }
        let Mapped { len, mapping } = mapped(&*self.top, on_disk).await?;
        if len == on_disk.len() {
            return self.fill_alike(part, mapping).await;
        }
        // A cluster in parts.
        let data = Iov::zeroed(usize_of(part.len()));
        let mut rest = on_disk;
        while !rest.is_empty() {
            let Mapped { len, mapping } = mapped(&*self.top, rest).await?;
            if let Fill::Bytes(bytes) = self.fill_alike(rest.first(len), mapping).await? {
                let at = usize_of(rest.start() - part.start());
                data.slice(at..at + bytes.len()).copy_from(&bytes);
            }
            rest = rest.skip(len);
        }
        Ok(Fill::of(data))
    }

    /// The same, where all of it is mapped alike.
    async fn fill_alike(self: &Rc<Self>, part: GuestRange, mapping: Mapping) -> Result<Fill> {
        let view = self.view();
        let len = usize_of(part.len());
        let on_disk = self.clip(part);
        let nothing_below = mapping == Mapping::Unallocated && view.depth() == 1;
        if on_disk.is_empty() || mapping == Mapping::Zero || nothing_below {
            return Ok(Fill::Zeros);
        }
        let data = Iov::alloc(len);
        let used = usize_of(on_disk.len());
        data.slice(used..len).fill(0);
        if mapping == Mapping::Packed {
            self.top.unpack(on_disk, data.slice(0..used)).await?;
            return Ok(Fill::of(data));
        }
        if let Some(host) = mapping.stored() {
            self.top.store().read(host, data.slice(0..used)).await?;
            return Ok(Fill::of(data));
        }
        let mut hold = self.hold();
        loop {
            if let Some(fetch) = self.fetches.covering(part.start()) {
                match fetch.data().await {
                    Ok(fetched) => {
                        let at = usize_of(part.start() - fetch.range().start());
                        return Ok(Fill::of(fetched.slice(at..at + len)));
                    }
                    Err(error) if error.is_unavailable() => {
                        hold.or_fail(error).await?;
                        continue;
                    }
                    // More was fetched than is needed here: try for the part alone.
                    Err(_) => {}
                }
            }
            match self.read_below(&view, on_disk, &data.slice(0..used)).await {
                Ok(()) => return Ok(Fill::of(data)),
                Err(error) => hold.or_fail(error).await?,
            }
        }
    }
}

/// What surrounds a guest's bytes in a new cluster.
pub(crate) enum Fill {
    /// Nothing but zeros.
    Zeros,
    /// These bytes.
    Bytes(Iov),
}

impl Fill {
    fn of(bytes: Iov) -> Self {
        if bytes.is_zero() { Self::Zeros } else { Self::Bytes(bytes) }
    }

    /// Whether clusters that hold zeros (if `zeroed`) hold it already.
    fn is_there(&self, zeroed: bool) -> bool {
        zeroed && matches!(self, Self::Zeros)
    }

    /// The bytes of `part`, which lies in `whole` (or is empty), all that this fill is for.
    fn bytes(&self, whole: GuestRange, part: GuestRange) -> Iov {
        match self {
            _ if part.is_empty() => Iov::empty(),
            Self::Zeros => Iov::zeroed(usize_of(part.len())),
            Self::Bytes(bytes) => {
                let at = usize_of(part.start() - whole.start());
                bytes.slice(at..at + usize_of(part.len()))
            }
        }
    }
}
