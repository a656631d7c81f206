//! The log: a ring of entries, each with what some sectors of the file are to hold.
//!
//! An entry is a header with descriptors behind it, in sectors of 4 KiB, then a sector of data for each descriptor that needs one. The
//! entries that count follow each other without a gap, their numbers growing by one, from where the newest says that they begin (its
//! tail) to itself.
//!
//! **Invariants.** What an entry takes is checked sector by sector before it is summed up: sectors that begin entries cannot lie in
//! other ones, so looking through a whole log takes time in proportion to its length, whatever it holds.

use super::{Guid, is_whole};
use crate::HostOffset;
use crate::number::{le32, le64};

/// Bytes of a sector of the log, and of what a descriptor changes.
pub const SECTOR: usize = 4096;

/// Bytes of an entry's header; the first descriptor follows.
const HEADER: usize = 64;

/// Bytes of a descriptor.
const DESCRIPTOR: usize = 32;

/// An entry that is whole.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    /// Where it is in the log.
    pub at: usize,
    /// Its bytes, in whole sectors.
    pub len: usize,
    /// Where the sequence begins that it is the newest of.
    pub tail: usize,
    /// Its number.
    pub sequence: u64,
    /// The file was this long, durably, when it was written.
    pub flushed_file: u64,
    /// The file must be this long at least once it is carried out.
    pub last_file: u64,
    descriptors: usize,
}

/// What is to be done.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Change {
    /// A sector is to hold this.
    Write(HostOffset, Box<[u8; SECTOR]>),
    /// A stretch is to hold zeros.
    Zero(HostOffset, u64),
}

/// A whole log, in memory.
#[derive(Debug)]
pub struct Log<'a> {
    bytes: &'a [u8],
    id: Guid,
}

impl<'a> Log<'a> {
    /// Of whole sectors; entries with another `id` do not count.
    pub fn new(bytes: &'a [u8], id: Guid) -> Self {
        Self { bytes: &bytes[..bytes.len() / SECTOR * SECTOR], id }
    }

    /// The entries that are to be carried out, oldest first; none if there is no sequence that is whole.
    pub fn active(&self) -> Vec<Entry> {
        let entries: Vec<Entry> = (0..self.bytes.len()).step_by(SECTOR).filter_map(|at| self.entry(at)).collect();
        let by_place = |at: usize| entries.binary_search_by_key(&at, |entry| entry.at).ok();
        // Chains of entries that follow each other: for each the one that its chain begins with. Numbers grow along a chain.
        let mut begins: Vec<usize> = (0..entries.len()).collect();
        let mut order = begins.clone();
        order.sort_by_key(|n| entries[*n].sequence);
        for n in &order {
            let entry = &entries[*n];
            let next = by_place((entry.at + entry.len) % self.bytes.len());
            if let Some(next) = next.filter(|next| Some(entries[*next].sequence) == entry.sequence.checked_add(1)) {
                begins[next] = begins[*n];
            }
        }
        let is_head = |head: &usize| {
            let tail = by_place(entries[*head].tail)?;
            let is_behind = entries[tail].sequence <= entries[*head].sequence;
            (begins[tail] == begins[*head] && is_behind).then_some((tail, *head))
        };
        let Some((tail, head)) = order.iter().rev().find_map(is_head) else { return Vec::new() };
        let numbers = entries[tail].sequence..=entries[head].sequence;
        let chain = order.iter().filter(|n| begins[**n] == begins[head] && numbers.contains(&entries[**n].sequence));
        chain.map(|n| entries[*n].clone()).collect()
    }

    /// A sector of the log, which is a ring.
    fn sector(&self, at: usize) -> &'a [u8] {
        let at = at % self.bytes.len();
        &self.bytes[at..at + SECTOR]
    }

    /// The entry at a sector, if there is one that is whole.
    fn entry(&self, at: usize) -> Option<Entry> {
        let head = self.sector(at);
        if !head.starts_with(b"loge") || Guid::at(head, 32) != self.id {
            return None;
        }
        let (len, tail) = (le32(head, 8) as usize, le32(head, 12) as usize);
        let (sequence, descriptors) = (le64(head, 16), le32(head, 24) as usize);
        let in_log = |at: usize| at.is_multiple_of(SECTOR) && at <= self.bytes.len();
        if len == 0 || !in_log(len) || !in_log(tail) || tail == self.bytes.len() || sequence == 0 {
            return None;
        }
        let entry =
            Entry { at, len, tail, sequence, flushed_file: le64(head, 48), last_file: le64(head, 56), descriptors };
        let front = descriptors.checked_mul(DESCRIPTOR)?.checked_add(HEADER)?.next_multiple_of(SECTOR);
        if front > len {
            return None;
        }
        let mut data = 0;
        for n in 0..descriptors {
            let descriptor = self.descriptor(&entry, n);
            if le64(descriptor, 24) != sequence {
                return None;
            }
            match &descriptor[..4] {
                b"desc" => data += 1,
                b"zero" => {}
                _ => return None,
            }
        }
        if front + data * SECTOR != len {
            return None;
        }
        for n in 0..data {
            let sector = self.sector(at + front + n * SECTOR);
            let number = u64::from(le32(sector, 4)) << 32 | u64::from(le32(sector, SECTOR - 4));
            if !sector.starts_with(b"data") || number != sequence {
                return None;
            }
        }
        is_whole(&self.ring(at, len), 4).then_some(entry)
    }

    /// The bytes of a stretch of the ring.
    fn ring(&self, at: usize, len: usize) -> Vec<u8> {
        let first = len.min(self.bytes.len() - at);
        [&self.bytes[at..at + first], &self.bytes[..len - first]].concat()
    }

    /// A descriptor of an entry, whose length was checked.
    fn descriptor(&self, entry: &Entry, number: usize) -> &'a [u8] {
        let at = HEADER + number * DESCRIPTOR;
        &self.sector(entry.at + at / SECTOR * SECTOR)[at % SECTOR..][..DESCRIPTOR]
    }

    /// What an entry wants done, in its order; `None` where that makes no sense.
    pub fn changes(&self, entry: &Entry) -> Option<Vec<Change>> {
        let front = (HEADER + entry.descriptors * DESCRIPTOR).next_multiple_of(SECTOR);
        let mut data = entry.at + front;
        let mut changes = Vec::with_capacity(entry.descriptors);
        for n in 0..entry.descriptors {
            let descriptor = self.descriptor(entry, n);
            let place = le64(descriptor, 16);
            let fits = |len: u64| {
                place.is_multiple_of(SECTOR as u64)
                    && place.checked_add(len).is_some_and(|end| i64::try_from(end).is_ok())
            };
            if descriptor.starts_with(b"zero") {
                let len = le64(descriptor, 8);
                if !fits(len) || !len.is_multiple_of(SECTOR as u64) {
                    return None;
                }
                changes.push(Change::Zero(HostOffset(place), len));
                continue;
            }
            if !fits(SECTOR as u64) {
                return None;
            }
            let mut sector = Box::new([0; SECTOR]);
            sector.copy_from_slice(self.sector(data));
            // Where the sector of the log has its marks, the descriptor has the bytes.
            sector[..8].copy_from_slice(&descriptor[8..16]);
            sector[SECTOR - 4..].copy_from_slice(&descriptor[4..8]);
            changes.push(Change::Write(HostOffset(place), sector));
            data += SECTOR;
        }
        Some(changes)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::vhdx::crc32c;
    use proptest::prelude::*;

    const ID: Guid = Guid([7; 16]);

    /// An entry that writes a sector of `fill` at `fill` MiB and zeros a stretch behind it.
    fn entry(sequence: u64, tail: usize, fill: u8) -> Vec<u8> {
        let mut bytes = vec![0; 2 * SECTOR];
        bytes[..4].copy_from_slice(b"loge");
        bytes[8..12].copy_from_slice(&(2 * SECTOR as u32).to_le_bytes());
        bytes[12..16].copy_from_slice(&(tail as u32).to_le_bytes());
        bytes[16..24].copy_from_slice(&sequence.to_le_bytes());
        bytes[24] = 2;
        bytes[32..48].copy_from_slice(&ID.0);
        bytes[48..56].copy_from_slice(&(5_u64 << 20).to_le_bytes());
        bytes[56..64].copy_from_slice(&(9_u64 << 20).to_le_bytes());
        bytes[64..68].copy_from_slice(b"desc");
        bytes[68..80].fill(fill);
        bytes[80..88].copy_from_slice(&(u64::from(fill) << 20).to_le_bytes());
        bytes[88..96].copy_from_slice(&sequence.to_le_bytes());
        bytes[96..100].copy_from_slice(b"zero");
        bytes[104..112].copy_from_slice(&8192_u64.to_le_bytes());
        bytes[112..120].copy_from_slice(&((u64::from(fill) << 20) + 4096).to_le_bytes());
        bytes[120..128].copy_from_slice(&sequence.to_le_bytes());
        bytes[SECTOR..].fill(fill);
        bytes[SECTOR..SECTOR + 4].copy_from_slice(b"data");
        bytes[SECTOR + 4..SECTOR + 8].copy_from_slice(&((sequence >> 32) as u32).to_le_bytes());
        bytes[2 * SECTOR - 4..].copy_from_slice(&(sequence as u32).to_le_bytes());
        let crc = crc32c(&bytes);
        bytes[4..8].copy_from_slice(&crc.to_le_bytes());
        bytes
    }

    /// A log of 16 sectors with entries from these sectors on, round its end.
    fn log(entries: &[(usize, Vec<u8>)]) -> Vec<u8> {
        let mut log = vec![0; 16 * SECTOR];
        for (sector, entry) in entries {
            for (n, part) in entry.chunks(SECTOR).enumerate() {
                log[(sector + n) % 16 * SECTOR..][..SECTOR].copy_from_slice(part);
            }
        }
        log
    }

    fn numbers(bytes: &[u8]) -> Vec<u64> {
        Log::new(bytes, ID).active().iter().map(|entry| entry.sequence).collect()
    }

    #[test]
    fn the_newest_sequence_that_is_whole_counts() {
        let at = |sector: usize| sector * SECTOR;
        let sound = [(2, entry(7, at(2), 1)), (4, entry(8, at(2), 2)), (6, entry(9, at(4), 3))];
        assert_eq!(numbers(&log(&sound)), [8, 9], "the newest says where it begins");
        let round = [
            (12, entry(1 << 32, at(12), 1)),
            (14, entry((1 << 32) + 1, at(12), 2)),
            (0, entry((1 << 32) + 2, at(12), 3)),
        ];
        assert_eq!(numbers(&log(&round)).len(), 3, "round the end");
        let split = [(15, entry(5, at(15), 1)), (1, entry(6, at(15), 2))];
        assert_eq!(numbers(&log(&split)), [5, 6], "an entry round the end");
        let mut torn = log(&sound);
        torn[at(7) + 100] ^= 1;
        assert_eq!(numbers(&torn), [7, 8], "the newest is not whole");
        let gap = [(2, entry(7, at(2), 1)), (6, entry(8, at(2), 2))];
        assert_eq!(numbers(&log(&gap)), [7], "a head whose tail is elsewhere counts for nothing");
        assert_eq!(numbers(&log(&[(2, entry(7, at(9), 1))])), [0; 0]);
        assert_eq!(numbers(&log(&[])), [0; 0]);
        assert_eq!(Log::new(&log(&sound), Guid([8; 16])).active(), []);
        assert_eq!(Log::new(&[], ID).active(), []);
    }

    #[test]
    fn changes_are_whole_sectors_and_stretches_of_zeros() {
        let bytes = log(&[(15, entry(5, 15 * SECTOR, 3))]);
        let log = Log::new(&bytes, ID);
        let entry = log.active().remove(0);
        assert_eq!((entry.flushed_file, entry.last_file), (5 << 20, 9 << 20));
        let changes = log.changes(&entry).unwrap();
        assert_eq!(changes[0], Change::Write(HostOffset(3 << 20), Box::new([3; SECTOR])));
        assert_eq!(changes[1], Change::Zero(HostOffset((3 << 20) + 4096), 8192));
    }

    proptest! {
        /// Any bytes may be damaged: there is an answer, and what counts is of whole entries.
        #[test]
        fn damage_is_answered(damage in prop::collection::vec((0..16 * SECTOR, any::<u8>()), 1..6)) {
            let sound = log(&[(2, entry(7, 2 * SECTOR, 1)), (4, entry(8, 2 * SECTOR, 2))]);
            let mut bytes = sound;
            for (at, value) in damage {
                bytes[at] = value;
            }
            let log = Log::new(&bytes, ID);
            for entry in log.active() {
                prop_assert!(log.changes(&entry).is_some_and(|changes| changes.len() == 2));
            }
        }
    }
}
