//! The walk over everything that refers to clusters: tables of the image and of its snapshots, and bitmaps.

use super::Core;
use super::check::{Scan, Stop, Walk};
use super::repair::Fixer;
use crate::Result;
use layout::qcow2::bitmap::{Bitmap, Bitmaps};
use layout::qcow2::snapshot::{self, Snapshot};
use layout::qcow2::{
    AUTOCLEAR_BITMAPS, COPIED, Extension, Extensions, Header, L1_RESERVED, L1Entry, L2_RESERVED, L2Entry, OFFSET, Slice,
};
use layout::{HostOffset, HostRange};
use ring::Iov;
use std::rc::Rc;

/// Whose tables are walked.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Owner {
    Active,
    Snapshot,
}

impl Scan {
    pub(super) async fn walk_snapshots(&mut self, core: &Rc<Core>, header: &Header) -> Walk<()> {
        let snapshots = match core.read_snapshots(header).await {
            Ok((snapshots, bytes)) => {
                self.claim(header.snapshot_table.range(bytes), header, "the table of snapshots")?;
                snapshots
            }
            Err(error) => {
                self.unread("the table of snapshots", &error);
                return Ok(());
            }
        };
        for snapshot in snapshots {
            let Some(l1) = snapshot.l1_range(header) else {
                self.corrupt(format!("snapshot {} ({}) has no place for an L1 table", snapshot.id, snapshot.name));
                continue;
            };
            if !self.claim(l1, header, &format!("the L1 table of snapshot {}", snapshot.id))? {
                continue;
            }
            let bytes = Iov::alloc(l1.len() as usize);
            if let Err(error) = core.store.read(l1.start(), bytes.clone()).await {
                self.unread(&format!("the L1 table of snapshot {}", snapshot.id), &error);
                continue;
            }
            let entries: Vec<u64> = bytes.to_vec().as_chunks().0.iter().map(|e| u64::from_be_bytes(*e)).collect();
            for (index, raw) in entries.into_iter().enumerate() {
                match L1Entry::decode(raw, header) {
                    Ok(L1Entry::Unallocated) => {}
                    Ok(L1Entry::Table(at)) if at.get() >> header.cluster_bits < self.clusters => {
                        let cluster = at.get() >> header.cluster_bits;
                        if self.metadata.contains(cluster) && !self.l2_tables.contains(cluster) {
                            self.corrupt(format!("snapshot {}: L1 entry {index} leads to other metadata", snapshot.id));
                            continue;
                        }
                        self.metadata.insert(cluster)?;
                        self.l2_tables.insert(cluster)?;
                        self.counts.add(cluster)?;
                        self.walk_l2(core, header, Owner::Snapshot, (index as u64, at), None).await?;
                    }
                    _ => self.corrupt(format!("snapshot {}: L1 entry {index} ({raw:#x}) leads nowhere", snapshot.id)),
                }
            }
        }
        Ok(())
    }

    pub(super) async fn walk_bitmaps(&mut self, core: &Rc<Core>, header: &Header) -> Walk<()> {
        if header.autoclear_features & AUTOCLEAR_BITMAPS == 0 {
            return Ok(());
        }
        match core.read_bitmaps(header).await {
            Ok(None) => {}
            Ok(Some((bitmaps, all))) => {
                self.claim(bitmaps.directory, header, "the directory of bitmaps")?;
                for (_, bitmap) in all {
                    self.walk_bitmap(core, header, &bitmap).await?;
                }
            }
            Err(error) => self.unread("the directory of bitmaps", &error),
        }
        Ok(())
    }

    async fn walk_bitmap(&mut self, core: &Rc<Core>, header: &Header, bitmap: &Bitmap) -> Walk<()> {
        let table = bitmap.table.range(u64::from(bitmap.table_entries) * 8);
        let what = format!("the table of bitmap '{}'", bitmap.name);
        if !self.claim(table, header, &what)? {
            return Ok(());
        }
        let mut rest = table;
        while !rest.is_empty() {
            let part = rest.first(1 << 20);
            let bytes = Iov::alloc(part.len() as usize);
            if let Err(error) = core.store.read(part.start(), bytes.clone()).await {
                self.unread(&what, &error);
                return Ok(());
            }
            for entry in bytes.to_vec().as_chunks().0 {
                let at = HostOffset(u64::from_be_bytes(*entry) & OFFSET);
                if at.get() != 0 {
                    self.claim(
                        at.range(header.cluster_size()),
                        header,
                        &format!("a part of bitmap '{}'", bitmap.name),
                    )?;
                }
            }
            rest = rest.skip(part.len());
        }
        Ok(())
    }

    /// Counts the L2 tables of the image itself; those that are good.
    pub(super) async fn claim_tables(
        &mut self,
        l1: &[u64],
        l1_at: HostOffset,
        header: &Header,
        core: &Rc<Core>,
        mut fixer: Option<&mut Fixer>,
    ) -> Walk<Vec<(u64, HostOffset)>> {
        let mut tables = Vec::new();
        for (index, raw) in l1.iter().enumerate() {
            if raw & L1_RESERVED != 0 {
                self.corrupt(format!("found L1 entry with reserved bits set: {raw:x}"));
            }
            let at = match L1Entry::decode(*raw, header) {
                Ok(L1Entry::Unallocated) => continue,
                Ok(L1Entry::Table(at)) => at,
                Err(why) => {
                    self.bad_entry(
                        format!("L1 entry {index}: {why}"),
                        core,
                        l1_at + index as u64 * 8,
                        fixer.as_deref_mut(),
                    )
                    .await?;
                    continue;
                }
            };
            let cluster = at.get() >> header.cluster_bits;
            // It may be a snapshot's, too, or (by mistake, mendable) two entries may lead to it; nothing else may be there.
            let clash = self.metadata.contains(cluster) && !self.l2_tables.contains(cluster);
            if cluster >= self.clusters || clash {
                let why = if clash { "overlaps other metadata" } else { "lies past the end of the file" };
                let what = format!("L1 entry {index}: the table at {:#x} {why}", at.get());
                self.bad_entry(what, core, l1_at + index as u64 * 8, fixer.as_deref_mut()).await?;
                continue;
            }
            self.metadata.insert(cluster)?;
            self.l2_tables.insert(cluster)?;
            self.counts.add(cluster)?;
            tables.push((index as u64, at));
        }
        Ok(tables)
    }

    async fn bad_entry(
        &mut self,
        what: String,
        core: &Rc<Core>,
        at: HostOffset,
        fixer: Option<&mut Fixer>,
    ) -> Walk<()> {
        match fixer {
            None => self.corrupt(what),
            Some(fixer) => {
                self.say(format!("Repairing {what}: entry cleared"));
                fixer.clear(core, at, 1).await.map_err(Stop::Failed)?;
            }
        }
        Ok(())
    }

    pub(super) async fn walk_l2(
        &mut self,
        core: &Rc<Core>,
        header: &Header,
        owner: Owner,
        (index, table): (u64, HostOffset),
        mut fixer: Option<&mut Fixer>,
    ) -> Walk<()> {
        let words = core.words();
        let bytes = Iov::alloc(header.cluster_size() as usize);
        if let Err(error) = core.store.read(table, bytes.clone()).await {
            self.unread(&format!("the L2 table at {:#x}", table.get()), &error);
            return Ok(());
        }
        let entries = Slice::decode(&bytes.to_vec());
        let entries = entries.raw();
        let mut next = 0;
        while next < entries.len() / words {
            let n = next;
            let (raw, extended) = (entries[n * words], if words == 2 { entries[n * words + 1] } else { 0 });
            next += 1;
            if raw == 0 && extended == 0 {
                continue;
            }
            // What nearly every image is made of: plain clusters, one behind the other.
            let run = plain_run(&entries[n * words..], words, header.cluster_size());
            if run > 1 && self.count_run(raw, run as u64, header, owner)? {
                next = n + run;
                continue;
            }
            let guest = index * header.table_reach() + n as u64 * header.cluster_size();
            let place = table + (n * words) as u64 * 8;
            let flaw = match L2Entry::decode(raw, extended, header) {
                Ok(entry) => self.count_entry(entry, raw, header, owner)?,
                Err(why) => Some(Flaw::Broken(why.to_string())),
            };
            if flaw.is_none() && raw & L2_RESERVED != 0 && !is_packed(raw) {
                self.corrupt(format!("found L2 entry with reserved bits set: {raw:x}"));
            }
            let Some(flaw) = flaw else { continue };
            let what = format!("L2 entry for guest offset {guest:#x}: {}", flaw.what());
            match (&flaw, fixer.as_deref_mut()) {
                (_, None) => self.corrupt(what),
                (Flaw::Broken(_), Some(fixer)) => {
                    self.say(format!("Repairing {what}: entry cleared"));
                    fixer.clear(core, place, words).await.map_err(Stop::Failed)?;
                }
                (Flaw::OnMetadata(at), Some(fixer)) => {
                    let to = fixer.copy(core, *at).await.map_err(Stop::Failed)?;
                    self.say(format!("Repairing {what}: copied to {to}"));
                    self.clusters = self.clusters.max((to.get() >> header.cluster_bits) + 1);
                    self.counts.add(to.get() >> header.cluster_bits)?;
                    fixer.set(core, place, raw & !OFFSET | to.get() | COPIED).await.map_err(Stop::Failed)?;
                }
            }
        }
        Ok(())
    }

    /// Counts plain clusters that lie one behind the other, if nothing is wrong with any of them.
    fn count_run(&mut self, raw: u64, run: u64, header: &Header, owner: Owner) -> Walk<bool> {
        if header.has_data_file() {
            return Ok(false);
        }
        let at = raw & OFFSET;
        let first = at >> header.cluster_bits;
        let sound = at != 0 && at.is_multiple_of(header.cluster_size()) && first + run <= self.clusters;
        if !sound || self.metadata.seek(first, first + run, true).is_some() {
            return Ok(false);
        }
        self.counts.add_run(first, run)?;
        if owner == Owner::Active {
            self.report.allocated_clusters += run;
            self.report.fragmented_clusters += u64::from(self.next_data.is_some_and(|next| next != first));
            self.next_data = Some(first + run);
        }
        Ok(true)
    }

    /// Counts what an entry refers to, unless something is wrong with it.
    fn count_entry(&mut self, entry: L2Entry, raw: u64, header: &Header, owner: Owner) -> Walk<Option<Flaw>> {
        let range = L2Entry::referred(raw, header);
        if range.is_empty() {
            let outside = header.has_data_file() && raw & OFFSET | raw & COPIED != 0;
            self.report.allocated_clusters += u64::from(outside && owner == Owner::Active);
            return Ok(None);
        }
        let clusters = range.start().get() >> header.cluster_bits..range.end().get() >> header.cluster_bits;
        let packed = matches!(entry, L2Entry::Packed(_));
        // A packed cluster's last sector may be said to reach past the end of the file; it does not hold anything there.
        let last = if packed { clusters.start + 1 } else { clusters.end };
        if last > self.clusters {
            return Ok(Some(Flaw::Broken(format!("{raw:#x} leads past the end of the file"))));
        }
        for cluster in clusters.clone().take_while(|cluster| *cluster < self.clusters) {
            if self.metadata.contains(cluster) {
                let at = HostOffset(cluster << header.cluster_bits);
                return Ok(Some(if packed {
                    Flaw::Broken(format!("the packed cluster at {at} lies on metadata"))
                } else {
                    Flaw::OnMetadata(at)
                }));
            }
            self.counts.add(cluster)?;
        }
        if owner == Owner::Active {
            self.report.allocated_clusters += 1;
            if packed {
                self.report.compressed_clusters += 1;
                self.report.fragmented_clusters += 1;
            } else {
                let scattered = self.next_data.is_some_and(|next| next != clusters.start);
                self.report.fragmented_clusters += u64::from(scattered);
                self.next_data = Some(clusters.end);
            }
        }
        Ok(None)
    }
}

fn is_packed(raw: u64) -> bool {
    raw & 1 << 62 != 0
}

/// How many entries, the first included, are for plain clusters that lie one behind the other.
pub(super) fn plain_run(entries: &[u64], words: usize, cluster: u64) -> usize {
    const ODD: u64 = 1 << 62 | 1 | L2_RESERVED;
    let first = entries[0];
    if first & ODD != 0 || words == 2 && entries[1] != u64::from(u32::MAX) {
        return 0;
    }
    let alike = |(n, entry): &(usize, &[u64])| {
        Some(entry[0]) == first.checked_add(*n as u64 * cluster) && (words == 1 || entry[1] == u64::from(u32::MAX))
    };
    entries.chunks_exact(words).enumerate().take_while(alike).count()
}

/// What is wrong with an entry.
enum Flaw {
    /// It cannot be followed.
    Broken(String),
    /// Its cluster is metadata.
    OnMetadata(HostOffset),
}

impl Flaw {
    fn what(&self) -> String {
        match self {
            Self::Broken(why) => why.clone(),
            Self::OnMetadata(at) => format!("the cluster at {at} is metadata"),
        }
    }
}

impl Core {
    /// The table of snapshots, and its length in bytes.
    pub(super) async fn read_snapshots(&self, header: &Header) -> Result<(Vec<Snapshot>, u64)> {
        let mut snapshots = Vec::new();
        if header.snapshots == 0 {
            return Ok((snapshots, 0));
        }
        // Entries are of any length: as much is read as there may be, by and by.
        let most = self.store.size().saturating_sub(header.snapshot_table.get()).min(snapshot::MAX_TABLE_BYTES);
        let mut read = (64 << 10).min(most);
        let mut at = 0;
        let mut bytes = self.read_bytes(header.snapshot_table.range(read)).await?;
        while snapshots.len() < header.snapshots as usize {
            let rest = bytes.get(at..).unwrap_or_default();
            match Snapshot::decode(rest, header.snapshot_table + at as u64) {
                Ok((snapshot, len)) => {
                    snapshots.push(snapshot);
                    at += len;
                }
                Err(_) if read < most => {
                    read = (read * 4).min(most);
                    bytes = self.read_bytes(header.snapshot_table.range(read)).await?;
                }
                Err(error) => {
                    let what = format!("the table of snapshots is damaged: {error}");
                    return Err(self.health.corrupt(error.offset(), what));
                }
            }
        }
        Ok((snapshots, at as u64))
    }

    pub(super) async fn read_bytes(&self, range: HostRange) -> Result<Vec<u8>> {
        let bytes = Iov::alloc(range.len() as usize);
        self.store.read(range.start(), bytes.clone()).await?;
        Ok(bytes.to_vec())
    }

    /// The directory of bitmaps, if there is one: each with the place of its entry.
    pub(super) async fn read_bitmaps(&self, header: &Header) -> Result<Option<(Bitmaps, Vec<(HostOffset, Bitmap)>)>> {
        let damaged = |error: layout::qcow2::Error| {
            self.health.corrupt(error.offset(), format!("the directory of bitmaps is damaged: {error}"))
        };
        let start = u64::from(header.header_bytes);
        let end = header.backing_name.map(|name| name.start().get()).filter(|name| *name > start);
        let area = self.read_bytes(HostOffset(start).range(end.unwrap_or(header.cluster_size()) - start)).await?;
        let extensions = Extensions::decode(&area, start).map_err(damaged)?;
        let Some(data) = extensions.get(Extension::BITMAPS) else { return Ok(None) };
        let bitmaps = Bitmaps::decode(data, header).map_err(damaged)?;
        let bytes = self.read_bytes(bitmaps.directory).await?;
        let mut all = Vec::new();
        let mut at = 0;
        for _ in 0..bitmaps.count {
            let place = bitmaps.directory.start() + at as u64;
            let (bitmap, len) = Bitmap::decode(bytes.get(at..).unwrap_or_default(), place).map_err(damaged)?;
            all.push((place, bitmap));
            at += len;
        }
        Ok(Some((bitmaps, all)))
    }
}
