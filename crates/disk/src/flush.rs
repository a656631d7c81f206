//! Flushes: everything completed becomes durable, and those who ask together pay for one commit.
//!
//! **Invariants.** At most one commit of the top image is in flight. A flush is served only by a commit that *began* after
//! the flush was asked for (and so covers every write completed by then): whoever arrives while one runs shares
//! the next. A commit that failed is never taken for done: the image has poisoned itself and every later flush says so.

use crate::disk::Inner;
use image::Result;
use ring::sync::Event;
use std::cell::{Cell, RefCell};
use std::rc::Rc;

/// One commit, and all who wait for it.
#[derive(Default)]
struct Round {
    result: RefCell<Option<Result<()>>>,
    done: Event,
}

impl Round {
    async fn result(&self) -> Result<()> {
        loop {
            let wait = self.done.wait();
            if let Some(result) = &*self.result.borrow() {
                return result.clone();
            }
            wait.await;
        }
    }
}

/// The sequence of commits of one disk.
#[derive(Default)]
pub(crate) struct Flusher {
    /// The commit that has not begun yet, if somebody wants one.
    next: RefCell<Option<Rc<Round>>>,
    running: Cell<bool>,
    /// Counts completed changes; `durable` is the count that the last good commit covered.
    changes: Cell<u64>,
    durable: Cell<u64>,
    /// The same for guests' changes that are in tables: until a commit they are in this process only.
    mapped: Cell<u64>,
    mapped_durable: Cell<u64>,
    /// A commit has ended well.
    pub(crate) settled: Event,
}

impl Flusher {
    /// Tells `settled` of every commit that has ended well.
    pub(crate) fn new(settled: Event) -> Self {
        Self { settled, ..Self::default() }
    }

    /// Something was written (or zeroed, or linked) and has completed.
    pub(crate) fn changed(&self) {
        self.changes.set(self.changes.get() + 1);
    }

    /// Takes over what another one, over the same image, has not made durable.
    pub(crate) fn take_over(&self, other: &Self) {
        if other.changes != other.durable {
            self.changed();
        }
        if other.has_unsettled() {
            self.mapped();
        }
    }

    /// A guest's change needs tables that are changed in memory.
    pub(crate) fn mapped(&self) {
        self.mapped.set(self.mapped.get() + 1);
    }

    /// Whether there are such changes that no commit has covered.
    pub(crate) fn has_unsettled(&self) -> bool {
        self.mapped != self.mapped_durable
    }

    /// Whether a commit is under way or wanted.
    pub(crate) fn is_busy(&self) -> bool {
        self.running.get()
    }
}

impl Inner {
    /// Whether the mapping of everything allocated is durable: then a write in place needs no more than its own bytes to be.
    pub(crate) fn mappings_are_durable(&self) -> bool {
        !self.flusher.is_busy() && !self.top.is_dirty()
    }

    /// Makes every completed change durable.
    pub(crate) async fn commit(self: &Rc<Self>) -> Result<()> {
        if self.top.read_only() {
            return Ok(());
        }
        if let Some(first) = self.top.poisoned() {
            return Err(first);
        }
        let flusher = &self.flusher;
        let nothing_to_do = !flusher.is_busy() && !self.top.is_dirty() && flusher.durable == flusher.changes;
        if nothing_to_do {
            return Ok(());
        }
        let round = Rc::clone(flusher.next.borrow_mut().get_or_insert_default());
        if !flusher.running.replace(true) {
            drop(ring::spawn(Rc::clone(self).run_commits()));
        }
        round.result().await
    }

    /// Carries out the commits that are wanted, one after the other. A task of its own, so that no caller that goes away
    /// takes the others' commit with it.
    async fn run_commits(self: Rc<Self>) {
        let _inside = self.gate.enter_behind();
        let flusher = &self.flusher;
        loop {
            let next = flusher.next.borrow_mut().take();
            let Some(round) = next else { break };
            let (covered, mapped) = (flusher.changes.get(), flusher.mapped.get());
            let result = self.top.commit().await;
            if result.is_ok() {
                flusher.durable.set(covered);
                flusher.mapped_durable.set(mapped);
                flusher.settled.notify_all();
                self.background.committed();
            }
            *round.result.borrow_mut() = Some(result);
            round.done.notify_all();
        }
        flusher.running.set(false);
    }
}
