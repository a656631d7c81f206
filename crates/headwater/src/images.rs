//! What the image commands share: what names mean, opening a chain on a ring of their own, and output formats.

use clap::ValueEnum;
use disk::chain::{ChainOptions, FileOpener, Layer, open_chain};
use graph::{Objects, Sources};
use image::Format;
use ring::{Config, Ring};
use std::future::Future;
use std::rc::Rc;
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

/// Refuses a cache mode that there is not; `what` says which it is.
pub(crate) fn check_cache(mode: &str, what: &str) -> Result<(), String> {
    let known = ["none", "off", "writeback", "writethrough", "directsync", "unsafe"].contains(&mode);
    if known { Ok(()) } else { Err(format!("Invalid {what} option: {mode}")) }
}

/// Runs `work` to its end on a ring made for it.
pub(crate) fn on_ring<T>(work: impl Future<Output = Result<T, String>>) -> Result<T, String> {
    let ring = Ring::new(Config::default()).map_err(|e| format!("could not set up I/O: {e}"))?;
    ring.block_on(work)
}

/// How a command's file names are meant.
#[derive(clap::Args, Clone, Debug, Default)]
pub(crate) struct Naming {
    /// Something that options refer to: secret,id=… or throttle-group,id=…
    #[arg(long = "object", value_name = "OBJECT")]
    objects: Vec<String>,
    /// Files are named by lists of options: driver=…,file.filename=…
    #[arg(long, alias = "source-image-opts")]
    image_opts: bool,
}

impl Naming {
    /// How to open what is named, in the format that `-f` states.
    pub(crate) fn look(&self, format: Option<&str>) -> Result<Look, String> {
        if self.image_opts && format.is_some() {
            return Err("--image-opts and --format are mutually exclusive".into());
        }
        let format = format.map(format_named).transpose()?;
        Ok(Look { format, image_opts: self.image_opts, objects: self.objects()?, ..Look::default() })
    }

    /// What `--object` made.
    pub(crate) fn objects(&self) -> Result<Rc<Objects>, String> {
        Ok(Rc::new(Objects::new(&self.objects).map_err(|error| error.to_string())?))
    }

    /// The texts of `--object`.
    pub(crate) fn object_texts(&self) -> &[String] {
        &self.objects
    }

    /// The plain name for what the user calls `file`.
    pub(crate) fn name(&self, file: &str) -> Result<String, String> {
        named(file, self.image_opts)
    }
}

fn named(file: &str, image_opts: bool) -> Result<String, String> {
    if !image_opts {
        return Ok(file.to_owned());
    }
    graph::from_image_options(file).map_err(|error| format!("Could not open '{file}': {error}"))
}

/// How to open for looking at (or checking) an image.
#[derive(Clone, Debug, Default)]
pub(crate) struct Look {
    /// The file is named by a list of options.
    pub(crate) image_opts: bool,
    /// What names refer to.
    pub(crate) objects: Rc<Objects>,
    pub(crate) format: Option<Format>,
    pub(crate) force_share: bool,
    pub(crate) no_backing: bool,
    /// Only so many layers of the chain, from the top.
    pub(crate) layers: Option<usize>,
    pub(crate) for_check: bool,
    /// The internal snapshot to show instead of the present state.
    pub(crate) snapshot: Option<String>,
    /// No guest's data are written: bitmaps stay true.
    pub(crate) no_guest: bool,
    pub(crate) writable: bool,
    /// Past the page cache.
    pub(crate) direct: bool,
    /// What is written need not become durable: whoever made it makes it again.
    pub(crate) no_flush: bool,
}

/// Opens `file` and what lies below it.
pub(crate) async fn open(file: &str, look: &Look) -> Result<Vec<Layer>, String> {
    open_from(&sources(look), file, look).await
}

/// What opens names for `look`.
pub(crate) fn sources(look: &Look) -> Sources {
    let locking = if look.force_share { Locking::Off } else { Locking::On };
    let top = OpenOptions { read_only: !look.writable, locking, no_flush: look.no_flush, direct: look.direct };
    let below = OpenOptions { read_only: true, locking, ..OpenOptions::default() };
    Sources::new(FileOpener { top, below }, Rc::clone(&look.objects))
}

/// [`open`], by `sources`, which are the caller's.
pub(crate) async fn open_from(sources: &Sources, file: &str, look: &Look) -> Result<Vec<Layer>, String> {
    let name = named(file, look.image_opts)?;
    let options = ChainOptions {
        format: look.format,
        read_only: !look.writable,
        no_backing: look.no_backing,
        layers: look.layers,
        for_check: look.for_check,
        snapshot: look.snapshot.clone(),
        no_guest: look.no_guest,
        ..ChainOptions::default()
    };
    open_chain(sources, &name, options).await.map_err(|e| format!("Could not open '{file}': {e}"))
}

/// Closes every layer; the first failure is reported.
pub(crate) async fn close(chain: &[Layer]) -> Result<(), String> {
    let mut outcome = Ok(());
    for layer in chain {
        outcome = outcome.and(layer.image.close().await.map_err(|e| e.to_string()));
    }
    outcome
}
