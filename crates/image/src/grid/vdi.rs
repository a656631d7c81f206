//! Opening VDI.

use super::{Grid, damaged, read, read_places};
use crate::Result;
use layout::HostOffset;
use layout::vdi::{Block, HEADER_BYTES, Header};
use store::Store;

pub(super) async fn open(store: &dyn Store) -> Result<Grid> {
    let head = read(store, HostOffset::ZERO.range(HEADER_BYTES as u64)).await?;
    let header = Header::decode(&head).map_err(|error| damaged(store, &error))?;
    let place = |entry| match header.place(entry) {
        Block::Zero => None,
        Block::Data(at) => Some(at),
    };
    let places = read_places(store, header.map(), place).await?;
    Ok(Grid { size: header.size, block: header.block, places })
}
