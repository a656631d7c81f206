//! Where a guest's bytes are.

use super::VhdxImage;
use crate::master::bits::{self, Order};
use crate::master::{Master, past_the_end};
use crate::{BackingRef, Error, ErrorKind, Format, ImageFuture, ImageInfo, Mapped, Mapping, Result};
use layout::vhdx::{Bitmap, Block, MIB};
use layout::{GuestOffset, HostOffset};
use std::rc::Rc;
use store::Store;

/// Bytes of the bitmap that are loaded at a time.
pub(super) const SHEET: u64 = 4096;

/// Sectors that a sheet of the bitmap covers.
const SHEET_SECTORS: u64 = SHEET * 8;

impl VhdxImage {
    fn number(&self, at: GuestOffset) -> u64 {
        at.get() / self.metadata.block
    }

    /// The sheet of the bitmap that covers `at`.
    fn sheet(&self, at: GuestOffset) -> u64 {
        at.get() / self.metadata.sector / SHEET_SECTORS
    }

    fn corrupt(&self, number: u64, what: &str) -> Error {
        let what = format!("block {number} of the disk {what}");
        Error::new(ErrorKind::Corrupt, self.store.name(), None, what)
    }

    /// What the BAT says of the block that holds `at`; `None` when that must be loaded first.
    fn block(&self, at: GuestOffset) -> Result<Option<Block>> {
        let number = self.number(at);
        let Some(entry) = self.table.entry(self.bat.index(number)) else { return Ok(None) };
        let block = self.bat.block(entry).map_err(|state| {
            self.corrupt(number, &format!("is in state {state}, or has a place that it cannot have in that"))
        })?;
        match block {
            Block::Present(host) | Block::Partly(host) if host.get() >= self.store.size() => {
                Err(past_the_end(self.store.name(), host, &format!("block {number} of the disk")))
            }
            block => Ok(Some(block)),
        }
    }

    async fn bring(&self, at: GuestOffset) -> Result<()> {
        let number = self.number(at);
        self.table.load(&*self.store, self.bat.index(number)).await?;
        let Some(Block::Partly(_)) = self.block(at)? else { return Ok(()) };
        let index = self.bat.bitmap_index(number);
        self.table.load(&*self.store, index).await?;
        // Gone already: who asked asks again.
        let Some(entry) = self.table.entry(index) else { return Ok(()) };
        let bitmap = match self.bat.bitmap(entry) {
            Ok(Bitmap::Present(host)) if host.get() < self.store.size() => host,
            Ok(Bitmap::Present(host)) => {
                return Err(past_the_end(
                    self.store.name(),
                    host,
                    &format!("the bitmap of block {number} of the disk"),
                ));
            }
            Ok(Bitmap::NotPresent) | Err(_) => {
                return Err(self.corrupt(number, "is partly here, and no bitmap says which part"));
            }
        };
        let sheet = self.sheet(at);
        let inside = sheet * SHEET % MIB;
        self.bitmaps.load(&*self.store, sheet, (bitmap + inside).range(SHEET)).await
    }

    /// A part of a block that is partly here (at `host`): `None` when the bitmap must be loaded first.
    fn part(&self, at: GuestOffset, host: HostOffset) -> Option<Mapped> {
        let (sector, block) = (self.metadata.sector, self.metadata.block);
        let inside = at.get() % block;
        let first = at.get() / sector % SHEET_SECTORS;
        let end = (first + (block - inside / sector * sector) / sector).min(SHEET_SECTORS);
        let look = |bytes: &[u8]| bits::run(bytes, first as usize, end as usize, Order::LeastFirst);
        let (here, sectors) = self.bitmaps.with(self.sheet(at), look)?;
        let mapping = if here { Mapping::Data(host + inside) } else { Mapping::Unallocated };
        Some(Mapped { len: sectors as u64 * sector - at.get() % sector, mapping })
    }
}

impl Master for VhdxImage {
    fn format(&self) -> Format {
        Format::Vhdx
    }

    fn store(&self) -> &Rc<dyn Store> {
        &self.store
    }

    fn size(&self) -> u64 {
        self.metadata.size
    }

    fn unit(&self) -> u64 {
        self.metadata.block
    }

    fn backing(&self) -> Option<BackingRef> {
        self.backing.clone()
    }

    fn identity(&self) -> Option<String> {
        Some(self.data_write.to_string())
    }

    fn backing_identity(&self) -> Option<String> {
        let parent = self.metadata.parent.as_ref()?;
        parent.linkage.map(|linkage| linkage.to_string())
    }

    fn info(&self) -> ImageInfo {
        let warnings = match self.replayed {
            0 => Vec::new(),
            count => {
                vec![format!("{count} entries of its log have not reached their places; it is read as if they had")]
            }
        };
        let cluster_size = Some(self.metadata.block);
        ImageInfo { cluster_size, dirty: self.replayed > 0, warnings, ..ImageInfo::default() }
    }

    fn piece(&self, at: GuestOffset) -> Result<Option<Mapped>> {
        let inside = at.get() % self.metadata.block;
        let whole = |mapping| Ok(Some(Mapped { len: self.metadata.block - inside, mapping }));
        match self.block(at)? {
            None => Ok(None),
            Some(Block::NotPresent) => whole(Mapping::Unallocated),
            Some(Block::Zero) => whole(Mapping::Zero),
            Some(Block::Present(host)) => whole(Mapping::Data(host + inside)),
            Some(Block::Partly(host)) => Ok(self.part(at, host)),
        }
    }

    fn load(&self, at: GuestOffset) -> ImageFuture<'_, ()> {
        Box::pin(self.bring(at))
    }
}
