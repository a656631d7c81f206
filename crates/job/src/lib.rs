//! Long work on a disk. Floor 5: a job knows [`disk::Disk`]; of what lies below only a cluster's size and what an error was about.
//!
//! [`Jobs`] is a shard's register of jobs; [`stream`] and [`commit`] are the kinds there are. The state machine and its names are those
//! that QMP documents (`JobStatus`).
//!
//! # Invariants
//! * `completed` with success is emitted only after the backing reference is dropped or rewritten *durably* (a stream), or after
//!   what was carried down is durable and the layers are let go of (a commit).
//! * An ignored error never lets the backing reference go: the job then ends with that error and the chain stays.
//! * Progress counts only what must be copied and never runs backwards.
//! * Cancelling keeps what has arrived, and is quick: nothing new is issued, what is in flight is awaited.
//!
//! # How it is put together
//! A job's [`life`] answers verbs at once and keeps what they asked for; one task for each job does the work ([`copy`] is
//! its loop) and looks at what was asked for whenever it wakes. Nothing but that task moves a job to its end.
#![forbid(unsafe_code)]

pub mod ahead;
mod commit;
pub mod event;
pub mod registry;
pub mod state;
pub mod stream;

mod copy;
mod flight;
mod life;
mod pace;
mod progress;
mod window;

pub use commit::{CommitOptions, Ending};
pub use event::{ErrorAction, Event, Events};
pub use registry::{JobError, JobErrorKind, JobInfo, Jobs, is_id};
pub use state::{IoStatus, Status, Verb};
pub use stream::{OnError, StreamOptions};

#[cfg(test)]
mod tests;
