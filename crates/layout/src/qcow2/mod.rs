//! QCOW2, versions 2 and 3, as its specification (QEMU's `docs/interop/qcow2.rst`) lays it out on disk.
//!
//! * [`header`]: the header and its extensions, decoded only when every field makes sense;
//! * [`table`]: L1 and L2 entries, decoded one by one;
//! * [`refcount`]: numbers of any width in refcount blocks;
//! * [`snapshot`], [`bitmap`]: the directories of internal snapshots and of persistent bitmaps.
//!
//! All numbers are big-endian.
//!
//! **Invariant.** A [`Header`] that exists is valid: whoever holds one may compute with it without overflow.

pub mod bitmap;
pub mod header;
pub mod refcount;
pub mod snapshot;
pub mod table;

pub use crate::field::{Error, ErrorKind};
pub use header::{
    AUTOCLEAR_BITMAPS, AUTOCLEAR_DATA_FILE_RAW, COMPATIBLE_LAZY_REFCOUNTS, CRYPT_LUKS, Compression, Extension,
    Extensions, Features, Header, MAGIC, MAX_BACKING_NAME,
};
pub use table::{
    COPIED, EntryError, L1_RESERVED, L1Entry, L2_RESERVED, L2Entry, OFFSET, Packed, Slice, SubclusterMap, is_own,
};
