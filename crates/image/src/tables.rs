//! The L1 table in memory, and L2 tables that are not on disk yet.
//!
//! **Invariants.**
//! * `l1` holds what is on disk (or being written by the commit under way): only a commit, a resize or a repair changes it.
//! * A *fresh* table has clusters of its own that read as zeros, or as the table did that it takes the place of, and no L1 entry
//!   points there yet. It goes away with its last pin unless an entry was linked in it by then; a linked one stays until a
//!   commit has published it.

use layout::HostOffset;
use std::collections::HashMap;

/// Where an L2 table is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Place {
    /// There is none.
    Nowhere,
    /// What the L1 entry says, still to be decoded. Not 0.
    Stored(u64),
    /// Only in memory.
    Fresh {
        /// Where it will be.
        at: HostOffset,
        /// It had no entry to begin with: what of it is not in memory is zeros.
        empty: bool,
    },
}

#[derive(Debug)]
struct Fresh {
    at: HostOffset,
    pins: u32,
    linked: bool,
    empty: bool,
}

/// An L2 table to be published: its L1 index and where it lies.
pub(crate) type Publication = (u64, HostOffset);

/// How a format writes its L1 table.
#[derive(Clone, Copy, Debug)]
pub(crate) struct L1Form {
    /// Entries that are written together, a page where the table is that long. A power of two.
    pub(crate) slice: usize,
    /// The entry for a table at a place.
    pub(crate) entry: fn(HostOffset) -> u64,
    /// An entry's bytes.
    pub(crate) bytes: fn(u64) -> [u8; 8],
}

/// The tables of one image.
#[derive(Debug)]
pub(crate) struct Tables {
    form: L1Form,
    l1: Vec<u64>,
    fresh: HashMap<u64, Fresh>,
}

impl Tables {
    /// From the L1 entries that the image's size needs, rounded up to whole slices.
    pub(crate) fn new(form: L1Form, l1: Vec<u64>) -> Self {
        debug_assert!(l1.len().is_multiple_of(form.slice));
        Self { form, l1, fresh: HashMap::new() }
    }

    /// L1 entries in memory.
    pub(crate) fn l1(&self) -> &[u64] {
        &self.l1
    }

    /// Adds L1 entries for a larger disk.
    pub(crate) fn extend_l1(&mut self, more: Vec<u64>) {
        self.l1.extend(more);
    }

    /// The L1 table has moved, or become longer.
    pub(crate) fn replace_l1(&mut self, l1: Vec<u64>) {
        debug_assert!(l1.len().is_multiple_of(self.form.slice));
        self.l1 = l1;
    }

    /// Where table `index` is.
    #[inline]
    pub(crate) fn place(&self, index: u64) -> Place {
        // Fresh ones are few and soon published.
        let fresh = if self.fresh.is_empty() { None } else { self.fresh.get(&index) };
        match (fresh, self.l1.get(index as usize)) {
            (Some(fresh), _) => Place::Fresh { at: fresh.at, empty: fresh.empty },
            (None, Some(0) | None) => Place::Nowhere,
            (None, Some(raw)) => Place::Stored(*raw),
        }
    }

    /// Adds a fresh table with one pin; `empty`: it has no entry, otherwise it is as the one it takes the place of.
    pub(crate) fn add_fresh(&mut self, index: u64, at: HostOffset, empty: bool) {
        let before = self.fresh.insert(index, Fresh { at, pins: 1, linked: false, empty });
        debug_assert!(before.is_none(), "table {index} is fresh twice");
    }

    /// Keeps table `index` if it is fresh.
    pub(crate) fn pin(&mut self, index: u64) {
        if let Some(fresh) = self.fresh.get_mut(&index) {
            fresh.pins += 1;
        }
    }

    /// Undoes one pin. Returns where the table was if it is gone now and its clusters are to be given back.
    pub(crate) fn unpin(&mut self, index: u64) -> Option<HostOffset> {
        let fresh = self.fresh.get_mut(&index)?;
        fresh.pins = fresh.pins.saturating_sub(1);
        if fresh.pins > 0 || fresh.linked {
            return None;
        }
        self.fresh.remove(&index).map(|fresh| fresh.at)
    }

    /// An entry was set in table `index`.
    pub(crate) fn link(&mut self, index: u64) {
        if let Some(fresh) = self.fresh.get_mut(&index) {
            fresh.linked = true;
        }
    }

    /// Fresh tables that have entries, in order.
    pub(crate) fn unpublished(&self) -> Vec<Publication> {
        let mut tables: Vec<_> = self.fresh.iter().filter(|(_, t)| t.linked).map(|(index, t)| (*index, t.at)).collect();
        tables.sort_unstable();
        tables
    }

    /// The slices of the L1 table that change when `tables` are published: offset within the table, bytes.
    pub(crate) fn l1_slices(&self, tables: &[Publication]) -> Vec<(u64, Vec<u8>)> {
        let L1Form { slice, entry, bytes } = self.form;
        let mut slices: Vec<(u64, Vec<u8>)> = Vec::new();
        for (index, at) in tables {
            let number = *index as usize / slice;
            let offset = (number * slice * 8) as u64;
            if slices.last().is_none_or(|(last, _)| *last != offset) {
                let entries = self.l1.get(number * slice..(number + 1) * slice).unwrap_or_default();
                slices.push((offset, entries.iter().flat_map(|entry| bytes(*entry)).collect()));
            }
            let place = *index as usize % slice * 8;
            if let Some(old) = slices.last_mut().and_then(|(_, bytes)| bytes.get_mut(place..place + 8)) {
                old.copy_from_slice(&bytes(entry(*at)));
            }
        }
        slices
    }

    /// `tables` are on disk, their L1 entries too. Returns the entries that were there before.
    pub(crate) fn published(&mut self, tables: &[Publication]) -> Vec<u64> {
        let mut before = Vec::new();
        for (index, at) in tables {
            self.fresh.remove(index);
            if let Some(entry) = self.l1.get_mut(*index as usize) {
                before.push(std::mem::replace(entry, (self.form.entry)(*at)));
            }
        }
        before
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const FORM: L1Form = L1Form { slice: 512, entry: HostOffset::get, bytes: u64::to_le_bytes };

    #[test]
    fn unlinked_table_goes_with_its_last_pin() {
        let mut tables = Tables::new(FORM, vec![0; 512]);
        tables.add_fresh(3, HostOffset(8192), true);
        tables.pin(3);
        assert_eq!(tables.unpin(3), None);
        assert_eq!(tables.place(3), Place::Fresh { at: HostOffset(8192), empty: true });
        assert_eq!(tables.unpin(3), Some(HostOffset(8192)));
        assert_eq!(tables.place(3), Place::Nowhere);
    }

    #[test]
    fn linked_table_stays_until_published() {
        let mut tables = Tables::new(FORM, vec![0; 1024]);
        tables.add_fresh(513, HostOffset(8192), true);
        tables.link(513);
        assert_eq!(tables.unpin(513), None);
        let due = tables.unpublished();
        assert_eq!(due, [(513, HostOffset(8192))]);
        let slices = tables.l1_slices(&due);
        assert_eq!((slices.len(), slices[0].0), (1, 4096));
        assert_eq!(slices[0].1[8..16], 8192u64.to_le_bytes());
        assert_eq!(tables.place(513), Place::Fresh { at: HostOffset(8192), empty: true });
        assert_eq!(tables.published(&due), [0]);
        assert_eq!(tables.place(513), Place::Stored(8192));
        assert!(tables.unpublished().is_empty());
    }

    #[test]
    fn neighbours_share_a_slice_and_keep_what_is_there() {
        let mut l1 = vec![0; 512];
        l1[5] = 4096;
        let tables = Tables::new(FORM, l1);
        let slices = tables.l1_slices(&[(4, HostOffset(8192)), (6, HostOffset(16384))]);
        assert_eq!(slices.len(), 1);
        let entry = |i: usize| u64::from_le_bytes(slices[0].1[i * 8..i * 8 + 8].try_into().unwrap());
        assert_eq!((entry(4), entry(5), entry(6), entry(7)), (8192, 4096, 16384, 0));
    }
}
