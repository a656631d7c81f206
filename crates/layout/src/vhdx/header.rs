//! The two headers, and the two tables of regions.

use super::{Guid, MIB, is_whole};
use crate::field::{Error, ErrorKind};
use crate::number::{le16, le32, le64};
use crate::{HostOffset, HostRange};

/// Where the headers are.
pub const HEADERS_AT: [u64; 2] = [64 << 10, 128 << 10];

/// Bytes of a header.
pub const HEADER_BYTES: usize = 4096;

/// Where the tables of regions are: alike, so that one of them is whole.
pub const REGIONS_AT: [u64; 2] = [192 << 10, 256 << 10];

/// Bytes of a table of regions.
pub const REGIONS_BYTES: usize = 64 << 10;

/// The most regions that a table has room for.
const REGIONS_MOST: u32 = 2047;

const BAT: Guid = Guid::parse("2dc27766-f623-4200-9d64-115e9bfd4a08").expect("a GUID");
const METADATA: Guid = Guid::parse("8b7ca206-4790-4b9a-b8fe-575f050f886e").expect("a GUID");

/// A header that is whole.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    /// Of two headers, the one with the greater number counts.
    pub sequence: u64,
    /// Changes with what the disk holds.
    pub data_write: Guid,
    /// Which entries of the log count; zeros: the log is empty.
    pub log_id: Guid,
    /// Where the log is.
    pub log: HostRange,
}

impl Header {
    /// From its bytes, which lie at `base`. One that is not whole is invalid; one that is whole, and of a version that is not known, is
    /// not supported.
    pub fn decode(bytes: &[u8], base: u64) -> Result<Self, Error> {
        let fail =
            |kind, field, at: u64, value: u64, why: &'static str| Err(Error::new(kind, field, base + at, value, why));
        if bytes.len() != HEADER_BYTES || !bytes.starts_with(b"head") || !is_whole(bytes, 4) {
            return fail(ErrorKind::Invalid, "Checksum", 4, le32(bytes, 4).into(), "the header is not whole");
        }
        let (log_version, version) = (le16(bytes, 64), le16(bytes, 66));
        if version != 1 {
            return fail(ErrorKind::Unsupported, "Version", 66, version.into(), "only version 1 is known");
        }
        let log_id = Guid::at(bytes, 48);
        if log_version != 0 && !log_id.is_zero() {
            return fail(ErrorKind::Unsupported, "LogVersion", 64, log_version.into(), "only version 0 is known");
        }
        let (len, at) = (u64::from(le32(bytes, 68)), le64(bytes, 72));
        if !len.is_multiple_of(MIB) || !at.is_multiple_of(MIB) || at > i64::MAX as u64 / 2 {
            return fail(ErrorKind::Invalid, "LogOffset", 72, at, "no place for a log");
        }
        Ok(Self { sequence: le64(bytes, 8), data_write: Guid::at(bytes, 32), log_id, log: HostOffset(at).range(len) })
    }
}

/// The regions that must be there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Regions {
    /// The BAT's.
    pub bat: HostRange,
    /// The metadata's.
    pub metadata: HostRange,
}

impl Regions {
    /// From a table's bytes, which lie at `base`.
    pub fn decode(bytes: &[u8], base: u64) -> Result<Self, Error> {
        let fail = |kind, field, at: usize, value: u64, why: &'static str| {
            Err(Error::new(kind, field, base + at as u64, value, why))
        };
        if bytes.len() != REGIONS_BYTES || !bytes.starts_with(b"regi") || !is_whole(bytes, 4) {
            return fail(ErrorKind::Invalid, "Checksum", 4, le32(bytes, 4).into(), "the table of regions is not whole");
        }
        let count = le32(bytes, 8);
        if count > REGIONS_MOST {
            return fail(ErrorKind::Invalid, "EntryCount", 8, count.into(), "a table has 2047 entries at most");
        }
        let (mut bat, mut metadata) = (None, None);
        for entry in (16..).step_by(32).take(count as usize) {
            let id = Guid::at(bytes, entry);
            let (at, len, required) = (le64(bytes, entry + 16), le32(bytes, entry + 24), le32(bytes, entry + 28) & 1);
            let slot = match id {
                BAT => &mut bat,
                METADATA => &mut metadata,
                _ if required == 0 => continue,
                _ => {
                    let why = "a region of a kind that must be known is not";
                    return fail(ErrorKind::Unsupported, "Required", entry + 28, 1, why);
                }
            };
            if at < MIB || !at.is_multiple_of(MIB) || at > i64::MAX as u64 / 2 || len == 0 {
                return fail(ErrorKind::Invalid, "FileOffset", entry + 16, at, "no place for a region");
            }
            if slot.replace(HostOffset(at).range(len.into())).is_some() {
                return fail(ErrorKind::Invalid, "Guid", entry, 0, "the region is there twice");
            }
        }
        match (bat, metadata) {
            (Some(bat), Some(metadata)) => Ok(Self { bat, metadata }),
            _ => {
                fail(ErrorKind::Invalid, "EntryCount", 8, count.into(), "the BAT's or the metadata's region is missing")
            }
        }
    }
}
