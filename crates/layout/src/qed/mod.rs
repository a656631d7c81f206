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

pub use geometry::Geometry;
pub use header::{Features, HEADER_BYTES, Header, MAGIC, MAX_BACKING_NAME, NameSlot};
pub use table::{EntryError, L1Entry, L2Entry, SLICE_BYTES, SLICE_ENTRIES, Slice, TableRules};

use crate::HostOffset;
use std::borrow::Cow;

/// What is wrong with a header, for code to decide on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum ErrorKind {
    /// The magic number is another one: this is no QED image.
    NotQed,
    /// A feature this program does not know, that the specification says must be known.
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

    /// The field's name in the specification.
    pub fn field(&self) -> &'static str {
        self.field
    }

    /// Where the field is in the file.
    pub fn offset(&self) -> HostOffset {
        self.offset
    }

    /// What it holds.
    pub fn value(&self) -> u64 {
        self.value
    }
}
