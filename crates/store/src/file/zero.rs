//! Making ranges read as zeros, by the cheapest means the file has.
//!
//! **Invariants.** What the kernel once said it cannot do for this file is not asked again. Growing happens while nothing
//! that grows is in flight, so that setting the length never cuts anything off.

use super::{FileStore, Open};
use crate::ZeroMode;
use layout::{HostOffset, HostRange};
use ring::{AllocateMode, Iov};
use std::cell::Cell;
use std::io;

/// Zeros written at a time where there is no other way, in bytes.
const CHUNK: u64 = 1 << 20;

/// What this file was found to lack.
#[derive(Default)]
pub(super) struct Zeroing {
    no_punch: Cell<bool>,
    no_zero_range: Cell<bool>,
}

impl FileStore {
    /// Makes `range` read as zeros; grows the file when it ends past the end.
    pub(super) async fn zero_range(&self, open: &Open, range: HostRange, mode: ZeroMode) -> io::Result<()> {
        let inside = range.intersect(HostRange::new(HostOffset::ZERO, self.size.get()));
        if !inside.is_empty() {
            // A block device zeroes whole blocks; a file's edges are the kernel's affair.
            let body = if self.block_device { inside.align_inward(self.alignment.offset) } else { inside };
            self.write_zeros(open, HostRange::between(inside.start(), body.start().min(inside.end()))).await?;
            if !body.is_empty() && !self.deallocate(open, body, mode).await? {
                self.write_zeros(open, body).await?;
            }
            self.write_zeros(open, HostRange::between(body.end().max(body.start()), inside.end())).await?;
        }
        if range.end().get() > self.size.get() {
            self.set_length(open, range.end().get(), true).await?;
        }
        Ok(())
    }

    /// Zeroes `range` without writing it, if the file can.
    async fn deallocate(&self, open: &Open, range: HostRange, mode: ZeroMode) -> io::Result<bool> {
        let _held = if !self.direct() {
            None
        } else if range.is_aligned(self.alignment.cached) {
            Some(self.ranges.shared(range).await)
        } else {
            // The kernel zeroes the edges' pages, which no read-modify-write must undo.
            Some(self.ranges.exclusive(range.align_outward(self.alignment.cached)).await)
        };
        let (punch, zero_range) = (AllocateMode::PunchHole, AllocateMode::ZeroRange);
        for way in if mode.unmap { [punch, zero_range] } else { [zero_range, punch] } {
            let lacking = if way == punch { &self.zeroing.no_punch } else { &self.zeroing.no_zero_range };
            if lacking.get() {
                continue;
            }
            match open.file.allocate(way, range.start().get(), range.len()).await {
                Ok(()) => {
                    if way == punch && !mode.unmap && !self.block_device {
                        // The hole reads as zeros already: that it stays backed is a wish.
                        let _ = open.file.allocate(AllocateMode::KeepSize, range.start().get(), range.len()).await;
                    }
                    return Ok(true);
                }
                Err(error) => match error.raw_os_error() {
                    Some(libc::EOPNOTSUPP | libc::ENOSYS | libc::ENOTTY) => lacking.set(true),
                    // Not so, for this range: others may go.
                    Some(libc::EINVAL | libc::EPERM | libc::EBUSY) => {}
                    _ => return Err(error),
                },
            }
        }
        Ok(false)
    }

    /// Writes zeros to `range`.
    async fn write_zeros(&self, open: &Open, range: HostRange) -> io::Result<()> {
        if range.is_empty() {
            return Ok(());
        }
        let zeros = Iov::zeroed(range.len().min(CHUNK) as usize);
        let mut left = range;
        while !left.is_empty() {
            // Pieces end where chunks do, so that all but the first are aligned.
            let piece = left.first((left.start().align_down(CHUNK) + CHUNK - left.start()).min(zeros.len() as u64));
            self.write_range(open, piece, &zeros.slice(0..piece.len() as usize), false).await?;
            left = left.skip(piece.len());
        }
        Ok(())
    }

    /// Sets the length (when `only_grow`: unless it is as long already), while nothing near the end is in flight.
    pub(super) async fn set_length(&self, open: &Open, size: u64, only_grow: bool) -> io::Result<()> {
        let from = HostOffset(size.min(self.size.get())).align_down(self.alignment.cached);
        let _held = self.ranges.exclusive(HostRange::between(from, HostOffset(u64::MAX))).await;
        if size == self.size.get() || (only_grow && size < self.size.get()) {
            return Ok(());
        }
        open.file.set_len(size).await?;
        self.size.set(size);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::file::OpenOptions;
    use crate::{Store, ZeroMode};
    use ring::{Config, Ring};

    /// As on file systems (and old kernels) that know none of it: the zeros are written.
    #[test]
    fn a_file_that_can_neither_punch_nor_zero_is_written() {
        let folder = tempfile::tempdir().unwrap();
        for unmap in [false, true] {
            Ring::new(Config::default()).unwrap().block_on(async {
                let store = FileStore::create(&folder.path().join("image"), OpenOptions::default()).await.unwrap();
                store.write(HostOffset(0), Iov::from_slice(&vec![7; 3 << 20]), false).await.unwrap();
                store.zeroing.no_punch.set(true);
                store.zeroing.no_zero_range.set(true);
                let range = HostRange::new(HostOffset(1000), (2 << 20) + 77);
                store.zero(range, ZeroMode { unmap }).await.unwrap();
                let all = Iov::alloc(3 << 20);
                store.read(HostOffset(0), all.clone()).await.unwrap();
                let mut expected = vec![7; 3 << 20];
                expected[1000..1000 + (2 << 20) + 77].fill(0);
                assert!(all.to_vec() == expected);
                store.close().await.unwrap();
            });
        }
    }
}
