//! VHD, Virtual PC's disk image (Microsoft's "Virtual Hard Disk Image Format Specification", 2006): a footer at the end of the
//! file; in dynamic images a copy of it in front, a header, and a table with the sector of each block. All numbers are big-endian.
//! A differencing image is a dynamic one over a parent: the bitmap in front of each block says which of its sectors are here.

use crate::field::{Error, ErrorKind};
use crate::number::{be32, be64};
use crate::{HostOffset, HostRange};

/// Bytes of a footer.
pub const FOOTER_BYTES: usize = 512;

/// Bytes of a dynamic image's header that are looked at.
pub const HEADER_BYTES: usize = 1024;

/// What a footer begins with.
pub const COOKIE: [u8; 8] = *b"conectix";

/// Bytes of a sector, which a bit in a bitmap stands for.
pub const SECTOR: u64 = 512;

/// The longest name of a parent, in bytes.
const NAME_MOST: u32 = 64 << 10;

/// How a parent is located, in the order in which we look: a relative path of Windows, an absolute one.
const RELATIVE: [u8; 4] = *b"W2ru";
const ABSOLUTE: [u8; 4] = *b"W2ku";

/// A block that was never written.
const FREE: u32 = u32::MAX;

/// Programs whose images are as large as they say; others count in cylinders, heads and sectors.
const EXACT: [&[u8; 4]; 5] = [b"win ", b"qem2", b"d2v ", b"tap\0", b"vs  "];

/// The largest geometry there is: what is larger says its size in bytes.
const LARGEST: u64 = 65535 * 16 * 255;

fn fail<T>(kind: ErrorKind, field: &'static str, at: u64, value: u64, why: &'static str) -> Result<T, Error> {
    Err(Error::new(kind, field, at, value, why))
}

/// A footer that makes sense.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Footer {
    /// Bytes of the disk.
    pub size: u64,
    /// Where a dynamic image's header is; none in a fixed one.
    pub header: Option<HostOffset>,
    /// Whether it lies over a parent.
    pub differencing: bool,
    /// What images over this one know it by.
    pub id: [u8; 16],
}

/// Whether the checksum of a structure, which lies in it at `at`, is right: the sum of its bytes, all bits inverted.
fn is_whole(bytes: &[u8], at: usize) -> bool {
    let sum = |bytes: &[u8]| bytes.iter().fold(0_u32, |sum, byte| sum.wrapping_add((*byte).into()));
    let (Some(front), Some(back)) = (bytes.get(..at), bytes.get(at + 4..)) else { return false };
    !sum(front).wrapping_add(sum(back)) == be32(bytes, at)
}

impl Footer {
    /// From the bytes of a footer, which lie at `base`.
    pub fn decode(bytes: &[u8], base: u64) -> Result<Self, Error> {
        if bytes.len() < FOOTER_BYTES || bytes[..8] != COOKIE {
            return fail(ErrorKind::Foreign, "cookie", base, be64(bytes, 0), "not a VHD image");
        }
        if !is_whole(&bytes[..FOOTER_BYTES], 64) {
            return fail(ErrorKind::Invalid, "checksum", base + 64, be32(bytes, 64).into(), "the footer is not whole");
        }
        let kind = be32(bytes, 60);
        let header = match kind {
            2 => None,
            3 | 4 => Some(HostOffset(be64(bytes, 16))),
            _ => return fail(ErrorKind::Invalid, "type", base + 60, kind.into(), "no type of a VHD image"),
        };
        let (cylinders, heads, sectors) = (u64::from(bytes[56]) << 8 | u64::from(bytes[57]), bytes[58], bytes[59]);
        let geometry = cylinders * u64::from(heads) * u64::from(sectors);
        let exact = EXACT.iter().any(|name| bytes[28..32] == name[..]) || geometry == LARGEST;
        let size = if exact { be64(bytes, 48) } else { geometry * 512 };
        if size > i64::MAX as u64 / 2 {
            return fail(ErrorKind::Invalid, "current size", base + 48, size, "larger than any disk");
        }
        let id = bytes[68..].first_chunk().copied().unwrap_or_default();
        Ok(Self { size, header, differencing: kind == 4, id })
    }
}

/// What a differencing image's header says of its parent.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Parent {
    /// Its [`Footer::id`].
    pub id: [u8; 16],
    /// The name of its file, where that makes sense.
    pub name: Option<String>,
    /// Where the path is that leads to it from here, in UTF-16, least byte first.
    pub relative: Option<HostRange>,
    /// Where the path is that it had where it was made.
    pub absolute: Option<HostRange>,
}

impl Parent {
    /// From the bytes of a header.
    pub fn decode(header: &[u8]) -> Self {
        let id = header.get(40..).and_then(|rest| rest.first_chunk()).copied().unwrap_or_default();
        let name = header.get(64..576).unwrap_or_default();
        let units = name.as_chunks().0.iter().map(|unit| u16::from_be_bytes(*unit));
        let units: Vec<u16> = units.take_while(|unit| *unit != 0).collect();
        let locator = |kind: [u8; 4]| {
            let entry = (576..768).step_by(24).find(|at| header.get(*at..*at + 4) == Some(&kind))?;
            let (len, at) = (be32(header, entry + 8), be64(header, entry + 16));
            (len > 0 && len <= NAME_MOST && i64::try_from(at).is_ok()).then(|| HostOffset(at).range(len.into()))
        };
        Self {
            id,
            name: String::from_utf16(&units).ok().filter(|name| !name.is_empty()),
            relative: locator(RELATIVE),
            absolute: locator(ABSOLUTE),
        }
    }

    /// The path that a locator's bytes say.
    pub fn path(bytes: &[u8]) -> Option<String> {
        let units = bytes.as_chunks().0.iter().map(|unit| u16::from_le_bytes(*unit));
        let units: Vec<u16> = units.take_while(|unit| *unit != 0).collect();
        String::from_utf16(&units).ok().filter(|path| !path.is_empty())
    }
}

/// A dynamic image's header that makes sense.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    /// Bytes of a block: a power of two.
    pub block: u64,
    /// Blocks.
    pub blocks: u32,
    table: u64,
}

impl Header {
    /// From its bytes, which lie at `base`, of an image of `size` bytes.
    pub fn decode(bytes: &[u8], base: u64, size: u64) -> Result<Self, Error> {
        if bytes.get(..8) != Some(b"cxsparse") {
            return fail(ErrorKind::Invalid, "cookie", base, be64(bytes, 0), "no header of a dynamic image");
        }
        let (block, blocks, table) = (u64::from(be32(bytes, 32)), be32(bytes, 28), be64(bytes, 16));
        if !block.is_power_of_two() || !(512..=1 << 30).contains(&block) {
            return fail(ErrorKind::Invalid, "block size", base + 32, block, "no size of a block");
        }
        if size.div_ceil(block) > blocks.into() {
            return fail(ErrorKind::Invalid, "table entries", base + 28, blocks.into(), "too few for the disk's size");
        }
        if table > i64::MAX as u64 / 2 {
            return fail(ErrorKind::Invalid, "table offset", base + 16, table, "no place for a table");
        }
        Ok(Self { block, blocks, table })
    }

    /// Where the table lies.
    pub fn table(&self) -> HostRange {
        HostOffset(self.table).range(u64::from(self.blocks) * 4)
    }

    /// Bytes of the bitmap in front of a block.
    pub fn bitmap(&self) -> u64 {
        (self.block / SECTOR).div_ceil(8).next_multiple_of(SECTOR)
    }

    /// Where a block's bitmap is that the table has this entry for; its data are behind that.
    pub fn place(&self, entry: [u8; 4]) -> Option<HostOffset> {
        match u32::from_be_bytes(entry) {
            FREE => None,
            sector => Some(HostOffset(u64::from(sector) * SECTOR)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_parent_is_where_a_header_says() {
        let mut header = vec![0; HEADER_BYTES];
        header[40..56].fill(7);
        for (n, unit) in "päter.vhd".encode_utf16().enumerate() {
            header[64 + 2 * n..][..2].copy_from_slice(&unit.to_be_bytes());
        }
        header[600..604].copy_from_slice(b"W2ru");
        header[611] = 18;
        header[622] = 4;
        header[624..628].copy_from_slice(b"W2ku");
        header[632] = 1;
        let parent = Parent::decode(&header);
        assert_eq!((parent.id, parent.name.as_deref()), ([7; 16], Some("päter.vhd")));
        assert_eq!((parent.relative, parent.absolute), (Some(HostOffset(1024).range(18)), None), "too long");
        let path: Vec<u8> = ".\\p.vhd\0x".encode_utf16().flat_map(u16::to_le_bytes).collect();
        assert_eq!(Parent::path(&path).as_deref(), Some(".\\p.vhd"));
        assert_eq!(Parent::path(&[0, 0xd8, 0, 0xd8]), None);
        assert_eq!(Parent::decode(&[]), Parent::default());
    }
}
