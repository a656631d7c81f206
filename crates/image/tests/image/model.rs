//! Images against a model: a byte array. Operations run side by side in an order the seed decides; between rounds everything
//! must read as the model says, and every reopened image must be clean.

use crate::guest::Guest;
use crate::subject::{Subject, subjects};
use image::{Image, OpenOptions};
use layout::{GuestOffset, GuestRange};
use proptest::prelude::*;
use ring::sim::Sim;
use std::rc::Rc;
use store::Store;
use store::memory::MemoryStore;

/// Larger than one L2 table of the smallest geometry reaches, and no multiple of any cluster size.
const SIZE: u64 = (2 << 20) + 300_000 / 512 * 512;

#[derive(Clone, Debug)]
enum Op {
    Write { at: u64, len: u64, byte: u8 },
    Zero { cluster: u64, clusters: u64, unmap: bool },
    Populate { at: u64, len: u64 },
    Reserve { at: u64, len: u64 },
    Commit,
    Settle,
}

#[derive(Clone, Debug)]
enum Step {
    /// Side by side, on clusters of their own (populates may meet anything).
    Round(Vec<Op>),
    Reopen {
        table_memory: usize,
    },
    Grow {
        sectors: u64,
    },
}

fn op() -> impl Strategy<Value = Op> {
    let at =
        prop_oneof![0..SIZE, (0..SIZE).prop_map(|at| at / 65536 * 65536), (0..20u64).prop_map(|n| SIZE - 1 - n * 500)];
    let len = prop_oneof![1u64..100, 1u64..70_000, 60_000u64..300_000];
    prop_oneof![
        6 => (at.clone(), len.clone(), 1u8..).prop_map(|(at, len, byte)| Op::Write { at, len, byte }),
        2 => (0u64..600, 1u64..150, any::<bool>()).prop_map(|(cluster, clusters, unmap)| Op::Zero { cluster, clusters, unmap }),
        2 => (at.clone(), len.clone()).prop_map(|(at, len)| Op::Populate { at, len }),
        1 => (at, len).prop_map(|(at, len)| Op::Reserve { at, len }),
        2 => Just(Op::Commit),
        1 => Just(Op::Settle),
    ]
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        8 => proptest::collection::vec(op(), 1..12).prop_map(Step::Round),
        2 => prop_oneof![Just(16 << 10), Just(1 << 20)].prop_map(|table_memory| Step::Reopen { table_memory }),
        1 => (0u64..4000).prop_map(|sectors| Step::Grow { sectors }),
    ]
}

struct World {
    subject: Subject,
    store: Rc<MemoryStore>,
    guest: Guest,
    model: Vec<u8>,
}

impl World {
    async fn open(subject: &Subject, store: Rc<dyn Store>, table_memory: usize) -> Rc<dyn Image> {
        match subject.format {
            image::Format::Qed => {
                image::qed::open_with_table_memory(store, OpenOptions::default(), table_memory).await.unwrap()
            }
            _ => image::qcow2::open_with_table_memory(store, OpenOptions::default(), table_memory).await.unwrap(),
        }
    }

    async fn round(&mut self, ops: Vec<Op>) {
        let cluster = self.guest.image.cluster_size();
        let size = self.model.len() as u64;
        let clip = |at: u64, len: u64| {
            let at = at.min(size - 1);
            GuestRange::new(GuestOffset(at), len.min(size - at))
        };
        let mut taken: Vec<GuestRange> = Vec::new();
        let mut claim = |range: GuestRange| {
            let range = range.align_outward(cluster);
            let free = taken.iter().all(|other| !other.overlaps(range));
            if free {
                taken.push(range);
            }
            free
        };
        let mut tasks = Vec::new();
        for op in ops {
            let guest = self.guest.clone();
            match op {
                Op::Write { at, len, byte } => {
                    let range = clip(at, len);
                    if !claim(range) {
                        continue;
                    }
                    let bytes: Vec<u8> = (0..range.len()).map(|i| byte.wrapping_add((i / 511) as u8)).collect();
                    let start = range.start().get() as usize;
                    self.model[start..start + bytes.len()].copy_from_slice(&bytes);
                    tasks.push(ring::spawn(async move { guest.write(range.start().get(), &bytes).await.unwrap() }));
                }
                Op::Zero { cluster: first, clusters, unmap } => {
                    let range = clip(first * cluster, clusters * cluster);
                    if !range.start().is_aligned(cluster) || !claim(range) {
                        continue;
                    }
                    self.model[range.start().get() as usize..range.end().get() as usize].fill(0);
                    let masked = !guest.below.is_empty();
                    tasks.push(ring::spawn(
                        async move { guest.image.write_zeroes(range, unmap, masked).await.unwrap() },
                    ));
                }
                Op::Populate { at, len } => {
                    let range = clip(at, len);
                    tasks.push(ring::spawn(async move { guest.populate(range).await.unwrap() }));
                }
                Op::Reserve { at, len } => {
                    let range = clip(at, len);
                    tasks.push(ring::spawn(async move {
                        let reservation = guest.image.reserve(range, image::Purpose::Data).await.unwrap();
                        for _ in 0..len % 7 {
                            ring::yield_now().await;
                        }
                        drop(reservation);
                    }));
                }
                Op::Commit => tasks.push(ring::spawn(async move { guest.image.commit().await.unwrap() })),
                Op::Settle => tasks.push(ring::spawn(async move { guest.image.settle().await.unwrap() })),
            }
        }
        for task in tasks {
            task.await;
        }
    }

    async fn assert_reads(&self) {
        let found = self.guest.read_all().await.unwrap();
        assert_eq!(found.len(), self.model.len());
        if found != self.model {
            let at = found.iter().zip(&self.model).position(|(a, b)| a != b).unwrap();
            panic!("{}: byte {at} is {} instead of {}", self.subject.name, found[at], self.model[at]);
        }
    }

    async fn reopen(&mut self, table_memory: usize) {
        self.guest.image.close().await.unwrap();
        self.subject.assert_clean(self.store.clone()).await;
        let image = Self::open(&self.subject, self.store.clone(), table_memory).await;
        self.guest = Guest { image, below: self.guest.below.clone() };
        self.assert_reads().await;
    }
}

async fn run(subject: Subject, with_backing: bool, steps: Vec<Step>) {
    let store = MemoryStore::new("model.img", 0);
    subject.create(store.clone(), SIZE, None).await;
    let below: Vec<u8> =
        if with_backing { (0..SIZE - 70_000).map(|i| (i / 777) as u8 | 1).collect() } else { Vec::new() };
    let mut model = below.clone();
    model.resize(SIZE as usize, 0);
    let guest = Guest::new(World::open(&subject, store.clone(), 16 << 10).await, &below);
    let mut world = World { subject, store, guest, model };
    for step in steps {
        match step {
            Step::Round(ops) => world.round(ops).await,
            Step::Reopen { table_memory } => world.reopen(table_memory).await,
            Step::Grow { sectors } => {
                let size =
                    (world.model.len() as u64 + sectors * 512).min(5 << 20).max(world.model.len() as u64) / 512 * 512;
                world.guest.image.resize(size).await.unwrap();
                world.model.resize(size as usize, 0);
            }
        }
        world.assert_reads().await;
    }
    world.reopen(1 << 20).await;
    world.guest.image.close().await.unwrap();
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, max_shrink_iters: 300, ..ProptestConfig::default() })]
    #[test]
    fn image_behaves_as_an_array(
        seed: u64,
        subject in 0..subjects().len(),
        with_backing: bool,
        steps in proptest::collection::vec(step(), 1..14),
    ) {
        let subject = subjects().swap_remove(subject);
        Sim::new(seed).block_on(run(subject, with_backing, steps));
    }
}
