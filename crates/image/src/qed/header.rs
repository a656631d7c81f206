//! The header of an open image: need-check, size and backing reference.
//!
//! **Invariants.**
//! * One write of the header at a time, and each one changes a single sector: after a cut the header is the old or the new one.
//!   A name of a backing file that does not fit in the first sector is written, durably, beside the old one before the
//!   header points to it.
//! * What we do not know in the header's clusters stays as it is.

use super::Core;
use crate::{BackingRef, ErrorKind, Format, Keep, Purpose, Result};
use layout::qed::geometry::SECTOR;
use layout::qed::{Features, HEADER_BYTES, Header, MAX_BACKING_NAME, NameSlot, SLICE_BYTES, SLICE_ENTRIES};
use layout::{GuestOffset, GuestRange, HostOffset, HostRange};
use ring::Iov;
use std::ops::Range;
use std::rc::Rc;
use store::{Backing, Store};

/// Bytes of the header that one write publishes whole.
const ATOMIC: usize = SECTOR as usize;

/// The unit in which the header is written: no medium in use needs to read before it writes this.
const PAGE: usize = 4096;

/// How much of the header's clusters is looked at for room for a name. Any image we or QEMU made has its name here.
const ZONE: u64 = 64 << 10;

/// The first bytes of the header's clusters, as they are on disk.
pub(super) struct HeaderZone {
    bytes: Vec<u8>,
}

impl HeaderZone {
    /// Reads them.
    pub(super) async fn read(store: &dyn Store, header: &Header) -> Result<Self> {
        let iov = Iov::alloc(header.header_bytes().min(ZONE) as usize);
        store.read(HostOffset::ZERO, iov.clone()).await?;
        Ok(Self { bytes: iov.to_vec() })
    }

    /// Writes the pages that hold `range`.
    async fn write(&self, store: &dyn Store, range: Range<usize>) -> Result<()> {
        let (start, end) = (range.start / PAGE * PAGE, range.end.next_multiple_of(PAGE).min(self.bytes.len()));
        store.write(HostOffset(start as u64), Iov::from_slice(&self.bytes[start..end]), false).await?;
        Ok(())
    }

    /// A place for a name of `len` bytes: in the first sector, where `old` or nothing is; otherwise beside `old`, where
    /// nothing is.
    fn room_for_name(&self, len: usize, old: Option<Range<usize>>) -> Option<Range<usize>> {
        let old = old.unwrap_or(HEADER_BYTES..HEADER_BYTES);
        let inside_old = |at: usize| old.contains(&at);
        let first = HEADER_BYTES..HEADER_BYTES + len;
        if first.end <= ATOMIC && first.clone().all(|at| self.bytes[at] == 0 || inside_old(at)) {
            return Some(first);
        }
        let mut free = 0;
        for at in HEADER_BYTES..self.bytes.len() {
            free = if self.bytes[at] == 0 && !inside_old(at) { free + 1 } else { 0 };
            if free == len {
                return Some(at + 1 - len..at + 1);
            }
        }
        None
    }
}

fn span(slot: NameSlot) -> Range<usize> {
    slot.offset as usize..(slot.offset + slot.len) as usize
}

/// Checks a reference before anything is written; also used for new images.
pub(super) fn check_backing(image: &str, backing: &BackingRef) -> Result<()> {
    backing.check(image, Format::Qed, MAX_BACKING_NAME)
}

/// The feature bits that describe a backing file.
pub(super) fn backing_features(backing: Option<&BackingRef>) -> Features {
    match backing {
        None => Features::empty(),
        Some(BackingRef { format: Some(Format::Raw), .. }) => {
            Features::BACKING_FILE | Features::BACKING_FORMAT_NO_PROBE
        }
        Some(_) => Features::BACKING_FILE,
    }
}

impl Core {
    /// Writes `header`; the caller holds the zone and flushes. A failure poisons.
    async fn write_header(&self, zone: &mut HeaderZone, header: Header) -> Result<()> {
        zone.bytes[..HEADER_BYTES].copy_from_slice(&header.encode());
        let written = zone.write(&*self.store, 0..ATOMIC).await;
        written.map_err(|e| self.health.fail(e))?;
        self.header.set(header);
        Ok(())
    }

    /// Writes `header` durably.
    pub(super) async fn publish_header(&self, zone: &mut HeaderZone, header: Header) -> Result<()> {
        self.write_header(zone, header).await?;
        self.health.barrier().await
    }

    /// Sets need-check, durably, unless that was done.
    pub(super) async fn mark(self: &Rc<Self>) -> Result<()> {
        if self.marked.get() {
            return Ok(());
        }
        let core = self.clone();
        super::detached(async move {
            let mut zone = core.zone.lock().await;
            if core.marked.get() {
                return Ok(());
            }
            core.health.check_poison()?;
            let mut header = core.header.get();
            header.features |= Features::NEED_CHECK;
            core.publish_header(&mut zone, header).await?;
            core.marked.set(true);
            Ok(())
        })
        .await
    }

    /// Commits and, if nothing is in flight, gives the unused tail back and clears need-check. Holes in the middle keep
    /// need-check set: only a check finds them again after a crash.
    pub(super) async fn settle(self: &Rc<Self>) -> Result<()> {
        if self.health.read_only() {
            return Ok(());
        }
        self.commit().await?;
        let mut zone = self.zone.lock().await;
        if !self.marked.get() || self.active.get() > 0 || self.is_dirty() {
            return self.health.check_poison();
        }
        // From here on, a reservation waits for the zone.
        self.marked.set(false);
        let holes = self.room.space.borrow().has_holes() && self.room.space.borrow().growable();
        if let Err(error) = self.room.trim().await {
            self.marked.set(true);
            return Err(error);
        }
        if holes {
            self.marked.set(true);
            return Ok(());
        }
        self.health.barrier().await?;
        let mut header = self.header.get();
        header.features -= Features::NEED_CHECK;
        self.publish_header(&mut zone, header).await?;
        self.found_dirty.set(false);
        Ok(())
    }

    /// See [`crate::Image::set_backing`].
    pub(super) async fn set_backing(self: &Rc<Self>, backing: Option<BackingRef>) -> Result<()> {
        self.health.check_writable()?;
        if let Some(backing) = &backing {
            check_backing(self.store.name(), backing)?;
        }
        self.commit().await?;
        let mut zone = self.zone.lock().await;
        let mut header = self.header.get();
        let old = header.backing().map(span);
        header.features -= Features::BACKING_FILE | Features::BACKING_FORMAT_NO_PROBE;
        header.features |= backing_features(backing.as_ref());
        let mut new = 0..0;
        if let Some(backing) = &backing {
            new = zone.room_for_name(backing.name.len(), old.clone()).ok_or_else(|| {
                self.health.error(
                    ErrorKind::Unsupported,
                    None,
                    "the header has no room for the name of the backing file; use a shorter one",
                )
            })?;
            if new.end <= ATOMIC {
                wipe(&mut zone.bytes, old.clone(), ..ATOMIC);
                zone.bytes[new.clone()].copy_from_slice(backing.name.as_bytes());
            } else {
                zone.bytes[new.clone()].copy_from_slice(backing.name.as_bytes());
                zone.write(&*self.store, new.clone()).await.map_err(|e| self.health.fail(e))?;
                self.health.barrier().await?;
            }
        } else {
            wipe(&mut zone.bytes, old.clone(), ..ATOMIC);
        }
        header.backing_name = NameSlot { offset: new.start as u32, len: new.len() as u32 };
        self.publish_header(&mut zone, header).await?;
        *self.backing.borrow_mut() = backing;
        // What is left of the old name is nobody's now. Not durable, and no harm if it never is.
        if old.as_ref().is_some_and(|old| old.end > ATOMIC && old.end <= zone.bytes.len()) {
            let old = old.unwrap_or_default();
            for at in old.clone().filter(|at| !new.contains(at)) {
                zone.bytes[at] = 0;
            }
            zone.write(&*self.store, old).await.map_err(|e| self.health.fail(e))?;
        }
        Ok(())
    }

    /// See [`crate::Image::resize`].
    pub(super) async fn resize(self: &Rc<Self>, size: u64) -> Result<()> {
        self.health.check_writable()?;
        let mut zone = self.zone.lock().await;
        let old = self.size();
        if size < old {
            let what = format!("a QED image cannot shrink (it has {old} bytes, {size} were asked for)");
            return Err(self.health.error(ErrorKind::InvalidArgument, None, what));
        }
        let header = Header { image_size: size, ..self.header.get() };
        header.validate().map_err(|e| self.health.error(ErrorKind::InvalidArgument, None, e.to_string()))?;
        self.load_l1_for(size).await?;
        self.check_nothing_behind(old).await?;
        self.zero_rest_of_last_cluster(old).await?;
        self.health.barrier().await?;
        self.publish_header(&mut zone, header).await
    }

    /// Brings the L1 entries into memory that a disk of `size` bytes needs.
    async fn load_l1_for(&self, size: u64) -> Result<()> {
        let have = self.tables.borrow().l1().len() as u64;
        let more = super::open::read_l1(&*self.store, &self.header.get(), have, size).await?;
        let mut tables = self.tables.borrow_mut();
        if tables.l1().len() as u64 == have {
            tables.extend_l1(more);
        }
        Ok(())
    }

    /// See [`crate::Image::mask_behind_end`].
    pub(super) async fn mask_behind_end(self: &Rc<Self>, until: GuestOffset) -> Result<()> {
        /// While it lives, reservations may reach so far.
        struct Reach<'a>(&'a Core);
        impl Drop for Reach<'_> {
            fn drop(&mut self) {
                self.0.reach.set(0);
            }
        }
        self.health.check_writable()?;
        let cluster = self.geometry.cluster_size();
        let zone = self.zone.lock().await;
        let old = self.size();
        let end = until.align_up(cluster);
        if end.get() > self.geometry.max_image_size() {
            let what = format!("a disk of {until} bytes is more than the image can hold");
            return Err(self.health.error(ErrorKind::InvalidArgument, None, what));
        }
        self.load_l1_for(end.get()).await?;
        self.check_nothing_behind(old).await?;
        drop(zone);
        self.reach.set(end.get());
        let _reach = Reach(self);
        let mut rest = GuestRange::between(GuestOffset(old).align_up(cluster), end);
        while !rest.is_empty() {
            let reservation = self.reserve(rest, Purpose::Zero).await?;
            rest = rest.skip(reservation.range().len());
            reservation.link(Keep::Unallocated, |_| false);
        }
        Ok(())
    }

    /// Fails when a table has data for what lies behind the disk's end: growing would bring somebody's bytes to light. Marks
    /// of zeros may be there: a growth that did not come to its end leaves them.
    async fn check_nothing_behind(self: &Rc<Self>, old: u64) -> Result<()> {
        let geometry = self.geometry;
        let first_cluster = geometry.clusters(old);
        let entries = geometry.entries();
        let tables = self.tables.borrow().l1().len() as u64;
        for index in first_cluster / entries..tables {
            let super::resolve::Table::Stored(table) = self.table(index)? else { continue };
            let first = first_cluster.saturating_sub(index * entries);
            self.check_only_marks(HostRange::between(table + first * 8, table + geometry.table_bytes())).await?;
        }
        Ok(())
    }

    /// Fails when there is anything but marks of zeros in `range` of a table. Looks at the store: nothing behind the end is
    /// ever linked in memory but such marks.
    async fn check_only_marks(&self, range: HostRange) -> Result<()> {
        let mut rest = range;
        while !rest.is_empty() {
            let extent = self.store.extent(rest).await?;
            let len = extent.len.clamp(1, rest.len());
            if extent.backing == Backing::Hole {
                rest = rest.skip(len);
                continue;
            }
            let part =
                rest.first(len.min((SLICE_BYTES * SLICE_ENTRIES) as u64 / 2).next_multiple_of(8)).first(rest.len());
            let bytes = Iov::alloc(part.len() as usize);
            self.store.read(part.start(), bytes.clone()).await?;
            let bytes = bytes.to_vec();
            let is_mark = |raw: &[u8; 8]| matches!(u64::from_le_bytes(*raw), 0 | 1);
            if let Some(found) = bytes.as_chunks::<8>().0.iter().position(|raw| !is_mark(raw)) {
                let what = "a table has data behind the end of the disk; check and repair the image";
                return Err(self.health.corrupt(part.start() + found as u64 * 8, what));
            }
            rest = rest.skip(part.len());
        }
        Ok(())
    }

    /// Zeroes what the last cluster holds behind the disk's end `old`.
    async fn zero_rest_of_last_cluster(self: &Rc<Self>, old: u64) -> Result<()> {
        let cluster = self.geometry.cluster_size();
        let rest = old.next_multiple_of(cluster) - old;
        if rest == 0 || old == 0 {
            return Ok(());
        }
        let last = GuestRange::new(GuestOffset(old - 1), 1);
        let mapped = loop {
            match self.lookup(last)? {
                Some(mapped) => break mapped,
                None => self.load(last.start()).await?,
            }
        };
        if let crate::Mapping::Data(host) = mapped.mapping {
            self.store.zero((host + 1).range(rest), store::ZeroMode::default()).await?;
        }
        Ok(())
    }
}

/// Clears what of `old` lies in front of `end`.
fn wipe(bytes: &mut [u8], old: Option<Range<usize>>, end: std::ops::RangeTo<usize>) {
    if let Some(old) = old {
        let end = old.end.min(end.end);
        if old.start < end {
            bytes[old.start..end].fill(0);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn zone(len: usize) -> HeaderZone {
        HeaderZone { bytes: vec![0; len] }
    }

    #[test]
    fn short_name_goes_into_the_first_sector_over_the_old_one() {
        let mut zone = zone(4096);
        zone.bytes[64..80].fill(b'a');
        assert_eq!(zone.room_for_name(448, Some(64..80)), Some(64..512));
        assert_eq!(zone.room_for_name(8, None), Some(80..88), "what is not known stays");
    }

    #[test]
    fn long_name_goes_beside_the_old_one() {
        let mut zone = zone(4096);
        zone.bytes[64..1087].fill(b'a');
        let room = zone.room_for_name(1023, Some(64..1087)).unwrap();
        assert!(room.start >= 1087);
        zone.bytes[1000..4000].fill(b'x');
        assert_eq!(zone.room_for_name(1023, None), None);
    }
}
