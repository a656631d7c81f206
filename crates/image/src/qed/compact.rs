//! Gives leaked clusters back: what lies at the end of the file moves into the holes, and the file becomes shorter.
//!
//! QED has no way to say "this cluster is free", so the only file without leaks is one without holes.
//!
//! **Invariants.**
//! * Need-check is set. The tables are sound, so what is not in the set of used clusters is free.
//! * A cluster (or table) moves in four steps: copy → barrier → the entry that refers to it → barrier. Only then is its old place
//!   free, and used again at the earliest. A cut at any point leaves every entry leading to the same bytes as before.

use super::Core;
use super::check::{Scan, TableReader};
use super::repair::copy_bytes;
use crate::{Error, ErrorKind, Result};
use layout::HostOffset;
use layout::qed::{L2Entry, SLICE_BYTES, SLICE_ENTRIES, Slice};
use ring::Iov;
use std::collections::BinaryHeap;
use std::ops::Range;
use std::rc::Rc;
use store::ZeroMode;

/// Fills holes as far as that can be done; `scan` is kept up to date. For want of space to work in, holes stay: that is no error.
pub(super) async fn compact(core: &Rc<Core>, scan: &mut Scan) -> Result<()> {
    let header = u64::from(core.header.get().header_clusters);
    let target = header + scan.used.len();
    let mut mover = Mover { core: core.clone(), header, target, end: scan.clusters, windows: Vec::new() };
    match mover.run(scan).await {
        Ok(()) => {}
        // Unless it was an entry that found no space: what that looks like now nobody knows.
        Err(error) if error.is_no_space() && !core.health.is_poisoned() => {
            tracing::warn!(image = core.store.name(), %error, "no space to fill holes in");
        }
        Err(error) => return Err(error),
    }
    core.health.barrier().await?;
    if core.room.space.borrow().growable() {
        let end = scan.used.end().max(header) << core.geometry.cluster_bits();
        if core.store.size() > end {
            core.store.set_size(end).await?;
            core.health.barrier().await?;
        }
    }
    Ok(())
}

/// A data cluster on its way.
struct Move {
    entry: usize,
    old: u64,
    new: u64,
}

/// All numbers are clusters.
struct Mover {
    core: Rc<Core>,
    header: u64,
    /// Where the file is to end.
    target: u64,
    /// Where it ends now: what comes from here on is free.
    end: u64,
    /// Places that tables will move to: no data is put there.
    windows: Vec<Range<u64>>,
}

impl Mover {
    async fn run(&mut self, scan: &mut Scan) -> Result<()> {
        if scan.used.end() <= self.target || !self.core.room.space.borrow().growable() {
            return Ok(());
        }
        if self.core.header.get().l1_range().end().get() >> self.bits() > self.target {
            // Only a damaged or foreign image has its L1 table behind everything else; the header would have to change.
            return Ok(());
        }
        if !self.choose_windows(scan) {
            // Tables lie so that no other fits between them. With all of them behind the end, there is room.
            self.move_all_tables_behind_the_end(scan).await?;
            if !self.choose_windows(scan) {
                return Ok(());
            }
        }
        // Data that is in the way of a table, or behind the target.
        self.move_data(scan).await?;
        self.move_tables(scan).await?;
        self.windows.clear();
        // Data that had to make room by going behind the end.
        if scan.used.end() > self.target {
            self.move_data(scan).await?;
        }
        Ok(())
    }

    fn bits(&self) -> u32 {
        self.core.geometry.cluster_bits()
    }

    fn at(&self, cluster: u64) -> HostOffset {
        HostOffset(cluster << self.bits())
    }

    fn clusters(&self, table: HostOffset) -> Range<u64> {
        let first = table.get() >> self.bits();
        first..first + u64::from(self.core.geometry.table_size())
    }

    fn is_misplaced(&self, table: HostOffset) -> bool {
        self.clusters(table).end > self.target
    }

    /// Finds a place in front of the target for each table that is not; those with the least data in the way. False if there are
    /// not enough.
    fn choose_windows(&mut self, scan: &Scan) -> bool {
        let size = u64::from(self.core.geometry.table_size());
        let wanted = scan.tables.iter().filter(|(_, at)| self.is_misplaced(*at)).count();
        if wanted == 0 {
            return true;
        }
        // Also tables that will move: a window is cleared before its table is copied, so it must hold no part of any.
        let mut fixed: Vec<Range<u64>> =
            scan.tables.iter().map(|(_, at)| self.clusters(*at)).filter(|c| c.start < self.target).collect();
        fixed.push(self.clusters(self.core.header.get().l1_table));
        fixed.push(self.target..self.target);
        fixed.sort_by_key(|range| range.start);
        // The best `wanted` of all candidates; the worst of them on top.
        let mut best = BinaryHeap::new();
        let mut at = self.header;
        for fixed in fixed {
            while at + size <= fixed.start {
                best.push((scan.used.count(at..at + size), at));
                if best.len() > wanted {
                    best.pop();
                }
                at += size;
            }
            at = fixed.end;
        }
        self.windows = best.into_iter().map(|(_, at)| at..at + size).collect();
        self.windows.sort_by_key(|window| window.start);
        self.windows.len() == wanted
    }

    /// The window that holds a cluster.
    fn window(&self, cluster: u64) -> Option<&Range<u64>> {
        let behind = self.windows.partition_point(|window| window.start <= cluster);
        self.windows[..behind].last().filter(|window| window.contains(&cluster))
    }

    /// A free place for one data cluster in front of the target.
    fn next_hole(&self, scan: &Scan, mut from: u64) -> Option<u64> {
        while let Some(gap) = scan.used.next_gap(from..self.target) {
            match self.window(gap.start) {
                Some(window) => from = window.end,
                None => return Some(gap.start),
            }
        }
        None
    }

    /// Moves data clusters from the windows and from behind the target into holes; those from the windows behind the end if
    /// there is no hole left.
    async fn move_data(&mut self, scan: &mut Scan) -> Result<()> {
        let core = self.core.clone();
        let mut from = self.header;
        for number in 0..scan.tables.len() {
            let table = scan.tables[number].1;
            let mut reader = TableReader::new(&core, table);
            while let Some((slice_number, mut slice)) = reader.next().await? {
                let mut moves = Vec::new();
                let result = self.copy_misplaced(scan, &slice, &mut from, &mut moves).await;
                if let Err(error) = result {
                    // Nothing refers to the copies.
                    for m in &moves {
                        scan.used.remove(m.new);
                    }
                    return Err(error);
                }
                if moves.is_empty() {
                    continue;
                }
                core.health.barrier().await?;
                for m in &moves {
                    slice.set(m.entry, self.at(m.new).get());
                }
                let bytes = Iov::from_slice(&slice.encode());
                let at = table + slice_number * SLICE_BYTES as u64;
                core.store.write(at, bytes, false).await.map_err(|e| core.health.fail(e.into()))?;
                // The old places are behind the target or in a window: nothing is put there before the barrier below.
                for m in &moves {
                    scan.used.remove(m.old);
                }
            }
        }
        core.health.barrier().await
    }

    /// Copies the data clusters of one slice that are misplaced; what was copied is in `moves` and marked as used, also when it
    /// ends with an error.
    async fn copy_misplaced(
        &mut self,
        scan: &mut Scan,
        slice: &Slice,
        from: &mut u64,
        moves: &mut Vec<Move>,
    ) -> Result<()> {
        let core = self.core.clone();
        let cluster = core.geometry.cluster_size();
        for (entry, raw) in slice.raw().iter().enumerate() {
            let Ok(L2Entry::Data(at)) = core.rules.l2(*raw, u64::MAX) else { continue };
            let old = at.get() >> self.bits();
            let in_window = self.window(old).is_some();
            if old < self.target && !in_window {
                continue;
            }
            let new = match self.next_hole(scan, *from) {
                Some(hole) => {
                    *from = hole + 1;
                    hole
                }
                None if in_window => self.behind_the_end(1).await?,
                None => continue,
            };
            scattered(&core, scan.used.insert(new))?;
            moves.push(Move { entry, old, new });
            core.store.zero(self.at(new).range(cluster), ZeroMode { unmap: true }).await?;
            copy_bytes(&core, at, self.at(new), cluster).await?;
        }
        Ok(())
    }

    /// Lengthens the file and returns the first of `clusters` new ones, which read as zeros.
    async fn behind_the_end(&mut self, clusters: u64) -> Result<u64> {
        let at = self.end;
        // Whatever lies behind the last whole cluster goes first.
        self.core.store.set_size(self.at(at).get()).await?;
        self.core.store.set_size(self.at(at + clusters).get()).await?;
        self.end += clusters;
        Ok(at)
    }

    async fn move_tables(&mut self, scan: &mut Scan) -> Result<()> {
        let mut windows = std::mem::take(&mut self.windows).into_iter();
        for number in 0..scan.tables.len() {
            if !self.is_misplaced(scan.tables[number].1) {
                continue;
            }
            let Some(window) = windows.next() else { break };
            let to = self.at(window.start);
            self.core.store.zero(to.range(self.core.geometry.table_bytes()), ZeroMode { unmap: true }).await?;
            self.move_table(scan, number, window.start).await?;
        }
        Ok(())
    }

    async fn move_all_tables_behind_the_end(&mut self, scan: &mut Scan) -> Result<()> {
        for number in 0..scan.tables.len() {
            let to = self.behind_the_end(self.core.geometry.table_size().into()).await?;
            self.move_table(scan, number, to).await?;
        }
        Ok(())
    }

    /// Moves a table to `to`, where there are zeros.
    async fn move_table(&mut self, scan: &mut Scan, number: usize, to: u64) -> Result<()> {
        let core = &self.core;
        let (index, from) = scan.tables[number];
        let new = self.at(to);
        let mut reader = TableReader::new(core, from);
        while let Some((slice_number, slice)) = reader.next().await? {
            let bytes = Iov::from_slice(&slice.encode());
            core.store.write(new + slice_number * SLICE_BYTES as u64, bytes, false).await?;
        }
        core.health.barrier().await?;
        // One entry changes; the rest of its slice of the L1 table is written as it is on disk.
        let slice_at = core.header.get().l1_table + index / SLICE_ENTRIES as u64 * SLICE_BYTES as u64;
        let bytes = Iov::alloc(SLICE_BYTES);
        core.store.read(slice_at, bytes.clone()).await?;
        bytes.write(index as usize % SLICE_ENTRIES * 8, &new.get().to_le_bytes());
        core.store.write(slice_at, bytes, false).await.map_err(|e| core.health.fail(e.into()))?;
        core.health.barrier().await?;
        for cluster in self.clusters(new) {
            scattered(core, scan.used.insert(cluster))?;
        }
        for cluster in self.clusters(from) {
            scan.used.remove(cluster);
        }
        scan.tables[number].1 = new;
        Ok(())
    }
}

fn scattered<T>(core: &Core, result: std::result::Result<T, crate::cluster_set::TooScattered>) -> Result<T> {
    let what = "the image's clusters are too scattered for its holes to be filled";
    result.map_err(|_| Error::new(ErrorKind::Unsupported, core.store.name(), None, what))
}
