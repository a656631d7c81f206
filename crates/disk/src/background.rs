//! What a disk does on its own: it commits table changes that nobody flushes, and marks the image as clean when idle.
//!
//! **Invariants.** A task runs only while there is something uncommitted or unsettled, so an idle disk costs nothing. The
//! task does not keep the disk alive, and it ends when the disk closes.

use crate::disk::Inner;
use futures_util::future::{Either, select};
use ring::Instant;
use ring::sync::Event;
use std::cell::Cell;
use std::pin::pin;
use std::rc::{Rc, Weak};
use std::time::Duration;

/// Table changes wait this long for a flush of the guest's to take them along. Guests flush every few seconds when they
/// write at all; a stream never flushes, and after a crash it fetches again what this delay has left uncommitted.
const COMMIT_AFTER: Duration = Duration::from_secs(1);

/// So many newly mapped bytes are not kept waiting: it bounds what a stream may lose to a crash and how many changed tables an
/// image holds in memory (at 64 KiB clusters this is 4096 entries).
const COMMIT_AT: u64 = 256 << 20;

/// With no change for so long the image is marked as clean, so that a later kill costs no check at the next opening. Longer
/// than the pauses of a guest at work: marking and unmarking costs two barriers.
const SETTLE_AFTER: Duration = Duration::from_secs(5);

/// What the task needs to know.
#[derive(Default)]
pub(crate) struct Background {
    running: Cell<bool>,
    last_change: Cell<Option<Instant>>,
    /// Bytes mapped since the last commit.
    mapped: Cell<u64>,
    much: Event,
}

impl Background {
    /// A commit has ended well.
    pub(crate) fn committed(&self) {
        self.mapped.set(0);
    }
}

impl Inner {
    /// The top's tables have changed; `bytes` were newly mapped.
    pub(crate) fn tables_changed(self: &Rc<Self>, bytes: u64) {
        let background = &self.background;
        background.last_change.set(Some(ring::now()));
        background.mapped.set(background.mapped.get() + bytes);
        if background.mapped.get() >= COMMIT_AT {
            background.much.notify_all();
        }
        if !background.running.replace(true) {
            drop(ring::spawn(run(Rc::downgrade(self))));
        }
    }

    /// One step of the task; `None` when there is nothing left to do, else how long to wait.
    async fn tend(self: &Rc<Self>) -> Option<Duration> {
        let _inside = self.gate.enter()?;
        if self.top.is_dirty() {
            if let Err(error) = self.commit().await {
                tracing::warn!(disk = self.name, %error, "could not commit");
                return None;
            }
            return Some(COMMIT_AFTER);
        }
        let idle = self.background.last_change.get().map_or(SETTLE_AFTER, |at| ring::now().since(at));
        if idle < SETTLE_AFTER {
            return Some(SETTLE_AFTER.saturating_sub(idle));
        }
        if let Err(error) = self.top.settle().await {
            tracing::warn!(disk = self.name, %error, "could not mark the image as clean");
            return None;
        }
        let changed_meanwhile =
            self.background.last_change.get().is_some_and(|at| ring::now().since(at) < SETTLE_AFTER);
        (changed_meanwhile || self.top.is_dirty()).then_some(COMMIT_AFTER)
    }
}

async fn run(disk: Weak<Inner>) {
    let mut wait = COMMIT_AFTER;
    loop {
        let (much, closing) = {
            let Some(disk) = disk.upgrade() else { return };
            (disk.background.much.wait(), disk.gate.clone())
        };
        let mut slept = pin!(async move {
            select(pin!(ring::sleep(wait)), pin!(much)).await;
        });
        if let Either::Right(_) = select(&mut slept, pin!(closing.closing())).await {
            return;
        }
        let Some(disk) = disk.upgrade() else { return };
        match disk.tend().await {
            Some(next) => wait = next,
            None => {
                disk.background.running.set(false);
                return;
            }
        }
    }
}
