//! The header of an open image: size, backing reference, and where the tables are.
//!
//! **Invariants.**
//! * One write of the header at a time, and each one changes a single sector, the first: after a cut the header is the old or the
//!   new one. What does not fit there (a long name, many extensions) is written, durably, where nothing is, before the header
//!   leads to it.
//! * Extensions that are not known stay.

use super::Core;
use super::resolve::Table;
use crate::{BackingRef, ErrorKind, Format, Keep, Purpose, Result};
use layout::qcow2::{COPIED, Extension, Extensions, Header, L2Entry, MAX_BACKING_NAME, OFFSET, Slice};
use layout::{GuestOffset, GuestRange, HostOffset, HostRange};
use ring::Iov;
use std::ops::Range;
use std::rc::Rc;
use store::Store;

/// Bytes of the header that one write publishes whole.
const ATOMIC: usize = 512;

/// The unit in which the header is written: no medium in use needs to read before it writes this.
const PAGE: usize = 4096;

/// How much of the first cluster is looked at for room for a name.
const ZONE: u64 = 64 << 10;

/// The first bytes of the first cluster, as they are on disk.
pub(super) struct HeaderZone {
    bytes: Vec<u8>,
}

impl HeaderZone {
    /// Reads them.
    pub(super) async fn read(store: &dyn Store, header: &Header) -> Result<Self> {
        let iov = Iov::alloc(header.cluster_size().min(ZONE) as usize);
        store.read(HostOffset::ZERO, iov.clone()).await?;
        Ok(Self { bytes: iov.to_vec() })
    }

    /// The pages that hold `range`: where, and what.
    fn pages(&self, range: Range<usize>) -> (HostOffset, Iov) {
        let (start, end) = (range.start / PAGE * PAGE, range.end.next_multiple_of(PAGE).min(self.bytes.len()));
        (HostOffset(start as u64), Iov::from_slice(&self.bytes[start..end]))
    }

    /// Where extensions end at the latest: where the backing file's name begins, if it lies behind them.
    fn extensions_end(&self, header: &Header) -> usize {
        let name = header.backing_name.map(|name| name.start().get() as usize);
        let name = name.filter(|name| *name > header.header_bytes as usize);
        name.unwrap_or(self.bytes.len()).min(self.bytes.len())
    }

    /// A run of `len` zeros from `from` on.
    fn room(&self, len: usize, from: usize) -> Option<Range<usize>> {
        let mut free = 0;
        for at in from..self.bytes.len() {
            free = if self.bytes[at] == 0 { free + 1 } else { 0 };
            if free == len {
                return Some(at + 1 - len..at + 1);
            }
        }
        None
    }
}

/// Checks a reference before anything is written; also used for new images.
pub(super) fn check_backing(image: &str, backing: &BackingRef) -> Result<()> {
    backing.check(image, Format::Qcow2, MAX_BACKING_NAME as usize)
}

/// The extensions of an image with this backing file, others as they are in `before`.
pub(super) fn extensions(before: &Extensions, backing: Option<&BackingRef>) -> Extensions {
    let format = backing.and_then(|backing| backing.format);
    let format =
        format.map(|format| Extension { kind: Extension::BACKING_FORMAT, data: format.name().as_bytes().to_vec() });
    let others = before.all.iter().filter(|extension| extension.kind != Extension::BACKING_FORMAT).cloned();
    Extensions { all: format.into_iter().chain(others).collect() }
}

impl Core {
    /// Writes `header` durably; the caller holds the zone. A failure poisons.
    pub(super) async fn publish_header(&self, zone: &mut HeaderZone, header: Header) -> Result<()> {
        header.encode_over(&mut zone.bytes);
        let (at, page) = zone.pages(0..ATOMIC);
        self.health.write(at, page).await?;
        self.header.set(header);
        self.health.barrier().await
    }

    /// See [`crate::Image::set_backing`].
    pub(super) async fn set_backing(self: &Rc<Self>, backing: Option<BackingRef>) -> Result<()> {
        self.health.check_writable()?;
        if let Some(backing) = &backing {
            check_backing(self.store.name(), backing)?;
            if self.header.get().data_file_is_raw() {
                let what = "an image with a raw data file cannot have a backing file";
                return Err(self.health.error(ErrorKind::Unsupported, None, what));
            }
        }
        self.commit().await?;
        let mut zone = self.zone.lock().await;
        let header = self.header.get();
        let wanted = extensions(&self.extensions(&zone, &header)?, backing.as_ref());
        let name = backing.as_ref().map(|backing| backing.name.as_bytes());
        self.publish_extensions(&mut zone, header, wanted, name).await?;
        *self.backing.borrow_mut() = backing;
        Ok(())
    }

    /// The header's extensions.
    pub(super) fn extensions(&self, zone: &HeaderZone, header: &Header) -> Result<Extensions> {
        let start = header.header_bytes as usize;
        let area = zone.bytes.get(start..zone.extensions_end(header)).unwrap_or_default();
        Extensions::decode(area, start as u64).map_err(|error| super::open::header_error(self.store.name(), &error))
    }

    /// Writes `header`, these extensions and the backing file's name, durably and in one piece; the caller holds the zone. A
    /// failure poisons.
    pub(super) async fn publish_extensions(
        &self,
        zone: &mut HeaderZone,
        header: Header,
        mut wanted: Extensions,
        name: Option<&[u8]>,
    ) -> Result<()> {
        let start = header.header_bytes as usize;
        let has_name = name.is_some();
        let name = name.unwrap_or_default();
        // Where they were: another version's begin elsewhere.
        let old = self.header.get();
        let old_start = old.header_bytes as usize;
        let before = old_start + self.extensions(zone, &old)?.encode().len();
        if start + wanted.encode().len() + name.len() > ATOMIC {
            // Names of feature bits are for old programs' messages; they make way for what must change in one piece.
            wanted.all.retain(|extension| extension.kind != Extension::FEATURE_NAMES);
        }
        let encoded = wanted.encode();
        let end = start + encoded.len();
        if end > zone.bytes.len() {
            let what = "the header has no room for its extensions";
            return Err(self.health.error(ErrorKind::Unsupported, None, what));
        }
        let place = if end + name.len() <= ATOMIC {
            end..end + name.len()
        } else if let Some(room) = zone.room(name.len(), end.max(ATOMIC).max(before)) {
            zone.bytes[room.clone()].copy_from_slice(name);
            let (at, pages) = zone.pages(room.clone());
            self.health.write(at, pages).await?;
            self.health.barrier().await?;
            room
        } else {
            let what = "the header has no room for the name of the backing file; use a shorter one";
            return Err(self.health.error(ErrorKind::Unsupported, None, what));
        };
        // Up to the end of the sector nothing of the old extensions and the old name stays.
        let wipe = end.max(ATOMIC.min(zone.bytes.len()));
        zone.bytes[start.min(old_start)..wipe].fill(0);
        zone.bytes[start..end].copy_from_slice(&encoded);
        zone.bytes[place.clone()].copy_from_slice(name);
        let slot = HostRange::new(HostOffset(place.start as u64), name.len() as u64);
        if end > PAGE {
            let (at, pages) = zone.pages(PAGE..end);
            self.health.write(at, pages).await?;
        }
        let old = old.backing_name;
        let old = old.map(|name| name.start().get() as usize..name.end().get() as usize);
        let header = Header { backing_name: has_name.then_some(slot), ..header };
        self.publish_header(zone, header).await?;
        // What is left of the old name is nobody's now. Not durable, and no harm if it never is.
        if let Some(old) = old.filter(|old| old.start >= wipe && old.end <= zone.bytes.len()) {
            for at in old.clone().filter(|at| !place.contains(at)) {
                zone.bytes[at] = 0;
            }
            let (at, pages) = zone.pages(old);
            self.health.write(at, pages).await?;
        }
        Ok(())
    }

    /// See [`crate::Image::resize`].
    pub(super) async fn resize(self: &Rc<Self>, size: u64) -> Result<()> {
        self.health.check_writable()?;
        let old = self.size();
        self.check_size(size)?;
        if size < old {
            return self.shrink(size).await;
        }
        self.check_nothing_behind(old).await?;
        self.zero_rest_of_last_cluster(old).await?;
        self.commit().await?;
        self.lengthen_l1(size).await?;
        self.lengthen_data_file(old, size).await?;
        let mut zone = self.zone.lock().await;
        let header = Header { size, ..self.header.get() };
        if self.resize_bitmaps(&mut zone, header).await? {
            return Ok(());
        }
        self.publish_header(&mut zone, header).await
    }

    fn check_size(&self, size: u64) -> Result<()> {
        if !size.is_multiple_of(512) {
            let what = format!("the size of a QCOW2 image is a multiple of 512 bytes ({size} were asked for)");
            return Err(self.health.error(ErrorKind::InvalidArgument, None, what));
        }
        let most = self.header.get().max_size();
        if size > most {
            let what = format!(
                "a QCOW2 image with clusters of {} bytes holds at most {most} bytes ({size} were asked for)",
                self.cluster_size()
            );
            return Err(self.health.error(ErrorKind::InvalidArgument, None, what));
        }
        Ok(())
    }

    /// Sees to it that the L1 table, on disk and in memory, has the entries that a disk of `size` bytes needs. Where it must
    /// move: new table → barrier → header → barrier; only then is the old one given back.
    async fn lengthen_l1(self: &Rc<Self>, size: u64) -> Result<()> {
        let mut zone = self.zone.lock().await;
        let header = self.header.get();
        let (have, need) = (u64::from(header.l1_entries), header.l1_entries_for(size));
        if need <= have {
            return Ok(());
        }
        let cluster = header.cluster_size();
        let room = (have * 8).next_multiple_of(cluster) / 8;
        let entries = |upto: u64| {
            // What lay behind the table's end was no part of it.
            let tables = self.tables.borrow();
            let mut entries = tables.l1().get(..have as usize).unwrap_or_default().to_vec();
            entries.resize(upto as usize, 0);
            entries
        };
        let bytes =
            |entries: &[u64]| Iov::from_slice(&entries.iter().flat_map(|e| e.to_be_bytes()).collect::<Vec<u8>>());
        let slice = self.slice_bytes() / 8;
        if need <= room && have > 0 {
            let new = entries(room);
            let first = (have / slice * slice) as usize;
            self.health.write(header.l1_table + first as u64 * 8, bytes(&new[first..])).await?;
            self.health.barrier().await?;
            self.tables.borrow_mut().replace_l1(new);
            return self.publish_header(&mut zone, Header { l1_entries: need as u32, ..header }).await;
        }
        let length = (need * 8).next_multiple_of(cluster);
        let new = entries(length / 8);
        let held = self.room.take_whole(length).await?;
        self.health.write(held.range().start(), bytes(&new)).await?;
        // From here on a cut at worst leaves the new place counted.
        let range = held.keep();
        let counted = async {
            self.count_up(vec![range]).await?;
            self.write_refcounts(&mut zone).await
        };
        counted.await.map_err(|error| self.health.fail(error))?;
        self.health.barrier().await?;
        let old = self.header.get().l1_range();
        let header = Header { l1_entries: need as u32, l1_table: range.start(), ..self.header.get() };
        self.publish_header(&mut zone, header).await?;
        self.tables.borrow_mut().replace_l1(new);
        if have > 0 {
            self.count_down(vec![old.align_outward(cluster)]).await?;
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
        let cluster = self.cluster_size();
        let old = self.size();
        let end = until.align_up(cluster);
        self.check_size(end.get().min(self.header.get().max_size()))?;
        self.check_nothing_behind(old).await?;
        self.lengthen_l1(end.get()).await?;
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
        let header = self.header.get();
        let reach = header.table_reach();
        let first = old.next_multiple_of(header.cluster_size());
        for index in first / reach..u64::from(header.l1_entries) {
            let (Table::Stored { at: table, .. } | Table::Fresh { at: table, empty: false }) = self.table(index)?
            else {
                continue;
            };
            let bytes = Iov::alloc(header.cluster_size() as usize);
            self.store.read(table, bytes.clone()).await?;
            let slice = Slice::decode(&bytes.to_vec());
            let skip = (first.saturating_sub(index * reach) / header.cluster_size()) as usize * self.words();
            for word in (skip..slice.raw().len()).step_by(self.words()) {
                let raw = slice.raw()[word];
                // In version 2 marks are clusters of zeros; they are not told from others.
                let marks_have_places = header.version < 3;
                let outside = header.has_data_file() && raw & (OFFSET | COPIED) != 0;
                if outside || !L2Entry::referred(raw, &header).is_empty() && !marks_have_places {
                    let what = "a table has data behind the end of the disk; check and repair the image";
                    return Err(self.health.corrupt(table + word as u64 * 8, what));
                }
            }
        }
        Ok(())
    }

    /// Zeroes what the last cluster holds behind the disk's end `old`.
    async fn zero_rest_of_last_cluster(self: &Rc<Self>, old: u64) -> Result<()> {
        let cluster = self.cluster_size();
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
            self.payload.zero((host + 1).range(rest), store::ZeroMode::default()).await?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn extensions_that_are_not_known_stay_behind_the_format() {
        let other = Extension { kind: 0x1234, data: b"whatever".to_vec() };
        let before = Extensions {
            all: vec![Extension { kind: Extension::BACKING_FORMAT, data: b"qed".to_vec() }, other.clone()],
        };
        let backing = BackingRef { name: "x".to_owned(), format: Some(Format::Raw) };
        let after = extensions(&before, Some(&backing));
        assert_eq!((after.backing_format().as_deref(), &after.all[1]), (Some("raw"), &other));
        assert_eq!(extensions(&before, None).all, [other]);
    }

    #[test]
    fn a_name_goes_where_nothing_is() {
        let mut zone = HeaderZone { bytes: vec![0; 4096] };
        zone.bytes[600..700].fill(b'x');
        assert_eq!(zone.room(50, 512), Some(512..562));
        assert_eq!(zone.room(100, 512), Some(700..800));
        assert_eq!(zone.room(4000, 512), None);
    }
}
