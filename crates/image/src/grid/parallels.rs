//! Opening Parallels' images.

use super::{Grid, damaged, read, read_places};
use crate::Result;
use layout::HostOffset;
use layout::parallels::{HEADER_BYTES, Header};
use store::Store;

pub(super) async fn open(store: &dyn Store) -> Result<Grid> {
    let head = read(store, HostOffset::ZERO.range(HEADER_BYTES as u64)).await?;
    let header = Header::decode(&head).map_err(|error| damaged(store, &error))?;
    let places = read_places(store, header.table(), |entry| header.place(entry)).await?;
    Ok(Grid { size: header.size, block: header.cluster, places })
}
