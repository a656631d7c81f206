//! A walk over maps for the first run that is of one kind.

use layout::GuestRange;

/// Steps between two pauses for others.
const STEPS_A_TURN: u32 = 64;
/// A run is handed out after so many steps, even if it goes on: who asks wants to begin.
const STEPS_A_RUN: u32 = 1024;

/// The run that a walk has found so far.
pub(crate) struct FirstRun<K> {
    found: Option<(GuestRange, K)>,
    steps: u32,
}

impl<K: Copy + PartialEq> FirstRun<K> {
    /// Nothing yet.
    pub(crate) fn new() -> Self {
        Self { found: None, steps: 0 }
    }

    /// Before each step. Gives way to others now and then; false: what there is has taken long enough.
    pub(crate) async fn goes_on(&mut self) -> bool {
        self.steps += 1;
        if self.steps.is_multiple_of(STEPS_A_TURN) {
            ring::yield_now().await;
        }
        self.found.is_none() || self.steps < STEPS_A_RUN
    }

    /// The next piece, and what it is; `None`: nothing that is looked for. False: the run ends in front of it.
    pub(crate) fn take(&mut self, piece: GuestRange, kind: Option<K>) -> bool {
        match (&mut self.found, kind) {
            (Some((run, of)), Some(kind)) if *of == kind => *run = run.start().range(run.len() + piece.len()),
            (Some(_), _) => return false,
            (None, Some(kind)) => self.found = Some((piece, kind)),
            (None, None) => {}
        }
        true
    }

    /// The run, if there is one.
    pub(crate) fn found(self) -> Option<(GuestRange, K)> {
        self.found
    }
}
