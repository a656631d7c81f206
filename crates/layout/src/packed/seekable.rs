//! The seek table behind zstd frames: how long each frame is, packed and unpacked. It is a frame of its own, to be skipped, and ends
//! with a footer. All numbers are little-endian.

use crate::field::{Error, ErrorKind};
use crate::number::le32;
use crate::{HostOffset, HostRange};

/// What a zstd frame begins with.
pub const MAGIC: [u8; 4] = 0xfd2f_b528_u32.to_le_bytes();

/// What a frame begins with that holds a seek table.
const TABLE_MAGIC: u32 = 0x184d_2a5e;

/// What a footer, and with it the file, ends with.
pub const FOOTER_MAGIC: [u8; 4] = 0x8f92_eab1_u32.to_le_bytes();

/// Bytes of the footer.
pub const FOOTER_BYTES: u64 = 9;

/// Bytes of a table's own header.
const HEADER_BYTES: u64 = 8;

/// In the footer: each entry has a checksum.
const CHECKSUMS: u8 = 1 << 7;
/// Bits that must be zero.
const RESERVED: u8 = 0x7c;

/// Where a table is, and how it is to be read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SeekTable {
    /// Frames, those to be skipped included.
    pub frames: u32,
    /// Its entries.
    pub entries: HostRange,
    /// Where the table begins: the frames end there.
    pub start: HostOffset,
    checksums: bool,
}

/// A frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Frame {
    /// Bytes as they are in the file.
    pub packed: u32,
    /// Bytes that come of it.
    pub unpacked: u32,
    /// The lower half of the [`super::xxh64`] of what comes of it.
    pub checksum: Option<u32>,
}

impl SeekTable {
    /// From the footer, the last [`FOOTER_BYTES`] of a file of `size` bytes; `None`: there is no seek table.
    pub fn decode(footer: &[u8], size: u64) -> Result<Option<Self>, Error> {
        let at = size.saturating_sub(FOOTER_BYTES);
        let fail = |field, at, value, why: &'static str| Err(Error::new(ErrorKind::Invalid, field, at, value, why));
        if footer.len() as u64 != FOOTER_BYTES || !footer.ends_with(&FOOTER_MAGIC) {
            return Ok(None);
        }
        let (frames, descriptor) = (le32(footer, 0), footer[4]);
        if descriptor & RESERVED != 0 {
            return fail("Seek_Table_Descriptor", at + 4, descriptor.into(), "bits are set that must not be");
        }
        let checksums = descriptor & CHECKSUMS != 0;
        let len = u64::from(frames) * if checksums { 12 } else { 8 };
        let Some(start) = at.checked_sub(len + HEADER_BYTES) else {
            return fail("Number_Of_Frames", at, frames.into(), "its entries do not fit in the file");
        };
        let entries = HostOffset(start + HEADER_BYTES).range(len);
        Ok(Some(Self { frames, entries, start: HostOffset(start), checksums }))
    }

    /// Checks the table's own header, which lies at [`SeekTable::start`].
    pub fn check_header(&self, bytes: &[u8]) -> Result<(), Error> {
        let (magic, len) = (le32(bytes, 0), le32(bytes, 4));
        let at = self.start.get();
        if magic != TABLE_MAGIC {
            return Err(Error::new(
                ErrorKind::Invalid,
                "Skippable_Magic_Number",
                at,
                magic.into(),
                "no frame begins here",
            ));
        }
        if u64::from(len) != self.entries.len() + FOOTER_BYTES {
            return Err(Error::new(ErrorKind::Invalid, "Frame_Size", at + 4, len.into(), "not what its entries take"));
        }
        Ok(())
    }

    /// The entries, from their bytes.
    pub fn decode_entries(&self, bytes: &[u8]) -> impl Iterator<Item = Frame> {
        let len = if self.checksums { 12 } else { 8 };
        bytes.chunks_exact(len).map(move |entry| Frame {
            packed: le32(entry, 0),
            unpacked: le32(entry, 4),
            checksum: (len == 12).then(|| le32(entry, 8)),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_table_is_found_from_the_end() {
        let footer = [3, 0, 0, 0, 0x80, 0xb1, 0xea, 0x92, 0x8f];
        let table = SeekTable::decode(&footer, 1000).unwrap().unwrap();
        assert_eq!((table.frames, table.start), (3, HostOffset(1000 - 9 - 36 - 8)));
        assert_eq!(table.entries, HostOffset(1000 - 9 - 36).range(36));
        let mut header = [TABLE_MAGIC.to_le_bytes(), 45_u32.to_le_bytes()].concat();
        table.check_header(&header).unwrap();
        header[4] = 44;
        assert_eq!(table.check_header(&header).unwrap_err().field(), "Frame_Size");
        let entries: Vec<u8> = (1..=9_u32).flat_map(u32::to_le_bytes).collect();
        let frames: Vec<_> = table.decode_entries(&entries).collect();
        assert_eq!(frames[2], Frame { packed: 7, unpacked: 8, checksum: Some(9) });
        assert_eq!(SeekTable::decode(&footer, 50).unwrap_err().field(), "Number_Of_Frames");
        assert_eq!(SeekTable::decode(&[0; 9], 1000), Ok(None));
        let odd = [3, 0, 0, 0, 4, 0xb1, 0xea, 0x92, 0x8f];
        assert_eq!(SeekTable::decode(&odd, 1000).unwrap_err().field(), "Seek_Table_Descriptor");
    }
}
