//! Requests that change something run to their end, even if whoever asked does not wait for it.
//!
//! A write that is dropped half-way would give its range lock and its reserved clusters back while the store still
//! writes there. So such requests run inside a [`Shielded`]: dropped early, it hands the rest of the work to a task.

use futures_util::FutureExt;
use futures_util::future::LocalBoxFuture;
use std::future::Future;
use std::pin::Pin;
use std::task::{Context, Poll};

/// A future that always runs to its end. Must be dropped on its ring, as every future of a disk.
#[must_use = "futures do nothing unless polled"]
pub(crate) struct Shielded<T: 'static> {
    /// `None` once finished.
    work: Option<LocalBoxFuture<'static, T>>,
    started: bool,
}

/// Shields `work`.
pub(crate) fn shield<T: 'static>(work: impl Future<Output = T> + 'static) -> Shielded<T> {
    Shielded { work: Some(work.boxed_local()), started: false }
}

impl<T: 'static> Future for Shielded<T> {
    type Output = T;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<T> {
        self.started = true;
        let work = self.work.as_mut().expect("a finished future is not polled again");
        let value = std::task::ready!(work.as_mut().poll(cx));
        self.work = None;
        Poll::Ready(value)
    }
}

impl<T: 'static> Drop for Shielded<T> {
    fn drop(&mut self) {
        // What never began need not end; what panicked, or lost its ring, cannot go on.
        let goes_on = self.started && !std::thread::panicking() && ring::is_running();
        if let Some(work) = self.work.take().filter(|_| goes_on) {
            drop(ring::spawn(work));
        }
    }
}
