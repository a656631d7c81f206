//! One job: what it is, what was asked of it, and how it moves from state to state.
//!
//! **Invariants.** Verbs only note what is wanted and wake the job's task; the task alone moves the job on, except for
//! resuming and the very start. No borrow is held while an event is emitted. A job that has concluded has emitted exactly one of
//! `BLOCK_JOB_COMPLETED` and `BLOCK_JOB_CANCELLED`, and from that event to its end there is no await: whoever hears of the
//! end finds the disk free (unless the job waits for its dismissal).

use crate::pace::Pace;
use crate::progress::Progress;
use crate::registry::{JobError, JobErrorKind, JobInfo, Register};
use crate::{ErrorAction, Event, IoStatus, Status, Verb};
use disk::Error;
use ring::sync;
use std::any::Any;
use std::cell::{Cell, RefCell};
use std::rc::{Rc, Weak};

/// What makes a job this job.
pub(crate) struct Identity {
    pub(crate) id: String,
    pub(crate) kind: &'static str,
    pub(crate) device: String,
    pub(crate) auto_finalize: bool,
    pub(crate) auto_dismiss: bool,
}

/// The kind of a job that makes an image.
pub(crate) const CREATE: &str = "create";

/// How a job's work ended.
#[derive(Debug)]
pub(crate) enum End {
    Completed,
    Failed(String),
    Cancelled,
}

/// How a job that is ready is to end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Wish {
    /// By what it was started for.
    Complete,
    /// With everything copied, and nothing else changed.
    LeaveBe,
}

/// What a cancelled job shows as its error (`ECANCELED` in the C library's words, as QEMU does).
const CANCELLED: &str = "Operation canceled";

/// See the module.
pub(crate) struct Life {
    what: Identity,
    register: Weak<Register>,
    status: Cell<Status>,
    io_status: Cell<IoStatus>,
    paused: Cell<bool>,
    cancelled: Cell<bool>,
    finalize: Cell<bool>,
    /// What a job that is ready is to do.
    wish: Cell<Option<Wish>>,
    /// The end is being published: nothing can be asked any more.
    publishing: Cell<bool>,
    error: RefCell<Option<String>>,
    pub(crate) pace: Pace,
    pub(crate) progress: Progress,
    /// Told whenever the task may have something new to do.
    pub(crate) changed: sync::Event,
    /// What keeps other jobs off the disk, until the job is gone.
    claim: RefCell<Option<Box<dyn Any>>>,
}

impl Life {
    pub(crate) fn new(
        what: Identity,
        register: Weak<Register>,
        pace: Pace,
        progress: Progress,
        claim: Option<Box<dyn Any>>,
    ) -> Rc<Self> {
        Rc::new(Self {
            what,
            register,
            status: Cell::new(Status::Undefined),
            io_status: Cell::default(),
            paused: Cell::new(false),
            cancelled: Cell::new(false),
            finalize: Cell::new(false),
            wish: Cell::new(None),
            publishing: Cell::new(false),
            error: RefCell::default(),
            pace,
            progress,
            changed: sync::Event::new(),
            claim: RefCell::new(claim),
        })
    }

    pub(crate) fn id(&self) -> &str {
        &self.what.id
    }

    pub(crate) fn status(&self) -> Status {
        self.status.get()
    }

    pub(crate) fn info(&self) -> JobInfo {
        let status = self.status.get();
        let over = matches!(status, Status::Aborting | Status::Concluded | Status::Null);
        let made = (self.what.kind == CREATE).then_some((1, u64::from(over)));
        let (len, offset) = made.unwrap_or_else(|| {
            let len = if over { self.progress.final_len() } else { self.progress.len() };
            (len, self.progress.offset())
        });
        JobInfo {
            id: self.what.id.clone(),
            kind: self.what.kind,
            device: self.what.device.clone(),
            len,
            offset,
            speed: self.pace.rate(),
            busy: status == Status::Running || self.publishing.get() && !over,
            paused: self.paused.get(),
            cancelling: self.cancelled.get() && !over,
            ready: matches!(status, Status::Ready | Status::Standby),
            status,
            io_status: self.io_status.get(),
            auto_finalize: self.what.auto_finalize,
            auto_dismiss: self.what.auto_dismiss,
            error: self.error.borrow().clone(),
        }
    }

    // Verbs.

    pub(crate) fn cancel(&self, force: bool) -> Result<(), JobError> {
        self.allow(Verb::Cancel)?;
        if self.paused.get() && !force {
            let device = &self.what.id;
            return Err(wrong_state(format!("The block job for device '{device}' is currently paused")));
        }
        if matches!(self.status.get(), Status::Ready | Status::Standby) && !force {
            // What is copied is all there: it stays, and that is the end.
            self.wish.set(Some(self.wish.get().unwrap_or(Wish::LeaveBe)));
        } else {
            self.cancelled.set(true);
        }
        self.changed.notify_all();
        Ok(())
    }

    pub(crate) fn pause(&self) -> Result<(), JobError> {
        self.allow(Verb::Pause)?;
        if self.paused.replace(true) {
            return Err(wrong_state("Job is already paused".into()));
        }
        self.changed.notify_all();
        Ok(())
    }

    pub(crate) fn resume(&self) -> Result<(), JobError> {
        if !self.paused.get() {
            return Err(wrong_state("Can't resume a job that was not paused".into()));
        }
        self.allow(Verb::Resume)?;
        self.paused.set(false);
        self.io_status.set(IoStatus::Ok);
        self.wake_up();
        self.changed.notify_all();
        Ok(())
    }

    pub(crate) fn set_speed(&self, speed: u64) -> Result<(), JobError> {
        self.allow(Verb::SetSpeed)?;
        self.pace.set_rate(speed);
        self.changed.notify_all();
        Ok(())
    }

    pub(crate) fn complete(&self) -> Result<(), JobError> {
        self.allow(Verb::Complete)?;
        self.wish.set(Some(Wish::Complete));
        self.changed.notify_all();
        Ok(())
    }

    pub(crate) fn finalize(&self) -> Result<(), JobError> {
        self.allow(Verb::Finalize)?;
        if self.publishing.get() || self.finalize.replace(true) {
            return Err(self.refuse(Verb::Finalize));
        }
        self.changed.notify_all();
        Ok(())
    }

    pub(crate) fn dismiss(&self) -> Result<(), JobError> {
        self.allow(Verb::Dismiss)?;
        self.vanish();
        Ok(())
    }

    fn allow(&self, verb: Verb) -> Result<(), JobError> {
        if verb.allowed_in(self.status.get()) { Ok(()) } else { Err(self.refuse(verb)) }
    }

    fn refuse(&self, verb: Verb) -> JobError {
        let (id, status) = (&self.what.id, self.status.get());
        wrong_state(format!("Job '{id}' in state '{status}' cannot accept command verb '{verb}'"))
    }

    // What the task asks and tells.

    /// The job exists and runs.
    pub(crate) fn start(&self) {
        self.become_(Status::Created);
        self.become_(Status::Running);
    }

    pub(crate) fn is_cancelled(&self) -> bool {
        self.cancelled.get()
    }

    pub(crate) fn is_paused(&self) -> bool {
        self.paused.get()
    }

    /// Nothing is in flight any more and a pause is wanted: waits for its end, or for a cancel.
    pub(crate) async fn rest(&self) {
        loop {
            let changed = self.changed.wait();
            if !self.paused.get() || self.cancelled.get() {
                return;
            }
            match self.status.get() {
                Status::Running => self.become_(Status::Paused),
                Status::Ready => self.become_(Status::Standby),
                _ => {}
            }
            changed.await;
        }
    }

    /// An error was met and something is done about it.
    pub(crate) fn met_error(&self, write: bool, action: ErrorAction, error: &Error) {
        tracing::trace!(target: "job_error", job = self.what.id, write, action = action.name(), %error);
        self.emit(Event::Error { id: self.what.id.clone(), write, action });
    }

    /// An error stops the job until it is resumed.
    pub(crate) fn stop(&self, why: IoStatus) {
        self.io_status.set(why);
        self.paused.set(true);
    }

    /// Whether an error has stopped the job.
    pub(crate) fn is_stopped(&self) -> bool {
        self.io_status.get() != IoStatus::Ok
    }

    /// A job that rests does so no longer.
    fn wake_up(&self) {
        match self.status.get() {
            Status::Paused => self.become_(Status::Running),
            Status::Standby => self.become_(Status::Ready),
            _ => {}
        }
    }

    /// Everything is copied, and whoever writes is followed: it may be completed.
    pub(crate) fn ready(&self) {
        self.become_(Status::Ready);
        let (len, offset) = (self.progress.final_len(), self.progress.offset());
        self.emit(Event::Ready {
            id: self.what.id.clone(),
            kind: self.what.kind,
            len,
            offset,
            speed: self.pace.rate(),
        });
    }

    /// What is wished of a job that is ready.
    pub(crate) fn wish(&self) -> Option<Wish> {
        self.wish.get()
    }

    /// The work is done: waits for leave to publish it. `false` if the job was cancelled instead.
    pub(crate) async fn may_publish(&self) -> bool {
        self.become_(Status::Waiting);
        self.become_(Status::Pending);
        if !self.what.auto_finalize {
            self.emit(Event::Pending { id: self.what.id.clone(), kind: self.what.kind });
        }
        loop {
            let changed = self.changed.wait();
            if self.cancelled.get() {
                return false;
            }
            if self.what.auto_finalize || self.finalize.get() {
                self.publishing.set(true);
                return true;
            }
            changed.await;
        }
    }

    /// The end, however it came about. Emits everything that is left to say.
    pub(crate) fn conclude(&self, end: End) {
        self.wake_up();
        let (id, kind) = (self.what.id.clone(), self.what.kind);
        let (offset, speed) = (self.progress.offset(), self.pace.rate());
        let last = match end {
            End::Completed => {
                self.progress.finished();
                Event::Completed {
                    id,
                    kind,
                    len: self.progress.final_len(),
                    offset: self.progress.offset(),
                    speed,
                    error: None,
                }
            }
            End::Failed(error) => {
                *self.error.borrow_mut() = Some(error.clone());
                self.become_(Status::Aborting);
                Event::Completed { id, kind, len: self.progress.final_len(), offset, speed, error: Some(error) }
            }
            End::Cancelled => {
                *self.error.borrow_mut() = Some(CANCELLED.to_owned());
                self.become_(Status::Aborting);
                Event::Cancelled { id, kind, len: self.progress.final_len(), offset, speed }
            }
        };
        self.publishing.set(false);
        if self.what.kind != CREATE {
            self.emit(last);
        }
        self.become_(Status::Concluded);
        if self.what.auto_dismiss {
            self.vanish();
        }
        if let Some(register) = self.register.upgrade() {
            register.changed.notify_all();
        }
    }

    /// The job is gone.
    pub(crate) fn vanish(&self) {
        self.claim.borrow_mut().take();
        if let Some(register) = self.register.upgrade() {
            register.jobs.borrow_mut().retain(|job| !std::ptr::eq(&raw const **job, self));
        }
        self.become_(Status::Null);
    }

    fn become_(&self, next: Status) {
        let now = self.status.replace(next);
        debug_assert!(now.may_become(next), "{now} to {next}");
        tracing::trace!(target: "job_status", job = self.what.id, from = %now, to = %next);
        self.emit(Event::StatusChange { id: self.what.id.clone(), status: next });
    }

    fn emit(&self, event: Event) {
        if let Some(register) = self.register.upgrade() {
            (register.events)(event);
        }
    }
}

fn wrong_state(message: String) -> JobError {
    JobError { kind: JobErrorKind::WrongState, message }
}
