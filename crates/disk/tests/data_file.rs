//! A top whose clusters have fixed places (a QCOW2 image with a data file): what populates it never writes over what a guest wrote.

extern crate headwater_disk as disk;

use disk::{Disk, DiskOptions, Layer, StreamBase};
use futures_util::future::LocalBoxFuture;
use image::create::CreateOptions;
use image::qcow2::{self, DataFile};
use image::{BackingRef, Companions, Format, OpenOptions, Surroundings};
use layout::{GuestOffset, GuestRange};
use ring::Iov;
use ring::sim::Sim;
use std::rc::Rc;
use std::time::Duration;
use store::Store;
use store::fault::{Action, FaultStore, Match};
use store::memory::MemoryStore;

const SIZE: u64 = 40 << 16;

struct Only(Rc<dyn Store>);

impl Companions for Only {
    fn open<'a>(&'a self, _: &'a str, _: &'a str, _: bool) -> LocalBoxFuture<'a, image::Result<Rc<dyn Store>>> {
        Box::pin(async move { Ok(self.0.clone()) })
    }
}

#[test]
fn a_stream_into_a_data_file_leaves_what_guests_write() {
    for seed in 0..20 {
        Sim::new(seed).block_on(async {
            let below: Vec<u8> = (0..SIZE).map(|n| (n / 512 % 250 + 1) as u8).collect();
            let base = MemoryStore::from_bytes("base", &below);
            let base = image::open(base, Format::Raw, OpenOptions::default()).await.unwrap();
            let (tables, data) = (MemoryStore::new("top", 0), MemoryStore::new("data", SIZE));
            let backing = Some(BackingRef { name: "base".into(), format: Some(Format::Raw) });
            let options = CreateOptions { backing, ..CreateOptions::new(Format::Qcow2, SIZE) };
            let file = DataFile { name: "data".into(), raw: false };
            qcow2::create_with_data_file(tables.clone(), &options, &file).await.unwrap();
            let slow = FaultStore::new(data, seed);
            slow.rule(Match::any().chance(0.7), Action::Jitter(Duration::from_micros(300)));
            let companions = Only(slow);
            let surroundings = Surroundings { companions: &companions, ..Surroundings::default() };
            let top = image::open_in(tables, Format::Qcow2, OpenOptions::default(), surroundings).await.unwrap();
            let layer = |node: &str, image| Layer::new(node, node, image);
            let options = DiskOptions { copy_on_read: true, ..DiskOptions::default() };
            let disk = Disk::new("d", vec![layer("top", top), layer("base", base)], options);
            let mut model = below.clone();
            let streamer = disk.clone();
            let stream = ring::spawn(async move {
                let whole = GuestRange::new(GuestOffset(0), SIZE);
                while streamer.next_missing(GuestOffset(0), &StreamBase::Nothing).await.unwrap().is_some() {
                    streamer.populate(whole, &StreamBase::Nothing).await.unwrap();
                }
            });
            let mut state = seed + 1;
            for round in 0..150_u64 {
                state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
                let at = (state >> 33) % (SIZE / 512 - 20) * 512;
                let bytes = vec![round as u8; 512 * (1 + round as usize % 17)];
                disk.write(GuestOffset(at), Iov::from_slice(&bytes), false).await.unwrap();
                model[at as usize..][..bytes.len()].copy_from_slice(&bytes);
            }
            stream.await;
            disk.finish_stream(&StreamBase::Nothing, None).await.unwrap();
            let all = Iov::alloc(SIZE as usize);
            disk.read(GuestOffset(0), all.clone()).await.unwrap();
            assert!(all.to_vec() == model, "seed {seed}");
            disk.close().await.unwrap();
        });
    }
}
