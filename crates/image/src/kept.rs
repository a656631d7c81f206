//! What was unpacked last: a guest reads in smaller pieces than images are packed in.

use layout::GuestOffset;
use std::collections::VecDeque;
use std::rc::Rc;

/// Unpacked bytes that are kept (one piece in any case).
pub(crate) const KEPT_BYTES: usize = 4 << 20;

/// The last pieces that were unpacked, oldest first.
#[derive(Default)]
pub(crate) struct Kept {
    pieces: VecDeque<(GuestOffset, Rc<[u8]>)>,
    bytes: usize,
}

impl Kept {
    /// The piece that starts at `start`.
    pub(crate) fn get(&self, start: GuestOffset) -> Option<Rc<[u8]>> {
        self.pieces.iter().rev().find(|(at, _)| *at == start).map(|(_, bytes)| Rc::clone(bytes))
    }

    /// What the piece held is no longer so.
    pub(crate) fn forget(&mut self, start: GuestOffset) {
        if let Some(at) = self.pieces.iter().position(|(kept, _)| *kept == start) {
            self.bytes -= self.pieces.remove(at).map_or(0, |(_, bytes)| bytes.len());
        }
    }

    /// Keeps a piece, and lets go of those that were there longest.
    pub(crate) fn put(&mut self, start: GuestOffset, bytes: Rc<[u8]>) {
        self.bytes += bytes.len();
        self.pieces.push_back((start, bytes));
        while self.bytes > KEPT_BYTES && self.pieces.len() > 1 {
            self.bytes -= self.pieces.pop_front().map_or(0, |(_, bytes)| bytes.len());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_few_are_kept() {
        let mut kept = Kept::default();
        for n in 0..100_u64 {
            kept.put(GuestOffset(n << 16), vec![0; 65536].into());
        }
        assert!(kept.bytes <= KEPT_BYTES && kept.get(GuestOffset(99 << 16)).is_some());
        assert!(kept.get(GuestOffset(0)).is_none());
        kept.put(GuestOffset(0), vec![0; 2 * KEPT_BYTES].into());
        assert_eq!(kept.pieces.len(), 1, "one in any case");
    }
}
