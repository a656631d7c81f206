//! What jobs tell the world. Events are plain data, so that they can cross threads.

use crate::Status;

/// What was done about an error (QMP's `BlockErrorAction`).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[expect(missing_docs, reason = "documented by QMP's BlockErrorAction, whose names these are")]
pub enum ErrorAction {
    Ignore,
    Report,
    Stop,
}

impl ErrorAction {
    /// The name QMP gives it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Ignore => "ignore",
            Self::Report => "report",
            Self::Stop => "stop",
        }
    }
}

/// Something happened to a job. Emitted in order, after it is true.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Event {
    /// `JOB_STATUS_CHANGE`.
    StatusChange {
        /// Which job.
        id: String,
        /// Its status now.
        status: Status,
    },
    /// `BLOCK_JOB_COMPLETED`: with `error` only on failure.
    Completed {
        /// Which job (`device` in QMP).
        id: String,
        /// What kind of job.
        kind: &'static str,
        /// Bytes to copy in all.
        len: u64,
        /// Bytes copied.
        offset: u64,
        /// Bytes a second.
        speed: u64,
        /// What went wrong.
        error: Option<String>,
    },
    /// `BLOCK_JOB_CANCELLED`.
    Cancelled {
        /// Which job.
        id: String,
        /// What kind of job.
        kind: &'static str,
        /// Bytes to copy in all.
        len: u64,
        /// Bytes copied.
        offset: u64,
        /// Bytes a second.
        speed: u64,
    },
    /// `BLOCK_JOB_ERROR`.
    Error {
        /// Which job.
        id: String,
        /// `true`: it was writing.
        write: bool,
        /// What is done about it.
        action: ErrorAction,
    },
    /// `BLOCK_JOB_PENDING`: waits for finalize.
    Pending {
        /// Which job.
        id: String,
        /// What kind of job.
        kind: &'static str,
    },
    /// `BLOCK_JOB_READY`: can be completed by hand.
    Ready {
        /// Which job.
        id: String,
        /// What kind of job.
        kind: &'static str,
        /// Bytes to copy in all.
        len: u64,
        /// Bytes copied.
        offset: u64,
        /// Bytes a second.
        speed: u64,
    },
}

/// Takes events, on the shard, synchronously; it must not block and must not call back into the job's [`crate::Jobs`].
pub type Events = std::rc::Rc<dyn Fn(Event)>;
