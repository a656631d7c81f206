//! Random choices that follow from a seed.

use std::cell::Cell;

/// Mixes a number so that neighbours have nothing in common (SplitMix64's finaliser, by its published constants).
pub(crate) fn mix(number: u64) -> u64 {
    let mixed = (number ^ (number >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    mixed ^ (mixed >> 31)
}

/// A source of choices. Every task has one of its own, so that what one chooses does not hang on when another does.
#[derive(Debug)]
pub(crate) struct Dice {
    state: Cell<u64>,
}

impl Dice {
    pub(crate) fn new(seed: u64) -> Self {
        Self { state: Cell::new(mix(seed ^ 0x5851_f42d_4c95_7f2d)) }
    }

    /// Any number.
    pub(crate) fn next(&self) -> u64 {
        let state = self.state.get().wrapping_add(0x9e37_79b9_7f4a_7c15);
        self.state.set(state);
        mix(state)
    }

    /// Below `bound`; 0 where there is nothing below it.
    pub(crate) fn below(&self, bound: u64) -> u64 {
        if bound == 0 { 0 } else { self.next() % bound }
    }

    /// From `low` to `high`, both included.
    pub(crate) fn between(&self, low: u64, high: u64) -> u64 {
        low + self.below(high - low + 1)
    }

    /// True in this many of a hundred.
    pub(crate) fn percent(&self, share: u64) -> bool {
        self.below(100) < share
    }

    /// One of them (not empty).
    pub(crate) fn pick<T: Copy>(&self, from: &[T]) -> T {
        from[self.below(from.len() as u64) as usize]
    }

    /// A source of its own for somebody else.
    pub(crate) fn fork(&self) -> Self {
        Self::new(self.next())
    }
}
