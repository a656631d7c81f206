//! One virtqueue on the shard: takes what the driver makes available, gives it back when it is done.
//!
//! # Invariants
//! * A head is taken at most once at a time, and at most as many as the queue has entries: what is in flight is bounded by
//!   the queue, whatever the driver writes.
//! * Whenever a queue begins or goes on to be served its available ring is looked at once, kick or no kick; from then on the
//!   ring looks there itself, until it sleeps; and after the last look notifications are on. No kick is lost, and a busy
//!   driver hardly ever kicks.
//! * What was taken is given back in the ring it came from, or (after [`Vring::stop`] with its memory gone) not at all.
//! * A chain whose end is unknown breaks the queue: what is in flight ends as usual, nothing more is taken until the front
//!   end stops the queue and starts it anew.

use super::chain::Chain;
use super::config::{Features, MAX_QUEUE_SIZE};
use super::inflight::{Region as InflightRegion, Tracker};
use super::ledger::Ledger;
use super::mailbox::Addresses;
use super::memory::{GuestMap, Memory};
use super::request::{Request, Status, Terms, Work};
use disk::Disk;
use ring::Lookout;
use ring::sync::Event;
use smallvec::SmallVec;
use std::cell::{Cell, RefCell};
use std::fmt;
use std::os::fd::OwnedFd;
use std::rc::Rc;
use std::sync::atomic::Ordering;
use virtio_bindings::virtio_ring::VRING_AVAIL_F_NO_INTERRUPT;
use virtio_queue::{Queue, QueueOwnedT, QueueT};
use vm_memory::{Bytes, GuestAddress};

/// What a queue serves.
pub(super) struct Target {
    /// The disk.
    pub disk: Rc<Disk>,
    /// Nothing may be written.
    pub read_only: bool,
    /// Whatever is written is durable when it completes.
    pub write_through: bool,
    /// What the guest reads as the serial.
    pub serial: String,
    /// Whether answers hang on this process, for the front end to keep.
    pub ledger: RefCell<Option<Ledger>>,
    /// A server before this one was killed with answered writes that are gone now: nothing may be promised any more.
    pub lost: Cell<bool>,
}

impl Target {
    /// Before answers are given, and when tables have become durable.
    pub(super) fn note(&self) {
        if let Some(ledger) = &*self.ledger.borrow()
            && !self.lost.get()
        {
            ledger.note(self.disk.has_unsettled_writes());
        }
    }
}

/// One queue.
pub(super) struct Vring {
    index: u16,
    target: Rc<Target>,
    state: RefCell<State>,
    /// Notified whenever the last running request has ended.
    idle: Event,
}

/// Why a queue cannot be served any more.
struct Broken(String);

impl<E: fmt::Display> From<E> for Broken {
    fn from(error: E) -> Self {
        Self(error.to_string())
    }
}

struct State {
    features: Features,
    map: Option<Rc<GuestMap>>,
    inflight: Option<InflightRegion>,
    addresses: Option<Addresses>,
    /// `addresses` are found in `map`, and `ring` is set to where.
    placed: bool,
    ring: Queue,
    /// Where the available ring goes on when the queue starts.
    base: u16,
    kicked: bool,
    enabled: Option<bool>,
    /// The ring's indices are in use; false until the queue is first served, and after a stop.
    started: bool,
    broken: bool,
    call: Option<OwnedFd>,
    err: Option<OwnedFd>,
    tracker: Option<Tracker>,
    /// Which heads are taken.
    taken: Vec<bool>,
    /// Requests that have not ended.
    running: u16,
    /// Heads of requests that have ended, and the bytes written; not in the used ring yet.
    done: Vec<(u16, u32)>,
    /// A task that gives back what is done is on its way.
    publishing: bool,
    /// The ring looks here by itself, and notifications are off.
    watched: bool,
    /// The available ring was left with something in it because everything is taken.
    starved: bool,
}

impl State {
    fn new() -> Self {
        Self {
            features: Features::default(),
            map: None,
            inflight: None,
            addresses: None,
            placed: false,
            // A constant power of two is what the crate wants.
            ring: Queue::new(MAX_QUEUE_SIZE).unwrap_or_default(),
            base: 0,
            kicked: false,
            enabled: None,
            started: false,
            broken: false,
            call: None,
            err: None,
            tracker: None,
            taken: vec![false; usize::from(MAX_QUEUE_SIZE)],
            running: 0,
            done: Vec::new(),
            publishing: false,
            watched: false,
            starved: false,
        }
    }

    /// Whether the queue is to be served.
    fn live(&self) -> bool {
        self.kicked && self.placed && !self.broken && self.enabled.unwrap_or(!self.features.protocol())
    }

    /// Finds the ring's parts in the guest's memory.
    fn place(&mut self) {
        self.placed = false;
        let (Some(at), Some(map)) = (self.addresses, &self.map) else { return };
        let size = u64::from(self.ring.size());
        let found = (
            map.guest_address(at.descriptors, 16 * size),
            map.guest_address(at.available, 6 + 2 * size),
            map.guest_address(at.used, 6 + 8 * size),
        );
        if let (Some(descriptors), Some(available), Some(used)) = found {
            self.placed = self.ring.try_set_desc_table_address(descriptors).is_ok()
                && self.ring.try_set_avail_ring_address(available).is_ok()
                && self.ring.try_set_used_ring_address(used).is_ok();
            self.ring.set_ready(self.placed);
        }
    }

    /// Sets the ring's indices, and says which heads a server before this one has left in flight.
    fn start(&mut self, index: u16, memory: &Memory) -> Result<Vec<u16>, Broken> {
        let used = self.ring.used_idx(memory, Ordering::Acquire)?.0;
        self.ring.set_event_idx(self.features.event_idx());
        self.ring.set_next_used(used);
        self.tracker = self.inflight.as_ref().and_then(|region| region.queue(index, self.ring.size()));
        let left = match &self.tracker {
            Some(tracker) => tracker.recover(used)?,
            None => Vec::new(),
        };
        // Whatever was taken is in the used ring or in flight. Without a record of the latter the front end's word counts,
        // unless it is older than the used ring (requests of a lost connection that ended after it was lost).
        let behind = used.wrapping_sub(self.base) <= self.ring.size();
        let next = if self.tracker.is_some() || behind { used.wrapping_add(left.len() as u16) } else { self.base };
        self.ring.set_next_avail(next);
        self.started = true;
        Ok(left)
    }

    /// Takes `head`: checks its chain and marks it.
    fn take(&mut self, head: u16, map: &Rc<GuestMap>, terms: &Terms, again: bool) -> Result<Request, Broken> {
        let table = GuestAddress(self.ring.desc_table());
        let chain = Chain::follow(map.memory(), table, self.ring.size(), head, self.features.indirect())?;
        let request = Request::parse(&chain, map, terms).map_err(|_| Broken("a chain without a status byte".into()))?;
        let taken = &mut self.taken[usize::from(head)];
        if std::mem::replace(taken, true) {
            return Err(Broken(format!("head {head} is available twice")));
        }
        if let Some(tracker) = &self.tracker
            && !again
        {
            tracker.begin(head);
        }
        self.running += 1;
        Ok(request)
    }

    /// How many heads may be taken.
    fn room(&self) -> usize {
        usize::from(self.ring.size() - self.running) - self.done.len()
    }

    /// The heads to take now: at most as many as there is room for. Notifications are off afterwards.
    fn available(&mut self, memory: &Memory) -> Result<SmallVec<[u16; 64]>, Broken> {
        let room = self.room();
        if room == 0 {
            self.starved = true;
            return Ok(SmallVec::new());
        }
        self.ring.disable_notification(memory)?;
        Ok(self.ring.iter(memory)?.take(room).map(|chain| chain.head_index()).collect())
    }

    /// Gives back what is done. Says whether the driver wants to hear of it.
    fn publish(&mut self, memory: &Memory) -> Result<bool, Broken> {
        for (head, len) in std::mem::take(&mut self.done) {
            self.taken[usize::from(head)] = false;
            if let Some(tracker) = &self.tracker {
                tracker.publish(head);
            }
            self.ring.add_used(memory, head, len)?;
            if let Some(tracker) = &self.tracker {
                tracker.end(head, self.ring.next_used());
            }
        }
        // Asked in either mode: it has the barrier between the used ring and what the driver says.
        let wanted = self.ring.needs_notification(memory)?;
        if self.features.event_idx() {
            return Ok(wanted);
        }
        let flags: u16 = memory.load(GuestAddress(self.ring.avail_ring()), Ordering::Relaxed)?;
        Ok(u16::from_le(flags) & VRING_AVAIL_F_NO_INTERRUPT as u16 == 0)
    }

    fn notify(&self) {
        signal(self.call.as_ref());
    }
}

/// Rings an eventfd. It fails only when it is full (then the other side has been told) or closed (then nobody listens).
fn signal(fd: Option<&OwnedFd>) {
    if let Some(fd) = fd {
        let _ = rustix::io::write(fd, &1u64.to_ne_bytes());
    }
}

impl Vring {
    /// A stopped queue.
    pub(super) fn new(index: u16, target: Rc<Target>) -> Rc<Self> {
        Rc::new(Self { index, target, state: RefCell::new(State::new()), idle: Event::new() })
    }

    /// What was negotiated.
    pub(super) fn set_features(self: &Rc<Self>, features: Features) {
        {
            let mut state = self.state.borrow_mut();
            state.features = features;
            state.ring.set_event_idx(features.event_idx());
        }
        self.go_on();
    }

    /// The guest's memory from now on; what is in flight keeps the old one.
    pub(super) fn set_memory(self: &Rc<Self>, map: Option<Rc<GuestMap>>) {
        {
            let mut state = self.state.borrow_mut();
            state.map = map;
            state.place();
        }
        self.go_on();
    }

    /// Where to remember what is in flight, from the next start on.
    pub(super) fn set_inflight(&self, region: Option<InflightRegion>) {
        self.state.borrow_mut().inflight = region;
    }

    /// Sets the number of entries: a power of two, at most [`MAX_QUEUE_SIZE`].
    pub(super) fn set_size(&self, size: u16) -> Result<(), String> {
        let mut state = self.state.borrow_mut();
        if state.started {
            return Err("the queue has been started".into());
        }
        state.ring.try_set_size(size).map_err(|e| e.to_string())?;
        state.place();
        Ok(())
    }

    /// Says where the ring's parts are. They may lie in memory that is yet to come.
    pub(super) fn set_addresses(self: &Rc<Self>, addresses: Addresses) -> Result<(), String> {
        let aligned = addresses.descriptors.is_multiple_of(16)
            && addresses.available.is_multiple_of(2)
            && addresses.used.is_multiple_of(4);
        if !aligned {
            return Err("the ring's parts are not aligned".into());
        }
        {
            let mut state = self.state.borrow_mut();
            state.addresses = Some(addresses);
            state.place();
        }
        self.go_on();
        Ok(())
    }

    /// Sets where the available ring goes on.
    pub(super) fn set_base(&self, base: u16) -> Result<(), String> {
        let mut state = self.state.borrow_mut();
        if state.started {
            return Err("the queue has been started".into());
        }
        state.base = base;
        Ok(())
    }

    /// There is something now that the driver kicks: the queue may start.
    pub(super) fn set_kicked(self: &Rc<Self>) {
        self.state.borrow_mut().kicked = true;
        self.go_on();
    }

    /// What to ring when something is done. Rung once at once: what it replaces may have been rung in vain.
    pub(super) fn set_call(&self, call: Option<OwnedFd>) {
        let mut state = self.state.borrow_mut();
        state.call = call;
        if state.started {
            state.notify();
        }
    }

    /// What to ring when the queue breaks.
    pub(super) fn set_err(&self, err: Option<OwnedFd>) {
        self.state.borrow_mut().err = err;
    }

    /// Serve it, or hold it.
    pub(super) fn set_enabled(self: &Rc<Self>, enabled: Option<bool>) {
        self.state.borrow_mut().enabled = enabled;
        self.go_on();
    }

    /// Stops the queue: takes nothing more, waits until what is in flight has ended, gives it back. Returns where the
    /// available ring goes on. It starts again when it is kicked by something new.
    pub(super) async fn stop(self: &Rc<Self>) -> u16 {
        self.state.borrow_mut().kicked = false;
        loop {
            let idle = self.idle.wait();
            if self.state.borrow().running == 0 {
                break;
            }
            idle.await;
        }
        self.publish();
        let mut state = self.state.borrow_mut();
        // Left over only if the ring's memory is gone.
        for (head, _) in std::mem::take(&mut state.done) {
            state.taken[usize::from(head)] = false;
        }
        if state.started {
            state.base = state.ring.next_avail();
        }
        state.started = false;
        state.broken = false;
        state.starved = false;
        state.call = None;
        state.tracker = None;
        state.base
    }

    /// Forgets everything about a stopped queue.
    pub(super) fn reset(&self) {
        let mut state = self.state.borrow_mut();
        debug_assert!(!state.started && state.running == 0, "only a stopped queue is reset");
        let (publishing, watched) = (state.publishing, state.watched);
        *state = State { publishing, watched, ..State::new() };
    }

    /// Starts the queue if that is due, and looks at its available ring if it is to be served.
    fn go_on(self: &Rc<Self>) {
        if let Err(broken) = self.try_start() {
            self.broken(&broken);
        }
        self.publish();
        self.look();
    }

    fn try_start(self: &Rc<Self>) -> Result<(), Broken> {
        let mut state = self.state.borrow_mut();
        let Some(map) = state.map.clone().filter(|_| state.live() && !state.started) else { return Ok(()) };
        let left = state.start(self.index, map.memory())?;
        if !left.is_empty() {
            tracing::info!(
                disk = self.target.disk.name(),
                queue = self.index,
                requests = left.len(),
                "taking up again what was in flight"
            );
        }
        self.begin(&mut state, &map, &left, true)
    }

    /// Takes what is available, as far as there is room.
    pub(super) fn look(self: &Rc<Self>) {
        let mut state = self.state.borrow_mut();
        let Some(map) = state.map.clone().filter(|_| state.live() && state.started) else { return };
        // Ends: every round takes at least one head, and none is given back before this returns.
        let result = loop {
            match state.available(map.memory()) {
                Ok(heads) if heads.is_empty() => break Ok(()),
                Ok(heads) => {
                    if let Err(broken) = self.begin(&mut state, &map, &heads, false) {
                        break Err(broken);
                    }
                }
                Err(broken) => break Err(broken),
            }
        };
        let watched = std::mem::replace(&mut state.watched, true);
        drop(state);
        if !watched {
            ring::look_out(Rc::clone(self) as Rc<dyn Lookout>);
        }
        if let Err(broken) = result {
            self.broken(&broken);
        }
    }

    /// Begins the requests at `heads`, each as a task of its own.
    fn begin(self: &Rc<Self>, state: &mut State, map: &Rc<GuestMap>, heads: &[u16], again: bool) -> Result<(), Broken> {
        let Target { disk, read_only, write_through, .. } = &*self.target;
        let terms = Terms { features: state.features, size: disk.size(), read_only: *read_only };
        let durable = *write_through || !state.features.write_back();
        for &head in heads {
            let (mut work, answer) = state.take(head, map, &terms, again)?.split();
            if self.target.lost.get() && work.changes() {
                work = Work::Refuse(Status::IoError);
            }
            let this = Rc::clone(self);
            // Detached: the count of running requests is what a stop waits for.
            drop(ring::spawn(async move {
                let status = work.carry_out(&this.target.disk, &this.target.serial, durable).await;
                this.complete(head, answer.give(status));
            }));
        }
        Ok(())
    }

    /// A request has ended. What ends in the same turn of the ring is given back together, with one notification.
    fn complete(self: &Rc<Self>, head: u16, written: u32) {
        let mut state = self.state.borrow_mut();
        state.running -= 1;
        state.done.push((head, written));
        if state.running == 0 {
            drop(state);
            self.publish();
            self.idle.notify_all();
        } else if !state.publishing {
            state.publishing = true;
            drop(state);
            let this = Rc::clone(self);
            drop(ring::spawn(async move {
                this.state.borrow_mut().publishing = false;
                this.publish();
            }));
        }
    }

    fn publish(self: &Rc<Self>) {
        let mut state = self.state.borrow_mut();
        let Some(map) = state.map.clone().filter(|_| state.placed && !state.done.is_empty()) else { return };
        self.target.note();
        match state.publish(map.memory()) {
            Ok(true) => state.notify(),
            Ok(false) => {}
            Err(broken) => {
                drop(state);
                return self.broken(&broken);
            }
        }
        if std::mem::take(&mut state.starved) {
            drop(state);
            self.look();
        }
    }

    fn broken(&self, why: &Broken) {
        let mut state = self.state.borrow_mut();
        if !std::mem::replace(&mut state.broken, true) {
            let disk = self.target.disk.name();
            tracing::error!(
                disk,
                queue = self.index,
                why = why.0,
                "a virtqueue is broken: the guest must reset its device"
            );
            signal(state.err.as_ref());
        }
    }
}

impl Lookout for Vring {
    fn has_news(&self) -> bool {
        let Ok(state) = self.state.try_borrow() else { return false };
        let Some(map) = state.map.as_ref().filter(|_| state.live() && state.started && state.room() > 0) else {
            return false;
        };
        // What cannot be read is news, too: taking it says so.
        state.ring.avail_idx(map.memory(), Ordering::Acquire).map_or(true, |index| index.0 != state.ring.next_avail())
    }

    fn attend(self: Rc<Self>) {
        self.look();
    }

    fn rest(&self) -> bool {
        let mut state = self.state.borrow_mut();
        state.watched = false;
        let Some(map) = state.map.clone().filter(|_| state.live() && state.started) else { return false };
        match state.ring.enable_notification(map.memory()) {
            // Where everything is taken, giving something back looks again.
            Ok(true) if state.room() == 0 => state.starved = true,
            Ok(more) => state.watched = more,
            Err(error) => {
                drop(state);
                self.broken(&error.into());
                return false;
            }
        }
        state.watched
    }
}
