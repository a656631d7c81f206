//! What guests do: queues of requests, each one after the other, many at a time.

use crate::content::{SECTOR, Value, ZEROS, decode, sectors};
use crate::dice::Dice;
use crate::oracle::Run;
use crate::plan::Faults;
use crate::run::Context;
use disk::{Disk, Error, ErrorKind};
use layout::GuestOffset;
use ring::Iov;
use std::rc::Rc;
use std::time::Duration;

/// One queue.
pub(crate) struct Queue {
    pub(crate) context: Rc<Context>,
    pub(crate) disk: Rc<Disk>,
    pub(crate) faults: Faults,
    pub(crate) dice: Dice,
}

impl Queue {
    /// So many requests, or until something is wrong or the power is off.
    pub(crate) async fn run(self, requests: u64) {
        for _ in 0..requests {
            if self.context.is_over() {
                return;
            }
            self.request().await;
            match self.dice.below(24) {
                0..4 => ring::sleep(Duration::from_micros(self.dice.below(3000))).await,
                // So long that the disk commits, and marks itself as clean, on its own.
                4 if self.dice.percent(30) => ring::sleep(Duration::from_millis(self.dice.between(500, 9000))).await,
                5..8 => ring::yield_now().await,
                _ => {}
            }
        }
    }

    async fn request(&self) {
        self.context.tally(|tally| tally.requests += 1);
        match self.dice.below(100) {
            0..28 => self.read(self.some_run()).await,
            28..54 => self.write(self.some_run(), false).await,
            54..60 => self.write(self.some_run(), true).await,
            60..63 => self.write(self.long_run(), false).await,
            63..66 => self.read(self.long_run()).await,
            66..75 => self.write_zeroes(self.some_run()).await,
            75..82 => self.discard(self.long_run()).await,
            82..92 => self.flush().await,
            92..95 => self.prefetch(self.some_run()).await,
            95..98 => self.status(self.some_run()).await,
            _ => self.disk.set_copy_on_read(self.dice.percent(50)),
        }
    }

    /// A request as guests make them: a few sectors, or around a cluster, often where others are at work.
    fn some_run(&self) -> Run {
        let size = self.context.oracle.borrow().size();
        let cluster = self.context.shape.cluster();
        let first = match self.dice.below(4) {
            // All queues like the same few clusters.
            0 | 1 => self.context.hot + self.dice.below(3 * cluster),
            2 => self.dice.below(size) / cluster * cluster,
            _ => self.dice.below(size),
        };
        let first = first.min(size - 1);
        let count = match self.dice.below(4) {
            0 => 1,
            1 => self.dice.between(1, 8),
            2 => cluster,
            _ => self.dice.between(1, 2 * cluster),
        };
        Run::new(first, count.min(size - first))
    }

    fn long_run(&self) -> Run {
        let size = self.context.oracle.borrow().size();
        let first = self.dice.below(size);
        Run::new(first, self.dice.between(1, 12 * self.context.shape.cluster()).min(size - first))
    }

    async fn read(&self, run: Run) {
        let began = self.context.oracle.borrow_mut().began();
        let into = Iov::alloc((run.count * SECTOR) as usize);
        into.fill(0xa5);
        match self.disk.read(GuestOffset(run.first * SECTOR), into.clone()).await {
            Ok(()) => {
                if self.context.is_over() {
                    return;
                }
                let bytes = into.to_vec();
                let mut oracle = self.context.oracle.borrow_mut();
                for (sector, bytes) in (run.first..).zip(bytes.chunks(SECTOR as usize)) {
                    if let Err(what) = oracle.saw(began, sector, decode(bytes, sector)) {
                        self.context.fail(format!("a read of {run:?}: {what}"));
                        return;
                    }
                }
            }
            Err(error) => self.excuse("a read", &error, self.faults.reads_may_fail()),
        }
    }

    async fn write(&self, run: Run, fua: bool) {
        let value = self.context.oracle.borrow_mut().value();
        let bytes = Iov::from_slice(&sectors(value, run.first, run.count));
        self.change(run, value, fua, self.disk.write(GuestOffset(run.first * SECTOR), bytes, fua)).await;
    }

    async fn write_zeroes(&self, run: Run) {
        let (unmap, fua) = (self.dice.percent(50), self.dice.percent(20));
        self.change(run, ZEROS, fua, self.disk.write_zeroes(run.bytes(), unmap, fua)).await;
    }

    /// What a discard zeroes for sure are whole clusters; the last one may be cut off by the disk's end.
    async fn discard(&self, run: Run) {
        if !self.context.shape.discard {
            if let Err(error) = self.disk.discard(run.bytes()).await {
                self.excuse("a discard", &error, self.faults.changes_may_fail());
            }
            return;
        }
        let (cluster, size) = (self.context.shape.cluster(), self.context.oracle.borrow().size());
        let end = run.first + run.count;
        let first = run.first.next_multiple_of(cluster);
        // While the disk grows, the part of a cluster at its end may count as whole or not.
        let at_end = end == size && !size.is_multiple_of(cluster);
        let whole_end = (end / cluster * cluster).max(first);
        let tail = at_end.then(|| Run::new(whole_end, end.saturating_sub(whole_end))).filter(|tail| tail.count > 0);
        let maybe = tail.map(|tail| self.context.oracle.borrow_mut().begin(tail, ZEROS));
        let durable = self.context.shape.write_through;
        let discarded = if whole_end > first {
            let whole = Run::new(first, whole_end - first);
            self.change(whole, ZEROS, durable, self.disk.discard(run.bytes())).await
        } else {
            let done = self.disk.discard(run.bytes()).await;
            if let Err(error) = &done {
                self.excuse("a discard", error, self.faults.changes_may_fail());
            }
            done.is_ok()
        };
        if let (Some(maybe), false) = (maybe, self.context.is_over()) {
            let certain = discarded && !self.context.grows();
            self.context.oracle.borrow_mut().end(maybe, certain, durable);
        }
    }

    /// Carries out a change and tells the oracle.
    async fn change(&self, run: Run, value: Value, fua: bool, work: impl Future<Output = Result<(), Error>>) -> bool {
        let poisoned = self.is_poisoned();
        let change = self.context.oracle.borrow_mut().begin(run, value);
        let done = work.await;
        if self.context.is_over() {
            return false;
        }
        let durable = fua || self.context.shape.write_through;
        self.context.oracle.borrow_mut().end(change, done.is_ok(), durable);
        match &done {
            Ok(()) if poisoned && value != ZEROS => {
                self.context.fail(format!("a write of {run:?} succeeded on a poisoned image"));
            }
            Ok(()) => {}
            Err(error) => self.excuse("a change", error, self.faults.changes_may_fail()),
        }
        done.is_ok()
    }

    async fn flush(&self) {
        let (poisoned, failed) = (self.is_poisoned(), self.context.flush_has_failed.get());
        let began = self.context.oracle.borrow_mut().began();
        let done = self.disk.flush().await;
        if self.context.is_over() {
            return;
        }
        match done {
            Ok(()) if poisoned => self.context.fail("a flush succeeded on a poisoned image".to_owned()),
            Ok(()) if failed => self.context.fail("a flush succeeded after another had failed".to_owned()),
            Ok(()) => self.context.oracle.borrow_mut().flushed(began),
            Err(error) => {
                self.context.flush_has_failed.set(true);
                self.excuse("a flush", &error, self.faults.top_may_fail());
            }
        }
    }

    async fn prefetch(&self, run: Run) {
        if let Err(error) = self.disk.prefetch(run.bytes()).await {
            let excused = self.faults.changes_may_fail() || self.faults.source_away;
            self.excuse("a prefetch", &error, excused);
        }
    }

    /// What is said to be zeros reads as zeros.
    async fn status(&self, run: Run) {
        let began = self.context.oracle.borrow_mut().began();
        match self.disk.status(run.bytes()).await {
            Ok(status) => {
                if self.context.is_over() {
                    return;
                }
                if status.len == 0 || status.len > run.count * SECTOR {
                    self.context.fail(format!("the status of {run:?} is about {} bytes", status.len));
                    return;
                }
                if !status.zero {
                    return;
                }
                let mut oracle = self.context.oracle.borrow_mut();
                for sector in run.first..run.first + status.len / SECTOR {
                    if let Err(what) = oracle.saw(began, sector, Some(ZEROS)) {
                        self.context.fail(format!("the status of {run:?} says zeros: {what}"));
                        return;
                    }
                }
            }
            Err(error) => self.excuse("a status", &error, self.faults.reads_may_fail()),
        }
    }

    fn is_poisoned(&self) -> bool {
        self.disk.chain()[0].image.poisoned().is_some()
    }

    /// An error is only what the phase's faults explain.
    fn excuse(&self, what: &str, error: &Error, may_fail: bool) {
        if self.context.is_over() {
            return;
        }
        self.context.tally(|tally| tally.errors += 1);
        if !may_fail {
            self.context.fail(format!("{what} failed without a reason: {error}"));
        } else if matches!(error.kind(), ErrorKind::Corrupt | ErrorKind::InvalidArgument) {
            self.context.fail(format!("{what} failed in a way that no fault explains: {error}"));
        }
    }
}

/// Grows the disk, step by step.
pub(crate) async fn grow(context: Rc<Context>, disk: Rc<Disk>, faults: Faults, steps: Vec<u64>, dice: Dice) {
    for size in steps {
        ring::sleep(Duration::from_micros(dice.below(4000))).await;
        if context.is_over() {
            break;
        }
        context.oracle.borrow_mut().begin_growth(size);
        context.growing(true);
        let done = disk.resize(size * SECTOR).await;
        if context.is_over() {
            break;
        }
        match done {
            Ok(()) => context.oracle.borrow_mut().end_growth(true),
            // A job has the disk.
            Err(error) if error.kind() == ErrorKind::Busy => context.oracle.borrow_mut().forget_growth(),
            Err(error) => {
                if !faults.changes_may_fail() {
                    context.fail(format!("the disk could not grow, without a reason: {error}"));
                }
                return;
            }
        }
    }
}
