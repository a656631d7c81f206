//! What is wrong with a field of a header, in whichever format.

use crate::HostOffset;
use std::borrow::Cow;

/// What is wrong with a header, for code to decide on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum ErrorKind {
    /// The magic number is another one: this is another format.
    Foreign,
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
    pub(crate) fn new(
        kind: ErrorKind,
        field: &'static str,
        offset: u64,
        value: u64,
        why: impl Into<Cow<'static, str>>,
    ) -> Self {
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
