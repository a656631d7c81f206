//! Waiting among the tasks of one ring: no atomics, no locks, FIFO-fair, safe to drop at any point.
//!
//! **Invariants.** Waiters stand in line by a ticket that only grows. Whoever leaves the line (woken, granted or
//! dropped) is removed from it at once. A grant to a waiter that is dropped before it could use it goes to the next.
//! Wakers are called and dropped only while no borrow of the line is held, since both may run anything.

use std::cell::{Ref, RefCell, RefMut};
use std::collections::{BTreeMap, BTreeSet};
use std::future::Future;
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll, Waker};

/// Lets tasks wait until somebody notifies. A notification wakes those that wait at that moment.
#[derive(Clone, Default)]
pub struct Event {
    line: Rc<RefCell<EventLine>>,
}

#[derive(Default)]
struct EventLine {
    next: u64,
    waiting: BTreeMap<u64, Option<Waker>>,
    /// Those that `notify_one` chose and that have not noticed yet.
    chosen: BTreeSet<u64>,
}

impl Event {
    /// Nobody waits yet.
    pub fn new() -> Self {
        Self::default()
    }

    /// Wakes everybody who waits now.
    pub fn notify_all(&self) {
        let waiting = std::mem::take(&mut self.line.borrow_mut().waiting);
        waiting.into_values().flatten().for_each(Waker::wake);
    }

    /// Wakes the one who has waited longest. If that one is dropped before it runs, the next is woken instead.
    pub fn notify_one(&self) {
        let mut line = self.line.borrow_mut();
        let Some((ticket, waker)) = line.waiting.pop_first() else { return };
        line.chosen.insert(ticket);
        drop(line);
        if let Some(waker) = waker {
            waker.wake();
        }
    }

    /// Waits for the next notification. It registers when called (not when first polled), so "check, then
    /// `let wait = event.wait();`, then await" loses no wake-up on one thread.
    pub fn wait(&self) -> impl Future<Output = ()> + use<> {
        let mut line = self.line.borrow_mut();
        let ticket = line.next;
        line.next += 1;
        line.waiting.insert(ticket, None);
        EventWait { event: self.clone(), ticket, done: false }
    }

    /// How many wait now.
    pub fn waiting(&self) -> usize {
        self.line.borrow().waiting.len()
    }
}

struct EventWait {
    event: Event,
    ticket: u64,
    done: bool,
}

impl Future for EventWait {
    type Output = ();
    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        let mut line = self.event.line.borrow_mut();
        let Some(waker) = line.waiting.get_mut(&self.ticket) else {
            line.chosen.remove(&self.ticket);
            drop(line);
            self.done = true;
            return Poll::Ready(());
        };
        let old = replace(waker, cx);
        drop(line);
        drop(old);
        Poll::Pending
    }
}

impl Drop for EventWait {
    fn drop(&mut self) {
        if self.done {
            return;
        }
        let mut line = self.event.line.borrow_mut();
        let old = line.waiting.remove(&self.ticket);
        let pass_on = line.chosen.remove(&self.ticket);
        drop(line);
        drop(old);
        if pass_on {
            self.event.notify_one();
        }
    }
}

/// Puts this task's waker in place unless one that wakes it is there; hands back the old one, to be dropped outside of
/// any borrow.
fn replace(place: &mut Option<Waker>, cx: &Context<'_>) -> Option<Waker> {
    match place {
        Some(waker) if waker.will_wake(cx.waker()) => None,
        _ => place.replace(cx.waker().clone()),
    }
}

/// A counted budget (of requests, of bytes). FIFO-fair: a large request is not starved by small ones.
#[derive(Clone)]
pub struct Semaphore {
    line: Rc<RefCell<Line>>,
}

struct Line {
    total: usize,
    free: usize,
    next: u64,
    waiting: BTreeMap<u64, (usize, Option<Waker>)>,
}

/// Units taken from a [`Semaphore`]; given back when dropped.
#[must_use = "the units go back as soon as the permit is dropped"]
pub struct Permit {
    semaphore: Semaphore,
    units: usize,
}

impl Permit {
    /// The units it holds.
    pub fn units(&self) -> usize {
        self.units
    }
}

impl Drop for Permit {
    fn drop(&mut self) {
        self.semaphore.release(self.units);
    }
}

impl Semaphore {
    /// A budget of `units`.
    pub fn new(units: usize) -> Self {
        let line = Line { total: units, free: units, next: 0, waiting: BTreeMap::new() };
        Self { line: Rc::new(RefCell::new(line)) }
    }

    /// Takes `units` (at most the whole budget: more is clipped to it), waiting in line.
    pub async fn acquire(&self, units: usize) -> Permit {
        let units = units.min(self.line.borrow().total);
        match self.try_acquire(units) {
            Some(permit) => permit,
            None => Acquire { semaphore: self.clone(), units, ticket: None, done: false }.await,
        }
    }

    /// Takes `units` if they are there now and nobody waits in line.
    pub fn try_acquire(&self, units: usize) -> Option<Permit> {
        let mut line = self.line.borrow_mut();
        let units = units.min(line.total);
        if !line.waiting.is_empty() || line.free < units {
            return None;
        }
        line.free -= units;
        Some(Permit { semaphore: self.clone(), units })
    }

    /// Units free now.
    pub fn available(&self) -> usize {
        self.line.borrow().free
    }

    fn release(&self, units: usize) {
        self.line.borrow_mut().free += units;
        self.grant();
    }

    /// Gives to the head of the line for as long as it can be served.
    fn grant(&self) {
        loop {
            let mut line = self.line.borrow_mut();
            let free = line.free;
            let Some(head) = line.waiting.first_entry() else { return };
            let units = head.get().0;
            if units > free {
                return;
            }
            let (_, waker) = head.remove();
            line.free -= units;
            drop(line);
            if let Some(waker) = waker {
                waker.wake();
            }
        }
    }
}

/// Waits in line. Once its ticket is no longer in the line, the units are its own.
struct Acquire {
    semaphore: Semaphore,
    units: usize,
    ticket: Option<u64>,
    done: bool,
}

impl Future for Acquire {
    type Output = Permit;
    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Permit> {
        let this = &mut *self;
        let mut line = this.semaphore.line.borrow_mut();
        let Some(ticket) = this.ticket else {
            let ticket = line.next;
            line.next += 1;
            line.waiting.insert(ticket, (this.units, Some(cx.waker().clone())));
            this.ticket = Some(ticket);
            drop(line);
            // Units may have come free since `acquire` looked.
            this.semaphore.grant();
            return Poll::Pending;
        };
        let Some((_, waker)) = line.waiting.get_mut(&ticket) else {
            drop(line);
            this.done = true;
            return Poll::Ready(Permit { semaphore: this.semaphore.clone(), units: this.units });
        };
        let old = replace(waker, cx);
        drop(line);
        drop(old);
        Poll::Pending
    }
}

impl Drop for Acquire {
    fn drop(&mut self) {
        let Some(ticket) = self.ticket.filter(|_| !self.done) else { return };
        let left = self.semaphore.line.borrow_mut().waiting.remove(&ticket);
        match left {
            // It may have held up smaller ones behind it.
            Some(waiter) => {
                drop(waiter);
                self.semaphore.grant();
            }
            None => self.semaphore.release(self.units),
        }
    }
}

/// An async mutual exclusion, FIFO-fair. Guards plain data across await points (rare: prefer no await in between).
pub struct Mutex<T> {
    turn: Semaphore,
    value: RefCell<T>,
}

impl<T> Mutex<T> {
    /// An unlocked mutex.
    pub fn new(value: T) -> Self {
        Self { turn: Semaphore::new(1), value: RefCell::new(value) }
    }

    /// Waits in line for the lock.
    pub async fn lock(&self) -> MutexGuard<'_, T> {
        let turn = self.turn.acquire(1).await;
        MutexGuard { value: self.value.borrow_mut(), _turn: turn }
    }

    /// Takes the lock if it is free and nobody waits in line.
    pub fn try_lock(&self) -> Option<MutexGuard<'_, T>> {
        let turn = self.turn.try_acquire(1)?;
        Some(MutexGuard { value: self.value.borrow_mut(), _turn: turn })
    }

    /// The value, if nobody holds the lock; for looking, without an await.
    pub fn peek(&self) -> Option<Ref<'_, T>> {
        self.value.try_borrow().ok()
    }
}

/// Holds a [`Mutex`]; releases it when dropped.
pub struct MutexGuard<'a, T> {
    // The order counts: the value is given up before the turn.
    value: RefMut<'a, T>,
    _turn: Permit,
}

impl<T> std::ops::Deref for MutexGuard<'_, T> {
    type Target = T;
    fn deref(&self) -> &T {
        &self.value
    }
}

impl<T> std::ops::DerefMut for MutexGuard<'_, T> {
    fn deref_mut(&mut self) -> &mut T {
        &mut self.value
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use futures_util::FutureExt;
    use std::cell::Cell;
    use std::pin::pin;
    use std::sync::Arc;
    use std::sync::atomic::{AtomicUsize, Ordering};
    use std::task::Wake;

    #[derive(Default)]
    struct Count(AtomicUsize);

    impl Wake for Count {
        fn wake(self: Arc<Self>) {
            self.0.fetch_add(1, Ordering::Relaxed);
        }
    }

    fn poll<F: Future>(future: Pin<&mut F>) -> Poll<F::Output> {
        future.poll(&mut Context::from_waker(Waker::noop()))
    }

    #[test]
    fn an_event_registers_when_called_and_wakes_those_who_wait_now() {
        let event = Event::new();
        let mut early = pin!(event.wait());
        event.notify_all();
        assert!(poll(early.as_mut()).is_ready(), "registered before its first poll");
        let mut late = pin!(event.wait());
        assert!(poll(late.as_mut()).is_pending(), "a notification does not outlive its moment");
        event.notify_all();
        assert!(poll(late.as_mut()).is_ready());
    }

    #[test]
    fn notify_one_takes_the_oldest_and_passes_on_when_it_is_dropped() {
        let event = Event::new();
        let first = event.wait();
        let mut second = pin!(event.wait());
        let mut third = pin!(event.wait());
        event.notify_one();
        assert!(poll(second.as_mut()).is_pending());
        drop(first);
        assert!(poll(second.as_mut()).is_ready(), "the grant went on");
        assert!(poll(third.as_mut()).is_pending());
        assert_eq!(event.waiting(), 1);
    }

    #[test]
    fn dropping_one_that_notify_all_woke_passes_nothing_on() {
        let event = Event::new();
        let first = event.wait();
        event.notify_all();
        let mut second = pin!(event.wait());
        drop(first);
        assert!(poll(second.as_mut()).is_pending());
    }

    #[test]
    fn a_changed_waker_is_the_one_that_is_called() {
        let event = Event::new();
        let mut wait = pin!(event.wait());
        let (old, new) = (Arc::new(Count::default()), Arc::new(Count::default()));
        assert!(wait.as_mut().poll(&mut Context::from_waker(&Waker::from(Arc::clone(&old)))).is_pending());
        assert!(wait.as_mut().poll(&mut Context::from_waker(&Waker::from(Arc::clone(&new)))).is_pending());
        event.notify_one();
        assert_eq!((old.0.load(Ordering::Relaxed), new.0.load(Ordering::Relaxed)), (0, 1));
    }

    #[test]
    fn a_large_request_is_not_starved_by_small_ones() {
        let semaphore = Semaphore::new(4);
        let one = semaphore.try_acquire(1).unwrap();
        let mut large = pin!(semaphore.acquire(4));
        assert!(poll(large.as_mut()).is_pending());
        assert!(semaphore.try_acquire(1).is_none(), "somebody waits, although 3 are free");
        let mut small = pin!(semaphore.acquire(1));
        assert!(poll(small.as_mut()).is_pending());
        drop(one);
        assert!(poll(small.as_mut()).is_pending());
        let Poll::Ready(all) = poll(large.as_mut()) else { panic!("its turn") };
        assert_eq!((all.units(), semaphore.available()), (4, 0));
        drop(all);
        assert!(poll(small.as_mut()).is_ready());
    }

    #[test]
    fn a_waiter_that_leaves_gives_way_and_gives_back() {
        let semaphore = Semaphore::new(2);
        let one = semaphore.try_acquire(1).unwrap();
        {
            let mut large = pin!(semaphore.acquire(2));
            assert!(poll(large.as_mut()).is_pending());
            let mut small = Box::pin(semaphore.acquire(1));
            assert!(poll(small.as_mut()).is_pending());
            // `large` leaves at the end of this block, `small` while granted.
            drop(one);
            assert_eq!(semaphore.available(), 0, "granted to the large one");
        }
        assert_eq!(semaphore.available(), 2);
        assert_eq!(semaphore.acquire(100).now_or_never().unwrap().units(), 2, "clipped to the budget");
        assert_eq!(semaphore.available(), 2);
    }

    #[test]
    fn a_mutex_passes_a_dropped_grant_on() {
        let mutex = Mutex::new(Cell::new(0));
        let held = mutex.try_lock().unwrap();
        assert!(mutex.peek().is_none());
        let mut first = Box::pin(mutex.lock());
        let mut second = pin!(mutex.lock());
        assert!(poll(first.as_mut()).is_pending());
        assert!(poll(second.as_mut()).is_pending());
        held.set(1);
        drop(held);
        assert!(poll(second.as_mut()).is_pending(), "the first in line has it");
        drop(first);
        let Poll::Ready(guard) = poll(second.as_mut()) else { panic!("passed on") };
        assert_eq!(guard.get(), 1);
    }
}
