//! VHDX, Hyper-V's disk image ([MS-VHDX]): two headers, of which the newer one counts; a log of changes that may not have reached
//! their places; a table of regions; metadata; the BAT, a table with the place of each block, and of bitmaps for those that are only
//! partly here. All numbers are little-endian. What holds numbers has a CRC-32C, which is checked.
//!
//! * [`header`]: headers and regions; [`metadata`]: what the disk is; [`bat`]: where its blocks are; [`log`]: entries of the log.

pub mod bat;
mod crc;
mod guid;
pub mod header;
pub mod log;
pub mod metadata;

pub use bat::{Bat, Bitmap, Block};
pub use crc::crc32c;
pub use guid::Guid;
pub use header::{Header, Regions};
pub use metadata::{Metadata, Parent};

/// What images begin with.
pub const SIGNATURE: [u8; 8] = *b"vhdxfile";

/// Regions, the log and blocks lie at multiples of this.
pub const MIB: u64 = 1 << 20;

/// Whether the CRC-32C of `bytes`, which lies in them at `at`, is right.
fn is_whole(bytes: &[u8], at: usize) -> bool {
    let (Some(front), Some(back)) = (bytes.get(..at), bytes.get(at + 4..)) else { return false };
    let crc = crc::update(crc::update(crc::update(!0, front), &[0; 4]), back);
    !crc == crate::number::le32(bytes, at)
}
