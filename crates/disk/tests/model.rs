//! Random use of random chains against a model in memory, under the deterministic executor.
//!
//! Requests of one batch run side by side. No byte is written twice in a batch, so the bytes afterwards are certain, and a
//! read alongside must see, byte by byte, what was there before or what is there after.

extern crate headwater_disk as disk;

mod harness;

use disk::{Disk, DiskOptions, ErrorKind, StreamBase};
use futures_util::future::join_all;
use harness::dice::Dice;
use harness::world::{Formats, World};
use layout::{GuestOffset, GuestRange};
use proptest::collection::vec;
use proptest::prelude::*;
use ring::Iov;
use ring::sim::Sim;
use std::cell::RefCell;
use std::rc::Rc;

/// Where in the disk, as parts of its size; and how long, in bytes.
#[derive(Clone, Copy, Debug)]
struct Place {
    at: u16,
    len: u32,
}

impl Place {
    fn on(self, size: u64) -> GuestRange {
        let at = (size - 1) * u64::from(self.at) / u64::from(u16::MAX);
        GuestOffset(at).range(u64::from(self.len).clamp(1, size - at))
    }
}

#[derive(Clone, Copy, Debug)]
enum Op {
    Read(Place),
    Write(Place, bool),
    Zero(Place, bool),
    Discard(Place),
    Flush,
    Populate(Place, u8),
    Prefetch(Place),
    Stream(u8, u32),
    Resize(u32),
    CopyOnRead(bool),
    Status,
    Reopen,
}

#[derive(Clone, Copy, Debug)]
struct LayerPlan {
    /// Index into the cluster sizes.
    unit: u8,
    size: u32,
    writes: u8,
}

#[derive(Clone, Debug)]
struct Plan {
    seed: u64,
    slow: bool,
    raw_bottom: bool,
    write_through: bool,
    /// Bottom first.
    layers: Vec<LayerPlan>,
    batches: Vec<Vec<Op>>,
}

fn place() -> impl Strategy<Value = Place> {
    (any::<u16>(), prop_oneof![1..20_000_u32, 1..600_u32, Just(200_000)]).prop_map(|(at, len)| Place { at, len })
}

fn op() -> impl Strategy<Value = Op> {
    prop_oneof![
        6 => place().prop_map(Op::Read),
        8 => (place(), any::<bool>()).prop_map(|(place, fua)| Op::Write(place, fua)),
        3 => (place(), any::<bool>()).prop_map(|(place, unmap)| Op::Zero(place, unmap)),
        3 => place().prop_map(Op::Discard),
        2 => Just(Op::Flush),
        3 => (place(), any::<u8>()).prop_map(|(place, base)| Op::Populate(place, base)),
        1 => place().prop_map(Op::Prefetch),
        1 => (any::<u8>(), 1..100_000_u32).prop_map(|(base, chunk)| Op::Stream(base, chunk)),
        1 => (1..30_000_u32).prop_map(Op::Resize),
        2 => any::<bool>().prop_map(Op::CopyOnRead),
        1 => Just(Op::Status),
        1 => Just(Op::Reopen),
    ]
}

fn plan() -> impl Strategy<Value = Plan> {
    let layer =
        (any::<u8>(), 1..150_000_u32, 0..12_u8).prop_map(|(unit, size, writes)| LayerPlan { unit, size, writes });
    (any::<u64>(), any::<bool>(), any::<bool>(), any::<bool>(), vec(layer, 1..5), vec(vec(op(), 1..7), 1..14)).prop_map(
        |(seed, slow, raw_bottom, write_through, layers, batches)| Plan {
            seed,
            slow,
            raw_bottom,
            write_through,
            layers,
            batches,
        },
    )
}

/// Bytes for a write, different for each, seldom zero.
fn pattern(number: u64, range: GuestRange) -> Vec<u8> {
    (range.start().get()..range.end().get()).map(|at| (at / 7 + number * 37 + at % 5) as u8).collect()
}

fn put(content: &mut [u8], range: GuestRange, bytes: &[u8]) {
    content[range.start().get() as usize..range.end().get() as usize].copy_from_slice(bytes);
}

fn zero(content: &mut [u8], range: GuestRange) {
    content[range.start().get() as usize..range.end().get() as usize].fill(0);
}

struct Run {
    world: Rc<World>,
    disk: Rc<Disk>,
    content: Vec<u8>,
    numbers: u64,
    options: DiskOptions,
}

const TOP: &str = "top";

async fn build(plan: &Plan, formats: Formats) -> Run {
    let world = World::new(formats, plan.seed, plan.slow);
    let dice = Dice::new(plan.seed ^ 1);
    let units: &[u64] = if formats == Formats::Real { &[4096, 65536, 8192] } else { &[512, 4096, 1024, 16384] };
    let mut content: Vec<u8> = Vec::new();
    let mut below: Option<String> = None;
    for (i, layer) in plan.layers.iter().enumerate() {
        let is_top = i + 1 == plan.layers.len();
        let name = if is_top { TOP.to_owned() } else { format!("layer{i}") };
        let raw = i == 0 && plan.raw_bottom;
        let unit = units[usize::from(layer.unit) % units.len()];
        let mut size = u64::from(layer.size);
        if formats == Formats::Real {
            size = size.next_multiple_of(512);
        }
        world.create(&name, (!raw).then_some(unit), size, below.as_deref()).await;
        let disk = Disk::new("build", world.open(&name).await, DiskOptions::default());
        content.resize(size as usize, 0);
        for number in 0..u64::from(layer.writes) {
            let range = Place { at: dice.next() as u16, len: dice.below(9000) as u32 + 1 }.on(size);
            if dice.one_in(4) {
                disk.write_zeroes(range, true, false).await.unwrap();
                zero(&mut content, range);
            } else {
                let bytes = pattern(1000 + number + i as u64 * 50, range);
                disk.write(range.start(), Iov::from_slice(&bytes), false).await.unwrap();
                put(&mut content, range, &bytes);
            }
        }
        disk.close().await.unwrap();
        below = Some(name);
    }
    let options = DiskOptions { write_through: plan.write_through, ..DiskOptions::default() };
    let disk = Disk::new("model", world.open(TOP).await, options);
    Run { world, disk, content, numbers: 0, options }
}

fn base_of(disk: &Disk, choice: u8) -> StreamBase {
    let chain = disk.chain();
    match usize::from(choice) % chain.len() {
        0 => StreamBase::Nothing,
        layer => StreamBase::Node(chain[layer].node.clone()),
    }
}

async fn stream(disk: &Disk, base: &StreamBase, chunk: u64) {
    let Ok(_claim) = disk.claim("stream") else { return };
    let Some(_) = disk.next_missing(GuestOffset::ZERO, base).await.transpose() else {
        disk.finish_stream(base, None).await.unwrap();
        return;
    };
    let mut from = GuestOffset::ZERO;
    while let Some(missing) = disk.next_missing(from, base).await.unwrap() {
        assert!(missing.range.start() >= from.align_down(1 << 20) && !missing.range.is_empty());
        let part = missing.range.first(chunk);
        disk.populate(part, base).await.unwrap();
        from = part.end();
    }
    disk.finish_stream(base, None).await.unwrap();
    let kept = disk.chain();
    match base {
        StreamBase::Nothing => assert!(kept.len() == 1 && kept[0].image.backing().is_none()),
        StreamBase::Node(node) => {
            assert_eq!(kept[1].node, *node);
            assert_eq!(kept[0].image.backing().unwrap().name, kept[1].name);
        }
    }
}

impl Run {
    async fn batch(&mut self, ops: &[Op]) {
        let size = self.disk.size();
        let before = self.content.clone();
        let mut written: Vec<GuestRange> = Vec::new();
        let unit = self.disk.chain()[0].image.cluster_size();
        let grown = Rc::new(RefCell::new(size));
        let mut running: Vec<std::pin::Pin<Box<dyn Future<Output = ()>>>> = Vec::new();
        let mut reads: Vec<(GuestRange, Iov)> = Vec::new();
        let mut reshaped = false;
        for op in ops {
            let disk = Rc::clone(&self.disk);
            self.numbers += 1;
            match *op {
                Op::Write(place, _) | Op::Zero(place, _) | Op::Discard(place)
                    if written.iter().any(|other| other.overlaps(place.on(size))) => {}
                Op::Read(place) => {
                    let range = place.on(size);
                    let into = Iov::alloc(range.len() as usize);
                    into.fill(0x99);
                    reads.push((range, into.clone()));
                    running.push(Box::pin(async move { disk.read(range.start(), into).await.unwrap() }));
                }
                Op::Write(place, fua) => {
                    let range = place.on(size);
                    written.push(range);
                    let bytes = pattern(self.numbers, range);
                    put(&mut self.content, range, &bytes);
                    running.push(Box::pin(async move {
                        // In several pieces of memory, as a guest's is.
                        let cut = bytes.len() / 3;
                        let from = Iov::from_slice(&bytes[..cut]).join(&Iov::from_slice(&bytes[cut..]));
                        disk.write(range.start(), from, fua).await.unwrap();
                    }));
                }
                Op::Zero(place, unmap) => {
                    let range = place.on(size);
                    written.push(range);
                    zero(&mut self.content, range);
                    running.push(Box::pin(async move { disk.write_zeroes(range, unmap, false).await.unwrap() }));
                }
                Op::Discard(place) => {
                    let range = place.on(size);
                    written.push(range);
                    let end = if range.end().get() == size { range.end() } else { range.end().align_down(unit) };
                    zero(&mut self.content, GuestRange::between(range.start().align_up(unit).min(end), end));
                    running.push(Box::pin(async move { disk.discard(range).await.unwrap() }));
                }
                Op::Flush => running.push(Box::pin(async move { disk.flush().await.unwrap() })),
                Op::Populate(place, base) if !reshaped => {
                    let base = base_of(&disk, base);
                    running.push(Box::pin(async move {
                        match disk.populate(place.on(size), &base).await {
                            Ok(copied) => assert!(copied.data + copied.zero <= disk.size().next_multiple_of(unit)),
                            // A stream of the same batch has let go of the base meanwhile.
                            Err(e) => assert_eq!(e.kind(), ErrorKind::InvalidArgument, "{e}"),
                        }
                    }));
                }
                Op::Prefetch(place) => {
                    running.push(Box::pin(async move { disk.prefetch(place.on(size)).await.unwrap() }));
                }
                Op::Stream(base, chunk) if !reshaped => {
                    reshaped = true;
                    let base = base_of(&disk, base);
                    running.push(Box::pin(async move { stream(&disk, &base, u64::from(chunk)).await }));
                }
                Op::Resize(by) => {
                    let by = u64::from(by).next_multiple_of(512);
                    let grown = Rc::clone(&grown);
                    running.push(Box::pin(async move {
                        match disk.resize(size.next_multiple_of(512) + by).await {
                            Ok(()) => *grown.borrow_mut() = size.next_multiple_of(512) + by,
                            // A job has the disk.
                            Err(e) if e.kind() == ErrorKind::Busy => {}
                            // Another growth of the batch went further.
                            Err(e) => assert!(disk.size() > size.next_multiple_of(512) + by, "{e}"),
                        }
                    }));
                }
                Op::CopyOnRead(on) => {
                    self.options.copy_on_read = on;
                    disk.set_copy_on_read(on);
                }
                Op::Status => running.push(Box::pin(async move {
                    let mut rest = GuestOffset::ZERO.range(size);
                    while !rest.is_empty() {
                        let status = disk.status(rest).await.unwrap();
                        assert!(status.len >= 1 && status.len <= rest.len());
                        rest = rest.skip(status.len);
                    }
                })),
                Op::Populate(..) | Op::Stream(..) | Op::Reopen => {}
            }
        }
        // Each a task of its own, so that chance orders them.
        join_all(running.into_iter().map(ring::spawn)).await;
        for (range, into) in reads {
            for (at, byte) in (range.start().get() as usize..).zip(into.to_vec()) {
                let legal = byte == before[at] || byte == self.content[at];
                assert!(legal, "read {byte:#x} at {at:#x}: neither {:#x} nor {:#x}", before[at], self.content[at]);
            }
        }
        let size = self.disk.size();
        assert!(size >= *grown.borrow());
        self.content.resize(size as usize, 0);
        if ops.iter().any(|op| matches!(op, Op::Reopen)) {
            self.reopen().await;
        }
        self.verify().await;
    }

    async fn reopen(&mut self) {
        self.disk.close().await.unwrap();
        if let Some(tables) = &self.world.file(TOP).tables {
            assert_eq!(tables.leaked(), 0, "clusters lost");
        }
        self.disk = Disk::new("model", self.world.open(TOP).await, self.options);
    }

    async fn verify(&self) {
        assert_eq!(self.disk.size(), self.content.len() as u64);
        let into = Iov::alloc(self.content.len());
        self.disk.read(GuestOffset::ZERO, into.clone()).await.unwrap();
        let got = into.to_vec();
        if let Some(at) = got.iter().zip(&self.content).position(|(a, b)| a != b) {
            panic!("at {at:#x} of {:#x}: {:#x} instead of {:#x}", got.len(), got[at], self.content[at]);
        }
        let mut rest = GuestOffset::ZERO.range(self.disk.size());
        while !rest.is_empty() {
            let status = self.disk.status(rest).await.unwrap();
            let at = rest.start().get() as usize;
            let bytes = &self.content[at..at + status.len as usize];
            assert!(!status.zero || bytes.iter().all(|b| *b == 0), "{status:?} at {at:#x}");
            rest = rest.skip(status.len);
        }
    }
}

fn carry_out(plan: &Plan, formats: Formats) {
    Sim::new(plan.seed).block_on(async {
        let mut run = build(plan, formats).await;
        run.verify().await;
        for batch in &plan.batches {
            run.batch(batch).await;
        }
        run.reopen().await;
        run.verify().await;
        run.disk.close().await.unwrap();
    });
}

/// `PROPTEST_CASES` overrides.
fn config() -> ProptestConfig {
    let cases = if std::env::var_os("PROPTEST_CASES").is_some() { ProptestConfig::default().cases } else { 160 };
    ProptestConfig { cases, max_shrink_iters: 4000, failure_persistence: None, ..ProptestConfig::default() }
}

proptest! {
    #![proptest_config(config())]

    #[test]
    fn a_disk_is_what_was_written(plan in plan()) {
        carry_out(&plan, Formats::Sketched);
    }

    #[test]
    fn a_disk_of_qed_and_raw_is_what_was_written(plan in plan()) {
        carry_out(&plan, Formats::Real);
    }
}
