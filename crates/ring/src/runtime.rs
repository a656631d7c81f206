//! What a ring and a simulation share: the queue, the timers, the registry of tasks, and the loop that runs them.
//!
//! **Invariant.** No borrow of a [`Core`]'s cells is held while foreign code runs (a future, a waker, a drop of memory
//! or of a descriptor), since all of it may come back here.

use crate::executor::Backend;
use crate::inbox::{Collected, Inbox, admit};
use crate::lookout::Lookouts;
use crate::reactor::{Reactor, Wait};
use crate::sim::Chooser;
use crate::task::{self, Entry, JoinHandle, Outcome, Ready, Registry, RootWaker, report_panic};
use crate::time::{Instant, Timers};
use futures_util::FutureExt;
use std::cell::{Cell, RefCell};
use std::future::Future;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::pin::pin;
use std::rc::Rc;
use std::sync::Arc;
use std::task::{Context, Poll, Waker};

/// Polls between two visits to the reactor while there is always something to run: long enough to collect a batch of
/// operations for one system call, short enough to keep I/O and timers moving.
const BATCH: usize = 256;

/// Where operations go and time comes from.
pub(crate) enum Driver {
    Real(Reactor),
    Sim(Chooser),
}

/// One thread's executor.
pub(crate) struct Core {
    pub(crate) inbox: Arc<Inbox>,
    pub(crate) registry: RefCell<Registry>,
    pub(crate) timers: RefCell<Timers>,
    pub(crate) driver: Driver,
    /// Where work is looked for.
    pub(crate) lookouts: Lookouts,
    collected: RefCell<Collected>,
    /// Counts `block_on`s, so that a late wake of an earlier one's future means nothing to the next.
    roots: Cell<u64>,
    running: Cell<bool>,
}

thread_local! {
    static CURRENT: RefCell<Option<Rc<Core>>> = const { RefCell::new(None) };
}

/// The running ring. Panics outside of one.
pub(crate) fn current() -> Rc<Core> {
    CURRENT
        .with(|current| current.borrow().clone())
        .expect("no ring runs on this thread: this is only possible inside Ring::block_on")
}

/// Whether a ring (or a simulation) runs on this thread: elsewhere nothing can be spawned.
pub fn is_running() -> bool {
    CURRENT.try_with(|current| current.borrow().is_some()).unwrap_or(false)
}

/// Makes `core` the running ring until the guard is dropped.
fn enter(core: &Rc<Core>) -> impl Drop + use<> {
    struct Leave(Option<Rc<Core>>);
    impl Drop for Leave {
        fn drop(&mut self) {
            let before = self.0.take();
            let left = CURRENT.with(|current| current.replace(before));
            drop(left);
        }
    }
    Leave(CURRENT.with(|current| current.replace(Some(Rc::clone(core)))))
}

impl Core {
    pub(crate) fn new(inbox: Arc<Inbox>, driver: Driver) -> Rc<Self> {
        Rc::new(Self {
            inbox,
            registry: RefCell::default(),
            timers: RefCell::default(),
            driver,
            lookouts: Lookouts::default(),
            collected: RefCell::default(),
            roots: Cell::new(0),
            running: Cell::new(false),
        })
    }

    pub(crate) fn backend(&self) -> Option<Backend> {
        match &self.driver {
            Driver::Real(reactor) => Some(reactor.backend()),
            Driver::Sim(_) => None,
        }
    }

    pub(crate) fn now(&self) -> Instant {
        match &self.driver {
            Driver::Real(_) => Instant::real(),
            Driver::Sim(chooser) => chooser.now(),
        }
    }

    /// Runs `future` to its end, and the tasks meanwhile.
    pub(crate) fn block_on<F: Future>(self: &Rc<Self>, future: F) -> F::Output {
        struct Stop<'a>(&'a Cell<bool>);
        impl Drop for Stop<'_> {
            fn drop(&mut self) {
                self.0.set(false);
            }
        }
        assert!(!self.running.replace(true), "this ring runs already: block_on cannot be nested");
        let _stop = Stop(&self.running);
        let _leave = enter(self);
        let mut future = pin!(future);
        let number = self.roots.get();
        self.roots.set(number + 1);
        let root = RootWaker::start(Arc::clone(&self.inbox), number);
        let waker = Waker::from(Arc::clone(&root));
        let mut cx = Context::from_waker(&waker);
        loop {
            for _ in 0..BATCH {
                let Some(entry) = self.next() else { break };
                match entry.what {
                    Ready::Task(runnable) => {
                        runnable.run();
                    }
                    Ready::Root(this) if this == number => {
                        root.dequeued();
                        if let Poll::Ready(value) = future.as_mut().poll(&mut cx) {
                            return value;
                        }
                    }
                    Ready::Root(_) => {}
                }
            }
            self.turn();
        }
    }

    fn next(&self) -> Option<Entry> {
        match &self.driver {
            Driver::Real(_) => self.inbox.local.pop(),
            Driver::Sim(chooser) => chooser.choose(&self.inbox.local),
        }
    }

    /// Looks at everything that can make a task runnable; sleeps until something does if nothing is.
    fn turn(&self) {
        self.collect();
        match &self.driver {
            Driver::Real(reactor) => {
                self.fire_timers();
                self.lookouts.attend();
                let idle = self.inbox.local.is_empty() && self.inbox.prepare_sleep();
                let wait = match self.timers.borrow().next() {
                    _ if !idle => Wait::No,
                    None => Wait::Forever,
                    Some(deadline) => Wait::AtMost(deadline.since(self.now())),
                };
                reactor.turn(wait, &self.lookouts);
                if idle {
                    self.inbox.woke();
                }
            }
            Driver::Sim(chooser) => {
                self.lookouts.attend();
                if self.inbox.local.is_empty() && !self.lookouts.rest() {
                    let next = self.timers.borrow().next();
                    chooser.advance(next.expect("deadlock: no task can ever run again"));
                    self.fire_timers();
                }
            }
        }
    }

    fn fire_timers(&self) {
        if self.timers.borrow().next().is_none() {
            return;
        }
        let now = self.now();
        loop {
            let due = self.timers.borrow_mut().pop_due(now);
            let Some(waker) = due else { return };
            waker.wake();
        }
    }

    /// Takes in what other threads have left.
    fn collect(&self) {
        let mut collected = self.collected.take();
        self.inbox.collect(&mut collected);
        admit(&self.inbox.local, &mut collected.ready);
        if let Driver::Real(reactor) = &self.driver {
            reactor.complete(&mut collected.completions);
        }
        for message in collected.messages.drain(..) {
            if let Err(panic) = catch_unwind(AssertUnwindSafe(message)) {
                report_panic("a message to the ring", &*panic);
            }
        }
        *self.collected.borrow_mut() = collected;
    }

    /// Ends it all: no more messages, operations in flight drained, futures dropped.
    pub(crate) fn shut_down(self: &Rc<Self>) {
        let _leave = enter(self);
        self.inbox.close();
        self.lookouts.clear();
        loop {
            self.drain();
            self.drop_tasks();
            // A future's drop may have started something: look again.
            let quiet = match &self.driver {
                Driver::Real(reactor) => reactor.in_flight() == 0,
                Driver::Sim(_) => true,
            };
            if quiet && self.registry.borrow().is_empty() {
                break;
            }
        }
        if let Driver::Real(reactor) = &self.driver {
            reactor.finish();
        }
    }

    /// Waits for the operations in flight. Nothing runs meanwhile.
    fn drain(&self) {
        let Driver::Real(reactor) = &self.driver else { return };
        reactor.cancel_waiting();
        while reactor.in_flight() > 0 {
            self.collect();
            if reactor.in_flight() == 0 {
                return;
            }
            let idle = self.inbox.prepare_sleep();
            reactor.turn(if idle { Wait::Forever } else { Wait::No }, &self.lookouts);
            if idle {
                self.inbox.woke();
            }
        }
    }

    /// Drops every task's future.
    fn drop_tasks(&self) {
        loop {
            // A waker puts a task that still has a future in line (unless it stands there already) ...
            let wakers = self.registry.borrow().wakers();
            wakers.into_iter().for_each(Waker::wake);
            self.collect();
            // ... and a runnable that is dropped takes its future with it.
            while let Some(entry) = self.inbox.local.pop() {
                drop(entry);
            }
            if self.registry.borrow().is_empty() {
                return;
            }
            // Another thread is between marking a task as woken and handing it over: a few instructions.
            std::thread::yield_now();
        }
    }
}

/// Starts `future` on the running ring and hands its outcome to `done` there.
pub(crate) fn spawn_outcome<F, D>(future: F, done: D)
where
    F: Future + 'static,
    F::Output: 'static,
    D: FnOnce(Outcome<F::Output>) + 'static,
{
    drop(spawn(async move {
        let result = AssertUnwindSafe(future).catch_unwind().await;
        done(Outcome::new(result));
    }));
}

/// Starts a task on the running ring.
pub(crate) fn spawn<F>(future: F) -> JoinHandle<F::Output>
where
    F: Future + 'static,
    F::Output: 'static,
{
    task::spawn_on(&current(), future)
}
