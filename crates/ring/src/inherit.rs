//! Descriptors that whoever started the process handed down, known by their numbers.
//!
//! **Invariant.** A number is taken before anything of the process's own could have it, once, by one owner, and never one of the
//! first three.

use std::collections::BTreeMap;
use std::io;
use std::os::fd::{FromRawFd, OwnedFd, RawFd};
use std::sync::{Mutex, PoisonError};

/// What was taken; gone once somebody has it.
static HANDED: Mutex<BTreeMap<RawFd, Option<OwnedFd>>> = Mutex::new(BTreeMap::new());

/// Takes the descriptor of this number, which the process has been started with, for [`inherited`]. Call it before anything else is
/// opened: it cannot tell an inherited descriptor from one of the process's own.
///
/// # Errors
/// It is not open, is standard input, output or error, or was taken before.
pub fn hand_over(number: RawFd) -> io::Result<()> {
    if number <= libc::STDERR_FILENO {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "the first three descriptors are not for this"));
    }
    let mut handed = HANDED.lock().unwrap_or_else(PoisonError::into_inner);
    if handed.contains_key(&number) {
        return Err(io::Error::new(io::ErrorKind::AlreadyExists, "it is taken already"));
    }
    // SAFETY: asks for a number's flags, and touches no memory.
    let flags = unsafe { libc::fcntl(number, libc::F_GETFD) };
    if flags < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: it is open, and given to one owner only: nothing of the process's own is open yet.
    let fd = unsafe { OwnedFd::from_raw_fd(number) };
    // Programs that this one starts have no use for it.
    // SAFETY: sets a flag of a descriptor that is open, and touches no memory.
    unsafe { libc::fcntl(number, libc::F_SETFD, flags | libc::FD_CLOEXEC) };
    handed.insert(number, Some(fd));
    Ok(())
}

/// The descriptor that was taken by this number.
///
/// # Errors
/// There is none, or somebody has it.
pub fn inherited(number: RawFd) -> io::Result<OwnedFd> {
    let mut handed = HANDED.lock().unwrap_or_else(PoisonError::into_inner);
    match handed.get_mut(&number).map(Option::take) {
        Some(Some(fd)) => Ok(fd),
        Some(None) => Err(io::Error::new(io::ErrorKind::AlreadyExists, "it is in use already")),
        None => Err(io::Error::new(io::ErrorKind::NotFound, "no such descriptor was handed over at the start")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_is_open_and_once() {
        assert!(hand_over(1).is_err() && inherited(1).is_err());
        assert!(hand_over(999_999).is_err() && inherited(999_999).is_err());
        let (ours, theirs) = std::os::unix::net::UnixStream::pair().unwrap();
        let number = std::os::fd::IntoRawFd::into_raw_fd(theirs);
        assert!(inherited(number).is_err(), "open, and the process's own for all it knows");
        hand_over(number).unwrap();
        assert!(hand_over(number).is_err());
        let fd = inherited(number).unwrap();
        assert!(inherited(number).is_err());
        let mut theirs = std::os::unix::net::UnixStream::from(fd);
        std::io::Write::write_all(&mut theirs, b"x").unwrap();
        let mut byte = [0];
        std::io::Read::read_exact(&mut { ours }, &mut byte).unwrap();
        assert_eq!(&byte, b"x");
    }
}
