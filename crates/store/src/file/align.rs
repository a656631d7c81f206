//! Transfers past the page cache, whatever their alignment. The only place that knows how.
//!
//! * **Misaligned memory** goes through a buffer of ours, in pieces of at most [`BOUNCE_MAX`].
//! * **A misaligned write** reads the blocks it covers in part, puts its bytes in and writes whole blocks, while it holds
//!   their range exclusively; aligned writes hold theirs shared. So no write to the same block is lost in between.
//!   The caller's bytes are copied before anything is decided or written: a guest may change them meanwhile.
//! * **The last block** of a file whose length is no multiple of the block cannot be written so: a padded write would make
//!   the file longer, and cutting it again is neither atomic nor safe from a crash. What touches that block, or would
//!   leave such an end behind, goes through the page cache, by a second descriptor, while everything from the page on
//!   is held exclusively. The kernel keeps both ways coherent as long as they do not run at the same time: direct
//!   transfers first write back, then drop what the page cache holds of their range. A flush of either descriptor is
//!   one of the file.
//! * **Reads** hold nothing: a read-modify-write changes no byte it was not asked to.

use super::{FileStore, Open, transfer};
use layout::{HostOffset, HostRange};
use ring::Iov;
use std::io;

/// The largest buffer, in bytes: one transfer that a disk serves at full speed.
const BOUNCE_MAX: u64 = 1 << 20;

/// From this length on the aligned middle of a misaligned transfer is worth a transfer of its own, without a copy.
const IN_PLACE_MIN: u64 = 64 << 10;

/// The part of `iov`, which stands for `whole`, that stands for `part`.
fn part_of(iov: &Iov, whole: HostRange, part: HostRange) -> Iov {
    let start = (part.start() - whole.start()) as usize;
    iov.slice(start..start + part.len() as usize)
}

/// The first piece of `range` that fits a buffer.
fn piece_of(range: HostRange, block: u64) -> HostRange {
    range.first(range.start().align_down(block) + BOUNCE_MAX - range.start())
}

impl FileStore {
    /// Whether `iov`, whose length is a multiple of the block, can take part in a transfer as it is.
    fn fits(&self, iov: &Iov) -> bool {
        let alignment = self.alignment;
        iov.is_aligned(alignment.memory) && (iov.segments() == 1 || iov.is_aligned(alignment.offset as usize))
    }

    /// Reads past the page cache; zeros past the end.
    pub(super) async fn read_direct(&self, open: &Open, range: HostRange, into: &Iov) -> io::Result<()> {
        let block = self.alignment.offset;
        if range.is_aligned(block) && self.fits(into) {
            return self.read_blocks(open, range, into).await;
        }
        let inside = range.intersect(HostRange::new(HostOffset::ZERO, self.size.get()));
        into.slice(inside.len() as usize..into.len()).fill(0);
        let body = inside.align_inward(block);
        if body.len() >= IN_PLACE_MIN {
            let middle = part_of(into, range, body);
            if self.fits(&middle) {
                let head = HostRange::between(inside.start(), body.start());
                let tail = HostRange::between(body.end(), inside.end());
                self.read_bounced(open, head, &part_of(into, range, head)).await?;
                self.read_blocks(open, body, &middle).await?;
                return self.read_bounced(open, tail, &part_of(into, range, tail)).await;
            }
        }
        self.read_bounced(open, inside, &into.slice(0..inside.len() as usize)).await
    }

    /// Reads whole blocks into memory that fits; zeros past the end.
    async fn read_blocks(&self, open: &Open, range: HostRange, into: &Iov) -> io::Result<()> {
        let (at, size) = (range.start().get(), self.size.get());
        let got = transfer::read(&open.file, at, into, self.alignment.offset, size).await?;
        if got < into.len() {
            into.slice(got..into.len()).fill(0);
        }
        Ok(())
    }

    /// Reads `range` through a buffer.
    async fn read_bounced(&self, open: &Open, range: HostRange, into: &Iov) -> io::Result<()> {
        let block = self.alignment.offset;
        let mut left = range;
        while !left.is_empty() {
            let piece = piece_of(left, block);
            let outer = piece.align_outward(block);
            let buffer = Iov::alloc(outer.len() as usize);
            self.read_blocks(open, outer, &buffer).await?;
            part_of(into, range, piece).copy_from(&part_of(&buffer, outer, piece));
            left = left.skip(piece.len());
        }
        Ok(())
    }

    /// Writes past the page cache, growing the file as needed.
    pub(super) async fn write_direct(&self, open: &Open, range: HostRange, from: &Iov, dsync: bool) -> io::Result<()> {
        let block = self.alignment.offset;
        if range.is_aligned(block) {
            let _held = self.ranges.shared(range).await;
            let result = self.write_blocks(open, range, from, dsync).await;
            return self.sized(open, range.end(), result).await;
        }
        let _held = loop {
            let at_end = self.touches_end(range);
            let held = self.ranges.exclusive(self.around(range, at_end)).await;
            // The file may have been cut while we waited.
            if at_end || !self.touches_end(range) {
                break held;
            }
        };
        let result = self.write_unaligned(open, range, from, dsync).await;
        self.sized(open, range.end(), result).await
    }

    /// Whether the blocks of `range` go past the last whole block of the file.
    fn touches_end(&self, range: HostRange) -> bool {
        let block = self.alignment.offset;
        range.end().align_up(block) > HostOffset(self.size.get()).align_down(block)
    }

    /// What has to be held for a misaligned change to `range`.
    pub(super) fn around(&self, range: HostRange, at_end: bool) -> HostRange {
        if at_end {
            HostRange::between(range.start().align_down(self.alignment.cached), HostOffset(u64::MAX))
        } else {
            range.align_outward(self.alignment.offset)
        }
    }

    /// Writes a misaligned range that is held.
    async fn write_unaligned(&self, open: &Open, range: HostRange, from: &Iov, dsync: bool) -> io::Result<()> {
        let whole_blocks = HostRange::new(HostOffset::ZERO, self.size.get()).align_inward(self.alignment.offset);
        let below = range.intersect(whole_blocks);
        let above = HostRange::between(range.start().max(whole_blocks.end()), range.end());
        if !below.is_empty() {
            self.modify(open, below, &part_of(from, range, below), dsync).await?;
        }
        if !above.is_empty() {
            self.write_end(open, above, &part_of(from, range, above), dsync).await?;
        }
        Ok(())
    }

    /// Writes whole blocks, from a copy where the memory does not fit.
    async fn write_blocks(&self, open: &Open, range: HostRange, from: &Iov, dsync: bool) -> io::Result<()> {
        let block = self.alignment.offset;
        if self.fits(from) {
            return transfer::write(&open.file, range.start().get(), from, dsync, block).await;
        }
        let mut left = range;
        while !left.is_empty() {
            let piece = piece_of(left, block);
            let buffer = Iov::alloc(piece.len() as usize);
            buffer.copy_from(&part_of(from, range, piece));
            transfer::write(&open.file, piece.start().get(), &buffer, dsync, block).await?;
            left = left.skip(piece.len());
        }
        Ok(())
    }

    /// Writes `range`, all of whose blocks lie in the file, and which is held.
    async fn modify(&self, open: &Open, range: HostRange, from: &Iov, dsync: bool) -> io::Result<()> {
        let block = self.alignment.offset;
        let body = range.align_inward(block);
        if body.len() < IN_PLACE_MIN {
            return self.modify_whole(open, range, from, dsync).await;
        }
        let head = HostRange::between(range.start(), body.start());
        let tail = HostRange::between(body.end(), range.end());
        self.modify_whole(open, head, &part_of(from, range, head), dsync).await?;
        self.write_blocks(open, body, &part_of(from, range, body), dsync).await?;
        self.modify_whole(open, tail, &part_of(from, range, tail), dsync).await
    }

    /// [`FileStore::modify`] in one write.
    async fn modify_whole(&self, open: &Open, range: HostRange, from: &Iov, dsync: bool) -> io::Result<()> {
        if range.is_empty() {
            return Ok(());
        }
        let block = self.alignment.offset;
        let outer = range.align_outward(block);
        let buffer = Iov::alloc(outer.len() as usize);
        let first = outer.first(block);
        let last = outer.skip(outer.len() - block);
        let reads_first = !range.start().is_aligned(block);
        if reads_first {
            self.read_blocks(open, first, &part_of(&buffer, outer, first)).await?;
        }
        let reads_last = !range.end().is_aligned(block) && (last != first || !reads_first);
        if reads_last {
            self.read_blocks(open, last, &part_of(&buffer, outer, last)).await?;
        }
        part_of(&buffer, outer, range).copy_from(from);
        transfer::write(&open.file, outer.start().get(), &buffer, dsync, block).await
    }

    /// Writes `range`, which lies past the last whole block and is held with everything behind it: its whole blocks past
    /// the page cache, the rest through it.
    async fn write_end(&self, open: &Open, range: HostRange, from: &Iov, dsync: bool) -> io::Result<()> {
        let Some(twin) = &open.twin else {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "a block device has no partial last block"));
        };
        let body = range.align_inward(self.alignment.offset);
        if body.is_empty() {
            return transfer::write(twin, range.start().get(), from, dsync, 1).await;
        }
        let head = HostRange::between(range.start(), body.start());
        let tail = HostRange::between(body.end(), range.end());
        transfer::write(twin, head.start().get(), &part_of(from, range, head), dsync, 1).await?;
        self.write_blocks(open, body, &part_of(from, range, body), dsync).await?;
        transfer::write(twin, tail.start().get(), &part_of(from, range, tail), dsync, 1).await
    }
}

#[cfg(test)]
mod tests {
    use super::super::open::{self, Alignment};
    use super::super::{Locking, OpenOptions};
    use super::*;
    use crate::{Store, ZeroMode};
    use ring::{Config, Ring};
    use std::rc::Rc;

    /// A new file of which more alignment is asked than it needs; `None` where there is no way past the page cache.
    fn demanding(path: &std::path::Path, offset: u64, memory: usize) -> Option<Rc<FileStore>> {
        let options = OpenOptions { direct: true, locking: Locking::Off, ..OpenOptions::default() };
        let mut opened = open::open(path, &options, true).ok()?;
        let Alignment { offset: needs, memory: memory_needs, .. } = opened.alignment;
        if offset < needs || memory < memory_needs {
            return None;
        }
        opened.alignment = Alignment { offset, memory, cached: offset.max(4096) };
        FileStore::assemble("image".to_owned(), options, opened).ok()
    }

    #[test]
    fn coarse_blocks_and_coarse_memory_lose_no_byte() {
        const SPAN: u64 = 200_000;
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("image");
        for (offset, memory) in [(512, 512), (4096, 512), (4096, 4096), (16_384, 4096)] {
            Ring::new(Config::default()).unwrap().block_on(async {
                let Some(store) = demanding(&path, offset, memory) else {
                    eprintln!("skipped {offset}, {memory}: this file system wants more, or cannot");
                    return;
                };
                let mut model: Vec<u8> = Vec::new();
                let mut random = offset + memory as u64;
                let mut draw = |below: u64| {
                    random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
                    (random >> 33) % below
                };
                for round in 0..300_u64 {
                    // Four neighbours at a time, which share their blocks.
                    let mut tasks = Vec::new();
                    let mut at = draw(SPAN / 2);
                    for part in 0..4 {
                        let len = [1, 100, offset, 5000, 3 * offset + 1, 70_000][draw(6) as usize];
                        let range = HostRange::new(HostOffset(at), len);
                        let byte = (round * 4 + part) as u8;
                        let end = range.end().get() as usize;
                        model.resize(model.len().max(end), 0);
                        let zeroed = draw(5) == 0;
                        model[at as usize..end].fill(if zeroed { 0 } else { byte });
                        let (skip, store) = (draw(3) as usize, Rc::clone(&store));
                        tasks.push(ring::spawn(async move {
                            if zeroed {
                                return store.zero(range, ZeroMode { unmap: byte.is_multiple_of(2) }).await;
                            }
                            let from = Iov::alloc(len as usize + skip).slice(skip..len as usize + skip);
                            from.fill(byte);
                            store.write(range.start(), from, false).await
                        }));
                        at += len;
                    }
                    for task in tasks {
                        task.await.unwrap();
                    }
                    if draw(20) == 0 {
                        let size = draw(SPAN);
                        store.set_size(size).await.unwrap();
                        model.resize(size as usize, 0);
                    }
                    assert_eq!(store.size(), model.len() as u64);
                    let start = draw(model.len() as u64 + 1) as usize;
                    let into = Iov::alloc(model.len() - start + 100);
                    store.read(HostOffset(start as u64), into.clone()).await.unwrap();
                    let read = into.to_vec();
                    let (bytes, past) = read.split_at(model.len() - start);
                    assert!(bytes == &model[start..], "round {round}, from {start}");
                    assert!(past.iter().all(|byte| *byte == 0));
                }
                store.close().await.unwrap();
                assert!(std::fs::read(&path).unwrap() == model, "others see the same");
            });
        }
    }
}
