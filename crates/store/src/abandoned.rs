//! Changes whose future was dropped before they were over.
//!
//! The kernel cannot be told to forget a write. So a change that has begun runs to its end, as a task of its own when its
//! caller has left, with everything it holds; and **what comes later to the same range waits for it**. Without that, a
//! range that was given up and used again could be overwritten by the past. As long as nobody leaves early, this costs
//! nothing.

use crate::Result;
use layout::HostRange;
use ring::sync::Event;
use std::cell::RefCell;
use std::collections::BTreeMap;
use std::future::Future;
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll};

/// The ranges of abandoned changes, by order of abandonment.
#[derive(Default)]
pub(crate) struct Abandoned {
    changes: RefCell<Changes>,
    over: Event,
}

#[derive(Default)]
struct Changes {
    next: u64,
    ranges: BTreeMap<u64, HostRange>,
}

impl Abandoned {
    /// Waits until no change that was abandoned before now touches `range`.
    pub(crate) async fn clear_of(&self, range: HostRange) {
        // Those that are abandoned later do not count: one of them may be the caller.
        let before = self.changes.borrow().next;
        while self.changes.borrow().ranges.range(..before).any(|(_, other)| other.overlaps(range)) {
            self.over.wait().await;
        }
    }

    fn add(&self, range: HostRange) -> u64 {
        let mut changes = self.changes.borrow_mut();
        let ticket = changes.next;
        changes.next += 1;
        changes.ranges.insert(ticket, range);
        ticket
    }

    fn remove(&self, ticket: u64) {
        self.changes.borrow_mut().ranges.remove(&ticket);
        self.over.notify_all();
    }
}

/// A change that, once begun, runs to its end even if this is dropped.
pub(crate) struct Change {
    abandoned: Rc<Abandoned>,
    range: HostRange,
    begun: bool,
    work: Option<Work>,
}

/// What a change does; it owns all that it needs.
pub(crate) type Work = Pin<Box<dyn Future<Output = Result<()>>>>;

impl Change {
    /// `work` changes `range` of the store that `abandoned` belongs to.
    pub(crate) fn new(abandoned: &Rc<Abandoned>, range: HostRange, work: Work) -> Self {
        Self { abandoned: Rc::clone(abandoned), range, begun: false, work: Some(work) }
    }
}

impl Future for Change {
    type Output = Result<()>;
    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Result<()>> {
        self.begun = true;
        let Some(work) = &mut self.work else { return Poll::Pending };
        let result = std::task::ready!(work.as_mut().poll(cx));
        self.work = None;
        Poll::Ready(result)
    }
}

impl Drop for Change {
    fn drop(&mut self) {
        let Some(work) = self.work.take() else { return };
        // Outside of a ring nothing can go on; a ring that ends waits for the kernel itself.
        if !self.begun || !ring::is_running() {
            return;
        }
        let abandoned = Rc::clone(&self.abandoned);
        let ticket = abandoned.add(self.range);
        drop(ring::spawn(async move {
            // Nobody is left to be told; a failed flush has poisoned the store all the same.
            let _ = work.await;
            abandoned.remove(ticket);
        }));
    }
}
