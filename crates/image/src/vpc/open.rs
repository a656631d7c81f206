//! Opening: the footer, and what a dynamic image has besides.

use super::resolve::SHEET;
use super::{Blocks, VpcImage};
use crate::master::sheets::{Sheets, Table};
use crate::master::{self, damaged, read, within};
use crate::{BackingRef, Error, ErrorKind, Format, Image, OpenOptions, Result};
use layout::vpc::{FOOTER_BYTES, Footer, HEADER_BYTES, Header, Parent};
use layout::{HostOffset, HostRange};
use std::rc::Rc;
use store::Store;

/// Opens the image in `store`.
pub(crate) async fn open(store: Rc<dyn Store>, options: OpenOptions) -> Result<Rc<dyn Image>> {
    master::only_read(&*store, Format::Vpc, options)?;
    let footer = read_footer(&*store).await?;
    let Some(at) = footer.header else {
        let size = footer.size.min(store.size());
        return Ok(master::image(VpcImage { store, footer, size, blocks: None, backing: None, parent: None }));
    };
    within(&*store, at.range(HEADER_BYTES as u64), "the header")?;
    let bytes = read(&*store, at.range(HEADER_BYTES as u64)).await?;
    let header = Header::decode(&bytes, at.get(), footer.size).map_err(|error| damaged(store.name(), &error))?;
    let table = Table::new(&*store, header.table())?;
    let (mut backing, mut parent, mut bitmaps) = (None, None, None);
    if footer.differencing {
        let found = Parent::decode(&bytes);
        parent = Some(found.id);
        backing = Some(read_backing(&*store, at, found).await?);
        bitmaps = Some(Sheets::new(SHEET.min(header.bitmap())));
    }
    let blocks = Some(Blocks { header, table, bitmaps });
    Ok(master::image(VpcImage { size: footer.size, store, footer, blocks, backing, parent }))
}

/// The footer: its copy in front, if that is whole, or the one at the end.
async fn read_footer(store: &dyn Store) -> Result<Footer> {
    let end = store.size().saturating_sub(FOOTER_BYTES as u64);
    let mut last = None;
    for at in [0, end] {
        let bytes = read(store, HostOffset(at).range(FOOTER_BYTES as u64)).await?;
        match Footer::decode(&bytes, at) {
            Ok(footer) => return Ok(footer),
            // What is no footer at all says less than one that is damaged.
            Err(error) if last.is_none() || error.kind() != layout::field::ErrorKind::Foreign => last = Some(error),
            Err(_) => {}
        }
    }
    // Two were tried, so there is an error.
    Err(last.map_or_else(
        || Error::new(ErrorKind::Corrupt, store.name(), None, "there is no footer"),
        |error| damaged(store.name(), &error),
    ))
}

/// The parent as a chain looks for it: where it is seen from here, or else beside the image under the name it had.
async fn read_backing(store: &dyn Store, header: HostOffset, parent: Parent) -> Result<BackingRef> {
    let beside = |path: String| path.rsplit(['\\', '/']).next().unwrap_or_default().to_owned();
    let relative = read_path(store, parent.relative).await?.map(|path| path.replace('\\', "/"));
    let name = match (relative, parent.name) {
        (Some(relative), _) => relative,
        (None, Some(name)) => beside(name),
        (None, None) => read_path(store, parent.absolute).await?.map(beside).unwrap_or_default(),
    };
    if name.is_empty() {
        let what = "it lies over a parent, and does not say where that is; make it anew over the parent";
        return Err(Error::new(ErrorKind::Corrupt, store.name(), Some(header), what));
    }
    Ok(BackingRef { name, format: Some(Format::Vpc) })
}

/// The path of a locator, whose length is bounded; `None` where there is none that makes sense.
async fn read_path(store: &dyn Store, place: Option<HostRange>) -> Result<Option<String>> {
    match place {
        Some(place) => Ok(Parent::path(&read(store, place).await?)),
        None => Ok(None),
    }
}
