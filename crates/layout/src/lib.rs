//! On-disk structures of every image format, and the newtyped addresses everything above speaks.
//!
//! Nothing here does I/O, and nothing allocates from a length that was not bounded first.
#![forbid(unsafe_code)]

pub mod addr;
pub mod field;
pub mod luks;
mod number;
pub mod packed;
pub mod parallels;
pub mod qcow;
pub mod qcow2;
pub mod qed;
pub mod vdi;
pub mod vhdx;
pub mod vmdk;
pub mod vpc;

pub use addr::{GuestOffset, GuestRange, HostOffset, HostRange};
