//! A shard's register of jobs: start, list, and every verb.

use crate::{Events, IoStatus, Status, StreamOptions};
use std::fmt;

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
    /// `stream`.
    pub kind: &'static str,
    /// The disk it works on.
    pub device: String,
    /// Bytes to copy in all, as far as known.
    pub len: u64,
    /// Bytes copied; never more than `len`, never less than before.
    pub offset: u64,
    /// Bytes a second; 0 is unlimited.
    pub speed: u64,
    /// Whether it is at work now (not paused, not waiting).
    pub busy: bool,
    /// Whether a user or an error has paused it.
    pub paused: bool,
    /// Whether it can be completed by hand (never for a stream).
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

/// A shard's jobs.
pub struct Jobs {
    _todo: (),
}

impl Jobs {
    /// An empty register that reports to `events`.
    pub fn new(events: Events) -> std::rc::Rc<Self> {
        let _ = events;
        todo!()
    }

    /// Starts a stream. Call on the shard's ring.
    pub fn stream(&self, options: StreamOptions) -> Result<(), JobError> {
        let _ = options;
        todo!()
    }

    /// All jobs there are, concluded ones that wait for dismissal included, oldest first.
    pub fn list(&self) -> Vec<JobInfo> {
        todo!()
    }

    /// One job.
    pub fn info(&self, id: &str) -> Option<JobInfo> {
        let _ = id;
        todo!()
    }

    /// Asks it to stop; `force` skips a pause. The end comes as an event.
    pub fn cancel(&self, id: &str, force: bool) -> Result<(), JobError> {
        let _ = (id, force);
        todo!()
    }

    /// Stops issuing; what is in flight ends.
    pub fn pause(&self, id: &str) -> Result<(), JobError> {
        let _ = id;
        todo!()
    }

    /// Goes on (also after an error that stopped it).
    pub fn resume(&self, id: &str) -> Result<(), JobError> {
        let _ = id;
        todo!()
    }

    /// Changes the speed limit, in bytes a second; 0 is unlimited.
    pub fn set_speed(&self, id: &str, speed: u64) -> Result<(), JobError> {
        let _ = (id, speed);
        todo!()
    }

    /// A stream has nothing to complete: always [`JobErrorKind::WrongState`].
    pub fn complete(&self, id: &str) -> Result<(), JobError> {
        let _ = id;
        todo!()
    }

    /// Lets a pending job publish.
    pub fn finalize(&self, id: &str) -> Result<(), JobError> {
        let _ = id;
        todo!()
    }

    /// Removes a concluded job.
    pub fn dismiss(&self, id: &str) -> Result<(), JobError> {
        let _ = id;
        todo!()
    }

    /// Cancels all and waits until none runs (shutdown).
    pub async fn shut_down(&self) {
        todo!()
    }
}
