//! What one connection may have under way.
//!
//! **Invariant.** A request holds a [`Ticket`] from before its payload is received until its reply has been handed to the
//! kernel (or given up), so that a connection never holds more than [`MAX_REQUESTS`] and [`MAX_BYTES`], whether the disk is
//! slow, or the client floods, or it does not read its replies. Whoever is over the limit waits unread in the socket.

use ring::sync::Event;
use std::cell::Cell;
use std::rc::Rc;

/// Requests of one connection under way at once. Kernel clients send 128 at most, libnbd 64.
pub(super) const MAX_REQUESTS: usize = 128;

/// Bytes that the requests of one connection move at once: two of the greatest payloads.
pub(super) const MAX_BYTES: usize = 64 << 20;

/// Counts one connection's requests.
pub(super) struct Flight {
    requests: Cell<usize>,
    bytes: Cell<usize>,
    /// Those not replied to yet.
    executing: Cell<usize>,
    closed: Cell<bool>,
    waiting: Cell<bool>,
    changed: Event,
}

impl Flight {
    pub(super) fn new() -> Rc<Self> {
        Rc::new(Self {
            requests: Cell::new(0),
            bytes: Cell::new(0),
            executing: Cell::new(0),
            closed: Cell::new(false),
            waiting: Cell::new(false),
            changed: Event::new(),
        })
    }

    /// Waits for room for one request that moves `bytes` (at most [`MAX_BYTES`]); `None` once closed.
    pub(super) async fn enter(self: &Rc<Self>, bytes: usize) -> Option<Ticket> {
        let room = |flight: &Self| flight.requests.get() < MAX_REQUESTS && flight.bytes.get() + bytes <= MAX_BYTES;
        self.until(|flight| flight.closed.get() || room(flight)).await;
        (!self.closed.get()).then(|| self.count(bytes))
    }

    /// For a request that is refused since this is closed: there are no more of them than one buffer holds.
    pub(super) fn enter_closed(self: &Rc<Self>) -> Ticket {
        debug_assert!(self.closed.get());
        self.count(0)
    }

    /// Lets no more requests in.
    pub(super) fn close(&self) {
        self.closed.set(true);
        self.notify();
    }

    /// Whether no more requests are let in.
    pub(super) fn is_closed(&self) -> bool {
        self.closed.get()
    }

    fn count(self: &Rc<Self>, bytes: usize) -> Ticket {
        self.requests.set(self.requests.get() + 1);
        self.bytes.set(self.bytes.get() + bytes);
        self.executing.set(self.executing.get() + 1);
        Ticket { flight: Rc::clone(self), bytes, executing: true }
    }

    /// Waits until every request has its reply queued.
    pub(super) async fn executed(&self) {
        self.until(|flight| flight.executing.get() == 0).await;
    }

    /// Waits until every reply has been sent.
    pub(super) async fn drained(&self) {
        self.until(|flight| flight.requests.get() == 0).await;
    }

    async fn until(&self, reached: impl Fn(&Self) -> bool) {
        while !reached(self) {
            self.waiting.set(true);
            self.changed.wait().await;
        }
    }

    fn notify(&self) {
        if self.waiting.replace(false) {
            self.changed.notify_all();
        }
    }
}

/// A request's place in a [`Flight`], given back when dropped.
pub(super) struct Ticket {
    flight: Rc<Flight>,
    bytes: usize,
    executing: bool,
}

impl Ticket {
    /// The reply is queued; only its sending is left.
    pub(super) fn executed(&mut self) {
        if std::mem::take(&mut self.executing) {
            self.flight.executing.set(self.flight.executing.get() - 1);
            self.flight.notify();
        }
    }
}

impl Drop for Ticket {
    fn drop(&mut self) {
        self.executed();
        self.flight.requests.set(self.flight.requests.get() - 1);
        self.flight.bytes.set(self.flight.bytes.get() - self.bytes);
        self.flight.notify();
    }
}
