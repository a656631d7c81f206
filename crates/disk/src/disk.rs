//! The state of one disk, shared by its handle, its requests and what they leave running behind them.

use crate::background::Background;
use crate::exchange::Sharers;
use crate::fetch::Fetches;
use crate::flush::Flusher;
use crate::gate::{Gate, Inside};
use crate::hold::{Hold, Jitter};
use crate::locks::RangeLocks;
use crate::populate::Publishing;
use crate::read::Drops;
use crate::stats::Counters;
use crate::threshold::Thresholds;
use crate::view::View;
use crate::{DiskOptions, Layer};
use image::{Error, ErrorKind, Image, Result};
use layout::{GuestOffset, GuestRange};
use ring::sync::{Event, Mutex, Semaphore};
use std::cell::{Cell, RefCell};
use std::rc::Rc;

/// Bytes that copy-on-read may hold in memory. When they are used up, reads go past it and nothing is kept: a guest never
/// waits for local writes.
const COPY_ON_READ_BYTES: usize = 32 << 20;
/// Bytes that jobs' fetches may hold in memory; jobs wait for them. Room for sixteen chunks of 4 MiB.
const POPULATE_BYTES: usize = 64 << 20;
/// Bytes of copy-on-write fill that guest writes may hold in memory. Writes wait for them, among themselves only. Far above
/// what queues of usual depth need; it bounds partial writes into clusters of 64 MiB.
const FILL_BYTES: usize = 128 << 20;

/// What belongs to a disk whatever chain it is over. Clones share it.
#[derive(Clone, Default)]
pub(crate) struct Kept {
    pub(crate) counters: Rc<Counters>,
    /// Operations that take mappings away, in any layer that is written to.
    pub(crate) drops: Rc<Drops>,
    /// A layer below the top is written to, too (a commit): its mappings may change while a read looks at them.
    pub(crate) changes_below: Rc<Cell<bool>>,
    /// A commit of tables has ended well.
    pub(crate) settled: Event,
    /// The job that has the disk.
    pub(crate) claim: Rc<RefCell<Option<String>>>,
    /// Who else shows the layers that a stream lets go of.
    pub(crate) sharers: Rc<RefCell<Option<Sharers>>>,
    /// The lowest layer (its node) that copy-on-read copies from, if it is not to copy from all.
    pub(crate) copies_down_to: Rc<RefCell<Option<String>>>,
}

/// The state of one disk over one chain.
pub(crate) struct Inner {
    pub(crate) name: String,
    pub(crate) options: Cell<DiskOptions>,
    /// The top image: the same for as long as this lives.
    pub(crate) top: Rc<dyn Image>,
    pub(crate) unit: u64,
    view: RefCell<Rc<View>>,
    pub(crate) gate: Gate,
    pub(crate) jitter: Jitter,
    pub(crate) locks: RangeLocks,
    pub(crate) drops: Rc<Drops>,
    pub(crate) fetches: Fetches,
    pub(crate) publishing: Publishing,
    pub(crate) flusher: Flusher,
    pub(crate) background: Background,
    pub(crate) counters: Rc<Counters>,
    pub(crate) kept: Kept,
    pub(crate) thresholds: Option<Thresholds>,
    pub(crate) copy_on_read_budget: Semaphore,
    pub(crate) populate_budget: Semaphore,
    /// Sharing extents with what lies below was not found to be impossible yet.
    pub(crate) may_share: Cell<bool>,
    pub(crate) fill_budget: Semaphore,
    /// One change of size or of the chain at a time.
    pub(crate) reshaping: Mutex<()>,
    /// The lowest layer names another that was not opened: what it does not have is unknown.
    incomplete: bool,
}

impl Inner {
    pub(crate) fn new(name: &str, chain: Vec<Layer>, options: DiskOptions, kept: Kept) -> Rc<Self> {
        assert!(!chain.is_empty(), "a chain has a top");
        let view = View::new(chain);
        let top = Rc::clone(view.image(0));
        let thresholds = view.layers[0].thresholds.clone();
        let incomplete = view.layers.last().is_some_and(|last| !last.bottom && last.image.backing().is_some());
        Rc::new(Self {
            name: name.to_owned(),
            options: Cell::new(options),
            unit: top.cluster_size(),
            top,
            view: RefCell::new(view),
            gate: Gate::default(),
            jitter: Jitter::default(),
            locks: RangeLocks::default(),
            drops: Rc::clone(&kept.drops),
            fetches: Fetches::default(),
            publishing: Publishing::default(),
            flusher: Flusher::new(kept.settled.clone()),
            background: Background::default(),
            counters: Rc::clone(&kept.counters),
            kept,
            thresholds,
            copy_on_read_budget: Semaphore::new(COPY_ON_READ_BYTES),
            populate_budget: Semaphore::new(POPULATE_BYTES),
            may_share: Cell::new(true),
            fill_budget: Semaphore::new(FILL_BYTES),
            reshaping: Mutex::new(()),
            incomplete,
        })
    }

    /// The chain as it is now.
    pub(crate) fn view(&self) -> Rc<View> {
        Rc::clone(&self.view.borrow())
    }

    /// Puts another chain in place; hands back the old one.
    pub(crate) fn replace_view(&self, view: Rc<View>) -> Rc<View> {
        self.view.replace(view)
    }

    /// Lets a request in.
    pub(crate) fn enter(&self) -> Result<Inside> {
        self.gate.enter().ok_or_else(|| self.refuse(ErrorKind::Busy, "the disk is closed"))
    }

    /// An error of this disk.
    pub(crate) fn refuse(&self, kind: ErrorKind, what: impl Into<String>) -> Error {
        Error::new(kind, self.top.store().name(), None, what)
    }

    /// Refuses requests that reach past the end.
    pub(crate) fn check_range(&self, at: GuestOffset, len: u64) -> Result<GuestRange> {
        let size = self.top.size();
        if at.get() > size || len > size - at.get() {
            let what = format!("a request of {len} bytes at {} reaches past the disk's end at {size}", at.get());
            return Err(self.refuse(ErrorKind::InvalidArgument, what));
        }
        Ok(at.range(len))
    }

    /// Whether guests may not write: so it was opened, or part of what it shows is not known.
    pub(crate) fn read_only(&self) -> bool {
        self.top.read_only() || self.incomplete
    }

    /// Refuses changes to a disk that is read-only.
    pub(crate) fn check_writable(&self) -> Result<()> {
        if self.read_only() {
            return Err(self.refuse(ErrorKind::ReadOnly, "the disk is read-only"));
        }
        // A write in place would need nothing of the image; but no flush could ever make it durable any more, and a guest
        // should hear of that at once.
        match self.top.poisoned() {
            Some(first) => Err(Error::poisoned(self.top.store().name(), &first)),
            None => Ok(()),
        }
    }

    /// A guest writes to `range`.
    pub(crate) fn reaches(&self, range: GuestRange) {
        if let Some(thresholds) = &self.thresholds {
            thresholds.node.reaches(range.end().get());
        }
    }

    /// The part of `range` that lies on the disk.
    pub(crate) fn clip(&self, range: GuestRange) -> GuestRange {
        range.intersect(GuestRange::between(GuestOffset::ZERO, GuestOffset(self.top.size())))
    }

    /// Settles and closes the layers that are the disk's own (none, with `all_lent`). Nothing is inside. The first failure is
    /// reported.
    pub(crate) async fn close_layers(&self, all_lent: bool) -> Result<()> {
        let mut outcome = Ok(());
        for (depth, layer) in self.view().layers.iter().enumerate() {
            let ended = if !layer.lent && !all_lent {
                layer.image.close().await
            } else if depth == 0 && !layer.image.read_only() && layer.image.poisoned().is_none() {
                layer.image.settle().await
            } else {
                Ok(())
            };
            outcome = outcome.and(ended);
        }
        outcome
    }

    /// A guest's request that asks layers below: held while a source does not answer.
    pub(crate) async fn held<T>(&self, ask: impl AsyncFn() -> Result<T>) -> Result<T> {
        let mut hold = self.hold();
        loop {
            match ask().await {
                Err(error) => hold.or_fail(error).await?,
                answer => return answer,
            }
        }
    }

    /// For a request that waits for sources which do not answer.
    pub(crate) fn hold(&self) -> Hold<'_> {
        Hold::new(&self.gate, &self.jitter)
    }
}
