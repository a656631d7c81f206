//! QCOW, version 1 (QEMU's first format of its own, `docs/interop` before 2008; the layout is the one that QEMU's later documents
//! refer back to): a header, an L1 table, L2 tables, clusters. All numbers are big-endian.

use crate::field::{Error, ErrorKind};
use crate::{HostOffset, HostRange};

/// Bytes of the header.
pub const HEADER_BYTES: usize = 48;

/// What a file begins with: the magic that QCOW2 has too, and the version.
pub const MAGIC: [u8; 8] = *b"QFI\xfb\0\0\0\x01";

/// The longest name of a backing file, in bytes.
const MAX_NAME: u32 = 1023;

/// The bit that marks a packed cluster.
const PACKED: u64 = 1 << 63;

/// A header that makes sense.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    /// Bytes of the disk.
    pub size: u64,
    /// log2 of a cluster's bytes, 9 to 16.
    pub cluster_bits: u32,
    /// log2 of an L2 table's entries.
    pub l2_bits: u32,
    /// Where the L1 table is.
    pub l1: HostRange,
    /// Where the backing file's name is, if there is one.
    pub backing: Option<HostRange>,
}

/// What an L2 entry says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Entry {
    /// Nothing.
    Unallocated,
    /// The cluster is here.
    Data(HostOffset),
    /// It is packed: a deflate stream of so many bytes.
    Packed(HostRange),
}

impl Header {
    /// From the first [`HEADER_BYTES`] of a file.
    pub fn decode(bytes: &[u8]) -> Result<Self, Error> {
        let fail =
            |kind, field, at: usize, value: u64, why: &'static str| Err(Error::new(kind, field, at as u64, value, why));
        let u32_at =
            |at: usize| bytes.get(at..at + 4).and_then(|b| b.first_chunk()).map_or(0, |b| u32::from_be_bytes(*b));
        let u64_at =
            |at: usize| bytes.get(at..at + 8).and_then(|b| b.first_chunk()).map_or(0, |b| u64::from_be_bytes(*b));
        if !bytes.starts_with(&MAGIC) {
            return fail(ErrorKind::Foreign, "magic", 0, u64_at(0), "not a QCOW image of version 1");
        }
        let (size, cluster_bits, l2_bits) =
            (u64_at(24), u32::from(*bytes.get(32).unwrap_or(&0)), u32::from(*bytes.get(33).unwrap_or(&0)));
        if u32_at(36) != 0 {
            return fail(
                ErrorKind::Unsupported,
                "crypt_method",
                36,
                u32_at(36).into(),
                "encrypted images are not read",
            );
        }
        if !(9..=16).contains(&cluster_bits) {
            return fail(ErrorKind::Invalid, "cluster_bits", 32, cluster_bits.into(), "9 to 16 are possible");
        }
        if !(6..=13).contains(&l2_bits) {
            return fail(ErrorKind::Invalid, "l2_bits", 33, l2_bits.into(), "6 to 13 are possible");
        }
        let reach = cluster_bits + l2_bits;
        if size > i64::MAX as u64 || size.div_ceil(1 << reach) > u64::from(u32::MAX) / 8 {
            return fail(ErrorKind::Invalid, "size", 24, size, "larger than any table");
        }
        let l1_at = u64_at(40);
        if l1_at > i64::MAX as u64 {
            return fail(ErrorKind::Invalid, "l1_table_offset", 40, l1_at, "past the end of any file");
        }
        let (name_at, name_len) = (u64_at(8), u32_at(16));
        if name_at > 0 && (name_len > MAX_NAME || name_at > i64::MAX as u64) {
            return fail(ErrorKind::Invalid, "backing_file_size", 16, name_len.into(), "longer than a name can be");
        }
        let backing = (name_at > 0 && name_len > 0).then(|| HostOffset(name_at).range(name_len.into()));
        let l1 = HostOffset(l1_at).range(size.div_ceil(1 << reach) * 8);
        Ok(Self { size, cluster_bits, l2_bits, l1, backing })
    }

    /// What an L2 entry says; `None` if it makes no sense.
    pub fn entry(&self, raw: u64) -> Option<Entry> {
        if raw == 0 {
            return Some(Entry::Unallocated);
        }
        if raw & PACKED == 0 {
            return i64::try_from(raw).is_ok().then_some(Entry::Data(HostOffset(raw)));
        }
        let shift = 63 - self.cluster_bits;
        let (at, len) = (raw & ((1 << shift) - 1), raw >> shift & ((1 << self.cluster_bits) - 1));
        Some(Entry::Packed(HostOffset(at).range(len)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_packed_entry_has_its_length_above_its_place() {
        let mut bytes = [0_u8; HEADER_BYTES];
        bytes[..8].copy_from_slice(&MAGIC);
        bytes[24..32].copy_from_slice(&(1_u64 << 20).to_be_bytes());
        (bytes[32], bytes[33]) = (12, 9);
        bytes[40..].copy_from_slice(&48_u64.to_be_bytes());
        let header = Header::decode(&bytes).unwrap();
        assert_eq!(header.l1, HostOffset(48).range(8));
        let raw = PACKED | 100 << 51 | 0x1234;
        assert_eq!(header.entry(raw), Some(Entry::Packed(HostOffset(0x1234).range(100))));
        assert_eq!(header.entry(0x8000), Some(Entry::Data(HostOffset(0x8000))));
        bytes[32] = 30;
        assert!(Header::decode(&bytes).is_err());
        assert!(Header::decode(&bytes[..10]).is_err());
    }
}
