//! Descriptors that whoever started the process handed down, known by their numbers.
//!
//! **Invariant.** Each number is taken once, and never one of the first three.

use std::collections::BTreeSet;
use std::io;
use std::os::fd::{FromRawFd, OwnedFd, RawFd};
use std::sync::{Mutex, PoisonError};

/// Numbers that were taken.
static TAKEN: Mutex<BTreeSet<RawFd>> = Mutex::new(BTreeSet::new());

/// The descriptor of this number, which the process has been started with. Call it before anything else is opened: it cannot tell an
/// inherited descriptor from one of the process's own.
///
/// # Errors
/// It is not open, is standard input, output or error, or was taken before.
pub fn inherited(number: RawFd) -> io::Result<OwnedFd> {
    if number <= libc::STDERR_FILENO {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "the first three descriptors are not for this"));
    }
    // SAFETY: asks for a number's flags, and touches no memory.
    let flags = unsafe { libc::fcntl(number, libc::F_GETFD) };
    if flags < 0 {
        return Err(io::Error::last_os_error());
    }
    if !TAKEN.lock().unwrap_or_else(PoisonError::into_inner).insert(number) {
        return Err(io::Error::new(io::ErrorKind::AlreadyExists, "it is in use already"));
    }
    // SAFETY: it is open, and given to one owner only: what nobody handed down is no number that a user names before anything is opened.
    let fd = unsafe { OwnedFd::from_raw_fd(number) };
    // Programs that this one starts have no use for it.
    // SAFETY: sets a flag of a descriptor that is open, and touches no memory.
    unsafe { libc::fcntl(number, libc::F_SETFD, flags | libc::FD_CLOEXEC) };
    Ok(fd)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_is_open_and_once() {
        assert!(inherited(1).is_err());
        assert!(inherited(999_999).is_err());
        let (ours, theirs) = std::os::unix::net::UnixStream::pair().unwrap();
        let number = std::os::fd::IntoRawFd::into_raw_fd(theirs);
        let fd = inherited(number).unwrap();
        assert!(inherited(number).is_err());
        let mut theirs = std::os::unix::net::UnixStream::from(fd);
        std::io::Write::write_all(&mut theirs, b"x").unwrap();
        let mut byte = [0];
        std::io::Read::read_exact(&mut { ours }, &mut byte).unwrap();
        assert_eq!(&byte, b"x");
    }
}
