//! Where a guest's bytes are.

use super::{Blocks, VpcImage};
use crate::master::bits::{self, Order};
use crate::master::{Master, past_the_end};
use crate::{BackingRef, Format, ImageFuture, ImageInfo, Mapped, Mapping, Result};
use layout::vpc::SECTOR;
use layout::{GuestOffset, HostOffset};
use std::fmt::Write;
use std::rc::Rc;
use store::Store;

/// Bytes of a bitmap that are loaded at a time (all of it, where it is smaller: 512, as a rule).
pub(super) const SHEET: u64 = 4096;

/// An identifier as text.
fn hex(id: [u8; 16]) -> String {
    id.iter().fold(String::new(), |mut text, byte| {
        let _ = write!(text, "{byte:02x}");
        text
    })
}

/// Where a block is.
enum Place {
    /// The table must be loaded first.
    Unknown,
    Nowhere,
    /// Here, its bitmap first.
    At(HostOffset),
}

impl Blocks {
    /// Where the block that holds `at` is.
    fn place(&self, store: &dyn Store, at: GuestOffset) -> Result<Place> {
        let number = at.get() / self.header.block;
        let Some(entry) = self.table.entry(number) else { return Ok(Place::Unknown) };
        match self.header.place(entry) {
            Some(host) if host.get() >= store.size() => {
                Err(past_the_end(store.name(), host, &format!("block {number}")))
            }
            Some(host) => Ok(Place::At(host)),
            None => Ok(Place::Nowhere),
        }
    }

    /// The sheet of the block's bitmap for `at`, and which byte of that bitmap it begins with.
    fn sheet(&self, at: GuestOffset) -> (u64, u64) {
        let sheet = SHEET.min(self.header.bitmap());
        let inside = at.get() % self.header.block / SECTOR / 8 / sheet;
        (at.get() / self.header.block * (self.header.bitmap() / sheet) + inside, inside * sheet)
    }

    async fn bring(&self, store: &dyn Store, at: GuestOffset) -> Result<()> {
        self.table.load(store, at.get() / self.header.block).await?;
        let (Some(bitmaps), Place::At(place)) = (&self.bitmaps, self.place(store, at)?) else { return Ok(()) };
        let (number, skip) = self.sheet(at);
        bitmaps.load(store, number, place.range(self.header.bitmap()).skip(skip).first(SHEET)).await
    }

    fn piece(&self, store: &dyn Store, at: GuestOffset) -> Result<Option<Mapped>> {
        let inside = at.get() % self.header.block;
        let left = self.header.block - inside;
        let whole = |mapping| Ok(Some(Mapped { len: left, mapping }));
        let (place, bitmaps) = match (self.place(store, at)?, &self.bitmaps) {
            (Place::Unknown, _) => return Ok(None),
            (Place::Nowhere, None) => return whole(Mapping::Zero),
            (Place::Nowhere, Some(_)) => return whole(Mapping::Unallocated),
            (Place::At(place), None) => return whole(Mapping::Data(place + self.header.bitmap() + inside)),
            (Place::At(place), Some(bitmaps)) => (place, bitmaps),
        };
        let (number, skip) = self.sheet(at);
        let first = inside / SECTOR - skip * 8;
        let end = (first + left.div_ceil(SECTOR)).min(SHEET * 8);
        let look = |bytes: &[u8]| bits::run(bytes, first as usize, end as usize, Order::GreatestFirst);
        let Some((here, sectors)) = bitmaps.with(number, look) else { return Ok(None) };
        let mapping = if here { Mapping::Data(place + self.header.bitmap() + inside) } else { Mapping::Unallocated };
        Ok(Some(Mapped { len: (sectors as u64 * SECTOR - inside % SECTOR).min(left), mapping }))
    }
}

impl Master for VpcImage {
    fn format(&self) -> Format {
        Format::Vpc
    }

    fn store(&self) -> &Rc<dyn Store> {
        &self.store
    }

    fn size(&self) -> u64 {
        self.size
    }

    fn unit(&self) -> u64 {
        self.blocks.as_ref().map_or(1, |blocks| blocks.header.block)
    }

    fn backing(&self) -> Option<BackingRef> {
        self.backing.clone()
    }

    fn identity(&self) -> Option<String> {
        Some(hex(self.footer.id))
    }

    fn backing_identity(&self) -> Option<String> {
        self.parent.map(hex)
    }

    fn lies_plainly(&self) -> bool {
        self.blocks.is_none()
    }

    fn info(&self) -> ImageInfo {
        let cluster_size = self.blocks.as_ref().map(|blocks| blocks.header.block);
        ImageInfo { cluster_size, ..ImageInfo::default() }
    }

    fn piece(&self, at: GuestOffset) -> Result<Option<Mapped>> {
        match &self.blocks {
            Some(blocks) => blocks.piece(&*self.store, at),
            None => Ok(Some(Mapped { len: self.size - at.get(), mapping: Mapping::Data(HostOffset(at.get())) })),
        }
    }

    fn load(&self, at: GuestOffset) -> ImageFuture<'_, ()> {
        Box::pin(async move {
            match &self.blocks {
                Some(blocks) => blocks.bring(&*self.store, at).await,
                None => Ok(()),
            }
        })
    }
}
