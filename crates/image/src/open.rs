//! Opening: a store and a stated format make an [`Image`].

use crate::{Error, ErrorKind, Format, Image, Result};
use futures_util::future::LocalBoxFuture;
use std::rc::Rc;
use store::Store;

/// How to open.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct OpenOptions {
    /// Nothing is written, not even to mark or repair; a dirty image is read as it is.
    pub read_only: bool,
    /// Open for [`Image::check`]: tables that are damaged are no error yet, nothing is repaired on the way.
    pub for_check: bool,
}

/// Opens the other files that an image is made of: extents of a VMDK, an index of a packed disk, the data file of a QCOW2.
pub trait Companions {
    /// Opens the file that the image `referrer` (its store's name) calls `name`; a relative name is relative to that image's folder.
    /// Names are data from an untrusted header: whoever implements this decides what may be opened.
    fn open<'a>(
        &'a self,
        name: &'a str,
        referrer: &'a str,
        read_only: bool,
    ) -> LocalBoxFuture<'a, Result<Rc<dyn Store>>>;
}

/// Opens none: for images that are one file.
#[derive(Clone, Copy, Debug, Default)]
pub struct NoCompanions;

impl Companions for NoCompanions {
    fn open<'a>(&'a self, name: &'a str, referrer: &'a str, _: bool) -> LocalBoxFuture<'a, Result<Rc<dyn Store>>> {
        let what = format!("it needs another file, '{name}', and may open none here");
        Box::pin(async move { Err(Error::new(ErrorKind::Unsupported, referrer, None, what)) })
    }
}

/// What an image needs besides the file that is the image.
#[derive(Clone, Copy)]
pub struct Surroundings<'a> {
    /// Opens its other files.
    pub companions: &'a dyn Companions,
    /// What unlocks it, if it is encrypted.
    pub passphrase: Option<&'a [u8]>,
    /// The internal snapshot (its id, or its name) to show instead of the present state; read-only.
    pub snapshot: Option<&'a str>,
    /// No guest writes through it: what its bitmaps record stays true.
    pub no_guest: bool,
}

impl Default for Surroundings<'_> {
    fn default() -> Self {
        Self { companions: &NoCompanions, passphrase: None, snapshot: None, no_guest: false }
    }
}

/// [`open_in`], of an image that is one file and not encrypted.
pub async fn open(store: Rc<dyn Store>, format: Format, options: OpenOptions) -> Result<Rc<dyn Image>> {
    open_in(store, format, options, Surroundings::default()).await
}

/// Opens the image that `store` holds, in the stated format. A QED image that was not closed cleanly is checked and
/// repaired first (unless read-only or for a check), leaks included.
pub async fn open_in(
    store: Rc<dyn Store>,
    format: Format,
    options: OpenOptions,
    surroundings: Surroundings<'_>,
) -> Result<Rc<dyn Image>> {
    if let (Some(snapshot), true) = (surroundings.snapshot, format != Format::Qcow2) {
        let what = format!("the format '{format}' has no internal snapshots, so there is no '{snapshot}'");
        return Err(Error::new(ErrorKind::Unsupported, store.name(), None, what));
    }
    match format {
        Format::Raw => crate::raw::open(store, options),
        Format::Qcow2 => crate::qcow2::open(store, options, surroundings).await,
        Format::Luks => crate::luks::open(store, options, surroundings).await,
        Format::Vdi | Format::Parallels => crate::grid::open(store, format, options).await,
        Format::Vpc => crate::vpc::open(store, options).await,
        Format::Qed => crate::qed::open(store, options).await,
        Format::Qcow => crate::qcow::open(store, options).await,
        Format::Zstd => crate::packed::open_zstd(store, options).await,
        Format::Gzip => crate::packed::open_gzip(store, options, surroundings.companions).await,
        Format::Vhdx => crate::vhdx::open(store, options).await,
        Format::Vmdk => crate::vmdk::open(store, options, surroundings.companions).await,
    }
}
