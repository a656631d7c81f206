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
use super::references::Owner;
use super::repair::Fixer;
use crate::cluster_set::ClusterSet;
use crate::{CheckReport, ErrorKind, Repair, Result};
use layout::qcow2::{Features, Header, refcount};
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
    pub(super) metadata: ClusterSet,
    /// Of these, L2 tables: several L1 tables may lead to one.
    pub(super) l2_tables: ClusterSet,
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
    pub(super) clusters: u64,
    pub(super) next_data: Option<u64>,
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

pub(super) type Walk<T> = std::result::Result<T, Stop>;

impl Scan {
    pub(super) fn say(&mut self, message: String) {
        if self.report.messages.len() < MAX_MESSAGES {
            self.report.messages.push(message);
        } else if self.report.messages.len() == MAX_MESSAGES {
            self.report.messages.push("further findings are counted, not listed".to_owned());
        }
    }

    pub(super) fn corrupt(&mut self, message: String) {
        self.report.corruptions += 1;
        self.say(format!("ERROR {message}"));
    }

    pub(super) fn unread(&mut self, what: &str, error: &impl std::fmt::Display) {
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
        if header.crypt != 0 {
            match super::open::encryption_header(&*core.store, &header).await {
                Ok(place) => drop(self.claim(place, &header, "the header of the encryption")?),
                Err(error) => self.unread("the header of the encryption", &error),
            }
        }
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
    pub(super) fn claim(&mut self, range: HostRange, header: &Header, what: &str) -> Walk<bool> {
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
}

impl Core {
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
