//! Named files in memory, and chains opened from them.
//!
//! Files outlive the stores they are opened through, as they do on a machine. Every store is traced; the top has a
//! volatile cache, so that a power cut at any moment can be asked for.

use crate::content::{SECTOR, Value, ZEROS, sectors};
use crate::dice::Dice;
use crate::master::qcow2;
use crate::oracle::Run;
use crate::plan::{Faults, Shape};
use disk::chain::{ChainOptions, Opened, Opener, open_chain};
use disk::{Disk, DiskOptions, Error, ErrorKind, Layer, Result};
use futures_util::future::LocalBoxFuture;
use image::create::{CreateOptions, create};
use image::{BackingRef, Format, Image, OpenOptions};
use layout::GuestOffset;
use ring::Iov;
use std::cell::RefCell;
use std::collections::BTreeMap;
use std::rc::Rc;
use std::time::Duration;
use store::Operation;
use store::fault::{Action, Failure, FaultStore, Match};
use store::memory::{MemoryStore, Snapshot};
use store::trace::{Trace, TraceStore};

/// The writable image's name.
pub(crate) const TOP: &str = "top";

/// How long a hanging source hangs: longer than anybody has patience for, shorter than a phase.
const HANG: Duration = Duration::from_secs(90);

/// How long a slow write to the top takes.
const SLOW: Duration = Duration::from_secs(8);

struct File {
    bytes: Rc<MemoryStore>,
    format: Format,
}

/// See the module.
pub(crate) struct World {
    files: RefCell<BTreeMap<String, File>>,
    /// The stores the chain was opened through last.
    open: RefCell<BTreeMap<String, Rc<FaultStore>>>,
    dice: Dice,
    trace: Trace,
}

impl World {
    /// Builds the chain, and says what the disk over it shows, sector by sector.
    pub(crate) async fn new(shape: &Shape, dice: Dice, trace: Trace) -> Result<(Rc<Self>, Vec<Value>)> {
        let world = Rc::new(Self { files: RefCell::default(), open: RefCell::default(), dice, trace });
        let mut below: Vec<Value> = Vec::new();
        for (number, layer) in shape.layers.iter().enumerate() {
            let name = shape.name(number);
            if layer.by_hand {
                below = world.patches(layer.size);
                let bytes = qcow2(&below, layer.cluster_size.trailing_zeros(), &world.dice);
                let bytes = MemoryStore::from_bytes(&name, &bytes);
                world.files.borrow_mut().insert(name, File { bytes, format: layer.format });
                continue;
            }
            let bytes = MemoryStore::new(&name, 0);
            let backing = (number > 0).then(|| {
                let name = shape.name(number - 1);
                let format = Some(shape.layers[number - 1].format);
                BackingRef { name, format }
            });
            let is_raw = layer.format == Format::Raw;
            let options = CreateOptions {
                format: layer.format,
                size: layer.size * SECTOR,
                backing,
                cluster_size: (!is_raw).then_some(layer.cluster_size),
                table_size: (layer.format == Format::Qed).then_some(layer.table_size),
                qcow2: layer.qcow2,
                passphrase: None,
                iteration_time: None,
            };
            create(bytes.clone(), &options).await?;
            world.files.borrow_mut().insert(name.clone(), File { bytes, format: layer.format });
            below.resize(layer.size as usize, ZEROS);
            // The top starts empty, but for some that were in use before.
            let is_top = number + 1 == shape.layers.len();
            if !is_top || layer.snapshot || world.dice.percent(30) {
                world.write_layer(&name, number, &mut below).await?;
            }
            if layer.snapshot {
                world.take_snapshot(&name).await?;
                world.write_layer(&name, number, &mut below).await?;
            }
        }
        world.trace.switch(true);
        Ok((world, below))
    }

    /// What a bottom layer of so many sectors holds that is made by hand.
    fn patches(&self, size: u64) -> Vec<Value> {
        let mut content = vec![ZEROS; size as usize];
        for _ in 0..self.dice.between(2, 6) {
            let first = self.dice.below(size);
            let end = first + self.dice.between(1, size).min(size - first);
            let value = if self.dice.percent(15) { ZEROS } else { Value::original(0) };
            content[first as usize..end as usize].fill(value);
        }
        content
    }

    /// Writes here and there into a layer, through a disk of its own, and notes it in `content`.
    async fn write_layer(&self, name: &str, number: usize, content: &mut [Value]) -> Result<()> {
        let disk = Disk::new(
            name,
            open_chain(&Sound { world: self, top: None }, name, self.options(name)).await?,
            DiskOptions::default(),
        );
        let size = content.len() as u64;
        // The bottom is mostly full; those above hold less and less.
        let patches = if number == 0 { self.dice.between(2, 6) } else { self.dice.between(0, 5) };
        for _ in 0..patches {
            let first = self.dice.below(size);
            let longest = if number == 0 { size } else { (size / 3).max(1) };
            let run = Run::new(first, self.dice.between(1, longest).min(size - first));
            let value = if self.dice.percent(15) { ZEROS } else { Value::original(number) };
            if value == ZEROS && self.dice.percent(50) {
                disk.write_zeroes(run.bytes(), true, false).await?;
            } else {
                let bytes = Iov::from_slice(&sectors(value, run.first, run.count));
                disk.write(GuestOffset(run.first * SECTOR), bytes, false).await?;
            }
            content[run.first as usize..(run.first + run.count) as usize].fill(value);
        }
        disk.close().await
    }

    /// From here on what the image holds is shared: it is read where it is, and written elsewhere.
    async fn take_snapshot(&self, name: &str) -> Result<()> {
        let image = image::open(self.bytes(name)?, Format::Qcow2, OpenOptions::default()).await?;
        image.snapshot(image::SnapshotAction::Create("before".to_owned(), (1, 0))).await?;
        image.close().await
    }

    fn options(&self, name: &str) -> ChainOptions {
        let format = self.files.borrow().get(name).map(|file| file.format);
        ChainOptions { format, node: Some(format!("node-{name}")), ..ChainOptions::default() }
    }

    fn bytes(&self, name: &str) -> Result<Rc<MemoryStore>> {
        let files = self.files.borrow();
        let missing = || Error::new(ErrorKind::Chain, name, None, "no such file in this world");
        files.get(name).map(|file| Rc::clone(&file.bytes)).ok_or_else(missing)
    }

    /// Opens the disk as a machine would: everything traced, everything that can go wrong going wrong from then on.
    pub(crate) async fn disk(&self, options: DiskOptions, faults: &Faults) -> Result<Rc<Disk>> {
        self.open.borrow_mut().clear();
        let mut chain = open_chain(self, TOP, self.options(TOP)).await?;
        for layer in &mut chain {
            layer.node = format!("node-{}", layer.name);
        }
        self.arm(faults);
        Ok(Disk::new("disk", chain, options))
    }

    /// Puts the rules of a phase in force.
    fn arm(&self, faults: &Faults) {
        let share = |percent: u64| percent as f64 / 100.0;
        let no_answer = || Failure::from(store::ErrorKind::Unavailable);
        for (name, store) in &*self.open.borrow() {
            if !faults.jitter.is_zero() {
                store.rule(Match::any().chance(0.7), Action::Jitter(faults.jitter));
            }
            if faults.split {
                let pieces = Match::on(Operation::Read).or(Operation::Write).or(Operation::Zero);
                store.rule(pieces.chance(0.3), Action::Split(SECTOR * self.dice.between(1, 9)));
            }
            if name == TOP {
                self.arm_top(store, faults);
                continue;
            }
            let read = || Match::on(Operation::Read);
            if faults.source_eio > 0 {
                let half = Action::Partial(SECTOR, Failure::EIO);
                store.rule(read().chance(share(faults.source_eio)), Action::Fail(Failure::EIO));
                store.rule(read().chance(share(faults.source_eio) / 4.0), half);
            }
            if faults.source_away {
                let (skip, times) = (self.dice.below(20), self.dice.between(1, 12));
                store.rule(read().skip(skip).times(times), Action::Fail(no_answer()));
            }
            if faults.source_hangs {
                let (skip, times) = (self.dice.below(10), self.dice.between(1, 3));
                store.rule(read().skip(skip).times(times), Action::Delay(HANG));
            }
        }
    }

    fn arm_top(&self, store: &FaultStore, faults: &Faults) {
        let share = |percent: u64| percent as f64 / 100.0;
        if faults.top_read_eio > 0 {
            store.rule(Match::on(Operation::Read).chance(share(faults.top_read_eio)), Action::Fail(Failure::EIO));
        }
        let changes = || Match::on(Operation::Write).or(Operation::Zero);
        if faults.top_hangs {
            let (skip, times) = (self.dice.below(60), self.dice.between(1, 4));
            store.rule(changes().skip(skip).times(times), Action::Delay(SLOW));
        }
        if faults.top_write_eio > 0 {
            let skip = self.dice.below(40);
            store.rule(changes().chance(share(faults.top_write_eio)).skip(skip), Action::Tear(Failure::EIO));
        }
        if faults.top_no_space > 0 {
            let grows = || changes().or(Operation::Allocate).or(Operation::SetSize);
            let (skip, times) = (self.dice.below(40), self.dice.between(1, 20));
            let action = if self.dice.percent(50) {
                Action::Fail(Failure::ENOSPC)
            } else {
                Action::Partial(SECTOR * self.dice.below(8), Failure::ENOSPC)
            };
            store.rule(grows().chance(share(faults.top_no_space)).skip(skip).times(times), action);
        }
        if let Some(number) = faults.flush_fails {
            store.rule(Match::on(Operation::Flush).nth(number), Action::Fail(Failure::EIO));
        }
    }

    /// The store under the top, as it was opened last.
    pub(crate) fn top(&self) -> Option<Rc<FaultStore>> {
        self.open.borrow().get(TOP).cloned()
    }

    /// The power is off: whatever still runs changes nothing any more.
    pub(crate) fn switch_off(&self) {
        self.open.borrow().values().for_each(|store| store.switch_off());
    }

    /// The machine comes back with this on its medium.
    pub(crate) fn adopt(&self, image: Snapshot) {
        if let Some(file) = self.files.borrow_mut().get_mut(TOP) {
            file.bytes = MemoryStore::from_snapshot(TOP, image);
        }
    }

    /// A chain over this image of the top, on sound hardware.
    pub(crate) async fn chain_over(&self, image: &Snapshot) -> Result<(Rc<MemoryStore>, Vec<Layer>)> {
        let top = MemoryStore::from_snapshot(TOP, image.clone());
        let chain = open_chain(&Sound { world: self, top: Some(Rc::clone(&top)) }, TOP, self.options(TOP)).await?;
        Ok((top, chain))
    }

    /// This image of the top alone, opened for a check: nobody repairs it.
    pub(crate) async fn for_check(&self, image: &Snapshot) -> Result<Rc<dyn Image>> {
        let format = self.files.borrow().get(TOP).map_or(Format::Raw, |file| file.format);
        let options = OpenOptions { read_only: true, for_check: true };
        image::open(MemoryStore::from_snapshot(TOP, image.clone()).read_only(), format, options).await
    }

    /// The files below the top, and what they hold.
    pub(crate) fn below(&self) -> Vec<(String, Vec<u8>)> {
        let files = self.files.borrow();
        let below = files.iter().filter(|(name, _)| *name != TOP);
        below.map(|(name, file)| (name.clone(), file.bytes.to_vec())).collect()
    }

    /// What tools call the top's format.
    pub(crate) fn format_name(&self) -> &'static str {
        self.files.borrow().get(TOP).map_or("", |file| file.format.name())
    }
}

/// What opens files.
impl Opener for World {
    fn open<'a>(
        &'a self,
        name: &'a str,
        referrer: Option<&'a str>,
        read_only: bool,
    ) -> LocalBoxFuture<'a, Result<Opened>> {
        Box::pin(async move {
            let bytes = self.bytes(name)?;
            let below = read_only || referrer.is_some();
            let faults = FaultStore::new(if below { bytes.read_only() } else { bytes }, self.dice.next());
            if !below {
                faults.make_volatile(SECTOR).await?;
            }
            self.open.borrow_mut().insert(name.to_owned(), Rc::clone(&faults));
            Ok(TraceStore::new(faults, self.trace.clone()).into())
        })
    }

    fn identify(&self, name: &str, _referrer: Option<&str>) -> String {
        name.to_owned()
    }
}

/// The same files on sound hardware, the top perhaps another one.
struct Sound<'w> {
    world: &'w World,
    top: Option<Rc<MemoryStore>>,
}

impl Opener for Sound<'_> {
    fn open<'a>(
        &'a self,
        name: &'a str,
        referrer: Option<&'a str>,
        read_only: bool,
    ) -> LocalBoxFuture<'a, Result<Opened>> {
        Box::pin(async move {
            Ok(match (&self.top, read_only || referrer.is_some()) {
                (_, true) => self.world.bytes(name)?.read_only().into(),
                (Some(top), false) => Rc::clone(top).into(),
                (None, false) => self.world.bytes(name)?.into(),
            })
        })
    }

    fn identify(&self, name: &str, _referrer: Option<&str>) -> String {
        name.to_owned()
    }
}
