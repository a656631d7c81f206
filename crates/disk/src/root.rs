//! What a disk is over: one chain at a time, behind a door.
//!
//! A snapshot puts an overlay over a disk that is in use, and a commit takes layers away from under it. Whoever holds the
//! [`crate::Disk`] need not know: the door is shut, those inside leave, another chain is put in place, the door opens.
//!
//! **Invariants.**
//! * A chain takes another's place only while the door is shut and nobody is inside.
//! * A request that was held inside for want of a source when the door was shut goes out and comes back in: it is not failed.
//! * What belongs to the disk and not to its chain (counters, the job that has it, who waits for a commit) is [`Kept`](crate::disk::Kept).

use crate::dirty::Dirty;
use crate::disk::Inner;
use crate::gate::Inside;
use crate::{DiskOptions, Layer};
use image::{ErrorKind, Result};
use layout::GuestRange;
use ring::sync::{Event, Mutex};
use std::cell::{Cell, RefCell};
use std::rc::{Rc, Weak};

/// See the module.
pub(crate) struct Root {
    name: String,
    inner: RefCell<Rc<Inner>>,
    shut: Cell<bool>,
    opened: Event,
    closed: Cell<bool>,
    /// How closing ended.
    outcome: Mutex<Option<Result<()>>>,
    /// Who is told of what guests change.
    watchers: RefCell<Vec<Weak<Dirty>>>,
}

impl Root {
    pub(crate) fn new(name: &str, inner: Rc<Inner>) -> Rc<Self> {
        Rc::new(Self {
            name: name.to_owned(),
            inner: RefCell::new(inner),
            shut: Cell::new(false),
            opened: Event::new(),
            closed: Cell::new(false),
            outcome: Mutex::new(None),
            watchers: RefCell::default(),
        })
    }

    pub(crate) fn name(&self) -> &str {
        &self.name
    }

    /// What it is over now.
    pub(crate) fn now(&self) -> Rc<Inner> {
        Rc::clone(&self.inner.borrow())
    }

    /// Lets a request in; it waits while the door is shut.
    pub(crate) async fn enter(&self) -> Result<(Rc<Inner>, Inside)> {
        loop {
            let inner = self.now();
            if self.closed.get() {
                return Err(inner.refuse(ErrorKind::Busy, "the disk is closed"));
            }
            if !self.shut.get() {
                let inside = inner.enter()?;
                return Ok((inner, inside));
            }
            self.opened.wait().await;
        }
    }

    /// Does something inside; once more, where it was sent out while it waited for a source.
    pub(crate) async fn inside<T>(&self, work: impl AsyncFn(&Rc<Inner>) -> Result<T>) -> Result<T> {
        loop {
            let (inner, inside) = self.enter().await?;
            match work(&inner).await {
                Err(error) if error.is_unavailable() && self.is_sent_out(&inner) => drop(inside),
                outcome => return outcome,
            }
        }
    }

    /// Whether those inside are to leave and may come back.
    fn is_sent_out(&self, inner: &Rc<Inner>) -> bool {
        inner.gate.is_closed() && !self.closed.get()
    }

    /// Tells those who want to know that a guest has changed `range`, or may have.
    pub(crate) fn changed(&self, range: GuestRange) {
        for watcher in self.watchers.borrow().iter() {
            if let Some(dirty) = watcher.upgrade() {
                dirty.mark(range);
            }
        }
    }

    /// Tells `dirty` from now on what guests change.
    pub(crate) fn watch(&self, dirty: &Rc<Dirty>) {
        let mut watchers = self.watchers.borrow_mut();
        watchers.retain(|watcher| watcher.strong_count() > 0);
        watchers.push(Rc::downgrade(dirty));
    }

    /// See [`crate::Disk::close`] and, with `all_lent`, [`crate::Disk::retire`].
    pub(crate) async fn close(&self, all_lent: bool) -> Result<()> {
        while self.shut.get() {
            self.opened.wait().await;
        }
        self.closed.set(true);
        let inner = self.now();
        inner.gate.close();
        inner.gate.empty().await;
        let mut outcome = self.outcome.lock().await;
        if let Some(outcome) = &*outcome {
            return outcome.clone();
        }
        let ended = inner.close_layers(all_lent).await;
        *outcome = Some(ended.clone());
        ended
    }

    fn put(&self, layers: Vec<Layer>, options: DiskOptions) {
        let old = self.now();
        let new = Inner::new(&self.name, layers, options, old.kept.clone());
        // Where the top is the same, a flush still owes what was written before.
        new.flusher.take_over(&old.flusher);
        *self.inner.borrow_mut() = new;
    }
}

/// A disk whose door is shut and that nobody is inside of. When it is dropped the door opens, over the chain that was put in
/// place, or the same one.
pub struct Drained {
    root: Rc<Root>,
    put: bool,
}

impl Drained {
    pub(crate) async fn of(root: &Rc<Root>) -> Result<Self> {
        while root.shut.get() {
            root.opened.wait().await;
        }
        let inner = root.now();
        if root.closed.get() {
            return Err(inner.refuse(ErrorKind::Busy, "the disk is closed"));
        }
        root.shut.set(true);
        let drained = Self { root: Rc::clone(root), put: false };
        // Whoever is held for want of a source is sent out, and what the disk does on its own ends.
        inner.gate.close();
        inner.gate.empty().await;
        Ok(drained)
    }

    /// The layers, top first.
    pub fn chain(&self) -> Rc<[Layer]> {
        Rc::clone(&self.root.now().view().layers)
    }

    /// How it behaves.
    pub fn options(&self) -> DiskOptions {
        self.root.now().options.get()
    }

    /// Makes everything that guests have written durable.
    pub async fn flush(&self) -> Result<()> {
        self.root.now().commit().await
    }

    /// Puts another chain (top first, not empty) in place. The old one is settled (see [`Drained::flush`]), and whoever puts
    /// another there closes of it what is not lent.
    pub fn put(&mut self, layers: Vec<Layer>, options: DiskOptions) {
        self.root.put(layers, options);
        self.put = true;
    }
}

impl Drop for Drained {
    fn drop(&mut self) {
        if !self.put {
            // The same again, with a gate that is open.
            let now = self.root.now();
            self.root.put(now.view().layers.to_vec(), now.options.get());
        }
        self.root.shut.set(false);
        self.root.opened.notify_all();
    }
}
