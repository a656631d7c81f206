//! Opening VDI.

use super::Grid;
use crate::Result;
use crate::master::sheets::Table;
use crate::master::{damaged, read};
use layout::HostOffset;
use layout::vdi::{Block, HEADER_BYTES, Header};
use store::Store;

pub(super) async fn open(store: &dyn Store) -> Result<Grid> {
    let head = read(store, HostOffset::ZERO.range(HEADER_BYTES as u64)).await?;
    let header = Header::decode(&head).map_err(|error| damaged(store.name(), &error))?;
    let table = Table::new(store, header.map())?;
    let place = Box::new(move |entry| match header.place(entry) {
        Block::Zero => None,
        Block::Data(at) => Some(at),
    });
    Ok(Grid { size: header.size, block: header.block, table, place })
}
