//! The executor: tasks of one thread, run in FIFO order between visits to the reactor.
//!
//! A shard is a thread with a ring that serves its inbox until told to stop.

use crate::inbox::Handle;
use std::future::Future;
use std::io;
use std::pin::Pin;
use std::task::{Context, Poll};

/// Which machinery carries the operations.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Backend {
    /// io_uring where the kernel grants it, else the thread pool.
    #[default]
    Auto,
    /// io_uring, or an error.
    Uring,
    /// A small pool of blocking threads.
    Threads,
}

/// How to make a ring.
#[derive(Clone, Debug)]
pub struct Config {
    /// The back end; `HEADWATER_RING=threads|uring` in the environment overrides `Auto`.
    pub backend: Backend,
    /// Submission queue entries (a power of two).
    pub entries: u32,
    /// Messages that may wait in the inbox.
    pub inbox: usize,
}

impl Default for Config {
    fn default() -> Self {
        Self { backend: Backend::Auto, entries: 256, inbox: 1024 }
    }
}

/// One thread's executor and reactor. `!Send`.
pub struct Ring {
    _todo: std::rc::Rc<()>,
}

impl Ring {
    /// Makes a ring for this thread.
    pub fn new(config: Config) -> io::Result<Self> {
        let _ = config;
        todo!()
    }

    /// The back end in use (never `Auto`).
    pub fn backend(&self) -> Backend {
        todo!()
    }

    /// Runs `future` to its end, together with every task it spawns. Tasks left over stay queued for the next
    /// `block_on`; dropping the ring drains operations in flight, then drops them.
    pub fn block_on<F: Future>(&self, future: F) -> F::Output {
        let _ = future;
        todo!()
    }

    /// How other threads reach this ring.
    pub fn handle(&self) -> Handle {
        todo!()
    }
}

/// A thread that runs a ring. Dropping it asks it to stop and joins the thread.
pub struct Shard {
    _todo: (),
}

impl Shard {
    /// Starts a thread called `name` whose ring serves its inbox until [`Shard::stop`].
    pub fn start(name: &str, config: Config) -> io::Result<Self> {
        let _ = (name, config);
        todo!()
    }

    /// How to reach it.
    pub fn handle(&self) -> &Handle {
        todo!()
    }

    /// Stops taking messages, lets what runs end (tasks are dropped, operations drained), and joins the thread.
    pub fn stop(self) {
        todo!()
    }
}

/// A spawned task's result. Dropping it detaches the task.
pub struct JoinHandle<T> {
    _todo: std::marker::PhantomData<T>,
}

impl<T> JoinHandle<T> {
    /// Drops the task's future at its next suspension point, now if it is suspended (its operations in flight go on).
    pub fn cancel(self) {
        todo!()
    }

    /// Whether the task has ended.
    pub fn is_finished(&self) -> bool {
        todo!()
    }
}

impl<T> Future for JoinHandle<T> {
    type Output = T;
    fn poll(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<T> {
        todo!()
    }
}

/// Starts a task on the running ring. Panics outside of one.
pub fn spawn<F>(future: F) -> JoinHandle<F::Output>
where
    F: Future + 'static,
    F::Output: 'static,
{
    let _ = future;
    todo!()
}

/// Runs a blocking closure (an `ioctl`, an `open`) on the ring's helper threads.
pub async fn unblock<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> T {
    let _ = work;
    todo!()
}

/// Lets every other runnable task run once.
pub async fn yield_now() {
    todo!()
}
