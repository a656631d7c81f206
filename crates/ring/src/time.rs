//! Time as the running ring tells it: real on the io_uring and thread back ends, virtual in [`crate::sim`].

use crate::runtime::{self, Core};
use std::collections::BTreeMap;
use std::future::{Future, poll_fn};
use std::pin::{Pin, pin};
use std::rc::Rc;
use std::sync::OnceLock;
use std::task::{Context, Poll, Waker};
use std::time::Duration;

/// A moment on the running ring's monotonic clock. Only comparable within one ring.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Instant(Duration);

impl Instant {
    /// The clock's start.
    pub(crate) const START: Self = Self(Duration::ZERO);

    /// The time passed since `earlier` (zero when `earlier` is later).
    pub fn since(self, earlier: Instant) -> Duration {
        self.0.saturating_sub(earlier.0)
    }

    /// The system's monotonic clock, counted from its first use in this process.
    pub(crate) fn real() -> Self {
        static START: OnceLock<std::time::Instant> = OnceLock::new();
        Self(START.get_or_init(std::time::Instant::now).elapsed())
    }
}

impl std::ops::Add<Duration> for Instant {
    type Output = Self;
    /// Stops at the end of time instead of overflowing.
    fn add(self, span: Duration) -> Self {
        Self(self.0.saturating_add(span))
    }
}

/// Who waits for which moment. Equal moments keep the order of registration.
#[derive(Default)]
pub(crate) struct Timers {
    waiting: BTreeMap<(Instant, u64), Waker>,
    next: u64,
}

impl Timers {
    /// The next moment somebody waits for.
    pub(crate) fn next(&self) -> Option<Instant> {
        self.waiting.first_key_value().map(|((deadline, _), _)| *deadline)
    }

    /// Takes out the next one that is due. Its waker is to be called outside of any borrow.
    pub(crate) fn pop_due(&mut self, now: Instant) -> Option<Waker> {
        let first = self.waiting.first_entry()?;
        (first.key().0 <= now).then(|| first.remove())
    }
}

/// The running ring's clock. Panics outside of a ring.
pub fn now() -> Instant {
    runtime::current().now()
}

/// Waits `span`.
pub async fn sleep(span: Duration) {
    sleep_until(now() + span).await;
}

/// Waits until `deadline`.
pub async fn sleep_until(deadline: Instant) {
    Sleep { core: runtime::current(), deadline, ticket: None }.await;
}

/// `Some` of the future's result, or `None` when `span` passed first (the future is then dropped). The future is polled
/// first: a result that is there beats a time that has passed.
pub async fn timeout<F: Future>(span: Duration, future: F) -> Option<F::Output> {
    let mut future = pin!(future);
    let mut sleep = pin!(sleep(span));
    poll_fn(|cx| match future.as_mut().poll(cx) {
        Poll::Ready(value) => Poll::Ready(Some(value)),
        Poll::Pending => sleep.as_mut().poll(cx).map(|()| None),
    })
    .await
}

struct Sleep {
    core: Rc<Core>,
    deadline: Instant,
    ticket: Option<u64>,
}

impl Future for Sleep {
    type Output = ();
    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        if self.core.now() >= self.deadline {
            return Poll::Ready(());
        }
        let mut timers = self.core.timers.borrow_mut();
        let ticket = self.ticket.unwrap_or_else(|| {
            timers.next += 1;
            timers.next
        });
        let key = (self.deadline, ticket);
        let old = match timers.waiting.get(&key) {
            Some(waker) if waker.will_wake(cx.waker()) => None,
            _ => timers.waiting.insert(key, cx.waker().clone()),
        };
        drop(timers);
        drop(old);
        self.ticket = Some(ticket);
        Poll::Pending
    }
}

impl Drop for Sleep {
    fn drop(&mut self) {
        if let Some(ticket) = self.ticket {
            let old = self.core.timers.borrow_mut().waiting.remove(&(self.deadline, ticket));
            drop(old);
        }
    }
}
