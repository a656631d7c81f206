//! VDI, VirtualBox's disk image: a header, a map with one number for each block, blocks. All numbers are little-endian.
//! (No specification was published; the layout is the one that VirtualBox's headers and QEMU's documentation describe.)

use crate::field::{Error, ErrorKind};
use crate::number::{le32, le64};
use crate::{HostOffset, HostRange};

/// Bytes of the header that are looked at.
pub const HEADER_BYTES: usize = 512;

/// Where the signature is, and what it is.
pub const SIGNATURE_AT: usize = 0x40;
/// The signature.
pub const SIGNATURE: [u8; 4] = 0xbeda_107f_u32.to_le_bytes();

/// A block that was never written.
const FREE: u32 = u32::MAX;
/// A block of zeros.
const ZERO: u32 = u32::MAX - 1;

/// A header that makes sense.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    /// Bytes of the disk.
    pub size: u64,
    /// Bytes of a block: a power of two.
    pub block: u64,
    /// Blocks of the disk; enough for its size.
    pub blocks: u32,
    map: u32,
    data: u32,
}

/// Where a block is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Block {
    /// Nowhere: zeros.
    Zero,
    /// Here.
    Data(HostOffset),
}

impl Header {
    /// From the first [`HEADER_BYTES`] of a file.
    pub fn decode(bytes: &[u8]) -> Result<Self, Error> {
        let fail =
            |kind, field, at: usize, value: u64, why: &'static str| Err(Error::new(kind, field, at as u64, value, why));
        if bytes.get(SIGNATURE_AT..SIGNATURE_AT + 4) != Some(&SIGNATURE) {
            return fail(
                ErrorKind::Foreign,
                "signature",
                SIGNATURE_AT,
                le32(bytes, SIGNATURE_AT).into(),
                "not a VDI image",
            );
        }
        let version = le32(bytes, 0x44);
        if version != 0x0001_0001 {
            return fail(ErrorKind::Unsupported, "version", 0x44, version.into(), "only version 1.1 is known");
        }
        let kind = le32(bytes, 0x4c);
        if kind != 1 && kind != 2 {
            return fail(
                ErrorKind::Unsupported,
                "type",
                0x4c,
                kind.into(),
                "neither dynamic nor fixed (a differencing image?)",
            );
        }
        if bytes.get(0x1a8..0x1c8).is_none_or(|ids| ids.iter().any(|byte| *byte != 0)) {
            return fail(ErrorKind::Unsupported, "parent", 0x1a8, 1, "images with a parent are not supported");
        }
        let (block, size, blocks) = (u64::from(le32(bytes, 0x178)), le64(bytes, 0x170), le32(bytes, 0x180));
        if !block.is_power_of_two() || !(512..=1 << 30).contains(&block) {
            return fail(ErrorKind::Invalid, "block_size", 0x178, block, "no size of a block");
        }
        if size > i64::MAX as u64 || size.div_ceil(block) > blocks.into() {
            return fail(ErrorKind::Invalid, "disk_size", 0x170, size, "more than the blocks hold");
        }
        Ok(Self { size, block, blocks, map: le32(bytes, 0x154), data: le32(bytes, 0x158) })
    }

    /// Where the map lies.
    pub fn map(&self) -> HostRange {
        HostOffset(self.map.into()).range(u64::from(self.blocks) * 4)
    }

    /// Where a block is that the map has this number for.
    pub fn place(&self, number: [u8; 4]) -> Block {
        match u32::from_le_bytes(number) {
            FREE | ZERO => Block::Zero,
            number => Block::Data(HostOffset(u64::from(self.data) + u64::from(number) * self.block)),
        }
    }
}
