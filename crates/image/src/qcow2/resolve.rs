//! From a guest's range to what the tables say.
//!
//! L2 tables come into memory a slice at a time; the least recently used ones make room. A look-up never blocks: where the
//! slice is missing it says so, and [`Qcow2Image::load_slice`] brings it.

use super::Qcow2Image;
use crate::{ErrorKind, Mapped, Mapping, Result};
use layout::qcow2::{L1Entry, L2Entry};
use layout::{GuestOffset, GuestRange, HostOffset};
use ring::Iov;
use std::collections::HashMap;
use std::rc::Rc;

/// Bytes of an L2 table that are read at once (a whole table where it is smaller).
const SLICE_BYTES: u64 = 4096;

/// Slices in memory: 8 MiB.
pub(super) const CACHE_SLICES: usize = 2048;

/// A part of an L2 table, as it lies in the file.
type Slice = Rc<[u64]>;

/// Slices in memory, by their place in the file.
#[derive(Default)]
pub(super) struct Slices {
    held: HashMap<HostOffset, (Slice, u64)>,
    clock: u64,
}

impl Slices {
    fn get(&mut self, at: HostOffset) -> Option<Slice> {
        self.clock += 1;
        let (slice, used) = self.held.get_mut(&at)?;
        *used = self.clock;
        Some(Rc::clone(slice))
    }

    fn put(&mut self, at: HostOffset, slice: Slice) {
        if self.held.len() >= CACHE_SLICES {
            // An eighth at once, so that looking for the oldest is rare.
            let mut ages: Vec<u64> = self.held.values().map(|(_, used)| *used).collect();
            let (_, limit, _) = ages.select_nth_unstable(CACHE_SLICES / 8);
            let limit = *limit;
            self.held.retain(|_, (_, used)| *used > limit);
        }
        self.clock += 1;
        self.held.insert(at, (slice, self.clock));
    }
}

/// What a run of the guest's bytes is, before runs are joined.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Piece {
    Is(Mapping),
    /// A packed cluster, whose entry it is.
    Packed(layout::qcow2::Packed),
}

impl Piece {
    fn mapping(self) -> Mapping {
        match self {
            Self::Is(mapping) => mapping,
            Self::Packed(_) => Mapping::Packed,
        }
    }

    /// Whether `next`, which begins `len` bytes behind the start of this, is alike.
    fn goes_on_with(self, len: u64, next: Self) -> bool {
        match (self, next) {
            (Self::Is(Mapping::Data(at)), Self::Is(Mapping::Data(next))) => at.checked_add(len) == Some(next),
            _ => self.mapping() == next.mapping(),
        }
    }
}

impl Qcow2Image {
    /// The first run of `range` (checked), from slices in memory.
    pub(super) fn resolve(&self, range: GuestRange) -> Result<Option<Mapped>> {
        let Some((first, mut len)) = self.piece(range)? else { return Ok(None) };
        while len < range.len() {
            // What cannot be told now, or is damaged, is for a later look-up.
            match self.piece(range.skip(len)) {
                Ok(Some((next, more))) if first.goes_on_with(len, next) => len += more,
                _ => break,
            }
        }
        Ok(Some(Mapped { len, mapping: first.mapping() }))
    }

    /// What the start of `range` is, and how far that goes within its cluster (or, where there is no table, within the table's
    /// reach).
    pub(super) fn piece(&self, range: GuestRange) -> Result<Option<(Piece, u64)>> {
        let at = range.start();
        let Some(table) = self.table(at)? else {
            let reach = self.header.table_reach();
            let len = range.len().min(reach - at.get() % reach);
            return Ok(Some((Piece::Is(Mapping::Unallocated), len)));
        };
        let (slice_at, index) = self.slice_of(table, at);
        let Some(slice) = self.slices.borrow_mut().get(slice_at) else { return Ok(None) };
        let words = self.header.l2_entry_bytes() as usize / 8;
        let raw = slice.get(index * words).copied().unwrap_or(0);
        let extended = if words == 2 { slice.get(index * words + 1).copied().unwrap_or(0) } else { 0 };
        let entry = L2Entry::decode(raw, extended, &self.header).map_err(|why| {
            let place = slice_at + (index * words * 8) as u64;
            self.error(ErrorKind::Corrupt, Some(place), format!("L2 entry for guest offset {at}: {why}"))
        })?;
        let inside = at.get() % self.header.cluster_size();
        let len = range.len().min(self.header.cluster_size() - inside);
        Ok(Some(match entry {
            L2Entry::Unallocated => (Piece::Is(Mapping::Unallocated), len),
            L2Entry::Zero | L2Entry::ZeroAllocated(_) => (Piece::Is(Mapping::Zero), len),
            L2Entry::Data(host) => (Piece::Is(Mapping::Data(host + inside)), len),
            L2Entry::Packed(packed) => (Piece::Packed(packed), len),
            L2Entry::Subclusters(host, map) => {
                let size = self.header.cluster_size() / 32;
                let bit = 1_u32 << (inside / size);
                let mapping = if map.stored & bit != 0 {
                    Mapping::Data(host + inside)
                } else if map.zero & bit != 0 {
                    Mapping::Zero
                } else {
                    Mapping::Unallocated
                };
                (Piece::Is(mapping), len.min(size - inside % size))
            }
        }))
    }

    /// The L2 table for a guest offset, if there is one.
    fn table(&self, at: GuestOffset) -> Result<Option<HostOffset>> {
        let index = (at.get() / self.header.table_reach()) as usize;
        let raw = self.l1.get(index).copied().unwrap_or(0);
        let entry = L1Entry::decode(raw, &self.header).map_err(|why| {
            let place = self.header.l1_table + index as u64 * 8;
            self.error(ErrorKind::Corrupt, Some(place), format!("L1 entry {index}: {why}"))
        })?;
        match entry {
            L1Entry::Unallocated => Ok(None),
            L1Entry::Table(table) if table.get() + self.header.cluster_size() > self.store.size() => {
                let place = self.header.l1_table + index as u64 * 8;
                let what = format!("L1 entry {index} leads to a table past the end of the file");
                Err(self.error(ErrorKind::Corrupt, Some(place), what))
            }
            L1Entry::Table(table) => Ok(Some(table)),
        }
    }

    /// The slice that holds a guest offset's entry, and the entry's index in it.
    fn slice_of(&self, table: HostOffset, at: GuestOffset) -> (HostOffset, usize) {
        let entry_bytes = self.header.l2_entry_bytes();
        let byte = at.get() / self.header.cluster_size() % self.header.l2_entries() * entry_bytes;
        let slice = SLICE_BYTES.min(self.header.cluster_size());
        (table + (byte - byte % slice), (byte % slice / entry_bytes) as usize)
    }

    /// Brings the slice into memory that a look-up at `at` needs.
    pub(super) async fn load_slice(&self, at: GuestOffset) -> Result<()> {
        let Some(table) = self.table(at)? else { return Ok(()) };
        let (slice_at, _) = self.slice_of(table, at);
        if self.slices.borrow_mut().get(slice_at).is_some() {
            return Ok(());
        }
        let bytes = Iov::alloc(SLICE_BYTES.min(self.header.cluster_size()) as usize);
        self.store.read(slice_at, bytes.clone()).await?;
        let words = bytes.to_vec().as_chunks().0.iter().map(|word| u64::from_be_bytes(*word)).collect();
        self.slices.borrow_mut().put(slice_at, words);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_cache_is_bounded_and_keeps_what_is_used() {
        let mut slices = Slices::default();
        let empty: Slice = Rc::from([]);
        for n in 0..3 * CACHE_SLICES as u64 {
            slices.put(HostOffset(n * 4096), Rc::clone(&empty));
            assert!(slices.get(HostOffset(0)).is_some(), "used all the time");
            assert!(slices.held.len() <= CACHE_SLICES);
        }
        assert!(slices.get(HostOffset(4096)).is_none());
    }
}
