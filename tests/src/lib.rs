//! What the end-to-end tests and the bench stand on: peers, daemons, clients and guests.
//!
//! Nothing here links Headwater. It is driven as its users drive it, through its binary, its sockets and its images,
//! and whatever can be tried on Headwater can be tried on QEMU's programs by the same call, so that the harness itself
//! is tested with them (`tests/harness.rs`).
//!
//! A test begins with [`peer!`], naming what it needs. Sockets and images belong in a [`tempfile::TempDir`]; daemons and
//! guests are killed when dropped.
#![forbid(unsafe_code)]

pub mod front;
pub mod guest;
pub mod headwater;
pub mod kill;
pub mod libvirt;
pub mod master;
pub mod nbd;
pub mod nbdkit;
pub mod peer;
pub mod process;
pub mod qemu;
pub mod qmp;
pub mod random;
pub mod script;
pub mod sides;
pub mod storage;
pub mod twins;
pub mod vhost;
pub mod writer;

/// Whatever went wrong, in words for the reader of a failed test.
pub type Error = Box<dyn std::error::Error + Send + Sync>;

/// The result of a test and of everything a test calls.
pub type Result<T = ()> = std::result::Result<T, Error>;

/// An [`Error`] from a format string.
#[macro_export]
macro_rules! error {
    ($($arg:tt)*) => { $crate::Error::from(format!($($arg)*)) };
}
