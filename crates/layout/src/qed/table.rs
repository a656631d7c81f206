//! Entries of L1 and L2 tables.
//!
//! **Invariant.** An offset that comes out of [`TableRules`] is cluster-aligned, lies behind the header, and the cluster or
//! table there ends within the store. Everything else is an [`EntryError`], never an offset.

use super::{Geometry, Header};
use crate::HostOffset;

/// Entries of a slice: the unit in which tables are read, kept and written. A power of two, and no more than the smallest
/// table has.
pub const SLICE_ENTRIES: usize = 512;

/// Bytes of a slice: one page, so that it is read and written without read-modify-write on any medium in use.
pub const SLICE_BYTES: usize = SLICE_ENTRIES * 8;

/// What an L1 entry says.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum L1Entry {
    /// There is no L2 table: nothing in its reach is allocated.
    Unallocated,
    /// The L2 table is here.
    Table(HostOffset),
}

/// What an L2 entry says.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum L2Entry {
    /// The backing file shows through.
    Unallocated,
    /// Zeros, whatever lies below.
    Zero,
    /// The data cluster is here.
    Data(HostOffset),
}

impl L1Entry {
    /// As it lies on disk.
    pub const fn encode(self) -> u64 {
        match self {
            Self::Unallocated => 0,
            Self::Table(at) => at.0,
        }
    }
}

impl L2Entry {
    /// As it lies on disk.
    #[inline]
    pub const fn encode(self) -> u64 {
        match self {
            Self::Unallocated => 0,
            Self::Zero => 1,
            Self::Data(at) => at.0,
        }
    }
}

/// Why an entry cannot be followed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, thiserror::Error)]
pub enum EntryError {
    /// Not a multiple of the cluster size.
    #[error("entry {0:#x} is not a multiple of the cluster size")]
    Misaligned(u64),
    /// Points into the header's clusters.
    #[error("entry {0:#x} points into the header")]
    InsideHeader(u64),
    /// What it points to ends past the end of the store.
    #[error("entry {0:#x} points past the end of the image file")]
    PastEnd(u64),
}

/// What entries of one image may say.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TableRules {
    geometry: Geometry,
    header_bytes: u64,
}

impl TableRules {
    /// The rules of the image with this header.
    pub fn new(header: &Header) -> Self {
        Self { geometry: header.geometry, header_bytes: header.header_bytes() }
    }

    /// Decodes an L1 entry of an image in a store of `length` bytes.
    #[inline]
    pub fn l1(self, raw: u64, length: u64) -> Result<L1Entry, EntryError> {
        match raw {
            0 => Ok(L1Entry::Unallocated),
            _ => self.offset(raw, self.geometry.table_bytes(), length).map(L1Entry::Table),
        }
    }

    /// Decodes an L2 entry of an image in a store of `length` bytes.
    #[inline]
    pub fn l2(self, raw: u64, length: u64) -> Result<L2Entry, EntryError> {
        match raw {
            0 => Ok(L2Entry::Unallocated),
            1 => Ok(L2Entry::Zero),
            _ => self.offset(raw, self.geometry.cluster_size(), length).map(L2Entry::Data),
        }
    }

    #[inline]
    fn offset(self, raw: u64, size: u64, length: u64) -> Result<HostOffset, EntryError> {
        if raw & (self.geometry.cluster_size() - 1) != 0 {
            return Err(EntryError::Misaligned(raw));
        }
        if raw < self.header_bytes {
            return Err(EntryError::InsideHeader(raw));
        }
        if raw > length || length - raw < size {
            return Err(EntryError::PastEnd(raw));
        }
        Ok(HostOffset(raw))
    }
}

/// 512 consecutive entries of a table, as numbers.
#[derive(Clone, PartialEq, Eq)]
pub struct Slice {
    entries: Box<[u64; SLICE_ENTRIES]>,
}

impl Slice {
    /// All entries 0.
    pub fn zeroed() -> Self {
        Self { entries: Box::new([0; SLICE_ENTRIES]) }
    }

    /// From its bytes on disk.
    pub fn decode(bytes: &[u8; SLICE_BYTES]) -> Self {
        let mut slice = Self::zeroed();
        for (entry, bytes) in slice.entries.iter_mut().zip(bytes.as_chunks::<8>().0) {
            *entry = u64::from_le_bytes(*bytes);
        }
        slice
    }

    /// Its bytes on disk.
    pub fn encode(&self) -> [u8; SLICE_BYTES] {
        let mut bytes = [0; SLICE_BYTES];
        for (bytes, entry) in bytes.as_chunks_mut::<8>().0.iter_mut().zip(self.entries.iter()) {
            *bytes = entry.to_le_bytes();
        }
        bytes
    }

    /// The entries, still to be decoded.
    #[inline]
    pub fn raw(&self) -> &[u64; SLICE_ENTRIES] {
        &self.entries
    }

    /// Sets entry `index` (below [`SLICE_ENTRIES`]).
    #[inline]
    pub fn set(&mut self, index: usize, raw: u64) {
        self.entries[index] = raw;
    }

    /// Whether every entry is 0.
    pub fn is_zero(&self) -> bool {
        self.entries.iter().all(|entry| *entry == 0)
    }
}

impl std::fmt::Debug for Slice {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Slice({} entries in use)", self.entries.iter().filter(|entry| **entry != 0).count())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn rules() -> TableRules {
        TableRules::new(&Header::new(Geometry::new(4096, 2).unwrap(), 1 << 20).unwrap())
    }

    #[test]
    fn special_values_are_special_only_where_the_specification_says_so() {
        assert_eq!(rules().l2(0, 1 << 20), Ok(L2Entry::Unallocated));
        assert_eq!(rules().l2(1, 1 << 20), Ok(L2Entry::Zero));
        assert_eq!(rules().l1(0, 1 << 20), Ok(L1Entry::Unallocated));
        assert_eq!(rules().l1(1, 1 << 20), Err(EntryError::Misaligned(1)));
        assert_eq!(rules().l2(2, 1 << 20), Err(EntryError::Misaligned(2)));
    }

    #[test]
    fn ends_are_exact() {
        assert_eq!(rules().l2(4096, 8192), Ok(L2Entry::Data(HostOffset(4096))));
        assert_eq!(rules().l2(4096, 8191), Err(EntryError::PastEnd(4096)));
        assert_eq!(rules().l1(4096, 8192), Err(EntryError::PastEnd(4096)));
        assert_eq!(rules().l1(4096, 12288), Ok(L1Entry::Table(HostOffset(4096))));
        assert_eq!(rules().l2(!4095, u64::MAX), Err(EntryError::PastEnd(!4095)));
    }

    #[test]
    fn nothing_points_into_the_header() {
        let mut header = Header::new(Geometry::new(4096, 2).unwrap(), 1 << 20).unwrap();
        (header.header_clusters, header.l1_table) = (3, HostOffset(3 * 4096));
        let rules = TableRules::new(&header);
        assert_eq!(rules.l2(8192, 1 << 20), Err(EntryError::InsideHeader(8192)));
        assert_eq!(rules.l2(12288, 1 << 20), Ok(L2Entry::Data(HostOffset(12288))));
    }

    proptest! {
        #[test]
        fn slices_survive_the_disk(entries in proptest::collection::vec(any::<u64>(), SLICE_ENTRIES)) {
            let mut slice = Slice::zeroed();
            for (index, raw) in entries.iter().enumerate() {
                slice.set(index, *raw);
            }
            prop_assert_eq!(&Slice::decode(&slice.encode()), &slice);
            prop_assert_eq!(slice.encode()[8..16].to_vec(), entries[1].to_le_bytes().to_vec());
        }

        #[test]
        fn what_decodes_lies_within_and_encodes_back(raw: u64, shift in 0u32..64, length: u64) {
            let raw = (raw >> shift) & if shift % 2 == 0 { !4095 } else { !0 };
            if let Ok(entry) = rules().l2(raw, length) {
                prop_assert_eq!(entry.encode(), raw);
                if let L2Entry::Data(at) = entry {
                    prop_assert!(at.is_aligned(4096) && at.get() >= 4096 && at.get() + 4096 <= length);
                }
            }
            if let Ok(entry) = rules().l1(raw, length) {
                prop_assert_eq!(entry.encode(), raw);
                if let L1Entry::Table(at) = entry {
                    prop_assert!(at.is_aligned(4096) && at.get() >= 4096 && at.get() + 8192 <= length);
                }
            }
        }
    }
}
