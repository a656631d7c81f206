//! The inbox: the only way from another thread into a ring. Bounded; waking goes through the ring itself.
//!
//! Who wakes whom is the affair of its [`Door`].

use crate::door::{Door, Holds, Wake};
use crate::oneshot;
use crate::runtime;
use crate::task::{Entry, LocalQueue, Outcome, Ready};
use std::collections::VecDeque;
use std::fmt;
use std::future::Future;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

/// The ring has stopped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Closed;

impl fmt::Display for Closed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("the shard has stopped")
    }
}

impl std::error::Error for Closed {}

/// What `post` hands over.
pub(crate) type Message = Box<dyn FnOnce() + Send>;

/// The part of a ring that other threads may touch (and the local queue, which they may carry but not touch).
pub(crate) struct Inbox {
    /// Tasks that can run, of the ring's own thread.
    pub(crate) local: LocalQueue,
    outside: Door<Collected>,
    /// What a sleeping ring waits on; a simulated one has none and never sleeps.
    eventfd: Option<OwnedFd>,
}

/// What the ring took out at once.
#[derive(Default)]
pub(crate) struct Collected {
    pub(crate) messages: VecDeque<Message>,
    pub(crate) ready: Vec<Ready>,
    /// Results of operations that helper threads carried out: slot and result as the kernel gives it.
    pub(crate) completions: Vec<(u32, i32)>,
}

impl Holds for Collected {
    fn is_empty(&self) -> bool {
        self.messages.is_empty() && self.ready.is_empty() && self.completions.is_empty()
    }

    fn bounded(&self) -> usize {
        self.messages.len()
    }
}

impl Inbox {
    /// An inbox of the calling thread for `capacity` messages.
    pub(crate) fn new(capacity: usize, sleeps: bool) -> io::Result<Self> {
        let eventfd = if sleeps {
            // SAFETY: no pointers are passed.
            let fd = unsafe { libc::eventfd(0, libc::EFD_CLOEXEC) };
            if fd < 0 {
                return Err(io::Error::last_os_error());
            }
            // SAFETY: the kernel has just made this descriptor for us alone.
            Some(unsafe { OwnedFd::from_raw_fd(fd) })
        } else {
            None
        };
        Ok(Self { local: LocalQueue::new(), outside: Door::new(capacity), eventfd })
    }

    /// The descriptor that becomes readable when a sleeping ring must wake.
    pub(crate) fn wake_fd(&self) -> Option<RawFd> {
        self.eventfd.as_ref().map(|fd| fd.as_raw_fd())
    }

    /// Makes something runnable, from any thread.
    pub(crate) fn schedule(&self, ready: Ready) {
        match self.local.push(ready) {
            Ok(()) => {}
            Err(ready) => self.rung(self.outside.put(|outside| outside.ready.push(ready))),
        }
    }

    /// Reports an operation that a helper thread carried out.
    pub(crate) fn complete(&self, slot: u32, result: i32) {
        self.rung(self.outside.put(|outside| outside.completions.push((slot, result))));
    }

    /// Hands a message over; it comes back when the ring has stopped.
    fn post(&self, message: Message) -> Result<(), Closed> {
        // The ring's own thread is the one that makes space: it must not wait for itself.
        let waits = !self.local.is_mine();
        let mut message = Some(message);
        let put = self.outside.put_if_open(waits, |outside| outside.messages.extend(message.take()));
        self.rung(put.ok_or(Closed)?);
        Ok(())
    }

    fn rung(&self, wake: Wake) {
        if wake.0 {
            self.ring_the_bell();
        }
    }

    /// Writes the eventfd. The counter cannot overflow: the ring resets it, and `asleep` lets one writer through.
    pub(crate) fn ring_the_bell(&self) {
        let Some(eventfd) = &self.eventfd else { return };
        let one = 1_u64.to_ne_bytes();
        loop {
            // SAFETY: `one` is 8 readable bytes; the descriptor is open while `self` lives.
            let written = unsafe { libc::write(eventfd.as_raw_fd(), one.as_ptr().cast(), one.len()) };
            if written >= 0 || io::Error::last_os_error().kind() != io::ErrorKind::Interrupted {
                return;
            }
        }
    }

    /// Takes everything out (by the ring's thread). `into` must be empty; its allocations are used again.
    pub(crate) fn collect(&self, into: &mut Collected) {
        self.outside.take(into);
    }

    /// Announces that the ring is about to sleep; `false` when something has come and it must not.
    pub(crate) fn prepare_sleep(&self) -> bool {
        self.outside.prepare_sleep()
    }

    /// The ring is awake again.
    pub(crate) fn woke(&self) {
        self.outside.woke();
    }

    /// Takes no more messages and drops those that wait.
    pub(crate) fn close(&self) {
        drop(self.outside.close(|outside| std::mem::take(&mut outside.messages)));
    }
}

/// Reaches a ring from any thread. Clones reach the same ring.
#[derive(Clone)]
pub struct Handle {
    inbox: Arc<Inbox>,
}

impl fmt::Debug for Handle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Handle").finish_non_exhaustive()
    }
}

impl Handle {
    pub(crate) fn new(inbox: Arc<Inbox>) -> Self {
        Self { inbox }
    }

    /// Runs `work` on the ring's thread, soon, in order of posting. Blocks while the inbox is full (the ring's own
    /// thread never blocks: its messages go in past the bound). A panic of `work` is logged and goes no further.
    pub fn post(&self, work: impl FnOnce() + Send + 'static) -> Result<(), Closed> {
        self.inbox.post(Box::new(work))
    }

    /// Runs the future that `work` makes on the ring's thread and hands its result back. The future itself needs not be
    /// `Send`. Dropping the [`Reply`] lets it run on. A panic in it goes on in whoever takes the reply.
    pub fn call<T, F>(&self, work: impl FnOnce() -> F + Send + 'static) -> Reply<T>
    where
        T: Send + 'static,
        F: Future<Output = T> + 'static,
    {
        let (sender, receiver) = oneshot::channel();
        let posted = self.post(move || {
            runtime::spawn_outcome(async move { work().await }, move |outcome| {
                // Without a receiver the outcome is dropped here, which logs a panic.
                let _ = sender.send(outcome);
            });
        });
        // A message that was not taken has dropped the sender: the reply says `Closed`.
        let _ = posted;
        Reply { receiver }
    }

    /// Whether the calling thread is the ring's own.
    pub fn is_local(&self) -> bool {
        self.inbox.local.is_mine()
    }

    pub(crate) fn close(&self) {
        self.inbox.close();
    }
}

/// The answer to a [`Handle::call`]: a `Send` future for any executor; [`Reply::wait`] blocks a plain thread.
pub struct Reply<T> {
    receiver: oneshot::Receiver<Outcome<T>>,
}

impl<T> Reply<T> {
    /// Blocks this thread (never a ring's own) until the answer is there.
    pub fn wait(self) -> Result<T, Closed> {
        self.receiver.wait().map(Outcome::unwrap).ok_or(Closed)
    }
}

impl<T> Future for Reply<T> {
    type Output = Result<T, Closed>;
    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        Pin::new(&mut self.receiver).poll(cx).map(|outcome| outcome.map(Outcome::unwrap).ok_or(Closed))
    }
}

/// Moves what became runnable elsewhere into the local queue.
pub(crate) fn admit(local: &LocalQueue, ready: &mut Vec<Ready>) {
    for ready in ready.drain(..) {
        local.push_entry(Entry::new(ready));
    }
}
