//! VHD (`vpc`): read, never written. Fixed and dynamic images, and differencing ones, which lie over a parent.
//!
//! * `open`: the footer, the header, the parent; `resolve`: where a guest's bytes are.
//!
//! In a dynamic image without a parent, sectors that its bitmaps do not name are zeros in the file, too, so the bitmaps are not
//! looked at.
//!
//! **Invariants.**
//! * A footer counts if its checksum is right: the copy in front, or else the one at the end of the file.
//! * Sheets of the table and of bitmaps are what is held in memory.
//! * An entry that leads past the end of the file is an error with its place, when it is read.

mod open;
mod resolve;

pub(crate) use open::open;

use crate::BackingRef;
use crate::master::sheets::{Sheets, Table};
use layout::vpc::{Footer, Header};
use std::rc::Rc;
use store::Store;

/// An open image.
struct VpcImage {
    store: Rc<dyn Store>,
    footer: Footer,
    /// Bytes of the disk.
    size: u64,
    /// None in a fixed image, whose disk is the file's first bytes.
    blocks: Option<Blocks>,
    backing: Option<BackingRef>,
    /// What the parent is known by.
    parent: Option<[u8; 16]>,
}

/// Where a dynamic image's blocks are.
struct Blocks {
    header: Header,
    table: Table<4>,
    /// Sheets of the bitmaps in front of blocks, where there is a parent.
    bitmaps: Option<Sheets>,
}
