//! Where a guest's bytes are.
//!
//! **Invariant.** `lookup` changes nothing and waits for nothing: it sees exactly what was linked when it was called.

use super::Core;
use crate::slices::{Room, SlicePin};
use crate::tables::Place;
use crate::{Mapped, Mapping, Result};
use layout::qed::{L1Entry, L2Entry, SLICE_BYTES, SLICE_ENTRIES, Slice};
use layout::{GuestOffset, GuestRange, HostOffset};
use ring::Iov;
use std::rc::Rc;

/// How far one lookup looks: this many tables that do not exist, or a 64th of it slices. Bounds the time it holds the shard
/// (well below a millisecond); whoever wants more asks again.
const LOOKUP_STEPS: u32 = 4096;
const SLICE_STEPS: u32 = 64;

/// An L2 table to look into.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Table {
    /// Nothing in its reach is allocated.
    Nowhere,
    /// On disk.
    Stored(HostOffset),
    /// Only in memory: what is not in the cache is zeros.
    Fresh(HostOffset),
}

impl Core {
    /// L2 table `index`, as the L1 table says.
    pub(super) fn table(&self, index: u64) -> Result<Table> {
        let place = self.tables.borrow().place(index);
        match place {
            Place::Nowhere => Ok(Table::Nowhere),
            Place::Fresh { at, .. } => Ok(Table::Fresh(at)),
            Place::Stored(raw) => match self.rules.l1(raw, self.store.size()) {
                Ok(L1Entry::Unallocated) => Ok(Table::Nowhere),
                Ok(L1Entry::Table(at)) => Ok(Table::Stored(at)),
                Err(why) => {
                    let at = self.header.get().l1_table + index * 8;
                    Err(self.health.corrupt(at, format!("the L1 table is damaged: {why}; check and repair the image")))
                }
            },
        }
    }

    /// See [`crate::Image::lookup`].
    pub(super) fn lookup(&self, range: GuestRange) -> Result<Option<Mapped>> {
        self.health.check_range(range, self.size())?;
        let geometry = self.geometry;
        let mut run: Option<Mapped> = None;
        let mut at = range.start();
        let mut steps = LOOKUP_STEPS;
        while at < range.end() && steps > 0 {
            let piece = match self.piece(at, range.end()) {
                Ok(piece) => piece,
                // What precedes the damage is good.
                Err(error) => return if run.is_some() { Ok(run) } else { Err(error) },
            };
            let Some((piece, cost)) = piece else { break };
            match &mut run {
                None => run = Some(piece),
                Some(run) if follows(*run, piece.mapping) => run.len += piece.len,
                Some(_) => break,
            }
            at = at + piece.len;
            steps = steps.saturating_sub(cost);
        }
        debug_assert!(run.is_none_or(|r| r.len > 0 && r.len <= range.len()), "{run:?} of {range} ({geometry:?})");
        Ok(run)
    }

    /// The run at `at` within one slice (or one table that does not exist), and what it cost; `None` when not in memory.
    fn piece(&self, at: GuestOffset, end: GuestOffset) -> Result<Option<(Mapped, u32)>> {
        let geometry = self.geometry;
        let unallocated = |until: u64, cost| {
            let len = until.min(end.get()) - at.get();
            Ok(Some((Mapped { len, mapping: Mapping::Unallocated }, cost)))
        };
        let table = self.table(geometry.l1_index(at))?;
        let number = geometry.slice_of(at);
        let slice_end = (geometry.slice_start(number) + geometry.slice_reach()).get();
        match table {
            Table::Nowhere => unallocated(at.align_down(geometry.table_reach()).get() + geometry.table_reach(), 1),
            Table::Stored(start) | Table::Fresh(start) => match self.cache.borrow().get(number) {
                Some(slice) => self.piece_of(slice, at, end.min(GuestOffset(slice_end)), start).map(Some),
                None if matches!(table, Table::Fresh(_)) => unallocated(slice_end, SLICE_STEPS),
                None => Ok(None),
            },
        }
    }

    /// The run at `at`, up to `end` (within the slice, whose table is at `table`).
    fn piece_of(&self, slice: &Slice, at: GuestOffset, end: GuestOffset, table: HostOffset) -> Result<(Mapped, u32)> {
        let geometry = self.geometry;
        let cluster = geometry.cluster_size();
        let first = geometry.l2_index(at) as usize % SLICE_ENTRIES;
        let inside = at.get() & (cluster - 1);
        let clusters = geometry.clusters(inside + (end - at)) as usize;
        let entries = &slice.raw()[first..first + clusters];
        let length = self.store.size();
        let (mapping, run) = match self.rules.l2(entries[0], length) {
            Ok(L2Entry::Unallocated) => (Mapping::Unallocated, entries.iter().take_while(|raw| **raw == 0).count()),
            Ok(L2Entry::Zero) => (Mapping::Zero, entries.iter().take_while(|raw| **raw == 1).count()),
            Ok(L2Entry::Data(host)) => {
                let whole = ((length - host.get()) >> geometry.cluster_bits()) as usize;
                let next = |i: usize| host.get() + i as u64 * cluster;
                let run = entries.iter().take(whole).enumerate().take_while(|(i, raw)| **raw == next(*i)).count();
                (Mapping::Data(host + inside), run)
            }
            Err(why) => {
                let what =
                    format!("the L2 table for guest offset {} is damaged: {why}; check and repair the image", at.get());
                return Err(self.health.corrupt(table + geometry.l2_index(at) * 8, what));
            }
        };
        let len = (run as u64 * cluster - inside).min(end - at);
        Ok((Mapped { len, mapping }, SLICE_STEPS))
    }

    /// Brings the slice for `at` into memory where there is one to bring.
    pub(super) async fn load(self: &Rc<Self>, at: GuestOffset) -> Result<()> {
        let number = self.geometry.slice_of(at);
        while !self.cache.borrow().contains(number) {
            match self.table(self.geometry.l1_index(at))? {
                Table::Nowhere | Table::Fresh(_) => break,
                Table::Stored(table) => self.fetch(number, table).await?,
            }
        }
        Ok(())
    }

    /// Brings slice `number` into memory and keeps it there. Its table exists.
    pub(super) async fn pin_slice(self: &Rc<Self>, number: u64) -> Result<SlicePin<Slice>> {
        let geometry = self.geometry;
        let index = geometry.l1_index(geometry.slice_start(number));
        loop {
            if let Some(pin) = self.cache.pin(number) {
                return Ok(pin);
            }
            match self.table(index)? {
                Table::Stored(table) => self.fetch(number, table).await?,
                Table::Fresh(_) | Table::Nowhere => {
                    self.make_room().await;
                    // Meanwhile somebody else may have filled the slice, and a commit may have published the table. As
                    // long as it is not published, whatever was linked in it is still in the cache.
                    let stored = matches!(self.table(index)?, Table::Stored(_));
                    let mut cache = self.cache.borrow_mut();
                    if !stored && !cache.contains(number) {
                        cache.insert(number, Slice::zeroed());
                    }
                }
            }
        }
    }

    /// Reads slice `number` of the table at `table`, or waits for whoever does. The caller looks again afterwards.
    async fn fetch(self: &Rc<Self>, number: u64, table: HostOffset) -> Result<()> {
        let other = self.cache.borrow().loading(number).map(ring::sync::Event::wait);
        if let Some(other) = other {
            other.await;
            return Ok(());
        }
        let _loading = self.cache.begin_load(number);
        let bytes = Iov::alloc(SLICE_BYTES);
        self.store.read(self.geometry.slice_at(table, number), bytes.clone()).await?;
        let mut raw = [0; SLICE_BYTES];
        bytes.read(0, &mut raw);
        self.make_room().await;
        let mut cache = self.cache.borrow_mut();
        if !cache.contains(number) {
            cache.insert(number, Slice::decode(&raw));
        }
        Ok(())
    }

    /// Waits until there is room for one more slice. In a poisoned image what is dirty stays for good: there the cache may
    /// grow beyond its budget by what is being looked at, so that reads go on.
    async fn make_room(self: &Rc<Self>) {
        loop {
            let room = self.cache.borrow_mut().make_room();
            if self.health.is_poisoned() {
                return;
            }
            match room {
                Room::Free => return,
                // A failure poisons the image, which ends this loop.
                Room::Commit => drop(self.commit().await),
                Room::Wait => self.unpinned.wait().await,
            }
        }
    }
}

fn follows(run: Mapped, next: Mapping) -> bool {
    match (run.mapping, next) {
        (Mapping::Data(at), Mapping::Data(next)) => at + run.len == next,
        (Mapping::Zero, Mapping::Zero) | (Mapping::Unallocated, Mapping::Unallocated) => true,
        _ => false,
    }
}
