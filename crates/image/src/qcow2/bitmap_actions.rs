//! Changes of persistent bitmaps.
//!
//! **The order** of each (a cut between any two steps leaves clusters counted that nobody uses, nothing worse): what is new (data,
//! tables, the directory) is written where nothing is and counted, durably → the header leads to it, in one sector → what nobody
//! refers to any more is counted down. Nothing is changed in place.

use super::Core;
use super::header::HeaderZone;
use super::snapshot::bytes_of;
use crate::bitmap::{BitmapAction, Bits, not_found};
use crate::{ErrorKind, Result};
use layout::HostRange;
use layout::qcow2::bitmap::{
    AUTO, Bitmap, Bitmaps, DIRTY_TRACKING, GRANULARITY_BITS, IN_USE, MAX_BITMAPS, MAX_NAME, Part, table_entries,
};
use layout::qcow2::{AUTOCLEAR_BITMAPS, Extension, Header};
use ring::Iov;
use std::rc::Rc;

/// Clusters that change hands.
#[derive(Default)]
pub(super) struct Exchange {
    /// Counted, and not referred to before the header leads to them.
    taken: Vec<HostRange>,
    /// Not referred to any more once it does.
    given: Vec<HostRange>,
}

impl Core {
    /// See [`crate::Image::bitmap`].
    pub(super) async fn bitmap(self: &Rc<Self>, action: BitmapAction) -> Result<()> {
        self.health.check_writable()?;
        if self.active.get() > 0 {
            let what = "the image is being written to; change its bitmaps when it is idle";
            return Err(self.health.error(ErrorKind::Busy, None, what));
        }
        self.settle().await?;
        let mut zone = self.zone.lock().await;
        let header = self.header.get();
        let (directory, mut all) = self.directory(&header).await?;
        let mut exchange = Exchange::default();
        let done = async {
            self.change(&mut all, action, &mut exchange).await?;
            exchange.given.push(directory);
            self.publish_bitmaps(&mut zone, header, &all, &mut exchange).await
        };
        self.conclude(done.await, exchange, &mut zone).await
    }

    /// After a success nobody refers to what was given, after a failure nobody to what was taken.
    async fn conclude(&self, done: Result<()>, exchange: Exchange, zone: &mut HeaderZone) -> Result<()> {
        let unused = if done.is_ok() { exchange.given } else { exchange.taken };
        let cluster = self.cluster_size();
        if !self.health.is_poisoned() {
            let unused = unused.into_iter().filter(|range| !range.is_empty()).map(|range| range.align_outward(cluster));
            let counted = async {
                self.count_down(unused.collect()).await?;
                self.write_refcounts(zone).await?;
                self.health.barrier().await
            };
            let counted = counted.await;
            return done.and(counted);
        }
        done
    }

    async fn change(&self, all: &mut Vec<Bitmap>, action: BitmapAction, exchange: &mut Exchange) -> Result<()> {
        if let BitmapAction::Add(name, granularity) = &action {
            let bitmap = self.new_bitmap(all, name, *granularity, exchange).await?;
            all.push(bitmap);
            return Ok(());
        }
        let found = all.iter().position(|bitmap| bitmap.name == action.name());
        let found = found.ok_or_else(|| not_found(self.store.name(), action.name()))?;
        if !matches!(action, BitmapAction::Remove(_)) {
            self.check_usable(&all[found])?;
        }
        let bitmap = &mut all[found];
        match &action {
            BitmapAction::Add(..) => {}
            BitmapAction::Remove(_) => {
                self.give_up(bitmap, exchange).await;
                all.remove(found);
            }
            BitmapAction::Clear(_) => {
                let (_, given) = self.read_bits(bitmap).await?;
                exchange.given.extend(given);
                self.write_bits(bitmap, None, exchange).await?;
            }
            BitmapAction::Enable(_) | BitmapAction::Disable(_) => {
                let enable = matches!(action, BitmapAction::Enable(_));
                bitmap.flags = if enable { bitmap.flags | AUTO } else { bitmap.flags & !AUTO };
            }
            BitmapAction::Merge(_, more) => {
                let (mut bits, given) = self.read_bits(bitmap).await?;
                exchange.given.extend(given);
                bits.merge(more);
                self.write_bits(bitmap, Some(&bits), exchange).await?;
            }
        }
        Ok(())
    }

    async fn new_bitmap(
        &self,
        all: &[Bitmap],
        name: &str,
        granularity: u64,
        exchange: &mut Exchange,
    ) -> Result<Bitmap> {
        let header = self.header.get();
        let refuse = |what: String| Err(self.health.error(ErrorKind::InvalidArgument, None, what));
        if header.version < 3 {
            return refuse(format!(
                "Can't make bitmap '{name}' persistent: Cannot store dirty bitmaps in qcow2 v2 files"
            ));
        }
        if name.is_empty() {
            return refuse("Bitmap name cannot be empty".to_owned());
        }
        if name.len() > MAX_NAME {
            return refuse(format!("Bitmap name is too long: {MAX_NAME} bytes at most"));
        }
        if all.iter().any(|bitmap| bitmap.name == name) {
            return refuse(format!("Bitmap already exists: {name}"));
        }
        if all.len() >= MAX_BITMAPS {
            return refuse(format!("Maximum number of persistent bitmaps is already reached ({MAX_BITMAPS})"));
        }
        let bits = granularity.trailing_zeros() as u8;
        if !granularity.is_power_of_two() || !GRANULARITY_BITS.contains(&bits) {
            return refuse("Granularity must be power of 2 and at least 512 bytes, at most 2 GiB".to_owned());
        }
        let mut bitmap = Bitmap {
            table: layout::HostOffset::ZERO,
            table_entries: 0,
            flags: AUTO,
            granularity_bits: bits,
            kind: DIRTY_TRACKING,
            name: name.to_owned(),
            extra: Vec::new(),
        };
        self.write_bits(&mut bitmap, None, exchange).await?;
        Ok(bitmap)
    }

    /// Gives up all of a bitmap. Where its table is damaged, what it leads to is left to a check.
    async fn give_up(&self, bitmap: &Bitmap, exchange: &mut Exchange) {
        let Ok((parts, table)) = self.read_parts(bitmap).await else { return };
        exchange.given.extend(table);
        let cluster = self.cluster_size();
        exchange.given.extend(parts.into_iter().filter_map(|part| match part {
            Part::At(at) => Some(at.range(cluster)),
            Part::Zeros | Part::Ones => None,
        }));
    }

    /// Writes a bitmap's data and its table where nothing is; without `bits` none is set.
    async fn write_bits(&self, bitmap: &mut Bitmap, bits: Option<&Bits>, exchange: &mut Exchange) -> Result<()> {
        let header = self.header.get();
        let size = bits.map_or(header.size, Bits::size);
        let Some(entries) = table_entries(size, bitmap.granularity_bits, &header) else {
            let what = format!("Too much space will be occupied by bitmap '{}'; use a larger granularity", bitmap.name);
            return Err(self.health.error(ErrorKind::InvalidArgument, None, what));
        };
        let cluster = header.cluster_size();
        let table = self.room_for(u64::from(entries) * 8).await?;
        exchange.taken.push(table);
        let mut raw = vec![0; table.len() as usize / 8];
        for number in 0..u64::from(entries) {
            let Some(bytes) = bits.and_then(|bits| bits.store(number * cluster * 8, cluster)) else { continue };
            let part = if bytes.iter().all(|byte| *byte == 0xff) {
                Part::Ones
            } else {
                let place = self.room_for(cluster).await?;
                exchange.taken.push(place);
                self.health.write(place.start(), Iov::from_slice(&bytes)).await?;
                Part::At(place.start())
            };
            raw[number as usize] = part.encode();
        }
        if !table.is_empty() {
            self.health.write(table.start(), bytes_of(&raw)).await?;
        }
        (bitmap.table, bitmap.table_entries) = (table.start(), entries);
        Ok(())
    }

    /// The header leads to these bitmaps, and has the size and the L1 table that `header` has; durably.
    async fn publish_bitmaps(
        &self,
        zone: &mut HeaderZone,
        header: Header,
        all: &[Bitmap],
        exchange: &mut Exchange,
    ) -> Result<()> {
        let bytes: Vec<u8> = all.iter().flat_map(Bitmap::encode).collect();
        let place = self.room_for(bytes.len() as u64).await?;
        exchange.taken.push(place);
        if !place.is_empty() {
            self.health.write(place.start(), Iov::from_slice(&bytes)).await?;
        }
        // A refcount table that moved is in the header as it is now.
        self.write_refcounts(zone).await?;
        self.health.barrier().await?;
        let now = self.header.get();
        let mut wanted = self.extensions(zone, &now)?;
        wanted.all.retain(|extension| extension.kind != Extension::BITMAPS);
        let mut autoclear_features = now.autoclear_features & !AUTOCLEAR_BITMAPS;
        if !all.is_empty() {
            let directory = place.first(bytes.len() as u64);
            let data = Bitmaps { count: all.len() as u32, directory }.encode();
            wanted.all.push(Extension { kind: Extension::BITMAPS, data });
            autoclear_features |= AUTOCLEAR_BITMAPS;
        }
        let backing = self.backing.borrow().as_ref().map(|backing| backing.name.clone());
        let Header { size, l1_table, l1_entries, .. } = header;
        let header = Header { size, l1_table, l1_entries, autoclear_features, ..now };
        self.publish_extensions(zone, header, wanted, backing.as_deref().map(str::as_bytes)).await
    }

    /// Publishes the size and the L1 table that `new` has, with bitmaps that are ones of a disk of that size. Those that are in use
    /// stay as they are. Where there are none, nothing is done, and it is false.
    pub(super) async fn resize_bitmaps(&self, zone: &mut HeaderZone, new: Header) -> Result<bool> {
        let header = self.header.get();
        let (directory, mut all) = self.directory(&header).await?;
        if all.is_empty() {
            return Ok(false);
        }
        let mut exchange = Exchange::default();
        let done = async {
            for bitmap in all.iter_mut().filter(|bitmap| bitmap.flags & IN_USE == 0) {
                let (bits, given) = self.read_bits(bitmap).await?;
                exchange.given.extend(given);
                self.write_bits(bitmap, Some(&bits.resized(new.size)), &mut exchange).await?;
            }
            exchange.given.push(directory);
            self.publish_bitmaps(zone, new, &all, &mut exchange).await
        };
        let done = done.await;
        self.conclude(done, exchange, zone).await.map(|()| true)
    }
}
