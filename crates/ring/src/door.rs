//! The door of a ring: what comes from other threads stands behind it, and it knows whether the ring has to be woken.
//!
//! **Who wakes whom.** Everything that comes from outside stands behind one mutex, and so does the flag `asleep`. The
//! ring sets it, in the same critical section in which it finds nothing behind the door, right before it sleeps in the
//! kernel; whoever puts something there clears it and, if it was set, has to ring the bell that the sleeping ring waits on.
//! So no wake-up is lost, and a ring that is awake costs no system call. `pending` only spares the ring the lock while it
//! is awake and nothing came: a stale `false` is corrected by the locked look before it sleeps.
//!
//! The models below try every interleaving there is (`RUSTFLAGS="--cfg loom" cargo test -p headwater-ring --release
//! model`, which `cargo xtask test` runs). They fail, as they should, when the look before sleeping is left out, when it is
//! made in a critical section of its own, when nobody rings, or when closing tells nobody.

#[cfg(loom)]
use loom::sync::{
    Condvar, Mutex, MutexGuard,
    atomic::{AtomicBool, Ordering},
};
use std::sync::PoisonError;
#[cfg(not(loom))]
use std::sync::{
    Condvar, Mutex, MutexGuard,
    atomic::{AtomicBool, Ordering},
};

/// What can stand behind a door.
pub(crate) trait Holds: Default {
    /// Nothing is there.
    fn is_empty(&self) -> bool;

    /// How much of it counts against the door's capacity.
    fn bounded(&self) -> usize;
}

/// See the module.
pub(crate) struct Door<T> {
    state: Mutex<State<T>>,
    pending: AtomicBool,
    /// Told when something has been taken out, or the door was closed.
    space: Condvar,
    capacity: usize,
}

#[derive(Default)]
struct State<T> {
    held: T,
    asleep: bool,
    closed: bool,
}

/// Whether the ring sleeps and its bell has to be rung.
#[must_use = "a sleeping ring has to be woken"]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Wake(pub(crate) bool);

impl<T: Holds> Door<T> {
    /// For `capacity` bounded items, at least one.
    pub(crate) fn new(capacity: usize) -> Self {
        let state = Mutex::new(State::default());
        Self { state, pending: AtomicBool::new(false), space: Condvar::new(), capacity: capacity.max(1) }
    }

    fn lock(&self) -> MutexGuard<'_, State<T>> {
        // Nothing that can panic runs while the lock is held (the allocator aborts).
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Puts something behind the door, past its capacity if need be.
    pub(crate) fn put(&self, what: impl FnOnce(&mut T)) -> Wake {
        self.put_locked(self.lock(), what)
    }

    /// Puts something behind the door; if `waits`, only when there is room. `None`, and nothing done, once it is closed.
    pub(crate) fn put_if_open(&self, waits: bool, what: impl FnOnce(&mut T)) -> Option<Wake> {
        let mut state = self.lock();
        while waits && state.held.bounded() >= self.capacity && !state.closed {
            state = self.space.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        if state.closed {
            return None;
        }
        Some(self.put_locked(state, what))
    }

    fn put_locked(&self, mut state: MutexGuard<'_, State<T>>, what: impl FnOnce(&mut T)) -> Wake {
        what(&mut state.held);
        self.pending.store(true, Ordering::Relaxed);
        Wake(std::mem::take(&mut state.asleep))
    }

    /// Exchanges what is behind the door for `empty` (by the ring's thread).
    pub(crate) fn take(&self, empty: &mut T) {
        if !self.pending.load(Ordering::Relaxed) {
            return;
        }
        let mut state = self.lock();
        self.pending.store(false, Ordering::Relaxed);
        std::mem::swap(&mut state.held, empty);
        drop(state);
        if empty.bounded() > 0 {
            self.space.notify_all();
        }
    }

    /// Announces that the ring is about to sleep; `false` when something has come and it must not.
    pub(crate) fn prepare_sleep(&self) -> bool {
        let mut state = self.lock();
        state.asleep = state.held.is_empty();
        state.asleep
    }

    /// The ring is awake again.
    pub(crate) fn woke(&self) {
        self.lock().asleep = false;
    }

    /// Nobody waits for room any more, and what is bounded is refused. Returns what `leaves` takes out, to be dropped
    /// outside of the lock.
    pub(crate) fn close<R>(&self, leaves: impl FnOnce(&mut T) -> R) -> R {
        let mut state = self.lock();
        state.closed = true;
        let left = leaves(&mut state.held);
        drop(state);
        self.space.notify_all();
        left
    }
}

#[cfg(all(test, loom))]
mod model {
    use super::*;
    use loom::sync::{Arc, Notify};
    use loom::thread;

    impl Holds for Vec<u8> {
        fn is_empty(&self) -> bool {
            Vec::is_empty(self)
        }

        fn bounded(&self) -> usize {
            self.len()
        }
    }

    struct Ring {
        door: Door<Vec<u8>>,
        /// The eventfd: what was written before the ring waits wakes it all the same.
        bell: Notify,
    }

    impl Ring {
        fn new(capacity: usize) -> Arc<Self> {
            Arc::new(Self { door: Door::new(capacity), bell: Notify::new() })
        }

        fn rung(&self, wake: Option<Wake>) {
            if wake == Some(Wake(true)) {
                self.bell.notify();
            }
        }

        /// Runs as a ring does until `count` items have come. A lost wake-up is a deadlock, which loom tells.
        fn run(&self, count: usize) -> Vec<u8> {
            let mut all = Vec::new();
            loop {
                let mut taken = Vec::new();
                self.door.take(&mut taken);
                all.append(&mut taken);
                if all.len() >= count {
                    return all;
                }
                if self.door.prepare_sleep() {
                    self.bell.wait();
                    self.door.woke();
                }
            }
        }
    }

    #[test]
    fn model_no_wake_up_is_lost() {
        loom::model(|| {
            let ring = Ring::new(8);
            let others: Vec<_> = (1..=2)
                .map(|item| {
                    let ring = ring.clone();
                    thread::spawn(move || ring.rung(Some(ring.door.put(|held| held.push(item)))))
                })
                .collect();
            let mut all = ring.run(2);
            all.sort_unstable();
            assert_eq!(all, [1, 2]);
            others.into_iter().for_each(|other| other.join().unwrap());
        });
    }

    #[test]
    fn model_who_waits_for_room_gets_it_in_order() {
        loom::model(|| {
            let ring = Ring::new(1);
            let other = {
                let ring = ring.clone();
                thread::spawn(move || {
                    for item in 1..=2 {
                        let wake = ring.door.put_if_open(true, |held| held.push(item));
                        assert!(wake.is_some());
                        ring.rung(wake);
                    }
                })
            };
            assert_eq!(ring.run(2), [1, 2]);
            other.join().unwrap();
        });
    }

    #[test]
    fn model_closing_ends_every_wait() {
        loom::model(|| {
            let ring = Ring::new(1);
            let other = {
                let ring = ring.clone();
                thread::spawn(move || {
                    let first = ring.door.put_if_open(true, |held| held.push(1)).is_some();
                    let second = ring.door.put_if_open(true, |held| held.push(2)).is_some();
                    usize::from(first) + usize::from(second)
                })
            };
            let left = ring.door.close(std::mem::take);
            // What was put before the close is what it took; nothing after it got in.
            assert_eq!(other.join().unwrap(), left.len());
        });
    }
}
