//! A decorator that fails and stops requests as its user says, like QEMU's `blkdebug` (`docs/devel/blkdebug.txt`).
//!
//! A request makes *events* happen; an event can change the *state* (a number, 1 at first), wake up rules and stop the request at a
//! break point. A rule that is awake fails requests. Of QEMU's events those happen that a place for bytes can see: [`Event`] lists
//! them; rules about others are taken and never wake.
//!
//! **Invariant.** Without a rule or break point that applies, requests go through as they are.

use crate::{Error, HostExtent, IoFuture, Limits, Operation, Result, Store, ZeroMode};
use layout::{HostOffset, HostRange};
use ring::Iov;
use ring::sync::Event as Signal;
use std::cell::{Cell, RefCell};
use std::io;
use std::rc::Rc;

/// The unit of a rule's sector, in bytes.
const SECTOR: u64 = 512;

/// What a request makes happen.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Event {
    /// Before a read (`read_aio`).
    Read,
    /// Before a write (`write_aio`).
    Write,
    /// Before a write, after [`Event::Write`] (`pwritev`).
    Put,
    /// Before zeroing (`pwritev_zero`).
    Zero,
    /// After a write or zeroing (`pwritev_done`).
    Done,
    /// Before a flush (`flush_to_os`).
    FlushToSystem,
    /// Before a flush, after [`Event::FlushToSystem`] (`flush_to_disk`).
    FlushToDisk,
    /// One of QEMU's that never happens here.
    Other,
}

/// QEMU's names of events that never happen here: they are about the insides of its formats.
const OTHERS: [&str; 40] = [
    "l1_update",
    "l1_grow_alloc_table",
    "l1_grow_write_table",
    "l1_grow_activate_table",
    "l2_load",
    "l2_update",
    "l2_update_compressed",
    "l2_alloc_cow_read",
    "l2_alloc_write",
    "read_backing_aio",
    "read_compressed",
    "write_compressed",
    "vmstate_load",
    "vmstate_save",
    "cow_read",
    "cow_write",
    "reftable_load",
    "reftable_grow",
    "reftable_update",
    "refblock_load",
    "refblock_update",
    "refblock_update_part",
    "refblock_alloc",
    "refblock_alloc_hookup",
    "refblock_alloc_write",
    "refblock_alloc_write_blocks",
    "refblock_alloc_write_table",
    "refblock_alloc_switch_table",
    "cluster_alloc",
    "cluster_alloc_bytes",
    "cluster_free",
    "pwritev_rmw_head",
    "pwritev_rmw_after_head",
    "pwritev_rmw_tail",
    "pwritev_rmw_after_tail",
    "empty_image_prepare",
    "l1_shrink_write_table",
    "l1_shrink_free_l2_clusters",
    "cor_write",
    "cluster_alloc_space",
];

impl Event {
    /// From QEMU's name of it.
    pub fn from_name(name: &str) -> Option<Self> {
        Some(match name {
            "read_aio" => Self::Read,
            "write_aio" => Self::Write,
            "pwritev" => Self::Put,
            "pwritev_zero" => Self::Zero,
            "pwritev_done" => Self::Done,
            "flush_to_os" => Self::FlushToSystem,
            "flush_to_disk" => Self::FlushToDisk,
            _ if OTHERS.contains(&name) => Self::Other,
            _ => return None,
        })
    }
}

/// Requests that fail.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct InjectError {
    /// What wakes the rule; `None`: it is always awake.
    pub event: Option<Event>,
    /// In which state it wakes; `None`: in any.
    pub state: Option<u32>,
    /// Which operations fail; if empty, all but asking what is stored where, as with QEMU.
    pub operations: Vec<Operation>,
    /// The error's number.
    pub errno: i32,
    /// Only requests that touch this sector (of 512 bytes) fail.
    pub sector: Option<u64>,
    /// Only the first fails; then the rule is gone.
    pub once: bool,
}

/// A change of the state.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SetState {
    /// What causes it.
    pub event: Event,
    /// In which state; `None`: in any.
    pub state: Option<u32>,
    /// The state afterwards.
    pub new_state: u32,
}

/// What a store is to do.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Rules {
    /// Failures.
    pub inject_error: Vec<InjectError>,
    /// Changes of the state.
    pub set_state: Vec<SetState>,
    /// Requests not aligned to this (bytes, a power of two) are read, changed and written back by whoever is above.
    pub align: Option<u32>,
}

struct Injection {
    rule: InjectError,
    awake: bool,
}

/// What hears that a request has stopped (true) or goes on (false), under which tag.
pub type Listener = dyn Fn(&str, bool);

struct BreakPoint {
    event: Event,
    tag: String,
}

/// A store with [`Rules`].
pub struct DebugStore {
    inner: Rc<dyn Store>,
    state: Cell<u32>,
    align: Option<u32>,
    injections: RefCell<Vec<Injection>>,
    set_state: Vec<SetState>,
    breaks: RefCell<Vec<BreakPoint>>,
    /// Tags of requests that have stopped, in the order in which they did.
    stopped: RefCell<Vec<String>>,
    /// A request stopped, or one goes on.
    changed: Signal,
    /// Hears of both.
    listener: RefCell<Option<Rc<Listener>>>,
}

impl DebugStore {
    /// `inner`, with these rules.
    pub fn new(inner: Rc<dyn Store>, rules: Rules) -> Rc<Self> {
        let awake = |rule: InjectError| Injection { awake: rule.event.is_none(), rule };
        Rc::new(Self {
            inner,
            state: Cell::new(1),
            align: rules.align,
            injections: RefCell::new(rules.inject_error.into_iter().map(awake).collect()),
            set_state: rules.set_state,
            breaks: RefCell::default(),
            stopped: RefCell::default(),
            changed: Signal::new(),
            listener: RefCell::default(),
        })
    }

    /// Tells `listener` of requests that stop and go on.
    pub fn listen(&self, listener: Rc<Listener>) {
        *self.listener.borrow_mut() = Some(listener);
    }

    fn tell(&self, tag: &str, stopped: bool) {
        let listener = self.listener.borrow().clone();
        if let Some(listener) = listener {
            listener(tag, stopped);
        }
    }

    /// The next request at which `event` happens stops, under the name `tag`.
    pub fn break_at(&self, event: Event, tag: &str) {
        self.breaks.borrow_mut().push(BreakPoint { event, tag: tag.to_owned() });
    }

    /// Lets the request that stopped under `tag` go on. Says whether there was one.
    pub fn resume(&self, tag: &str) -> bool {
        let mut stopped = self.stopped.borrow_mut();
        let Some(at) = stopped.iter().position(|other| other == tag) else { return false };
        stopped.remove(at);
        drop(stopped);
        self.tell(tag, false);
        self.changed.notify_all();
        true
    }

    /// Takes break points called `tag` away; a request that has stopped there goes on. Says whether there was one.
    pub fn remove_break(&self, tag: &str) -> bool {
        let mut breaks = self.breaks.borrow_mut();
        let before = breaks.len();
        breaks.retain(|point| point.tag != tag);
        let found = breaks.len() < before;
        drop(breaks);
        self.resume(tag) || found
    }

    /// Whether a request has stopped under `tag`.
    pub fn is_stopped(&self, tag: &str) -> bool {
        self.stopped.borrow().iter().any(|other| other == tag)
    }

    /// Waits until a request has stopped under `tag`.
    pub async fn wait_stopped(&self, tag: &str) {
        loop {
            let changed = self.changed.wait();
            if self.is_stopped(tag) {
                return;
            }
            changed.await;
        }
    }

    /// `event` happens.
    async fn happen(&self, event: Event) {
        let state = self.state.get();
        let applies = |wanted: Option<u32>| wanted.is_none_or(|wanted| wanted == state);
        for injection in self.injections.borrow_mut().iter_mut() {
            injection.awake |= injection.rule.event == Some(event) && applies(injection.rule.state);
        }
        if let Some(change) = self.set_state.iter().rfind(|change| change.event == event && applies(change.state)) {
            self.state.set(change.new_state);
        }
        let tag = {
            let mut breaks = self.breaks.borrow_mut();
            let at = breaks.iter().position(|point| point.event == event);
            at.map(|at| breaks.remove(at).tag)
        };
        let Some(tag) = tag else { return };
        self.stopped.borrow_mut().push(tag.clone());
        self.tell(&tag, true);
        self.changed.notify_all();
        loop {
            let changed = self.changed.wait();
            if !self.is_stopped(&tag) {
                return;
            }
            changed.await;
        }
    }

    /// Fails if a rule that is awake says so.
    fn check(&self, operation: Operation, range: Option<HostRange>) -> Result<()> {
        let mut injections = self.injections.borrow_mut();
        let hit = injections.iter().position(|Injection { rule, awake }| {
            let touched = rule.sector.is_none_or(|sector| {
                let sector = HostOffset(sector.saturating_mul(SECTOR)).range(SECTOR);
                range.is_some_and(|range| range.overlaps(sector))
            });
            let meant = if rule.operations.is_empty() {
                operation != Operation::Extent
            } else {
                rule.operations.contains(&operation)
            };
            *awake && touched && meant
        });
        let Some(at) = hit else { return Ok(()) };
        let errno = injections[at].rule.errno;
        if injections[at].rule.once {
            injections.remove(at);
        }
        // A rule about no error lets requests through that a later rule would fail.
        if errno == 0 {
            return Ok(());
        }
        Err(Error::from_io(operation, self.inner.name(), range, io::Error::from_raw_os_error(errno)))
    }
}

impl Store for DebugStore {
    fn name(&self) -> &str {
        self.inner.name()
    }

    fn size(&self) -> u64 {
        self.inner.size()
    }

    fn limits(&self) -> Limits {
        let limits = self.inner.limits();
        Limits { offset_align: limits.offset_align.max(self.align.unwrap_or(1)), ..limits }
    }

    fn read(&self, at: HostOffset, into: Iov) -> IoFuture<'_, ()> {
        Box::pin(async move {
            self.happen(Event::Read).await;
            self.check(Operation::Read, Some(at.range(into.len() as u64)))?;
            self.inner.read(at, into).await
        })
    }

    fn write(&self, at: HostOffset, from: Iov, fua: bool) -> IoFuture<'_, ()> {
        Box::pin(async move {
            self.happen(Event::Write).await;
            self.happen(Event::Put).await;
            self.check(Operation::Write, Some(at.range(from.len() as u64)))?;
            self.inner.write(at, from, fua).await?;
            self.happen(Event::Done).await;
            Ok(())
        })
    }

    fn flush(&self) -> IoFuture<'_, ()> {
        Box::pin(async move {
            self.happen(Event::FlushToSystem).await;
            self.happen(Event::FlushToDisk).await;
            self.check(Operation::Flush, None)?;
            self.inner.flush().await
        })
    }

    fn zero(&self, range: HostRange, mode: ZeroMode) -> IoFuture<'_, ()> {
        Box::pin(async move {
            self.happen(Event::Zero).await;
            self.check(Operation::Zero, Some(range))?;
            self.inner.zero(range, mode).await?;
            self.happen(Event::Done).await;
            Ok(())
        })
    }

    fn set_size(&self, size: u64) -> IoFuture<'_, ()> {
        self.inner.set_size(size)
    }

    fn allocate(&self, range: HostRange) -> IoFuture<'_, ()> {
        self.inner.allocate(range)
    }

    fn extent(&self, range: HostRange) -> IoFuture<'_, HostExtent> {
        Box::pin(async move {
            self.check(Operation::Extent, Some(range))?;
            self.inner.extent(range).await
        })
    }

    fn close(&self) -> IoFuture<'_, ()> {
        self.inner.close()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ErrorKind;
    use crate::memory::MemoryStore;
    use ring::sim::Sim;

    fn rule(event: Option<Event>) -> InjectError {
        InjectError { event, state: None, operations: Vec::new(), errno: libc::EIO, sector: None, once: false }
    }

    fn with(inject_error: Vec<InjectError>, set_state: Vec<SetState>) -> Rc<DebugStore> {
        DebugStore::new(MemoryStore::new("m", 1 << 20), Rules { inject_error, set_state, align: None })
    }

    async fn read(store: &DebugStore, sector: u64) -> Result<()> {
        store.read(HostOffset(sector * 512), Iov::alloc(512)).await
    }

    #[test]
    fn a_rule_fails_what_it_is_about_once_or_always() {
        Sim::new(1).block_on(async {
            let once = InjectError { once: true, sector: Some(8), errno: libc::ENOSPC, ..rule(Some(Event::Read)) };
            let store = with(vec![once], Vec::new());
            read(&store, 7).await.unwrap();
            assert_eq!(read(&store, 8).await.unwrap_err().kind(), ErrorKind::NoSpace);
            read(&store, 8).await.unwrap();
            let store = with(vec![rule(Some(Event::FlushToDisk))], Vec::new());
            read(&store, 0).await.unwrap();
            assert!(store.flush().await.is_err() && store.flush().await.is_err());
            // As in QEMU, a rule that is awake fails everything, whatever woke it.
            assert!(read(&store, 0).await.is_err());
            let writes = InjectError { operations: vec![Operation::Write], ..rule(None) };
            let store = with(vec![writes], Vec::new());
            read(&store, 0).await.unwrap();
            assert!(store.write(HostOffset(0), Iov::zeroed(512), false).await.is_err());
        });
    }

    #[test]
    fn rules_wait_for_their_state() {
        Sim::new(1).block_on(async {
            let second = InjectError { state: Some(2), once: true, ..rule(Some(Event::Read)) };
            let step = SetState { event: Event::Read, state: Some(1), new_state: 2 };
            let store = with(vec![second], vec![step]);
            read(&store, 0).await.unwrap();
            assert!(read(&store, 0).await.is_err());
            read(&store, 0).await.unwrap();
        });
    }

    #[test]
    fn break_points_stop_a_request_until_it_is_resumed() {
        Sim::new(1).block_on(async {
            let store = with(Vec::new(), Vec::new());
            for remove in [false, true] {
                store.break_at(Event::Write, "A");
                let stopped = ring::spawn({
                    let store = Rc::clone(&store);
                    async move { store.write(HostOffset(0), Iov::zeroed(512), false).await }
                });
                store.wait_stopped("A").await;
                assert!(store.is_stopped("A") && !store.is_stopped("B") && !stopped.is_finished());
                read(&store, 0).await.unwrap();
                assert!(!store.resume("B"));
                assert!(if remove { store.remove_break("A") } else { store.resume("A") });
                stopped.await.unwrap();
            }
            assert!(!store.remove_break("A"));
        });
    }

    #[test]
    fn names_are_qemus() {
        for name in OTHERS {
            assert_eq!(Event::from_name(name), Some(Event::Other));
        }
        assert_eq!(Event::from_name("flush_to_disk"), Some(Event::FlushToDisk));
        assert_eq!(Event::from_name("tea_time"), None);
    }
}
