//! QCOW version 1, the ancestor of QCOW2: a header, an L1 table, L2 tables, clusters, some of them packed. All numbers are big-endian.
//! (The layout is the one that QEMU's and Xen's documents of the format describe.)

use crate::field::{Error, ErrorKind};
use crate::number::{be32, be64};
use crate::{HostOffset, HostRange};

/// Bytes of the header.
pub const HEADER_BYTES: usize = 48;

/// What images begin with: QCOW2's magic, and a version of its own.
pub const MAGIC: [u8; 8] = *b"QFI\xfb\0\0\0\x01";

/// The longest name of a backing file.
const NAME_MOST: u32 = 1023;

/// In an L2 entry: the cluster is packed.
const PACKED: u64 = 1 << 63;

/// A header that makes sense.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    /// Bytes of the disk: whole sectors.
    pub size: u64,
    /// Where the name of the backing file is, if there is one.
    pub backing_name: Option<HostRange>,
    cluster_bits: u8,
    l2_bits: u8,
    l1: u64,
}

/// What an L2 entry says of its cluster.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cluster {
    /// Nothing: what lies below shows through.
    Unallocated,
    /// It is here.
    Data(HostOffset),
    /// A deflate stream is here that it unpacks from.
    Packed(HostRange),
}

impl Header {
    /// From the first [`HEADER_BYTES`] of a file.
    pub fn decode(bytes: &[u8]) -> Result<Self, Error> {
        let fail = |kind, field, at: u64, value: u64, why: &'static str| Err(Error::new(kind, field, at, value, why));
        if bytes.len() < HEADER_BYTES || !bytes.starts_with(&MAGIC) {
            return fail(ErrorKind::Foreign, "magic", 0, be64(bytes, 0), "not a QCOW image of version 1");
        }
        let (name, name_len, size) = (be64(bytes, 8), be32(bytes, 16), be64(bytes, 24));
        let (cluster_bits, l2_bits, crypt, l1) = (bytes[32], bytes[33], be32(bytes, 36), be64(bytes, 40));
        if crypt != 0 {
            let why = "the image is encrypted, which is not supported; decrypt it with 'qemu-img convert'";
            return fail(ErrorKind::Unsupported, "crypt_method", 36, crypt.into(), why);
        }
        if !(9..=16).contains(&cluster_bits) {
            return fail(
                ErrorKind::Invalid,
                "cluster_bits",
                32,
                cluster_bits.into(),
                "clusters have 512 bytes to 64 KiB",
            );
        }
        if !(6..=13).contains(&l2_bits) {
            return fail(ErrorKind::Invalid, "l2_bits", 33, l2_bits.into(), "L2 tables have 64 to 8192 entries");
        }
        if size > i64::MAX as u64 {
            return fail(ErrorKind::Invalid, "size", 24, size, "larger than any disk");
        }
        if l1 > i64::MAX as u64 / 2 {
            return fail(ErrorKind::Invalid, "l1_table_offset", 40, l1, "no place for a table");
        }
        if name != 0 && (name_len > NAME_MOST || name > i64::MAX as u64) {
            return fail(ErrorKind::Invalid, "backing_file_size", 16, name_len.into(), "no name is that long");
        }
        let backing_name = (name != 0 && name_len > 0).then(|| HostOffset(name).range(name_len.into()));
        Ok(Self { size: size / 512 * 512, backing_name, cluster_bits, l2_bits, l1 })
    }

    /// Bytes of a cluster.
    pub fn cluster(&self) -> u64 {
        1 << self.cluster_bits
    }

    /// Entries of an L2 table.
    pub fn l2_entries(&self) -> u64 {
        1 << self.l2_bits
    }

    /// Bytes of the disk that one L2 table maps.
    pub fn reach(&self) -> u64 {
        1 << (self.cluster_bits + self.l2_bits)
    }

    /// Where the L1 table lies.
    pub fn l1_table(&self) -> HostRange {
        HostOffset(self.l1).range(self.size.div_ceil(self.reach()) * 8)
    }

    /// What an L2 entry says.
    pub fn cluster_at(&self, entry: [u8; 8]) -> Cluster {
        match u64::from_be_bytes(entry) {
            0 => Cluster::Unallocated,
            entry if entry & PACKED == 0 => Cluster::Data(HostOffset(entry)),
            entry => {
                let bits = 63 - self.cluster_bits;
                let (at, len) = (entry & ((1 << bits) - 1), (entry & !PACKED) >> bits);
                Cluster::Packed(HostOffset(at).range(len))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn header() -> Vec<u8> {
        let mut bytes = vec![0; HEADER_BYTES];
        bytes[..8].copy_from_slice(&MAGIC);
        bytes[24..32].copy_from_slice(&(10_u64 << 20).to_be_bytes());
        (bytes[32], bytes[33]) = (12, 9);
        bytes[40..48].copy_from_slice(&48_u64.to_be_bytes());
        bytes
    }

    #[test]
    fn numbers_are_where_they_belong() {
        let mut bytes = header();
        bytes[8..16].copy_from_slice(&56_u64.to_be_bytes());
        bytes[16..20].copy_from_slice(&5_u32.to_be_bytes());
        let header = Header::decode(&bytes).unwrap();
        assert_eq!((header.size, header.cluster(), header.reach()), (10 << 20, 4096, 2 << 20));
        assert_eq!(header.l1_table(), HostOffset(48).range(40));
        assert_eq!(header.backing_name, Some(HostOffset(56).range(5)));
        assert_eq!(header.cluster_at([0; 8]), Cluster::Unallocated);
        assert_eq!(header.cluster_at(8192_u64.to_be_bytes()), Cluster::Data(HostOffset(8192)));
        let packed = 1_u64 << 63 | 300 << 51 | 0x1234;
        assert_eq!(header.cluster_at(packed.to_be_bytes()), Cluster::Packed(HostOffset(0x1234).range(300)));
    }

    #[test]
    fn what_makes_no_sense_is_named() {
        for (at, value, field) in
            [(0, 0, "magic"), (7, 2, "magic"), (32, 17, "cluster_bits"), (33, 5, "l2_bits"), (24, 0x80, "size")]
        {
            let mut bytes = header();
            bytes[at] = value;
            assert_eq!(Header::decode(&bytes).unwrap_err().field(), field);
        }
        let mut bytes = header();
        bytes[39] = 1;
        assert_eq!(Header::decode(&bytes).unwrap_err().kind(), ErrorKind::Unsupported);
    }
}
