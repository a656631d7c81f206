//! A deterministic executor for tests: one seed decides the order in which runnable tasks run, and time is virtual: it
//! jumps to the next timer when nothing can run. Same seed, same program: same interleaving, to the poll.

use std::future::Future;

/// The deterministic executor. Files and sockets answer `Unsupported`; everything else of the crate works.
pub struct Sim {
    _todo: std::rc::Rc<()>,
}

impl Sim {
    /// An executor whose choices follow `seed`.
    pub fn new(seed: u64) -> Self {
        let _ = seed;
        todo!()
    }

    /// Runs `future` to its end. Panics with "deadlock" when nothing can ever run again.
    pub fn block_on<F: Future>(&self, future: F) -> F::Output {
        let _ = future;
        todo!()
    }
}
