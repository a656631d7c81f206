//! Waiting among the tasks of one ring: no atomics, no locks, FIFO-fair, safe to drop at any point.

use std::rc::Rc;

/// Lets tasks wait until somebody notifies. A notification wakes those that wait at that moment.
#[derive(Clone, Default)]
pub struct Event {
    _todo: Rc<()>,
}

impl Event {
    /// Nobody waits yet.
    pub fn new() -> Self {
        Self::default()
    }

    /// Wakes everybody who waits now.
    pub fn notify_all(&self) {
        todo!()
    }

    /// Wakes the one who has waited longest.
    pub fn notify_one(&self) {
        todo!()
    }

    /// Waits for the next notification. It registers when called (not when first polled), so "check, then
    /// `let wait = event.wait();`, then await" loses no wake-up on one thread.
    pub fn wait(&self) -> impl Future<Output = ()> + use<> {
        async { todo!() }
    }
}

/// A counted budget (of requests, of bytes). FIFO-fair: a large request is not starved by small ones.
#[derive(Clone)]
pub struct Semaphore {
    _todo: Rc<()>,
}

/// Units taken from a [`Semaphore`]; given back when dropped.
pub struct Permit {
    _todo: Rc<()>,
}

impl Semaphore {
    /// A budget of `units`.
    pub fn new(units: usize) -> Self {
        let _ = units;
        todo!()
    }

    /// Takes `units` (at most the whole budget: more is clipped to it), waiting in line.
    pub async fn acquire(&self, units: usize) -> Permit {
        let _ = units;
        todo!()
    }

    /// Takes `units` if they are there now and nobody waits in line.
    pub fn try_acquire(&self, units: usize) -> Option<Permit> {
        let _ = units;
        todo!()
    }

    /// Units free now.
    pub fn available(&self) -> usize {
        todo!()
    }
}

/// An async mutual exclusion, FIFO-fair. Guards plain data across await points (rare: prefer no await in between).
pub struct Mutex<T> {
    _todo: T,
}

impl<T> Mutex<T> {
    /// An unlocked mutex.
    pub fn new(value: T) -> Self {
        Self { _todo: value }
    }

    /// Waits in line for the lock.
    pub async fn lock(&self) -> MutexGuard<'_, T> {
        todo!()
    }
}

/// Holds a [`Mutex`]; releases it when dropped.
pub struct MutexGuard<'a, T> {
    _todo: &'a Mutex<T>,
}

impl<T> std::ops::Deref for MutexGuard<'_, T> {
    type Target = T;
    fn deref(&self) -> &T {
        todo!()
    }
}

impl<T> std::ops::DerefMut for MutexGuard<'_, T> {
    fn deref_mut(&mut self) -> &mut T {
        todo!()
    }
}
