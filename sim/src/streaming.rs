//! A stream in the middle of it all: started, slowed, paused, cancelled; and what has to be true when it ends.

use crate::dice::Dice;
use crate::plan::{Faults, Stream};
use crate::run::Context;
use disk::{Disk, StreamBase};
use job::{ErrorAction, Event, Jobs, Status, StreamOptions};
use std::cell::{Cell, RefCell};
use std::rc::Rc;
use std::time::Duration;

const JOB: &str = "stream";

/// Resumed so often after errors, it is cancelled.
const RESUMES_MAX: u64 = 12;

/// What the events of one stream have to agree with.
pub(crate) struct Watch {
    context: Rc<Context>,
    disk: Rc<Disk>,
    faults: Faults,
    may_be_cancelled: bool,
    before: Option<String>,
    wanted: RefCell<Option<String>>,
    ignored: Cell<bool>,
    over: Cell<bool>,
}

impl Watch {
    fn backing(&self) -> Option<String> {
        self.disk.chain()[0].image.backing().map(|backing| backing.name)
    }

    fn heard(&self, event: &Event) {
        if self.context.is_over() {
            self.over.set(self.over.get() || matches!(event, Event::Completed { .. } | Event::Cancelled { .. }));
            return;
        }
        match event {
            Event::Error { action: ErrorAction::Ignore, .. } => self.ignored.set(true),
            Event::Completed { error: None, len, offset, .. } => self.completed(*len, *offset),
            Event::Completed { error: Some(error), .. } => self.failed(error),
            Event::Cancelled { .. } => {
                self.over.set(true);
                if !self.may_be_cancelled && !self.context.is_closing() && !self.explains_errors() {
                    self.context.fail("a stream was cancelled that nobody cancelled".to_owned());
                }
                self.keeps_its_backing("a cancelled stream");
            }
            _ => {}
        }
    }

    fn explains_errors(&self) -> bool {
        self.faults.changes_may_fail() || self.faults.source_away
    }

    /// Finished means durable: from this moment on, whatever a power cut leaves stands without what was streamed.
    fn completed(&self, len: u64, offset: u64) {
        self.over.set(true);
        self.context.tally(|tally| tally.streams += 1);
        let wanted = self.wanted.borrow().clone();
        if self.ignored.get() {
            self.context.fail("a stream ended well that had ignored an error".to_owned());
        }
        if len != offset {
            self.context.fail(format!("a stream ended well at {offset} of {len} bytes"));
        }
        if self.backing() != wanted {
            self.context.fail(format!("a stream ended and left {:?} as the backing file", self.backing()));
        }
        self.context.backings(vec![wanted]);
        self.context.cut("right after a stream's end".to_owned());
    }

    fn failed(&self, error: &str) {
        self.over.set(true);
        if !self.explains_errors() {
            self.context.fail(format!("a stream failed without a reason: {error}"));
        }
        // Where the top fails the header may have been written or not.
        if !self.faults.top_may_fail() {
            self.keeps_its_backing("a failed stream");
        }
    }

    fn keeps_its_backing(&self, who: &str) {
        if self.backing() != self.before {
            self.context.fail(format!("{who} left {:?} as the backing file", self.backing()));
        }
        self.context.backings(vec![self.before.clone()]);
    }
}

/// Runs the stream to its end, whatever that is.
pub(crate) async fn stream(context: Rc<Context>, disk: Rc<Disk>, plan: Stream, faults: Faults, dice: Dice) {
    ring::sleep(plan.after).await;
    if context.is_over() {
        return;
    }
    let chain = disk.chain();
    let before = chain[0].image.backing().map(|backing| backing.name);
    // The base may have gone with an earlier stream.
    let base = plan.base.map(|layer| context.shape.name(layer));
    let base = base.filter(|name| chain.iter().skip(1).any(|layer| layer.name == *name));
    let watch = Rc::new(Watch {
        context: Rc::clone(&context),
        disk: Rc::clone(&disk),
        faults,
        may_be_cancelled: plan.cancelled,
        before: before.clone(),
        wanted: RefCell::new(base.clone()),
        ignored: Cell::new(false),
        over: Cell::new(false),
    });
    context.backings(vec![before, base.clone()]);
    let hears = Rc::clone(&watch);
    let jobs = Jobs::new(Rc::new(move |event| hears.heard(&event)));
    let options = StreamOptions {
        id: Some(JOB.to_owned()),
        disk: Rc::clone(&disk),
        base: base.map_or(StreamBase::Nothing, |name| StreamBase::Node(format!("node-{name}"))),
        backing_name: None,
        speed: plan.speed,
        on_error: plan.on_error,
        auto_finalize: plan.auto_finalize,
        auto_dismiss: true,
        hold: None,
    };
    if let Err(error) = jobs.stream(options) {
        context.fail(format!("a stream could not start: {error}"));
        return;
    }
    let driver = Driver { context: &context, jobs: &jobs, watch: &watch, dice, reached: Cell::new(0) };
    driver.drive(plan).await;
    jobs.shut_down().await;
}

struct Driver<'a> {
    context: &'a Context,
    jobs: &'a Jobs,
    watch: &'a Watch,
    dice: Dice,
    reached: Cell<u64>,
}

impl Driver<'_> {
    async fn drive(&self, plan: Stream) {
        for _ in 0..plan.verbs {
            ring::sleep(Duration::from_micros(self.dice.below(2000))).await;
            if self.is_over() {
                return;
            }
            self.look();
            // Refusals are what a state machine is for; its own tests say which are right.
            let _ = match self.dice.below(if plan.cancelled { 5 } else { 4 }) {
                0 => self.jobs.set_speed(JOB, self.dice.pick(&[0, 1 << 20, 8 << 20, 256 << 20])),
                1 => self.jobs.pause(JOB),
                2 | 3 => self.jobs.resume(JOB),
                _ => self.jobs.cancel(JOB, self.dice.percent(50)),
            };
        }
        let (mut wait, mut resumes) = (Duration::from_micros(100), 0);
        while !self.is_over() {
            ring::sleep(wait).await;
            wait = (wait * 2).min(Duration::from_secs(2));
            let Some(info) = self.look() else { return };
            if info.paused {
                resumes += 1;
                let _ = if resumes > RESUMES_MAX && self.watch.explains_errors() {
                    self.jobs.cancel(JOB, true)
                } else {
                    self.jobs.resume(JOB)
                };
            }
            if info.status == Status::Pending {
                let _ = self.jobs.finalize(JOB);
            }
        }
    }

    fn is_over(&self) -> bool {
        self.watch.over.get() || self.context.is_over() || self.context.is_closing()
    }

    /// Progress never runs backwards, and never past the end.
    fn look(&self) -> Option<job::JobInfo> {
        let info = self.jobs.info(JOB)?;
        if info.offset > info.len || info.offset < self.reached.get() {
            let reached = self.reached.get();
            self.context.fail(format!("progress went from {reached} to {} of {}", info.offset, info.len));
        }
        self.reached.set(info.offset);
        Some(info)
    }
}
