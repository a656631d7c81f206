//! Named files in memory, and chains opened from them. Every store is traced and can be made to fail, wait and forget.

use super::dice::Dice;
use super::sketch::{Plain, Sketch, Tables};
use disk::chain::{ChainOptions, Opened, Opener, open_chain};
use disk::{Disk, DiskOptions, Error, ErrorKind, Layer, Result};
use futures_util::future::LocalBoxFuture;
use image::create::{CreateOptions, create};
use image::{BackingRef, Format, Image};
use layout::{GuestOffset, HostRange};
use ring::Iov;
use std::cell::RefCell;
use std::collections::HashMap;
use std::rc::Rc;
use std::time::Duration;
use store::fault::{Action, FaultStore, Match, Rule};
use store::memory::MemoryStore;
use store::trace::{Moment, Record, Trace, TraceStore};
use store::{Operation, Store};

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
    /// Breaks the store it was opened with last.
    pub(crate) faults: Option<Rc<FaultStore>>,
    /// The image it was opened as last, if it is a sketch.
    pub(crate) sketch: Option<Rc<Sketch>>,
}

/// Named files.
pub(crate) struct World {
    formats: Formats,
    files: RefCell<HashMap<String, File>>,
    dice: Dice,
    /// Whether stores take their time.
    slow: bool,
    pub(crate) trace: Trace,
}

impl World {
    pub(crate) fn new(formats: Formats, seed: u64, slow: bool) -> Rc<Self> {
        let trace = Trace::keeping(1 << 20);
        Rc::new(Self { formats, files: RefCell::default(), dice: Dice::new(seed), slow, trace })
    }

    pub(crate) fn file(&self, name: &str) -> File {
        self.files.borrow()[name].clone()
    }

    /// Breaks the store that `name` was opened with last.
    pub(crate) fn faults(&self, name: &str) -> Rc<FaultStore> {
        self.file(name).faults.expect("it was opened")
    }

    /// Holds operations of this kind on `name`.
    pub(crate) fn hold(&self, name: &str, operation: Operation) -> Rule {
        self.faults(name).rule(Match::on(operation), Action::Hold)
    }

    /// Makes a file: raw without a `unit`, else with clusters of that size.
    pub(crate) async fn create(&self, name: &str, unit: Option<u64>, size: u64, backing: Option<&str>) {
        let format = if unit.is_some() { Format::Qed } else { Format::Raw };
        let backing = backing.map(|name| BackingRef { name: name.to_owned(), format: Some(self.file(name).format) });
        let mut file = File { bytes: MemoryStore::new(name, 0), tables: None, format, faults: None, sketch: None };
        match (self.formats, unit) {
            (_, None) => file.bytes = MemoryStore::new(name, size),
            (Formats::Sketched, Some(unit)) => file.tables = Some(Tables::new(unit, size, backing)),
            (Formats::Real, Some(_)) => {
                let options = CreateOptions {
                    format,
                    size,
                    backing,
                    cluster_size: unit,
                    table_size: None,
                    qcow2: image::qcow2::Options::default(),
                    passphrase: None,
                    iteration_time: None,
                };
                create(file.bytes.clone(), &options).await.unwrap();
            }
        }
        self.files.borrow_mut().insert(name.to_owned(), file);
    }

    /// Makes a raw file of these bytes.
    pub(crate) fn raw(&self, name: &str, bytes: &[u8]) {
        self.adopt(name, MemoryStore::from_bytes(name, bytes), Format::Raw);
    }

    /// Takes a file over.
    pub(crate) fn adopt(&self, name: &str, bytes: Rc<MemoryStore>, format: Format) {
        let file = File { bytes, tables: None, format, faults: None, sketch: None };
        self.files.borrow_mut().insert(name.to_owned(), file);
    }

    fn store(&self, name: &str, read_only: bool) -> Option<Rc<dyn Store>> {
        let mut files = self.files.borrow_mut();
        let file = files.get_mut(name)?;
        let bytes = if read_only { file.bytes.read_only() } else { Rc::clone(&file.bytes) };
        let faults = FaultStore::new(bytes, self.dice.next());
        if self.slow {
            faults.rule(Match::any().chance(0.6), Action::Jitter(Duration::from_micros(200)));
        }
        file.faults = Some(Rc::clone(&faults));
        Some(TraceStore::new(faults, self.trace.clone()))
    }

    /// Opens the chain of `name`.
    pub(crate) async fn open(&self, name: &str) -> Vec<Layer> {
        if self.formats == Formats::Real {
            let format = Some(self.file(name).format);
            let options = ChainOptions { format, node: Some(format!("node-{name}")), ..ChainOptions::default() };
            let mut chain = open_chain(self, name, options).await.unwrap();
            for layer in &mut chain {
                layer.node = format!("node-{}", layer.name);
            }
            return chain;
        }
        let mut layers = Vec::new();
        let mut next = Some(name.to_owned());
        while let Some(name) = next {
            let read_only = !layers.is_empty();
            let store = self.store(&name, read_only).expect("the file is there");
            let image: Rc<dyn Image> = match self.file(&name).tables {
                Some(tables) => {
                    let sketch = Sketch::open(&tables, store, read_only, self.dice.next());
                    self.files.borrow_mut().get_mut(&name).expect("seen above").sketch = Some(Rc::clone(&sketch));
                    sketch
                }
                None => Plain::open(store, read_only),
            };
            next = image.backing().map(|backing| backing.name);
            layers.push(Layer::new(format!("node-{name}"), name, image));
        }
        layers
    }

    /// Puts a disk over the chain of `name`.
    pub(crate) async fn disk(&self, name: &str, options: DiskOptions) -> Rc<Disk> {
        Disk::new(name, self.open(name).await, options)
    }

    /// What was begun on `name` so far, of one kind.
    pub(crate) fn begun(&self, name: &str, operation: Operation) -> Vec<HostRange> {
        let of_interest = |r: &Record| r.moment == Moment::Started && &*r.store == name && r.operation == operation;
        let records = self.trace.records();
        records.into_iter().filter(of_interest).map(|r| r.range.unwrap_or_default()).collect()
    }

    /// Bytes read from `name` so far.
    pub(crate) fn bytes_read(&self, name: &str) -> u64 {
        self.begun(name, Operation::Read).into_iter().map(HostRange::len).sum()
    }
}

impl Opener for World {
    fn open<'a>(
        &'a self,
        name: &'a str,
        referrer: Option<&'a str>,
        read_only: bool,
    ) -> LocalBoxFuture<'a, Result<Opened>> {
        Box::pin(async move {
            let store = self.store(name, read_only || referrer.is_some());
            store
                .map(Opened::from)
                .ok_or_else(|| Error::new(ErrorKind::Chain, name, None, "no such file in this world"))
        })
    }

    fn identify(&self, name: &str, _referrer: Option<&str>) -> String {
        name.to_owned()
    }
}

/// Reads a part of a disk.
pub(crate) async fn read(disk: &Disk, at: u64, len: usize) -> Result<Vec<u8>> {
    let into = Iov::alloc(len);
    into.fill(0x99);
    disk.read(GuestOffset(at), into.clone()).await?;
    Ok(into.to_vec())
}

/// Writes to a disk.
pub(crate) async fn write(disk: &Disk, at: u64, bytes: &[u8]) -> Result<()> {
    disk.write(GuestOffset(at), Iov::from_slice(bytes), false).await
}

/// Bytes that tell where they are from, never zero.
pub(crate) fn noise(seed: u64, len: usize) -> Vec<u8> {
    let dice = Dice::new(seed);
    (0..len.div_ceil(8)).flat_map(|_| (dice.next() | 0x0101_0101_0101_0101).to_le_bytes()).take(len).collect()
}

/// Lets everything run that can, without time passing.
pub(crate) async fn quiet() {
    for _ in 0..200 {
        ring::yield_now().await;
    }
}
