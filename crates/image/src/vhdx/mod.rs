//! VHDX: read, never written. Fixed and dynamic disks, and those over a parent.
//!
//! * `open`: headers, regions, metadata; `replay`: what the log says lies over the file, in memory;
//! * `resolve`: where a guest's bytes are.
//!
//! **Invariants.**
//! * What has a checksum counts only if it is right. Of two headers the newer one counts.
//! * A log that is not empty is carried out as a whole before anything else is looked at, or the image is refused. Nothing is
//!   written: who opens the image for writing elsewhere finds its log as it was.
//! * Memory is bounded: the log (16 MiB at most), the metadata (8 MiB), sheets of the BAT and of bitmaps.
//! * An entry that makes no sense is an error with its place, when it is read.

mod open;
mod replay;
mod resolve;

pub(crate) use open::open;

use crate::BackingRef;
use crate::master::sheets::{Sheets, Table};
use layout::vhdx::{Bat, Guid, Metadata};
use std::rc::Rc;
use store::Store;

/// An open image.
struct VhdxImage {
    /// The file, under what its log says.
    store: Rc<dyn Store>,
    metadata: Metadata,
    bat: Bat,
    table: Table<8>,
    /// Sheets of the bitmap over all sectors of the disk.
    bitmaps: Sheets,
    backing: Option<BackingRef>,
    /// Changes with what the disk holds.
    data_write: Guid,
    /// Entries of the log that had not reached their places.
    replayed: usize,
}
