//! Opening: a store and a stated format make an [`Image`].

use crate::{Format, Image, Result};
use std::rc::Rc;
use store::Store;

/// How to open.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct OpenOptions {
    /// Nothing is written, not even to mark or repair; a dirty image is read as it is.
    pub read_only: bool,
    /// Open for [`Image::check`]: tables that are damaged are no error yet, nothing is repaired on the way.
    pub for_check: bool,
}

/// Opens the image that `store` holds, in the stated format. A QED image that was not closed cleanly is checked and
/// repaired first (unless read-only or for a check), leaks included.
pub async fn open(store: Rc<dyn Store>, format: Format, options: OpenOptions) -> Result<Rc<dyn Image>> {
    match format {
        Format::Raw => crate::raw::open(store, options),
        Format::Qcow2 => crate::qcow2::open(store, options).await,
        Format::Vdi | Format::Vpc | Format::Parallels => crate::grid::open(store, format, options).await,
        Format::Qed => crate::qed::open(store, options).await,
    }
}
