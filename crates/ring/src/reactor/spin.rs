//! Looking for completions before sleeping.
//!
//! A sleep and the wake-up after it cost more than a fast disk's answer takes. So a thread that expects news very soon
//! looks at the completion queue for a moment first. It expects what it has seen lately: the mean of its recent waits.
//! A thread whose waits are long sleeps at once and burns nothing; one long wait among short ones costs [`LOOK`] once.

use std::time::Duration;

/// The longest look: a few times what handing over and waking take, far below what anybody notices.
const LOOK: Duration = Duration::from_micros(32);

/// Waits count at most this much, so that one long pause is forgotten after some short waits.
const LONG: Duration = Duration::from_micros(256);

/// How much one wait moves the mean: an eighth.
const SHARE: u32 = 8;

/// Decides how long to look before sleeping.
#[derive(Debug)]
pub(super) struct Spin {
    mean: Duration,
}

impl Spin {
    /// Expects nothing soon.
    pub(super) fn new() -> Self {
        Self { mean: LONG }
    }

    /// How long to look before the next sleep; zero: not at all.
    pub(super) fn patience(&self) -> Duration {
        if self.mean <= LOOK { LOOK } else { Duration::ZERO }
    }

    /// News came after this long, looking and sleeping taken together.
    pub(super) fn waited(&mut self, span: Duration) {
        let span = span.min(LONG);
        self.mean = (self.mean * (SHARE - 1) + span) / SHARE;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_idle_thread_sleeps_at_once() {
        let mut spin = Spin::new();
        assert_eq!(spin.patience(), Duration::ZERO);
        for _ in 0..100 {
            spin.waited(Duration::from_secs(1));
            assert_eq!(spin.patience(), Duration::ZERO);
        }
    }

    #[test]
    fn short_waits_make_it_look_and_long_ones_make_it_sleep_again() {
        let mut spin = Spin::new();
        (0..40).for_each(|_| spin.waited(Duration::from_micros(10)));
        assert_eq!(spin.patience(), LOOK);
        spin.waited(Duration::from_millis(5));
        spin.waited(Duration::from_micros(10));
        (0..3).for_each(|_| spin.waited(Duration::from_millis(5)));
        assert_eq!(spin.patience(), Duration::ZERO);
    }
}
