//! Named files in memory, and chains opened from them.

use super::sketch::{Plain, Sketch, Tables};
use super::valve::Valve;
use disk::chain::{ChainOptions, Opener, open_chain};
use disk::{Error, ErrorKind, Layer, Result};
use futures_util::future::LocalBoxFuture;
use image::create::{CreateOptions, create};
use image::{BackingRef, Format, Image};
use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::rc::Rc;
use store::Store;
use store::memory::MemoryStore;

/// Which formats a world is made of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Formats {
    /// The sketch and plain bytes: as awkward as can be.
    Sketched,
    /// QED and raw.
    Real,
}

/// A file.
#[derive(Clone)]
pub(crate) struct File {
    pub(crate) bytes: Rc<MemoryStore>,
    /// Of a sketch.
    pub(crate) tables: Option<Rc<Tables>>,
    pub(crate) format: Format,
}

/// Named files.
pub(crate) struct World {
    pub(crate) formats: Formats,
    files: RefCell<HashMap<String, File>>,
    seed: Cell<u64>,
    /// Whether stores take their time.
    pub(crate) slow: bool,
}

impl World {
    pub(crate) fn new(formats: Formats, seed: u64, slow: bool) -> Rc<Self> {
        Rc::new(Self { formats, files: RefCell::default(), seed: Cell::new(seed), slow })
    }

    pub(crate) fn file(&self, name: &str) -> File {
        self.files.borrow()[name].clone()
    }

    fn next_seed(&self) -> u64 {
        self.seed.set(self.seed.get().wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1));
        self.seed.get()
    }

    /// Makes a file: raw without a `unit`, else with clusters of that size.
    pub(crate) async fn create(&self, name: &str, unit: Option<u64>, size: u64, backing: Option<&str>) {
        let format = if unit.is_some() { Format::Qed } else { Format::Raw };
        let backing = backing.map(|name| BackingRef { name: name.to_owned(), format: Some(self.file(name).format) });
        let mut file = File { bytes: MemoryStore::new(name, 0), tables: None, format };
        match (self.formats, unit) {
            (Formats::Sketched, None) => file.bytes = MemoryStore::new(name, size),
            (Formats::Sketched, Some(unit)) => file.tables = Some(Tables::new(unit, size, backing)),
            (Formats::Real, _) => {
                let options = CreateOptions { format, size, backing, cluster_size: unit, table_size: None };
                create(file.bytes.clone(), &options).await.unwrap();
            }
        }
        self.files.borrow_mut().insert(name.to_owned(), file);
    }

    fn store(&self, name: &str, read_only: bool) -> Option<Rc<dyn Store>> {
        let files = self.files.borrow();
        let bytes = &files.get(name)?.bytes;
        let bytes: Rc<dyn Store> = if read_only { bytes.read_only() } else { Rc::clone(bytes) as Rc<dyn Store> };
        Some(if self.slow { Valve::slow(bytes, self.next_seed()) } else { bytes })
    }

    /// Opens the chain of `name`.
    pub(crate) async fn open(&self, name: &str) -> Vec<Layer> {
        if self.formats == Formats::Real {
            let options = ChainOptions { format: Some(self.file(name).format), ..ChainOptions::default() };
            return open_chain(self, name, options).await.unwrap();
        }
        let mut layers = Vec::new();
        let mut next = Some(name.to_owned());
        while let Some(name) = next {
            let read_only = !layers.is_empty();
            let store = self.store(&name, read_only).expect("the file is there");
            let image: Rc<dyn Image> = match &self.file(&name).tables {
                Some(tables) => Sketch::open(tables, store, read_only, self.next_seed()),
                None => Plain::open(store, read_only),
            };
            next = image.backing().map(|backing| backing.name);
            layers.push(Layer { node: format!("node-{name}"), name, image });
        }
        layers
    }
}

impl Opener for World {
    fn open<'a>(
        &'a self,
        name: &'a str,
        referrer: Option<&'a str>,
        read_only: bool,
    ) -> LocalBoxFuture<'a, Result<Rc<dyn Store>>> {
        Box::pin(async move {
            let store = self.store(name, read_only || referrer.is_some());
            store.ok_or_else(|| Error::new(ErrorKind::Chain, name, None, "no such file in this world"))
        })
    }

    fn identify(&self, name: &str, _referrer: Option<&str>) -> String {
        name.to_owned()
    }
}
