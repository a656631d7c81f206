//! What the image commands share: opening a chain for reading on a ring of their own, and output formats.

use clap::ValueEnum;
use disk::chain::{ChainOptions, FileOpener, Layer, open_chain};
use image::Format;
use ring::{Config, Ring};
use std::future::Future;
use store::file::{Locking, OpenOptions};

/// How a command prints.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub(crate) enum Output {
    /// For people.
    #[default]
    Human,
    /// For programs.
    Json,
}

/// Reads a format's name as users write it.
pub(crate) fn format_named(name: &str) -> Result<Format, String> {
    Format::from_name(name).ok_or_else(|| {
        let names = |written: bool| {
            let names: Vec<_> =
                Format::ALL.into_iter().filter(|format| format.is_written() == written).map(Format::name).collect();
            names.join(", ")
        };
        format!(
            "Unknown file format '{name}' (this Headwater knows {} and, for reading, {})",
            names(true),
            names(false)
        )
    })
}

/// Runs `work` to its end on a ring made for it.
pub(crate) fn on_ring<T>(work: impl Future<Output = Result<T, String>>) -> Result<T, String> {
    let ring = Ring::new(Config::default()).map_err(|e| format!("could not set up I/O: {e}"))?;
    ring.block_on(work)
}

/// How to open for looking at (or checking) an image.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Look {
    pub(crate) format: Option<Format>,
    pub(crate) force_share: bool,
    pub(crate) no_backing: bool,
    /// Only so many layers of the chain, from the top.
    pub(crate) layers: Option<usize>,
    pub(crate) for_check: bool,
    pub(crate) writable: bool,
    /// Past the page cache.
    pub(crate) direct: bool,
    /// What is written need not become durable: whoever made it makes it again.
    pub(crate) no_flush: bool,
}

/// Opens `file` and what lies below it.
pub(crate) async fn open(file: &str, look: Look) -> Result<Vec<Layer>, String> {
    let locking = if look.force_share { Locking::Off } else { Locking::On };
    let top = OpenOptions { read_only: !look.writable, locking, no_flush: look.no_flush, direct: look.direct };
    let below = OpenOptions { read_only: true, locking, ..OpenOptions::default() };
    let options = ChainOptions {
        format: look.format,
        read_only: !look.writable,
        no_backing: look.no_backing,
        layers: look.layers,
        for_check: look.for_check,
        ..ChainOptions::default()
    };
    open_chain(&FileOpener { top, below }, file, options).await.map_err(|e| format!("Could not open '{file}': {e}"))
}

/// Closes every layer; the first failure is reported.
pub(crate) async fn close(chain: &[Layer]) -> Result<(), String> {
    let mut outcome = Ok(());
    for layer in chain {
        outcome = outcome.and(layer.image.close().await.map_err(|e| e.to_string()));
    }
    outcome
}
