//! Which values each sector may have.
//!
//! It knows what the last answered flush covered, and whatever was sent since: all of that is legal after a server was killed.

use std::collections::BTreeSet;

use crate::{Result, error};

pub(super) const SECTOR: u64 = 512;
pub(super) const SIZE: u64 = 6 << 20;

/// What a sector may hold: the master's bytes, zeroes, or a stamp repeated.
pub(super) const MASTER: u64 = 0;
pub(super) const ZEROES: u64 = 1;

/// Which values each sector may have.
pub(super) struct Oracle {
    master: Vec<u8>,
    legal: Vec<BTreeSet<u64>>,
    /// The value the last completed request left, sector by sector.
    last: Vec<u64>,
    pub(super) next_stamp: u64,
}

impl Oracle {
    pub(super) fn new(master: Vec<u8>) -> Self {
        let sectors = (SIZE / SECTOR) as usize;
        Oracle { master, legal: vec![BTreeSet::from([MASTER]); sectors], last: vec![MASTER; sectors], next_stamp: 2 }
    }

    pub(super) fn sectors(at: u64, length: u64) -> std::ops::Range<usize> {
        (at / SECTOR) as usize..((at + length) / SECTOR) as usize
    }

    /// A request was sent: from now on its value is legal beside the earlier ones.
    pub(super) fn sent(&mut self, at: u64, length: u64, value: u64) {
        for sector in Self::sectors(at, length) {
            self.legal[sector].insert(value);
        }
    }

    /// A request was answered; a later one overwrites it, and a flush makes it the only one.
    pub(super) fn answered(&mut self, at: u64, length: u64, value: u64) {
        for sector in Self::sectors(at, length) {
            self.last[sector] = value;
        }
    }

    /// A flush was answered while nothing else was in flight.
    pub(super) fn flushed(&mut self) {
        for (legal, last) in self.legal.iter_mut().zip(&self.last) {
            if legal.len() > 1 {
                *legal = BTreeSet::from([*last]);
            }
        }
    }

    /// Nothing was lost, whoever died, and nothing is in flight: every sector holds what was answered last.
    pub(super) fn nothing_lost(&mut self) {
        self.flushed();
    }

    fn bytes(&self, sector: usize, value: u64) -> Vec<u8> {
        let at = sector * SECTOR as usize;
        match value {
            MASTER => self.master[at..at + SECTOR as usize].to_vec(),
            ZEROES => vec![0; SECTOR as usize],
            stamp => stamp.to_le_bytes().repeat(SECTOR as usize / 8),
        }
    }

    /// A read while nothing is in flight for these sectors, or with it: what it brought is legal.
    pub(super) fn saw(&self, at: u64, data: &[u8]) -> Result {
        for (sector, found) in Self::sectors(at, data.len() as u64).zip(data.chunks(SECTOR as usize)) {
            if !self.legal[sector].iter().any(|value| self.bytes(sector, *value) == found) {
                return Err(error!("a read of sector {sector} brings what is not legal: {:?}", self.legal[sector]));
            }
        }
        Ok(())
    }

    /// Compares the whole disk; what was found is from now on the only legal value.
    pub(super) fn verify(&mut self, disk: &[u8]) -> Result {
        for (sector, found) in disk.chunks(SECTOR as usize).enumerate() {
            let value = self.legal[sector].iter().copied().find(|value| self.bytes(sector, *value) == found);
            let Some(value) = value else {
                let stamp = u64::from_le_bytes(found[..8].try_into()?);
                return Err(error!("sector {sector}: {stamp:#x}…, legal are {:?}", self.legal[sector]));
            };
            self.legal[sector] = BTreeSet::from([value]);
            self.last[sector] = value;
        }
        Ok(())
    }
}
