//! Copying what one disk shows into another: many parts in flight, holes kept.
//!
//! **Invariants.** Reads run ahead side by side; writes begin in order, so that what is new lies in order. Nothing is said to be done
//! before everything was written. What reads as zeros is written only where the target holds something else.

use super::source::Source;
use crate::progress::Steps;
use crate::tool;
use disk::Disk;
use futures_util::StreamExt;
use futures_util::stream::FuturesUnordered;
use layout::{GuestOffset, GuestRange};
use ring::{Iov, JoinHandle};
use std::cell::RefCell;
use std::collections::VecDeque;
use std::rc::Rc;
use std::time::Duration;

/// The unit in which what cannot be read is left out.
const SECTOR: usize = 512;

/// Bytes of one part.
const PART: u64 = 1 << 20;

/// How it is to be done.
#[derive(Clone, Copy, Debug)]
pub(crate) struct How {
    /// Zeros of this length (bytes) and more become holes; 0: everything is written.
    pub(crate) sparse: u64,
    /// Parts in flight.
    pub(crate) parallel: usize,
    /// What the target does not have reads as zeros.
    pub(crate) target_is_zero: bool,
    /// What only lies below the source's top is left to the target's backing file.
    pub(crate) only_top: bool,
    /// What nobody in the source's chain says anything of is left alone.
    pub(crate) only_allocated: bool,
    /// Clusters are packed.
    pub(crate) packed: bool,
    /// Bytes a second at most.
    pub(crate) rate: Option<u64>,
    /// What cannot be read is said, and copied as zeros.
    pub(crate) salvage: bool,
}

impl Default for How {
    fn default() -> Self {
        Self {
            sparse: 4096,
            parallel: 8,
            target_is_zero: true,
            only_top: false,
            only_allocated: false,
            packed: false,
            rate: None,
            salvage: false,
        }
    }
}

/// What becomes of a run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Copy,
    Zero,
    Leave,
}

type Work<T> = JoinHandle<Result<T, String>>;

/// A copy under way.
struct Copy {
    source: Rc<Source>,
    target: Rc<Disk>,
    len: u64,
    how: How,
    /// Clusters of the target, or what is worth a hole: nothing smaller is looked at by itself.
    unit: u64,
    /// Memory that was read into and written from, to be used again: new memory costs as much as the copy.
    spare: RefCell<Vec<Iov>>,
}

/// Copies `len` bytes from `source` into `target`, from the first byte on. Not durable yet when it returns.
pub(crate) async fn copy(
    source: &Rc<Source>,
    target: &Rc<Disk>,
    len: u64,
    how: How,
    steps: &Steps,
) -> Result<(), String> {
    let cluster = target.chain()[0].image.cluster_size();
    // What is packed is packed by the cluster.
    let unit = if how.packed { cluster } else { cluster.max(how.sparse.next_power_of_two()).max(4096) };
    let (source, target) = (Rc::clone(source), Rc::clone(target));
    let copy = Rc::new(Copy { source, target, len, how, unit, spare: RefCell::default() });
    let mut reads: VecDeque<Work<(u64, Iov)>> = VecDeque::new();
    let mut writes: FuturesUnordered<Work<u64>> = FuturesUnordered::new();
    // Writes to one file wait for each other in the system, and more so the more there are; packing is work, and done side by side.
    let writers = if how.packed { how.parallel } else { 1 };
    let mut at = 0;
    let mut pace = Pace { rate: how.rate.unwrap_or(0), due: ring::now() };
    loop {
        while at < len && reads.len() < how.parallel {
            let (kind, run) = copy.next(at).await?;
            let (start, copy) = (at, Rc::clone(&copy));
            at += run;
            match kind {
                Kind::Leave => steps.add(run),
                Kind::Zero if how.target_is_zero && how.sparse > 0 => steps.add(run),
                Kind::Zero => writes.push(ring::spawn(async move { copy.zero(start, run).await.map(|()| run) })),
                Kind::Copy => {
                    pace.wait(run).await;
                    reads.push_back(ring::spawn(async move {
                        let bytes = copy.memory(run as usize);
                        copy.read(start, &bytes).await.map(|()| (start, bytes))
                    }));
                }
            }
            while writes.len() > how.parallel {
                steps.add(writes.next().await.unwrap_or(Ok(0))?);
            }
        }
        let Some(read) = reads.pop_front() else { break };
        let (start, bytes) = read.await?;
        while writes.len() >= writers {
            steps.add(writes.next().await.unwrap_or(Ok(0))?);
        }
        let copy = Rc::clone(&copy);
        writes.push(ring::spawn(async move {
            let len = bytes.len() as u64;
            copy.write(start, bytes.clone()).await?;
            copy.spare.borrow_mut().push(bytes);
            Ok(len)
        }));
    }
    while let Some(written) = writes.next().await {
        steps.add(written?);
    }
    Ok(())
}

/// Holds the copy to its rate.
struct Pace {
    /// Bytes a second; 0: no limit.
    rate: u64,
    /// When the next part may begin.
    due: ring::Instant,
}

impl Pace {
    async fn wait(&mut self, bytes: u64) {
        if self.rate == 0 {
            return;
        }
        ring::sleep_until(self.due).await;
        self.due = self.due.max(ring::now()) + Duration::from_secs_f64(bytes as f64 / self.rate as f64);
    }
}

impl Copy {
    async fn read(&self, at: u64, into: &Iov) -> Result<(), String> {
        let read = self.source.read(at, into.clone()).await;
        if !self.how.salvage || read.is_ok() {
            return read;
        }
        // Sector by sector: what can be read is kept.
        for start in (0..into.len()).step_by(SECTOR) {
            let part = into.slice(start..into.len().min(start + SECTOR));
            if let Err(error) = self.source.read(at + start as u64, part.clone()).await {
                tool::complain(&format!("warning: {error}"));
                part.fill(0);
            }
        }
        Ok(())
    }

    fn memory(&self, len: usize) -> Iov {
        match self.spare.borrow_mut().pop() {
            Some(spare) if spare.len() >= len => spare.slice(0..len),
            _ => Iov::alloc(len),
        }
    }

    /// What becomes of the run at `at` (a multiple of the unit), and how long it is (as well, but at the end).
    async fn next(&self, at: u64) -> Result<(Kind, u64), String> {
        let left = self.len - at;
        let status = self.source.status(at, left).await?;
        let kind = match status {
            _ if self.how.only_top && !(status.allocated && status.depth == 0) => Kind::Leave,
            _ if self.how.only_allocated && !status.allocated => Kind::Leave,
            _ if status.zero => Kind::Zero,
            _ => Kind::Copy,
        };
        let whole = if status.len == left { left } else { status.len / self.unit * self.unit };
        // A unit of which only a part is to be copied is written in that part alone: the rest is somebody else's.
        if self.how.only_allocated {
            return Ok((kind, status.len.min(PART)));
        }
        Ok(match kind {
            Kind::Copy => {
                let most = if self.how.packed { self.unit } else { PART.max(self.unit) };
                (kind, status.len.next_multiple_of(self.unit).min(most).min(left))
            }
            // A unit in parts is copied as it reads.
            _ if whole == 0 => (Kind::Copy, self.unit.min(left)),
            _ => (kind, whole),
        })
    }

    async fn zero(&self, at: u64, len: u64) -> Result<(), String> {
        if self.how.sparse == 0 {
            let zeros = Iov::zeroed(PART.min(len) as usize);
            for part in (0..len).step_by(PART as usize) {
                let zeros = zeros.slice(0..PART.min(len - part) as usize);
                if self.how.packed { self.pack(at + part, zeros).await? } else { self.put(at + part, zeros).await? }
            }
            return Ok(());
        }
        let zeroed = self.target.write_zeroes(GuestRange::new(GuestOffset(at), len), true, false).await;
        zeroed.map_err(|error| format!("error while writing at byte {at}: {error}"))
    }

    async fn put(&self, at: u64, bytes: Iov) -> Result<(), String> {
        let written = self.target.write(GuestOffset(at), bytes, false).await;
        written.map_err(|error| format!("error while writing at byte {at}: {error}"))
    }

    /// Writes what was read; zeros in it become holes.
    async fn write(&self, at: u64, bytes: Iov) -> Result<(), String> {
        let unit = self.unit as usize;
        let is_zero = |start: usize| self.how.sparse > 0 && bytes.slice(start..bytes.len().min(start + unit)).is_zero();
        let mut start = 0;
        while start < bytes.len() {
            let zero = is_zero(start);
            let mut end = start + unit;
            while end < bytes.len() && is_zero(end) == zero {
                end += unit;
            }
            let end = end.min(bytes.len());
            let (place, part) = (at + start as u64, bytes.slice(start..end));
            match zero {
                true if self.how.target_is_zero => {}
                true => self.zero(place, part.len() as u64).await?,
                false if self.how.packed => self.pack(place, part).await?,
                false => self.put(place, part).await?,
            }
            start = end;
        }
        Ok(())
    }

    async fn pack(&self, at: u64, bytes: Iov) -> Result<(), String> {
        let image = Rc::clone(&self.target.chain()[0].image);
        let cluster = image.cluster_size() as usize;
        for start in (0..bytes.len()).step_by(cluster) {
            let part = bytes.slice(start..bytes.len().min(start + cluster));
            let place = at + start as u64;
            let mut whole = part.to_vec();
            whole.resize(cluster, 0);
            let packed = image.pack(GuestOffset(place), Iov::from_slice(&whole)).await;
            if !packed.map_err(|error| format!("error while writing at byte {place}: {error}"))? {
                self.put(place, part).await?;
            }
        }
        Ok(())
    }
}
