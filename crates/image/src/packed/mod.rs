//! Raw disks that are packed as a whole, in pieces that can be unpacked one by one: `zstd` (frames with a seek table) and `gzip` (BGZF,
//! dictzip). Read, never written.
//!
//! * `zstd`, `gzip`: what is in which piece; `pieces`: what was found; `resolve`: where a guest's bytes are, and unpacking.
//!
//! A file that can only be unpacked from its start is refused with a remedy: a guest reads here and there, and each read would
//! unpack all that lies in front of it.
//!
//! **Invariants.**
//! * Memory is bounded: so many pieces (4 Mi) of so many bytes (32 MiB) at most.
//! * A piece comes out as long as it is said to be, and with the checksum it is said to have, or not at all.
//! * A file that was cut off is refused when it is opened.

mod gzip;
mod pieces;
mod resolve;
mod zstd;

pub(crate) use self::gzip::open as open_gzip;
pub(crate) use self::zstd::open as open_zstd;

use crate::{Format, Image, Result, master};
use pieces::Pieces;
use std::rc::Rc;
use store::Store;

/// An open image.
struct PackedImage {
    store: Rc<dyn Store>,
    format: Format,
    how: How,
    pieces: Pieces,
}

impl PackedImage {
    /// The image whose pieces were found.
    async fn open(store: Rc<dyn Store>, format: Format, how: How, pieces: Pieces) -> Result<Rc<dyn Image>> {
        let image = Self { store, format, how, pieces };
        image.check_content().await?;
        Ok(master::image(image))
    }
}

/// What a piece is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum How {
    /// A zstd frame.
    Zstd,
    /// A gzip member.
    Member,
    /// A part of a deflate stream that can be read from its start.
    Chunk,
}
