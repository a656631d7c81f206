//! Tables of images that are only read: in memory where they are looked at, a sheet at a time.
//!
//! **Invariants.** What the tables of an image take in memory has one bound, whatever its header says of their lengths. A sheet is
//! read once however many wait for it.

use super::{read, within};
use crate::Result;
use crate::slices::{Shelf, SliceCache};
use layout::HostRange;
use ring::sync::Event;
use std::rc::Rc;
use store::Store;

/// Memory for the sheets of one image: with four bytes for 64 KiB they describe 256 GiB.
pub(crate) const SHEETS_BYTES: usize = 16 << 20;

/// Bytes of a sheet of a table that lies in one piece.
const SHEET: u64 = 4096;

/// Parts of tables as they are in the file, by numbers their format gives them.
pub(crate) struct Sheets {
    shelf: Rc<Shelf<Rc<[u8]>>>,
}

impl Sheets {
    /// Room for sheets of `bytes` each, or somewhat less.
    pub(crate) fn new(bytes: u64) -> Self {
        let slices = SliceCache::new(SHEETS_BYTES, bytes.max(1) as usize);
        Self { shelf: Shelf::new(slices, Rc::new(Event::new())) }
    }

    /// Bytes of a sheet from `at` on; `None` when it is not in memory. What a sheet does not hold is zeros.
    pub(crate) fn bytes<const N: usize>(&self, number: u64, at: usize) -> Option<[u8; N]> {
        self.with(number, |sheet| sheet.get(at..).and_then(|rest| rest.first_chunk()).copied().unwrap_or([0; N]))
    }

    /// Looks at a sheet; `None` when it is not in memory.
    pub(crate) fn with<T>(&self, number: u64, look: impl FnOnce(&[u8]) -> T) -> Option<T> {
        self.shelf.borrow().get(number).map(|sheet| look(sheet))
    }

    /// Brings sheet `number`, which lies at `place` in the store, into memory.
    pub(crate) async fn load(&self, store: &dyn Store, number: u64, place: HostRange) -> Result<()> {
        loop {
            if self.shelf.borrow().contains(number) {
                return Ok(());
            }
            let other = self.shelf.borrow().loading(number).map(Event::wait);
            match other {
                Some(other) => other.await,
                None => break,
            }
        }
        let _loading = self.shelf.begin_load(number);
        let bytes = read(store, place).await?;
        let mut sheets = self.shelf.borrow_mut();
        // Nothing is pinned and nothing dirty, so there is always room.
        sheets.make_room();
        if !sheets.contains(number) {
            sheets.insert(number, bytes.into());
        }
        Ok(())
    }
}

/// A table that lies in one piece, of entries of `N` bytes.
pub(crate) struct Table<const N: usize> {
    place: HostRange,
    sheets: Sheets,
}

impl<const N: usize> Table<N> {
    /// The table at `place`, which must lie within the file.
    pub(crate) fn new(store: &dyn Store, place: HostRange) -> Result<Self> {
        const { assert!(SHEET.is_multiple_of(N as u64), "no entry lies on two sheets") };
        within(store, place, "the table of blocks")?;
        Ok(Self { place, sheets: Sheets::new(SHEET) })
    }

    /// Where an entry lies: its sheet, and the byte in it.
    fn position(index: u64) -> (u64, usize) {
        let per_sheet = SHEET / N as u64;
        (index / per_sheet, (index % per_sheet) as usize * N)
    }

    /// An entry; `None` when its sheet is not in memory. What lies past the table's end is zeros.
    pub(crate) fn entry(&self, index: u64) -> Option<[u8; N]> {
        let (sheet, at) = Self::position(index);
        self.sheets.bytes(sheet, at)
    }

    /// Brings an entry's sheet into memory.
    pub(crate) async fn load(&self, store: &dyn Store, index: u64) -> Result<()> {
        let (sheet, _) = Self::position(index);
        self.sheets.load(store, sheet, self.place.skip(sheet.saturating_mul(SHEET)).first(SHEET)).await
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use futures_util::future::join;
    use layout::HostOffset;
    use ring::sim::Sim;
    use store::Operation;
    use store::memory::MemoryStore;
    use store::trace::{Trace, TraceStore};

    #[test]
    fn sheets_come_once_and_as_they_are_asked_for() {
        let bytes: Vec<u8> = (0..6000_u32).flat_map(u32::to_le_bytes).collect();
        let trace = Trace::keeping(0);
        let store = TraceStore::new(MemoryStore::from_bytes("t", &bytes), trace.clone());
        Sim::new(1).block_on(async {
            let table = Table::<4>::new(&*store, HostOffset(40).range(20_000)).unwrap();
            assert_eq!(table.entry(3000), None);
            let (a, b) = join(table.load(&*store, 3000), table.load(&*store, 3001)).await;
            a.and(b).unwrap();
            table.load(&*store, 2999).await.unwrap();
            assert_eq!(trace.count(Operation::Read).started, 1);
            assert_eq!(table.entry(3000).map(u32::from_le_bytes), Some(3010));
            table.load(&*store, 4999).await.unwrap();
            assert_eq!(table.entry(4999).map(u32::from_le_bytes), Some(5009));
            assert_eq!(table.entry(5000).map(u32::from_le_bytes), Some(0), "past its end");
            assert!(Table::<4>::new(&*store, HostOffset(24_000).range(4)).is_err());
        });
    }

    #[test]
    fn memory_has_a_bound() {
        let store = MemoryStore::new("t", 1 << 40);
        Sim::new(1).block_on(async {
            let sheets = Sheets::new(1 << 20);
            for number in 0..40 {
                sheets.load(&*store, number, HostOffset(number << 20).range(1 << 20)).await.unwrap();
            }
            assert!(sheets.shelf.borrow().len() <= SHEETS_BYTES >> 20);
            assert_eq!(sheets.bytes(39, 0), Some([0; 8]), "the last one stays");
        });
    }
}
