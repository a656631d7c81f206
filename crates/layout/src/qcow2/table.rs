//! Entries of L1 and L2 tables.
//!
//! An L2 entry is one of six things ([`L2Entry`]); nobody looks at its bits twice.

use super::Header;
use crate::{HostOffset, HostRange};

/// Bits of an entry that hold an offset into the file.
pub const OFFSET: u64 = 0x00ff_ffff_ffff_fe00;

/// Bits of an L1 entry that mean nothing, and are 0.
pub const L1_RESERVED: u64 = 0x7f00_0000_0000_01ff;

/// Bits of an L2 entry, of a cluster that is not packed, that mean nothing, and are 0.
pub const L2_RESERVED: u64 = 0x3f00_0000_0000_01fe;
/// The table or cluster is referred to by this entry alone: it may be changed where it is.
pub const COPIED: u64 = 1 << 63;
/// The cluster is packed.
const COMPRESSED: u64 = 1 << 62;
/// The cluster reads as zeros (version 3, without subclusters).
const ZERO: u64 = 1;

/// An entry that the specification does not allow.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum EntryError {
    /// It does not lead to a cluster's start.
    #[error("entry {0:#x} is not a multiple of the cluster size")]
    Misaligned(u64),
    /// A subcluster is said to be both allocated and zero, or a packed cluster to have subclusters.
    #[error("the subclusters of entry {0:#x} contradict each other")]
    Subclusters(u64),
    /// A packed cluster in an image whose data are in a file of their own.
    #[error("entry {0:#x} is of a packed cluster, and none can be in a data file")]
    PackedOutside(u64),
}

/// What an L1 entry says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum L1Entry {
    /// Nothing is mapped.
    Unallocated,
    /// An L2 table.
    Table(HostOffset),
}

impl L1Entry {
    /// Of an image with this header.
    pub fn decode(raw: u64, header: &Header) -> Result<Self, EntryError> {
        match raw & OFFSET {
            0 => Ok(Self::Unallocated),
            at if !at.is_multiple_of(header.cluster_size()) => Err(EntryError::Misaligned(raw)),
            at => Ok(Self::Table(HostOffset(at))),
        }
    }
}

/// The table that an L1 entry leads to belongs to this entry alone.
pub const fn is_own(raw: u64) -> bool {
    raw & COPIED != 0
}

/// Where a packed cluster lies. It begins at any byte.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Packed {
    /// Its first byte.
    pub at: HostOffset,
    /// At most so many bytes: its last sector may hold the next one's first.
    pub len: u64,
}

impl Packed {
    /// The clusters that it has a share of.
    pub fn clusters(self, cluster_size: u64) -> HostRange {
        self.at.range(self.len).align_outward(cluster_size)
    }

    /// Its entry; `len` is at most some clusters.
    pub fn encode(self, cluster_bits: u32) -> u64 {
        let offset_bits = 62 - (cluster_bits - 8);
        let sectors = (self.at.get() % 512 + self.len).div_ceil(512);
        COMPRESSED | (sectors.saturating_sub(1) << offset_bits) | self.at.get()
    }
}

/// Which of a cluster's 32 subclusters are stored, and which are zeros; the others are unallocated. Never both.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SubclusterMap {
    /// Bit n: subcluster n is stored.
    pub stored: u32,
    /// Bit n: subcluster n reads as zeros.
    pub zero: u32,
}

/// What an L2 entry says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum L2Entry {
    /// Nothing: what lies below shows through.
    Unallocated,
    /// Zeros, without a place.
    Zero,
    /// Zeros, with a place kept for them.
    ZeroAllocated(HostOffset),
    /// Bytes.
    Data(HostOffset),
    /// Packed bytes.
    Packed(Packed),
    /// A cluster with subclusters (of which some may be stored in the cluster at this place).
    Subclusters(HostOffset, SubclusterMap),
}

impl L2Entry {
    /// What an entry for whole clusters looks like that this program makes: both words.
    pub fn encode_whole(self, header: &Header) -> (u64, u64) {
        let extended = header.l2_entry_bytes() == 16;
        match (self, extended) {
            (Self::Zero, false) => (ZERO, 0),
            (Self::Zero, true) => (0, u64::from(u32::MAX) << 32),
            (Self::Data(at), false) => (at.get() | COPIED, 0),
            (Self::Data(at), true) => (at.get() | COPIED, u32::MAX.into()),
            _ => (0, 0),
        }
    }

    /// The clusters that an entry holds a reference to, whatever it says of them. Not checked. What lies in a data file is not
    /// counted.
    pub fn referred(raw: u64, header: &Header) -> HostRange {
        let cluster = header.cluster_size();
        if header.has_data_file() {
            return HostRange::default();
        }
        if raw & COMPRESSED != 0 {
            let Ok(Self::Packed(packed)) = Self::decode(raw, 0, header) else { return HostRange::default() };
            return packed.clusters(cluster);
        }
        match raw & OFFSET {
            0 => HostRange::default(),
            at => HostOffset(at).align_down(cluster).range(cluster),
        }
    }

    /// Of an image with this header; `extended` is the second half of an entry with subclusters.
    pub fn decode(raw: u64, extended: u64, header: &Header) -> Result<Self, EntryError> {
        let has_subclusters = header.l2_entry_bytes() == 16;
        // The first cluster of a data file is at 0: there, the flag tells a place from none.
        let placed = raw & OFFSET != 0 || header.has_data_file() && raw & COPIED != 0;
        if raw & COMPRESSED != 0 {
            if header.has_data_file() {
                return Err(EntryError::PackedOutside(raw));
            }
            if has_subclusters && extended != 0 {
                return Err(EntryError::Subclusters(raw));
            }
            // Above the offset stands the number of sectors behind the first.
            let offset_bits = 62 - (header.cluster_bits - 8);
            let at = raw & ((1 << offset_bits) - 1);
            let sectors = ((raw & (COMPRESSED - 1)) >> offset_bits) + 1;
            return Ok(Self::Packed(Packed { at: HostOffset(at), len: sectors * 512 - at % 512 }));
        }
        let at = raw & OFFSET;
        if !at.is_multiple_of(header.cluster_size()) {
            return Err(EntryError::Misaligned(raw));
        }
        if has_subclusters {
            let map = SubclusterMap { stored: extended as u32, zero: (extended >> 32) as u32 };
            if map.stored & map.zero != 0 || !placed && map.stored != 0 {
                return Err(EntryError::Subclusters(raw));
            }
            return Ok(match (map.stored, map.zero) {
                (0, 0) => Self::Unallocated,
                _ => Self::Subclusters(HostOffset(at), map),
            });
        }
        Ok(match (header.version > 2 && raw & ZERO != 0, at) {
            (true, 0) => Self::Zero,
            (true, at) => Self::ZeroAllocated(HostOffset(at)),
            (false, _) if !placed => Self::Unallocated,
            (false, at) => Self::Data(HostOffset(at)),
        })
    }
}

/// Consecutive entries of a table, as numbers (two each where entries have subclusters).
#[derive(Clone, PartialEq, Eq)]
pub struct Slice {
    words: Box<[u64]>,
}

impl Slice {
    /// All entries 0.
    pub fn zeroed(words: usize) -> Self {
        Self { words: vec![0; words].into() }
    }

    /// From its bytes on disk.
    pub fn decode(bytes: &[u8]) -> Self {
        Self { words: bytes.as_chunks().0.iter().map(|word| u64::from_be_bytes(*word)).collect() }
    }

    /// Its bytes on disk.
    pub fn encode(&self) -> Vec<u8> {
        self.words.iter().flat_map(|word| word.to_be_bytes()).collect()
    }

    /// The numbers.
    #[inline]
    pub fn raw(&self) -> &[u64] {
        &self.words
    }

    /// Sets a number that is there.
    #[inline]
    pub fn set(&mut self, index: usize, raw: u64) {
        if let Some(word) = self.words.get_mut(index) {
            *word = raw;
        }
    }
}

impl std::fmt::Debug for Slice {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Slice({} words in use)", self.words.iter().filter(|word| **word != 0).count())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::qcow2::{Compression, Features};

    fn header(version: u32, features: Features) -> Header {
        Header {
            version,
            cluster_bits: 16,
            size: 1 << 30,
            l1_entries: 2,
            l1_table: HostOffset(0x30000),
            backing_name: None,
            refcount_table: HostOffset(0x10000),
            refcount_table_clusters: 1,
            refcount_order: 4,
            snapshots: 0,
            snapshot_table: HostOffset::ZERO,
            features,
            compatible_features: 0,
            autoclear_features: 0,
            compression: Compression::Deflate,
            crypt: 0,
            header_bytes: 112,
        }
    }

    #[test]
    fn an_entry_is_one_of_six_things() {
        let plain = header(3, Features::empty());
        let of = |raw| L2Entry::decode(raw, 0, &plain);
        assert_eq!(of(0), Ok(L2Entry::Unallocated));
        assert_eq!(of(1), Ok(L2Entry::Zero));
        assert_eq!(of(1 << 63 | 0x50001), Ok(L2Entry::ZeroAllocated(HostOffset(0x50000))));
        assert_eq!(of(1 << 63 | 0x50000), Ok(L2Entry::Data(HostOffset(0x50000))));
        assert_eq!(of(0x50200), Err(EntryError::Misaligned(0x50200)));
        // 54 bits of offset, then the sectors behind the first.
        let packed = Packed { at: HostOffset(0x51234), len: 3 * 512 - 0x34 };
        assert_eq!(of(COMPRESSED | 2 << 54 | 0x51234), Ok(L2Entry::Packed(packed)));
        assert_eq!(
            L2Entry::decode(1, 0, &header(2, Features::empty())),
            Ok(L2Entry::Unallocated),
            "no zeros in version 2"
        );
    }

    #[test]
    fn packed_entries_say_which_clusters_they_share() {
        let plain = header(3, Features::empty());
        for (at, len) in [(0x51234, 1000), (0x5fe00, 512), (0x5fe01, 600), (0x50000, 65536)] {
            let packed = Packed { at: HostOffset(at), len };
            let raw = packed.encode(16);
            let Ok(L2Entry::Packed(read)) = L2Entry::decode(raw, 0, &plain) else { panic!("{raw:#x}") };
            assert!(read.at == packed.at && read.len >= len && read.len < len + 512, "{read:?} for {packed:?}");
            assert_eq!(L2Entry::referred(raw, &plain), read.clusters(65536));
        }
        assert_eq!(Packed { at: HostOffset(0x5fe01), len: 600 }.clusters(65536).len(), 2 << 16);
        assert_eq!(L2Entry::referred(COPIED | 0x50001, &plain), HostOffset(0x50000).range(65536));
        assert!(L2Entry::referred(1, &plain).is_empty());
    }

    #[test]
    fn subclusters_do_not_contradict_each_other() {
        let extended = header(3, Features::EXTENDED_L2);
        let of = |raw, map| L2Entry::decode(raw, map, &extended);
        assert_eq!(of(0, 0), Ok(L2Entry::Unallocated));
        let map = SubclusterMap { stored: 5, zero: 2 };
        assert_eq!(of(0x50000, 2 << 32 | 5), Ok(L2Entry::Subclusters(HostOffset(0x50000), map)));
        for (raw, map) in [(0x50000, 1 << 32 | 1), (0, 1), (COMPRESSED | 0x50000, 1)] {
            assert_eq!(of(raw, map), Err(EntryError::Subclusters(raw)));
        }
        assert_eq!(of(0, 1 << 63), Ok(L2Entry::Subclusters(HostOffset(0), SubclusterMap { stored: 0, zero: 1 << 31 })));
    }

    #[test]
    fn the_first_cluster_of_a_data_file_is_a_place() {
        let outside = header(3, Features::EXTERNAL_DATA);
        assert_eq!(L2Entry::decode(COPIED, 0, &outside), Ok(L2Entry::Data(HostOffset(0))));
        assert_eq!(L2Entry::decode(0, 0, &outside), Ok(L2Entry::Unallocated));
        assert_eq!(L2Entry::decode(COPIED, 0, &header(3, Features::empty())), Ok(L2Entry::Unallocated));
        assert_eq!(L2Entry::decode(COMPRESSED | 512, 0, &outside), Err(EntryError::PackedOutside(COMPRESSED | 512)));
        assert!(L2Entry::referred(COPIED | 0x50000, &outside).is_empty());
        let extended = header(3, Features::EXTERNAL_DATA | Features::EXTENDED_L2);
        assert!(matches!(L2Entry::decode(COPIED, 1, &extended), Ok(L2Entry::Subclusters(HostOffset(0), _))));
        assert!(L2Entry::decode(0, 1, &extended).is_err());
    }

    #[test]
    fn first_level_entries_lead_to_clusters() {
        let plain = header(3, Features::empty());
        assert_eq!(L1Entry::decode(1 << 63, &plain), Ok(L1Entry::Unallocated));
        assert_eq!(L1Entry::decode(1 << 63 | 0x40000, &plain), Ok(L1Entry::Table(HostOffset(0x40000))));
        assert!(L1Entry::decode(0x40200, &plain).is_err());
    }
}
