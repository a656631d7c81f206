//! Cluster and table sizes, and the arithmetic that follows from them.
//!
//! **Invariant.** Sizes are powers of two within the specification's bounds, so a guest offset below
//! [`Geometry::max_image_size`] splits into indices and back without overflow.

use super::table::SLICE_ENTRIES;
use super::{Error, ErrorKind};
use crate::{GuestOffset, HostOffset};

/// Smallest cluster, bytes.
pub const MIN_CLUSTER_SIZE: u64 = 1 << 12;
/// Largest cluster, bytes.
pub const MAX_CLUSTER_SIZE: u64 = 1 << 26;
/// What images get when nobody says otherwise, bytes.
pub const DEFAULT_CLUSTER_SIZE: u64 = 1 << 16;
/// Most clusters a table may have.
pub const MAX_TABLE_SIZE: u32 = 16;
/// What images get when nobody says otherwise, clusters per table.
pub const DEFAULT_TABLE_SIZE: u32 = 4;
/// The size of a guest's disk is a multiple of this, bytes.
pub const SECTOR: u64 = 512;
/// Bytes of one table entry.
pub const ENTRY_BYTES: u64 = 8;
/// Largest disk we serve, bytes: every peer (file systems, QEMU, NBD clients) counts in signed 64-bit integers, and offsets
/// rounded up to a cluster must not overflow.
pub const MAX_DISK_SIZE: u64 = (i64::MAX as u64) & !(MAX_CLUSTER_SIZE - 1);

/// Cluster and table sizes of an image.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct Geometry {
    cluster_bits: u32,
    table_bits: u32,
}

impl Geometry {
    /// From the sizes in bytes and in clusters, as the header holds them.
    pub fn new(cluster_size: u64, table_size: u32) -> Result<Self, Error> {
        if !cluster_size.is_power_of_two() || !(MIN_CLUSTER_SIZE..=MAX_CLUSTER_SIZE).contains(&cluster_size) {
            let why = "the cluster size must be a power of two from 4096 to 67108864";
            return Err(Error::new(ErrorKind::Invalid, "cluster_size", 4, cluster_size, why));
        }
        if !table_size.is_power_of_two() || table_size > MAX_TABLE_SIZE {
            let why = "the table size must be 1, 2, 4, 8 or 16 clusters";
            return Err(Error::new(ErrorKind::Invalid, "table_size", 8, table_size.into(), why));
        }
        Ok(Self { cluster_bits: cluster_size.trailing_zeros(), table_bits: table_size.trailing_zeros() })
    }

    /// Bytes in a cluster.
    #[inline]
    pub const fn cluster_size(self) -> u64 {
        1 << self.cluster_bits
    }

    /// log2 of the bytes in a cluster.
    #[inline]
    pub const fn cluster_bits(self) -> u32 {
        self.cluster_bits
    }

    /// Clusters in a table.
    #[inline]
    pub const fn table_size(self) -> u32 {
        1 << self.table_bits
    }

    /// Bytes in a table: 4 KiB to 1 GiB. Nothing of this size is ever held in memory.
    #[inline]
    pub const fn table_bytes(self) -> u64 {
        1 << (self.cluster_bits + self.table_bits)
    }

    /// log2 of the entries in a table.
    #[inline]
    const fn entry_bits(self) -> u32 {
        self.cluster_bits + self.table_bits - ENTRY_BYTES.trailing_zeros()
    }

    /// Entries in a table: 512 to 2^27.
    #[inline]
    pub const fn entries(self) -> u64 {
        1 << self.entry_bits()
    }

    /// [`super::Slice`]s in a table.
    #[inline]
    pub const fn slices(self) -> u64 {
        self.entries() / SLICE_ENTRIES as u64
    }

    /// Bytes of the guest's disk that one L2 table covers.
    #[inline]
    pub const fn table_reach(self) -> u64 {
        1 << (self.entry_bits() + self.cluster_bits)
    }

    /// Bytes of the guest's disk that one slice of an L2 table covers.
    #[inline]
    pub const fn slice_reach(self) -> u64 {
        (SLICE_ENTRIES as u64) << self.cluster_bits
    }

    /// Largest disk the tables can describe, as far as we serve it.
    pub const fn max_image_size(self) -> u64 {
        let bits = 2 * self.entry_bits() + self.cluster_bits;
        if bits >= 63 { MAX_DISK_SIZE } else { 1 << bits }
    }

    /// Whether QEMU (10.0 and all before) opens images of this geometry. It computes the largest disk in 64 bits, and it
    /// takes tables of one cluster for invalid.
    pub const fn served_by_qemu(self) -> bool {
        self.table_bits > 0 && 2 * self.entry_bits() + self.cluster_bits < 64
    }

    /// Whole clusters that hold `bytes`, the last one perhaps in part.
    #[inline]
    pub const fn clusters(self, bytes: u64) -> u64 {
        bytes.div_ceil(self.cluster_size())
    }

    /// L1 entries that a disk of `image_size` bytes needs.
    pub const fn l1_entries(self, image_size: u64) -> u64 {
        image_size.div_ceil(self.table_reach())
    }

    /// Number of the cluster that holds a guest's byte.
    #[inline]
    pub const fn cluster_of(self, at: GuestOffset) -> u64 {
        at.0 >> self.cluster_bits
    }

    /// The L1 entry responsible for a guest's byte.
    #[inline]
    pub const fn l1_index(self, at: GuestOffset) -> u64 {
        at.0 >> (self.entry_bits() + self.cluster_bits)
    }

    /// The entry, within its L2 table, responsible for a guest's byte.
    #[inline]
    pub const fn l2_index(self, at: GuestOffset) -> u64 {
        (at.0 >> self.cluster_bits) & (self.entries() - 1)
    }

    /// The slice that holds a guest's byte's entry, counted over all tables.
    #[inline]
    pub const fn slice_of(self, at: GuestOffset) -> u64 {
        at.0 >> (self.cluster_bits + SLICE_ENTRIES.trailing_zeros())
    }

    /// Where in the guest's disk a slice begins.
    #[inline]
    pub const fn slice_start(self, slice: u64) -> GuestOffset {
        GuestOffset(slice << (self.cluster_bits + SLICE_ENTRIES.trailing_zeros()))
    }

    /// Where in the store a slice (counted over all tables) lies, given where its table begins.
    #[inline]
    pub const fn slice_at(self, table: HostOffset, slice: u64) -> HostOffset {
        HostOffset(table.0 + (slice & (self.slices() - 1)) * super::SLICE_BYTES as u64)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn any_geometry() -> impl Strategy<Value = Geometry> {
        (12u32..=26, 0u32..=4).prop_map(|(c, t)| Geometry::new(1 << c, 1 << t).unwrap())
    }

    #[test]
    fn bounds_are_the_specifications() {
        for bad in [0, 1, 2048, 4097, 65535, 1 << 27, u64::MAX] {
            assert_eq!(Geometry::new(bad, 4).unwrap_err().field(), "cluster_size");
        }
        for bad in [0, 3, 5, 17, 32, u32::MAX] {
            assert_eq!(Geometry::new(65536, bad).unwrap_err().field(), "table_size");
        }
    }

    #[test]
    fn default_geometry_reaches_64_tib() {
        let g = Geometry::new(DEFAULT_CLUSTER_SIZE, DEFAULT_TABLE_SIZE).unwrap();
        assert_eq!(g.max_image_size(), 64 << 40);
        assert_eq!(g.table_reach(), 2 << 30);
        assert_eq!((g.entries(), g.slices(), g.table_bytes()), (32768, 64, 256 << 10));
    }

    #[test]
    fn qemu_serves_what_it_was_seen_to_serve() {
        let served = |c, t| Geometry::new(c, t).unwrap().served_by_qemu();
        assert!(served(65536, 4) && served(4 << 20, 2) && served(2 << 20, 4));
        assert!(!served(65536, 1) && !served(4 << 20, 4) && !served(8 << 20, 2) && !served(64 << 20, 2));
    }

    proptest! {
        #[test]
        fn indices_and_offsets_agree(g in any_geometry(), at: u64) {
            let at = GuestOffset(at % g.max_image_size());
            let cluster = g.l1_index(at) * g.entries() + g.l2_index(at);
            prop_assert_eq!(cluster, g.cluster_of(at));
            prop_assert!(g.l1_index(at) < g.entries());
            prop_assert!(g.slice_start(g.slice_of(at)) <= at && at < g.slice_start(g.slice_of(at)) + g.slice_reach());
            prop_assert!(g.l1_index(at) < g.l1_entries(at.get() + 1));
            let table = HostOffset(1 << 40);
            let slice = g.slice_at(table, g.slice_of(at));
            prop_assert_eq!(slice - table, g.l2_index(at) / 512 * 4096);
        }

        #[test]
        fn largest_disk_needs_no_more_than_one_table_of_tables(g in any_geometry()) {
            prop_assert!(g.l1_entries(g.max_image_size()) <= g.entries());
            prop_assert!(g.max_image_size() <= MAX_DISK_SIZE);
            prop_assert!(g.max_image_size().is_multiple_of(g.cluster_size()));
            // What an image keeps of its L1 table in memory: at most 16 MiB, whatever the header says.
            prop_assert!(g.l1_entries(g.max_image_size()) * ENTRY_BYTES <= 16 << 20);
        }
    }
}
