//! VHDX, Hyper-V's disk image ([MS-VHDX]): two headers of which the newer counts, a table of regions, metadata, and a table of
//! blocks (BAT). All numbers are little-endian.

use crate::field::{Error, ErrorKind};
use crate::{HostOffset, HostRange};

/// What a file begins with.
pub const SIGNATURE: [u8; 8] = *b"vhdxfile";

/// Where the two headers are, and how long.
pub const HEADERS: [HostOffset; 2] = [HostOffset(64 << 10), HostOffset(128 << 10)];
/// Bytes of a header.
pub const HEADER_BYTES: usize = 4096;

/// Where the two tables of regions are, and how long.
pub const REGIONS: [HostOffset; 2] = [HostOffset(192 << 10), HostOffset(256 << 10)];
/// Bytes of a table of regions.
pub const REGION_BYTES: usize = 64 << 10;

/// Bytes of the table in front of the metadata.
pub const METADATA_BYTES: usize = 64 << 10;

/// Alignment of everything else.
const MIB: u64 = 1 << 20;

type Guid = [u8; 16];

const BAT: Guid = guid(0x2dc2_7766, 0xf623, 0x4200, [0x9d, 0x64, 0x11, 0x5e, 0x9b, 0xfd, 0x4a, 0x08]);
const METADATA: Guid = guid(0x8b7c_a206, 0x4790, 0x4b9a, [0xb8, 0xfe, 0x57, 0x5f, 0x05, 0x0f, 0x88, 0x6e]);
const FILE_PARAMETERS: Guid = guid(0xcaa1_6737, 0xfa36, 0x4d43, [0xb3, 0xb6, 0x33, 0xf0, 0xaa, 0x44, 0xe7, 0x6b]);
const DISK_SIZE: Guid = guid(0x2fa5_4224, 0xcd1b, 0x4876, [0xb2, 0x11, 0x5d, 0xbe, 0xd8, 0x3b, 0xf4, 0xb8]);
const SECTOR_SIZE: Guid = guid(0x8141_bf1d, 0xa96f, 0x4709, [0xba, 0x47, 0xf2, 0x33, 0xa8, 0xfa, 0xab, 0x5f]);

/// A GUID as it lies in a file: three numbers the little way round, and bytes.
const fn guid(a: u32, b: u16, c: u16, d: [u8; 8]) -> Guid {
    let (a, b, c) = (a.to_le_bytes(), b.to_le_bytes(), c.to_le_bytes());
    [a[0], a[1], a[2], a[3], b[0], b[1], c[0], c[1], d[0], d[1], d[2], d[3], d[4], d[5], d[6], d[7]]
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    bytes.get(at..at + 4).and_then(|b| b.first_chunk()).map_or(0, |b| u32::from_le_bytes(*b))
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    bytes.get(at..at + 8).and_then(|b| b.first_chunk()).map_or(0, |b| u64::from_le_bytes(*b))
}

fn fail<T>(kind: ErrorKind, field: &'static str, at: u64, value: u64, why: &'static str) -> Result<T, Error> {
    Err(Error::new(kind, field, at, value, why))
}

/// Whether `bytes`, whose checksum lies at 4, are what was written.
fn is_whole(bytes: &[u8]) -> bool {
    let said = u32_at(bytes, 4);
    let sum = crc32c::crc32c(bytes.get(..4).unwrap_or_default());
    let sum = crc32c::crc32c_append(sum, &[0; 4]);
    crc32c::crc32c_append(sum, bytes.get(8..).unwrap_or_default()) == said
}

/// A header: how new it is, and whether the log holds what is not in the file yet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    /// The greater one counts.
    pub sequence: u64,
    /// The log is in use.
    pub has_log: bool,
}

impl Header {
    /// From its bytes; `None` if they are not whole.
    pub fn decode(bytes: &[u8]) -> Option<Self> {
        let sound = bytes.len() == HEADER_BYTES && bytes.starts_with(b"head") && is_whole(bytes);
        sound.then(|| Self {
            sequence: u64_at(bytes, 8),
            has_log: bytes.get(48..64).is_some_and(|guid| guid.iter().any(|b| *b != 0)),
        })
    }
}

/// Where things are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Regions {
    /// The table of blocks.
    pub bat: HostRange,
    /// The metadata.
    pub metadata: HostRange,
}

impl Regions {
    /// From the bytes of a table of regions at `base`.
    pub fn decode(bytes: &[u8], base: HostOffset) -> Result<Self, Error> {
        if !bytes.starts_with(b"regi") || !is_whole(bytes) {
            return fail(
                ErrorKind::Invalid,
                "region table",
                base.get(),
                u32_at(bytes, 0).into(),
                "not what was written",
            );
        }
        let count = u32_at(bytes, 8);
        if count > 2047 {
            return fail(ErrorKind::Invalid, "entry_count", base.get() + 8, count.into(), "more than fit");
        }
        let (mut bat, mut metadata) = (None, None);
        for entry in bytes.get(16..).unwrap_or_default().chunks_exact(32).take(count as usize) {
            let (at, len, required) = (u64_at(entry, 16), u64::from(u32_at(entry, 24)), u32_at(entry, 28) & 1 != 0);
            let place = if at.is_multiple_of(MIB) && at >= MIB && i64::try_from(at).is_ok() {
                HostOffset(at).range(len)
            } else {
                return fail(ErrorKind::Invalid, "region offset", base.get(), at, "no place for a region");
            };
            match entry.first_chunk::<16>() {
                Some(&BAT) => bat = Some(place),
                Some(&METADATA) => metadata = Some(place),
                _ if required => {
                    return fail(
                        ErrorKind::Unsupported,
                        "region",
                        base.get(),
                        at,
                        "a region that must be known, and is not",
                    );
                }
                _ => {}
            }
        }
        match (bat, metadata) {
            (Some(bat), Some(metadata)) => Ok(Self { bat, metadata }),
            _ => fail(ErrorKind::Invalid, "region table", base.get(), 0, "a region is missing"),
        }
    }
}

/// What the metadata say of the disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Disk {
    /// Bytes of the disk.
    pub size: u64,
    /// Bytes of a block.
    pub block: u64,
    /// Entries of the table for blocks between two that are for bitmaps.
    pub chunk: u64,
}

/// What an entry of the table of blocks says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Block {
    /// Zeros.
    Zero,
    /// The block is here.
    Data(HostOffset),
}

/// Where the items of the metadata are: file parameters, size, size of sectors.
pub fn items(bytes: &[u8], base: HostOffset) -> Result<[HostOffset; 3], Error> {
    if !bytes.starts_with(b"metadata") {
        return fail(ErrorKind::Invalid, "metadata table", base.get(), u64_at(bytes, 0), "not what must be there");
    }
    let count = u16::from_le_bytes([*bytes.get(10).unwrap_or(&0), *bytes.get(11).unwrap_or(&0)]);
    let mut found = [None; 3];
    for entry in bytes.get(32..).unwrap_or_default().chunks_exact(32).take(usize::from(count)) {
        let at = u64::from(u32_at(entry, 16));
        let which = match entry.first_chunk::<16>() {
            Some(&FILE_PARAMETERS) => 0,
            Some(&DISK_SIZE) => 1,
            Some(&SECTOR_SIZE) => 2,
            _ => continue,
        };
        found[which] = Some(base + at);
    }
    match found {
        [Some(parameters), Some(size), Some(sector)] => Ok([parameters, size, sector]),
        _ => fail(ErrorKind::Invalid, "metadata table", base.get(), count.into(), "an item is missing"),
    }
}

impl Disk {
    /// From the bytes of the three items, eight each.
    pub fn decode(parameters: [u8; 8], size: [u8; 8], sector: [u8; 8]) -> Result<Self, Error> {
        let (block, flags) = (u64::from(u32_at(&parameters, 0)), u32_at(&parameters, 4));
        let (size, sector) = (u64::from_le_bytes(size), u64::from(u32_at(&sector, 0)));
        if flags & 2 != 0 {
            let why = "images with a parent are not read; merge it first";
            return fail(ErrorKind::Unsupported, "has_parent", 0, flags.into(), why);
        }
        if !block.is_power_of_two() || !(MIB..=256 * MIB).contains(&block) {
            return fail(ErrorKind::Invalid, "block_size", 0, block, "no size of a block");
        }
        if sector != 512 && sector != 4096 {
            return fail(ErrorKind::Invalid, "logical_sector_size", 0, sector, "512 or 4096 are possible");
        }
        if size > 64 << 40 {
            return fail(ErrorKind::Invalid, "virtual_disk_size", 0, size, "64 TiB are possible");
        }
        Ok(Self { size, block, chunk: (sector << 23) / block })
    }

    /// Where in the table the entry of a block is.
    pub fn entry(&self, block: u64) -> u64 {
        block + block / self.chunk
    }

    /// Entries that the table has.
    pub fn entries(&self) -> u64 {
        match self.size.div_ceil(self.block) {
            0 => 0,
            blocks => self.entry(blocks - 1) + 1,
        }
    }

    /// What an entry says; `None` if it makes no sense here.
    pub fn block(raw: u64) -> Option<Block> {
        let at = HostOffset(raw >> 20 << 20);
        match raw & 7 {
            // Not there, undefined, zero, unmapped: without a parent all of them read as zeros.
            0..=3 => Some(Block::Zero),
            6 if at.get() >= MIB && i64::try_from(at.get()).is_ok() => Some(Block::Data(at)),
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn entries_leave_room_for_bitmaps() {
        let disk = Disk::decode([0, 0, 0, 2, 0, 0, 0, 0], (1_u64 << 40).to_le_bytes(), [0, 2, 0, 0, 0, 0, 0, 0]);
        let disk = disk.unwrap();
        assert_eq!((disk.block, disk.chunk), (32 << 20, 128));
        assert_eq!((disk.entry(127), disk.entry(128)), (127, 129));
        assert_eq!(Disk::block(6 | 5 << 20), Some(Block::Data(HostOffset(5 << 20))));
        assert_eq!((Disk::block(3), Disk::block(7), Disk::block(6)), (Some(Block::Zero), None, None));
    }

    #[test]
    fn what_is_not_whole_is_no_header() {
        let mut bytes = vec![0_u8; HEADER_BYTES];
        bytes[..4].copy_from_slice(b"head");
        bytes[8] = 7;
        let sum = crc32c::crc32c(&bytes);
        bytes[4..8].copy_from_slice(&sum.to_le_bytes());
        assert_eq!(Header::decode(&bytes), Some(Header { sequence: 7, has_log: false }));
        bytes[100] = 1;
        assert_eq!(Header::decode(&bytes), None);
        assert!(Regions::decode(&[0; 100], HostOffset::ZERO).is_err());
        assert!(items(b"metadata", HostOffset::ZERO).is_err());
    }
}
