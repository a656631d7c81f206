//! Consistency of what is on disk: every cluster is counted as often as it is referred to, and every reference is good.
//!
//! Three walks: over everything that refers to clusters (header, tables, snapshots, bitmaps), over the refcounts, and over the
//! image's own tables for their "copied" flags, which must say what the references say.
//!
//! **Invariants.**
//! * Tables are streamed; memory is the number of references to each cluster, bounded by what the store really holds.
//! * What could not be read is not judged: then nothing is called a leak, and nothing is repaired on its account.
//! * Tables are claimed before the first data cluster is judged: data that lies where a table is, is found. Refcounts come last:
//!   they can be made anew from everything else, so they never take anything's place.

use super::Core;
use super::counts::{Counts, TooScattered};
use super::repair::Fixer;
use crate::cluster_set::ClusterSet;
use crate::{CheckReport, ErrorKind, Repair, Result};
use layout::qcow2::bitmap::{Bitmap, Bitmaps};
use layout::qcow2::snapshot::{self, Snapshot};
use layout::qcow2::{
    AUTOCLEAR_BITMAPS, COPIED, Extension, Extensions, Features, Header, L1Entry, L2Entry, OFFSET, is_own, refcount,
};
use layout::{HostOffset, HostRange};
use ring::Iov;
use std::rc::Rc;

/// Messages kept.
const MAX_MESSAGES: usize = 200;

/// Runs of wrong refcounts that are remembered for one repair; a repair looks again afterwards.
const MAX_RUNS: usize = 1 << 20;

/// What a walk over everything found.
pub(super) struct Scan {
    /// Counts and messages.
    pub(super) report: CheckReport,
    pub(super) counts: Counts,
    /// Clusters of tables and the like; no data may be there.
    metadata: ClusterSet,
    /// Of these, L2 tables: several L1 tables may lead to one.
    l2_tables: ClusterSet,
    /// Refcounts that are too low, and what they should be.
    pub(super) low: Vec<(HostRange, u64)>,
    /// Refcounts that are too high, and what they should be.
    pub(super) high: Vec<(HostRange, u64)>,
    /// Blocks that cannot be where the refcount table says.
    pub(super) bad_blocks: Vec<u64>,
    /// The refcount table itself cannot be where the header says.
    pub(super) bad_table: bool,
    /// "Copied" flags that are wrong.
    pub(super) flags: u64,
    /// Clusters in the store, a part at its end included.
    clusters: u64,
    next_data: Option<u64>,
}

/// Why a walk ends early.
pub(super) enum Stop {
    Scattered,
    Failed(crate::Error),
}

impl From<TooScattered> for Stop {
    fn from(_: TooScattered) -> Self {
        Self::Scattered
    }
}

impl From<crate::cluster_set::TooScattered> for Stop {
    fn from(_: crate::cluster_set::TooScattered) -> Self {
        Self::Scattered
    }
}

type Walk<T> = std::result::Result<T, Stop>;

/// Whose tables are walked.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Owner {
    Active,
    Snapshot,
}

impl Scan {
    pub(super) fn say(&mut self, message: String) {
        if self.report.messages.len() < MAX_MESSAGES {
            self.report.messages.push(message);
        } else if self.report.messages.len() == MAX_MESSAGES {
            self.report.messages.push("further findings are counted, not listed".to_owned());
        }
    }

    fn corrupt(&mut self, message: String) {
        self.report.corruptions += 1;
        self.say(format!("ERROR {message}"));
    }

    fn unread(&mut self, what: &str, error: &impl std::fmt::Display) {
        self.report.check_errors += 1;
        self.say(format!("ERROR {what} could not be read: {error}"));
    }

    /// Whether everything could be read and judged.
    pub(super) fn is_complete(&self) -> bool {
        self.report.check_errors == 0
    }

    /// Walks everything; with a fixer, repairs entries on the way.
    pub(super) async fn run(core: &Rc<Core>, fixer: Option<&mut Fixer>) -> Result<Self> {
        let header = core.header.get();
        let mut scan = Self {
            report: CheckReport {
                total_clusters: header.size.div_ceil(header.cluster_size()),
                ..CheckReport::default()
            },
            counts: Counts::default(),
            metadata: ClusterSet::default(),
            l2_tables: ClusterSet::default(),
            low: Vec::new(),
            high: Vec::new(),
            bad_blocks: Vec::new(),
            bad_table: false,
            flags: 0,
            clusters: core.store.size().div_ceil(header.cluster_size()),
            next_data: None,
        };
        match scan.walk(core, fixer).await {
            Ok(()) => {}
            Err(Stop::Scattered) => {
                scan.report.check_errors += 1;
                let name = core.store.name();
                scan.say(format!("ERROR '{name}': the image's clusters are too scattered to be checked in memory"));
            }
            Err(Stop::Failed(error)) => return Err(error),
        }
        scan.report.image_end_offset = scan.counts.end() << header.cluster_bits;
        Ok(scan)
    }

    async fn walk(&mut self, core: &Rc<Core>, mut fixer: Option<&mut Fixer>) -> Walk<()> {
        let header = core.header.get();
        self.claim(HostOffset::ZERO.range(1), &header, "the header")?;
        self.claim(header.l1_range(), &header, "the L1 table")?;
        self.walk_snapshots(core, &header).await?;
        self.walk_bitmaps(core, &header).await?;
        let l1 = core.tables.borrow().l1().get(..header.l1_entries as usize).unwrap_or_default().to_vec();
        let tables = self.claim_tables(&l1, header.l1_table, &header, core, fixer.as_deref_mut()).await?;
        for (index, table) in tables {
            self.walk_l2(core, &header, Owner::Active, (index, table), fixer.as_deref_mut()).await?;
        }
        if let Some(fixer) = fixer {
            fixer.finish(core).await.map_err(Stop::Failed)?;
        }
        self.claim_refcounts(core, &header)?;
        self.compare(core, &header).await?;
        self.check_flags(core, &header, false).await
    }

    /// Counts the refcount table and its blocks, last: they can be made anew from everything else, so where something else is too,
    /// it is they that are wrong.
    fn claim_refcounts(&mut self, core: &Core, header: &Header) -> Walk<()> {
        let table = header.refcount_table.range(header.refcount_table_bytes());
        self.bad_table = table.is_empty() || !self.claim_free(table, header)?;
        if self.bad_table {
            self.corrupt(format!("the refcount table at offset {:#x} cannot be there", table.start().get()));
            return Ok(());
        }
        let blocks = core.refcounts.borrow().table().to_vec();
        for (number, raw) in blocks.into_iter().enumerate() {
            let at = HostOffset(raw & refcount::BLOCK_OFFSET);
            if at.get() == 0 {
                continue;
            }
            let sound =
                at.is_aligned(header.cluster_size()) && self.claim_free(at.range(header.cluster_size()), header)?;
            if !sound {
                self.corrupt(format!("refcount block {number} cannot be at offset {:#x}", at.get()));
                self.bad_blocks.push(number as u64);
            }
        }
        Ok(())
    }

    /// Counts clusters that nothing else refers to; false where something does, or the file has ended.
    fn claim_free(&mut self, range: HostRange, header: &Header) -> Walk<bool> {
        let clusters = range.start().get() >> header.cluster_bits..range.end().get().div_ceil(header.cluster_size());
        if clusters.end > self.clusters || clusters.clone().any(|cluster| self.counts.get(cluster) > 0) {
            return Ok(false);
        }
        self.counts.add_run(clusters.start, clusters.end - clusters.start)?;
        Ok(true)
    }

    /// Counts the clusters of metadata. False, and a corruption, where they cannot be that.
    fn claim(&mut self, range: HostRange, header: &Header, what: &str) -> Walk<bool> {
        if range.is_empty() {
            return Ok(true);
        }
        let clusters = range.start().get() >> header.cluster_bits..range.end().get().div_ceil(header.cluster_size());
        let mut sound = true;
        if clusters.end > self.clusters {
            self.corrupt(format!("{what} at offset {:#x} reaches past the end of the file", range.start().get()));
            return Ok(false);
        }
        for cluster in clusters {
            sound &= self.metadata.insert(cluster)?;
            self.counts.add(cluster)?;
        }
        if !sound {
            self.corrupt(format!("{what} at offset {:#x} overlaps other metadata", range.start().get()));
        }
        Ok(sound)
    }

    async fn walk_snapshots(&mut self, core: &Rc<Core>, header: &Header) -> Walk<()> {
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

    async fn walk_bitmaps(&mut self, core: &Rc<Core>, header: &Header) -> Walk<()> {
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
    async fn claim_tables(
        &mut self,
        l1: &[u64],
        l1_at: HostOffset,
        header: &Header,
        core: &Rc<Core>,
        mut fixer: Option<&mut Fixer>,
    ) -> Walk<Vec<(u64, HostOffset)>> {
        let mut tables = Vec::new();
        for (index, raw) in l1.iter().enumerate() {
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

    async fn walk_l2(
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
        let entries = layout::qcow2::Slice::decode(&bytes.to_vec());
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

    /// Compares the refcounts on disk with the references found.
    async fn compare(&mut self, core: &Rc<Core>, header: &Header) -> Walk<()> {
        let per_block = header.refcounts_per_block();
        let table = core.refcounts.borrow().table().to_vec();
        let mut number = 0;
        let end = self.counts.end().max(self.clusters).div_ceil(per_block).max(table.len() as u64);
        while number < end {
            let raw = table.get(number as usize).copied().unwrap_or(0) & refcount::BLOCK_OFFSET;
            let first = number * per_block;
            if raw == 0 || self.bad_table || self.bad_blocks.contains(&number) {
                // Nothing is counted here; where nothing is referred to either, larger steps will do.
                let (mut at, stop) = (first, first + per_block);
                while at < stop {
                    let (run, len) = self.counts.run(at);
                    let len = len.min(stop - at);
                    let wrong: Vec<(u64, u32)> = run.map_or_else(Vec::new, |run| {
                        let found = run[..len as usize].iter().enumerate().filter(|(_, count)| **count != 0);
                        found.map(|(n, count)| (at + n as u64, *count)).collect()
                    });
                    for (cluster, references) in wrong {
                        self.judge(cluster, 0, references, header);
                    }
                    at += len;
                }
                number += 1;
                continue;
            }
            let bytes = Iov::alloc(header.cluster_size() as usize);
            if let Err(error) = core.store.read(HostOffset(raw), bytes.clone()).await {
                self.unread(&format!("refcount block {number}"), &error);
                number += 1;
                continue;
            }
            let counted = refcount::all(&bytes.to_vec(), header.refcount_order);
            let mut at = 0;
            while at < per_block {
                let (run, len) = self.counts.run(first + at);
                let len = len.min(per_block - at);
                let counted = counted.get(at as usize..(at + len) as usize).unwrap_or_default();
                let mut wrong = Vec::new();
                match run {
                    Some(run) => {
                        let pairs = counted.iter().zip(run).enumerate();
                        let differ = pairs.filter(|(_, (counted, references))| **counted != u64::from(**references));
                        wrong.extend(
                            differ.map(|(n, (counted, references))| (first + at + n as u64, *counted, *references)),
                        );
                    }
                    None => {
                        let in_use = counted.iter().enumerate().filter(|(_, counted)| **counted != 0);
                        wrong.extend(in_use.map(|(n, counted)| (first + at + n as u64, *counted, 0)));
                    }
                }
                for (cluster, counted, references) in wrong {
                    self.judge(cluster, counted, references, header);
                }
                at += len;
            }
            number += 1;
        }
        Ok(())
    }

    fn judge(&mut self, cluster: u64, counted: u64, references: u32, header: &Header) {
        let range = HostOffset(cluster << header.cluster_bits).range(header.cluster_size());
        let right = u64::from(references);
        let runs = if counted < right {
            self.report.corruptions += 1;
            self.say(format!("ERROR cluster {cluster} refcount={counted} reference={references}"));
            &mut self.low
        } else if self.report.check_errors == 0 {
            self.report.leaks += 1;
            self.say(format!("Leaked cluster {cluster} refcount={counted} reference={references}"));
            &mut self.high
        } else {
            return;
        };
        let count = runs.len();
        match runs.last_mut() {
            Some((run, value)) if *value == right && run.end() == range.start() => {
                *run = run.start().range(run.len() + range.len());
            }
            _ if count < MAX_RUNS => runs.push((range, right)),
            _ => {}
        }
    }

    /// Looks at the "copied" flags of the image's own tables; `fix`: sets them right, durably.
    pub(super) async fn check_flags(&mut self, core: &Rc<Core>, header: &Header, fix: bool) -> Walk<()> {
        let l1 = core.tables.borrow().l1().get(..header.l1_entries as usize).unwrap_or_default().to_vec();
        let words = core.words();
        for (index, raw) in l1.into_iter().enumerate() {
            let Ok(L1Entry::Table(table)) = L1Entry::decode(raw, header) else { continue };
            if table.get() >> header.cluster_bits >= self.clusters {
                continue;
            }
            self.check_flag("L2 cluster: l1_entry", core, header, (header.l1_table + index as u64 * 8, raw), fix)
                .await?;
            let bytes = Iov::alloc(header.cluster_size() as usize);
            if core.store.read(table, bytes.clone()).await.is_err() {
                continue;
            }
            // Clusters of a table that is shared are shared, too: their references say so.
            let entries = layout::qcow2::Slice::decode(&bytes.to_vec());
            let entries = entries.raw();
            let mut next = 0;
            while next < entries.len() / words {
                let n = next;
                let (raw, extended) = (entries[n * words], if words == 2 { entries[n * words + 1] } else { 0 });
                next += 1;
                if raw == 0 {
                    continue;
                }
                let run = plain_run(&entries[n * words..], words, header.cluster_size());
                if run > 1 && is_own(raw) && self.all_once((raw & OFFSET) >> header.cluster_bits, run as u64) {
                    next = n + run;
                    continue;
                }
                let plain = !matches!(L2Entry::decode(raw, extended, header), Ok(L2Entry::Packed(_)) | Err(_));
                if raw & OFFSET != 0 && plain {
                    let place = table + (n * words) as u64 * 8;
                    self.check_flag("data cluster: l2_entry", core, header, (place, raw), fix).await?;
                }
            }
        }
        Ok(())
    }

    /// Whether each of `len` clusters from `first` on is referred to once.
    fn all_once(&self, first: u64, len: u64) -> bool {
        let mut at = first;
        while at < first + len {
            let (Some(run), step) = self.counts.run(at) else { return false };
            let step = step.min(first + len - at);
            if run[..step as usize].iter().any(|count| *count != 1) {
                return false;
            }
            at += step;
        }
        true
    }

    async fn check_flag(
        &mut self,
        what: &str,
        core: &Rc<Core>,
        header: &Header,
        (place, raw): (HostOffset, u64),
        fix: bool,
    ) -> Walk<()> {
        let references = self.counts.get((raw & OFFSET) >> header.cluster_bits);
        if is_own(raw) == (references == 1) || references == 0 {
            return Ok(());
        }
        if fix {
            let entry = Iov::from_slice(&(raw ^ COPIED).to_be_bytes());
            core.health.write(place, entry).await.map_err(Stop::Failed)?;
            return Ok(());
        }
        self.flags += 1;
        self.corrupt(format!("OFLAG_COPIED {what}={raw:x} refcount={references}"));
        Ok(())
    }
}

/// How many entries, the first included, are for plain clusters that lie one behind the other.
fn plain_run(entries: &[u64], words: usize, cluster: u64) -> usize {
    const COMPRESSED_OR_ZERO: u64 = 1 << 62 | 1;
    let first = entries[0];
    if first & COMPRESSED_OR_ZERO != 0 || words == 2 && entries[1] != u64::from(u32::MAX) {
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

    /// See [`crate::Image::check`].
    pub(super) async fn check(self: &Rc<Self>, repair: Repair) -> Result<CheckReport> {
        if repair != Repair::None {
            self.health.check_writable()?;
        }
        if self.active.get() > 0 {
            let what = "the image is being written to; check it when it is idle";
            return Err(self.health.error(ErrorKind::Busy, None, what));
        }
        if self.health.read_only() {
            let table = self.read_refcount_table(&self.header.get()).await?;
            *self.refcounts.borrow_mut() = super::refcount::Refcounts::new(table);
        } else if !self.for_check && !self.health.is_poisoned() {
            self.settle().await?;
        }
        let before = Scan::run(self, None).await?.report;
        // What cannot be read today may be readable another day: nothing is given up on its account.
        if repair == Repair::None || before.is_clean() || before.check_errors > 0 {
            if repair == Repair::All && before.is_clean() {
                self.clear_marks().await?;
            }
            return Ok(before);
        }
        let mut after = self.repair(repair).await?;
        after.corruptions_fixed = before.corruptions.saturating_sub(after.corruptions);
        after.leaks_fixed = before.leaks.saturating_sub(after.leaks);
        let mut messages = before.messages;
        messages.append(&mut after.messages);
        messages.truncate(2 * MAX_MESSAGES);
        after.messages = messages;
        if after.is_clean() {
            self.clear_marks().await?;
        }
        Ok(after)
    }

    /// After an unclean end: refcounts may be behind. They are set right before anything is written.
    pub(super) async fn recover(self: &Rc<Self>) -> Result<()> {
        let found = Scan::run(self, None).await?.report;
        let report = if found.check_errors > 0 { found } else { self.repair(Repair::All).await? };
        if !report.is_clean() {
            let first = report.messages.first().cloned().unwrap_or_default();
            let what = format!(
                "the image was not closed cleanly and cannot be repaired automatically ({} unreadable tables, {} damaged \
                 entries left); check it, or open it read-only; first finding: {first}",
                report.check_errors, report.corruptions
            );
            return Err(self.health.error(ErrorKind::Corrupt, None, what));
        }
        tracing::info!(image = self.store.name(), "refcounts were set right after an unclean end");
        self.clear_marks().await
    }

    /// Nothing is left to repair: the header says so.
    async fn clear_marks(&self) -> Result<()> {
        let header = self.header.get();
        let marks = Features::DIRTY | Features::CORRUPT;
        if !header.features.intersects(marks) || self.health.read_only() {
            return Ok(());
        }
        self.health.barrier().await?;
        let mut zone = self.zone.lock().await;
        self.publish_header(&mut zone, Header { features: header.features - marks, ..header }).await
    }
}
