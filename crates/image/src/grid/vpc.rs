//! Opening VHD, fixed and dynamic. (Bitmaps of a dynamic image's blocks say which sectors were written; the others are zeros in the
//! file, too.)

use super::{Grid, damaged, read, read_places};
use crate::Result;
use layout::HostOffset;
use layout::vpc::{COOKIE, FOOTER_BYTES, Footer, HEADER_BYTES, Header};
use store::Store;

/// A fixed image has no table; it is cut into blocks of this.
const FIXED_BLOCK: u64 = 2 << 20;

pub(super) async fn open(store: &dyn Store) -> Result<Grid> {
    let refuse = |error: layout::field::Error| damaged(store, &error);
    let first = read(store, HostOffset::ZERO.range(FOOTER_BYTES as u64)).await?;
    let (bytes, base) = if first.starts_with(&COOKIE) {
        (first, 0)
    } else {
        let end = store.size().saturating_sub(FOOTER_BYTES as u64);
        (read(store, HostOffset(end).range(FOOTER_BYTES as u64)).await?, end)
    };
    let footer = Footer::decode(&bytes, base).map_err(refuse)?;
    let Some(at) = footer.header else {
        let size = footer.size.min(store.size());
        let places = (0..size.div_ceil(FIXED_BLOCK)).map(|n| Some(HostOffset(n * FIXED_BLOCK))).collect();
        return Ok(Grid { size, block: FIXED_BLOCK, places });
    };
    let bytes = read(store, at.range(HEADER_BYTES as u64)).await?;
    let header = Header::decode(&bytes, at.get(), footer.size).map_err(refuse)?;
    let places = read_places(store, header.table(), |entry| header.place(entry)).await?;
    Ok(Grid { size: footer.size, block: header.block, places })
}
