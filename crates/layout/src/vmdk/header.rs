//! The header of a sparse extent.

use super::SECTOR;
use crate::field::{Error, ErrorKind};
use crate::number::{le16, le32, le64};
use crate::{HostOffset, HostRange};

/// Bytes of a header, and of a footer, which is one.
pub const HEADER_BYTES: usize = 512;

/// What a sparse extent begins with.
pub const MAGIC: [u8; 4] = *b"KDMV";

/// What a sparse extent of ESX, or of VMware before 2003, begins with: another format.
pub const MAGIC_COWD: [u8; 4] = *b"COWD";

/// How far in front of the file's end the footer is: one sector follows it.
pub const FOOTER_FROM_END: u64 = 1024;

/// The directory's place is in the footer.
const AT_END: u64 = u64::MAX;

/// The bytes at `newline` are checked.
const FLAG_NEWLINES: u32 = 1 << 0;
/// An entry of 1 stands for a grain of zeros.
const FLAG_ZERO_GRAINS: u32 = 1 << 2;
/// Grains are packed.
const FLAG_PACKED: u32 = 1 << 16;
/// Packed grains and tables have markers in front.
const FLAG_MARKERS: u32 = 1 << 17;
/// Flags whose meaning must be known.
const INCOMPATIBLE: u32 = 0xffff_0000;

/// The largest grain, in sectors: 16 MiB. They have 64 KiB as a rule.
const GRAIN_MOST: u64 = 1 << 15;

/// The most entries of a table: they have 512 as a rule.
const ENTRIES_MOST: u32 = 4096;

/// Where a newline would have been changed by a transfer as text, and what is there.
const NEWLINES_AT: usize = 73;
const NEWLINES: [u8; 4] = *b"\n \r\n";

/// A header that makes sense.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SparseHeader {
    /// Sectors of the extent.
    pub sectors: u64,
    /// Bytes of a grain: a power of two.
    pub grain: u64,
    /// Entries of a table.
    pub entries: u32,
    /// Where the descriptor is, if it is here.
    pub descriptor: Option<HostRange>,
    /// The extent was not closed.
    pub unclean: bool,
    /// Grains are packed.
    pub packed: bool,
    /// Packed grains have a [`super::Marker`] in front.
    pub markers: bool,
    zero_grains: bool,
    directory: u64,
}

/// What an entry of a table says of its grain.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Grain {
    /// Nothing: what lies below shows through.
    Unallocated,
    /// It is zeros.
    Zero,
    /// It is here, or its marker.
    At(HostOffset),
}

impl SparseHeader {
    /// From its bytes, which lie at `base`.
    pub fn decode(bytes: &[u8], base: u64) -> Result<Self, Error> {
        let fail =
            |kind, field, at: u64, value: u64, why: &'static str| Err(Error::new(kind, field, base + at, value, why));
        if bytes.len() < HEADER_BYTES || !bytes.starts_with(&MAGIC) {
            return fail(ErrorKind::Foreign, "magicNumber", 0, le32(bytes, 0).into(), "not a sparse extent of a VMDK");
        }
        let (version, flags) = (le32(bytes, 4), le32(bytes, 8));
        if !(1..=3).contains(&version) {
            return fail(ErrorKind::Unsupported, "version", 4, version.into(), "versions 1 to 3 are known");
        }
        if flags & INCOMPATIBLE & !(FLAG_PACKED | FLAG_MARKERS) != 0 {
            return fail(ErrorKind::Unsupported, "flags", 8, flags.into(), "a flag that must be known is not");
        }
        let newlines = bytes.get(NEWLINES_AT..NEWLINES_AT + NEWLINES.len());
        if flags & FLAG_NEWLINES != 0 && newlines != Some(&NEWLINES) {
            let why = "line ends were changed: the file was transferred as text; transfer it as it is";
            return fail(ErrorKind::Invalid, "singleEndLineChar", 73, le32(bytes, NEWLINES_AT).into(), why);
        }
        let (sectors, grain, entries) = (le64(bytes, 12), le64(bytes, 20), le32(bytes, 44));
        if sectors == 0 || sectors > i64::MAX as u64 / SECTOR {
            return fail(ErrorKind::Invalid, "capacity", 12, sectors, "no size of an extent");
        }
        if !grain.is_power_of_two() || grain > GRAIN_MOST {
            return fail(ErrorKind::Invalid, "grainSize", 20, grain, "grains have a power of two up to 32768 sectors");
        }
        if !(1..=ENTRIES_MOST).contains(&entries) {
            return fail(ErrorKind::Invalid, "numGTEsPerGT", 44, entries.into(), "tables have 1 to 4096 entries");
        }
        let (packed, how) = (flags & FLAG_PACKED != 0, le16(bytes, 77));
        if packed && how != 1 {
            return fail(ErrorKind::Unsupported, "compressAlgorithm", 77, how.into(), "only deflate (1) is known");
        }
        let (text, text_len, directory) = (le64(bytes, 28), le64(bytes, 36), le64(bytes, 56));
        let far = i64::MAX as u64 / SECTOR / 2;
        if text > far || text_len > far {
            return fail(ErrorKind::Invalid, "descriptorOffset", 28, text, "no place for a descriptor");
        }
        if directory == 0 || directory > far && directory != AT_END {
            return fail(ErrorKind::Invalid, "gdOffset", 56, directory, "no place for a directory");
        }
        Ok(Self {
            sectors,
            grain: grain * SECTOR,
            entries,
            descriptor: (text > 0 && text_len > 0).then(|| HostOffset(text * SECTOR).range(text_len * SECTOR)),
            unclean: bytes[72] != 0,
            packed,
            markers: flags & FLAG_MARKERS != 0,
            zero_grains: flags & FLAG_ZERO_GRAINS != 0,
            directory,
        })
    }

    /// Whether where the directory is, is said by the footer ([`FOOTER_FROM_END`]).
    pub fn continues_in_footer(&self) -> bool {
        self.directory == AT_END
    }

    /// Bytes of the disk that one table maps.
    pub fn reach(&self) -> u64 {
        self.grain * u64::from(self.entries)
    }

    /// Bytes of a table.
    pub fn table_bytes(&self) -> u64 {
        u64::from(self.entries) * 4
    }

    /// Where the directory lies: an entry of four bytes for each table.
    pub fn directory(&self) -> HostRange {
        let tables = (self.sectors * SECTOR).div_ceil(self.reach());
        HostOffset(self.directory.saturating_mul(SECTOR)).range(tables * 4)
    }

    /// Where the table lies that the directory has this entry for; `None`: none of its grains is allocated.
    pub fn table_at(&self, entry: u32) -> Option<HostRange> {
        (entry > 0).then(|| HostOffset(u64::from(entry) * SECTOR).range(self.table_bytes()))
    }

    /// What a table says of a grain that it has this entry for.
    pub fn grain_at(&self, entry: [u8; 4]) -> Grain {
        match u32::from_le_bytes(entry) {
            0 => Grain::Unallocated,
            1 if self.zero_grains => Grain::Zero,
            sector => Grain::At(HostOffset(u64::from(sector) * SECTOR)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn header() -> Vec<u8> {
        let mut bytes = vec![0; HEADER_BYTES];
        bytes[..4].copy_from_slice(&MAGIC);
        bytes[4] = 1;
        bytes[8] = 1;
        bytes[12..20].copy_from_slice(&100_000_u64.to_le_bytes());
        bytes[20] = 128;
        bytes[28] = 1;
        bytes[36] = 20;
        bytes[44..48].copy_from_slice(&512_u32.to_le_bytes());
        bytes[56] = 26;
        bytes[73..77].copy_from_slice(&NEWLINES);
        bytes
    }

    #[test]
    fn numbers_are_where_they_belong() {
        let header = SparseHeader::decode(&header(), 0).unwrap();
        assert_eq!((header.sectors, header.grain, header.reach()), (100_000, 65536, 32 << 20));
        assert_eq!(header.descriptor, Some(HostOffset(512).range(20 * 512)));
        assert_eq!(header.directory(), HostOffset(26 * 512).range(2 * 4));
        assert_eq!(header.table_at(3), Some(HostOffset(1536).range(2048)));
        assert_eq!((header.table_at(0), header.grain_at([0; 4])), (None, Grain::Unallocated));
        assert_eq!(header.grain_at([1, 0, 0, 0]), Grain::At(HostOffset(512)));
        assert!(!header.packed && !header.unclean && !header.continues_in_footer());
    }

    #[test]
    fn flags_change_what_is_read() {
        let mut bytes = header();
        (bytes[8], bytes[10], bytes[77], bytes[72]) = (5, 3, 1, 1);
        bytes[56..64].fill(0xff);
        let header = SparseHeader::decode(&bytes, 0).unwrap();
        assert!(header.packed && header.markers && header.unclean && header.continues_in_footer());
        assert_eq!(header.grain_at([1, 0, 0, 0]), Grain::Zero);
    }

    #[test]
    fn what_makes_no_sense_is_named() {
        for (at, value, field) in [
            (0, 0, "magicNumber"),
            (4, 4, "version"),
            (10, 4, "flags"),
            (10, 1, "compressAlgorithm"),
            (19, 0x80, "capacity"),
            (20, 3, "grainSize"),
            (23, 1, "grainSize"),
            (47, 1, "numGTEsPerGT"),
            (56, 0, "gdOffset"),
            (63, 0x7f, "gdOffset"),
            (75, b'\n', "singleEndLineChar"),
        ] {
            let mut bytes = header();
            bytes[at] = value;
            let error = SparseHeader::decode(&bytes, 1024).unwrap_err();
            assert_eq!(error.field(), field);
            assert!(error.offset().get() >= 1024);
        }
    }
}
