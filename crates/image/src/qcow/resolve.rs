//! Where a guest's bytes are.

use super::QcowImage;
use crate::inflate::inflate;
use crate::master::{Master, past_the_end, read};
use crate::{BackingRef, Error, ErrorKind, Format, ImageFuture, Mapped, Mapping, Result};
use layout::qcow::Cluster;
use layout::{GuestOffset, GuestRange, HostOffset, HostRange};
use std::rc::Rc;
use store::Store;

/// Bytes of an L2 table that are loaded at a time (all of it, where it is smaller).
pub(super) const SHEET: u64 = 4096;

/// Where the entry of a cluster is.
struct Place {
    /// The number of its sheet, over all tables.
    sheet: u64,
    /// Where that lies.
    range: HostRange,
    /// Where the entry is in it.
    inside: usize,
}

impl QcowImage {
    /// Where the entry for `at` is; `None` where there is no table.
    fn place(&self, at: GuestOffset) -> Result<Option<Place>> {
        let index = at.get() / self.header.reach();
        let table = match self.l1.get(index as usize).copied() {
            None | Some(0) => return Ok(None),
            Some(table) => HostOffset(table),
        };
        if table.get() >= self.store.size() {
            return Err(past_the_end(self.store.name(), table, &format!("L2 table {index}")));
        }
        let bytes = self.header.l2_entries() * 8;
        let sheet = SHEET.min(bytes);
        let entry = at.get() % self.header.reach() / self.header.cluster() * 8;
        Ok(Some(Place {
            sheet: index * (bytes / sheet) + entry / sheet,
            range: table.range(bytes).skip(entry / sheet * sheet).first(sheet),
            inside: (entry % sheet) as usize,
        }))
    }

    /// What the tables say of the cluster that holds `at`, and how far they say so; `None` when they must be loaded first.
    fn cluster(&self, at: GuestOffset) -> Result<Option<(Cluster, u64)>> {
        let Some(place) = self.place(at)? else {
            let reach = self.header.reach();
            return Ok(Some((Cluster::Unallocated, reach - at.get() % reach)));
        };
        let Some(entry) = self.tables.bytes(place.sheet, place.inside) else { return Ok(None) };
        let cluster = self.header.cluster_at(entry);
        let host = match cluster {
            Cluster::Unallocated => None,
            Cluster::Data(host) => Some(host),
            Cluster::Packed(stream) => Some(stream.start()),
        };
        if let Some(host) = host.filter(|host| host.get() >= self.store.size()) {
            return Err(past_the_end(self.store.name(), host, &format!("the cluster for guest offset {at}")));
        }
        Ok(Some((cluster, self.header.cluster() - at.get() % self.header.cluster())))
    }

    async fn bring(&self, at: GuestOffset) -> Result<()> {
        match self.place(at)? {
            None => Ok(()),
            Some(place) => self.tables.load(&*self.store, place.sheet, place.range).await,
        }
    }

    /// Unpacks a cluster, cut off where the disk ends.
    async fn unpack_cluster(&self, piece: GuestRange) -> Result<Vec<u8>> {
        let at = piece.start();
        let stream = loop {
            match self.cluster(at)? {
                None => self.bring(at).await?,
                Some((Cluster::Packed(stream), _)) => break stream,
                Some(_) => {
                    let what = format!("the cluster for guest offset {at} is not packed");
                    return Err(Error::new(ErrorKind::InvalidArgument, self.store.name(), None, what));
                }
            }
        };
        let packed = read(&*self.store, stream).await?;
        let cluster = self.header.cluster() as usize;
        let unpacked = ring::unblock(move || inflate(&packed, false, cluster)).await;
        let unpacked = unpacked.and_then(|bytes| match bytes.len() {
            len if len == cluster => Ok(bytes),
            len => Err(format!("it has {len} bytes, not {cluster}")),
        });
        let mut bytes = unpacked.map_err(|why| {
            let what = format!("the packed cluster for guest offset {at} cannot be unpacked: {why}");
            Error::new(ErrorKind::Corrupt, self.store.name(), Some(stream.start()), what)
        })?;
        bytes.truncate(piece.len() as usize);
        Ok(bytes)
    }
}

impl Master for QcowImage {
    fn format(&self) -> Format {
        Format::Qcow
    }

    fn store(&self) -> &Rc<dyn Store> {
        &self.store
    }

    fn size(&self) -> u64 {
        self.header.size
    }

    fn unit(&self) -> u64 {
        self.header.cluster()
    }

    fn backing(&self) -> Option<BackingRef> {
        self.backing.clone()
    }

    fn piece(&self, at: GuestOffset) -> Result<Option<Mapped>> {
        let Some((cluster, len)) = self.cluster(at)? else { return Ok(None) };
        let mapping = match cluster {
            Cluster::Unallocated => Mapping::Unallocated,
            Cluster::Data(host) => Mapping::Data(host + at.get() % self.header.cluster()),
            Cluster::Packed(_) => Mapping::Packed,
        };
        Ok(Some(Mapped { len, mapping }))
    }

    fn load(&self, at: GuestOffset) -> ImageFuture<'_, ()> {
        Box::pin(self.bring(at))
    }

    fn packed(&self, at: GuestOffset) -> GuestRange {
        let start = at.align_down(self.header.cluster());
        GuestRange::between(start, (start + self.header.cluster()).min(GuestOffset(self.header.size)))
    }

    fn unpack(&self, piece: GuestRange) -> ImageFuture<'_, Vec<u8>> {
        Box::pin(self.unpack_cluster(piece))
    }
}
