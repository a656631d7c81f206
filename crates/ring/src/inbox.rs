//! The inbox: the only way from another thread into a ring. Bounded; waking goes through the ring itself.

use std::fmt;
use std::future::Future;
use std::pin::Pin;
use std::task::{Context, Poll};

/// The ring has stopped, or its inbox is full.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Closed;

impl fmt::Display for Closed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("the shard has stopped")
    }
}

impl std::error::Error for Closed {}

/// Reaches a ring from any thread. Clones reach the same ring.
#[derive(Clone)]
pub struct Handle {
    _todo: std::sync::Arc<()>,
}

impl Handle {
    /// Runs `work` on the ring's thread, soon, in order of posting. Blocks while the inbox is full (never called from
    /// the ring's own thread with a full inbox: there it goes straight to the task queue).
    pub fn post(&self, work: impl FnOnce() + Send + 'static) -> Result<(), Closed> {
        let _ = work;
        todo!()
    }

    /// Runs the future that `work` makes on the ring's thread and hands its result back. The future itself needs not be
    /// `Send`. Dropping the [`Reply`] lets it run on.
    pub fn call<T, F>(&self, work: impl FnOnce() -> F + Send + 'static) -> Reply<T>
    where
        T: Send + 'static,
        F: Future<Output = T> + 'static,
    {
        let _ = work;
        todo!()
    }
}

/// The answer to a [`Handle::call`]: a `Send` future for any executor; [`Reply::wait`] blocks a plain thread.
pub struct Reply<T> {
    _todo: std::marker::PhantomData<fn() -> T>,
}

impl<T> Reply<T> {
    /// Blocks this thread (never a ring's own) until the answer is there.
    pub fn wait(self) -> Result<T, Closed> {
        todo!()
    }
}

impl<T> Future for Reply<T> {
    type Output = Result<T, Closed>;
    fn poll(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<Self::Output> {
        todo!()
    }
}
