//! Where a guest's bytes are.

use super::{Content, Extent, File, SparseExtent, VmdkExtent, VmdkImage, VmdkInfo};
use crate::inflate::inflate;
use crate::master::sheets::Sheets;
use crate::master::{Master, past_the_end, read};
use crate::{BackingRef, Error, ErrorKind, Format, ImageFuture, ImageInfo, Mapped, Mapping, Result};
use layout::vmdk::descriptor::NO_PARENT;
use layout::vmdk::{Grain, MARKER_BYTES, Marker, SECTOR};
use layout::{GuestOffset, GuestRange, HostOffset, HostRange};
use std::rc::Rc;
use store::Store;

/// The table that maps a byte.
struct Table {
    /// Where it lies in the extent's file.
    place: HostRange,
    sheet: u64,
    /// Where the grain's entry is in it.
    inside: usize,
}

impl SparseExtent {
    /// The table for the byte `inside` the extent; `None` where there is none.
    fn table(&self, inside: u64) -> Result<Option<Table>> {
        let index = inside / self.header.reach();
        let entry = self.directory.get(index as usize).copied().unwrap_or(0);
        let Some(place) = self.header.table_at(entry) else { return Ok(None) };
        if place.start().get() >= self.file.store.size() {
            let what = format!("table {index} of grains");
            return Err(past_the_end(self.file.store.name(), place.start(), &what));
        }
        let grain = inside % self.header.reach() / self.header.grain;
        Ok(Some(Table { place, sheet: self.first_sheet + index, inside: grain as usize * 4 }))
    }

    /// What the tables say of the grain that holds the byte `inside` the extent, and how far they say so; `None` when they must be
    /// loaded first.
    fn grain(&self, tables: &Sheets, inside: u64) -> Result<Option<(Grain, u64)>> {
        let Some(table) = self.table(inside)? else {
            return Ok(Some((Grain::Unallocated, self.header.reach() - inside % self.header.reach())));
        };
        let Some(entry) = tables.bytes(table.sheet, table.inside) else { return Ok(None) };
        let grain = self.header.grain_at(entry);
        if let Grain::At(host) = grain
            && host.get() >= self.file.store.size()
        {
            let what = format!("grain {}", inside / self.header.grain);
            return Err(past_the_end(self.file.store.name(), host, &what));
        }
        Ok(Some((grain, self.header.grain - inside % self.header.grain)))
    }
}

impl VmdkImage {
    /// The extent that holds `at`, which lies on the disk.
    fn extent(&self, at: GuestOffset) -> &Extent {
        let behind = self.extents.partition_point(|extent| extent.place.start() <= at);
        // The first extent begins at 0, so there is one.
        &self.extents[behind.saturating_sub(1)]
    }

    async fn bring(&self, at: GuestOffset) -> Result<()> {
        let Extent { place, content } = self.extent(at);
        let Content::Sparse(sparse) = content else { return Ok(()) };
        match sparse.table(at - place.start())? {
            None => Ok(()),
            Some(table) => self.tables.load(&*sparse.file.store, table.sheet, table.place).await,
        }
    }

    /// Unpacks a grain, cut off where its extent ends.
    async fn unpack_grain(&self, piece: GuestRange) -> Result<Vec<u8>> {
        let at = piece.start();
        let Extent { place: extent, content } = self.extent(at);
        let Content::Sparse(sparse @ SparseExtent { file, header, .. }) = content else {
            return Err(self.not_packed(at));
        };
        let inside = at - extent.start();
        let number = inside / header.grain;
        let place = loop {
            match sparse.grain(&self.tables, inside)? {
                None => self.bring(at).await?,
                Some((Grain::At(place), _)) if header.packed => break place,
                Some(_) => return Err(self.not_packed(at)),
            }
        };
        let corrupt = |why: &str| {
            let what = format!("packed grain {number} (guest offset {at}) {why}");
            Error::new(ErrorKind::Corrupt, file.store.name(), Some(place), what)
        };
        let store = &*file.store;
        // Nothing useful packs to more than twice its size.
        let most = 2 * header.grain + SECTOR;
        let left = store.size() - place.get();
        let stream = if header.markers {
            let marker = Marker::decode(&read(store, place.range(MARKER_BYTES)).await?);
            if marker.sector != number * (header.grain / SECTOR) {
                return Err(corrupt(&format!("is marked as the one for sector {}", marker.sector)));
            }
            let len = u64::from(marker.len);
            if len == 0 || len > most || len > left.saturating_sub(MARKER_BYTES) {
                return Err(corrupt(&format!("cannot have {len} bytes")));
            }
            (place + MARKER_BYTES).range(len)
        } else {
            place.range(most.min(left))
        };
        let packed = read(store, stream).await?;
        let grain = header.grain as usize;
        let mut bytes = ring::unblock(move || inflate(&packed, true, grain))
            .await
            .map_err(|why| corrupt(&format!("cannot be unpacked: {why}")))?;
        let wanted = piece.len() as usize;
        if bytes.len() < wanted {
            return Err(corrupt(&format!("unpacks to {} bytes of {wanted}", bytes.len())));
        }
        bytes.truncate(wanted);
        Ok(bytes)
    }

    /// What only this format has.
    fn own_info(&self) -> VmdkInfo {
        let extents = self.extents.iter().map(|extent| {
            let (file, kind) = match &extent.content {
                Content::Zero => (None, "ZERO"),
                Content::Flat { file, .. } => (Some(file), "FLAT"),
                Content::Sparse(sparse) => (Some(&sparse.file), if self.split { "SPARSE" } else { "" }),
            };
            let header = if let Content::Sparse(sparse) = &extent.content { Some(&sparse.header) } else { None };
            VmdkExtent {
                size: extent.place.len(),
                file: file.map_or_else(String::new, |file| file.store.name().to_owned()),
                grain: header.map(|header| header.grain),
                packed: header.is_some_and(|header| header.packed),
                kind,
            }
        });
        VmdkInfo {
            cid: self.descriptor.cid.unwrap_or(NO_PARENT),
            parent_cid: self.descriptor.parent_cid.unwrap_or(NO_PARENT),
            create_type: self.descriptor.create_type.clone(),
            extents: extents.collect(),
        }
    }

    fn not_packed(&self, at: GuestOffset) -> Error {
        let what = format!("the grain for guest offset {at} is not packed");
        Error::new(ErrorKind::InvalidArgument, self.store.name(), None, what)
    }
}

/// Bytes of `file` from `at` on, as far as it goes (`len` at most); zeros behind its end.
fn plain(file: &File, at: HostOffset, len: u64) -> Mapped {
    match file.store.size().saturating_sub(at.get()) {
        0 => Mapped { len, mapping: Mapping::Zero },
        left => Mapped { len: len.min(left), mapping: Mapping::Data(file.base + at.get()) },
    }
}

impl Master for VmdkImage {
    fn format(&self) -> Format {
        Format::Vmdk
    }

    fn store(&self) -> &Rc<dyn Store> {
        &self.store
    }

    fn size(&self) -> u64 {
        self.size
    }

    fn unit(&self) -> u64 {
        self.grain.unwrap_or(1)
    }

    fn backing(&self) -> Option<BackingRef> {
        self.backing.clone()
    }

    fn identity(&self) -> Option<String> {
        self.descriptor.cid.map(|cid| format!("{cid:08x}"))
    }

    fn backing_identity(&self) -> Option<String> {
        self.descriptor.parent_cid.map(|cid| format!("{cid:08x}"))
    }

    fn lies_plainly(&self) -> bool {
        self.extents.iter().any(|extent| matches!(extent.content, Content::Flat { .. }))
    }

    fn info(&self) -> ImageInfo {
        ImageInfo {
            cluster_size: self.grain,
            dirty: self.unclean,
            warnings: self.warnings.clone(),
            vmdk: Some(self.own_info()),
            ..ImageInfo::default()
        }
    }

    fn piece(&self, at: GuestOffset) -> Result<Option<Mapped>> {
        let Extent { place, content } = self.extent(at);
        let (inside, left) = (at - place.start(), place.end() - at);
        let sparse = match content {
            Content::Zero => return Ok(Some(Mapped { len: left, mapping: Mapping::Zero })),
            Content::Flat { file, start } => return Ok(Some(plain(file, *start + inside, left))),
            Content::Sparse(sparse) => sparse,
        };
        let Some((grain, len)) = sparse.grain(&self.tables, inside)? else { return Ok(None) };
        let len = len.min(left);
        Ok(Some(match grain {
            Grain::Unallocated => Mapped { len, mapping: Mapping::Unallocated },
            Grain::Zero => Mapped { len, mapping: Mapping::Zero },
            Grain::At(_) if sparse.header.packed => Mapped { len, mapping: Mapping::Packed },
            Grain::At(host) => plain(&sparse.file, host + inside % sparse.header.grain, len),
        }))
    }

    fn load(&self, at: GuestOffset) -> ImageFuture<'_, ()> {
        Box::pin(self.bring(at))
    }

    fn packed(&self, at: GuestOffset) -> GuestRange {
        let extent = self.extent(at);
        match &extent.content {
            Content::Sparse(SparseExtent { header, .. }) => {
                let inside = at - extent.place.start();
                (extent.place.start() + inside / header.grain * header.grain)
                    .range(header.grain)
                    .intersect(extent.place)
            }
            _ => at.range(1),
        }
    }

    fn unpack(&self, piece: GuestRange) -> ImageFuture<'_, Vec<u8>> {
        Box::pin(self.unpack_grain(piece))
    }
}
