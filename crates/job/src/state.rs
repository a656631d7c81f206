//! A job's life: which states there are, which state may follow which, which verbs each allows (QMP's `JobStatus` and
//! `JobVerb`).
//!
//! **Invariant.** A job moves only along [`Status::may_become`]; a verb has an effect only where [`Verb::allowed_in`] says so.

use std::fmt;

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

impl Status {
    /// Every status, in the order of a life.
    pub const ALL: [Self; 11] = [
        Self::Undefined,
        Self::Created,
        Self::Running,
        Self::Paused,
        Self::Ready,
        Self::Standby,
        Self::Waiting,
        Self::Pending,
        Self::Aborting,
        Self::Concluded,
        Self::Null,
    ];

    /// The name QMP gives it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Undefined => "undefined",
            Self::Created => "created",
            Self::Running => "running",
            Self::Paused => "paused",
            Self::Ready => "ready",
            Self::Standby => "standby",
            Self::Waiting => "waiting",
            Self::Pending => "pending",
            Self::Aborting => "aborting",
            Self::Concluded => "concluded",
            Self::Null => "null",
        }
    }

    /// Whether `next` may follow. A job that pauses runs again before anything else becomes of it, cancelling included.
    pub fn may_become(self, next: Self) -> bool {
        use Status::{
            Aborting, Concluded, Created, Null, Paused, Pending, Ready, Running, Standby, Undefined, Waiting,
        };
        match self {
            Undefined => next == Created,
            Created => matches!(next, Running | Paused | Aborting | Null),
            Running => matches!(next, Paused | Ready | Waiting | Aborting),
            Paused => next == Running,
            Ready => matches!(next, Standby | Waiting | Aborting),
            Standby => next == Ready,
            Waiting => matches!(next, Pending | Aborting),
            Pending => matches!(next, Aborting | Concluded),
            Aborting => next == Concluded,
            Concluded => next == Null,
            Null => false,
        }
    }
}

impl fmt::Display for Status {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
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

impl Verb {
    /// Every verb.
    pub const ALL: [Self; 7] =
        [Self::Cancel, Self::Pause, Self::Resume, Self::SetSpeed, Self::Complete, Self::Finalize, Self::Dismiss];

    /// The name QMP gives it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Cancel => "cancel",
            Self::Pause => "pause",
            Self::Resume => "resume",
            Self::SetSpeed => "set-speed",
            Self::Complete => "complete",
            Self::Finalize => "finalize",
            Self::Dismiss => "dismiss",
        }
    }

    /// Whether a job of this status can be asked for it.
    pub fn allowed_in(self, status: Status) -> bool {
        use Status::{Concluded, Created, Paused, Pending, Ready, Running, Standby, Waiting};
        match self {
            Self::Cancel => matches!(status, Created | Running | Paused | Ready | Standby | Waiting | Pending),
            Self::Pause | Self::Resume | Self::SetSpeed => {
                matches!(status, Created | Running | Paused | Ready | Standby)
            }
            Self::Complete => matches!(status, Ready | Standby),
            Self::Finalize => status == Pending,
            Self::Dismiss => status == Concluded,
        }
    }
}

impl fmt::Display for Verb {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
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

impl IoStatus {
    /// The name QMP gives it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Ok => "ok",
            Self::Failed => "failed",
            Self::NoSpace => "nospace",
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_life_ends_in_null_and_null_is_the_end() {
        for start in Status::ALL {
            let mut reached = vec![start];
            let mut at = 0;
            while at < reached.len() {
                let from = reached[at];
                let next = Status::ALL.into_iter().filter(|to| from.may_become(*to) && !reached.contains(to));
                let next: Vec<Status> = next.collect();
                reached.extend(next);
                at += 1;
            }
            assert!(reached.contains(&Status::Null), "from {start}");
        }
        assert!(Status::ALL.into_iter().all(|next| !Status::Null.may_become(next)));
    }

    #[test]
    fn no_verb_reaches_a_job_that_is_gone_or_going() {
        for verb in Verb::ALL {
            for status in [Status::Undefined, Status::Aborting, Status::Null] {
                assert!(!verb.allowed_in(status), "{verb} in {status}");
            }
        }
    }
}
