//! Sharing what two files hold, where their file system can (`FICLONERANGE`): nothing is copied, no space is taken until one of
//! them changes.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

/// `struct file_clone_range` of the kernel's `linux/fs.h`.
#[repr(C)]
struct CloneRange {
    source: i64,
    source_offset: u64,
    source_length: u64,
    offset: u64,
}

/// Makes `len` bytes of `into` at `to` share what `from` holds at `at`. Both lie on one file system that can do it, and everything
/// is a multiple of its blocks (but for a part up to the end of `from`). Whole or an error; may wait for the medium: run it in
/// [`crate::unblock`].
pub fn share(from: BorrowedFd<'_>, at: u64, len: u64, into: BorrowedFd<'_>, to: u64) -> io::Result<()> {
    let request = CloneRange { source: from.as_raw_fd().into(), source_offset: at, source_length: len, offset: to };
    // SAFETY: both descriptors are open while borrowed; the command reads one structure of this layout, which outlives the call.
    let answer = unsafe { libc::ioctl(into.as_raw_fd(), libc::FICLONERANGE, &raw const request) };
    if answer < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}
