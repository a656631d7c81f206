//! VMDK, VMware's disk image (VMware's "Virtual Disk Format 5.0"): a descriptor in text, in a file of its own or inside, and extents.
//! Here is a sparse extent: a header, a directory of grain tables, grains. All numbers are little-endian, and count sectors.

pub mod descriptor;

use crate::field::{Error, ErrorKind};
use crate::{HostOffset, HostRange};

/// Bytes of a header.
pub const HEADER_BYTES: usize = 512;

/// What a sparse extent begins with.
pub const MAGIC: [u8; 4] = *b"KDMV";

/// The unit of numbers, in bytes.
pub const SECTOR: u64 = 512;

/// The directory is behind the grains: a copy of the header near the end of the file says where.
pub const AT_END: u64 = u64::MAX;

/// How far from the end of the file that copy is, in bytes.
pub const FOOTER_FROM_END: u64 = 1024;

/// An entry of a grain table can say "zeros".
const ZERO_GRAINS: u32 = 1 << 2;
/// Grains are packed.
const PACKED: u32 = 1 << 16;
/// Grains have markers in front.
const MARKERS: u32 = 1 << 17;

/// A header that makes sense.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    /// Bytes of the disk that the extent holds.
    pub size: u64,
    /// Bytes of a grain.
    pub grain: u64,
    /// Entries of a grain table.
    pub table_entries: u64,
    /// The directory; `None`: [`AT_END`].
    pub directory: Option<HostRange>,
    /// A descriptor inside of the file.
    pub descriptor: Option<HostRange>,
    /// Grains are deflate streams with their length in front.
    pub packed: bool,
    /// An entry of 1 says "zeros".
    pub zero_grains: bool,
}

/// What an entry of a grain table says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Grain {
    /// Nothing.
    Unallocated,
    /// Zeros.
    Zero,
    /// The grain, or the marker in front of it, is here.
    At(HostOffset),
}

impl Header {
    /// From the first [`HEADER_BYTES`] of an extent, or of its footer.
    pub fn decode(bytes: &[u8]) -> Result<Self, Error> {
        let fail =
            |kind, field, at: usize, value: u64, why: &'static str| Err(Error::new(kind, field, at as u64, value, why));
        let u32_at =
            |at: usize| bytes.get(at..at + 4).and_then(|b| b.first_chunk()).map_or(0, |b| u32::from_le_bytes(*b));
        let u64_at =
            |at: usize| bytes.get(at..at + 8).and_then(|b| b.first_chunk()).map_or(0, |b| u64::from_le_bytes(*b));
        if !bytes.starts_with(&MAGIC) {
            return fail(ErrorKind::Foreign, "magic", 0, u32_at(0).into(), "not a sparse VMDK extent");
        }
        let (version, flags) = (u32_at(4), u32_at(8));
        if !(1..=3).contains(&version) {
            return fail(ErrorKind::Unsupported, "version", 4, version.into(), "only versions 1 to 3 are known");
        }
        let packed = flags & PACKED != 0;
        if packed && flags & MARKERS == 0 {
            return fail(ErrorKind::Unsupported, "flags", 8, flags.into(), "packed grains without markers");
        }
        let method = u16::from_le_bytes([*bytes.get(77).unwrap_or(&0), *bytes.get(78).unwrap_or(&0)]);
        if packed && method != 1 {
            return fail(ErrorKind::Unsupported, "compress_algorithm", 77, method.into(), "only deflate is known");
        }
        let bytes_of = |sectors: u64| sectors.checked_mul(SECTOR).filter(|bytes| i64::try_from(*bytes).is_ok());
        let Some(size) = bytes_of(u64_at(12)) else {
            return fail(ErrorKind::Invalid, "capacity", 12, u64_at(12), "larger than any disk");
        };
        let grain = u64_at(20);
        if !grain.is_power_of_two() || !(1..=1 << 21).contains(&grain) {
            return fail(ErrorKind::Invalid, "grain_size", 20, grain, "no size of a grain");
        }
        let table_entries = u64::from(u32_at(44));
        if !table_entries.is_power_of_two() || !(1..=4096).contains(&table_entries) {
            return fail(ErrorKind::Invalid, "gtes_per_gt", 44, table_entries, "no length of a grain table");
        }
        let reach = grain * SECTOR * table_entries;
        let tables = size.div_ceil(reach);
        let at = u64_at(56);
        let directory = match at {
            AT_END => None,
            at => match bytes_of(at) {
                Some(at) if u32::try_from(tables).is_ok() => Some(HostOffset(at).range(tables * 4)),
                _ => return fail(ErrorKind::Invalid, "gd_offset", 56, at, "no place for a directory"),
            },
        };
        let descriptor = match (bytes_of(u64_at(28)), bytes_of(u64_at(36))) {
            (Some(at), Some(len)) if at > 0 && len > 0 => Some(HostOffset(at).range(len.min(descriptor::LONGEST))),
            _ => None,
        };
        let zero_grains = flags & ZERO_GRAINS != 0;
        Ok(Self { size, grain: grain * SECTOR, table_entries, directory, descriptor, packed, zero_grains })
    }

    /// What an entry of a grain table says.
    pub fn grain(&self, raw: u32) -> Grain {
        match raw {
            0 => Grain::Unallocated,
            1 if self.zero_grains => Grain::Zero,
            sector => Grain::At(HostOffset(u64::from(sector) * SECTOR)),
        }
    }
}

/// Bytes of a marker in front of a packed grain.
pub const MARKER_BYTES: usize = 12;

/// What a marker says: the first sector of the disk that the grain is about, and the bytes of its stream.
pub fn marker(bytes: &[u8; MARKER_BYTES]) -> (u64, u32) {
    let (lba, len) = bytes.split_at(8);
    let lba = lba.first_chunk().map_or(0, |b| u64::from_le_bytes(*b));
    (lba, len.first_chunk().map_or(0, |b| u32::from_le_bytes(*b)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_header_is_bounded_by_what_it_says() {
        let mut bytes = [0_u8; HEADER_BYTES];
        bytes[..4].copy_from_slice(&MAGIC);
        bytes[4] = 1;
        bytes[12..20].copy_from_slice(&2048_u64.to_le_bytes());
        bytes[20..28].copy_from_slice(&128_u64.to_le_bytes());
        bytes[44..48].copy_from_slice(&512_u32.to_le_bytes());
        bytes[56..64].copy_from_slice(&21_u64.to_le_bytes());
        let header = Header::decode(&bytes).unwrap();
        assert_eq!((header.size, header.grain), (1 << 20, 65536));
        assert_eq!(header.directory, Some(HostOffset(21 * 512).range(4)));
        assert_eq!(header.grain(1), Grain::At(HostOffset(512)));
        bytes[8] = 4;
        assert_eq!(Header::decode(&bytes).unwrap().grain(1), Grain::Zero);
        bytes[12..20].copy_from_slice(&u64::MAX.to_le_bytes());
        assert!(Header::decode(&bytes).is_err());
        assert!(Header::decode(&bytes[..5]).is_err());
    }
}
