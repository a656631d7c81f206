//! The table of internal snapshots: entries of different lengths, one behind the other, each padded to 8 bytes.

use super::{Error, ErrorKind, Header, OFFSET};
use crate::{HostOffset, HostRange};

/// Largest table, bytes; as QEMU has it.
pub const MAX_TABLE_BYTES: u64 = 64 << 20;

/// Bytes of an entry in front of its extra data.
const FIXED_BYTES: usize = 40;

/// Most extra data, bytes; as QEMU has it.
const MAX_EXTRA: usize = 1024;

/// One internal snapshot.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Snapshot {
    /// Its L1 table.
    pub l1_table: HostOffset,
    /// Entries of its L1 table.
    pub l1_entries: u32,
    /// Its id, a string of digits as a rule.
    pub id: String,
    /// Its name.
    pub name: String,
    /// When it was taken: seconds since 1970, and nanoseconds.
    pub date: (u32, u32),
    /// How long the guest had run, nanoseconds.
    pub vm_clock: u64,
    /// Bytes of the guest's state that are kept behind the disk's end.
    pub vm_state_size: u64,
    /// Bytes of the disk at that time; `None` in entries of old programs: as large as now.
    pub disk_size: Option<u64>,
    /// Instructions counted, if they were.
    pub icount: Option<u64>,
    /// Extra data behind what is known.
    pub unknown_extra: Vec<u8>,
}

fn number<const N: usize>(bytes: &[u8], at: usize) -> Option<[u8; N]> {
    bytes.get(at..at + N)?.try_into().ok()
}

impl Snapshot {
    /// The first of `bytes`, which lie at `base`, and its length with padding.
    pub fn decode(bytes: &[u8], base: HostOffset) -> Result<(Self, usize), Error> {
        let fail = |field, at: usize, value: u64, why: &'static str| {
            Err(Error::new(ErrorKind::Invalid, field, base.get() + at as u64, value, why))
        };
        if bytes.len() < FIXED_BYTES {
            return fail("snapshot", 0, bytes.len() as u64, "the table of snapshots ends inside of an entry");
        }
        let u16_at = |at| number(bytes, at).map_or(0, u16::from_be_bytes);
        let u32_at = |at| number(bytes, at).map_or(0, u32::from_be_bytes);
        let u64_at = |at| number(bytes, at).map_or(0, u64::from_be_bytes);
        let (id_len, name_len, extra_len) = (u16_at(12) as usize, u16_at(14) as usize, u32_at(36) as usize);
        if extra_len > MAX_EXTRA {
            return fail("extra_data_size", 36, extra_len as u64, "more extra data than 1024 bytes");
        }
        let (id_at, name_at) = (FIXED_BYTES + extra_len, FIXED_BYTES + extra_len + id_len);
        let end = name_at + name_len;
        let (Some(id), Some(name)) = (bytes.get(id_at..name_at), bytes.get(name_at..end)) else {
            return fail("snapshot", 0, end as u64, "the table of snapshots ends inside of an entry");
        };
        let snapshot = Self {
            l1_table: HostOffset(u64_at(0)),
            l1_entries: u32_at(8),
            id: String::from_utf8_lossy(id).into_owned(),
            name: String::from_utf8_lossy(name).into_owned(),
            date: (u32_at(16), u32_at(20)),
            vm_clock: u64_at(24),
            vm_state_size: if extra_len >= 8 { u64_at(40) } else { u32_at(32).into() },
            disk_size: (extra_len >= 16).then(|| u64_at(48)),
            icount: (extra_len >= 24).then(|| u64_at(56)),
            unknown_extra: bytes.get(FIXED_BYTES + 24..id_at).unwrap_or_default().to_vec(),
        };
        Ok((snapshot, end.next_multiple_of(8)))
    }

    /// Its bytes, padded.
    pub fn encode(&self) -> Vec<u8> {
        let mut extra = self.vm_state_size.to_be_bytes().to_vec();
        if let Some(size) = self.disk_size {
            extra.extend(size.to_be_bytes());
            if let Some(icount) = self.icount {
                extra.extend(icount.to_be_bytes());
                extra.extend(&self.unknown_extra);
            }
        }
        let mut bytes = Vec::with_capacity(FIXED_BYTES + extra.len() + self.id.len() + self.name.len() + 8);
        bytes.extend(self.l1_table.get().to_be_bytes());
        bytes.extend(self.l1_entries.to_be_bytes());
        bytes.extend((self.id.len() as u16).to_be_bytes());
        bytes.extend((self.name.len() as u16).to_be_bytes());
        bytes.extend(self.date.0.to_be_bytes());
        bytes.extend(self.date.1.to_be_bytes());
        bytes.extend(self.vm_clock.to_be_bytes());
        bytes.extend(u32::try_from(self.vm_state_size).unwrap_or(0).to_be_bytes());
        bytes.extend((extra.len() as u32).to_be_bytes());
        bytes.extend(extra);
        bytes.extend(self.id.as_bytes());
        bytes.extend(self.name.as_bytes());
        bytes.resize(bytes.len().next_multiple_of(8), 0);
        bytes
    }

    /// Where its L1 table lies; `None` where that makes no sense.
    pub fn l1_range(&self, header: &Header) -> Option<HostRange> {
        let bytes = u64::from(self.l1_entries) * 8;
        let sound = bytes <= super::header::MAX_L1_BYTES
            && self.l1_table.is_aligned(header.cluster_size())
            && self.l1_table.get() & !OFFSET == 0
            && (self.l1_table.get() != 0 || bytes == 0);
        sound.then(|| self.l1_table.range(bytes))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample() -> Snapshot {
        Snapshot {
            l1_table: HostOffset(0x40000),
            l1_entries: 2,
            id: "1".to_owned(),
            name: "before".to_owned(),
            date: (1_700_000_000, 5),
            vm_clock: 77,
            vm_state_size: 0,
            disk_size: Some(1 << 30),
            icount: Some(u64::MAX),
            unknown_extra: vec![1, 2, 3],
        }
    }

    #[test]
    fn what_is_written_is_read_again() {
        for snapshot in [
            sample(),
            Snapshot { disk_size: None, icount: None, unknown_extra: Vec::new(), ..sample() },
            Snapshot { name: String::new(), icount: None, unknown_extra: Vec::new(), ..sample() },
        ] {
            let mut bytes = snapshot.encode();
            let len = bytes.len();
            bytes.extend(sample().encode());
            assert_eq!(Snapshot::decode(&bytes, HostOffset::ZERO), Ok((snapshot, len)));
        }
    }

    #[test]
    fn half_an_entry_is_an_error() {
        let bytes = sample().encode();
        assert!((0..bytes.len() - 8).all(|len| Snapshot::decode(&bytes[..len], HostOffset::ZERO).is_err()));
        let mut bytes = bytes;
        bytes[36..40].copy_from_slice(&u32::MAX.to_be_bytes());
        assert!(Snapshot::decode(&bytes, HostOffset::ZERO).is_err());
    }
}
