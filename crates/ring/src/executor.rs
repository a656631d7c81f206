//! The executor: tasks of one thread, run in FIFO order between visits to the reactor.

use crate::inbox::{Handle, Inbox};
use crate::oneshot;
use crate::reactor::Reactor;
use crate::runtime::{self, Core, Driver};
use crate::task::Outcome;
use std::env;
use std::ffi::OsString;
use std::future::{Future, poll_fn};
use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::rc::Rc;
use std::sync::Arc;
use std::task::Poll;

pub use crate::task::JoinHandle;

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

/// The environment variable that overrides [`Backend::Auto`].
const BACKEND_VARIABLE: &str = "HEADWATER_RING";

impl Backend {
    /// What `Auto` stands for, given the environment's word.
    fn resolve(self, word: Option<OsString>) -> io::Result<Self> {
        let Some(value) = word.filter(|_| self == Self::Auto) else { return Ok(self) };
        match value.to_str() {
            Some("" | "auto") => Ok(Self::Auto),
            Some("uring") => Ok(Self::Uring),
            Some("threads") => Ok(Self::Threads),
            _ => Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                format!("{BACKEND_VARIABLE}={}: say uring, threads or auto", value.display()),
            )),
        }
    }
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
    core: Rc<Core>,
}

impl Ring {
    /// Makes a ring for this thread.
    pub fn new(config: Config) -> io::Result<Self> {
        let inbox = Arc::new(Inbox::new(config.inbox, true)?);
        let reactor = Reactor::new(config.backend.resolve(env::var_os(BACKEND_VARIABLE))?, config.entries, &inbox)?;
        Ok(Self { core: Core::new(inbox, Driver::Real(reactor)) })
    }

    /// The back end in use (never `Auto`).
    pub fn backend(&self) -> Backend {
        self.core.backend().expect("a ring has a reactor")
    }

    /// Runs `future` to its end, together with every task it spawns. Tasks left over stay queued for the next
    /// `block_on`; dropping the ring drains operations in flight, then drops them.
    pub fn block_on<F: Future>(&self, future: F) -> F::Output {
        self.core.block_on(future)
    }

    /// How other threads reach this ring.
    pub fn handle(&self) -> Handle {
        Handle::new(Arc::clone(&self.core.inbox))
    }
}

impl Drop for Ring {
    fn drop(&mut self) {
        self.core.shut_down();
    }
}

/// Starts a task on the running ring. Panics outside of one.
pub fn spawn<F>(future: F) -> JoinHandle<F::Output>
where
    F: Future + 'static,
    F::Output: 'static,
{
    runtime::spawn(future)
}

/// Runs a blocking closure (an `ioctl`, an `open`) on the ring's helper threads. A panic of the closure goes on here.
/// Dropping the future gives up the result, not the closure. In [`crate::sim`] it runs at once, in place.
pub async fn unblock<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> T {
    let core = runtime::current();
    let Driver::Real(reactor) = &core.driver else { return work() };
    let (sender, receiver) = oneshot::channel();
    reactor.blocking(Box::new(move || {
        let outcome = Outcome::new(catch_unwind(AssertUnwindSafe(work)));
        // Without a receiver the outcome is dropped here, which logs a panic.
        let _ = sender.send(outcome);
    }));
    receiver.await.expect("helper threads run every closure they took").unwrap()
}

/// Lets every other runnable task run once.
pub async fn yield_now() {
    let mut yielded = false;
    poll_fn(|cx| {
        if yielded {
            return Poll::Ready(());
        }
        yielded = true;
        runtime::current().inbox.local.wake_last(cx.waker());
        Poll::Pending
    })
    .await;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_environment_overrides_auto_only() {
        let resolve =
            |backend: Backend, word: &str| backend.resolve(Some(word.into())).map_err(|error| error.to_string());
        assert_eq!(resolve(Backend::Auto, "threads"), Ok(Backend::Threads));
        assert_eq!(resolve(Backend::Auto, "uring"), Ok(Backend::Uring));
        assert_eq!(resolve(Backend::Auto, ""), Ok(Backend::Auto));
        assert_eq!(resolve(Backend::Uring, "threads"), Ok(Backend::Uring));
        assert_eq!(Backend::Auto.resolve(None).unwrap(), Backend::Auto);
        let error = resolve(Backend::Auto, "epoll").unwrap_err();
        assert_eq!(error, "HEADWATER_RING=epoll: say uring, threads or auto");
    }
}
