//! The reference from an image to what lies below it.

use crate::probe::Format;

/// A backing file as an image's header names it.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct BackingRef {
    /// The name as recorded: a path (relative to the image's own folder) or a URL.
    pub name: String,
    /// The recorded format; `None` where the header leaves it open.
    pub format: Option<Format>,
}
