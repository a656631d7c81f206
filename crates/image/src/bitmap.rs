//! Persistent bitmaps: which parts of a disk were written since somebody last copied it.

use crate::{Error, ErrorKind};
use layout::{GuestOffset, GuestRange};
use std::collections::BTreeMap;

/// One of an image's bitmaps.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Bitmap {
    /// Its name, unique in the image.
    pub name: String,
    /// Bytes that one bit stands for.
    pub granularity: u64,
    /// It records what is written.
    pub enabled: bool,
    /// It was in use when the image was last written to by somebody who did not keep it: what it says is not to be relied upon.
    pub in_use: bool,
}

/// What is to be done. Nothing else is in flight.
#[derive(Clone, Debug)]
pub enum BitmapAction {
    /// Make one of this name whose bits stand for so many bytes each; it records.
    Add(String, u64),
    /// Forget this one.
    Remove(String),
    /// Nothing was written, says this one.
    Clear(String),
    /// This one records from now on.
    Enable(String),
    /// This one does not record any more.
    Disable(String),
    /// What these bits say was written, this one says, too.
    Merge(String, Bits),
}

impl BitmapAction {
    /// Which bitmap.
    pub fn name(&self) -> &str {
        match self {
            Self::Add(name, _)
            | Self::Remove(name)
            | Self::Clear(name)
            | Self::Enable(name)
            | Self::Disable(name)
            | Self::Merge(name, _) => name,
        }
    }
}

/// What is said of a bitmap that is not there.
pub(crate) fn not_found(image: &str, name: &str) -> Error {
    Error::new(ErrorKind::InvalidArgument, image, None, format!("Dirty bitmap '{name}' not found"))
}

/// Bits of one chunk, in memory only where one of them is set.
const CHUNK: u64 = 1 << 15;

type Chunk = Box<[u64; CHUNK as usize / 64]>;

/// What a bitmap says. Memory follows the bits that are set.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Bits {
    size: u64,
    shift: u8,
    chunks: BTreeMap<u64, Chunk>,
}

impl Bits {
    /// None set, of a disk of `size` bytes; one stands for `1 << granularity_bits`.
    pub fn new(size: u64, granularity_bits: u8) -> Self {
        Self { size, shift: granularity_bits.min(62), chunks: BTreeMap::new() }
    }

    /// Bytes of the disk.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// How many bits there are.
    fn len(&self) -> u64 {
        self.size.div_ceil(1 << self.shift)
    }

    /// Sets the bits that stand for any byte of `range`.
    pub fn set(&mut self, range: GuestRange) {
        let end = range.end().get().min(self.size);
        if range.start().get() < end {
            self.fill(range.start().get() >> self.shift, end.div_ceil(1 << self.shift));
        }
    }

    /// Sets the bits from `from` up to the one in front of `to`.
    fn fill(&mut self, from: u64, to: u64) {
        let to = to.min(self.len());
        let mut at = from;
        while at < to {
            let chunk = self.chunk(at / CHUNK);
            let end = to.min((at / 64 + 1) * 64);
            let ones = u64::MAX >> (64 - (end - at));
            chunk[(at % CHUNK / 64) as usize] |= ones << (at % 64);
            at = end;
        }
    }

    fn chunk(&mut self, number: u64) -> &mut Chunk {
        self.chunks.entry(number).or_insert_with(|| Box::new([0; CHUNK as usize / 64]))
    }

    /// Sets what is set in `bytes`, whose first bit is number `first` (a multiple of 64), the lowest of the first byte.
    pub fn load(&mut self, first: u64, bytes: &[u8]) {
        let len = self.len();
        for (number, word) in bytes.as_chunks::<8>().0.iter().enumerate() {
            let (at, mut word) = (first + number as u64 * 64, u64::from_le_bytes(*word));
            if at >= len {
                break;
            }
            if len - at < 64 {
                word &= u64::MAX >> (64 - (len - at));
            }
            if word != 0 {
                self.chunk(at / CHUNK)[(at % CHUNK / 64) as usize] |= word;
            }
        }
    }

    /// Sets `count` bits from number `first` on.
    pub fn load_ones(&mut self, first: u64, count: u64) {
        self.fill(first, first.saturating_add(count));
    }

    /// `len` bytes of bits from number `first` on (a multiple of 64); `None` where none is set.
    pub fn store(&self, first: u64, len: u64) -> Option<Vec<u8>> {
        let end = first + len * 8;
        let mut bytes = None;
        for (number, chunk) in self.chunks.range(first / CHUNK..end.div_ceil(CHUNK)) {
            for (index, word) in chunk.iter().enumerate().filter(|(_, word)| **word != 0) {
                let at = number * CHUNK + index as u64 * 64;
                if (first..end).contains(&at) {
                    let bytes = bytes.get_or_insert_with(|| vec![0; len as usize]);
                    bytes[((at - first) / 8) as usize..][..8].copy_from_slice(&word.to_le_bytes());
                }
            }
        }
        bytes
    }

    /// Sets what is set in `other`, which may have another granularity and be of a disk of another size.
    pub fn merge(&mut self, other: &Self) {
        other.for_each_run(|run| self.set(run));
    }

    /// The same for a disk of another size: what is behind its end is gone, what is new is not set.
    #[must_use]
    pub fn resized(&self, size: u64) -> Self {
        let mut new = Self::new(size, self.shift);
        for (number, chunk) in &self.chunks {
            let bytes: Vec<u8> = chunk.iter().flat_map(|word| word.to_le_bytes()).collect();
            new.load(number * CHUNK, &bytes);
        }
        new
    }

    /// Calls `each` for the parts of the disk whose bits are set, from the first on.
    pub fn for_each_run(&self, mut each: impl FnMut(GuestRange)) {
        let mut run: Option<(u64, u64)> = None;
        for (number, chunk) in &self.chunks {
            for (index, word) in chunk.iter().enumerate() {
                let (base, mut word) = (number * CHUNK + index as u64 * 64, *word);
                while word != 0 {
                    let skip = u64::from(word.trailing_zeros());
                    let len = u64::from((word >> skip).trailing_ones());
                    let (start, end) = (base + skip, base + skip + len);
                    match &mut run {
                        Some((_, last)) if *last == start => *last = end,
                        run => {
                            if let Some(run) = run.replace((start, end)) {
                                each(self.range(run));
                            }
                        }
                    }
                    word &= if skip + len == 64 { 0 } else { u64::MAX << (skip + len) };
                }
            }
        }
        if let Some(run) = run {
            each(self.range(run));
        }
    }

    fn range(&self, (start, end): (u64, u64)) -> GuestRange {
        let end = GuestOffset((end << self.shift).min(self.size));
        GuestRange::between(GuestOffset(start << self.shift), end)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn runs(bits: &Bits) -> Vec<(u64, u64)> {
        let mut runs = Vec::new();
        bits.for_each_run(|run| runs.push((run.start().get(), run.len())));
        runs
    }

    fn range(start: u64, len: u64) -> GuestRange {
        GuestRange::new(GuestOffset(start), len)
    }

    #[test]
    fn what_is_set_is_found_again() {
        let mut bits = Bits::new(100_000_000, 9);
        for (start, len) in [(0, 1), (511, 2), (4096, 512 * 200), (50_000_000, 512), (99_999_999, 1)] {
            bits.set(range(start, len));
        }
        let expected = [(0, 1024), (4096, 512 * 200), (49_999_872, 1024), (99_999_744, 256)];
        assert_eq!(runs(&bits), expected);
        let mut again = Bits::new(100_000_000, 9);
        for first in (0..195_313_u64).step_by(512) {
            if let Some(bytes) = bits.store(first, 64) {
                again.load(first, &bytes);
            }
        }
        assert_eq!(again, bits);
        assert_eq!(bits.store(4096 * 8, 512), None);
    }

    #[test]
    fn granularities_are_converted_outward() {
        let mut fine = Bits::new(10 << 20, 12);
        fine.set(range(70_000, 1));
        let mut coarse = Bits::new(10 << 20, 16);
        coarse.merge(&fine);
        assert_eq!(runs(&coarse), [(65536, 65536)]);
        let mut back = Bits::new(100 << 10, 12);
        back.merge(&coarse);
        assert_eq!(runs(&back), [(65536, (100 << 10) - 65536)]);
    }

    #[test]
    fn bits_past_the_end_are_none() {
        let mut bits = Bits::new(130 << 9, 9);
        bits.load(0, &[0xff; 64]);
        bits.load_ones(0, u64::MAX);
        bits.set(range(0, u64::MAX));
        assert_eq!(runs(&bits), [(0, 130 << 9)]);
        assert_eq!(runs(&bits.resized(64 << 9)), [(0, 64 << 9)]);
        assert_eq!(runs(&bits.resized(1 << 20)), [(0, 130 << 9)]);
    }
}
