//! Images that are a grid: one table says where each block of the disk is. VDI and Parallels.
//!
//! One file each says how such an image is opened.
//!
//! **Invariants.** A table that reaches past the end of the file is an error. A block that the table puts past the end of the
//! file is an error with its place, when it is read.

mod parallels;
mod vdi;

use crate::master::sheets::Table;
use crate::master::{self, Master, past_the_end};
use crate::{Format, Image, ImageFuture, Mapped, Mapping, OpenOptions, Result};
use layout::{GuestOffset, HostOffset};
use std::rc::Rc;
use store::Store;

/// A disk cut into blocks.
struct Grid {
    size: u64,
    block: u64,
    table: Table<4>,
    /// Where the table says that a block is; `None`: it reads as zeros.
    place: Box<dyn Fn([u8; 4]) -> Option<HostOffset>>,
}

/// An open image.
struct GridImage {
    store: Rc<dyn Store>,
    format: Format,
    grid: Grid,
}

/// Opens the image in `store`, whose format is one of these.
pub(crate) async fn open(store: Rc<dyn Store>, format: Format, options: OpenOptions) -> Result<Rc<dyn Image>> {
    master::only_read(&*store, format, options)?;
    let grid = match format {
        Format::Vdi => vdi::open(&*store).await?,
        _ => parallels::open(&*store).await?,
    };
    Ok(master::image(GridImage { store, format, grid }))
}

impl Master for GridImage {
    fn format(&self) -> Format {
        self.format
    }

    fn store(&self) -> &Rc<dyn Store> {
        &self.store
    }

    fn size(&self) -> u64 {
        self.grid.size
    }

    fn unit(&self) -> u64 {
        self.grid.block
    }

    fn piece(&self, at: GuestOffset) -> Result<Option<Mapped>> {
        let Grid { block, table, place, .. } = &self.grid;
        let (number, inside) = (at.get() / block, at.get() % block);
        let Some(entry) = table.entry(number) else { return Ok(None) };
        let mapping = match place(entry) {
            None => Mapping::Zero,
            Some(host) if host.get() >= self.store.size() => {
                return Err(past_the_end(self.store.name(), host, &format!("block {number}")));
            }
            Some(host) => Mapping::Data(host + inside),
        };
        Ok(Some(Mapped { len: block - inside, mapping }))
    }

    fn load(&self, at: GuestOffset) -> ImageFuture<'_, ()> {
        Box::pin(self.grid.table.load(&*self.store, at.get() / self.grid.block))
    }
}
