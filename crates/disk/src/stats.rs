//! Counters: what guests asked for, how long it took, and what copying moved.

use crate::Stats;
use image::Result;
use layout::HostRange;
use ring::Instant;
use std::cell::Cell;

/// A kind of guest request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Request {
    Read,
    Write,
    Unmap,
    Flush,
}

/// The counters of one disk.
#[derive(Default)]
pub(crate) struct Counters {
    stats: Cell<Stats>,
}

impl Counters {
    pub(crate) fn get(&self) -> Stats {
        self.stats.get()
    }

    pub(crate) fn update(&self, change: impl FnOnce(&mut Stats)) {
        let mut stats = self.stats.get();
        change(&mut stats);
        self.stats.set(stats);
    }

    /// Counts a request that began at `began` and has ended.
    pub(crate) fn ended(&self, request: Request, bytes: u64, began: Instant, result: &Result<()>) {
        let ns = u64::try_from(ring::now().since(began).as_nanos()).unwrap_or(u64::MAX);
        self.update(|s| {
            let (done, operations, failed, time) = match request {
                Request::Read => {
                    (&mut s.rd_bytes, &mut s.rd_operations, &mut s.failed_rd_operations, &mut s.rd_total_time_ns)
                }
                Request::Write => {
                    (&mut s.wr_bytes, &mut s.wr_operations, &mut s.failed_wr_operations, &mut s.wr_total_time_ns)
                }
                Request::Unmap => (
                    &mut s.unmap_bytes,
                    &mut s.unmap_operations,
                    &mut s.failed_unmap_operations,
                    &mut s.unmap_total_time_ns,
                ),
                Request::Flush => {
                    (&mut 0, &mut s.flush_operations, &mut s.failed_flush_operations, &mut s.flush_total_time_ns)
                }
            };
            if result.is_ok() {
                *done += bytes;
                *operations += 1;
                *time = time.saturating_add(ns);
            } else {
                *failed += 1;
            }
        });
    }

    /// Bytes that came from below the top.
    pub(crate) fn fetched(&self, bytes: u64) {
        self.update(|s| s.fetched_bytes += bytes);
    }

    /// The top's store was written at `range`.
    pub(crate) fn wrote(&self, range: HostRange) {
        self.update(|s| s.wr_highest_offset = s.wr_highest_offset.max(range.end().get()));
    }
}
