//! QED, the QEMU Enhanced Disk format, as its specification lays it out on disk.
//!
//! * [`geometry`]: cluster and table sizes, and the arithmetic that follows from them;
//! * [`header`]: the header, decoded only when every field makes sense;
//! * [`table`]: L1 and L2 entries, decoded one by one.
//!
//! **Invariant.** A [`Header`] or [`Geometry`] that exists is valid: whoever holds one may compute with it without
//! overflow. Bytes that say otherwise do not decode.

pub mod geometry;
pub mod header;
pub mod table;

pub use crate::field::{Error, ErrorKind};
pub use geometry::Geometry;
pub use header::{Features, HEADER_BYTES, Header, MAGIC, MAX_BACKING_NAME, NameSlot};
pub use table::{EntryError, L1Entry, L2Entry, SLICE_BYTES, SLICE_ENTRIES, Slice, TableRules};
