//! One value from one thread to another. The receiver may await it or block a plain thread.
//!
//! **Invariant.** A dropped sender wakes the receiver, which then sees `None`; a dropped receiver lets the sender fail.

use std::future::Future;
use std::pin::Pin;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, Waker};

struct Channel<T> {
    state: Mutex<State<T>>,
    changed: Condvar,
}

struct State<T> {
    value: Option<T>,
    waker: Option<Waker>,
    sender_gone: bool,
    receiver_gone: bool,
}

impl<T> Channel<T> {
    fn lock(&self) -> MutexGuard<'_, State<T>> {
        // Nothing can panic while the lock is held: only plain fields are set.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The sending half.
pub(crate) struct Sender<T>(Arc<Channel<T>>);

/// The receiving half.
pub(crate) struct Receiver<T>(Arc<Channel<T>>);

/// A new pair.
pub(crate) fn channel<T>() -> (Sender<T>, Receiver<T>) {
    let state = State { value: None, waker: None, sender_gone: false, receiver_gone: false };
    let channel = Arc::new(Channel { state: Mutex::new(state), changed: Condvar::new() });
    (Sender(Arc::clone(&channel)), Receiver(channel))
}

impl<T> Sender<T> {
    /// Hands the value over, or back when nobody will take it.
    pub(crate) fn send(self, value: T) -> Result<(), T> {
        let mut state = self.0.lock();
        if state.receiver_gone {
            return Err(value);
        }
        state.value = Some(value);
        // Dropping `self` wakes.
        Ok(())
    }
}

impl<T> Drop for Sender<T> {
    fn drop(&mut self) {
        let mut state = self.0.lock();
        state.sender_gone = true;
        let waker = state.waker.take();
        drop(state);
        self.0.changed.notify_all();
        if let Some(waker) = waker {
            waker.wake();
        }
    }
}

impl<T> Receiver<T> {
    /// Blocks this thread until the value is there, or `None` when it never will be.
    pub(crate) fn wait(self) -> Option<T> {
        let mut state = self.0.lock();
        while !state.sender_gone {
            state = self.0.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        state.value.take()
    }
}

impl<T> Future for Receiver<T> {
    type Output = Option<T>;
    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<T>> {
        let mut state = self.0.lock();
        if state.sender_gone {
            return Poll::Ready(state.value.take());
        }
        let old = match &state.waker {
            Some(waker) if waker.will_wake(cx.waker()) => None,
            _ => state.waker.replace(cx.waker().clone()),
        };
        drop(state);
        drop(old);
        Poll::Pending
    }
}

impl<T> Drop for Receiver<T> {
    fn drop(&mut self) {
        let mut state = self.0.lock();
        state.receiver_gone = true;
        let (value, waker) = (state.value.take(), state.waker.take());
        drop(state);
        drop((value, waker));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use futures_util::FutureExt;

    #[test]
    fn a_value_a_dropped_sender_and_a_dropped_receiver() {
        let (sender, receiver) = channel();
        std::thread::spawn(move || sender.send(7)).join().unwrap().unwrap();
        assert_eq!(receiver.wait(), Some(7));

        let (sender, mut receiver) = channel::<u8>();
        assert!((&mut receiver).now_or_never().is_none());
        drop(sender);
        assert_eq!(receiver.now_or_never(), Some(None));

        let (sender, receiver) = channel();
        drop(receiver);
        assert_eq!(sender.send(7), Err(7));
    }

    #[test]
    fn waiting_blocks_until_the_value_comes() {
        let (sender, receiver) = channel();
        let waiter = std::thread::spawn(move || receiver.wait());
        sender.send("late").unwrap();
        assert_eq!(waiter.join().unwrap(), Some("late"));
    }
}
