//! A job's life: which states there are, which verbs each allows (QMP's `JobStatus` and `JobVerb`).

/// Where a job is in its life.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[expect(missing_docs, reason = "documented by QMP's JobStatus, whose names these are")]
pub enum Status {
    Undefined,
    Created,
    Running,
    Paused,
    Ready,
    Standby,
    Waiting,
    Pending,
    Aborting,
    Concluded,
    Null,
}

/// What can be asked of a job.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[expect(missing_docs, reason = "documented by QMP's JobVerb, whose names these are")]
pub enum Verb {
    Cancel,
    Pause,
    Resume,
    SetSpeed,
    Complete,
    Finalize,
    Dismiss,
}

/// Whether a job runs into errors (QMP's `BlockDeviceIoStatus`).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum IoStatus {
    /// No error stopped it.
    #[default]
    Ok,
    /// Stopped by an error.
    Failed,
    /// Stopped for want of space.
    NoSpace,
}
