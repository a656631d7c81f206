//! VMDK, VMware's disk image ("Virtual Disk Format 5.0", VMware, 2011): a descriptor, which is a text, says which extents make up
//! the disk. An extent is a stretch of plain bytes, or sparse: a header, a directory of tables, tables with the sector of each
//! grain, grains, which may be packed. The descriptor of a disk with one sparse extent usually lies in that extent's file.
//! Numbers are little-endian, places are sectors of 512 bytes.
//!
//! * [`header`]: of a sparse extent; [`descriptor`]: the text.

pub mod descriptor;
pub mod header;

pub use descriptor::{Access, Descriptor, Extent, ExtentKind};
pub use header::{Grain, SparseHeader};

use crate::number::{le32, le64};

/// Bytes of a sector.
pub const SECTOR: u64 = 512;

/// Bytes of the marker in front of a packed grain.
pub const MARKER_BYTES: u64 = 12;

/// What is in front of a packed grain.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Marker {
    /// The first sector of the extent that the grain holds.
    pub sector: u64,
    /// Bytes of the deflate stream that follows.
    pub len: u32,
}

impl Marker {
    /// From its [`MARKER_BYTES`].
    pub fn decode(bytes: &[u8]) -> Self {
        Self { sector: le64(bytes, 0), len: le32(bytes, 8) }
    }
}
