//! Clusters that a top has only parts of (QCOW2's subclusters, as QEMU writes them): whatever is done to them, and to what surrounds
//! them, every byte is the guest's, zero, or what lies below.

extern crate headwater_disk as disk;

use disk::{Disk, DiskOptions, Layer, StreamBase};
use futures_util::future::LocalBoxFuture;
use image::create::CreateOptions;
use image::qcow2::{self, DataFile};
use image::{BackingRef, Companions, Format, OpenOptions, Repair, Surroundings};
use layout::{GuestOffset, GuestRange, HostOffset};
use ring::Iov;
use ring::sim::Sim;
use std::rc::Rc;
use store::Store;
use store::memory::MemoryStore;

const CLUSTER: u64 = 16 << 10;
/// Subclusters of a cluster, and their bytes.
const PARTS: u64 = 32;
const PART: u64 = CLUSTER / PARTS;
/// The last cluster is cut off.
const SIZE: u64 = 12 * CLUSTER + 9 * PART;

struct Only(Rc<dyn Store>);

impl Companions for Only {
    fn open<'a>(&'a self, _: &'a str, _: &'a str, _: bool) -> LocalBoxFuture<'a, image::Result<Rc<dyn Store>>> {
        Box::pin(async move { Ok(self.0.clone()) })
    }
}

struct Random(u64);

impl Random {
    fn below(&mut self, bound: u64) -> u64 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) % bound
    }
}

async fn open(tables: Rc<MemoryStore>, data: &Rc<MemoryStore>) -> Rc<dyn image::Image> {
    let companions = Only(data.clone());
    let surroundings = Surroundings { companions: &companions, ..Surroundings::default() };
    image::open_in(tables, Format::Qcow2, OpenOptions::default(), surroundings).await.unwrap()
}

async fn number(store: &MemoryStore, at: u64) -> u64 {
    let bytes = Iov::alloc(8);
    store.read(HostOffset(at), bytes.clone()).await.unwrap();
    u64::from_be_bytes(bytes.to_vec().try_into().unwrap())
}

/// Full of `data`, and then only parts of it said to be there, or zeros; what remains shows `below`. What all of it reads as.
async fn in_parts(tables: &Rc<MemoryStore>, data: &Rc<MemoryStore>, below: &[u8], random: &mut Random) -> Vec<u8> {
    let base = image::open(MemoryStore::from_bytes("base", below), Format::Raw, OpenOptions::default()).await.unwrap();
    let layers = vec![Layer::new("top", "top", open(tables.clone(), data).await), Layer::new("base", "base", base)];
    let disk = Disk::new("d", layers, DiskOptions::default());
    disk.write(GuestOffset(0), Iov::from_slice(&vec![0xdd; SIZE as usize]), false).await.unwrap();
    disk.close().await.unwrap();
    let l1 = number(tables, 40).await;
    let l2 = number(tables, l1).await & 0x00ff_ffff_ffff_fe00;
    let mut shown = below[..SIZE as usize].to_vec();
    for cluster in 0..SIZE.div_ceil(CLUSTER) {
        let (mut there, mut zero) = (0_u64, 0_u64);
        let plain = random.below(4) == 0;
        let kind = random.below(3);
        for part in 0..PARTS {
            let kind = if plain || part % (1 + cluster % 7) != 0 { kind } else { random.below(3) };
            there |= u64::from(kind == 1) << part;
            zero |= u64::from(kind == 2) << (part + 32);
            let (from, to) = ((cluster * PARTS + part) * PART, ((cluster * PARTS + part + 1) * PART).min(SIZE));
            if kind > 0 && from < SIZE {
                shown[from as usize..to as usize].fill(if kind == 1 { 0xdd } else { 0 });
            }
        }
        tables
            .write(HostOffset(l2 + cluster * 16 + 8), Iov::from_slice(&(there | zero).to_be_bytes()), false)
            .await
            .unwrap();
    }
    shown
}

async fn assert_shows(disk: &Disk, expected: &[u8], what: &str) {
    let all = Iov::alloc(expected.len());
    disk.read(GuestOffset(0), all.clone()).await.unwrap();
    let all = all.to_vec();
    let first = || all.iter().zip(expected).position(|(a, b)| a != b);
    assert!(all == expected, "{what}: from {:?} on", first());
}

fn run(seed: u64, with_data_file: bool) {
    Sim::new(seed).block_on(async {
        let mut random = Random(seed * 2 + 1);
        let below: Vec<u8> = (0..SIZE + 2 * CLUSTER).map(|n| (n / 512 % 150 + 1) as u8).collect();
        let base =
            image::open(MemoryStore::from_bytes("base", &below), Format::Raw, OpenOptions::default()).await.unwrap();
        let (tables, data) = (MemoryStore::new("top", 0), MemoryStore::new("data", SIZE));
        let backing = Some(BackingRef { name: "base".into(), format: Some(Format::Raw) });
        let own = qcow2::Options { extended_l2: true, ..qcow2::Options::default() };
        let options = CreateOptions {
            backing,
            cluster_size: Some(CLUSTER),
            qcow2: own,
            ..CreateOptions::new(Format::Qcow2, SIZE)
        };
        if with_data_file {
            let file = DataFile { name: "data".into(), raw: false };
            qcow2::create_with_data_file(tables.clone(), &options, &file).await.unwrap();
        } else {
            image::create::create(tables.clone(), &options).await.unwrap();
        }
        let mut shown = in_parts(&tables, &data, &below, &mut random).await;
        let top = open(tables.clone(), &data).await;
        let options = DiskOptions { copy_on_read: seed.is_multiple_of(2), discard: true, ..DiskOptions::default() };
        let disk = Disk::new("d", vec![Layer::new("top", "top", top), Layer::new("base", "base", base)], options);
        assert_shows(&disk, &shown, "before anything").await;
        for round in 0..12 + random.below(20) {
            let start = random.below(SIZE / PART);
            let len = (1 + random.below(if round % 4 == 0 { 150 } else { 20 })).min(SIZE / PART - start);
            let range = GuestRange::new(GuestOffset(start * PART), len * PART);
            let bytes = range.start().get() as usize..range.end().get() as usize;
            let kind = random.below(5);
            match kind {
                0 | 1 => {
                    disk.write_zeroes(range, kind == 1, false).await.unwrap();
                    shown[bytes].fill(0);
                }
                2 => {
                    disk.write(
                        range.start(),
                        Iov::from_slice(&vec![round as u8 + 200; len as usize * PART as usize]),
                        false,
                    )
                    .await
                    .unwrap();
                    shown[bytes].fill(round as u8 + 200);
                }
                3 => {
                    let read = Iov::alloc(len as usize * PART as usize);
                    disk.read(range.start(), read.clone()).await.unwrap();
                    assert!(read.to_vec() == shown[bytes], "seed {seed}, round {round}");
                }
                _ => drop(disk.populate(range, &StreamBase::Nothing).await.unwrap()),
            }
            assert_shows(&disk, &shown, &format!("seed {seed}, round {round}: {kind} of {range}")).await;
        }
        // What is new reads as zeros, whatever lies in the last cluster behind the end, and below.
        disk.resize(SIZE + 3 * CLUSTER).await.unwrap();
        shown.resize(shown.len() + 3 * CLUSTER as usize, 0);
        assert_shows(&disk, &shown, &format!("seed {seed}: grown")).await;
        let whole = GuestRange::new(GuestOffset(0), SIZE + 3 * CLUSTER);
        while disk.next_missing(GuestOffset(0), &StreamBase::Nothing).await.unwrap().is_some() {
            disk.populate(whole, &StreamBase::Nothing).await.unwrap();
        }
        disk.finish_stream(&StreamBase::Nothing, None).await.unwrap();
        assert_shows(&disk, &shown, &format!("seed {seed}: streamed")).await;
        disk.close().await.unwrap();
        let image = open(tables, &data).await;
        let report = image.check(Repair::None).await.unwrap();
        assert_eq!((report.corruptions, report.leaks), (0, 0), "seed {seed}: {report:?}");
        let disk = Disk::new("d", vec![Layer::new("top", "top", image)], DiskOptions::default());
        assert_shows(&disk, &shown, &format!("seed {seed}: opened again")).await;
        disk.close().await.unwrap();
    });
}

#[test]
fn parts_of_clusters_are_read_written_zeroed_and_completed() {
    for seed in 0..100 {
        run(seed, false);
    }
}

#[test]
fn so_are_those_of_a_data_file() {
    for seed in 0..100 {
        run(seed, true);
    }
}
