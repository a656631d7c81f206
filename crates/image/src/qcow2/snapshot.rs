//! Internal snapshots: an L1 table of its own each, with every cluster it leads to counted once more.
//!
//! **The order** of each change (a cut between any two steps leaves clusters counted too often, nothing worse): what is about
//! to be referred to is counted, durably → new tables, durably → the header → what is no longer referred to is counted
//! down. Meanwhile the image is marked as dirty (where it can be), so that whoever opens it next sets counts and flags right.

use super::Core;
use super::header::HeaderZone;
use crate::snapshot::{Snapshot as Described, SnapshotAction};
use crate::{ErrorKind, Result};
use layout::qcow2::snapshot::Snapshot;
use layout::qcow2::{COPIED, Features, Header, L1Entry, L2Entry, OFFSET};
use layout::{HostOffset, HostRange};
use ring::Iov;
use std::rc::Rc;

/// Clusters that a table leads to, neighbours joined.
#[derive(Default)]
struct Ranges(Vec<HostRange>);

impl Ranges {
    fn add(&mut self, range: HostRange) {
        match self.0.last_mut() {
            Some(last) if !range.is_empty() && last.end() == range.start() => {
                *last = last.start().range(last.len() + range.len());
            }
            _ if !range.is_empty() => self.0.push(range),
            _ => {}
        }
    }
}

pub(super) fn bytes_of(entries: &[u64]) -> Iov {
    Iov::from_slice(&entries.iter().flat_map(|entry| entry.to_be_bytes()).collect::<Vec<u8>>())
}

impl Core {
    /// See [`crate::Image::snapshots`].
    pub(super) async fn snapshots(&self) -> Result<Vec<Described>> {
        let header = self.header.get();
        let (snapshots, _) = self.read_snapshots(&header).await?;
        let describe = |snapshot: Snapshot| Described {
            disk_size: snapshot.disk_size.unwrap_or(header.size),
            id: snapshot.id,
            name: snapshot.name,
            date: snapshot.date,
            vm_clock: snapshot.vm_clock,
            vm_state_size: snapshot.vm_state_size,
            icount: snapshot.icount,
        };
        Ok(snapshots.into_iter().map(describe).collect())
    }

    /// See [`crate::Image::snapshot`].
    pub(super) async fn snapshot(self: &Rc<Self>, action: SnapshotAction) -> Result<()> {
        self.health.check_writable()?;
        self.check_no_data_file("internal snapshots")?;
        if self.active.get() > 0 {
            let what = "the image is being written to; take snapshots of it when it is idle";
            return Err(self.health.error(ErrorKind::Busy, None, what));
        }
        self.settle().await?;
        let mut zone = self.zone.lock().await;
        let (all, _) = self.read_snapshots(&self.header.get()).await?;
        let find = |name: &str| {
            let by_id = all.iter().position(|snapshot| snapshot.id == name);
            by_id.or_else(|| all.iter().position(|snapshot| snapshot.name == name)).ok_or_else(|| {
                self.health.error(ErrorKind::InvalidArgument, None, format!("snapshot '{name}' does not exist"))
            })
        };
        // Whatever is found wrong with the request changes nothing.
        let found = match &action {
            SnapshotAction::Create(..) => 0,
            SnapshotAction::Apply(name) | SnapshotAction::Delete(name) => find(name)?,
        };
        let (l1, replaced) = match &action {
            SnapshotAction::Create(..) => (self.active_l1(), Vec::new()),
            SnapshotAction::Apply(_) => {
                let l1 = self.snapshot_l1(&all[found]).await?;
                self.check_tables(&all[found], &l1)?;
                (l1, self.reachable(&self.active_l1()).await?)
            }
            SnapshotAction::Delete(_) => (self.snapshot_l1(&all[found]).await?, Vec::new()),
        };
        let reachable = self.reachable(&l1).await?;
        self.mark_dirty(&mut zone, true).await?;
        let done = match action {
            SnapshotAction::Create(name, date) => {
                self.create_snapshot(&mut zone, all, (name, date), (&l1, reachable)).await
            }
            SnapshotAction::Apply(_) => self.apply_snapshot(&mut zone, &all[found], (&l1, reachable), replaced).await,
            SnapshotAction::Delete(_) => self.delete_snapshot(&mut zone, all, found, (&l1, reachable)).await,
        };
        if done.as_ref().is_err_and(|error| error.kind() == ErrorKind::Unsupported) {
            // What cannot be counted was told before anything was changed.
            self.mark_dirty(&mut zone, false).await?;
            return done;
        }
        // For want of space nothing was changed but counts, which the mark sees to.
        done.map_err(|error| if error.is_no_space() { error } else { self.health.fail(error) })?;
        self.health.barrier().await?;
        self.mark_dirty(&mut zone, false).await?;
        drop(zone);
        self.reload().await?;
        self.find_free().await
    }

    async fn mark_dirty(&self, zone: &mut HeaderZone, dirty: bool) -> Result<()> {
        let mut header = self.header.get();
        if header.version < 3 {
            return Ok(());
        }
        header.features.set(Features::DIRTY, dirty);
        self.publish_header(zone, header).await
    }

    /// The L1 table that is in use.
    fn active_l1(&self) -> Vec<u64> {
        let entries = self.header.get().l1_entries as usize;
        self.tables.borrow().l1().get(..entries).unwrap_or_default().to_vec()
    }

    /// All clusters that an L1 table leads to: L2 tables, and what those refer to. All of them are in the file: counting others
    /// would take refcounts for as many as an entry says.
    async fn reachable(&self, l1: &[u64]) -> Result<Vec<HostRange>> {
        let header = self.header.get();
        let mut ranges = Ranges::default();
        for (index, raw) in l1.iter().enumerate() {
            let Some(table) = self.l2_table(*raw, index)? else { continue };
            ranges.add(table.range(header.cluster_size()));
        }
        for (index, raw) in l1.iter().enumerate() {
            let Some(table) = self.l2_table(*raw, index)? else { continue };
            let bytes = self.read_bytes(table.range(header.cluster_size())).await?;
            for entry in bytes.as_chunks::<8>().0.chunks(self.words()) {
                ranges.add(L2Entry::referred(u64::from_be_bytes(entry[0]), &header));
            }
        }
        let end = self.store.size().next_multiple_of(header.cluster_size());
        match ranges.0.iter().find(|range| range.end().get() > end) {
            None => Ok(ranges.0),
            Some(outside) => {
                let what = "a table leads to past the end of the file; check and repair the image";
                Err(self.health.corrupt(outside.start(), what.to_owned()))
            }
        }
    }

    fn l2_table(&self, raw: u64, index: usize) -> Result<Option<HostOffset>> {
        let header = self.header.get();
        match L1Entry::decode(raw, &header) {
            Ok(L1Entry::Unallocated) => Ok(None),
            Ok(L1Entry::Table(at)) => Ok(Some(at)),
            Err(why) => {
                let place = header.l1_table + index as u64 * 8;
                Err(self.health.corrupt(place, format!("L1 entry {index}: {why}; check and repair the image")))
            }
        }
    }

    /// Takes room for `bytes` of tables, counted.
    pub(super) async fn room_for(&self, bytes: u64) -> Result<HostRange> {
        if bytes == 0 {
            return Ok(HostRange::default());
        }
        let held = self.room.take_whole(bytes.next_multiple_of(self.cluster_size())).await?;
        let range = held.keep();
        self.count_up(vec![range]).await?;
        Ok(range)
    }

    /// Writes a table of snapshots where nothing is, and says where.
    async fn write_snapshot_table(&self, all: &[Snapshot]) -> Result<HostRange> {
        let bytes: Vec<u8> = all.iter().flat_map(Snapshot::encode).collect();
        let range = self.room_for(bytes.len() as u64).await?;
        if !range.is_empty() {
            self.health.write(range.start(), Iov::from_slice(&bytes)).await?;
        }
        Ok(range)
    }

    /// The header leads to this table of snapshots now; the old one is given back.
    async fn publish_snapshots(&self, zone: &mut HeaderZone, table: HostRange, count: usize) -> Result<()> {
        self.write_refcounts(zone).await?;
        self.health.barrier().await?;
        let old = self.header.get();
        let (_, old_bytes) = self.read_snapshots(&old).await?;
        let header = Header { snapshots: count as u32, snapshot_table: table.start(), ..old };
        self.publish_header(zone, header).await?;
        let old = old.snapshot_table.range(old_bytes).align_outward(old.cluster_size());
        self.count_down(if old_bytes == 0 { Vec::new() } else { vec![old] }).await
    }

    async fn create_snapshot(
        self: &Rc<Self>,
        zone: &mut HeaderZone,
        mut all: Vec<Snapshot>,
        (name, date): (String, (u32, u32)),
        (l1, reachable): (&[u64], Vec<HostRange>),
    ) -> Result<()> {
        let header = self.header.get();
        self.count_up(reachable).await?;
        let kept = self.room_for(l1.len() as u64 * 8).await?;
        let shared: Vec<u64> = l1.iter().map(|entry| entry & !COPIED).collect();
        if !kept.is_empty() {
            self.health.write(kept.start(), bytes_of(&shared)).await?;
        }
        let next = all.iter().filter_map(|snapshot| snapshot.id.parse::<u64>().ok()).max().unwrap_or(0) + 1;
        all.push(Snapshot {
            l1_table: kept.start(),
            l1_entries: header.l1_entries,
            id: next.to_string(),
            name,
            date,
            vm_clock: 0,
            vm_state_size: 0,
            disk_size: Some(header.size),
            icount: Some(0),
            unknown_extra: Vec::new(),
        });
        let table = self.write_snapshot_table(&all).await?;
        self.write_refcounts(zone).await?;
        self.health.barrier().await?;
        // Nobody may write in place any more what is about to be shared.
        self.set_flags(l1, |_| false).await?;
        self.publish_snapshots(zone, table, all.len()).await?;
        self.write_refcounts(zone).await
    }

    fn check_tables(&self, snapshot: &Snapshot, l1: &[u64]) -> Result<()> {
        let header = self.header.get();
        let size = snapshot.disk_size.unwrap_or(header.size);
        if header.l1_entries_for(size) <= l1.len() as u64 && size <= header.max_size() {
            return Ok(());
        }
        let what = format!("snapshot '{}' has too few tables for its size", snapshot.name);
        Err(self.health.error(ErrorKind::Corrupt, Some(snapshot.l1_table), what))
    }

    /// `unused` is what the present state leads to.
    async fn apply_snapshot(
        self: &Rc<Self>,
        zone: &mut HeaderZone,
        snapshot: &Snapshot,
        (entries, reachable): (&[u64], Vec<HostRange>),
        unused: Vec<HostRange>,
    ) -> Result<()> {
        let header = self.header.get();
        let size = snapshot.disk_size.unwrap_or(header.size);
        self.count_up(reachable).await?;
        let shared: Vec<u64> = entries.iter().map(|entry| entry & !COPIED).collect();
        let place = self.room_for(shared.len() as u64 * 8).await?;
        if !place.is_empty() {
            // Up to the end of its last cluster: a table is written a slice at a time.
            let mut padded = shared;
            padded.resize(place.len() as usize / 8, 0);
            self.health.write(place.start(), bytes_of(&padded)).await?;
        }
        self.write_refcounts(zone).await?;
        self.health.barrier().await?;
        let old_l1 = self.header.get().l1_range().align_outward(header.cluster_size());
        let l1_entries = entries.len() as u32;
        let header = Header { size, l1_entries, l1_table: place.start(), ..self.header.get() };
        // A bitmap of another size would keep the image from being opened.
        let resized = size != self.size() && self.resize_bitmaps(zone, header).await?;
        if !resized {
            self.publish_header(zone, header).await?;
        }
        self.count_down(unused).await?;
        self.count_down(vec![old_l1]).await?;
        self.write_refcounts(zone).await
    }

    async fn delete_snapshot(
        self: &Rc<Self>,
        zone: &mut HeaderZone,
        mut all: Vec<Snapshot>,
        number: usize,
        (entries, unused): (&[u64], Vec<HostRange>),
    ) -> Result<()> {
        let snapshot = all.remove(number);
        let table = self.write_snapshot_table(&all).await?;
        self.publish_snapshots(zone, table, all.len()).await?;
        self.count_down(unused).await?;
        let l1 = snapshot.l1_table.range(entries.len() as u64 * 8).align_outward(self.cluster_size());
        self.count_down(vec![l1]).await?;
        self.write_refcounts(zone).await?;
        self.health.barrier().await?;
        // What nobody else refers to any more may be written in place again.
        self.set_flags(&self.active_l1(), |count| count == 1).await
    }

    pub(super) async fn snapshot_l1(&self, snapshot: &Snapshot) -> Result<Vec<u64>> {
        let Some(range) = snapshot.l1_range(&self.header.get()) else {
            let what = format!("snapshot '{}' has no place for its tables; check the image", snapshot.name);
            return Err(self.health.error(ErrorKind::Corrupt, Some(snapshot.l1_table), what));
        };
        let bytes = self.read_bytes(range).await?;
        Ok(bytes.as_chunks().0.iter().map(|entry| u64::from_be_bytes(*entry)).collect())
    }

    /// Sets the "copied" flags of the L1 table in use and of its L2 tables, as `own` says of each refcount.
    async fn set_flags(&self, l1: &[u64], own: impl Fn(u64) -> bool) -> Result<()> {
        let header = self.header.get();
        let flagged = async |raw: u64| -> Result<u64> {
            let count = self.refcount((raw & OFFSET) >> header.cluster_bits).await?;
            Ok(if own(count) { raw | COPIED } else { raw & !COPIED })
        };
        for (index, raw) in l1.iter().enumerate() {
            let Some(table) = self.l2_table(*raw, index)? else { continue };
            let mut bytes = self.read_bytes(table.range(header.cluster_size())).await?;
            let before = bytes.clone();
            let words = self.words();
            for number in (0..bytes.len() / 8).step_by(words) {
                let place = number * 8..number * 8 + 8;
                let word = |at: usize| bytes[at * 8..][..8].first_chunk().map_or(0, |b| u64::from_be_bytes(*b));
                let (raw, extended) = (word(number), if words == 2 { word(number + 1) } else { 0 });
                let packed = matches!(L2Entry::decode(raw, extended, &header), Ok(L2Entry::Packed(_)) | Err(_));
                if raw & OFFSET != 0 && !packed {
                    bytes[place].copy_from_slice(&flagged(raw).await?.to_be_bytes());
                }
            }
            if bytes != before {
                self.health.write(table, Iov::from_slice(&bytes)).await?;
            }
        }
        let mut flags = Vec::with_capacity(l1.len());
        for raw in l1 {
            flags.push(if raw & OFFSET == 0 { *raw } else { flagged(*raw).await? });
        }
        if flags != l1 {
            self.health.write(header.l1_table, bytes_of(&flags)).await?;
        }
        self.health.barrier().await
    }
}
