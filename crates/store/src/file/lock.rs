//! Image locks as QEMU lays them out, so that its programs and ours keep out of each other's way.
//!
//! Each of a few permissions has a number. Whoever uses permission *n* holds a shared lock on byte 100 + *n* of the file;
//! whoever does not want others to use it holds one on byte 200 + *n*. Nobody ever locks exclusively: a conflict is found
//! by asking, after one's own locks are in place, whether somebody else holds the opposite byte. Two who come at the same
//! moment may both be refused, never both admitted. The locks belong to the open file description and go with it.
//!
//! They are held on the very description that I/O goes through, so that they outlive a killed process until the kernel has
//! carried out, or given up, the last write it had in flight. Whoever opens the file next may rely on that; for the moments
//! it takes, [`acquire`] asks again before it refuses.

use crate::{Error, ErrorKind, Operation, Result};
use ring::lock::{self, Lock};
use std::io;
use std::os::fd::BorrowedFd;
use std::thread;
use std::time::{Duration, Instant};

/// How long a predecessor that was killed may take to let go. Its writes in flight end within milliseconds on a medium that
/// works at all; a user who opens an image that is in use waits this long for the refusal.
const PATIENCE: Duration = Duration::from_secs(2);

/// How often to ask meanwhile.
const ASK_EVERY: Duration = Duration::from_millis(10);

/// First byte for "I use this permission".
const USED: u64 = 100;
/// First byte for "nobody else shall use this permission".
const REFUSED: u64 = 200;

/// Reading, and relying on what is read.
const CONSISTENT_READ: u64 = 0;
/// Changing what others read.
const WRITE: u64 = 1;
/// Changing the length.
const RESIZE: u64 = 3;

/// What an open file uses, and what it refuses to others.
#[derive(Clone, Copy)]
pub(super) struct Claim {
    uses: &'static [u64],
    refuses: &'static [u64],
}

impl Claim {
    /// A writer: alone in writing; others may not even rely on reading.
    const WRITER: Self = Self { uses: &[CONSISTENT_READ, WRITE, RESIZE], refuses: &[WRITE, RESIZE] };
    /// A reader, also of a backing file: any number of them, no writer.
    const READER: Self = Self { uses: &[CONSISTENT_READ], refuses: &[WRITE, RESIZE] };

    pub(super) fn of(read_only: bool) -> Self {
        if read_only { Self::READER } else { Self::WRITER }
    }

    fn bytes(self) -> impl Iterator<Item = u64> {
        let uses = self.uses.iter().map(|permission| USED + permission);
        uses.chain(self.refuses.iter().map(|permission| REFUSED + permission))
    }
}

/// Who is in the way.
enum Conflict {
    /// Somebody uses what we refuse.
    Used(u64),
    /// Somebody refuses what we use.
    Refused(u64),
}

/// Takes the locks, or says who is in the way (then, too, some locks are held until the description is closed). A file
/// system without such locks is used without, with a warning. Blocks.
pub(super) fn acquire(file: BorrowedFd<'_>, name: &str, claim: Claim, read_only: bool) -> Result<()> {
    let deadline = Instant::now() + PATIENCE;
    let mut answer = try_acquire(file, claim);
    while matches!(answer, Ok(Some(_))) && Instant::now() < deadline {
        // Not while holding some: two who wait for each other would both be refused.
        release(file).map_err(|error| Error::from_io(Operation::Lock, name, None, error))?;
        thread::sleep(ASK_EVERY);
        answer = try_acquire(file, claim);
    }
    match answer {
        Ok(None) => Ok(()),
        Ok(Some(conflict)) => {
            Err(Error::new(ErrorKind::Locked, Operation::Lock, name, None, describe(&conflict, read_only)))
        }
        Err(error) if has_none(&error) => {
            tracing::warn!(
                "'{name}' lies on a file system without locks: nothing keeps others from writing it ({error})"
            );
            Ok(())
        }
        Err(error) => Err(Error::from_io(Operation::Lock, name, None, error)),
    }
}

/// Gives all locks up, also for duplicates of the descriptor. Blocks.
pub(super) fn release(file: BorrowedFd<'_>) -> io::Result<()> {
    lock::set(file, Lock::Unlocked, USED, REFUSED - USED + 100).map(drop)
}

fn try_acquire(file: BorrowedFd<'_>, claim: Claim) -> io::Result<Option<Conflict>> {
    for byte in claim.bytes() {
        if !lock::set(file, Lock::Shared, byte, 1)? {
            return Ok(Some(if byte < REFUSED {
                Conflict::Refused(byte - USED)
            } else {
                Conflict::Used(byte - REFUSED)
            }));
        }
    }
    for permission in claim.refuses {
        if lock::refused(file, Lock::Exclusive, USED + permission, 1)? {
            return Ok(Some(Conflict::Used(*permission)));
        }
    }
    for permission in claim.uses {
        if lock::refused(file, Lock::Exclusive, REFUSED + permission, 1)? {
            return Ok(Some(Conflict::Refused(*permission)));
        }
    }
    Ok(None)
}

fn describe(conflict: &Conflict, read_only: bool) -> String {
    let verb = |permission: &u64| match *permission {
        CONSISTENT_READ => "read",
        RESIZE => "resize",
        _ => "write",
    };
    let who = match conflict {
        Conflict::Used(permission) => format!("it is open elsewhere to {} it", verb(permission)),
        Conflict::Refused(permission) => format!("it is open elsewhere, where nobody else may {} it", verb(permission)),
    };
    let remedy = if read_only {
        "Close it there, or read it all the same (it may change meanwhile) with -U"
    } else {
        "Close it there first"
    };
    format!("{who}: is another process using the image? {remedy}")
}

/// Whether the file system has no such locks at all.
fn has_none(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EINVAL | libc::ENOLCK | libc::ENOSYS | libc::EOPNOTSUPP))
}
