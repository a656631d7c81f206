//! Opening: the header is understood whole or the image is refused.

use super::QcowImage;
use super::resolve::SHEET;
use crate::master::sheets::Sheets;
use crate::master::{self, damaged, read, read_table, within};
use crate::{BackingRef, Error, ErrorKind, Format, Image, OpenOptions, Result};
use layout::HostOffset;
use layout::qcow::{HEADER_BYTES, Header};
use std::rc::Rc;
use store::Store;

/// The largest L1 table: 8 TiB at the default geometry.
const L1_MOST: u64 = 32 << 20;

/// Opens the image in `store`.
pub(crate) async fn open(store: Rc<dyn Store>, options: OpenOptions) -> Result<Rc<dyn Image>> {
    master::only_read(&*store, Format::Qcow, options)?;
    let head = read(&*store, HostOffset::ZERO.range(HEADER_BYTES as u64)).await?;
    let header = Header::decode(&head).map_err(|error| damaged(store.name(), &error))?;
    let backing = read_backing(&*store, &header).await?;
    let l1 = read_table(&*store, header.l1_table(), L1_MOST, "the L1 table").await?;
    let l1 = l1.as_chunks().0.iter().map(|entry| u64::from_be_bytes(*entry)).collect();
    let tables = Sheets::new(SHEET.min(header.l2_entries() * 8));
    Ok(master::image(QcowImage { store, header, backing, l1, tables }))
}

async fn read_backing(store: &dyn Store, header: &Header) -> Result<Option<BackingRef>> {
    let Some(slot) = header.backing_name else { return Ok(None) };
    within(store, slot, "the name of the backing file")?;
    let refuse = |kind, what: &str| Err(Error::new(kind, store.name(), Some(slot.start()), what));
    match String::from_utf8(read(store, slot).await?) {
        Ok(name) if name.contains('\0') => {
            refuse(ErrorKind::Corrupt, "the name of the backing file contains a NUL byte")
        }
        Ok(name) => Ok(Some(BackingRef { name, format: None })),
        Err(_) => refuse(
            ErrorKind::Unsupported,
            "the name of the backing file is not UTF-8; rename the file and rebase the image ('qemu-img rebase -u')",
        ),
    }
}
