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

pub use header::{Compression, Extensions, Features, Header, MAGIC, MAX_BACKING_NAME};
pub use table::{EntryError, L1Entry, L2Entry, Packed, SubclusterMap};

use crate::HostOffset;
use std::borrow::Cow;

/// What is wrong with a header, for code to decide on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum ErrorKind {
    /// The magic number is another one: this is no QCOW2 image.
    NotQcow2,
    /// A version or feature this program does not know, that must be known.
    Unsupported,
    /// A field contradicts the specification.
    Invalid,
}

/// A field of a header that cannot be accepted.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{field} (at offset {at}) is {value:#x}: {why}", at = offset.get())]
pub struct Error {
    kind: ErrorKind,
    field: &'static str,
    value: u64,
    offset: HostOffset,
    why: Cow<'static, str>,
}

impl Error {
    fn new(kind: ErrorKind, field: &'static str, offset: u64, value: u64, why: impl Into<Cow<'static, str>>) -> Self {
        Self { kind, field, value, offset: HostOffset(offset), why: why.into() }
    }

    /// For code to decide on.
    pub fn kind(&self) -> ErrorKind {
        self.kind
    }

    /// Where the field is in the file.
    pub fn offset(&self) -> HostOffset {
        self.offset
    }
}
