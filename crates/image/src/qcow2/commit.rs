//! What was linked becomes durable.
//!
//! **Invariants.**
//! * A commit writes the entries that were linked when it began, from copies taken at that moment.
//! * An entry is written only after a barrier that covers its data and its refcounts, an L1 entry only after a barrier that
//!   covers its table.
//! * A failure of a write or a barrier poisons the image; what was not written stays dirty in memory, where reads see it.

use super::Core;
use super::header::HeaderZone;
use super::resolve::Table;
use crate::commits::{Commits, Epochs};
use crate::health::Health;
use crate::tables::Publication;
use crate::{ErrorKind, Result};
use layout::qcow2::{L2Entry, Slice};
use layout::{HostOffset, HostRange};
use ring::Iov;
use std::rc::Rc;

/// Slices that lie side by side are written together, this many at most.
const RUN: usize = 64;

/// What one commit is about to make durable.
struct Epoch {
    /// Where, and what. In order.
    slices: Vec<(HostOffset, Slice)>,
    numbers: Vec<u64>,
    tables: Vec<Publication>,
    /// To be counted up.
    linked: Vec<HostRange>,
    /// To be counted down, afterwards.
    unlinked: Vec<HostRange>,
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
            return self.data_barrier().await;
        }
        crate::commits::commit(self).await
    }

    /// See [`crate::Image::settle`]: what is left to be counted down is, and what lies behind the end is cut off.
    pub(super) async fn settle(self: &Rc<Self>) -> Result<()> {
        if self.health.read_only() {
            return Ok(());
        }
        self.end_packing();
        self.commit().await?;
        // What is unlinked is counted down behind one commit, and written with the next.
        for _ in 0..2 {
            let left = self.refcounts.borrow().is_dirty() || self.room.space.borrow().has_unlinked();
            if left {
                crate::commits::commit(self).await?;
            }
        }
        if self.active.get() > 0 || self.is_dirty() || self.refcounts.borrow().is_dirty() {
            return self.health.check_poison();
        }
        let zone = self.zone.lock().await;
        if self.active.get() == 0 {
            self.room.trim().await?;
        }
        drop(zone);
        Ok(())
    }

    /// Copies of what is dirty now.
    fn begin_epoch(&self) -> Result<Epoch> {
        let mut cache = self.cache.borrow_mut();
        let copies = cache.begin_commit();
        let numbers: Vec<u64> = copies.iter().map(|(number, _)| *number).collect();
        let mut slices = Vec::with_capacity(copies.len());
        for (number, slice) in copies {
            let start = self.slice_start(number);
            match self.table(self.l1_index(start)) {
                Ok(Table::Stored { at, own: true } | Table::Fresh { at, .. }) => {
                    slices.push((self.slice_at(at, number), slice));
                }
                other => {
                    // A dirty slice without a table of its own cannot be; if it is, nothing may be written any more.
                    let what =
                        format!("internal error: no table for the changed entries at guest offset {start} ({other:?})");
                    cache.end_commit(numbers, true);
                    return Err(self.health.fail(self.health.error(ErrorKind::Corrupt, None, what)));
                }
            }
        }
        slices.sort_by_key(|(at, _)| *at);
        let tables = self.tables.borrow().unpublished();
        let mut linked = self.linked.take();
        linked.extend(tables.iter().map(|(_, at)| at.range(self.cluster_size())));
        let unlinked = self.room.space.borrow_mut().take_unlinked();
        Ok(Epoch { slices, numbers, tables, linked, unlinked })
    }

    async fn write_epoch(&self, epoch: &mut Epoch, zone: &mut HeaderZone) -> Result<()> {
        // Whatever goes wrong here, what is in memory and what is on disk may differ now.
        let counted = self.count_up(std::mem::take(&mut epoch.linked)).await;
        counted.map_err(|error| self.health.fail(error))?;
        self.write_refcounts(zone).await?;
        self.data_barrier().await?;
        if epoch.slices.is_empty() {
            return Ok(());
        }
        let bytes = self.slice_bytes();
        let near = |a: &(HostOffset, Slice), b: &(HostOffset, Slice)| a.0 + bytes == b.0;
        let runs = epoch.slices.chunk_by(near).flat_map(|run| run.chunks(RUN));
        let writes = runs.map(|run| {
            let bytes: Vec<u8> = run.iter().flat_map(|(_, slice)| slice.encode()).collect();
            (run[0].0, Iov::from_slice(&bytes))
        });
        self.health.write_all(writes).await?;
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

impl Epochs for Core {
    fn commits(&self) -> &Commits {
        &self.commits
    }

    fn health(&self) -> &Health {
        &self.health
    }

    async fn commit_epoch(&self) -> Result<()> {
        let mut zone = self.zone.lock().await;
        let mut epoch = self.begin_epoch()?;
        let result = self.write_epoch(&mut epoch, &mut zone).await;
        let failed = result.is_err();
        // One step: from here on, what is not in the cache is on disk.
        self.cache.borrow_mut().end_commit(epoch.numbers.iter().copied(), failed);
        if !failed {
            let header = self.header.get();
            let replaced = self.tables.borrow_mut().published(&epoch.tables);
            epoch.unlinked.extend(replaced.into_iter().map(|raw| L2Entry::referred(raw, &header)));
        }
        self.unpinned.notify_all();
        result?;
        let unlinked = epoch.unlinked.into_iter().filter(|range| !range.is_empty()).collect();
        if let Err(error) = self.count_down(unlinked).await {
            // It stays counted: space is lost, nothing else.
            tracing::warn!(image = self.store.name(), %error, "what was replaced could not be given back");
        }
        Ok(())
    }
}
