//! Doors to a disk for guests: NBD and vhost-user-blk. Floor 5: an export knows a [`disk::Disk`], no format and no job.
#![deny(unsafe_code)]

pub mod nbd;
pub mod vhost_user;

use std::fmt;

/// Why an export could not start.
#[derive(Debug)]
pub struct ExportError {
    /// What was being done, with the address: `listen on /run/x.sock`.
    pub what: String,
    /// Why it failed.
    pub source: std::io::Error,
}

impl fmt::Display for ExportError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "could not {}: {}", self.what, self.source)
    }
}

impl std::error::Error for ExportError {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        Some(&self.source)
    }
}
