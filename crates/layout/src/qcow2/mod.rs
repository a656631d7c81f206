//! QCOW2, versions 2 and 3, as its specification (QEMU's `docs/interop/qcow2.rst`) lays it out on disk.
//!
//! * [`header`]: the header and its extensions, decoded only when every field makes sense;
//! * [`table`]: L1 and L2 entries, decoded one by one.
//!
//! All numbers are big-endian. So far for reading: refcounts, snapshots and bitmaps are not looked at.
//!
//! **Invariant.** A [`Header`] that exists is valid: whoever holds one may compute with it without overflow.

pub mod header;
pub mod table;

pub use crate::field::{Error, ErrorKind};
pub use header::{Compression, Extensions, Features, Header, MAGIC, MAX_BACKING_NAME};
pub use table::{EntryError, L1Entry, L2Entry, Packed, SubclusterMap};
