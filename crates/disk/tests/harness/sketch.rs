//! An image format that exists in memory only and is as awkward as [`Image`]'s contract allows: tables that are not there,
//! short look-ups, short reservations, everything taking its time; freed clusters are handed out again as soon as a commit
//! has made their freeing durable. It checks what the contract demands of its caller.

use super::dice::Dice;
use image::reservation::Reserved;
use image::{
    BackingRef, CheckReport, Error, ErrorKind, Format, Image, ImageFuture, ImageInfo, Keep, Linked, Mapped, Mapping,
    Purpose, Repair, Reservation, Result,
};
use layout::{GuestOffset, GuestRange, HostOffset};
use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::rc::Rc;
use store::{Store, ZeroMode};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Entry {
    Data(u64),
    Zero,
}

/// What the "file" holds besides bytes. Outlives the open image.
pub(crate) struct Tables {
    pub(crate) unit: u64,
    pub(crate) size: Cell<u64>,
    pub(crate) backing: RefCell<Option<BackingRef>>,
    entries: RefCell<BTreeMap<u64, Entry>>,
    free: RefCell<Vec<u64>>,
    end: Cell<u64>,
}

impl Tables {
    pub(crate) fn new(unit: u64, size: u64, backing: Option<BackingRef>) -> Rc<Self> {
        Rc::new(Self {
            unit,
            size: Cell::new(size),
            backing: RefCell::new(backing),
            entries: RefCell::default(),
            free: RefCell::default(),
            // The first cluster is the "header", so that guest data at 0 would be seen as wrong.
            end: Cell::new(unit),
        })
    }

    /// What maps the cluster at `at`: data, zero or nothing.
    pub(crate) fn is_allocated(&self, at: u64) -> bool {
        self.entries.borrow().contains_key(&(at / self.unit))
    }

    /// Clusters of the store that belong to nobody and are not free: there must be none when all is quiet.
    pub(crate) fn leaked(&self) -> u64 {
        let entries = self.entries.borrow();
        let used = entries.values().filter(|entry| matches!(entry, Entry::Data(_))).count() as u64;
        (self.end.get() / self.unit - 1) - used - self.free.borrow().len() as u64
    }
}

struct State {
    tables: Rc<Tables>,
    store: Rc<dyn Store>,
    read_only: bool,
    dice: Dice,
    /// What was loaded by the last load: looked up at least once.
    loaded: Cell<Option<GuestRange>>,
    dirty: Cell<bool>,
    commits: Cell<u64>,
    /// Freed, but not durably yet.
    unlinked: RefCell<Vec<u64>>,
    /// Ranges somebody works on: `true` for drops, which must be alone.
    working: RefCell<Vec<(u64, GuestRange, bool)>>,
    next: Cell<u64>,
    closed: Cell<bool>,
}

/// An open image.
pub(crate) struct Sketch {
    state: Rc<State>,
}

impl Sketch {
    pub(crate) fn open(tables: &Rc<Tables>, store: Rc<dyn Store>, read_only: bool, seed: u64) -> Rc<Self> {
        let state = State {
            tables: Rc::clone(tables),
            store,
            read_only,
            dice: Dice::new(seed),
            loaded: Cell::new(None),
            dirty: Cell::new(false),
            commits: Cell::new(0),
            unlinked: RefCell::default(),
            working: RefCell::default(),
            next: Cell::new(0),
            closed: Cell::new(false),
        };
        Rc::new(Self { state: Rc::new(state) })
    }

    pub(crate) fn is_closed(&self) -> bool {
        self.state.closed.get()
    }

    pub(crate) fn commits(&self) -> u64 {
        self.state.commits.get()
    }
}

impl State {
    async fn linger(&self) {
        for _ in 0..self.dice.below(3) {
            ring::yield_now().await;
        }
    }

    fn alloc(&self) -> u64 {
        let freed = self.tables.free.borrow_mut().pop();
        freed.unwrap_or_else(|| {
            let at = self.tables.end.get();
            self.tables.end.set(at + self.tables.unit);
            at
        })
    }

    fn unlink(&self, entry: Option<Entry>) {
        if let Some(Entry::Data(host)) = entry {
            self.unlinked.borrow_mut().push(host);
        }
    }

    fn begin(&self, range: GuestRange, alone: bool) -> u64 {
        let id = self.next.get();
        self.next.set(id + 1);
        let mut working = self.working.borrow_mut();
        for (_, other, other_alone) in &*working {
            assert!(!(other.overlaps(range) && (alone || *other_alone)), "{range} and {other} at once");
        }
        working.push((id, range, alone));
        id
    }

    fn end(&self, id: u64) {
        self.working.borrow_mut().retain(|(other, ..)| *other != id);
    }
}

struct Reserve {
    state: Rc<State>,
    hosts: Vec<u64>,
    purpose: Purpose,
}

impl Reserved for Reserve {
    fn link(&mut self, range: GuestRange, keep: Keep, veto: &dyn Fn(GuestOffset) -> bool) -> Linked {
        let unit = self.state.tables.unit;
        let mut linked = Linked::default();
        for (i, cluster) in (range.start().get() / unit..range.end().get() / unit).enumerate() {
            let mut entries = self.state.tables.entries.borrow_mut();
            let taken = keep == Keep::Unallocated && entries.contains_key(&cluster);
            if taken || veto(GuestOffset(cluster * unit)) {
                linked.dropped += unit;
                if let Some(host) = self.hosts.get(i) {
                    self.state.tables.free.borrow_mut().push(*host);
                }
                continue;
            }
            let entry = match self.purpose {
                Purpose::Data => Entry::Data(self.hosts[i]),
                Purpose::Zero => Entry::Zero,
            };
            let old = entries.insert(cluster, entry);
            self.state.unlink(old);
            self.state.dirty.set(true);
            linked.linked += unit;
        }
        linked
    }

    fn release(&mut self, _range: GuestRange) {
        self.state.tables.free.borrow_mut().append(&mut self.hosts);
    }
}

impl Image for Sketch {
    fn format(&self) -> Format {
        Format::Qed
    }
    fn store(&self) -> &Rc<dyn Store> {
        &self.state.store
    }
    fn size(&self) -> u64 {
        self.state.tables.size.get()
    }
    fn cluster_size(&self) -> u64 {
        self.state.tables.unit
    }
    fn read_only(&self) -> bool {
        self.state.read_only
    }
    fn backing(&self) -> Option<BackingRef> {
        self.state.tables.backing.borrow().clone()
    }
    fn info(&self) -> ImageInfo {
        ImageInfo::default()
    }

    fn lookup(&self, range: GuestRange) -> Result<Option<Mapped>> {
        let state = &*self.state;
        let unit = state.tables.unit;
        assert!(!range.is_empty() && range.end().get() <= self.size(), "lookup of {range} in {} bytes", self.size());
        let loaded = state.loaded.take().is_some_and(|loaded| loaded.contains(range.start()));
        if !loaded && state.dice.one_in(6) {
            return Ok(None);
        }
        let entries = state.tables.entries.borrow();
        let at = |cluster: u64| entries.get(&cluster).copied();
        let first = range.start().get() / unit;
        let most = if state.dice.one_in(3) { 1 + state.dice.below(4) } else { u64::MAX };
        let mut clusters = 1;
        while clusters < most && (first + clusters) * unit < range.end().get() {
            let goes_on = match (at(first), at(first + clusters)) {
                (Some(Entry::Data(this)), Some(Entry::Data(next))) => next == this + clusters * unit,
                (this, next) => this == next,
            };
            if !goes_on {
                break;
            }
            clusters += 1;
        }
        let len = ((first + clusters) * unit).min(range.end().get()) - range.start().get();
        let mapping = match at(first) {
            Some(Entry::Data(host)) => Mapping::Data(HostOffset(host + range.start().get() % unit)),
            Some(Entry::Zero) => Mapping::Zero,
            None => Mapping::Unallocated,
        };
        Ok(Some(Mapped { len, mapping }))
    }

    fn load(&self, range: GuestRange) -> ImageFuture<'_, ()> {
        Box::pin(async move {
            self.state.linger().await;
            self.state.loaded.set(Some(range));
            Ok(())
        })
    }

    fn reserve(&self, range: GuestRange, purpose: Purpose) -> ImageFuture<'_, Reservation> {
        Box::pin(async move {
            let state = &self.state;
            let unit = state.tables.unit;
            assert!(!range.is_empty() && range.end().get() <= self.size().next_multiple_of(unit), "reserve {range}");
            assert!(!self.state.read_only);
            state.linger().await;
            let range = range.align_outward(unit);
            let most = if state.dice.one_in(3) { 1 + state.dice.below(3) } else { range.len() / unit };
            let mut hosts: Vec<u64> = Vec::new();
            if purpose == Purpose::Data {
                while (hosts.len() as u64) < most.min(range.len() / unit) {
                    let next = state.alloc();
                    if hosts.last().is_some_and(|last| last + unit != next) {
                        state.tables.free.borrow_mut().push(next);
                        break;
                    }
                    hosts.push(next);
                }
            }
            let clusters = if purpose == Purpose::Data { hosts.len() as u64 } else { most.min(range.len() / unit) };
            let host = hosts.first().map(|host| HostOffset(*host));
            // Space at the end of the store was never written; what was freed holds what it held.
            let zeroed = host.is_some_and(|host| host.get() >= state.store.size()) && state.dice.one_in(2);
            let inner = Reserve { state: Rc::clone(state), hosts, purpose };
            Ok(Reservation::new(range.first(clusters * unit), host, Box::new(inner)).with_zeroed(zeroed))
        })
    }

    fn write_zeroes(&self, range: GuestRange, unmap: bool, masked: bool) -> ImageFuture<'_, ()> {
        Box::pin(async move {
            let state = &self.state;
            let unit = state.tables.unit;
            assert!(!self.state.read_only);
            assert!(range.start().is_aligned(unit), "{range}");
            assert!(range.end().get() <= self.size().next_multiple_of(unit), "{range} of {}", self.size());
            assert!(range.end().is_aligned(unit) || range.end().get() == self.size(), "{range} of {}", self.size());
            let id = state.begin(range, true);
            for cluster in range.start().get() / unit..range.end().get().div_ceil(unit) {
                if state.dice.one_in(4) {
                    state.linger().await;
                }
                let now = state.tables.entries.borrow().get(&cluster).copied();
                match now {
                    Some(Entry::Data(host)) if !unmap && state.dice.one_in(2) => {
                        state.store.zero(HostOffset(host).range(unit), ZeroMode::default()).await?;
                    }
                    Some(Entry::Data(_)) if !masked && state.dice.one_in(2) => {
                        let old = state.tables.entries.borrow_mut().remove(&cluster);
                        state.unlink(old);
                        state.dirty.set(true);
                    }
                    None if !masked => {}
                    Some(Entry::Zero) => {}
                    _ => {
                        let old = state.tables.entries.borrow_mut().insert(cluster, Entry::Zero);
                        state.unlink(old);
                        state.dirty.set(true);
                    }
                }
            }
            state.end(id);
            Ok(())
        })
    }

    fn is_dirty(&self) -> bool {
        self.state.dirty.get()
    }

    fn commit(&self) -> ImageFuture<'_, ()> {
        Box::pin(async move {
            let state = &self.state;
            state.commits.set(state.commits.get() + 1);
            let freed = std::mem::take(&mut *state.unlinked.borrow_mut());
            state.dirty.set(false);
            state.store.flush().await?;
            state.linger().await;
            for host in freed {
                // Whoever still reads there sees that it is not his any more.
                let poison = ring::Iov::alloc(state.tables.unit as usize);
                poison.fill(0xee);
                state.store.write(HostOffset(host), poison, false).await?;
                state.tables.free.borrow_mut().push(host);
            }
            Ok(())
        })
    }

    fn settle(&self) -> ImageFuture<'_, ()> {
        self.commit()
    }

    fn resize(&self, size: u64) -> ImageFuture<'_, ()> {
        Box::pin(async move {
            self.state.linger().await;
            assert!(size >= self.size());
            self.state.store.flush().await?;
            self.state.tables.size.set(size);
            Ok(())
        })
    }

    fn mask_behind_end(&self, until: GuestOffset) -> ImageFuture<'_, ()> {
        Box::pin(async move {
            self.state.linger().await;
            let unit = self.state.tables.unit;
            for cluster in self.size().div_ceil(unit)..until.get().div_ceil(unit) {
                self.state.tables.entries.borrow_mut().insert(cluster, Entry::Zero);
            }
            self.state.dirty.set(true);
            Ok(())
        })
    }

    fn set_backing(&self, backing: Option<BackingRef>) -> ImageFuture<'_, ()> {
        Box::pin(async move {
            self.commit().await?;
            *self.state.tables.backing.borrow_mut() = backing;
            self.state.store.flush().await?;
            Ok(())
        })
    }

    fn check(&self, _repair: Repair) -> ImageFuture<'_, CheckReport> {
        Box::pin(async { Ok(CheckReport::default()) })
    }

    fn poisoned(&self) -> Option<Error> {
        None
    }

    fn close(&self) -> ImageFuture<'_, ()> {
        Box::pin(async move {
            assert!(!self.state.closed.replace(true), "closed twice");
            if !self.state.read_only {
                self.commit().await?;
            }
            Ok(self.state.store.close().await?)
        })
    }
}

/// Raw, as plain as can be.
pub(crate) struct Plain {
    store: Rc<dyn Store>,
    size: Cell<u64>,
    read_only: bool,
}

impl Plain {
    pub(crate) fn open(store: Rc<dyn Store>, read_only: bool) -> Rc<Self> {
        Rc::new(Self { size: Cell::new(store.size()), store, read_only })
    }
}

impl Image for Plain {
    fn format(&self) -> Format {
        Format::Raw
    }
    fn store(&self) -> &Rc<dyn Store> {
        &self.store
    }
    fn size(&self) -> u64 {
        self.size.get()
    }
    fn cluster_size(&self) -> u64 {
        1
    }
    fn read_only(&self) -> bool {
        self.read_only
    }
    fn backing(&self) -> Option<BackingRef> {
        None
    }
    fn info(&self) -> ImageInfo {
        ImageInfo::default()
    }
    fn lookup(&self, range: GuestRange) -> Result<Option<Mapped>> {
        assert!(!range.is_empty() && range.end().get() <= self.size());
        Ok(Some(Mapped { len: range.len(), mapping: Mapping::Data(HostOffset(range.start().get())) }))
    }
    fn load(&self, _range: GuestRange) -> ImageFuture<'_, ()> {
        Box::pin(async { Ok(()) })
    }
    fn reserve(&self, _range: GuestRange, _purpose: Purpose) -> ImageFuture<'_, Reservation> {
        Box::pin(async { Err(Error::new(ErrorKind::Unsupported, "plain", None, "nothing to reserve")) })
    }
    fn write_zeroes(&self, range: GuestRange, unmap: bool, _masked: bool) -> ImageFuture<'_, ()> {
        Box::pin(async move {
            let range = HostOffset(range.start().get()).range(range.len());
            Ok(self.store.zero(range, ZeroMode { unmap }).await?)
        })
    }
    fn is_dirty(&self) -> bool {
        false
    }
    fn commit(&self) -> ImageFuture<'_, ()> {
        Box::pin(async move { Ok(self.store.flush().await?) })
    }
    fn settle(&self) -> ImageFuture<'_, ()> {
        self.commit()
    }
    fn resize(&self, size: u64) -> ImageFuture<'_, ()> {
        Box::pin(async move {
            self.store.set_size(size).await?;
            self.size.set(size);
            Ok(())
        })
    }
    fn set_backing(&self, backing: Option<BackingRef>) -> ImageFuture<'_, ()> {
        Box::pin(async move {
            match backing {
                None => Ok(()),
                Some(_) => Err(Error::new(ErrorKind::Unsupported, "plain", None, "no header")),
            }
        })
    }
    fn check(&self, _repair: Repair) -> ImageFuture<'_, CheckReport> {
        Box::pin(async { Ok(CheckReport::default()) })
    }
    fn poisoned(&self) -> Option<Error> {
        None
    }
    fn close(&self) -> ImageFuture<'_, ()> {
        Box::pin(async move { Ok(self.store.close().await?) })
    }
}
