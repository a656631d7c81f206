//! VMDK: read, never written.
//!
//! * `open`: the descriptor, and what it says of extents; `extents`: their files, opened and joined to one store;
//! * `resolve`: where a guest's bytes are; packed grains.
//!
//! Served: extents that are sparse (versions 1 to 3, packed and stream-optimised ones, too), flat (also under the name VMFS) or zeros,
//! with a parent or without. Not served, and named when refused: extents of ESX (COWD, SESPARSE, VMFSSPARSE) and devices.
//!
//! **Invariants.**
//! * A descriptor is somebody else's text. The files it names lie in its own folder or below, whatever it says: it must not make
//!   us read others. They are opened through [`crate::Companions`], read-only.
//! * Memory is bounded: the directories of all extents (32 MiB at most), tables in sheets, some unpacked grains.
//! * A flat extent is in its file as a whole, or the image is refused: what a copy that was cut off lacks must not read as zeros.
//! * A table or grain past the end of its extent's file is an error with its place in that file, when it is read.

mod extents;
mod open;
mod resolve;

pub(crate) use open::open;

use crate::BackingRef;
use crate::master::sheets::Sheets;
use layout::vmdk::{Descriptor, SparseHeader};
use layout::{GuestRange, HostOffset};
use std::rc::Rc;
use store::Store;

/// What `info` shows of a VMDK alone.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct VmdkInfo {
    /// Changes with the content.
    pub cid: u32,
    /// The parent's; all ones if there is none.
    pub parent_cid: u32,
    /// What its makers call the whole.
    pub create_type: String,
    /// In the disk's order.
    pub extents: Vec<VmdkExtent>,
}

/// An extent as `info` shows it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct VmdkExtent {
    /// Bytes of the disk.
    pub size: u64,
    /// Its file; empty where it has none.
    pub file: String,
    /// Bytes of a grain, if it is sparse.
    pub grain: Option<u64>,
    /// Its grains are packed.
    pub packed: bool,
    /// Its type in the descriptor; empty if the descriptor is in its own file.
    pub kind: &'static str,
}

/// An open image.
struct VmdkImage {
    /// The one file, or all of them joined.
    store: Rc<dyn Store>,
    /// In the disk's order; those that are empty are left out.
    extents: Vec<Extent>,
    /// Sheets of tables of all sparse extents.
    tables: Sheets,
    size: u64,
    /// Bytes of a grain of the first sparse extent; none if all are flat.
    grain: Option<u64>,
    backing: Option<BackingRef>,
    descriptor: Descriptor,
    /// Whether the descriptor is in a file of its own.
    split: bool,
    warnings: Vec<String>,
    unclean: bool,
}

/// A stretch of the disk.
struct Extent {
    place: GuestRange,
    content: Content,
}

/// What an extent holds.
enum Content {
    Zero,
    Flat {
        file: File,
        /// Where in the file it begins.
        start: HostOffset,
    },
    Sparse(SparseExtent),
}

/// An extent with tables.
struct SparseExtent {
    file: File,
    header: SparseHeader,
    /// Sectors of its tables; 0: none.
    directory: Vec<u32>,
    /// The number of its first sheet.
    first_sheet: u64,
}

/// An extent's file.
#[derive(Clone)]
struct File {
    store: Rc<dyn Store>,
    /// Where it is in [`VmdkImage::store`].
    base: HostOffset,
}
