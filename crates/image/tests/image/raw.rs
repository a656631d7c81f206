//! Raw images: what the contract means where nothing is allocated.

use image::{BackingRef, ErrorKind, Format, Image, Mapping, OpenOptions, Purpose, Repair};
use layout::{GuestOffset, GuestRange, HostOffset};
use ring::Iov;
use ring::sim::Sim;
use std::rc::Rc;
use store::memory::MemoryStore;
use store::{Limits, Store};

fn range(at: u64, len: u64) -> GuestRange {
    GuestRange::new(GuestOffset(at), len)
}

async fn open(store: Rc<dyn Store>) -> Rc<dyn Image> {
    image::open(store, Format::Raw, OpenOptions::default()).await.unwrap()
}

#[test]
fn every_byte_is_where_it_is() {
    Sim::new(1).block_on(async {
        let image = open(MemoryStore::new("disk.raw", 1 << 20)).await;
        assert_eq!((image.size(), image.cluster_size(), image.backing()), (1 << 20, 1, None));
        let mapped = image.lookup(range(1000, 5000)).unwrap().unwrap();
        assert_eq!((mapped.len, mapped.mapping), (5000, Mapping::Data(HostOffset(1000))));
        assert_eq!(image.lookup(range(0, (1 << 20) + 1)).unwrap_err().kind(), ErrorKind::InvalidArgument);
        let unsupported = |kind| assert_eq!(kind, ErrorKind::Unsupported);
        unsupported(image.reserve(range(0, 1), Purpose::Data).await.err().unwrap().kind());
        unsupported(image.check(Repair::None).await.unwrap_err().kind());
        let backing = BackingRef { name: "b".into(), format: None };
        unsupported(image.set_backing(Some(backing)).await.unwrap_err().kind());
        image.set_backing(None).await.unwrap();
        image.settle().await.unwrap();
        image.close().await.unwrap();
    });
}

#[test]
fn a_length_between_sectors_is_served_up_to_the_next() {
    Sim::new(1).block_on(async {
        let store = MemoryStore::from_bytes("disk.raw", &[1; 1000]);
        let image = open(store.clone()).await;
        assert_eq!(image.size(), 1024);
        let bytes = Iov::alloc(24);
        image.store().read(HostOffset(1000), bytes.clone()).await.unwrap();
        assert!(bytes.is_zero());
        image.write_zeroes(range(512, 512), false, false).await.unwrap();
        assert_eq!(store.size(), 1024);
        // A device has no next sector.
        let memory = MemoryStore::from_bytes("device", &[1; 1000]);
        let device = memory.with_limits(Limits { fixed_size: true, ..memory.limits() });
        assert_eq!(open(device).await.size(), 512);
    });
}

#[test]
fn it_grows_and_shrinks_by_sectors() {
    Sim::new(1).block_on(async {
        let store = MemoryStore::from_bytes("disk.raw", &[1; 4096]);
        let image = open(store.clone()).await;
        image.resize(8192).await.unwrap();
        assert_eq!((image.size(), store.size()), (8192, 8192));
        image.resize(1024).await.unwrap();
        assert_eq!((image.size(), store.size()), (1024, 1024));
        image.resize(8192).await.unwrap();
        assert!(store.to_vec()[..1024] == [1; 1024] && store.to_vec()[1024..].iter().all(|b| *b == 0));
        for size in [4095, 8193, u64::MAX] {
            assert_eq!(image.resize(size).await.unwrap_err().kind(), ErrorKind::InvalidArgument);
        }
        image.write_zeroes(range(0, 4096), true, false).await.unwrap();
        assert!(store.to_vec().iter().all(|b| *b == 0));
    });
}

#[test]
fn creating_gives_a_length_and_refuses_what_raw_has_not() {
    Sim::new(1).block_on(async {
        let store = MemoryStore::from_bytes("disk.raw", &[1; 100]);
        let plain = image::create::CreateOptions {
            format: Format::Raw,
            size: 1000,
            backing: None,
            cluster_size: None,
            table_size: None,
            qcow2: image::qcow2::Options::default(),
            passphrase: None,
            iteration_time: None,
        };
        image::create::create(store.clone(), &plain).await.unwrap();
        assert_eq!(store.to_vec(), vec![0; 1024]);
        let mut odd = plain.clone();
        odd.cluster_size = Some(65536);
        assert!(image::create::validate(&odd).is_err());
        odd = plain.clone();
        odd.backing = Some(BackingRef { name: "b".into(), format: None });
        assert!(image::create::create(store.clone(), &odd).await.unwrap_err().to_string().contains("-f qed"));
        odd = plain;
        odd.size = u64::MAX;
        assert!(image::create::validate(&odd).is_err());
    });
}
