//! Persistent bitmaps: the extension that leads to their directory, and the directory.

use super::{Error, ErrorKind, Header, OFFSET};
use crate::{HostOffset, HostRange};

/// Largest directory, bytes; as QEMU has it.
const MAX_DIRECTORY_BYTES: u64 = 65535 * 1024;

/// Largest table of one bitmap, entries; as QEMU has it.
const MAX_TABLE_ENTRIES: u32 = 0x0800_0000;

/// Most bytes of one bitmap's data; as QEMU has it.
pub const MAX_DATA_BYTES: u64 = 512 << 20;

/// Most bitmaps in one image; as QEMU has it.
pub const MAX_BITMAPS: usize = 65535;

/// Longest name, bytes; as QEMU has it.
pub const MAX_NAME: usize = 1023;

/// log2 of the bytes that one bit stands for; as QEMU has it.
pub const GRANULARITY_BITS: std::ops::RangeInclusive<u8> = 9..=31;

/// The only kind of bitmap there is: it tracks what was written.
pub const DIRTY_TRACKING: u8 = 1;

/// Bytes of a directory entry in front of its extra data.
const FIXED_BYTES: usize = 24;

/// A bitmap that was in use when the image was last written to: what it says is not to be relied upon.
pub const IN_USE: u32 = 1;

/// A bitmap that records what is written.
pub const AUTO: u32 = 2;

/// Where the directory is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Bitmaps {
    /// How many bitmaps there are.
    pub count: u32,
    /// Their directory.
    pub directory: HostRange,
}

impl Bitmaps {
    /// From the extension's data.
    pub fn decode(data: &[u8], header: &Header) -> Result<Self, Error> {
        let fail = |value, why: &'static str| Err(Error::new(ErrorKind::Invalid, "bitmaps extension", 0, value, why));
        let Some(data) = data.first_chunk::<24>() else {
            return fail(data.len() as u64, "not as long as it must be");
        };
        let u64_at = |at: usize| data[at..].first_chunk().map_or(0, |b| u64::from_be_bytes(*b));
        let count = data.first_chunk().map_or(0, |b| u32::from_be_bytes(*b));
        let (len, at) = (u64_at(8), HostOffset(u64_at(16)));
        if len > MAX_DIRECTORY_BYTES || len < u64::from(count) * FIXED_BYTES as u64 {
            return fail(len, "no length of a directory");
        }
        if !at.is_aligned(header.cluster_size()) || at.get() == 0 || at.get() & !OFFSET != 0 {
            return fail(at.get(), "no place for a directory");
        }
        Ok(Self { count, directory: at.range(len) })
    }

    /// The extension's data.
    pub fn encode(&self) -> Vec<u8> {
        let mut bytes = self.count.to_be_bytes().to_vec();
        bytes.extend(0_u32.to_be_bytes());
        bytes.extend(self.directory.len().to_be_bytes());
        bytes.extend(self.directory.start().get().to_be_bytes());
        bytes
    }
}

/// Where a cluster of a bitmap's data is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Part {
    /// Nowhere: all bits are 0.
    Zeros,
    /// Nowhere: all bits are 1.
    Ones,
    /// In this cluster.
    At(HostOffset),
}

impl Part {
    /// From an entry of a bitmap's table; `None` where it makes no sense.
    pub fn decode(raw: u64, header: &Header) -> Option<Self> {
        let at = HostOffset(raw & OFFSET);
        match (at.get(), raw & !OFFSET) {
            (0, 0) => Some(Self::Zeros),
            (0, 1) => Some(Self::Ones),
            (_, 0) if at.is_aligned(header.cluster_size()) => Some(Self::At(at)),
            _ => None,
        }
    }

    /// The entry.
    pub fn encode(self) -> u64 {
        match self {
            Self::Zeros => 0,
            Self::Ones => 1,
            Self::At(at) => at.get(),
        }
    }
}

/// The bytes of data that a bitmap has on a disk of `size` bytes.
pub fn data_bytes(size: u64, granularity_bits: u8) -> u64 {
    size.div_ceil(1 << granularity_bits).div_ceil(8)
}

/// The entries of its table; `None` where it would be larger than any may be.
pub fn table_entries(size: u64, granularity_bits: u8, header: &Header) -> Option<u32> {
    let bytes = data_bytes(size, granularity_bits).next_multiple_of(header.cluster_size());
    (bytes <= MAX_DATA_BYTES).then(|| (bytes >> header.cluster_bits) as u32)
}

/// One bitmap, as its directory entry has it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Bitmap {
    /// Its table.
    pub table: HostOffset,
    /// Entries of its table.
    pub table_entries: u32,
    /// [`IN_USE`], [`AUTO`], and what is not known.
    pub flags: u32,
    /// log2 of the bytes one bit stands for.
    pub granularity_bits: u8,
    /// Which kind it is: [`DIRTY_TRACKING`].
    pub kind: u8,
    /// Its name.
    pub name: String,
    /// What else the entry has.
    pub extra: Vec<u8>,
}

impl Bitmap {
    /// Where the flags are in an entry.
    pub const FLAGS_AT: usize = 12;

    /// The first of `bytes`, which lie at `base`, and its length with padding.
    pub fn decode(bytes: &[u8], base: HostOffset) -> Result<(Self, usize), Error> {
        let fail = |value: u64, why: &'static str| {
            Err(Error::new(ErrorKind::Invalid, "bitmap directory entry", base.get(), value, why))
        };
        let Some(fixed) = bytes.first_chunk::<FIXED_BYTES>() else {
            return fail(bytes.len() as u64, "the directory ends inside of an entry");
        };
        let u32_at = |at: usize| fixed[at..].first_chunk().map_or(0, |b| u32::from_be_bytes(*b));
        let name_len = usize::from(u16::from_be_bytes([fixed[18], fixed[19]]));
        let name_at = FIXED_BYTES + u32_at(20) as usize;
        let Some(name) = bytes.get(name_at..name_at + name_len) else {
            return fail(name_at as u64, "the directory ends inside of an entry");
        };
        let bitmap = Self {
            table: HostOffset(fixed.first_chunk().map_or(0, |b| u64::from_be_bytes(*b))),
            table_entries: u32_at(8),
            flags: u32_at(Self::FLAGS_AT),
            granularity_bits: fixed[17],
            kind: fixed[16],
            extra: bytes.get(FIXED_BYTES..name_at).unwrap_or_default().to_vec(),
            name: String::from_utf8_lossy(name).into_owned(),
        };
        if bitmap.table_entries > MAX_TABLE_ENTRIES {
            return fail(bitmap.table_entries.into(), "a table with more entries than any bitmap needs");
        }
        Ok((bitmap, (name_at + name_len).next_multiple_of(8)))
    }

    /// Its bytes, padded.
    pub fn encode(&self) -> Vec<u8> {
        let mut bytes = self.table.get().to_be_bytes().to_vec();
        bytes.extend(self.table_entries.to_be_bytes());
        bytes.extend(self.flags.to_be_bytes());
        bytes.extend([self.kind, self.granularity_bits]);
        bytes.extend((self.name.len() as u16).to_be_bytes());
        bytes.extend((self.extra.len() as u32).to_be_bytes());
        bytes.extend(&self.extra);
        bytes.extend(self.name.as_bytes());
        bytes.resize(bytes.len().next_multiple_of(8), 0);
        bytes
    }

    /// Where its table lies; `None` where that makes no sense.
    pub fn table_range(&self, header: &Header) -> Option<HostRange> {
        let sound = self.table.is_aligned(header.cluster_size())
            && self.table.get() & !OFFSET == 0
            && (self.table.get() != 0 || self.table_entries == 0);
        sound.then(|| self.table.range(u64::from(self.table_entries) * 8))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_entry_is_read_whole_or_not_at_all() {
        let mut bytes = Vec::new();
        bytes.extend(0x50000_u64.to_be_bytes());
        bytes.extend(1_u32.to_be_bytes());
        bytes.extend(AUTO.to_be_bytes());
        bytes.extend([1, 16, 0, 3]);
        bytes.extend(0_u32.to_be_bytes());
        bytes.extend(b"one\0\0\0\0\0");
        let (bitmap, len) = Bitmap::decode(&bytes, HostOffset::ZERO).unwrap();
        assert_eq!((bitmap.name.as_str(), bitmap.flags, bitmap.granularity_bits, len), ("one", AUTO, 16, 32));
        assert_eq!(bitmap.encode(), bytes);
        assert!((0..27).all(|len| Bitmap::decode(&bytes[..len], HostOffset::ZERO).is_err()));
        bytes[20..24].copy_from_slice(&u32::MAX.to_be_bytes());
        assert!(Bitmap::decode(&bytes, HostOffset::ZERO).is_err());
    }
}
