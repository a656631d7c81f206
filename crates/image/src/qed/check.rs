//! Consistency of what is on disk: every cluster referred to once, every reference good.
//!
//! The L1 table is walked first, so that all tables are known before the first data cluster is judged; where a table and a
//! data cluster claim the same place, the table has it (and a repair copies the data away before it changes any entry
//! there). All of the L1 table counts, also entries behind the disk's end: they
//! keep their clusters from being taken for free.
//!
//! **Invariants.**
//! * Tables are streamed; memory is the set of clusters and the list of tables, each bounded by what the store really holds.
//! * What could not be read is not judged: then no cluster is called a leak, and nothing is repaired on its account.

use super::repair::Fixer;
use super::{Core, Space, Tables};
use crate::cluster_set::{ClusterSet, TooScattered};
use crate::{CheckReport, ErrorKind, Repair, Result};
use layout::HostOffset;
use layout::qed::{Features, L1Entry, L2Entry, SLICE_BYTES, SLICE_ENTRIES, Slice};
use ring::Iov;
use std::collections::HashSet;
use std::rc::Rc;
use store::{Backing, Store};

/// Messages kept.
const MAX_MESSAGES: usize = 200;

/// How much of a table one read brings.
const READ_BYTES: u64 = 256 << 10;

/// What a walk over all tables found.
pub(super) struct Scan {
    /// Counts and messages.
    pub(super) report: CheckReport,
    /// Clusters in use behind the header's.
    pub(super) used: ClusterSet,
    /// Good tables: L1 index and place.
    pub(super) tables: Vec<(u64, HostOffset)>,
    /// Whole clusters in the store when the walk began.
    pub(super) clusters: u64,
    /// Where the L2 entries are whose data was copied away from under a table.
    rescued: HashSet<HostOffset>,
}

/// What is wrong with an entry.
enum Flaw {
    /// It cannot be followed, or leads into the header or the L1 table.
    Broken(String),
    /// Its cluster is somebody else's already.
    Shared(HostOffset),
}

impl Scan {
    fn say(&mut self, message: String) {
        if self.report.messages.len() < MAX_MESSAGES {
            self.report.messages.push(message);
        } else if self.report.messages.len() == MAX_MESSAGES {
            self.report.messages.push("further findings are counted, not listed".to_owned());
        }
    }

    /// Walks all tables; with a fixer, repairs what is broken on the way.
    pub(super) async fn run(core: &Rc<Core>, mut fixer: Option<&mut Fixer>) -> Result<Self> {
        let header = core.header.get();
        let geometry = core.geometry;
        let mut scan = Self {
            report: CheckReport { total_clusters: geometry.clusters(header.image_size), ..CheckReport::default() },
            used: ClusterSet::default(),
            tables: Vec::new(),
            clusters: core.store.size() >> geometry.cluster_bits(),
            rescued: HashSet::new(),
        };
        let result = async {
            scan.claim(core, header.l1_table)?;
            scan.walk_l1(core, fixer.as_deref_mut()).await?;
            if let Some(fixer) = fixer.as_deref_mut() {
                for number in 0..scan.tables.len() {
                    scan.rescue_data_under_tables(core, scan.tables[number].1, fixer).await?;
                }
            }
            for number in 0..scan.tables.len() {
                scan.walk_l2(core, scan.tables[number], fixer.as_deref_mut()).await?;
            }
            Ok::<(), Stop>(())
        };
        match result.await {
            Ok(()) => {}
            Err(Stop::Scattered) => {
                scan.report.check_errors += 1;
                scan.say(format!(
                    "'{}': the image's clusters are too scattered to be checked in memory",
                    core.store.name()
                ));
            }
            Err(Stop::Failed(error)) => return Err(error),
        }
        if let Some(fixer) = fixer {
            fixer.finish().await?;
        }
        scan.count_leaks(core);
        Ok(scan)
    }

    /// Clusters of the store, those in use counted from 0.
    pub(super) fn count_leaks(&mut self, core: &Core) {
        let header = u64::from(core.header.get().header_clusters);
        self.clusters = core.store.size() >> core.geometry.cluster_bits();
        // A device has the size it has; what is not in use there is no leak.
        let known = self.report.check_errors == 0 && core.room.space.borrow().growable();
        self.report.leaks = if known { self.clusters.saturating_sub(header + self.used.len()) } else { 0 };
        self.report.image_end_offset = self.used.end().max(header) << core.geometry.cluster_bits();
    }

    /// Whether everything was read and is sound: only then is what is left over known to be free.
    pub(super) fn is_sound(&self) -> bool {
        self.report.check_errors == 0 && self.report.corruptions == 0
    }

    /// Marks a table's clusters as used; how many of them were already.
    fn claim(&mut self, core: &Core, table: HostOffset) -> std::result::Result<u64, TooScattered> {
        let first = table.get() >> core.geometry.cluster_bits();
        let clusters = first..first + u64::from(core.geometry.table_size());
        let shared = self.used.count(clusters.clone());
        if shared == 0 {
            for cluster in clusters {
                self.used.insert(cluster)?;
            }
        }
        Ok(shared)
    }

    async fn walk_l1(&mut self, core: &Rc<Core>, mut fixer: Option<&mut Fixer>) -> std::result::Result<(), Stop> {
        let l1 = core.header.get().l1_table;
        let length = core.store.size();
        let mut reader = TableReader::new(core, l1);
        while let Some((number, mut slice)) = self.next(core, &mut reader, "L1 table").await {
            let mut changed = false;
            let entries = *slice.raw();
            for (i, raw) in entries.into_iter().enumerate() {
                let index = number * SLICE_ENTRIES as u64 + i as u64;
                let (flaws, what) = match core.rules.l1(raw, length) {
                    Ok(L1Entry::Unallocated) => continue,
                    Ok(L1Entry::Table(at)) => match self.claim(core, at)? {
                        0 => {
                            self.tables.push((index, at));
                            continue;
                        }
                        shared => (shared, format!("the table at {at} overlaps another table or the header")),
                    },
                    Err(why) => (1, why.to_string()),
                };
                let at = (l1 + index * 8).get();
                let mut fate = "";
                if fixer.is_some() {
                    slice.set(i, 0);
                    changed = true;
                    self.report.corruptions_fixed += flaws;
                    fate = ": entry cleared";
                } else {
                    self.report.corruptions += flaws;
                }
                self.say(format!("'{}' at offset {at}: L1 entry {index}: {what}{fate}", core.store.name()));
            }
            if let (true, Some(fixer)) = (changed, fixer.as_deref_mut()) {
                fixer.write_slice(l1 + number * SLICE_BYTES as u64, &slice).await.map_err(Stop::Failed)?;
            }
        }
        Ok(())
    }

    /// Copies data that lies where a table is, before anything there is changed. Only tables are marked as used so far.
    async fn rescue_data_under_tables(
        &mut self,
        core: &Rc<Core>,
        table: HostOffset,
        fixer: &mut Fixer,
    ) -> std::result::Result<(), Stop> {
        let length = self.clusters << core.geometry.cluster_bits();
        let l1 = core.header.get().l1_range();
        let mut reader = TableReader::new(core, table);
        // What cannot be read is counted by the walk that follows.
        while let Ok(Some((number, mut slice))) = reader.next().await {
            let mut changed = false;
            let entries = *slice.raw();
            for (i, raw) in entries.into_iter().enumerate() {
                let Ok(L2Entry::Data(at)) = core.rules.l2(raw, length) else { continue };
                if l1.contains(at) || !self.used.contains(raw >> core.geometry.cluster_bits()) {
                    continue;
                }
                if let Some(new) = fixer.copy(at).await.map_err(Stop::Failed)? {
                    slice.set(i, new.get());
                    changed = true;
                    self.report.corruptions_fixed += 1;
                    let place = table + (number * SLICE_ENTRIES as u64 + i as u64) * 8;
                    self.rescued.insert(place);
                    let (name, at) = (core.store.name(), place.get());
                    self.say(format!("'{name}' at offset {at}: L2 entry leads into a table: copied to {new}"));
                }
            }
            if changed {
                let at = table + number * SLICE_BYTES as u64;
                fixer.write_slice(at, &slice).await.map_err(Stop::Failed)?;
            }
        }
        Ok(())
    }

    async fn walk_l2(
        &mut self,
        core: &Rc<Core>,
        (table_index, table): (u64, HostOffset),
        mut fixer: Option<&mut Fixer>,
    ) -> std::result::Result<(), Stop> {
        let geometry = core.geometry;
        let l1 = core.header.get().l1_range();
        let length = self.clusters << geometry.cluster_bits();
        let mut last = 0u64;
        let mut reader = TableReader::new(core, table);
        while let Some((number, mut slice)) = self.next(core, &mut reader, "L2 table").await {
            let mut changed = false;
            let entries = *slice.raw();
            for (i, raw) in entries.into_iter().enumerate() {
                let place = table + (number * SLICE_ENTRIES as u64 + i as u64) * 8;
                // Copies lie behind what was there when the walk began; nobody else's entry may lead there.
                let length = if self.rescued.contains(&place) { u64::MAX } else { length };
                let flaw = match core.rules.l2(raw, length) {
                    Ok(L2Entry::Unallocated | L2Entry::Zero) => continue,
                    Ok(L2Entry::Data(at)) if l1.contains(at) => {
                        Some(Flaw::Broken(format!("entry {raw:#x} points into the L1 table")))
                    }
                    Ok(L2Entry::Data(at)) => {
                        let first = self.used.insert(raw >> geometry.cluster_bits())?;
                        (!first).then_some(Flaw::Shared(at))
                    }
                    Err(why) => Some(Flaw::Broken(why.to_string())),
                };
                let mut raw = raw;
                if let Some(flaw) = flaw {
                    let guest = table_index * geometry.table_reach() + (place - table) / 8 * geometry.cluster_size();
                    let (fixed, what) = self.fix(&flaw, fixer.as_deref_mut(), guest).await?;
                    match fixed {
                        Some(entry) => {
                            slice.set(i, entry);
                            changed = true;
                            self.report.corruptions_fixed += 1;
                            raw = entry;
                        }
                        None => self.report.corruptions += 1,
                    }
                    let at = place.get();
                    self.say(format!(
                        "'{}' at offset {at}: L2 entry for guest offset {guest}: {what}",
                        core.store.name()
                    ));
                }
                if raw != 0 {
                    self.report.allocated_clusters += 1;
                    self.report.fragmented_clusters +=
                        u64::from(last != 0 && last.checked_add(geometry.cluster_size()) != Some(raw));
                    last = raw;
                }
            }
            if let (true, Some(fixer)) = (changed, fixer.as_deref_mut()) {
                fixer.write_slice(table + number * SLICE_BYTES as u64, &slice).await.map_err(Stop::Failed)?;
            }
        }
        Ok(())
    }

    /// What an entry becomes (if it is to be repaired and can be), and what to say.
    async fn fix(
        &mut self,
        flaw: &Flaw,
        fixer: Option<&mut Fixer>,
        guest: u64,
    ) -> std::result::Result<(Option<u64>, String), Stop> {
        match (flaw, fixer) {
            (Flaw::Broken(why), None) => Ok((None, why.clone())),
            (Flaw::Broken(why), Some(_)) => Ok((Some(0), format!("{why}: entry cleared"))),
            (Flaw::Shared(at), None) => Ok((None, format!("the cluster at {at} is in use already"))),
            (Flaw::Shared(at), Some(fixer)) => match fixer.copy(*at).await.map_err(Stop::Failed)? {
                Some(new) => {
                    self.used.insert(new.get() >> fixer.cluster_bits())?;
                    Ok((Some(new.get()), format!("the cluster at {at} is in use already: copied to {new}")))
                }
                None => {
                    tracing::debug!(guest, "not copied: the image would more than double");
                    Ok((None, format!("the cluster at {at} is in use already, like too many others to copy them all")))
                }
            },
        }
    }

    /// The next slice that is not all zeros. A table that cannot be read is counted, and given up.
    async fn next(&mut self, core: &Core, reader: &mut TableReader<'_>, what: &str) -> Option<(u64, Slice)> {
        match reader.next().await {
            Ok(next) => next,
            Err(error) => {
                self.report.check_errors += 1;
                self.say(format!(
                    "'{}' at offset {}: the {what} could not be read: {error}",
                    core.store.name(),
                    reader.table.get()
                ));
                None
            }
        }
    }
}

/// Why a walk ends early.
enum Stop {
    Scattered,
    Failed(crate::Error),
}

impl From<TooScattered> for Stop {
    fn from(_: TooScattered) -> Self {
        Self::Scattered
    }
}

/// Streams a table, leaving out what is all zeros.
pub(super) struct TableReader<'a> {
    store: &'a dyn Store,
    /// Where it begins.
    pub(super) table: HostOffset,
    bytes: u64,
    at: u64,
    buffer: Iov,
    buffer_at: u64,
}

impl<'a> TableReader<'a> {
    /// Of the table at `table`.
    pub(super) fn new(core: &'a Core, table: HostOffset) -> Self {
        let bytes = core.geometry.table_bytes();
        Self { store: &*core.store, table, bytes, at: 0, buffer: Iov::empty(), buffer_at: 0 }
    }

    /// The next slice with an entry in it: its number within the table, and its entries.
    pub(super) async fn next(&mut self) -> Result<Option<(u64, Slice)>> {
        const SLICE: u64 = SLICE_BYTES as u64;
        while self.at < self.bytes {
            let offset = self.at.wrapping_sub(self.buffer_at);
            if self.at >= self.buffer_at && offset < self.buffer.len() as u64 {
                let part = self.buffer.slice(offset as usize..offset as usize + SLICE_BYTES);
                self.at += SLICE;
                if part.is_zero() {
                    continue;
                }
                let mut raw = [0; SLICE_BYTES];
                part.read(0, &mut raw);
                return Ok(Some(((self.at - SLICE) / SLICE, Slice::decode(&raw))));
            }
            let rest = (self.table + self.at).range(self.bytes - self.at);
            let extent = self.store.extent(rest).await?;
            if extent.backing == Backing::Hole && extent.len >= SLICE {
                self.at += extent.len.min(rest.len()) / SLICE * SLICE;
                continue;
            }
            let len = extent.len.clamp(1, READ_BYTES).next_multiple_of(SLICE).min(rest.len());
            self.buffer = Iov::alloc(len as usize);
            self.buffer_at = self.at;
            self.store.read(rest.start(), self.buffer.clone()).await?;
        }
        Ok(None)
    }
}

impl Core {
    /// See [`crate::Image::check`].
    pub(super) async fn check(self: &Rc<Self>, repair: Repair) -> Result<CheckReport> {
        if repair != Repair::None {
            self.health.check_writable()?;
        }
        if self.active.get() > 0 {
            return Err(self.health.error(
                ErrorKind::Busy,
                None,
                "the image is being written to; check it when it is idle",
            ));
        }
        if !self.health.read_only() && !self.for_check && !self.health.is_poisoned() {
            self.commit().await?;
            self.room.trim().await?;
        }
        let mut scan = Scan::run(self, None).await?;
        if repair == Repair::All && scan.report.corruptions > 0 {
            scan = Scan::run(self, Some(&mut Fixer::new(self))).await?;
        }
        if repair == Repair::None {
            return Ok(scan.report);
        }
        if scan.report.leaks > 0 && scan.is_sound() {
            self.mark().await?;
            let before = scan.report.leaks;
            super::compact::compact(self, &mut scan).await?;
            scan.count_leaks(self);
            scan.report.leaks_fixed = before.saturating_sub(scan.report.leaks);
        }
        self.reload().await?;
        if scan.report.is_clean() && self.needs_check() {
            self.clear_need_check().await?;
        }
        Ok(scan.report)
    }

    /// After an unclean end (or where the store's length says nothing): repairs the tables and finds out what is free. Holes in
    /// the middle are handed out again; what is left of them is filled when the image is closed.
    pub(super) async fn recover(self: &Rc<Self>) -> Result<()> {
        let mut scan = Scan::run(self, None).await?;
        // An unreadable table may be readable another day: nothing is given up on its account.
        if self.needs_check() && scan.report.corruptions > 0 && scan.report.check_errors == 0 {
            scan = Scan::run(self, Some(&mut Fixer::new(self))).await?;
        }
        if !scan.is_sound() && self.needs_check() {
            let first = scan.report.messages.first().cloned().unwrap_or_default();
            let what = format!(
                "the image was not closed cleanly and cannot be repaired automatically ({} unreadable tables, {} damaged \
                 entries left); check it, or open it read-only; first finding: {first}",
                scan.report.check_errors, scan.report.corruptions
            );
            return Err(self.health.error(ErrorKind::Corrupt, None, what));
        }
        if scan.report.corruptions_fixed > 0 {
            tracing::warn!(
                image = self.store.name(),
                entries = scan.report.corruptions_fixed,
                "repaired damaged table entries"
            );
        }
        self.reload().await?;
        if scan.is_sound() {
            self.adopt_free(&scan).await?;
        }
        if self.needs_check() {
            let holes = self.room.space.borrow().growable() && self.room.space.borrow().has_holes();
            if holes {
                // Need-check stays until they are filled.
                self.marked.set(true);
                self.found_dirty.set(false);
            } else {
                self.clear_need_check().await?;
            }
        }
        Ok(())
    }

    /// Takes over what no table refers to, as `scan` found it.
    async fn adopt_free(&self, scan: &Scan) -> Result<()> {
        let bits = self.geometry.cluster_bits();
        let header = u64::from(self.header.get().header_clusters);
        let growable = self.room.space.borrow().growable();
        let end = if growable { scan.used.end().max(header) } else { scan.clusters };
        if growable && self.store.size() > end << bits {
            self.store.set_size(end << bits).await?;
        }
        let mut space =
            Space::full(self.geometry.cluster_size(), if growable { end << bits } else { self.store.size() }, growable);
        let mut at = header;
        while let Some(gap) = scan.used.next_gap(at..end) {
            space.give_back(HostOffset(gap.start << bits).range((gap.end - gap.start) << bits));
            at = gap.end;
        }
        *self.room.space.borrow_mut() = space;
        Ok(())
    }

    /// Fills the holes of this session from the end of the file, cuts the end off, and clears need-check. Nothing is in flight.
    pub(super) async fn fill_holes(self: &Rc<Self>) -> Result<()> {
        self.check(Repair::Leaks).await.map(drop)
    }

    /// The tables on disk were changed behind the back of what is in memory.
    async fn reload(&self) -> Result<()> {
        let header = self.header.get();
        let l1 = super::open::read_l1(&*self.store, &header, 0, header.image_size).await?;
        self.cache.borrow_mut().clear();
        *self.tables.borrow_mut() = Tables::new(super::L1_FORM, l1);
        let growable = self.room.space.borrow().growable();
        *self.room.space.borrow_mut() = Space::full(self.geometry.cluster_size(), self.store.size(), growable);
        Ok(())
    }

    async fn clear_need_check(&self) -> Result<()> {
        self.health.barrier().await?;
        let mut zone = self.zone.lock().await;
        let mut header = self.header.get();
        header.features -= Features::NEED_CHECK;
        self.publish_header(&mut zone, header).await?;
        self.marked.set(false);
        self.found_dirty.set(false);
        Ok(())
    }
}
