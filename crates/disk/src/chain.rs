//! Putting a chain together: from a file's name to its layers, top first.
//!
//! Opening what a header names is a decision about somebody else's string, so it goes through an [`Opener`].

use futures_util::future::LocalBoxFuture;
use image::{Format, Image, Result};
use std::rc::Rc;
use store::Store;

/// One image of a chain.
#[derive(Clone)]
pub struct Layer {
    /// Unique in the chain: given by the user, or `#block123` as QEMU makes them.
    pub node: String,
    /// The name the user or the header above gave.
    pub name: String,
    /// The image.
    pub image: Rc<dyn Image>,
}

/// How to open a chain.
#[derive(Clone, Debug, Default)]
pub struct ChainOptions {
    /// The top's format; `None` probes it.
    pub format: Option<Format>,
    /// Nothing is written.
    pub read_only: bool,
    /// Node name of the top.
    pub node: Option<String>,
    /// Only the top: its backing reference is left unopened (`info`, `check`).
    pub no_backing: bool,
    /// The top is opened for a check (see [`image::OpenOptions::for_check`]).
    pub for_check: bool,
}

/// Opens the stores that names stand for.
pub trait Opener {
    /// Opens `name`; a relative one is relative to the folder of `referrer` (the name of the image that names it, if any).
    /// Everything below the top is opened read-only.
    fn open<'a>(&'a self, name: &'a str, referrer: Option<&'a str>, read_only: bool) -> LocalBoxFuture<'a, Result<Rc<dyn Store>>>;

    /// The name that identifies what `name` (seen from `referrer`) stands for, to find cycles: a canonical path or URL.
    fn identify(&self, name: &str, referrer: Option<&str>) -> String;
}

/// Opens local files.
#[derive(Clone, Debug, Default)]
pub struct FileOpener {
    /// For the top.
    pub top: store::file::OpenOptions,
    /// For everything below (always read-only).
    pub below: store::file::OpenOptions,
}

impl Opener for FileOpener {
    fn open<'a>(&'a self, name: &'a str, referrer: Option<&'a str>, read_only: bool) -> LocalBoxFuture<'a, Result<Rc<dyn Store>>> {
        let _ = (name, referrer, read_only);
        todo!()
    }

    fn identify(&self, name: &str, referrer: Option<&str>) -> String {
        let _ = (name, referrer);
        todo!()
    }
}

/// Opens `name` and everything below it. Cycles, missing files and chains deeper than 200 are errors that name the image
/// whose header refers to the culprit. A backing reference without a format is probed only where the format's own
/// rules say so (QED without its no-probe bit).
pub async fn open_chain(opener: &dyn Opener, name: &str, options: ChainOptions) -> Result<Vec<Layer>> {
    let _ = (opener, name, options);
    todo!()
}
