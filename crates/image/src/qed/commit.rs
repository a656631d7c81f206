//! What was linked becomes durable.
//!
//! **Invariants.**
//! * A commit writes the entries that were linked when it began, from copies taken at that moment.
//! * An entry is written only after a barrier that covers its data, an L1 entry only after a barrier that covers its table.
//! * A failure of a write or a barrier poisons the image; what was not written stays dirty in memory, where reads see it.

use super::Core;
use crate::Result;
use crate::commits::{Commits, Epochs};
use crate::health::Health;
use crate::tables::Publication;
use layout::qed::{SLICE_BYTES, Slice};
use layout::{HostOffset, HostRange};
use ring::Iov;
use std::rc::Rc;

/// Slices that lie side by side are written together, this many at most (256 KiB: a table of the default geometry).
const RUN: usize = 64;

/// What one commit is about to make durable.
struct Epoch {
    /// Where, and what. In order.
    slices: Vec<(HostOffset, Slice)>,
    numbers: Vec<u64>,
    tables: Vec<Publication>,
    unlinked: Vec<HostRange>,
    barrier_due: bool,
}

impl Core {
    /// See [`crate::Image::is_dirty`].
    pub(super) fn is_dirty(&self) -> bool {
        self.cache.borrow().is_dirty() || self.commits.is_running()
    }

    /// See [`crate::Image::commit`].
    pub(super) async fn commit(self: &Rc<Self>) -> Result<()> {
        if self.health.read_only() {
            return Ok(());
        }
        self.health.check_poison()?;
        if !self.is_dirty() {
            return self.health.barrier().await;
        }
        crate::commits::commit(self).await
    }
}

impl Epochs for Core {
    fn commits(&self) -> &Commits {
        &self.commits
    }

    fn health(&self) -> &Health {
        &self.health
    }

    async fn commit_epoch(&self) -> Result<()> {
        let mut epoch = self.begin_epoch()?;
        let result = self.write_epoch(&epoch).await;
        let failed = result.is_err();
        // One step: from here on, what is not in the cache is on disk.
        self.cache.borrow_mut().end_commit(epoch.numbers.iter().copied(), failed);
        if !failed {
            self.tables.borrow_mut().published(&epoch.tables);
        }
        let mut space = self.room.space.borrow_mut();
        for range in epoch.unlinked.drain(..) {
            if failed {
                space.unlink(range);
            } else {
                space.give_back(range);
            }
        }
        drop(space);
        self.unpinned.notify_all();
        result
    }
}

impl Core {
    /// Copies of what is dirty now.
    fn begin_epoch(&self) -> Result<Epoch> {
        let mut cache = self.cache.borrow_mut();
        let copies = cache.begin_commit();
        let numbers: Vec<u64> = copies.iter().map(|(number, _)| *number).collect();
        let mut slices = Vec::with_capacity(copies.len());
        for (number, slice) in copies {
            let start = self.geometry.slice_start(number);
            match self.table(self.geometry.l1_index(start)) {
                Ok(super::resolve::Table::Stored(table) | super::resolve::Table::Fresh(table)) => {
                    slices.push((self.geometry.slice_at(table, number), slice));
                }
                other => {
                    // A dirty slice without a table cannot be; if it is, nothing may be written any more.
                    let what =
                        format!("internal error: no table for the changed entries at guest offset {start} ({other:?})");
                    cache.end_commit(numbers, true);
                    return Err(self.health.fail(self.health.error(crate::ErrorKind::Corrupt, None, what)));
                }
            }
        }
        slices.sort_by_key(|(at, _)| *at);
        Ok(Epoch {
            slices,
            numbers,
            tables: self.tables.borrow().unpublished(),
            unlinked: self.room.space.borrow_mut().take_unlinked(),
            barrier_due: self.barrier_due.take(),
        })
    }

    async fn write_epoch(&self, epoch: &Epoch) -> Result<()> {
        if epoch.slices.is_empty() {
            return self.health.barrier().await;
        }
        if epoch.barrier_due {
            self.health.barrier().await?;
        }
        let near = |a: &(HostOffset, Slice), b: &(HostOffset, Slice)| a.0 + SLICE_BYTES as u64 == b.0;
        let runs = epoch.slices.chunk_by(near).flat_map(|run| run.chunks(RUN));
        self.health
            .write_all(runs.map(|run| {
                let bytes = Iov::alloc(run.len() * SLICE_BYTES);
                for (i, (_, slice)) in run.iter().enumerate() {
                    bytes.write(i * SLICE_BYTES, &slice.encode());
                }
                (run[0].0, bytes)
            }))
            .await?;
        self.health.barrier().await?;
        if epoch.tables.is_empty() {
            return Ok(());
        }
        let l1 = self.header.get().l1_table;
        let entries = self.tables.borrow().l1_slices(&epoch.tables);
        let entries = entries.into_iter().map(|(offset, bytes)| (l1 + offset, Iov::from_slice(&bytes)));
        self.health.write_all(entries).await?;
        self.health.barrier().await
    }
}
