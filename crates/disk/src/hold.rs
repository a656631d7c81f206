//! Holding guest requests while a source does not answer.
//!
//! A source that is *unavailable* (the network is down, a server restarts) is no failure of the disk: the guest's request is
//! held and asked again, longer and longer apart, until the source answers or the disk is closed. Jobs are not held: they
//! have a policy of their own for errors.

use crate::gate::Gate;
use futures_util::future::{Either, select};
use image::{Error, Result};
use std::cell::Cell;
use std::pin::pin;
use std::time::Duration;

/// The first wait: a lost connection is usually back within a round trip or two.
const FIRST: Duration = Duration::from_millis(50);
/// The longest wait: an operator who repairs a source sees the guest go on within this time.
const LONGEST: Duration = Duration::from_secs(5);

/// Spreads the retries of many held requests, so that they do not all come back in one instant. No secret: a small
/// generator of a fixed seed does, and keeps simulated runs repeatable.
pub(crate) struct Jitter {
    state: Cell<u64>,
}

impl Default for Jitter {
    fn default() -> Self {
        Self { state: Cell::new(0x9e37_79b9_7f4a_7c15) }
    }
}

impl Jitter {
    /// Between half of `span` and all of it.
    fn spread(&self, span: Duration) -> Duration {
        let mut x = self.state.get();
        x ^= x << 13;
        x ^= x >> 7;
        x ^= x << 17;
        self.state.set(x);
        let half = span / 2;
        half + half.mul_f64((x >> 40) as f64 / f64::from(1_u32 << 24))
    }
}

/// One held request.
pub(crate) struct Hold<'a> {
    gate: &'a Gate,
    jitter: &'a Jitter,
    next: Duration,
}

impl<'a> Hold<'a> {
    pub(crate) fn new(gate: &'a Gate, jitter: &'a Jitter) -> Self {
        Self { gate, jitter, next: FIRST }
    }

    /// After `error`: waits and says "try again", or hands the error back if it is of another kind or the disk closes.
    pub(crate) async fn or_fail(&mut self, error: Error) -> Result<()> {
        if !error.is_unavailable() || self.gate.is_closed() {
            return Err(error);
        }
        if self.next == FIRST {
            tracing::warn!(%error, "a source does not answer; the guest's request is held");
        }
        tracing::trace!(target: "disk_request_held", %error);
        let span = self.jitter.spread(self.next);
        self.next = (self.next * 2).min(LONGEST);
        match select(pin!(ring::sleep(span)), pin!(self.gate.closing())).await {
            Either::Left(_) => Ok(()),
            Either::Right(_) => Err(error),
        }
    }
}
