//! Who is inside a disk: guest requests, a job's requests, and work that goes on behind them.
//!
//! **Invariant.** Once the gate is closed no request enters, and when [`Gate::empty`] returns nothing of the disk runs any
//! more: whatever a request leaves running behind it (a fetch, a commit) is counted too.

use ring::sync::Event;
use std::cell::Cell;
use std::rc::Rc;

#[derive(Default)]
struct State {
    inside: Cell<usize>,
    closed: Cell<bool>,
    left: Event,
    closing: Event,
}

/// Counts who is inside. Clones share the count.
#[derive(Clone, Default)]
pub(crate) struct Gate {
    state: Rc<State>,
}

/// Inside until dropped.
pub(crate) struct Inside {
    state: Rc<State>,
}

impl Gate {
    /// Lets a request in; `None` once closed.
    pub(crate) fn enter(&self) -> Option<Inside> {
        if self.is_closed() {
            return None;
        }
        Some(self.enter_behind())
    }

    /// Counts work that a request inside has started; allowed while closing.
    pub(crate) fn enter_behind(&self) -> Inside {
        self.state.inside.set(self.state.inside.get() + 1);
        Inside { state: Rc::clone(&self.state) }
    }

    /// Whether requests are refused.
    pub(crate) fn is_closed(&self) -> bool {
        self.state.closed.get()
    }

    /// Refuses requests from now on and tells those that only bide their time.
    pub(crate) fn close(&self) {
        self.state.closed.set(true);
        self.state.closing.notify_all();
    }

    /// Waits until the gate is closed.
    pub(crate) async fn closing(&self) {
        let wait = self.state.closing.wait();
        if !self.is_closed() {
            wait.await;
        }
    }

    /// Waits until nobody is inside.
    pub(crate) async fn empty(&self) {
        while self.state.inside.get() > 0 {
            self.state.left.wait().await;
        }
    }
}

impl Drop for Inside {
    fn drop(&mut self) {
        let inside = self.state.inside.get() - 1;
        self.state.inside.set(inside);
        if inside == 0 {
            self.state.left.notify_all();
        }
    }
}
