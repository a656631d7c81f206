//! Sparse bytes with a length, cheap to copy.
//!
//! **Invariant.** Bytes of a held page past the length are zero, and no page lies wholly past it, so that growing shows
//! zeros without looking.

use ring::Iov;
use std::collections::BTreeMap;
use std::fmt;
use std::rc::Rc;

/// What is held or not held as one.
const PAGE: usize = 4096;

/// Sparse bytes and a length. A clone shares all pages until one side writes to them.
#[derive(Clone, Default)]
pub struct Snapshot {
    size: u64,
    pages: BTreeMap<u64, Rc<[u8; PAGE]>>,
}

/// One piece of a range that lies within one page.
struct Piece {
    /// The page's number.
    page: u64,
    /// Where in the page it begins.
    within: usize,
    /// Where in the range it begins.
    at: usize,
    len: usize,
}

/// The pieces of `len` bytes at `at`.
fn pieces(at: u64, len: usize) -> impl Iterator<Item = Piece> {
    let mut done = 0;
    std::iter::from_fn(move || {
        if done == len {
            return None;
        }
        let start = at + done as u64;
        let within = (start % PAGE as u64) as usize;
        let piece = Piece { page: start / PAGE as u64, within, at: done, len: (PAGE - within).min(len - done) };
        done += piece.len;
        Some(piece)
    })
}

impl Snapshot {
    /// `size` zeros.
    pub fn zeros(size: u64) -> Self {
        Self { size, pages: BTreeMap::new() }
    }

    /// Length in bytes.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// All bytes, copied out.
    pub fn to_vec(&self) -> Vec<u8> {
        let mut bytes = vec![0; self.size as usize];
        self.read(0, &mut bytes);
        bytes
    }

    /// Fills `into` from `at` on; zeros past the end.
    pub fn read(&self, at: u64, into: &mut [u8]) {
        let len = self.readable(at, into.len());
        for piece in pieces(at, len) {
            let part = &mut into[piece.at..piece.at + piece.len];
            match self.pages.get(&piece.page) {
                Some(page) => part.copy_from_slice(&page[piece.within..piece.within + piece.len]),
                None => part.fill(0),
            }
        }
        into[len..].fill(0);
    }

    /// [`Snapshot::read`] into memory that takes part in I/O.
    pub(crate) fn read_iov(&self, at: u64, into: &Iov) {
        let len = self.readable(at, into.len());
        for piece in pieces(at, len) {
            match self.pages.get(&piece.page) {
                Some(page) => into.write(piece.at, &page[piece.within..piece.within + piece.len]),
                None => into.slice(piece.at..piece.at + piece.len).fill(0),
            }
        }
        into.slice(len..into.len()).fill(0);
    }

    /// Writes `bytes` at `at`, growing as needed. The caller has checked that the end is a possible length.
    pub fn write(&mut self, at: u64, bytes: &[u8]) {
        for piece in pieces(at, bytes.len()) {
            let part = &bytes[piece.at..piece.at + piece.len];
            self.page(piece.page)[piece.within..piece.within + piece.len].copy_from_slice(part);
        }
        self.grow(at, bytes.len());
    }

    /// [`Snapshot::write`] from memory that takes part in I/O.
    pub(crate) fn write_iov(&mut self, at: u64, from: &Iov) {
        for piece in pieces(at, from.len()) {
            from.read(piece.at, &mut self.page(piece.page)[piece.within..piece.within + piece.len]);
        }
        self.grow(at, from.len());
    }

    /// Makes `len` bytes at `at` read as zeros; does not grow.
    pub fn zero(&mut self, at: u64, len: u64) {
        let end = at.saturating_add(len).min(self.size);
        if at >= end {
            return;
        }
        let unit = PAGE as u64;
        let (first, last) = (at / unit, (end - 1) / unit);
        let held: Vec<u64> = self.pages.range(first..=last).map(|(number, _)| *number).collect();
        for number in held {
            let from = at.max(number * unit) - number * unit;
            let to = end.min((number + 1) * unit) - number * unit;
            if from == 0 && (to == unit || (number + 1) * unit > self.size && number * unit + to == self.size) {
                self.pages.remove(&number);
            } else {
                self.page(number)[from as usize..to as usize].fill(0);
            }
        }
    }

    /// Cuts off, or adds zeros.
    pub fn set_size(&mut self, size: u64) {
        if size < self.size {
            self.zero(size, self.size - size);
        }
        self.size = size;
    }

    /// The length of the first run of `len` bytes (at least 1) at `at` that is held, or not, throughout; and whether it is.
    pub(crate) fn run(&self, at: u64, len: u64) -> (u64, bool) {
        let unit = PAGE as u64;
        let end = at.saturating_add(len);
        if at >= self.size {
            return (len, false);
        }
        let mut number = at / unit;
        let data = self.pages.contains_key(&number);
        let stop = if data {
            for (held, _) in self.pages.range(number..) {
                if *held != number || number * unit >= end {
                    break;
                }
                number += 1;
            }
            (number * unit).min(self.size)
        } else {
            self.pages.range(number..).next().map_or(u64::MAX, |(held, _)| held * unit)
        };
        (stop.min(end) - at, data)
    }

    /// Bytes held in memory, rounded up to pages.
    pub fn held(&self) -> u64 {
        (self.pages.len() * PAGE) as u64
    }

    fn page(&mut self, number: u64) -> &mut [u8; PAGE] {
        Rc::make_mut(self.pages.entry(number).or_insert_with(|| Rc::new([0; PAGE])))
    }

    fn grow(&mut self, at: u64, len: usize) {
        if len > 0 {
            self.size = self.size.max(at + len as u64);
        }
    }

    /// How many of `len` bytes at `at` lie before the end.
    fn readable(&self, at: u64, len: usize) -> usize {
        self.size.saturating_sub(at).min(len as u64) as usize
    }
}

impl PartialEq for Snapshot {
    /// Same length and same bytes; whether zeros are held does not matter.
    fn eq(&self, other: &Self) -> bool {
        let zero = |page: &Rc<[u8; PAGE]>| page.iter().all(|byte| *byte == 0);
        let covered = |a: &Self, b: &Self| {
            a.pages.iter().all(|(number, page)| match b.pages.get(number) {
                Some(peer) => Rc::ptr_eq(page, peer) || page == peer,
                None => zero(page),
            })
        };
        self.size == other.size && covered(self, other) && covered(other, self)
    }
}

impl Eq for Snapshot {}

impl fmt::Debug for Snapshot {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Snapshot").field("size", &self.size).field("held", &self.held()).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_cut_off_is_gone() {
        let mut bytes = Snapshot::zeros(0);
        bytes.write(0, &[5; 9000]);
        bytes.set_size(4097);
        assert_eq!(bytes.held(), 8192);
        bytes.set_size(9000);
        let mut expected = vec![5; 4097];
        expected.resize(9000, 0);
        assert_eq!(bytes.to_vec(), expected);
    }

    #[test]
    fn zeroing_whole_pages_lets_them_go() {
        let mut bytes = Snapshot::zeros(0);
        bytes.write(0, &[5; 10_000]);
        bytes.zero(1, 10_000);
        assert_eq!(bytes.held(), 4096, "the first page keeps one byte; the last is zeroed up to the end");
        assert_eq!(bytes.run(0, 10_000), (4096, true));
        assert_eq!(bytes.run(4096, 1), (1, false));
    }

    #[test]
    fn runs_end_where_holding_changes() {
        let mut bytes = Snapshot::zeros(1 << 40);
        bytes.write(8192, &[1; 8192]);
        assert_eq!(bytes.run(0, u64::MAX), (8192, false));
        assert_eq!(bytes.run(10_000, u64::MAX), (6384, true));
        assert_eq!(bytes.run(10_000, 5), (5, true));
        assert_eq!(bytes.run(1 << 41, 77), (77, false));
        assert_eq!(bytes.run(16_384, 1 << 39), (1 << 39, false));
    }

    #[test]
    fn equality_is_of_bytes() {
        let mut a = Snapshot::zeros(10_000);
        let b = a.clone();
        a.write(5000, &[0; 10]);
        assert_eq!(a, b);
        a.write(5000, &[1]);
        assert_ne!(a, b);
        assert_ne!(Snapshot::zeros(1), Snapshot::zeros(2));
    }
}
