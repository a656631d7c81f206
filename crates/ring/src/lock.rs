//! Byte-range locks that belong to an open file description (`F_OFD_SETLK`), not to the process.
//!
//! They keep one description's holder out of another's way, also within one process, and go with the description's last
//! descriptor. Calls never wait for another holder, but may wait for a server: run them in [`crate::unblock`].

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

/// What to hold, or ask about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Lock {
    /// Together with other shared holders. The descriptor must be open for reading.
    Shared,
    /// Alone. To take it, the descriptor must be open for writing; to ask, it need not be.
    Exclusive,
    /// Not at all.
    Unlocked,
}

/// Takes (or changes, or gives up) the lock on `len` bytes from `start`. `false`: somebody else is in the way.
pub fn set(file: BorrowedFd<'_>, lock: Lock, start: u64, len: u64) -> io::Result<bool> {
    let mut request = describe(lock, start, len)?;
    match control(file, libc::F_OFD_SETLK, &mut request) {
        Ok(()) => Ok(true),
        Err(error) if matches!(error.raw_os_error(), Some(libc::EAGAIN | libc::EACCES)) => Ok(false),
        Err(error) => Err(error),
    }
}

/// Whether somebody else (another open file description, or a process-wide lock) holds what would refuse `lock` on
/// `len` bytes from `start`.
pub fn refused(file: BorrowedFd<'_>, lock: Lock, start: u64, len: u64) -> io::Result<bool> {
    let mut request = describe(lock, start, len)?;
    control(file, libc::F_OFD_GETLK, &mut request)?;
    Ok(request.l_type != libc::F_UNLCK as libc::c_short)
}

fn describe(lock: Lock, start: u64, len: u64) -> io::Result<libc::flock> {
    let range = |value: u64| libc::off_t::try_from(value).map_err(|_| io::Error::from_raw_os_error(libc::EOVERFLOW));
    let kind = match lock {
        Lock::Shared => libc::F_RDLCK,
        Lock::Exclusive => libc::F_WRLCK,
        Lock::Unlocked => libc::F_UNLCK,
    };
    // `l_pid` must be 0 for these locks.
    Ok(libc::flock {
        l_type: kind as libc::c_short,
        l_whence: libc::SEEK_SET as libc::c_short,
        l_start: range(start)?,
        l_len: range(len)?,
        l_pid: 0,
    })
}

fn control(file: BorrowedFd<'_>, command: libc::c_int, request: &mut libc::flock) -> io::Result<()> {
    loop {
        // SAFETY: the descriptor is open while borrowed; both commands take a pointer to one `flock`, which they read
        // and `F_OFD_GETLK` writes, and which outlives the call.
        let answer = unsafe { libc::fcntl(file.as_raw_fd(), command, std::ptr::from_mut(request)) };
        if answer != -1 {
            return Ok(());
        }
        let error = io::Error::last_os_error();
        if error.kind() != io::ErrorKind::Interrupted {
            return Err(error);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::AsFd;

    #[test]
    fn two_descriptions_of_one_process_refuse_each_other() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let (a, b) = (file.reopen().unwrap(), file.reopen().unwrap());
        assert!(set(a.as_fd(), Lock::Shared, 100, 1).unwrap());
        assert!(set(b.as_fd(), Lock::Shared, 100, 1).unwrap(), "readers share");
        assert!(!set(b.as_fd(), Lock::Exclusive, 100, 1).unwrap());
        assert!(refused(a.as_fd(), Lock::Exclusive, 100, 1).unwrap());
        assert!(!refused(a.as_fd(), Lock::Shared, 100, 1).unwrap());
        assert!(!refused(a.as_fd(), Lock::Exclusive, 101, 1).unwrap());
        drop(b);
        assert!(
            !refused(a.as_fd(), Lock::Exclusive, 100, 1).unwrap(),
            "gone with its description; one's own is no obstacle"
        );
        assert!(set(a.as_fd(), Lock::Unlocked, 100, 1).unwrap());
    }

    #[test]
    fn ranges_past_any_file_are_an_error() {
        let file = tempfile::tempfile().unwrap();
        assert!(set(file.as_fd(), Lock::Shared, u64::MAX, 1).is_err());
    }
}
