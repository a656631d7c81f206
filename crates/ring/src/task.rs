//! Tasks: a future, a place in the queue, and somebody who may wait for the result.
//!
//! **Invariants.** A task's future is polled and dropped on its ring's thread only, whoever wakes it. The queue of
//! runnable tasks is touched by that thread only; other threads go through the inbox. Every live future stands in the
//! ring's registry, so that a ring that is dropped can drop them all, and no waker that outlives the ring finds one.

use crate::inbox::Inbox;
use crate::runtime::Core;
use std::any::Any;
use std::cell::{Cell, UnsafeCell};
use std::collections::VecDeque;
use std::future::Future;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::pin::Pin;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::task::{Context, Poll, Wake, Waker};

/// A task's place in the registry.
pub(crate) type TaskKey = usize;

/// A task that can run.
pub(crate) type Runnable = async_task::Runnable<TaskKey>;

/// Something that can run.
pub(crate) enum Ready {
    Task(Runnable),
    /// The future of the `block_on` with this number.
    Root(u64),
}

/// One place in the queue.
pub(crate) struct Entry {
    pub(crate) what: Ready,
    /// It gave way: everything in front of it goes first, whatever order the executor chooses.
    pub(crate) yielded: bool,
}

impl Entry {
    pub(crate) fn new(what: Ready) -> Self {
        Self { what, yielded: false }
    }
}

/// A number for the calling thread that no other thread ever has.
fn thread_number() -> u64 {
    thread_local! {
        static NUMBER: Cell<u64> = const { Cell::new(0) };
    }
    static NEXT: AtomicU64 = AtomicU64::new(1);
    NUMBER.with(|number| {
        if number.get() == 0 {
            number.set(NEXT.fetch_add(1, Ordering::Relaxed));
        }
        number.get()
    })
}

/// The queue of one thread's runnable tasks. Any thread may hold it; only its own gets at it.
pub(crate) struct LocalQueue {
    thread: u64,
    entries: UnsafeCell<VecDeque<Entry>>,
    yielding: Cell<bool>,
}

// SAFETY: the fields that are not thread-safe are reached through `with` and `yielding` only, both of which refuse any
// thread but the owner. The queue is dropped with the inbox, which any thread may drop last; by then it is empty:
// whatever is in the queue holds the inbox itself (a task's schedule function does; so does nothing else that must not
// change threads: `Ready::Root` is a number).
unsafe impl Send for LocalQueue {}
// SAFETY: as above.
unsafe impl Sync for LocalQueue {}

impl LocalQueue {
    pub(crate) fn new() -> Self {
        Self { thread: thread_number(), entries: UnsafeCell::new(VecDeque::new()), yielding: Cell::new(false) }
    }

    /// Whether the calling thread owns the queue.
    pub(crate) fn is_mine(&self) -> bool {
        self.thread == thread_number()
    }

    /// Gives access to the queue. `look` must not call out: no waker, no drop of a task.
    pub(crate) fn with<R>(&self, look: impl FnOnce(&mut VecDeque<Entry>) -> R) -> R {
        assert!(self.is_mine(), "a ring's queue belongs to its thread");
        // SAFETY: only the owning thread comes here (asserted), and not twice at once: `look` never calls out.
        look(unsafe { &mut *self.entries.get() })
    }

    /// Appends, if the calling thread owns the queue.
    pub(crate) fn push(&self, what: Ready) -> Result<(), Ready> {
        if !self.is_mine() {
            return Err(what);
        }
        let yielded = self.yielding.get();
        // SAFETY: only the owning thread comes here, and `with` never runs foreign code that could lead here.
        unsafe { &mut *self.entries.get() }.push_back(Entry { what, yielded });
        Ok(())
    }

    pub(crate) fn push_entry(&self, entry: Entry) {
        self.with(|entries| entries.push_back(entry));
    }

    pub(crate) fn pop(&self) -> Option<Entry> {
        self.with(VecDeque::pop_front)
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.with(|entries| entries.is_empty())
    }

    /// Wakes `waker` so that it comes after everything that can run now.
    pub(crate) fn wake_last(&self, waker: &Waker) {
        assert!(self.is_mine(), "a ring's queue belongs to its thread");
        self.yielding.set(true);
        waker.wake_by_ref();
        self.yielding.set(false);
    }

    /// Takes one task out of the line.
    fn remove(&self, key: TaskKey) -> Option<Entry> {
        self.with(|entries| {
            let at = entries
                .iter()
                .rposition(|entry| matches!(&entry.what, Ready::Task(task) if *task.metadata() == key))?;
            entries.remove(at)
        })
    }
}

/// Wakes the future of a `block_on`.
pub(crate) struct RootWaker {
    inbox: Arc<Inbox>,
    number: u64,
    queued: AtomicBool,
}

impl RootWaker {
    /// One that stands in the queue already.
    pub(crate) fn start(inbox: Arc<Inbox>, number: u64) -> Arc<Self> {
        inbox.schedule(Ready::Root(number));
        Arc::new(Self { inbox, number, queued: AtomicBool::new(true) })
    }

    /// Its turn has come: from here on it may be queued again.
    pub(crate) fn dequeued(&self) {
        // Acquire, against the swap in `wake_by_ref`: what the waker's thread did before is seen by the poll.
        self.queued.swap(false, Ordering::AcqRel);
    }
}

impl Wake for RootWaker {
    fn wake(self: Arc<Self>) {
        self.wake_by_ref();
    }

    fn wake_by_ref(self: &Arc<Self>) {
        if !self.queued.swap(true, Ordering::AcqRel) {
            self.inbox.schedule(Ready::Root(self.number));
        }
    }
}

/// How a future ended. A panic that nobody takes is logged when the outcome is dropped, never lost.
pub(crate) struct Outcome<T>(Option<Result<T, Box<dyn Any + Send>>>);

impl<T> Outcome<T> {
    pub(crate) fn new(result: Result<T, Box<dyn Any + Send>>) -> Self {
        Self(Some(result))
    }

    /// The result; a panic goes on here.
    pub(crate) fn unwrap(mut self) -> T {
        match self.0.take().expect("taken once, by value") {
            Ok(value) => value,
            Err(panic) => resume_unwind(panic),
        }
    }
}

impl<T> Drop for Outcome<T> {
    fn drop(&mut self) {
        if let Some(Err(panic)) = &self.0 {
            report_panic("a detached task", &**panic);
        }
    }
}

/// Logs a panic that goes no further.
pub(crate) fn report_panic(who: &str, panic: &(dyn Any + Send)) {
    let text = panic
        .downcast_ref::<&str>()
        .copied()
        .or_else(|| panic.downcast_ref::<String>().map(String::as_str))
        .unwrap_or("(no message)");
    tracing::error!(panic = text, "{who} panicked");
}

/// The live futures of a ring: one waker each.
#[derive(Default)]
pub(crate) struct Registry {
    wakers: Vec<Option<Waker>>,
    free: Vec<TaskKey>,
}

impl Registry {
    fn reserve(&mut self) -> TaskKey {
        self.free.pop().unwrap_or_else(|| {
            self.wakers.push(None);
            self.wakers.len() - 1
        })
    }

    fn release(&mut self, key: TaskKey) -> Option<Waker> {
        self.free.push(key);
        self.wakers[key].take()
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.free.len() == self.wakers.len()
    }

    pub(crate) fn wakers(&self) -> Vec<Waker> {
        self.wakers.iter().flatten().cloned().collect()
    }
}

/// Keeps a future's entry in the registry until it is dropped.
struct Registered {
    core: Rc<Core>,
    key: TaskKey,
}

impl Drop for Registered {
    fn drop(&mut self) {
        let waker = self.core.registry.borrow_mut().release(self.key);
        // Outside of the borrow: it may be the last reference to the task.
        drop(waker);
    }
}

/// A task's future with its registration. A panic is part of its output.
struct Spawned<F> {
    // The order counts: the future goes first, then it is no longer registered.
    future: F,
    _registered: Registered,
}

impl<F: Future> Future for Spawned<F> {
    type Output = Outcome<F::Output>;
    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        // SAFETY: `future` is pinned with the whole and never moved out; `_registered` is not touched.
        let future = unsafe { self.map_unchecked_mut(|this| &mut this.future) };
        // A future that panicked is never polled again, so nobody sees what it left half done through it.
        match catch_unwind(AssertUnwindSafe(|| future.poll(cx))) {
            Ok(Poll::Pending) => Poll::Pending,
            Ok(Poll::Ready(value)) => Poll::Ready(Outcome::new(Ok(value))),
            Err(panic) => Poll::Ready(Outcome::new(Err(panic))),
        }
    }
}

/// Makes a task of `future` on `core`, which must be a ring of the calling thread.
pub(crate) fn spawn_on<F>(core: &Rc<Core>, future: F) -> JoinHandle<F::Output>
where
    F: Future + 'static,
    F::Output: 'static,
{
    assert!(core.inbox.local.is_mine(), "tasks are spawned on their ring's thread");
    let key = core.registry.borrow_mut().reserve();
    let spawned = Spawned { future, _registered: Registered { core: Rc::clone(core), key } };
    let inbox = Arc::clone(&core.inbox);
    let schedule = move |task: Runnable| inbox.schedule(Ready::Task(task));
    // SAFETY: `spawn_unchecked` asks for four things. The future is not `Send`: its runnable is run and dropped on the
    // calling thread only, since `Inbox::schedule` brings every runnable back to it from wherever it was woken, and
    // since a ring drops all its futures (they are registered) before it goes; a ring that is leaked never runs or
    // drops them at all. The future is `'static`. The schedule function is `Send`, `Sync` and `'static`.
    let (runnable, task) =
        unsafe { async_task::Builder::new().metadata(key).spawn_unchecked(move |_| spawned, schedule) };
    core.registry.borrow_mut().wakers[key] = Some(runnable.waker());
    runnable.schedule();
    JoinHandle { task: Some(task.fallible()), key, core: Rc::clone(core) }
}

/// A spawned task's result. Dropping it detaches the task. Awaiting a task that panicked panics with the same payload.
pub struct JoinHandle<T> {
    task: Option<async_task::FallibleTask<Outcome<T>, TaskKey>>,
    key: TaskKey,
    // Also what keeps the handle on its thread.
    core: Rc<Core>,
}

impl<T> JoinHandle<T> {
    /// Drops the task's future at its next suspension point, now if it is suspended (its operations in flight go on).
    pub fn cancel(mut self) {
        let Some(task) = self.task.take() else { return };
        let finished = task.is_finished();
        // Marks it and, if it is suspended, puts it in line to be dropped.
        drop(task);
        if !finished {
            // Not found: it is the running task, or another thread has woken it and is about to put it in line.
            drop(self.core.inbox.local.remove(self.key));
        }
    }

    /// Whether the task has ended.
    pub fn is_finished(&self) -> bool {
        self.task.as_ref().is_none_or(async_task::FallibleTask::is_finished)
    }
}

impl<T> Future for JoinHandle<T> {
    type Output = T;
    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<T> {
        let task = self.task.as_mut().expect("a handle is not polled after it has given its result");
        let outcome = std::task::ready!(Pin::new(task).poll(cx));
        self.task = None;
        match outcome {
            Some(outcome) => Poll::Ready(outcome.unwrap()),
            // Its ring was dropped: whoever still polls does so from a foreign executor.
            None => Poll::Pending,
        }
    }
}

impl<T> Drop for JoinHandle<T> {
    fn drop(&mut self) {
        if let Some(task) = self.task.take() {
            task.detach();
        }
    }
}
