//! Time as the running ring tells it: real on the io_uring and thread back ends, virtual in [`crate::sim`].

use std::future::Future;
use std::time::Duration;

/// A moment on the running ring's monotonic clock. Only comparable within one ring.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Instant(Duration);

impl Instant {
    /// The time passed since `earlier` (zero when `earlier` is later).
    pub fn since(self, earlier: Instant) -> Duration {
        self.0.saturating_sub(earlier.0)
    }
}

impl std::ops::Add<Duration> for Instant {
    type Output = Self;
    fn add(self, span: Duration) -> Self {
        Self(self.0 + span)
    }
}

/// The running ring's clock. Panics outside of a ring.
pub fn now() -> Instant {
    todo!()
}

/// Waits `span`.
pub async fn sleep(span: Duration) {
    sleep_until(now() + span).await;
}

/// Waits until `deadline`.
pub async fn sleep_until(deadline: Instant) {
    let _ = deadline;
    todo!()
}

/// `Some` of the future's result, or `None` when `span` passed first (the future is then dropped).
pub async fn timeout<F: Future>(span: Duration, future: F) -> Option<F::Output> {
    let _ = (span, future);
    todo!()
}
