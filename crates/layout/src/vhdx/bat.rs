//! The BAT: an entry for each block of the disk, and after those of a chunk (as many blocks as one bitmap covers) one for the chunk's
//! bitmap.

use super::{MIB, Metadata};
use crate::HostOffset;

/// Sectors that one bitmap covers: a bit each of its 1 MiB.
const BITMAP_SECTORS: u64 = 1 << 23;

/// How the BAT is indexed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Bat {
    /// Blocks of a chunk.
    ratio: u64,
    /// Blocks of the disk.
    blocks: u64,
    has_parent: bool,
}

/// What an entry says of its block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Block {
    /// Nothing: what lies below shows through.
    NotPresent,
    /// It is zeros, or nobody knows what.
    Zero,
    /// All of it is here.
    Present(HostOffset),
    /// Here are those sectors that the chunk's bitmap says, the others below.
    Partly(HostOffset),
}

/// What an entry says of its chunk's bitmap.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Bitmap {
    /// There is none.
    NotPresent,
    /// It is here.
    Present(HostOffset),
}

/// Where an entry leads.
fn place(entry: u64) -> HostOffset {
    HostOffset(entry / MIB * MIB)
}

impl Bat {
    /// Of a disk.
    pub fn of(metadata: &Metadata) -> Self {
        Self {
            ratio: BITMAP_SECTORS * metadata.sector / metadata.block,
            blocks: metadata.size.div_ceil(metadata.block),
            has_parent: metadata.parent.is_some(),
        }
    }

    /// Entries in all.
    pub fn entries(&self) -> u64 {
        if self.has_parent {
            self.blocks.div_ceil(self.ratio) * (self.ratio + 1)
        } else {
            self.blocks + self.blocks.saturating_sub(1) / self.ratio
        }
    }

    /// The index of a block's entry.
    pub fn index(&self, block: u64) -> u64 {
        block + block / self.ratio
    }

    /// The index of the entry for the bitmap of the chunk that a block is in.
    pub fn bitmap_index(&self, block: u64) -> u64 {
        (block / self.ratio + 1) * (self.ratio + 1) - 1
    }

    /// What a block's entry says; its state, where that makes no sense.
    pub fn block(&self, entry: [u8; 8]) -> Result<Block, u8> {
        let entry = u64::from_le_bytes(entry);
        match entry & 7 {
            0 => Ok(Block::NotPresent),
            1..=3 => Ok(Block::Zero),
            6 if entry >= MIB => Ok(Block::Present(place(entry))),
            7 if entry >= MIB && self.has_parent => Ok(Block::Partly(place(entry))),
            state => Err(state as u8),
        }
    }

    /// What a bitmap's entry says; its state, where that makes no sense.
    pub fn bitmap(&self, entry: [u8; 8]) -> Result<Bitmap, u8> {
        let entry = u64::from_le_bytes(entry);
        match entry & 7 {
            0 => Ok(Bitmap::NotPresent),
            6 if entry >= MIB => Ok(Bitmap::Present(place(entry))),
            state => Err(state as u8),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bitmaps_come_after_their_chunk() {
        // 32 MiB a block, 512 bytes a sector: 128 blocks a chunk.
        let metadata = Metadata { size: 9 << 30, block: 32 << 20, sector: 512, parent: None };
        let bat = Bat::of(&metadata);
        assert_eq!((bat.blocks, bat.ratio), (288, 128));
        assert_eq!([bat.index(0), bat.index(127), bat.index(128), bat.index(287)], [0, 127, 129, 289]);
        assert_eq!([bat.bitmap_index(0), bat.bitmap_index(127), bat.bitmap_index(128)], [128, 128, 257]);
        assert_eq!(bat.entries(), 290);
        let bat = Bat::of(&Metadata { parent: Some(super::super::Parent::default()), ..metadata });
        assert_eq!(bat.entries(), 3 * 129);
        assert_eq!(Bat::of(&Metadata { size: 0, block: 1 << 20, sector: 512, parent: None }).entries(), 0);
    }

    #[test]
    fn states_lead_where_they_lead() {
        let metadata = Metadata { size: 9 << 30, block: 32 << 20, sector: 512, parent: None };
        let plain = Bat::of(&metadata);
        let over = Bat::of(&Metadata { parent: Some(super::super::Parent::default()), ..metadata });
        let at = |state: u64| (7 << 20 | state).to_le_bytes();
        assert_eq!((0..4).map(|n| plain.block(at(n))).filter(|b| *b == Ok(Block::Zero)).count(), 3);
        assert_eq!(plain.block(at(6)), Ok(Block::Present(HostOffset(7 << 20))));
        assert_eq!((plain.block(at(7)), over.block(at(7))), (Err(7), Ok(Block::Partly(HostOffset(7 << 20)))));
        assert_eq!((plain.block(at(5)), plain.block(6_u64.to_le_bytes())), (Err(5), Err(6)));
        assert_eq!((over.bitmap(at(6)), over.bitmap(at(7))), (Ok(Bitmap::Present(HostOffset(7 << 20))), Err(7)));
    }
}
