//! The L1 table in memory, and L2 tables that are not on disk yet.
//!
//! **Invariants.**
//! * `l1` holds what is on disk (or being written by the commit under way): only a commit, a resize or a repair changes it.
//! * A *fresh* table has clusters of its own that read as zeros, and no L1 entry points there yet. It goes away with its last
//!   pin unless an entry was linked in it by then; a linked one stays until a commit has published it.

use layout::HostOffset;
use layout::qed::{SLICE_BYTES, SLICE_ENTRIES};
use std::collections::HashMap;

/// Where an L2 table is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Place {
    /// There is none.
    Nowhere,
    /// What the L1 entry says, still to be decoded. Not 0.
    Stored(u64),
    /// Only in memory.
    Fresh {
        /// Where it will be.
        at: HostOffset,
        /// Whether it has an entry.
        linked: bool,
    },
}

#[derive(Debug)]
struct Fresh {
    at: HostOffset,
    pins: u32,
    linked: bool,
}

/// An L2 table to be published: its L1 index and where it lies.
pub(super) type Publication = (u64, HostOffset);

/// The tables of one image.
#[derive(Debug, Default)]
pub(super) struct Tables {
    l1: Vec<u64>,
    fresh: HashMap<u64, Fresh>,
}

impl Tables {
    /// From the L1 entries that the image's size needs, rounded up to whole slices.
    pub(super) fn new(l1: Vec<u64>) -> Self {
        debug_assert!(l1.len().is_multiple_of(SLICE_ENTRIES));
        Self { l1, fresh: HashMap::new() }
    }

    /// L1 entries in memory.
    pub(super) fn l1(&self) -> &[u64] {
        &self.l1
    }

    /// Adds L1 entries for a larger disk.
    pub(super) fn extend_l1(&mut self, more: Vec<u64>) {
        self.l1.extend(more);
    }

    /// Where table `index` is.
    #[inline]
    pub(super) fn place(&self, index: u64) -> Place {
        match self.l1.get(index as usize) {
            Some(0) | None => match self.fresh.get(&index) {
                Some(fresh) => Place::Fresh { at: fresh.at, linked: fresh.linked },
                None => Place::Nowhere,
            },
            Some(raw) => Place::Stored(*raw),
        }
    }

    /// Adds a fresh table with one pin.
    pub(super) fn add_fresh(&mut self, index: u64, at: HostOffset) {
        let before = self.fresh.insert(index, Fresh { at, pins: 1, linked: false });
        debug_assert!(before.is_none(), "table {index} is fresh twice");
    }

    /// Keeps table `index` if it is fresh.
    pub(super) fn pin(&mut self, index: u64) {
        if let Some(fresh) = self.fresh.get_mut(&index) {
            fresh.pins += 1;
        }
    }

    /// Undoes one pin. Returns where the table was if it is gone now and its clusters are to be given back.
    pub(super) fn unpin(&mut self, index: u64) -> Option<HostOffset> {
        let fresh = self.fresh.get_mut(&index)?;
        fresh.pins = fresh.pins.saturating_sub(1);
        if fresh.pins > 0 || fresh.linked {
            return None;
        }
        self.fresh.remove(&index).map(|fresh| fresh.at)
    }

    /// An entry was set in table `index`.
    pub(super) fn link(&mut self, index: u64) {
        if let Some(fresh) = self.fresh.get_mut(&index) {
            fresh.linked = true;
        }
    }

    /// Fresh tables that have entries, in order.
    pub(super) fn unpublished(&self) -> Vec<Publication> {
        let mut tables: Vec<_> = self.fresh.iter().filter(|(_, t)| t.linked).map(|(index, t)| (*index, t.at)).collect();
        tables.sort_unstable();
        tables
    }

    /// The slices of the L1 table that change when `tables` are published: offset within the table, bytes.
    pub(super) fn l1_slices(&self, tables: &[Publication]) -> Vec<(u64, [u8; SLICE_BYTES])> {
        let mut slices: Vec<(u64, [u8; SLICE_BYTES])> = Vec::new();
        for (index, at) in tables {
            let number = index / SLICE_ENTRIES as u64;
            let offset = number * SLICE_BYTES as u64;
            if slices.last().is_none_or(|(last, _)| *last != offset) {
                let first = number as usize * SLICE_ENTRIES;
                let mut bytes = [0; SLICE_BYTES];
                let entries = self.l1.get(first..first + SLICE_ENTRIES).unwrap_or_default();
                for (bytes, entry) in bytes.as_chunks_mut::<8>().0.iter_mut().zip(entries) {
                    *bytes = entry.to_le_bytes();
                }
                slices.push((offset, bytes));
            }
            if let Some((_, bytes)) = slices.last_mut() {
                bytes.as_chunks_mut::<8>().0[*index as usize % SLICE_ENTRIES] = at.get().to_le_bytes();
            }
        }
        slices
    }

    /// `tables` are on disk, their L1 entries too.
    pub(super) fn published(&mut self, tables: &[Publication]) {
        for (index, at) in tables {
            self.fresh.remove(index);
            if let Some(entry) = self.l1.get_mut(*index as usize) {
                *entry = at.get();
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn unlinked_table_goes_with_its_last_pin() {
        let mut tables = Tables::new(vec![0; 512]);
        tables.add_fresh(3, HostOffset(8192));
        tables.pin(3);
        assert_eq!(tables.unpin(3), None);
        assert_eq!(tables.place(3), Place::Fresh { at: HostOffset(8192), linked: false });
        assert_eq!(tables.unpin(3), Some(HostOffset(8192)));
        assert_eq!(tables.place(3), Place::Nowhere);
    }

    #[test]
    fn linked_table_stays_until_published() {
        let mut tables = Tables::new(vec![0; 1024]);
        tables.add_fresh(513, HostOffset(8192));
        tables.link(513);
        assert_eq!(tables.unpin(513), None);
        let due = tables.unpublished();
        assert_eq!(due, [(513, HostOffset(8192))]);
        let slices = tables.l1_slices(&due);
        assert_eq!((slices.len(), slices[0].0), (1, 4096));
        assert_eq!(slices[0].1[8..16], 8192u64.to_le_bytes());
        assert_eq!(tables.place(513), Place::Fresh { at: HostOffset(8192), linked: true });
        tables.published(&due);
        assert_eq!(tables.place(513), Place::Stored(8192));
        assert!(tables.unpublished().is_empty());
    }

    #[test]
    fn neighbours_share_a_slice_and_keep_what_is_there() {
        let mut l1 = vec![0; 512];
        l1[5] = 4096;
        let tables = Tables::new(l1);
        let slices = tables.l1_slices(&[(4, HostOffset(8192)), (6, HostOffset(16384))]);
        assert_eq!(slices.len(), 1);
        let entry = |i: usize| u64::from_le_bytes(slices[0].1[i * 8..i * 8 + 8].try_into().unwrap());
        assert_eq!((entry(4), entry(5), entry(6), entry(7)), (8192, 4096, 16384, 0));
    }
}
