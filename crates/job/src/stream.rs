//! The stream job: brings in what lies between a disk's top image and its base, then lets go of it.

use disk::{Disk, StreamBase};
use std::rc::Rc;

/// What a job does about an error while copying (QMP's `BlockdevOnError`).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum OnError {
    /// Ends with the error.
    #[default]
    Report,
    /// Goes on elsewhere; ends with the error after all else is copied, the backing reference kept.
    Ignore,
    /// Pauses until resumed, then tries the same place again.
    Stop,
    /// `Stop` for want of space, else `Report`.
    Enospc,
}

/// What to stream.
pub struct StreamOptions {
    /// The job's id; by default the disk's name.
    pub id: Option<String>,
    /// The disk.
    pub disk: Rc<Disk>,
    /// How far down.
    pub base: StreamBase,
    /// What the header shall call the base; by default what the chain calls it.
    pub backing_name: Option<String>,
    /// Bytes a second; 0 is unlimited.
    pub speed: u64,
    /// What to do about errors.
    pub on_error: OnError,
    /// Publish without waiting for [`crate::Jobs::finalize`].
    pub auto_finalize: bool,
    /// Disappear when concluded without waiting for [`crate::Jobs::dismiss`].
    pub auto_dismiss: bool,
}
