//! Which parts of a file are holes: `SEEK_DATA` and `SEEK_HOLE`, with the last answer kept.
//!
//! **Invariant.** A kept run says of a range what the file said after the last change to it had completed: each change
//! drops what it contradicts, and bars answers that were under way from being kept.

use super::{FileStore, Open};
use crate::{Backing, HostExtent};
use layout::{HostOffset, HostRange};
use rustix::fs::SeekFrom;
use rustix::io::Errno;
use std::cell::Cell;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;

/// What the file said last.
#[derive(Default)]
pub(super) struct Extents {
    last: Cell<Option<(HostRange, Backing)>>,
    /// Counts changes.
    changes: Cell<u64>,
    /// The file cannot tell.
    unknown: Cell<bool>,
    /// Times the file was asked.
    #[cfg(test)]
    asked: Cell<u64>,
}

impl Extents {
    /// `range` was (perhaps only in part) written or allocated.
    pub(super) fn filled(&self, range: HostRange) {
        self.changed(range, Backing::Hole);
    }

    /// `range` was (perhaps only in part) zeroed or cut off.
    pub(super) fn emptied(&self, range: HostRange) {
        self.changed(range, Backing::Data);
    }

    fn changed(&self, range: HostRange, contradicted: Backing) {
        self.changes.set(self.changes.get() + 1);
        if self.last.get().is_some_and(|(run, backing)| backing == contradicted && run.overlaps(range)) {
            self.last.set(None);
        }
    }
}

impl FileStore {
    /// The first run of `range`, which is not empty.
    pub(super) async fn first_run(&self, open: &Open, range: HostRange) -> io::Result<HostExtent> {
        let size = HostOffset(self.size.get());
        if range.start() >= size {
            return Ok(HostExtent { len: range.len(), backing: Backing::Hole });
        }
        if self.extents.unknown.get() {
            let inside = HostRange::between(range.start(), range.end().min(size));
            return Ok(HostExtent { len: inside.len(), backing: Backing::Data });
        }
        if let Some((run, backing)) = self.extents.last.get()
            && run.contains(range.start())
        {
            return Ok(HostExtent { len: run.end().min(range.end()) - range.start(), backing });
        }
        let before = self.extents.changes.get();
        #[cfg(test)]
        self.extents.asked.set(self.extents.asked.get() + 1);
        let (fd, start) = (Arc::clone(&open.fd), range.start().get());
        let answer = ring::unblock(move || seek_run(fd.as_fd(), start)).await;
        let (end, backing) = match answer {
            // Past the last data there is nothing up to the end, wherever that is.
            Ok((None, backing)) => (size, backing),
            Ok((Some(end), backing)) => (HostOffset(end).min(size), backing),
            Err(Errno::INVAL | Errno::OPNOTSUPP | Errno::NOTTY | Errno::NOSYS) => {
                self.extents.unknown.set(true);
                (size, Backing::Data)
            }
            Err(error) => return Err(error.into()),
        };
        let run = HostRange::between(range.start(), end);
        if run.is_empty() {
            // The file was cut meanwhile.
            return Ok(HostExtent { len: 1, backing: Backing::Data });
        }
        if before == self.extents.changes.get() {
            self.extents.last.set(Some((run, backing)));
        }
        Ok(HostExtent { len: run.len().min(range.len()), backing })
    }
}

/// Where the run at `start` ends (`None`: at the file's end), and what it is. Blocks.
fn seek_run(file: BorrowedFd<'_>, start: u64) -> Result<(Option<u64>, Backing), Errno> {
    match rustix::fs::seek(file, SeekFrom::Data(start)) {
        Err(Errno::NXIO) => Ok((None, Backing::Hole)),
        Err(error) => Err(error),
        Ok(data) if data > start => Ok((Some(data), Backing::Hole)),
        Ok(_) => match rustix::fs::seek(file, SeekFrom::Hole(start)) {
            Ok(hole) if hole > start => Ok((Some(hole), Backing::Data)),
            // Cut, or punched, between the two calls.
            Ok(_) | Err(Errno::NXIO) => Ok((Some(start + 1), Backing::Data)),
            Err(error) => Err(error),
        },
    }
}

#[cfg(test)]
mod tests {
    use super::super::OpenOptions;
    use super::*;
    use crate::{Store, ZeroMode};
    use ring::{Config, Iov, Ring};

    #[test]
    fn one_run_is_asked_for_once_until_it_changes() {
        let file = tempfile::NamedTempFile::new().unwrap();
        Ring::new(Config::default()).unwrap().block_on(async {
            let store = FileStore::open(file.path(), OpenOptions::default()).await.unwrap();
            let at = |start| HostRange::new(HostOffset(start), 100);
            store.set_size(1 << 20).await.unwrap();
            store.write(HostOffset(1 << 19), Iov::from_slice(&vec![1; 65536]), false).await.unwrap();
            for start in 0..500 {
                assert_eq!(
                    store.extent(at(start * 1000)).await.unwrap(),
                    HostExtent { len: 100, backing: Backing::Hole }
                );
            }
            assert_eq!(store.extents.asked.get(), 1);
            for start in 0..50 {
                assert_eq!(store.extent(at((1 << 19) + start)).await.unwrap().backing, Backing::Data);
                store.write(HostOffset((1 << 19) + start), Iov::from_slice(&[2]), false).await.unwrap();
            }
            assert_eq!(store.extents.asked.get(), 2, "writing to data leaves it data");
            store.zero(at((1 << 19) + 10), ZeroMode { unmap: true }).await.unwrap();
            store.extent(at((1 << 19) + 50)).await.unwrap();
            assert_eq!(store.extents.asked.get(), 3, "what was zeroed is asked for again");
        });
    }
}
