//! How much a job keeps in flight: little where more would only queue, more where each request waits for a distant answer.
//!
//! **Invariant.** Bytes in flight never pass [`MOST_BYTES`], except that one chunk may always go (a cluster can be larger);
//! requests in flight never pass [`MOST_CHUNKS`].
//!
//! The rule is to try: one step more in flight is kept when it brings more bytes a second, one step less when it costs none.
//! By Little's law the throughput of a full window is its size by the time a chunk takes, so times are all it needs to know.

use std::time::Duration;

/// The size of a full chunk, in bytes: large enough to run at a disk's full throughput, small enough that a pause or a
/// cancel does not wait long for what is in flight. QEMU's streams have it, too: so both tell of an error at the same place.
pub(crate) const CHUNK: u64 = 512 << 10;

/// Chunks in flight to begin with, and at least: enough to keep a local disk busy.
const FEWEST: u64 = 8;

/// Full chunks in flight at most: at 20 ms it is 800 MiB/s.
const MOST: u64 = 32;

/// Bytes in flight at most, in memory at the same time.
const MOST_BYTES: u64 = 32 << 20;

/// Requests in flight at most: on a fragmented disk many small ones make up a full chunk.
const MOST_CHUNKS: usize = 64;

/// By how much the window changes at a time, in chunks.
const STEP: u64 = 4;

/// Rounds between two tries once neither direction helps: conditions change slowly.
const HOLD: u32 = 32;

/// Less throughput than this part of the former is a loss; the rest is noise.
const NOISE: f64 = 0.97;

/// What is being tried, with the throughput before it.
#[derive(Clone, Copy)]
enum Try {
    More(f64),
    Less(f64),
}

/// The limit for what is in flight.
pub(crate) struct Window {
    chunks: u64,
    trying: Option<Try>,
    /// The next try is for less.
    less_next: bool,
    hold: u32,
    /// Of this round.
    samples: u64,
    sum: Duration,
}

impl Window {
    pub(crate) fn new() -> Self {
        Self { chunks: FEWEST, trying: None, less_next: false, hold: 0, samples: 0, sum: Duration::ZERO }
    }

    /// Whether another `bytes` may go while `chunks` with `in_flight` bytes are under way.
    pub(crate) fn has_room(&self, chunks: usize, in_flight: u64, bytes: u64) -> bool {
        chunks == 0 || (chunks < MOST_CHUNKS && in_flight + bytes <= (self.chunks * CHUNK).min(MOST_BYTES))
    }

    /// A full chunk took `took`.
    pub(crate) fn measured(&mut self, took: Duration) {
        self.samples += 1;
        self.sum += took;
        // Two windows full, so that what was sent before the last change counts little.
        if self.samples < self.chunks * 2 {
            return;
        }
        let mean = self.sum.as_secs_f64() / self.samples as f64;
        self.samples = 0;
        self.sum = Duration::ZERO;
        self.round(self.chunks as f64 / mean.max(1e-9));
    }

    fn round(&mut self, throughput: f64) {
        match self.trying.take() {
            Some(Try::More(before)) => {
                // Half of what a source that does not queue would give.
                let ideal = self.chunks as f64 / (self.chunks - STEP) as f64;
                if throughput < before * f64::midpoint(1.0, ideal) {
                    self.chunks -= STEP;
                    self.hold = HOLD;
                    self.less_next = true;
                    return;
                }
                self.less_next = false;
            }
            Some(Try::Less(before)) if throughput < before * NOISE => {
                self.chunks += STEP;
                self.hold = HOLD;
                self.less_next = false;
                return;
            }
            Some(Try::Less(_)) | None => {}
        }
        if self.hold > 0 {
            self.hold -= 1;
        } else if self.less_next && self.chunks > FEWEST {
            self.trying = Some(Try::Less(throughput));
            self.chunks -= STEP;
        } else if self.chunks < MOST {
            self.trying = Some(Try::More(throughput));
            self.chunks += STEP;
        } else {
            self.hold = HOLD;
            self.less_next = true;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn millis(millis: u64) -> Duration {
        Duration::from_millis(millis)
    }

    #[test]
    fn a_distant_source_gets_more_in_flight_and_a_queueing_one_less() {
        let mut window = Window::new();
        assert!(!window.has_room(8, 8 * CHUNK, CHUNK));
        for _ in 0..300 {
            window.measured(millis(20));
        }
        assert!(window.has_room(31, 31 * CHUNK, CHUNK));
        assert!(!window.has_room(32, 32 * CHUNK, CHUNK), "and no more than that");
        // From now on the source serves one after the other: more in flight only takes longer.
        for _ in 0..10_000 {
            window.measured(millis(5 * window.chunks));
        }
        assert!(window.chunks <= FEWEST + STEP, "{}", window.chunks);
        // And what it lost by then it gets back.
        for _ in 0..10_000 {
            window.measured(millis(20));
        }
        assert!(window.chunks >= MOST - STEP, "{}", window.chunks);
    }

    #[test]
    fn one_chunk_always_may_and_small_ones_are_bounded_in_number() {
        let window = Window::new();
        assert!(window.has_room(0, 0, 1 << 40));
        assert!(window.has_room(63, 63 * 4096, 4096));
        assert!(!window.has_room(64, 64 * 4096, 4096));
    }
}
