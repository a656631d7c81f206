//! Images that were damaged on purpose: one clear error each, with its place, and nothing changed on the way.

use crate::guest::Guest;
use image::create::CreateOptions;
use image::{Error, ErrorKind, Format, OpenOptions, Repair};
use layout::qed::{Geometry, Header};
use layout::{GuestOffset, GuestRange, HostOffset};
use ring::Iov;
use ring::sim::Sim;
use std::rc::Rc;
use store::Store;
use store::memory::MemoryStore;

fn sim<T>(test: impl Future<Output = T>) -> T {
    Sim::new(3).block_on(test)
}

/// An image with clusters of 4 KiB, tables of one, and the first few clusters written.
async fn sound() -> Rc<MemoryStore> {
    let store = MemoryStore::new("bad.qed", 0);
    let options = CreateOptions {
        format: Format::Qed,
        size: 16 << 20,
        backing: None,
        cluster_size: Some(4096),
        table_size: Some(1),
        qcow2: image::qcow2::Options::default(),
        passphrase: None,
        iteration_time: None,
    };
    image::create::create(store.clone(), &options).await.unwrap();
    let guest = Guest::new(open(&store).await.unwrap(), &[]);
    guest.write(0, &vec![1; 5 * 4096]).await.unwrap();
    guest.write(4 << 20, &[2; 4096]).await.unwrap();
    guest.image.close().await.unwrap();
    store
}

async fn open(store: &Rc<MemoryStore>) -> image::Result<Rc<dyn image::Image>> {
    image::open(store.clone(), Format::Qed, OpenOptions::default()).await
}

async fn patch(store: &MemoryStore, at: u64, bytes: &[u8]) {
    store.write(HostOffset(at), Iov::from_slice(bytes), false).await.unwrap();
}

async fn number(store: &MemoryStore, at: u64) -> u64 {
    let bytes = Iov::alloc(8);
    store.read(HostOffset(at), bytes.clone()).await.unwrap();
    u64::from_le_bytes(bytes.to_vec().try_into().unwrap())
}

/// Opening is refused, for reading too, and changes nothing.
async fn refused(store: &Rc<MemoryStore>) -> Error {
    let before = store.to_vec();
    let read_only = OpenOptions { read_only: true, for_check: false };
    let error = image::open(store.clone(), Format::Qed, read_only).await.err().expect("opened");
    let again = open(store).await.err().expect("opened");
    assert_eq!(error.to_string(), again.to_string());
    assert!(store.to_vec() == before);
    assert!(error.to_string().contains("bad.qed"), "{error}");
    error
}

#[test]
fn an_unknown_feature_is_named_by_its_bit() {
    sim(async {
        let store = sound().await;
        patch(&store, 16, &(1u64 << 5).to_le_bytes()).await;
        let error = refused(&store).await;
        assert_eq!(error.kind(), ErrorKind::Unsupported);
        assert!(error.to_string().contains("feature bit 5"), "{error}");
    });
}

#[test]
fn unknown_autoclear_bits_are_cleared_by_writers_only_and_compatible_ones_stay() {
    sim(async {
        let store = sound().await;
        patch(&store, 24, &0xabcd_u64.to_le_bytes()).await;
        patch(&store, 32, &0x8001_u64.to_le_bytes()).await;
        let before = store.to_vec();
        let read_only = OpenOptions { read_only: true, for_check: false };
        let image = image::open(store.clone(), Format::Qed, read_only).await.unwrap();
        assert_eq!(image.info().warnings.len(), 1);
        image.close().await.unwrap();
        assert!(store.to_vec() == before);
        open(&store).await.unwrap().close().await.unwrap();
        assert_eq!((number(&store, 24).await, number(&store, 32).await), (0xabcd, 0));
    });
}

#[test]
fn a_file_cut_off_in_front_of_its_tables_is_refused() {
    sim(async {
        let store = sound().await;
        store.set_size(8191).await.unwrap();
        let error = refused(&store).await;
        assert_eq!(error.kind(), ErrorKind::Corrupt);
        assert!(error.to_string().contains("cut off"), "{error}");
        store.set_size(20).await.unwrap();
        assert_eq!(refused(&store).await.kind(), ErrorKind::Corrupt);
        store.set_size(0).await.unwrap();
        assert!(refused(&store).await.to_string().contains("not a QED image"));
    });
}

#[test]
fn damaged_entries_are_errors_with_their_place_and_the_rest_is_served() {
    sim(async {
        let store = sound().await;
        let table = number(&store, 4096).await;
        patch(&store, table + 8 * 3, &0x1234_5678_9000_u64.to_le_bytes()).await;
        patch(&store, 4096 + 8 * 2, &0x1001_u64.to_le_bytes()).await;
        let guest = Guest::new(open(&store).await.unwrap(), &[]);
        assert_eq!(guest.read(0, 3 * 4096).await.unwrap(), [1; 3 * 4096]);
        let error = guest.read(0, 4 * 4096).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Corrupt);
        assert!(error.to_string().contains(&format!("offset {}", table + 24)), "{error}");
        let error = guest.read(4 << 20, 1).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Corrupt);
        assert!(error.to_string().contains(&format!("offset {}", 4096 + 16)), "{error}");
        assert!(guest.write(4 << 20, &[1]).await.is_err());
        assert_eq!(guest.read(4 * 4096, 4096).await.unwrap(), [1; 4096]);
        assert!(guest.image.poisoned().is_none());
    });
}

#[test]
fn a_shared_cluster_is_copied_for_its_second_owner() {
    sim(async {
        let store = sound().await;
        let table = number(&store, 4096).await;
        let first = number(&store, table).await;
        patch(&store, first, &[7; 4096]).await;
        patch(&store, table + 8 * 100, &first.to_le_bytes()).await;
        patch(&store, 16, &2u64.to_le_bytes()).await;
        let guest = Guest::new(open(&store).await.unwrap(), &[]);
        assert_eq!(guest.read(0, 4096).await.unwrap(), [7; 4096]);
        assert_eq!(guest.read(100 * 4096, 4096).await.unwrap(), [7; 4096]);
        guest.write(0, &[8; 4096]).await.unwrap();
        assert_eq!(guest.read(100 * 4096, 4096).await.unwrap(), [7; 4096]);
        guest.image.close().await.unwrap();
    });
}

/// An L1 entry that leads into data: the data is somebody's, and stays.
#[test]
fn data_under_a_false_table_is_kept() {
    sim(async {
        let store = sound().await;
        let table = number(&store, 4096).await;
        let data = number(&store, table + 8).await;
        // Bytes that would be cleared as entries that lead nowhere.
        patch(&store, data, &[0x5a; 4096]).await;
        patch(&store, 4096 + 8 * 3, &data.to_le_bytes()).await;
        patch(&store, 16, &2u64.to_le_bytes()).await;
        let guest = Guest::new(open(&store).await.unwrap(), &[]);
        assert_eq!(guest.read(4096, 4096).await.unwrap(), [0x5a; 4096]);
        guest.image.close().await.unwrap();
    });
}

/// Whatever the numbers say, memory follows what is there: a file of 8 EiB that holds nothing.
#[test]
fn a_huge_and_empty_file_is_checked_in_little_time_and_memory() {
    sim(async {
        let geometry = Geometry::new(1 << 20, 16).unwrap();
        let mut header = Header::new(geometry, geometry.max_image_size()).unwrap();
        header.header_clusters = u32::MAX;
        header.l1_table = HostOffset(u64::from(u32::MAX) << 20);
        let store = MemoryStore::new("bad.qed", 1 << 62);
        patch(&store, 0, &header.encode()).await;
        for n in 0..200u64 {
            patch(&store, header.l1_table.get() + n * 8192, &((1 << 61) + n * (1 << 50)).to_le_bytes()).await;
        }
        let image =
            image::open(store.clone(), Format::Qed, OpenOptions { read_only: true, for_check: true }).await.unwrap();
        let report = image.check(Repair::None).await.unwrap();
        assert_eq!((report.corruptions, report.check_errors), (0, 0));
        let everything = GuestRange::new(GuestOffset(0), image.size());
        assert!(Guest::new(image.clone(), &[]).mapping(everything).await.is_ok());
        image.close().await.unwrap();
    });
}

/// A table of nothing but references to one cluster: the repair does not blow the file up without limit.
#[test]
fn copies_have_a_limit() {
    sim(async {
        let store = sound().await;
        let table = number(&store, 4096).await;
        let first = number(&store, table).await;
        for n in 0..512 {
            patch(&store, table + 8 * n, &first.to_le_bytes()).await;
        }
        let image =
            image::open(store.clone(), Format::Qed, OpenOptions { read_only: false, for_check: true }).await.unwrap();
        let report = image.check(Repair::All).await.unwrap();
        assert_eq!(report.corruptions_fixed, 256);
        assert_eq!(report.corruptions, 255);
        image.close().await.unwrap();
        // It may double again when it is taken up again.
        let guest = Guest::new(open(&store).await.unwrap(), &[]);
        assert_eq!(guest.read(0, 512 * 4096).await.unwrap(), vec![1; 512 * 4096]);
        guest.image.close().await.unwrap();
    });
}

/// A table that cannot be read today: it is not thrown away, and nothing that it may refer to is taken for free.
#[test]
fn an_unreadable_table_is_not_given_up() {
    use store::fault::{Action, Failure, FaultStore, Match};
    sim(async {
        let store = sound().await;
        patch(&store, 16, &2u64.to_le_bytes()).await;
        let before = store.to_vec();
        let fault = FaultStore::new(store.clone(), 1);
        let table = HostOffset(number(&store, 4096).await);
        let broken = Failure::Kind(store::ErrorKind::Io, "broken on purpose".to_owned());
        fault.rule(Match::on(store::Operation::Read).touching(table.range(4096)), Action::Fail(broken));
        let error = image::open(fault.clone(), Format::Qed, OpenOptions::default()).await.err().expect("opened");
        assert!(error.to_string().contains("broken on purpose"), "{error}");
        let image = image::open(fault, Format::Qed, OpenOptions { read_only: false, for_check: true }).await.unwrap();
        let report = image.check(Repair::All).await.unwrap();
        assert_eq!((report.check_errors, report.leaks, report.corruptions_fixed), (1, 0, 0));
        image.close().await.unwrap();
        assert!(store.to_vec() == before);
        let guest = Guest::new(open(&store).await.unwrap(), &[]);
        assert_eq!(guest.read(0, 4096).await.unwrap(), [1; 4096]);
    });
}

/// What is in the header's clusters behind the fields we know stays, whatever we rewrite.
#[test]
fn what_we_do_not_know_in_the_header_stays() {
    sim(async {
        let store = MemoryStore::new("bad.qed", 6 * 4096);
        let mut header = Header::new(Geometry::new(4096, 1).unwrap(), 1 << 20).unwrap();
        (header.header_clusters, header.l1_table) = (3, HostOffset(3 * 4096));
        patch(&store, 0, &header.encode()).await;
        patch(&store, 64, &[0xaa; 2000]).await;
        patch(&store, 4096 + 100, &[0xbb; 4000]).await;
        let image = open(&store).await.unwrap();
        let name = |len: usize| Some(image::BackingRef { name: "n".repeat(len), format: None });
        for backing in [name(10), name(1023), None, name(600), name(20), None] {
            image.set_backing(backing.clone()).await.unwrap();
            assert_eq!(image.backing(), backing);
        }
        image.resize(3 << 20).await.unwrap();
        let guest = Guest::new(image, &[]);
        guest.write(0, &[1; 10_000]).await.unwrap();
        guest.image.close().await.unwrap();
        let bytes = store.to_vec();
        assert!(bytes[64..2064].iter().all(|b| *b == 0xaa) && bytes[4196..8196].iter().all(|b| *b == 0xbb));
    });
}
