//! Creating: options as the user wrote them, checked before a byte is written.

use crate::{BackingRef, Error, ErrorKind, Format, Result};
use std::rc::Rc;
use store::Store;

/// What a new image is to be.
#[derive(Clone, Debug)]
pub struct CreateOptions {
    /// Format of the new image.
    pub format: Format,
    /// Size the guest sees, in bytes.
    pub size: u64,
    /// What lies below.
    pub backing: Option<BackingRef>,
    /// QED: cluster size in bytes (power of two, 4 KiB to 64 MiB; default 64 KiB).
    pub cluster_size: Option<u64>,
    /// QED: clusters per L1 and L2 table (power of two, 1 to 16; default 4).
    pub table_size: Option<u32>,
}

/// Checks `options` without touching anything; returns warnings for the user (QED table size 1: QEMU cannot open it).
pub fn validate(options: &CreateOptions) -> Result<Vec<String>> {
    match options.format {
        Format::Raw => crate::raw::validate(options),
        Format::Qcow2 => Err(unwritten()),
        Format::Qed => crate::qed::validate(options),
    }
}

/// Writes a new, empty image into `store` (which is empty), durably.
pub async fn create(store: Rc<dyn Store>, options: &CreateOptions) -> Result<()> {
    match options.format {
        Format::Raw => crate::raw::create(store, options).await,
        Format::Qcow2 => Err(unwritten()),
        Format::Qed => crate::qed::create(store, options).await,
    }
}

fn unwritten() -> Error {
    let what = "QCOW2 images are read, not written, so far; make it with qemu-img, or use '-f qed'";
    Error::new(ErrorKind::Unsupported, "", None, what)
}
