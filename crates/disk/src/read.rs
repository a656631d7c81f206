//! Reading: find where the bytes are, move them straight into the caller's memory.
//!
//! Reads hold no lock. What keeps them right:
//! * Layers below the top never change, but for the one that a commit writes to; then they are looked up again as the top is.
//! * In the top, a mapping to data changes only by a *drop* (zeroing, discarding, a write to what is packed or shared), and the
//!   freed cluster may be written anew for another range while a slow read still looks at it. So a read that was in flight during a drop looks again before it
//!   answers ([`Drops`]), and starts over if its mapping is another now.

use crate::disk::Inner;
use crate::fetch::Fetch;
use crate::pieces::run_all;
use crate::view::{Found, View, mapped};
use image::{Mapped, Mapping, Result};
use layout::{GuestRange, HostOffset};
use ring::Iov;
use smallvec::SmallVec;
use std::cell::Cell;
use std::rc::Rc;

/// Counts operations that take mappings away.
#[derive(Default)]
pub(crate) struct Drops {
    begun: Cell<u64>,
    ended: Cell<u64>,
}

/// A moment in the count of drops.
#[derive(Clone, Copy)]
pub(crate) struct Mark(u64);

impl Drops {
    /// Before looking up.
    pub(crate) fn mark(&self) -> Mark {
        Mark(self.ended.get())
    }

    /// Whether no drop was in flight at any time since `mark`.
    pub(crate) fn none_since(&self, mark: Mark) -> bool {
        self.begun.get() == mark.0
    }

    /// A drop begins; it ends when the token is dropped.
    pub(crate) fn begin(&self) -> Dropping<'_> {
        self.begun.set(self.begun.get() + 1);
        Dropping { drops: self }
    }
}

/// A drop in flight.
pub(crate) struct Dropping<'a> {
    drops: &'a Drops,
}

impl Drop for Dropping<'_> {
    fn drop(&mut self) {
        self.drops.ended.set(self.drops.ended.get() + 1);
    }
}

/// A part of a read, to be moved side by side with the others. `at` is where it goes in the caller's memory.
enum Piece {
    /// From the top's store.
    Top { range: GuestRange, at: usize, host: HostOffset },
    /// From the store of a layer below.
    Below { layer: usize, range: GuestRange, at: usize, host: HostOffset },
    /// Packed, in the store of a layer (the top is 0).
    Packed { layer: usize, range: GuestRange, at: usize },
    /// From the memory of a fetch.
    Fetched { fetch: Rc<Fetch>, range: GuestRange, at: usize },
}

type Pieces = SmallVec<[Piece; 4]>;

impl Inner {
    /// Reads `range`, which lies on the disk, into `into`, which is as long.
    pub(crate) async fn read(self: &Rc<Self>, range: GuestRange, into: Iov) -> Result<()> {
        if range.is_empty() {
            return Ok(());
        }
        let mark = self.drops.mark();
        if let Some(Mapped { len, mapping: Mapping::Data(host) }) = self.top.lookup(range)?
            && len == range.len()
        {
            self.top.store().read(host, into.clone()).await?;
            if self.drops.none_since(mark) || self.is_still_at(range, host)? {
                return Ok(());
            }
        }
        self.held(async || self.read_pieces(range, &into).await).await
    }

    /// Whether `range` is where it was, as far as tables in memory tell.
    fn is_still_at(&self, range: GuestRange, host: HostOffset) -> Result<bool> {
        let now = self.top.lookup(range)?;
        Ok(now.is_some_and(|now| now.len == range.len() && now.mapping.stored() == Some(host)))
    }

    /// Whether `range` is packed still, as far as tables in memory tell.
    fn is_packed_still(&self, range: GuestRange) -> Result<bool> {
        let now = self.top.lookup(range)?;
        Ok(now.is_some_and(|now| now.len == range.len() && now.mapping == Mapping::Packed))
    }

    /// Whether `range` below the top is where it was found. Only while a commit writes to a layer below can it be elsewhere.
    async fn is_below_still(&self, view: &View, range: GuestRange, found: Found, mark: Mark) -> Result<bool> {
        if !self.kept.changes_below.get() || self.drops.none_since(mark) {
            return Ok(true);
        }
        let now = view.resolve(1, view.depth(), range).await?;
        Ok(now.len == range.len() && now.found == found)
    }

    /// Plans the whole read, then moves its pieces. (Planning first keeps tables from being waited for while pieces of the
    /// same request stand still.)
    pub(crate) async fn read_pieces(self: &Rc<Self>, range: GuestRange, into: &Iov) -> Result<()> {
        let view = self.view();
        let mark = self.drops.mark();
        let mut pieces = Pieces::new();
        let mut rest = range;
        while !rest.is_empty() {
            let at = usize_of(rest.start() - range.start());
            let Mapped { len, mapping } = mapped(&*self.top, rest).await?;
            let run = rest.first(len);
            match mapping {
                Mapping::Data(host) | Mapping::Shared(host) => pieces.push(Piece::Top { range: run, at, host }),
                Mapping::Packed => pieces.push(Piece::Packed { layer: 0, range: run, at }),
                Mapping::Zero => into.slice(at..at + usize_of(len)).fill(0),
                Mapping::Unallocated if self.keeps_what_it_reads(&view) => {
                    self.plan_copy_on_read(&view, run, at, into, &mut pieces).await?;
                }
                Mapping::Unallocated => plan_below(&view, run, at, into, &mut pieces).await?,
            }
            rest = rest.skip(len);
        }
        self.run_pieces(&view, pieces, into, mark).await
    }

    /// Whether reads from below are to be kept in the top.
    fn keeps_what_it_reads(&self, view: &View) -> bool {
        self.options.get().copy_on_read && view.depth() > 1 && !self.read_only()
    }

    /// The index of the lowest layer that is copied from.
    fn copies_down_to(&self, view: &View) -> usize {
        let down_to = self.kept.copies_down_to.borrow();
        let place = down_to.as_ref().and_then(|node| view.layers.iter().position(|layer| layer.node == *node));
        place.unwrap_or(usize::MAX)
    }

    /// Plans a read of `run`, which the top does not have, so that what comes from below can be kept: whole clusters are
    /// fetched into memory of our own, single-flight. Known zeros are not worth keeping; nor is anything when the memory
    /// for it is used up.
    async fn plan_copy_on_read(
        self: &Rc<Self>,
        view: &Rc<View>,
        run: GuestRange,
        at: usize,
        into: &Iov,
        pieces: &mut Pieces,
    ) -> Result<()> {
        let lowest = self.copies_down_to(view);
        let mut rest = run;
        while !rest.is_empty() {
            let at = at + usize_of(rest.start() - run.start());
            let below = view.resolve(1, view.depth(), rest).await?;
            let (Found::Data(layer, _) | Found::Packed(layer)) = below.found else {
                into.slice(at..at + usize_of(below.len)).fill(0);
                rest = rest.skip(below.len);
                continue;
            };
            let wanted = rest.first(below.len);
            let fetch = if layer > lowest { None } else { self.fetch_to_keep(view, wanted) };
            if let Some(fetch) = fetch {
                // The run ends where the top has clusters of its own; a fetch may reach further than this read.
                let part = wanted.intersect(fetch.range());
                rest = rest.skip(part.len());
                pieces.push(Piece::Fetched { fetch, range: part, at });
            } else {
                plan_below(view, wanted, at, into, pieces).await?;
                rest = rest.skip(wanted.len());
            }
        }
        Ok(())
    }

    async fn run_pieces(self: &Rc<Self>, view: &Rc<View>, mut pieces: Pieces, into: &Iov, mark: Mark) -> Result<()> {
        match pieces.len() {
            0 => Ok(()),
            1 => self.run_piece(view, pieces.remove(0), into, mark).await,
            _ => run_all(pieces.into_iter().map(|piece| self.run_piece(view, piece, into, mark))).await,
        }
    }

    async fn run_piece(self: &Rc<Self>, view: &Rc<View>, piece: Piece, into: &Iov, mark: Mark) -> Result<()> {
        match piece {
            Piece::Top { range, at, host } => {
                let into = into.slice(at..at + usize_of(range.len()));
                self.top.store().read(host, into.clone()).await?;
                if self.drops.none_since(mark) || self.is_still_at(range, host)? {
                    return Ok(());
                }
                Box::pin(self.read_pieces(range, &into)).await
            }
            Piece::Below { layer, range, at, host } => {
                let into = into.slice(at..at + usize_of(range.len()));
                view.image(layer).store().read(host, into.clone()).await?;
                self.counters.fetched(range.len());
                if self.is_below_still(view, range, Found::Data(layer, host), mark).await? {
                    return Ok(());
                }
                Box::pin(self.read_below(view, range, &into)).await
            }
            Piece::Packed { layer, range, at } => {
                let into = into.slice(at..at + usize_of(range.len()));
                let unpacked = view.image(layer).unpack(range, into.clone()).await;
                if layer > 0 {
                    if !self.is_below_still(view, range, Found::Packed(layer), mark).await? {
                        return Box::pin(self.read_below(view, range, &into)).await;
                    }
                    unpacked?;
                    self.counters.fetched(range.len());
                    return Ok(());
                }
                // Where it was replaced meanwhile, its place may have been somebody else's already.
                if self.drops.none_since(mark) || self.is_packed_still(range)? {
                    return unpacked;
                }
                Box::pin(self.read_pieces(range, &into)).await
            }
            Piece::Fetched { fetch, range, at } => {
                let into = into.slice(at..at + usize_of(range.len()));
                match fetch.data().await {
                    Ok(data) => {
                        let from = usize_of(range.start() - fetch.range().start());
                        into.copy_from(&data.slice(from..from + into.len()));
                        Ok(())
                    }
                    Err(error) if error.is_unavailable() || fetch.range() == range => Err(error),
                    // The fetch was for more than this read asks for: a bad spot elsewhere is none of its business.
                    Err(_) => self.read_below(view, range, &into).await,
                }
            }
        }
    }

    /// Reads `range` as the layers below the top show it.
    pub(crate) async fn read_below(self: &Rc<Self>, view: &Rc<View>, range: GuestRange, into: &Iov) -> Result<()> {
        let mark = self.drops.mark();
        let mut pieces = Pieces::new();
        plan_below(view, range, 0, into, &mut pieces).await?;
        Box::pin(self.run_pieces(view, pieces, into, mark)).await
    }
}

/// Plans a read of `run` from the layers below the top. Zeros are filled in at once.
async fn plan_below(view: &View, run: GuestRange, at: usize, into: &Iov, pieces: &mut Pieces) -> Result<()> {
    let mut rest = run;
    while !rest.is_empty() {
        let at = at + usize_of(rest.start() - run.start());
        let below = view.resolve(1, view.depth(), rest).await?;
        let (range, len) = (rest.first(below.len), usize_of(below.len));
        match below.found {
            Found::Data(layer, host) => pieces.push(Piece::Below { layer, range, at, host }),
            Found::Packed(layer) => pieces.push(Piece::Packed { layer, range, at }),
            Found::Zero(_) | Found::PastEnd(_) | Found::Nothing => into.slice(at..at + len).fill(0),
        }
        rest = rest.skip(below.len);
    }
    Ok(())
}

/// A length within a buffer, which is a `usize` by nature.
pub(crate) fn usize_of(len: u64) -> usize {
    usize::try_from(len).expect("no buffer is longer than memory")
}
