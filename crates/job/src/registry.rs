//! A shard's register of jobs: start, list, and every verb.

use crate::commit::{self, CommitOptions};
use crate::life::{CREATE, End, Identity, Life};
use crate::pace::Pace;
use crate::progress::Progress;
use crate::stream::{self, DiskTarget, Target};
use crate::{Events, IoStatus, OnError, Status, StreamOptions};
use disk::{ErrorKind, StreamBase};
use futures_util::future::LocalBoxFuture;
use ring::sync;
use std::any::Any;
use std::cell::{Cell, RefCell};
use std::fmt;
use std::rc::Rc;

/// Why a verb or a start was refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum JobErrorKind {
    /// No such job (QMP class `DeviceNotActive` for `block-job-*`).
    NotFound,
    /// The id is taken, or the disk has a job already.
    Busy,
    /// The state does not allow the verb.
    WrongState,
    /// An argument is off.
    InvalidArgument,
}

/// A refusal, in words for a user (QEMU's own, where it has them).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct JobError {
    /// For code to decide on.
    pub kind: JobErrorKind,
    /// For people.
    pub message: String,
}

impl fmt::Display for JobError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl std::error::Error for JobError {}

/// A job as `query-jobs` and `query-block-jobs` show it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct JobInfo {
    /// Its id.
    pub id: String,
    /// `stream`, `commit` or `create`.
    pub kind: &'static str,
    /// The disk it works on.
    pub device: String,
    /// Bytes to copy in all, as far as known: it grows while the job still counts, a cluster ahead of what is done.
    pub len: u64,
    /// Bytes copied; never more than `len`, never less than before.
    pub offset: u64,
    /// Bytes a second; 0 is unlimited.
    pub speed: u64,
    /// Whether it is at work now (not paused, not waiting).
    pub busy: bool,
    /// Whether a user or an error has paused it.
    pub paused: bool,
    /// Whether it was asked to stop and has not ended yet.
    pub cancelling: bool,
    /// Whether it can be completed by hand (a commit of an active layer).
    pub ready: bool,
    /// Its status.
    pub status: Status,
    /// Whether errors stopped it.
    pub io_status: IoStatus,
    /// See [`StreamOptions::auto_finalize`].
    pub auto_finalize: bool,
    /// See [`StreamOptions::auto_dismiss`].
    pub auto_dismiss: bool,
    /// What went wrong, once it did.
    pub error: Option<String>,
}

impl JobInfo {
    /// Whether it works on a disk: the others are in `query-jobs` only, and know the verbs `job-*` only.
    pub fn is_block_job(&self) -> bool {
        self.kind != CREATE
    }
}

/// A shard's jobs. There are never more than disks: a job keeps its disk to itself until it is gone.
pub struct Jobs {
    register: Rc<Register>,
}

/// What jobs know of their register.
pub(crate) struct Register {
    pub(crate) jobs: RefCell<Vec<Rc<Life>>>,
    pub(crate) events: Events,
    /// Told when a job has ended.
    pub(crate) changed: sync::Event,
    closed: Cell<bool>,
}

/// A job that is about to start.
pub(crate) struct Start {
    pub(crate) id: Option<String>,
    pub(crate) kind: &'static str,
    pub(crate) device: String,
    pub(crate) speed: u64,
    pub(crate) on_error: OnError,
    pub(crate) auto_finalize: bool,
    pub(crate) auto_dismiss: bool,
}

impl Jobs {
    /// An empty register that reports to `events`.
    pub fn new(events: Events) -> Rc<Self> {
        let register =
            Register { jobs: RefCell::default(), events, changed: sync::Event::new(), closed: Cell::new(false) };
        Rc::new(Self { register: Rc::new(register) })
    }

    /// Starts a stream. Call on the shard's ring.
    pub fn stream(&self, options: StreamOptions) -> Result<(), JobError> {
        let StreamOptions { id, disk, base, backing_name, speed, on_error, auto_finalize, auto_dismiss, hold } =
            options;
        match &base {
            StreamBase::Nothing if backing_name.is_some() => {
                return Err(invalid("backing file specified, but streaming the entire chain".into()));
            }
            StreamBase::Node(node) if disk.find_base(node).as_ref() != Some(&base) => {
                return Err(invalid(format!("Can't find '{node}' in the backing chain")));
            }
            _ => {}
        }
        if disk.read_only() {
            return Err(invalid(format!(
                "Block node '{}' is read-only; serve it without --read-only to stream into it",
                disk.name()
            )));
        }
        let device = disk.name().to_owned();
        let claim = disk.claim(id.as_deref().unwrap_or(&device)).map_err(|error| match error.kind() {
            ErrorKind::Busy => busy(format!("Node '{device}' is busy: block device is in use by block job: stream")),
            _ => invalid(error.to_string()),
        })?;
        let start = Start { id, kind: "stream", device, speed, on_error, auto_finalize, auto_dismiss };
        self.start(start, Rc::new(DiskTarget { disk, base, backing_name }), Some(Box::new((claim, hold))))
    }

    /// Starts a job on whatever can be streamed into.
    pub(crate) fn start(
        &self,
        start: Start,
        target: Rc<dyn Target>,
        claim: Option<Box<dyn Any>>,
    ) -> Result<(), JobError> {
        let on_error = start.on_error;
        let life = self.begin(start, (target.size(), target.cluster_size()), claim)?;
        drop(ring::spawn(stream::run(life, target, on_error)));
        Ok(())
    }

    /// Starts a commit. Call on the shard's ring. The id is checked by [`Jobs::check_id`] before anything is prepared for it.
    pub fn commit(&self, options: CommitOptions) -> Result<(), JobError> {
        let (start, target, hold) = options.apart();
        let on_error = start.on_error;
        let life = self.begin(start, (target.size(), target.cluster_size()), hold)?;
        drop(ring::spawn(commit::run(life, target, on_error)));
        Ok(())
    }

    /// Starts a job that makes an image: `work` does it, and says in words what went wrong. It is no block job: it works on no disk, is
    /// told of by its status alone, and waits for its dismissal.
    pub fn create(
        &self,
        id: String,
        work: LocalBoxFuture<'static, std::result::Result<(), String>>,
    ) -> Result<(), JobError> {
        let start = Start {
            id: Some(id),
            kind: CREATE,
            device: String::new(),
            speed: 0,
            on_error: OnError::Report,
            auto_finalize: true,
            auto_dismiss: false,
        };
        let life = self.begin(start, (1, 1), None)?;
        drop(ring::spawn(async move {
            let end = match work.await {
                Ok(()) if life.may_publish().await => End::Completed,
                Ok(()) => End::Cancelled,
                Err(why) => End::Failed(why),
            };
            life.conclude(end);
        }));
        Ok(())
    }

    /// Refuses what cannot be the id of a new job.
    pub fn check_id(&self, id: &str) -> Result<(), JobError> {
        if !is_id(id) {
            return Err(invalid(format!("Invalid job ID '{id}'")));
        }
        if self.find(id).is_ok() {
            return Err(busy(format!("Job ID '{id}' already in use")));
        }
        Ok(())
    }

    /// Registers a job, which is on its way from then on.
    fn begin(
        &self,
        start: Start,
        (size, cluster): (u64, u64),
        claim: Option<Box<dyn Any>>,
    ) -> Result<Rc<Life>, JobError> {
        let Start { id, kind, device, speed, auto_finalize, auto_dismiss, .. } = start;
        // A disk may be called what no job could be; its job is then called so, too.
        if let Some(id) = id.as_ref().filter(|id| !is_id(id)) {
            return Err(invalid(format!("Invalid job ID '{id}'")));
        }
        let id = id.unwrap_or_else(|| device.clone());
        if self.find(&id).is_ok() {
            return Err(busy(format!("Job ID '{id}' already in use")));
        }
        if self.register.closed.get() {
            return Err(busy("Headwater is shutting down".into()));
        }
        let progress = Progress::new(size, cluster);
        let what = Identity { id, kind, device, auto_finalize, auto_dismiss };
        let life = Life::new(what, Rc::downgrade(&self.register), Pace::new(speed, cluster), progress, claim);
        self.register.jobs.borrow_mut().push(Rc::clone(&life));
        life.start();
        Ok(life)
    }

    /// All jobs there are, concluded ones that wait for dismissal included, oldest first.
    pub fn list(&self) -> Vec<JobInfo> {
        self.register.jobs.borrow().iter().map(|job| job.info()).collect()
    }

    /// One job.
    pub fn info(&self, id: &str) -> Option<JobInfo> {
        self.find(id).ok().map(|job| job.info())
    }

    /// Asks it to stop; without `force` a paused job is refused, and one that is ready ends with everything copied and nothing else
    /// changed (`BLOCK_JOB_COMPLETED`). The end comes as an event: `BLOCK_JOB_CANCELLED`, or
    /// `BLOCK_JOB_COMPLETED` if the end was being published already.
    pub fn cancel(&self, id: &str, force: bool) -> Result<(), JobError> {
        self.find(id)?.cancel(force)
    }

    /// Stops issuing; what is in flight ends, then the status says `paused`.
    pub fn pause(&self, id: &str) -> Result<(), JobError> {
        self.find(id)?.pause()
    }

    /// Goes on (also after an error that stopped it).
    pub fn resume(&self, id: &str) -> Result<(), JobError> {
        self.find(id)?.resume()
    }

    /// Changes the speed limit, in bytes a second; 0 is unlimited. Takes effect at once, also on a chunk that waits.
    pub fn set_speed(&self, id: &str, speed: u64) -> Result<(), JobError> {
        self.find(id)?.set_speed(speed)
    }

    /// Ends a job that is ready by what it was started for; [`JobErrorKind::WrongState`] where it is not (a stream never is).
    pub fn complete(&self, id: &str) -> Result<(), JobError> {
        self.find(id)?.complete()
    }

    /// Lets a pending job publish.
    pub fn finalize(&self, id: &str) -> Result<(), JobError> {
        self.find(id)?.finalize()
    }

    /// Removes a concluded job.
    pub fn dismiss(&self, id: &str) -> Result<(), JobError> {
        self.find(id)?.dismiss()
    }

    /// Cancels all and waits until none runs (shutdown). No job starts any more.
    pub async fn shut_down(&self) {
        self.register.closed.set(true);
        for job in self.all() {
            // Refused only where the end has come or is coming anyway.
            let _ = job.cancel(true);
        }
        loop {
            let changed = self.register.changed.wait();
            if self.all().iter().all(|job| job.status() == Status::Concluded) {
                break;
            }
            changed.await;
        }
        for job in self.all() {
            job.vanish();
        }
    }

    fn all(&self) -> Vec<Rc<Life>> {
        self.register.jobs.borrow().clone()
    }

    fn find(&self, id: &str) -> Result<Rc<Life>, JobError> {
        let found = self.register.jobs.borrow().iter().find(|job| job.id() == id).cloned();
        found.ok_or_else(|| JobError { kind: JobErrorKind::NotFound, message: format!("Block job '{id}' not found") })
    }
}

/// Whether `id` is what QEMU takes for an id: a letter, then letters, digits, `-`, `.` and `_`.
pub fn is_id(id: &str) -> bool {
    id.starts_with(|c: char| c.is_ascii_alphabetic())
        && id.chars().all(|c| c.is_ascii_alphanumeric() || matches!(c, '-' | '.' | '_'))
}

fn invalid(message: String) -> JobError {
    JobError { kind: JobErrorKind::InvalidArgument, message }
}

fn busy(message: String) -> JobError {
    JobError { kind: JobErrorKind::Busy, message }
}
