//! Opening: a length is all there is to know.

use super::{MAX_SIZE, RawImage, SECTOR};
use crate::luks::KeySlots;
use crate::{Error, ErrorKind, Format, Image, OpenOptions, Result};
use std::cell::{Cell, RefCell};
use std::rc::Rc;
use store::Store;

/// Opens the raw image in `store`.
pub(crate) fn open(store: Rc<dyn Store>, options: OpenOptions) -> Result<Rc<dyn Image>> {
    open_as(store, options, Format::Raw, None)
}

/// The same, of bytes that are what another format holds.
pub(crate) fn open_as(
    store: Rc<dyn Store>,
    options: OpenOptions,
    format: Format,
    key_slots: Option<KeySlots>,
) -> Result<Rc<dyn Image>> {
    if store.limits().read_only && !options.read_only {
        let what = "it cannot be written to; open it read-only";
        return Err(Error::new(ErrorKind::ReadOnly, store.name(), None, what));
    }
    let limits = store.limits();
    // The last sector may reach past the end of a file, not of a device.
    let size = match store.size().checked_next_multiple_of(SECTOR) {
        Some(size) if size <= MAX_SIZE && !limits.fixed_size => size,
        Some(size) if size <= MAX_SIZE => store.size() / SECTOR * SECTOR,
        _ => MAX_SIZE,
    };
    let (read_only, size) = (options.read_only, Cell::new(size));
    Ok(Rc::new(RawImage { store, read_only, size, format, key_slots, poison: RefCell::new(None) }))
}
