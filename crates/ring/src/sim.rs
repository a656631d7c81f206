//! A deterministic executor for tests: one seed decides the order in which runnable tasks run, and time is virtual: it
//! jumps to the next timer when nothing can run. Same seed, same program: same interleaving, to the poll.
//!
//! One rule binds the choice: a task that called [`yield_now`](crate::yield_now) runs only after everything that could
//! run when it did.

use crate::inbox::Inbox;
use crate::runtime::{Core, Driver};
use crate::task::{Entry, LocalQueue};
use crate::time::Instant;
use std::cell::Cell;
use std::future::Future;
use std::rc::Rc;
use std::sync::Arc;

/// The deterministic executor. Files and sockets answer `Unsupported`; everything else of the crate works.
pub struct Sim {
    core: Rc<Core>,
}

impl Sim {
    /// An executor whose choices follow `seed`.
    pub fn new(seed: u64) -> Self {
        let inbox = Inbox::new(usize::MAX, false).expect("an inbox that never sleeps opens nothing");
        Self { core: Core::new(Arc::new(inbox), Driver::Sim(Chooser::new(seed))) }
    }

    /// Runs `future` to its end. Panics with "deadlock" when nothing can ever run again.
    pub fn block_on<F: Future>(&self, future: F) -> F::Output {
        self.core.block_on(future)
    }
}

impl Drop for Sim {
    fn drop(&mut self) {
        self.core.shut_down();
    }
}

/// The seeded choice and the virtual clock.
pub(crate) struct Chooser {
    state: Cell<u64>,
    now: Cell<Instant>,
}

impl Chooser {
    fn new(seed: u64) -> Self {
        Self { state: Cell::new(seed), now: Cell::new(Instant::START) }
    }

    pub(crate) fn now(&self) -> Instant {
        self.now.get()
    }

    pub(crate) fn advance(&self, to: Instant) {
        self.now.set(to.max(self.now.get()));
    }

    /// The next number of the sequence (SplitMix64, by its published constants).
    fn random(&self) -> u64 {
        let state = self.state.get().wrapping_add(0x9e37_79b9_7f4a_7c15);
        self.state.set(state);
        let mixed = (state ^ (state >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    /// Takes one of those that can run.
    pub(crate) fn choose(&self, queue: &LocalQueue) -> Option<Entry> {
        queue.with(|entries| {
            // Whoever gave way stands behind all it gave way to; in front it is as free as the others.
            let free = |(at, entry): &(usize, &Entry)| *at == 0 || !entry.yielded;
            let candidates = entries.iter().enumerate().filter(free).count();
            if candidates == 0 {
                return None;
            }
            let choice = (self.random() % candidates as u64) as usize;
            let (at, _) = entries.iter().enumerate().filter(free).nth(choice)?;
            entries.remove(at)
        })
    }
}
