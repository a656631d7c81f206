//! Amending: another version, other refcounts, another name for the data file.
//!
//! **Invariants.**
//! * What cannot be done is told before anything is changed.
//! * Every step ends with a header that is published in one sector, and leaves an image that is whole and shows the same: up to
//!   version 3 first, down to version 2 last.
//! * Other refcounts are written where nothing is, durably, before the header leads to them. What a cut leaves there is free.

use super::Core;
use super::create::{V2_BYTES, V3_BYTES};
use super::data_file::MAX_NAME;
use super::header::HeaderZone;
use crate::amend::Amendment;
use crate::{Error, ErrorKind, Image, Keep, Mapping, Purpose, Result};
use layout::qcow2::{
    AUTOCLEAR_DATA_FILE_RAW, COMPATIBLE_LAZY_REFCOUNTS, Extension, Extensions, Features, Header, refcount,
};
use layout::{GuestOffset, GuestRange, HostOffset};
use ring::Iov;
use std::collections::BTreeSet;
use std::rc::Rc;

/// How much is looked up at once.
const STEP: u64 = 1 << 30;

impl Core {
    fn cannot(&self, what: impl Into<String>) -> Error {
        self.health.error(ErrorKind::InvalidArgument, None, what.into())
    }

    /// See [`crate::Image::amend`].
    pub(super) async fn amend(self: &Rc<Self>, image: &dyn Image, change: &Amendment) -> Result<()> {
        self.health.check_writable()?;
        self.check_idle()?;
        self.settle().await?;
        let header = self.header.get();
        let version = change.version.unwrap_or(header.version);
        self.check_amendment(change, &header, version).await?;
        if version > header.version {
            self.to_version_3().await?;
        }
        if let Some(bits) = change.refcount_bits
            && bits.trailing_zeros() != header.refcount_order
        {
            self.rewrite_refcounts(bits.trailing_zeros()).await?;
        }
        if change.data_file.is_some() || change.data_file_raw.is_some() {
            self.amend_data_file(change).await?;
        }
        if let Some(lazy) = change.lazy_refcounts {
            let mut zone = self.zone.lock().await;
            let header = self.header.get();
            let without = header.compatible_features & !COMPATIBLE_LAZY_REFCOUNTS;
            let compatible_features = if lazy { without | COMPATIBLE_LAZY_REFCOUNTS } else { without };
            if compatible_features != header.compatible_features {
                self.publish_header(&mut zone, Header { compatible_features, ..header }).await?;
            }
        }
        if version < self.header.get().version {
            self.to_version_2(image).await?;
        }
        Ok(())
    }

    /// What can be said before anything is done.
    async fn check_amendment(&self, change: &Amendment, header: &Header, version: u32) -> Result<()> {
        let bits = change.refcount_bits.unwrap_or(1 << header.refcount_order);
        if !bits.is_power_of_two() || bits > 64 {
            return Err(self.cannot("Refcount width must be a power of two and may not exceed 64 bits"));
        }
        if version < 3 && change.lazy_refcounts == Some(true) {
            return Err(self.cannot(
                "Lazy refcounts only supported with compatibility level 1.1 and above (use compat=1.1 or greater)",
            ));
        }
        if version < 3 && bits != 16 {
            return Err(self.cannot(
                "Refcount widths other than 16 bits require compatibility level 1.1 or above (use compat=1.1 or greater)",
            ));
        }
        if (change.data_file.is_some() || change.data_file_raw == Some(false)) && !header.has_data_file() {
            return Err(self.cannot("data-file can only be set for images that use an external data file"));
        }
        if change.data_file_raw == Some(true) && !header.data_file_is_raw() {
            return Err(self.cannot("data-file-raw cannot be set on existing images"));
        }
        let fits = |name: &String| !name.is_empty() && name.len() <= MAX_NAME && !name.contains('\0');
        if change.data_file.as_ref().is_some_and(|name| !fits(name)) {
            return Err(self.cannot("the name of the data file is no name of a file, or too long"));
        }
        if version < header.version {
            let features = header.features - Features::DIRTY;
            if !features.is_empty() {
                let names: Vec<_> = features.iter_names().map(|(name, _)| name.to_lowercase()).collect();
                return Err(
                    self.cannot(format!("Cannot downgrade an image with incompatible features: {}", names.join(", ")))
                );
            }
            if header.snapshots > 0 {
                return Err(self.cannot(
                    "Cannot downgrade an image with internal snapshots: they may hold clusters of zeros; delete them first",
                ));
            }
            let zone = self.zone.lock().await;
            if self.extensions(&zone, header)?.get(Extension::BITMAPS).is_some() {
                return Err(
                    self.cannot("Cannot downgrade an image with bitmaps: remove them first ('bitmap --remove')")
                );
            }
        }
        Ok(())
    }

    async fn publish_version(&self, header: Header, keep: impl Fn(&Extension) -> bool) -> Result<()> {
        let mut zone = self.zone.lock().await;
        let mut extensions = self.extensions(&zone, &self.header.get())?;
        extensions.all.retain(keep);
        self.republish(&mut zone, header, extensions).await
    }

    /// Publishes the header with these extensions; the backing file stays.
    async fn republish(&self, zone: &mut HeaderZone, header: Header, extensions: Extensions) -> Result<()> {
        let name = self.backing.borrow().as_ref().map(|backing| backing.name.clone());
        self.publish_extensions(zone, header, extensions, name.as_deref().map(str::as_bytes)).await
    }

    async fn to_version_3(&self) -> Result<()> {
        let header = Header { version: 3, header_bytes: V3_BYTES, ..self.header.get() };
        self.publish_version(header, |_| true).await
    }

    /// Version 2 has no way to say that a cluster is zeros: those that are said to be get places.
    async fn to_version_2(self: &Rc<Self>, image: &dyn Image) -> Result<()> {
        let end = self.size();
        let mut at = 0;
        while at < end {
            let range = GuestRange::new(GuestOffset(at), STEP.min(end - at));
            let Some(found) = image.lookup(range)? else {
                image.load(range).await?;
                continue;
            };
            if found.mapping != Mapping::Zero {
                at += found.len;
                continue;
            }
            let clusters = range.first(found.len).align_outward(self.cluster_size());
            let reservation = self.reserve(clusters, Purpose::Data).await?;
            let len = reservation.range().len();
            if let (Some(host), false) = (reservation.host(), reservation.zeroed()) {
                self.payload.zero(host.range(len), store::ZeroMode::default()).await?;
            }
            let _ = reservation.link(Keep::New, |_| false);
            at += len;
            if self.cache.borrow().is_crowded() {
                self.commit().await?;
            }
        }
        self.settle().await?;
        let header = Header {
            version: 2,
            header_bytes: V2_BYTES,
            features: Features::empty(),
            compatible_features: 0,
            autoclear_features: 0,
            ..self.header.get()
        };
        self.publish_version(header, |extension| extension.kind != Extension::FEATURE_NAMES).await
    }

    async fn amend_data_file(&self, change: &Amendment) -> Result<()> {
        let mut zone = self.zone.lock().await;
        let mut header = self.header.get();
        if change.data_file_raw == Some(false) {
            header.autoclear_features &= !AUTOCLEAR_DATA_FILE_RAW;
        }
        let mut extensions = self.extensions(&zone, &header)?;
        if let Some(name) = &change.data_file {
            extensions.all.retain(|extension| extension.kind != Extension::DATA_FILE);
            extensions.all.push(Extension { kind: Extension::DATA_FILE, data: name.clone().into_bytes() });
        }
        self.republish(&mut zone, header, extensions).await
    }

    /// Writes all refcounts anew, with `1 << order` bits each, behind everything that is there.
    async fn rewrite_refcounts(&self, order: u32) -> Result<()> {
        if !self.room.growable() {
            let what = "other refcounts need room behind the image's end, and the device has a fixed length";
            return Err(self.health.error(ErrorKind::Unsupported, None, what));
        }
        let length = self.store.size();
        let written = self.rewrite_behind(order).await;
        if written.is_err() && !self.health.is_poisoned() {
            // Nothing leads there.
            let _ = self.store.set_size(length).await;
        }
        written
    }

    async fn rewrite_behind(&self, order: u32) -> Result<()> {
        let mut zone = self.zone.lock().await;
        let old = self.header.get();
        let cluster = old.cluster_size();
        let number = |at: HostOffset| at.get() >> old.cluster_bits;
        let table_at = number(old.refcount_table);
        let mut leaving: BTreeSet<u64> = (table_at..table_at + u64::from(old.refcount_table_clusters)).collect();
        let old_blocks = self.refcounts.borrow().table().len() as u64;
        let mut first = self.store.size().div_ceil(cluster);
        for block in 0..old_blocks {
            if let Some(at) = self.block_place(block)? {
                leaving.insert(number(at));
                first = self.last_counted(block).await?.map_or(first, |last| first.max(last + 1));
            }
        }
        let new = Header { refcount_order: order, ..old };
        let per_block = new.refcounts_per_block();
        let (mut blocks, mut tables) = (0, 0);
        let mut end = first;
        loop {
            let (more, longer) = (end.div_ceil(per_block), (end.div_ceil(per_block) * 8).div_ceil(cluster));
            if (more, longer) == (blocks, tables) {
                break;
            }
            (blocks, tables) = (more, longer);
            end = first + blocks + tables;
        }
        let place = |number: u64| HostOffset(number << old.cluster_bits);
        let new = Header { refcount_table: place(first), refcount_table_clusters: tables as u32, ..new };
        new.validate().map_err(|error| self.cannot(format!("so many refcounts do not fit: {error}")))?;
        let most = refcount::max(order);
        for block in 0..blocks {
            let mut bytes = vec![0; cluster as usize];
            for index in 0..per_block.min(end.saturating_sub(block * per_block)) {
                let counted = block * per_block + index;
                let value = match counted {
                    counted if counted >= first => 1,
                    counted if leaving.contains(&counted) => 0,
                    counted => self.refcount(counted).await?,
                };
                if value > most {
                    return Err(self.cannot(format!(
                        "Cannot decrease refcount entry width to {} bits: Cluster at offset {:#x} has a refcount of {value}",
                        1 << order,
                        place(counted).get()
                    )));
                }
                refcount::set(&mut bytes, order, index, value);
            }
            self.store.write(place(first + tables + block), Iov::from_slice(&bytes), false).await?;
        }
        let mut table = vec![0; (tables * cluster) as usize];
        for (entry, block) in table.as_chunks_mut().0.iter_mut().zip(0..blocks) {
            *entry = place(first + tables + block).get().to_be_bytes();
        }
        self.store.write(place(first), Iov::from_slice(&table), false).await?;
        self.health.barrier().await?;
        self.publish_header(&mut zone, new).await?;
        drop(zone);
        self.reload().await?;
        self.find_free().await
    }
}
