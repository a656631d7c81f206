//! Opening VHD, fixed and dynamic. (Bitmaps of a dynamic image's blocks say which sectors were written; the others are zeros in the
//! file, too.)

use super::{Grid, Places};
use crate::Result;
use crate::master::sheets::Table;
use crate::master::{damaged, read};
use layout::HostOffset;
use layout::vpc::{COOKIE, FOOTER_BYTES, Footer, HEADER_BYTES, Header};
use store::Store;

/// A fixed image has no table; it is told to have blocks of this.
const FIXED_BLOCK: u64 = 2 << 20;

pub(super) async fn open(store: &dyn Store) -> Result<Grid> {
    let refuse = |error: layout::field::Error| damaged(store.name(), &error);
    let first = read(store, HostOffset::ZERO.range(FOOTER_BYTES as u64)).await?;
    let (bytes, base) = if first.starts_with(&COOKIE) {
        (first, 0)
    } else {
        let end = store.size().saturating_sub(FOOTER_BYTES as u64);
        (read(store, HostOffset(end).range(FOOTER_BYTES as u64)).await?, end)
    };
    let footer = Footer::decode(&bytes, base).map_err(refuse)?;
    let Some(at) = footer.header else {
        return Ok(Grid { size: footer.size.min(store.size()), block: FIXED_BLOCK, places: Places::Straight });
    };
    let bytes = read(store, at.range(HEADER_BYTES as u64)).await?;
    let header = Header::decode(&bytes, at.get(), footer.size).map_err(refuse)?;
    let table = Table::new(store, header.table())?;
    let places = Places::Table { table, place: Box::new(move |entry| header.place(entry)) };
    Ok(Grid { size: footer.size, block: header.block, places })
}
