//! Failures as a monitor reports them: a class for programs, a sentence for people.

use job::{JobError, JobErrorKind};
use std::fmt;

/// QMP's error classes. Everything that needs no telling apart is `GenericError`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ErrorClass {
    /// Anything without a class of its own.
    GenericError,
    /// No such command, or not now.
    CommandNotFound,
    /// No such device or node (2011's commands only).
    DeviceNotFound,
    /// The device has a job already, or the job is being cancelled already (2011's commands only).
    DeviceInUse,
    /// The device has no job (2011's `block_job_*` on an idle device).
    DeviceNotActive,
}

impl ErrorClass {
    /// The name on the wire.
    pub fn name(self) -> &'static str {
        match self {
            Self::GenericError => "GenericError",
            Self::CommandNotFound => "CommandNotFound",
            Self::DeviceNotFound => "DeviceNotFound",
            Self::DeviceInUse => "DeviceInUse",
            Self::DeviceNotActive => "DeviceNotActive",
        }
    }
}

/// Why something an operator asked for did not happen.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Failure {
    /// For programs.
    pub class: ErrorClass,
    /// For people.
    pub desc: String,
}

impl Failure {
    /// Without a class of its own.
    pub fn generic(desc: impl Into<String>) -> Self {
        Self { class: ErrorClass::GenericError, desc: desc.into() }
    }

    /// No node of that name, where only nodes are meant.
    pub fn no_node(name: &str) -> Self {
        Self::generic(format!("Cannot find device='' nor node-name='{name}'"))
    }

    /// No device or node of that name, in QEMU's words (whose class for it is `GenericError` today).
    pub fn no_device(name: &str) -> Self {
        Self::generic(format!("Cannot find device='{name}' nor node-name='{name}'"))
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.desc)
    }
}

impl std::error::Error for Failure {}

impl From<disk::Error> for Failure {
    fn from(error: disk::Error) -> Self {
        Self::generic(error.to_string())
    }
}

impl From<ring::Closed> for Failure {
    fn from(_: ring::Closed) -> Self {
        Self::generic("Headwater is shutting down")
    }
}

impl From<JobError> for Failure {
    fn from(error: JobError) -> Self {
        let class = match error.kind {
            JobErrorKind::NotFound => ErrorClass::DeviceNotActive,
            _ => ErrorClass::GenericError,
        };
        Self { class, desc: error.message }
    }
}

impl From<export::ExportError> for Failure {
    fn from(error: export::ExportError) -> Self {
        Self::generic(error.to_string())
    }
}
