//! Refcounts: how many entries refer to a cluster.
//!
//! Only commits, checks and changes of the header's tables work here, one at a time (they hold the zone). Blocks are read when
//! they are needed and written, page by page, before anything that is counted in them becomes visible on disk.
//!
//! **Invariants.**
//! * A cluster that a table on disk refers to is counted on disk, at every instant.
//! * A new block is durable before the refcount table leads to it, a new refcount table before the header does.
//! * What is counted down was unlinked durably before. What comes to 0 may be handed out again.

use super::header::HeaderZone;
use super::{Core, SLICE_BYTES};
use crate::{ErrorKind, Result};
use layout::qcow2::{Header, refcount};
use layout::{HostOffset, HostRange};
use ring::Iov;
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::rc::Rc;

/// Memory for blocks that are not about to be written.
const KEPT_BYTES: u64 = 16 << 20;

/// Free runs that are remembered; what else is free is found at the next opening.
const MAX_FREE_RUNS: usize = 1 << 20;

struct Block {
    at: HostOffset,
    bytes: Vec<u8>,
}

/// The refcounts of one image, as far as they are in memory.
pub(super) struct Refcounts {
    /// The refcount table, whole.
    table: Vec<u64>,
    blocks: HashMap<u64, Block>,
    /// Pages of blocks that differ from what is on disk.
    dirty: BTreeSet<(u64, u64)>,
    /// Blocks whose entry in the table on disk is not what it should be yet.
    fresh: BTreeSet<u64>,
    /// Where the table will be: it has become too short.
    moving: Option<HostRange>,
}

impl Refcounts {
    /// With the table as it is on disk.
    pub(super) fn new(table: Vec<u64>) -> Self {
        Self { table, blocks: HashMap::new(), dirty: BTreeSet::new(), fresh: BTreeSet::new(), moving: None }
    }

    /// Whether something is to be written.
    pub(super) fn is_dirty(&self) -> bool {
        !self.dirty.is_empty() || !self.fresh.is_empty()
    }

    /// Where the blocks are, as the table says.
    pub(super) fn table(&self) -> &[u64] {
        &self.table
    }

    /// Blocks that are not where the table says: they are made anew when they are needed.
    pub(super) fn forget_blocks(&mut self, numbers: &[u64]) {
        for number in numbers {
            self.blocks.remove(number);
            if let Some(entry) = self.table.get_mut(*number as usize) {
                *entry = 0;
                self.fresh.insert(*number);
            }
        }
    }

    fn forget_some(&mut self, cluster: u64) {
        let most = (KEPT_BYTES / cluster).max(4) as usize;
        if self.blocks.len() > most {
            let dirty: BTreeSet<u64> = self.dirty.iter().map(|(block, _)| *block).collect();
            let mut left = self.blocks.len() - most / 2;
            self.blocks.retain(|number, _| {
                let keep = left == 0 || dirty.contains(number) || self.fresh.contains(number);
                left -= usize::from(!keep);
                keep
            });
        }
    }
}

/// The clusters of a range, as numbers.
fn numbers(range: HostRange, header: &Header) -> std::ops::Range<u64> {
    range.start().get() >> header.cluster_bits..range.end().get().div_ceil(header.cluster_size())
}

impl Core {
    /// Reads the whole refcount table.
    pub(super) async fn read_refcount_table(&self, header: &Header) -> Result<Vec<u64>> {
        let bytes = Iov::alloc(header.refcount_table_bytes() as usize);
        self.store.read(header.refcount_table, bytes.clone()).await?;
        Ok(bytes.to_vec().as_chunks().0.iter().map(|entry| u64::from_be_bytes(*entry)).collect())
    }

    /// Where block `number` lies; `None` where there is none.
    pub(super) fn block_place(&self, number: u64) -> Result<Option<HostOffset>> {
        let raw = self.refcounts.borrow().table.get(number as usize).copied().unwrap_or(0) & refcount::BLOCK_OFFSET;
        if raw == 0 {
            return Ok(None);
        }
        let header = self.header.get();
        if !raw.is_multiple_of(header.cluster_size()) || i64::try_from(raw + header.cluster_size()).is_err() {
            let what = format!("refcount block {number} has no place ({raw:#x}); check and repair the image");
            return Err(self.health.corrupt(header.refcount_table + number * 8, what));
        }
        Ok(Some(HostOffset(raw)))
    }

    /// Brings block `number` into memory; false where there is none.
    async fn load_block(&self, number: u64) -> Result<bool> {
        if self.refcounts.borrow().blocks.contains_key(&number) {
            return Ok(true);
        }
        let Some(at) = self.block_place(number)? else { return Ok(false) };
        let bytes = Iov::alloc(self.cluster_size() as usize);
        self.store.read(at, bytes.clone()).await?;
        self.refcounts.borrow_mut().blocks.insert(number, Block { at, bytes: bytes.to_vec() });
        Ok(true)
    }

    /// The refcount of a cluster.
    pub(super) async fn refcount(&self, cluster: u64) -> Result<u64> {
        let header = self.header.get();
        let number = cluster / header.refcounts_per_block();
        if !self.load_block(number).await? {
            return Ok(0);
        }
        let refcounts = self.refcounts.borrow();
        let bytes = refcounts.blocks.get(&number).map_or(&[][..], |block| &block.bytes);
        Ok(refcount::get(bytes, header.refcount_order, cluster % header.refcounts_per_block()))
    }

    /// The last cluster of block `number` that is counted.
    pub(super) async fn last_counted(&self, number: u64) -> Result<Option<u64>> {
        let header = self.header.get();
        if !self.load_block(number).await? {
            return Ok(None);
        }
        let refcounts = self.refcounts.borrow();
        let bytes = refcounts.blocks.get(&number).map_or(&[][..], |block| &block.bytes);
        let Some(byte) = bytes.iter().rposition(|byte| *byte != 0) else { return Ok(None) };
        // The byte may hold several, or be a part of one.
        let end = (((byte as u64 + 1) * 8) >> header.refcount_order).max(1);
        let start = (byte as u64 * 8) >> header.refcount_order;
        let counted =
            (start..end.max(start + 1)).rev().find(|at| refcount::get(bytes, header.refcount_order, *at) != 0);
        Ok(counted.map(|index| number * header.refcounts_per_block() + index))
    }

    /// Sets the refcount of a cluster whose block is in memory.
    fn put_refcount(&self, cluster: u64, value: u64) {
        let header = self.header.get();
        let (number, index) = (cluster / header.refcounts_per_block(), cluster % header.refcounts_per_block());
        let mut refcounts = self.refcounts.borrow_mut();
        if let Some(block) = refcounts.blocks.get_mut(&number) {
            refcount::set(&mut block.bytes, header.refcount_order, index, value);
            let page = (index << header.refcount_order) / 8 / SLICE_BYTES;
            refcounts.dirty.insert((number, page));
        }
    }

    /// Counts one more reference to each cluster of `ranges`. In memory; [`Core::write_refcounts`] writes. Where one cannot be
    /// counted, none is.
    pub(super) async fn count_up(&self, ranges: Vec<HostRange>) -> Result<()> {
        self.change_refcounts(ranges, |old| old.checked_add(1), |new| new.saturating_sub(1)).await
    }

    /// Sets the refcount of each cluster of `ranges` to one value: repair.
    pub(super) async fn set_refcounts(&self, ranges: Vec<HostRange>, value: u64) -> Result<()> {
        self.change_refcounts(ranges, |_| Some(value), |new| new).await
    }

    /// Changes refcounts; where one would be larger than its bits hold, those before it are set to what `undo` makes of them.
    async fn change_refcounts(
        &self,
        ranges: Vec<HostRange>,
        change: impl Fn(u64) -> Option<u64>,
        undo: impl Fn(u64) -> u64,
    ) -> Result<()> {
        let header = self.header.get();
        let most = refcount::max(header.refcount_order);
        let made = self.make_blocks(&ranges).await?;
        // What new blocks need is counted up, whatever happens to the others.
        let up = |old: u64| old.checked_add(1);
        for cluster in made.iter().flat_map(|range| numbers(*range, &header)) {
            let old = self.refcount(cluster).await?;
            self.put_refcount(cluster, up(old).unwrap_or(old));
        }
        for (done, cluster) in ranges.iter().flat_map(|range| numbers(*range, &header)).enumerate() {
            let old = self.refcount(cluster).await?;
            let Some(new) = change(old).filter(|new| *new <= most) else {
                for cluster in ranges.iter().flat_map(|range| numbers(*range, &header)).take(done) {
                    let new = self.refcount(cluster).await?;
                    self.put_refcount(cluster, undo(new));
                }
                let what = format!(
                    "a cluster has {old} references, and refcounts of {} bits hold no more; convert the image to one with \
                     wider ones ('-o refcount_bits=64')",
                    1 << header.refcount_order
                );
                let at = HostOffset(cluster << header.cluster_bits);
                return Err(self.health.error(ErrorKind::Unsupported, Some(at), what));
            };
            if new != old {
                self.put_refcount(cluster, new);
            }
        }
        Ok(())
    }

    /// Sees to it that `range`, which is about to be handed out, can be counted without further space or reads.
    pub(super) async fn prepare_to_count(self: &Rc<Self>, range: HostRange) -> Result<()> {
        let ready = |core: &Self| {
            let refcounts = core.refcounts.borrow();
            core.blocks_of(range).all(|number| refcounts.blocks.contains_key(&number))
        };
        if ready(self) {
            return Ok(());
        }
        let core = self.clone();
        ring::spawn(async move {
            let _zone = core.zone.lock().await;
            let made = core.make_blocks(&[range]).await?;
            core.linked.borrow_mut().extend(made);
            Ok(())
        })
        .await
    }

    /// The blocks that count the clusters of `range`.
    fn blocks_of(&self, range: HostRange) -> std::ops::RangeInclusive<u64> {
        let header = self.header.get();
        let reach = header.refcounts_per_block() << header.cluster_bits;
        range.start().get() / reach..=(range.end().get() - 1).max(range.start().get()) / reach
    }

    /// Brings the blocks into memory that count `ranges`; makes those that there are not. Returns what the new ones take, which
    /// is to be counted.
    async fn make_blocks(&self, ranges: &[HostRange]) -> Result<Vec<HostRange>> {
        let mut made: Vec<HostRange> = Vec::new();
        for range in ranges {
            let mut work = vec![*range];
            while let Some(range) = work.pop() {
                for number in self.blocks_of(range) {
                    if !self.load_block(number).await? {
                        let parts = self.make_block(number).await?;
                        made.extend(&parts);
                        work.extend(parts);
                    }
                }
            }
        }
        Ok(made)
    }

    /// Makes block `number`, and room for it in the refcount table. Returns what they take.
    async fn make_block(&self, number: u64) -> Result<Vec<HostRange>> {
        let cluster = self.cluster_size();
        let entries = self.refcounts.borrow().table.len() as u64;
        let mut taken = Vec::new();
        let at = self.room.take_zeroed(cluster).await?;
        if number >= entries {
            let bytes = ((number + 1).max(entries + entries / 2) * 8).next_multiple_of(cluster);
            let range = self.room.take_whole(bytes).await?.keep();
            taken.push(range);
            let mut refcounts = self.refcounts.borrow_mut();
            refcounts.table.resize(bytes as usize / 8, 0);
            // One that was to be moved to and never was is nobody's, once it was counted.
            if let Some(before) = refcounts.moving.replace(range) {
                self.room.space.borrow_mut().unlink(before);
            }
        }
        let at = at.keep();
        taken.push(at);
        let mut refcounts = self.refcounts.borrow_mut();
        if let Some(entry) = refcounts.table.get_mut(number as usize) {
            *entry = at.start().get();
        }
        refcounts.blocks.insert(number, Block { at: at.start(), bytes: vec![0; cluster as usize] });
        refcounts.fresh.insert(number);
        Ok(taken)
    }

    /// Counts one reference less to each cluster of `ranges`, and hands those out again that nobody refers to any more. In
    /// memory; the next commit writes.
    pub(super) async fn count_down(&self, ranges: Vec<HostRange>) -> Result<()> {
        let header = self.header.get();
        for range in ranges {
            for cluster in numbers(range, &header) {
                let old = self.refcount(cluster).await?;
                let at = HostOffset(cluster << header.cluster_bits);
                if old == 0 {
                    tracing::warn!(image = self.store.name(), %at, "a cluster that was in use was counted as free");
                    continue;
                }
                self.put_refcount(cluster, old - 1);
                if old == 1 {
                    self.metadata.borrow_mut().remove(&cluster);
                    self.room.space.borrow_mut().give_back(at.range(header.cluster_size()));
                }
            }
        }
        self.refcounts.borrow_mut().forget_some(header.cluster_size());
        Ok(())
    }

    /// Writes what was changed. Afterwards a barrier is due. The caller holds the zone.
    pub(super) async fn write_refcounts(&self, zone: &mut HeaderZone) -> Result<()> {
        let header = self.header.get();
        let cluster = header.cluster_size();
        let page = SLICE_BYTES.min(cluster);
        let writes: Vec<(HostOffset, Iov)> = {
            let mut refcounts = self.refcounts.borrow_mut();
            let dirty: Vec<(u64, u64)> = std::mem::take(&mut refcounts.dirty).into_iter().collect();
            let near = |a: &(u64, u64), b: &(u64, u64)| a.0 == b.0 && a.1 + 1 == b.1;
            let runs = dirty.chunk_by(near).filter_map(|run| {
                let block = refcounts.blocks.get(&run[0].0)?;
                let (start, len) = ((run[0].1 * page) as usize, run.len() * page as usize);
                Some((block.at + start as u64, Iov::from_slice(block.bytes.get(start..start + len)?)))
            });
            runs.collect()
        };
        self.health.write_all(writes.into_iter()).await?;
        let (fresh, moving) = {
            let mut refcounts = self.refcounts.borrow_mut();
            (std::mem::take(&mut refcounts.fresh), refcounts.moving.take())
        };
        if let Some(to) = moving {
            let bytes: Vec<u8> = self.refcounts.borrow().table.iter().flat_map(|entry| entry.to_be_bytes()).collect();
            self.health.write(to.start(), Iov::from_slice(&bytes)).await?;
            self.health.barrier().await?;
            let old = header.refcount_table.range(header.refcount_table_bytes());
            let clusters = (to.len() >> header.cluster_bits) as u32;
            let header = Header { refcount_table: to.start(), refcount_table_clusters: clusters, ..header };
            self.publish_header(zone, header).await?;
            self.count_down(vec![old]).await?;
        } else if !fresh.is_empty() {
            self.health.barrier().await?;
            let slice = page / 8;
            let writes: BTreeMap<u64, Iov> = {
                let refcounts = self.refcounts.borrow();
                let slices: BTreeSet<u64> = fresh.iter().map(|number| number / slice).collect();
                let bytes = |first: u64| {
                    let entries = refcounts.table.get((first * slice) as usize..((first + 1) * slice) as usize);
                    let entries = entries.unwrap_or_default();
                    Iov::from_slice(&entries.iter().flat_map(|entry| entry.to_be_bytes()).collect::<Vec<u8>>())
                };
                slices.into_iter().map(|number| (number * page, bytes(number))).collect()
            };
            let table = header.refcount_table;
            self.health.write_all(writes.into_iter().map(|(offset, bytes)| (table + offset, bytes))).await?;
        }
        Ok(())
    }

    /// Finds what is free in the store and makes it the room for new clusters.
    pub(super) async fn find_free(&self) -> Result<()> {
        let header = self.header.get();
        let (cluster, per_block) = (header.cluster_size(), header.refcounts_per_block());
        let clusters = self.store.size().div_ceil(cluster);
        let mut free: BTreeMap<u64, u64> = BTreeMap::new();
        let mut add = |from: u64, to: u64| {
            if from >= to {
                return;
            }
            let runs = free.len();
            match free.last_entry() {
                Some(mut last) if last.key() + last.get() == from => *last.get_mut() += to - from,
                _ if runs < MAX_FREE_RUNS => drop(free.insert(from, to - from)),
                _ => {}
            }
        };
        // What is counted behind the end of the file (its length was lost in a power cut) is not free either.
        let mut end = clusters;
        let tables = self.refcounts.borrow().table.len() as u64;
        for number in 0..tables {
            let first = number * per_block;
            let Some(at) = self.block_place(number)? else {
                add(first, (first + per_block).min(clusters));
                continue;
            };
            if at.get() + cluster > clusters * cluster {
                let what = format!(
                    "refcount block {number} lies past the end of the file; check and repair the image ('check -r all')"
                );
                return Err(self.health.error(ErrorKind::Corrupt, Some(at), what));
            }
            let bytes = Iov::alloc(cluster as usize);
            self.store.read(at, bytes.clone()).await?;
            let bytes = bytes.to_vec();
            let mut from = first;
            for index in 0..per_block {
                if refcount::get(&bytes, header.refcount_order, index) != 0 {
                    add(from, first + index);
                    from = first + index + 1;
                }
            }
            end = end.max(from.min(i64::MAX as u64 >> header.cluster_bits));
            add(from, (first + per_block).min(clusters));
        }
        add(tables * per_block, clusters);
        let metadata = self.metadata();
        let growable = self.room.growable();
        let end = if growable { end } else { clusters };
        let mut space = crate::space::Space::full(cluster, end << header.cluster_bits, growable);
        let mut uncounted = 0;
        for (from, len) in free {
            // What the tables in memory say is in use is not free, whatever is counted.
            let mut at = from;
            for used in metadata.range(from..from + len) {
                space.give_back(HostOffset(at << header.cluster_bits).range((used - at) << header.cluster_bits));
                at = used + 1;
                uncounted += 1;
            }
            space.give_back(HostOffset(at << header.cluster_bits).range((from + len - at) << header.cluster_bits));
        }
        if uncounted > 0 {
            let image = self.store.name();
            tracing::warn!(image, clusters = uncounted, "tables are counted as free; check and repair the image");
        }
        *self.room.space.borrow_mut() = space;
        *self.metadata.borrow_mut() = metadata;
        Ok(())
    }

    /// The clusters of all tables that the tables in memory lead to, and of the header.
    pub(super) fn metadata(&self) -> BTreeSet<u64> {
        let header = self.header.get();
        let bits = header.cluster_bits;
        let mut clusters = BTreeSet::from([0]);
        clusters.extend(numbers(header.l1_range(), &header));
        clusters.extend(numbers(header.refcount_table.range(header.refcount_table_bytes()), &header));
        let refcounts = self.refcounts.borrow();
        clusters.extend(refcounts.table().iter().filter(|raw| **raw != 0).map(|raw| raw >> bits));
        let tables = self.tables.borrow();
        let l2 = tables.l1().iter().map(|raw| (raw & layout::qcow2::OFFSET) >> bits);
        clusters.extend(l2.filter(|cluster| *cluster != 0));
        clusters
    }
}
