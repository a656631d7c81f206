//! Load: requests of one kind kept in flight at a fixed depth, by our own clients, which cost less than fio does and
//! so leave the processors to the servers; or by fio, to see that both say the same.

use std::collections::HashMap;
use std::path::Path;
use std::time::{Duration, Instant};

use headwater_tests::process::{PATIENCE, run};
use headwater_tests::random::Random;
use headwater_tests::{Result, error, nbd, vhost};
use serde_json::Value;

use crate::files::CLUSTER;

/// Guests' page size, and so the size of what they ask for at random.
pub(crate) const BLOCK: u32 = 4096;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Op {
    Read,
    Write,
}

/// Where the requests go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Pattern {
    /// Any block, any number of times.
    Anywhere,
    /// Every cluster once, in random order, a random block of each; ends early when all had their turn.
    EachCluster,
}

/// What a load did.
#[derive(Clone, Debug, Default)]
pub(crate) struct Done {
    pub(crate) ops: u64,
    pub(crate) seconds: f64,
    /// Microseconds.
    pub(crate) median: f64,
    pub(crate) p99: f64,
}

/// Requests in flight on one connection or queue. A place is a number below the depth.
pub(crate) trait Target {
    fn submit(&mut self, place: usize, op: Op, offset: u64) -> Result;
    fn push(&mut self) -> Result;
    /// Waits for one request; its place.
    fn complete(&mut self) -> Result<usize>;
    fn flush(&mut self) -> Result;
    fn size(&self) -> u64;
}

/// Keeps `depth` requests in flight for `seconds`; writes end with a flush, which counts.
pub(crate) fn drive(
    target: &mut dyn Target,
    op: Op,
    pattern: Pattern,
    depth: usize,
    seconds: f64,
    seed: u64,
) -> Result<Done> {
    let mut offsets = Offsets::new(pattern, target.size(), seed);
    let mut started = vec![Instant::now(); depth];
    let mut took: Vec<u32> = Vec::with_capacity(1 << 20);
    let begin = Instant::now();
    let end = begin + Duration::from_secs_f64(seconds);
    let mut in_flight = 0;
    for (place, started) in started.iter_mut().enumerate() {
        if let Some(offset) = offsets.next() {
            *started = Instant::now();
            target.submit(place, op, offset)?;
            in_flight += 1;
        }
    }
    target.push()?;
    while in_flight > 0 {
        let place = target.complete()?;
        let now = Instant::now();
        took.push(u32::try_from((now - started[place]).as_nanos()).unwrap_or(u32::MAX));
        in_flight -= 1;
        if now < end
            && let Some(offset) = offsets.next()
        {
            started[place] = now;
            target.submit(place, op, offset)?;
            in_flight += 1;
        }
    }
    if op == Op::Write {
        target.flush()?;
    }
    let seconds = begin.elapsed().as_secs_f64();
    took.sort_unstable();
    let at = |part: f64| {
        let index = (took.len() as f64 * part) as usize;
        took.get(index).map_or(0.0, |nanos| f64::from(*nanos) / 1000.0)
    };
    Ok(Done { ops: took.len() as u64, seconds, median: at(0.5), p99: at(0.99) })
}

struct Offsets {
    random: Random,
    blocks: u64,
    /// Clusters still to come, last first.
    clusters: Option<Vec<u64>>,
}

impl Offsets {
    fn new(pattern: Pattern, size: u64, seed: u64) -> Self {
        let mut random = Random::new(seed);
        let clusters = (pattern == Pattern::EachCluster).then(|| {
            let mut clusters: Vec<u64> = (0..size / CLUSTER).collect();
            for last in (1..clusters.len()).rev() {
                clusters.swap(last, random.below(last as u64 + 1) as usize);
            }
            clusters
        });
        Offsets { random, blocks: size / u64::from(BLOCK), clusters }
    }

    fn next(&mut self) -> Option<u64> {
        let block = u64::from(BLOCK);
        match &mut self.clusters {
            None => Some(self.random.below(self.blocks) * block),
            Some(clusters) => {
                let within = self.random.below(CLUSTER / block) * block;
                clusters.pop().map(|cluster| cluster * CLUSTER + within)
            }
        }
    }
}

/// Random bytes to write: zeroes might be detected.
fn payload() -> Vec<u8> {
    let mut data = vec![0; BLOCK as usize];
    Random::new(99).fill(&mut data);
    data
}

pub(crate) struct Nbd {
    client: nbd::Client,
    places: HashMap<u64, usize>,
    payload: Vec<u8>,
}

impl Nbd {
    pub(crate) fn connect(socket: &Path) -> Result<Nbd> {
        Ok(Nbd { client: nbd::Client::connect(socket)?, places: HashMap::new(), payload: payload() })
    }
}

impl Target for Nbd {
    fn submit(&mut self, place: usize, op: Op, offset: u64) -> Result {
        let (command, data): (_, &[u8]) = match op {
            Op::Read => (nbd::Command::Read, &[]),
            Op::Write => (nbd::Command::Write, &self.payload),
        };
        let cookie = self.client.submit(command, 0, offset, BLOCK, data)?;
        self.places.insert(cookie, place);
        Ok(())
    }

    fn push(&mut self) -> Result {
        self.client.push()
    }

    fn complete(&mut self) -> Result<usize> {
        let (cookie, reply) = self.client.complete()?;
        reply?;
        self.places.remove(&cookie).ok_or_else(|| error!("an unknown cookie: {cookie}"))
    }

    fn flush(&mut self) -> Result {
        self.client.flush()
    }

    fn size(&self) -> u64 {
        self.client.size()
    }
}

pub(crate) struct VhostUser {
    client: vhost::Client,
    places: Vec<usize>,
}

impl VhostUser {
    pub(crate) fn connect(socket: &Path, depth: usize) -> Result<VhostUser> {
        let options = vhost::Options {
            // One more for the flush.
            depth: u16::try_from(depth + 1)?,
            buffer: BLOCK,
            ..vhost::Options::default()
        };
        let mut client = vhost::Client::connect_with(socket, options)?;
        // Each place is used once, so that its memory is there, and then filled with what writes will write.
        let mut slots = Vec::new();
        while let Some(slot) = client.claim(0) {
            client.submit(0, slot, vhost::Kind::Read, 0, BLOCK)?;
            slots.push(slot);
        }
        for _ in &slots {
            client.complete(0, PATIENCE)?;
        }
        let payload = payload();
        for slot in slots {
            client.fill(0, slot, &payload)?;
        }
        Ok(VhostUser { client, places: vec![0; depth + 1] })
    }
}

impl Target for VhostUser {
    fn submit(&mut self, place: usize, op: Op, offset: u64) -> Result {
        let slot = self.client.claim(0).ok_or("more requests than places")?;
        let kind = match op {
            Op::Read => vhost::Kind::Read,
            Op::Write => vhost::Kind::Write,
        };
        self.places[slot.index()] = place;
        self.client.submit(0, slot, kind, offset, BLOCK)
    }

    fn push(&mut self) -> Result {
        self.client.push(0)
    }

    fn complete(&mut self) -> Result<usize> {
        let (slot, status) = self.client.complete(0, PATIENCE)?;
        if status == vhost::Status::OK { Ok(self.places[slot.index()]) } else { Err(status.into()) }
    }

    fn flush(&mut self) -> Result {
        self.client.flush()
    }

    fn size(&self) -> u64 {
        self.client.size()
    }
}

/// The same load over NBD by fio.
pub(crate) fn fio(socket: &Path, op: Op, depth: usize, seconds: f64) -> Result<Done> {
    let (pattern, side) = match op {
        Op::Read => ("randread", "read"),
        Op::Write => ("randwrite", "write"),
    };
    let args = [
        "--name=load".to_owned(),
        "--output-format=json".to_owned(),
        "--ioengine=nbd".to_owned(),
        format!("--uri=nbd+unix:///?socket={}", socket.display()),
        format!("--rw={pattern}"),
        format!("--bs={BLOCK}"),
        format!("--iodepth={depth}"),
        "--time_based".to_owned(),
        format!("--runtime={}ms", (seconds * 1000.0) as u64),
        "--end_fsync=1".to_owned(),
    ];
    let text = run("fio", args)?.ok()?;
    // fio may say something before its JSON.
    let json = text.find('{').map_or("", |at| &text[at..]);
    let result: Value = serde_json::from_str(json)?;
    let load = &result["jobs"][0][side];
    let number = |value: &Value| value.as_f64().ok_or_else(|| error!("fio's result has no such number: {load}"));
    let ops = number(&load["total_ios"])?;
    Ok(Done {
        ops: ops as u64,
        seconds: number(&load["runtime"])? / 1000.0,
        median: number(&load["clat_ns"]["percentile"]["50.000000"])? / 1000.0,
        p99: number(&load["clat_ns"]["percentile"]["99.000000"])? / 1000.0,
    })
}
