//! Speed limits: a token bucket on copied bytes.
//!
//! **Invariant.** Over any window of two seconds at most 4.75 % more than the rate is let through, the lump of one chunk
//! included: whoever was served late catches up by a little ([`SLACK`]), and by less where chunks are large. Only where a
//! single cluster is more than the rate allows in 95 ms does one cluster too many fit into an awkward window: it cannot be
//! made smaller. The rate is kept on average even then.

use ring::Instant;
use std::cell::Cell;
use std::time::Duration;

/// What an idle bucket may save up, in time: what a loaded machine oversleeps now and then, and 2.5 % of two seconds.
const SLACK: Duration = Duration::from_millis(50);

/// What one chunk and the slack may make up together, in time: 4.75 % of two seconds.
const LUMP: Duration = Duration::from_millis(95);

/// A chunk takes a 40th of a second's bytes at most: 1.25 % of two seconds.
const CHUNKS_A_SECOND: u64 = 40;

/// Tokens are counted in billionths of a byte, so that no rate loses anything to rounding.
const SCALE: i128 = 1_000_000_000;

/// A speed limit in bytes a second; 0 is unlimited. Needs a running ring for its clock.
pub(crate) struct Pace {
    rate: Cell<u64>,
    /// Bytes; no chunk is smaller.
    cluster: u64,
    /// Bytes × [`SCALE`] that may go out; negative: owed.
    tokens: Cell<i128>,
    /// When `tokens` was right.
    counted: Cell<Instant>,
}

impl Pace {
    /// A bucket that lets the first chunk through at once.
    pub(crate) fn new(rate: u64, cluster: u64) -> Self {
        Self { rate: Cell::new(rate), cluster, tokens: Cell::new(0), counted: Cell::new(ring::now()) }
    }

    /// Bytes a second; 0 is unlimited.
    pub(crate) fn rate(&self) -> u64 {
        self.rate.get()
    }

    /// Changes the rate. What is owed stays owed in bytes, so a higher rate shortens a wait that has begun.
    pub(crate) fn set_rate(&self, rate: u64) {
        self.count();
        self.rate.set(rate);
        let most = if rate == 0 { 0 } else { self.most(rate) };
        let least = if rate == 0 { 0 } else { i128::MIN };
        self.tokens.set(self.tokens.get().clamp(least, most));
    }

    /// The largest chunk that keeps the pace even, in bytes, whole clusters; `None` when there is no limit.
    pub(crate) fn chunk(&self) -> Option<u64> {
        (self.rate.get() > 0).then(|| self.chunk_at(self.rate.get()))
    }

    fn chunk_at(&self, rate: u64) -> u64 {
        let even = rate / CHUNKS_A_SECOND;
        (even - even % self.cluster).max(self.cluster)
    }

    /// When the next chunk may go out: `None` means now.
    pub(crate) fn wait(&self) -> Option<Instant> {
        self.count();
        let owed = -self.tokens.get();
        if self.rate.get() == 0 || owed <= 0 {
            return None;
        }
        let rate = i128::from(self.rate.get());
        let nanos = u64::try_from((owed + rate - 1) / rate).unwrap_or(u64::MAX);
        Some(self.counted.get() + Duration::from_nanos(nanos))
    }

    /// `bytes` have gone out.
    pub(crate) fn charge(&self, bytes: u64) {
        if self.rate.get() > 0 {
            self.count();
            self.tokens.set(self.tokens.get() - i128::from(bytes) * SCALE);
        }
    }

    /// `bytes` that were charged were not copied after all.
    pub(crate) fn refund(&self, bytes: u64) {
        let rate = self.rate.get();
        if rate > 0 {
            self.tokens.set((self.tokens.get() + i128::from(bytes) * SCALE).min(self.most(rate)));
        }
    }

    /// How many tokens may be saved up.
    fn most(&self, rate: u64) -> i128 {
        let slack = i128::from(rate) * SLACK.as_nanos() as i128;
        let lump = i128::from(rate) * LUMP.as_nanos() as i128 - i128::from(self.chunk_at(rate)) * SCALE;
        slack.min(lump).max(0)
    }

    /// Adds what has accrued.
    fn count(&self) {
        let now = ring::now();
        let rate = self.rate.get();
        let nanos = now.since(self.counted.get()).as_nanos() as i128;
        self.counted.set(now);
        if rate > 0 {
            let tokens = self.tokens.get() + nanos * i128::from(rate);
            self.tokens.set(tokens.min(self.most(rate)));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use ring::sim::Sim;

    /// Sends chunks as fast as allowed for `span`; the moments and sizes.
    async fn send(pace: &Pace, chunk: u64, span: Duration) -> Vec<(Instant, u64)> {
        let mut sent = Vec::new();
        let began = ring::now();
        while ring::now().since(began) < span {
            match pace.wait() {
                Some(at) => ring::sleep_until(at).await,
                None => {
                    let bytes = chunk.min(pace.chunk().unwrap_or(chunk));
                    pace.charge(bytes);
                    sent.push((ring::now(), bytes));
                    if pace.rate() == 0 {
                        ring::sleep(Duration::from_millis(1)).await;
                    }
                }
            }
        }
        sent
    }

    #[test]
    fn any_two_seconds_are_within_five_percent() {
        Sim::new(1).block_on(async {
            let cases = [(1_000_u64, 1), (65_536, 512), (65_536, 65_536), (524_288, 65_536), (1 << 20, 65_536)];
            for (rate, cluster) in cases.into_iter().chain([(5 << 20, 65_536), (123_456_789, 4096), (1 << 31, 65_536)])
            {
                let pace = Pace::new(rate, cluster);
                let sent = send(&pace, 1 << 20, Duration::from_secs(10)).await;
                let (mut bytes, mut end) = (0, 0);
                for (start, first) in &sent {
                    while sent.get(end).is_some_and(|(at, _)| at.since(*start) < Duration::from_secs(2)) {
                        bytes += sent[end].1;
                        end += 1;
                    }
                    assert!(bytes as f64 <= rate as f64 * 2.0 * 1.05, "{bytes} in 2 s at {rate} B/s");
                    bytes -= first;
                }
                let all: u64 = sent.iter().map(|(_, bytes)| bytes).sum();
                assert!(all as f64 >= rate as f64 * 10.0 * 0.95, "{all} in 10 s at {rate} B/s");
            }
        });
    }

    #[test]
    fn a_new_rate_shortens_a_wait_that_has_begun() {
        Sim::new(1).block_on(async {
            let pace = Pace::new(1, 1);
            pace.charge(1_000_000);
            let long = pace.wait().unwrap();
            assert_eq!(long.since(ring::now()), Duration::from_secs(1_000_000));
            pace.set_rate(1_000_000);
            assert_eq!(pace.wait().unwrap().since(ring::now()), Duration::from_secs(1));
            pace.set_rate(0);
            assert!(pace.wait().is_none());
            pace.set_rate(1);
            assert!(pace.wait().is_none(), "no debt is left over from before it was unlimited");
        });
    }

    #[test]
    fn an_idle_bucket_saves_up_little() {
        Sim::new(1).block_on(async {
            let pace = Pace::new(1000, 1);
            ring::sleep(Duration::from_hours(1)).await;
            pace.charge(50);
            assert!(pace.wait().is_none(), "50 ms worth");
            pace.charge(1);
            assert!(pace.wait().is_some());
        });
    }
}
