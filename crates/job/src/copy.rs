//! The copying: a cursor over what is missing, several chunks in flight, until nothing is left or somebody says stop.
//!
//! **Invariants.**
//! * Nothing is issued while the job is paused, cancelled or failed, nor faster than its pace; what was asked for takes effect
//!   before the next chunk, also on one that waits for its turn.
//! * A chunk that failed is tried again (stopped), or remembered as an error that the job ends with (ignored, reported). So
//!   [`Copying::run`] says "done" only when nothing was left out.

use crate::ahead::Ahead;
use crate::flight::{Chunk, Flight, Landed};
use crate::life::Life;
use crate::stream::{OnError, Target};
use crate::window::{CHUNK, Window};
use crate::{ErrorAction, IoStatus};
use disk::{Error, ErrorKind, Missing};
use futures_util::future::select;
use layout::GuestOffset;
use ring::Instant;
use std::collections::VecDeque;
use std::pin::pin;
use std::rc::Rc;
use std::time::Duration;

/// A run that was found missing is looked at again after so many chunks: guests write, and what they wrote need not be
/// fetched.
const CHUNKS_A_LOOK: u64 = 16;

/// Runs of zeros are marked in parts of at most this, so that a pause or a cancel need not wait for a terabyte of marks.
const ZERO_CHUNK: u64 = 64 << 20;

/// How long nothing is sent after an error that is ignored: a source that fails at once is not hammered, and those who
/// listen are not flooded with events.
const AFTER_ERROR: Duration = Duration::from_millis(20);

/// Between two passes over the disk, when guests were in the way in the first.
const BETWEEN_PASSES: Duration = Duration::from_millis(10);

/// Why the copying stopped before its end.
#[derive(Debug)]
pub(crate) enum Stopped {
    Cancelled,
    Failed(Error),
}

/// See the module.
pub(crate) struct Copying {
    life: Rc<Life>,
    target: Rc<dyn Target>,
    on_error: OnError,
    flight: Flight,
    window: Window,
    /// Where to look for more.
    cursor: GuestOffset,
    /// What the last look found and is not sent yet.
    run: Option<Missing>,
    /// What failed and is to be sent again.
    again: VecDeque<Chunk>,
    /// The cursor has reached the end.
    exhausted: bool,
    /// A guest was in the way somewhere: another pass tells whether something was left.
    another_pass: bool,
    /// Nothing is sent before this.
    not_before: Option<Instant>,
    failed: Option<Error>,
    /// Where it failed: nothing from here on counts as done.
    failed_at: Option<GuestOffset>,
    ignored: Option<Error>,
    /// What is done, and not told yet because something in front of it is not.
    done: Ahead,
    /// Somebody waits for the end: it goes as fast as it can.
    in_haste: bool,
}

impl Copying {
    pub(crate) fn new(life: Rc<Life>, target: Rc<dyn Target>, on_error: OnError) -> Self {
        Self {
            flight: Flight::new(Rc::clone(&life), Rc::clone(&target)),
            life,
            target,
            on_error,
            window: Window::new(),
            cursor: GuestOffset::ZERO,
            run: None,
            again: VecDeque::new(),
            exhausted: false,
            another_pass: false,
            not_before: None,
            failed: None,
            failed_at: None,
            ignored: None,
            done: Ahead::default(),
            in_haste: false,
        }
    }

    /// At no pace but its own: somebody waits for the end.
    pub(crate) fn in_haste(self) -> Self {
        Self { in_haste: true, ..self }
    }

    /// Copies until nothing is missing. On any return nothing is in flight.
    pub(crate) async fn run(mut self) -> Result<(), Stopped> {
        loop {
            // Before looking at anything, so that no change is missed.
            let changed = self.life.changed.wait();
            for landed in self.flight.landed() {
                self.land(landed);
            }
            self.note_progress();
            if self.life.is_cancelled() || self.failed.is_some() || self.life.is_paused() {
                if self.flight.count() > 0 {
                    changed.await;
                } else if self.life.is_cancelled() {
                    return Err(Stopped::Cancelled);
                } else if let Some(error) = self.failed.take() {
                    return Err(Stopped::Failed(error));
                } else {
                    self.life.rest().await;
                }
                continue;
            }
            let Some(chunk) = self.next_chunk() else {
                if !self.exhausted {
                    self.look().await;
                } else if self.flight.count() > 0 {
                    changed.await;
                } else if self.another_pass {
                    self.start_over();
                } else {
                    self.life.progress.finished();
                    return self.ignored.map_or(Ok(()), |error| Err(Stopped::Failed(error)));
                }
                continue;
            };
            match self.hindrance(chunk) {
                None => self.send(chunk),
                Some(Hindrance::Full) => changed.await,
                Some(Hindrance::Until(at)) => {
                    select(changed, pin!(ring::sleep_until(at))).await;
                }
            }
        }
    }

    /// What lies before everything that is still to be done is done. What lies behind is not told of: so a job that stops for an error
    /// says where.
    fn note_progress(&mut self) {
        let run = self.run.map(|run| run.range.start());
        let again = self.again.iter().map(|chunk| chunk.range.start()).min();
        let front = [Some(self.cursor), run, again, self.flight.first(), self.failed_at].into_iter().flatten().min();
        let front = front.unwrap_or(self.cursor);
        while let Some(range) = self.done.passed(front) {
            self.life.progress.copied(range);
        }
        self.life.progress.passed(front);
    }

    /// What is to be sent next, without taking it.
    fn next_chunk(&self) -> Option<Chunk> {
        if let Some(chunk) = self.again.front() {
            return Some(*chunk);
        }
        let run = self.run?;
        let most = if run.zero { ZERO_CHUNK.max(self.target.cluster_size()) } else { self.chunk_size() };
        Some(Chunk { range: run.range.first(most), zero: run.zero })
    }

    /// How much one request brings in: whole clusters, at least one.
    fn chunk_size(&self) -> u64 {
        self.life.pace.chunk().map_or(CHUNK, |paced| paced.min(CHUNK)).max(self.target.cluster_size())
    }

    fn hindrance(&self, chunk: Chunk) -> Option<Hindrance> {
        let (count, in_flight) = (self.flight.count(), self.flight.bytes());
        let bytes = if chunk.zero { 0 } else { chunk.range.len() };
        if !self.window.has_room(count, in_flight, bytes) {
            return Some(Hindrance::Full);
        }
        if let Some(at) = self.not_before.filter(|at| *at > ring::now()) {
            return Some(Hindrance::Until(at));
        }
        if chunk.zero || self.in_haste { None } else { self.life.pace.wait().map(Hindrance::Until) }
    }

    fn send(&mut self, chunk: Chunk) {
        if self.again.pop_front().is_none() {
            self.run = self.run.and_then(|run| {
                let range = run.range.skip(chunk.range.len());
                (!range.is_empty()).then_some(Missing { range, ..run })
            });
        }
        if !chunk.zero {
            self.life.pace.charge(chunk.range.len());
        }
        tracing::trace!(target: "job_step", job = self.life.id(), range = %chunk.range, zero = chunk.zero);
        self.flight.send(chunk);
    }

    /// Looks for what is missing from the cursor on.
    async fn look(&mut self) {
        match self.target.next_missing(self.cursor).await {
            Ok(Some(missing)) => {
                let most = if missing.zero { u64::MAX } else { self.chunk_size().saturating_mul(CHUNKS_A_LOOK) };
                let range = missing.range.first(most);
                self.life.progress.found(range, !missing.zero);
                self.cursor = range.end();
                self.run = Some(Missing { range, ..missing });
            }
            Ok(None) => {
                self.cursor = GuestOffset(self.target.size());
                self.exhausted = true;
            }
            Err(error) => {
                if self.meet(error) {
                    // What lies here cannot be told; a stride on, perhaps it can.
                    let end = self.cursor.checked_add(self.chunk_size()).unwrap_or(GuestOffset(u64::MAX));
                    self.cursor = end.min(GuestOffset(self.target.size()));
                }
            }
        }
    }

    fn start_over(&mut self) {
        self.another_pass = false;
        self.exhausted = false;
        self.cursor = GuestOffset::ZERO;
        self.not_before = Some(ring::now() + BETWEEN_PASSES);
    }

    /// A chunk has come back.
    fn land(&mut self, landed: Landed) {
        let Landed { chunk, answer } = landed;
        match answer {
            Some((Ok(copied), took)) => {
                self.another_pass |= copied.skipped > 0;
                if !chunk.zero {
                    self.life.pace.refund(copied.skipped);
                    self.done.add(chunk.range);
                    if chunk.range.len() == CHUNK && copied.skipped == 0 {
                        self.window.measured(took);
                    }
                }
            }
            Some((Err(error), _)) => {
                if self.meet(error) {
                    self.done.add(chunk.range);
                } else {
                    if self.failed.is_some() {
                        self.failed_at.get_or_insert(chunk.range.start());
                    }
                    self.again.push_back(chunk);
                }
            }
            None => {
                let what = "a task of the job has died; see the log, and report it as a bug";
                self.failed.get_or_insert_with(|| Error::new(ErrorKind::Poisoned, "", None, what));
            }
        }
    }

    /// Does about an error what the job's policy says. Whether to go on behind the place where it happened.
    fn meet(&mut self, error: Error) -> bool {
        if self.failed.is_some() || self.life.is_cancelled() {
            return false;
        }
        let action = self.action(&error);
        match action {
            ErrorAction::Report => {
                self.life.met_error(is_write(&error), action, &error);
                self.failed = Some(error);
                false
            }
            ErrorAction::Ignore => {
                self.life.met_error(is_write(&error), action, &error);
                tracing::warn!(job = self.life.id(), %error, "ignored; the backing file will be kept");
                self.ignored.get_or_insert(error);
                self.not_before = Some(ring::now() + AFTER_ERROR);
                true
            }
            ErrorAction::Stop => {
                // Of several chunks in flight that fail for one reason the first says it.
                if !self.life.is_stopped() {
                    tracing::warn!(job = self.life.id(), %error, "stopped until it is resumed");
                    self.life.met_error(is_write(&error), action, &error);
                }
                self.life.stop(if error.is_no_space() { IoStatus::NoSpace } else { IoStatus::Failed });
                false
            }
        }
    }

    fn action(&self, error: &Error) -> ErrorAction {
        // No policy helps against these: every other attempt fails for the same reason.
        let image = matches!(error.kind(), ErrorKind::Poisoned | ErrorKind::ReadOnly | ErrorKind::InvalidArgument);
        let store = error.store_error().map(store::Error::kind);
        if image || matches!(store, Some(store::ErrorKind::Poisoned | store::ErrorKind::ReadOnly)) {
            return ErrorAction::Report;
        }
        match self.on_error {
            OnError::Report => ErrorAction::Report,
            OnError::Ignore => ErrorAction::Ignore,
            OnError::Stop => ErrorAction::Stop,
            OnError::Enospc if error.is_no_space() => ErrorAction::Stop,
            OnError::Enospc => ErrorAction::Report,
        }
    }
}

/// Why a chunk cannot go now.
enum Hindrance {
    /// Enough is in flight.
    Full,
    /// It is not its time yet.
    Until(Instant),
}

/// Whether the job met the error while it was writing (or making room for what it writes).
fn is_write(error: &Error) -> bool {
    error.store_error().is_some_and(|e| !matches!(e.operation(), store::Operation::Read | store::Operation::Extent))
}

/// Counts what is missing while the copying is on its way, so that its progress has a total. Errors are left to the copying
/// to meet.
pub(crate) async fn scan(life: Rc<Life>, target: Rc<dyn Target>) {
    loop {
        while life.is_paused() {
            life.changed.wait().await;
        }
        match target.next_missing(life.progress.scan_from()).await {
            Ok(Some(Missing { range, zero })) => life.progress.scanned(range, !zero),
            Ok(None) => return life.progress.scan_ended(),
            Err(_) => return,
        }
        // Tables are mostly in memory by now: guests and the copying go first.
        ring::yield_now().await;
    }
}
