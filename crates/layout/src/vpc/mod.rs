//! VHD, Virtual PC's disk image (Microsoft's "Virtual Hard Disk Image Format Specification", 2006): a footer at the end of the
//! file; in dynamic images a copy of it in front, a header, and a table with the sector of each block. All numbers are big-endian.

use crate::field::{Error, ErrorKind};
use crate::number::{be32, be64};
use crate::{HostOffset, HostRange};

/// Bytes of a footer.
pub const FOOTER_BYTES: usize = 512;

/// Bytes of a dynamic image's header that are looked at.
pub const HEADER_BYTES: usize = 1024;

/// What a footer begins with.
pub const COOKIE: [u8; 8] = *b"conectix";

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
}

impl Footer {
    /// From the bytes of a footer, which lie at `base`.
    pub fn decode(bytes: &[u8], base: u64) -> Result<Self, Error> {
        if bytes.len() < FOOTER_BYTES || bytes[..8] != COOKIE {
            return fail(ErrorKind::Foreign, "cookie", base, be64(bytes, 0), "not a VHD image");
        }
        let kind = be32(bytes, 60);
        let header = match kind {
            2 => None,
            3 => Some(HostOffset(be64(bytes, 16))),
            4 => {
                return fail(ErrorKind::Unsupported, "type", base + 60, 4, "differencing images are not supported");
            }
            _ => return fail(ErrorKind::Invalid, "type", base + 60, kind.into(), "no type of a VHD image"),
        };
        let (cylinders, heads, sectors) = (u64::from(bytes[56]) << 8 | u64::from(bytes[57]), bytes[58], bytes[59]);
        let geometry = cylinders * u64::from(heads) * u64::from(sectors);
        let exact = EXACT.iter().any(|name| bytes[28..32] == name[..]) || geometry == LARGEST;
        let size = if exact { be64(bytes, 48) } else { geometry * 512 };
        if size > i64::MAX as u64 / 2 {
            return fail(ErrorKind::Invalid, "current size", base + 48, size, "larger than any disk");
        }
        Ok(Self { size, header })
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

    /// Where a block's data are that the table has this entry for: behind its bitmap.
    pub fn place(&self, entry: [u8; 4]) -> Option<HostOffset> {
        let bitmap = (self.block / 512).div_ceil(8).next_multiple_of(512);
        match u32::from_be_bytes(entry) {
            FREE => None,
            sector => Some(HostOffset(u64::from(sector) * 512 + bitmap)),
        }
    }
}
