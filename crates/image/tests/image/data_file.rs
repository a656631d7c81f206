//! QCOW2 images whose data are in a file of their own.
//!
//! **Invariants.**
//! * Every cluster is in the data file where the guest sees it, and a raw data file reads as the guest does.
//! * What a commit made durable is there after a power cut of both files, whatever the medium kept of the rest.
//! * A failed flush of the data file poisons the image.
//! * The reference reads what was written here and finds nothing wrong with it, and the other way round.

use crate::guest::Guest;
use crate::reference::{lab, ok};
use futures_util::future::LocalBoxFuture;
use image::create::{CreateOptions, Preallocation};
use image::qcow2::{self, DataFile};
use image::{BackingRef, Companions, ErrorKind, Format, Image, Mapping, OpenOptions, Repair, Result, Surroundings};
use layout::{GuestOffset, GuestRange};
use ring::Iov;
use ring::sim::Sim;
use std::cell::{Cell, RefCell};
use std::rc::Rc;
use store::fault::{Action, Failure, FaultStore, Match, PowerCut};
use store::memory::MemoryStore;
use store::{Operation, Store};

const SIZE: u64 = (3 << 20) + 512;

/// One file, whatever name is asked for.
struct Only(Rc<dyn Store>);

impl Companions for Only {
    fn open<'a>(&'a self, name: &'a str, _: &'a str, _: bool) -> LocalBoxFuture<'a, Result<Rc<dyn Store>>> {
        assert_eq!(name, "data.img");
        let store = self.0.clone();
        Box::pin(async move { Ok(store) })
    }
}

fn in_sim<T>(test: impl Future<Output = T>) -> T {
    Sim::new(9).block_on(test)
}

async fn open(store: Rc<dyn Store>, data: Rc<dyn Store>, options: OpenOptions) -> Result<Rc<dyn Image>> {
    let companions = Only(data);
    let surroundings = Surroundings { companions: &companions, ..Surroundings::default() };
    image::open_in(store, Format::Qcow2, options, surroundings).await
}

async fn open_writable(store: Rc<dyn Store>, data: Rc<dyn Store>) -> Rc<dyn Image> {
    open(store, data, OpenOptions::default()).await.unwrap()
}

fn options(own: qcow2::Options, cluster: u64) -> CreateOptions {
    CreateOptions { cluster_size: Some(cluster), qcow2: own, ..CreateOptions::new(Format::Qcow2, SIZE) }
}

async fn make(raw: bool, own: qcow2::Options, cluster: u64) -> (Rc<MemoryStore>, Rc<MemoryStore>) {
    let (store, data) = (MemoryStore::new("a.qcow2", 0), MemoryStore::new("data.img", SIZE));
    let file = DataFile { name: "data.img".into(), raw };
    qcow2::create_with_data_file(store.clone(), &options(own, cluster), &file).await.unwrap();
    if raw {
        let image = open_writable(store.clone(), data.clone()).await;
        image.preallocate(GuestOffset::ZERO, Preallocation::Metadata).await.unwrap();
        image.close().await.unwrap();
    }
    (MemoryStore::from_bytes("a.qcow2", &store.to_vec()), MemoryStore::from_bytes("data.img", &data.to_vec()))
}

/// Geometries.
fn kinds() -> [(qcow2::Options, u64); 4] {
    let plain = qcow2::Options::default();
    let extended = qcow2::Options { extended_l2: true, ..plain };
    [(plain, 512), (plain, 4096), (plain, 65536), (extended, 16384)]
}

/// Writes and zeros all over the disk; `model` follows.
async fn live(guest: &Guest, model: &mut [u8], rounds: u64) {
    let (size, cluster) = (model.len() as u64, guest.image.cluster_size());
    let mut state = 7_u64;
    let mut random = |below: u64| {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 33) % below
    };
    for round in 0..rounds {
        let at = random(size / 512) * 512;
        let len = (1 + random(100_000)).min(size - at);
        if round % 4 == 3 {
            let at = at / cluster * cluster;
            let range = GuestRange::new(GuestOffset(at), len.next_multiple_of(cluster).min(size - at));
            guest.image.write_zeroes(range, random(2) == 0, !guest.below.is_empty()).await.unwrap();
            model[at as usize..][..range.len() as usize].fill(0);
        } else {
            let bytes: Vec<u8> = (0..len).map(|n| (n / 512 + round + 1) as u8).collect();
            guest.write(at, &bytes).await.unwrap();
            model[at as usize..][..bytes.len()].copy_from_slice(&bytes);
        }
        if round % 7 == 0 {
            guest.image.commit().await.unwrap();
        }
    }
}

async fn assert_clean(store: Rc<dyn Store>, data: Rc<dyn Store>) {
    let image = open(store, data, OpenOptions { read_only: true, for_check: true }).await.unwrap();
    let report = image.check(Repair::None).await.unwrap();
    assert!(report.is_clean(), "{report:#?}");
}

#[test]
fn every_cluster_is_where_the_guest_sees_it() {
    for (own, cluster) in kinds() {
        for raw in [false, true] {
            in_sim(async {
                let (store, data) = make(raw, own, cluster).await;
                let mut model = vec![0; SIZE as usize];
                let guest = Guest::new(open_writable(store.clone(), data.clone()).await, &[]);
                live(&guest, &mut model, 80).await;
                assert!(guest.read_all().await.unwrap() == model, "{cluster}, raw: {raw}");
                guest.image.close().await.unwrap();
                let (store, data) = (
                    MemoryStore::from_bytes("a.qcow2", &store.to_vec()),
                    MemoryStore::from_bytes("data.img", &data.to_vec()),
                );
                assert_clean(store.clone(), data.clone()).await;
                let bytes = data.to_vec();
                assert!(!raw || bytes[..model.len()] == model, "{cluster}: the raw file shows something else");
                let guest = Guest::new(open_writable(store, data).await, &[]);
                assert!(guest.read_all().await.unwrap() == model, "{cluster}, raw: {raw}");
                let mut at = 0;
                while at < SIZE {
                    let run = GuestRange::new(GuestOffset(at), SIZE - at);
                    let mapped = guest.mapping(run).await.unwrap();
                    if let Some(host) = mapped.mapping.stored() {
                        assert_eq!(host.get(), at);
                        assert!(matches!(mapped.mapping, Mapping::Data(_)));
                    }
                    at += mapped.len;
                }
            });
        }
    }
}

#[test]
fn it_grows_and_shrinks_with_its_data_file() {
    for raw in [false, true] {
        in_sim(async {
            let (store, data) = make(raw, qcow2::Options::default(), 4096).await;
            let image = open_writable(store.clone(), data.clone()).await;
            let guest = Guest::new(image.clone(), &[]);
            guest.write(0, &vec![5; SIZE as usize]).await.unwrap();
            image.resize(1 << 20).await.unwrap();
            assert_eq!(data.size(), 1 << 20);
            image.resize(2 << 20).await.unwrap();
            assert_eq!(data.size(), 2 << 20);
            let all = guest.read_all().await.unwrap();
            assert!(all[..1 << 20].iter().all(|b| *b == 5) && all[1 << 20..].iter().all(|b| *b == 0));
            image.close().await.unwrap();
        });
    }
}

#[test]
fn what_it_cannot_have_is_refused() {
    in_sim(async {
        let (store, data) = make(true, qcow2::Options::default(), 65536).await;
        let image = open_writable(store, data).await;
        let below = BackingRef { name: "below".into(), format: Some(Format::Raw) };
        assert_eq!(image.set_backing(Some(below.clone())).await.unwrap_err().kind(), ErrorKind::Unsupported);
        let snapshot = image::SnapshotAction::Create("one".into(), (0, 0));
        assert_eq!(image.snapshot(snapshot).await.unwrap_err().kind(), ErrorKind::Unsupported);
        let packed = image.pack(GuestOffset(0), Iov::zeroed(65536)).await;
        assert_eq!(packed.unwrap_err().kind(), ErrorKind::Unsupported);
        let file = |name: &str, raw| DataFile { name: name.into(), raw };
        let refused = async |options: CreateOptions, file: DataFile| {
            let store = MemoryStore::new("no", 0);
            qcow2::create_with_data_file(store, &options, &file).await.unwrap_err().to_string()
        };
        let plain = options(qcow2::Options::default(), 65536);
        assert!(refused(plain.clone(), file("", false)).await.contains("empty"));
        assert!(refused(plain.clone(), file(&"x".repeat(1024), false)).await.contains("1023"));
        let backed = CreateOptions { backing: Some(below), ..plain };
        assert!(refused(backed, file("x", true)).await.contains("data-file-raw"));
        let old = options(qcow2::Options { version: 2, ..qcow2::Options::default() }, 65536);
        assert!(refused(old, file("x", false)).await.contains("1.1"));
    });
}

/// An entry that leads elsewhere in the data file is refused: two of them could lead to the same bytes.
#[test]
fn an_entry_that_leads_elsewhere_is_an_error_with_its_place() {
    in_sim(async {
        let (store, data) = make(false, qcow2::Options::default(), 65536).await;
        let guest = Guest::new(open_writable(store.clone(), data.clone()).await, &[]);
        guest.write(0, &vec![1; 65536 * 3]).await.unwrap();
        guest.image.close().await.unwrap();
        let mut bytes = store.to_vec();
        let entry = (1_u64 << 63 | 65536).to_be_bytes();
        let at = bytes.windows(8).position(|window| window == entry).unwrap();
        bytes[at..at + 8].copy_from_slice(&(1_u64 << 63 | 131_072).to_be_bytes());
        let (store, data) =
            (MemoryStore::from_bytes("a.qcow2", &bytes), MemoryStore::from_bytes("data.img", &data.to_vec()));
        let guest = Guest::new(open_writable(store, data).await, &[]);
        assert_eq!(guest.read(65536, 512).await.unwrap_err().kind(), ErrorKind::Corrupt);
        assert!(guest.read(0, 512).await.is_ok() && guest.read(131_072, 512).await.is_ok());
    });
}

#[test]
fn a_name_that_is_no_name_is_refused() {
    in_sim(async {
        let (store, data) = make(false, qcow2::Options::default(), 65536).await;
        for (find, put) in [
            (&b"data.img"[..], &b"\0\0\0\0\0\0\0\0"[..]),
            (b"DATA", b"none"),
            (b"data.img", b"\xff\xff\xff\xff\xff\xff\xff\xff"),
        ] {
            let mut bytes = store.to_vec();
            let at = bytes.windows(find.len()).position(|window| window == find).unwrap();
            bytes[at..at + put.len()].copy_from_slice(put);
            let opened = open(MemoryStore::from_bytes("a", &bytes), data.clone(), OpenOptions::default()).await;
            assert_eq!(opened.err().map(|error| error.kind()), Some(ErrorKind::Corrupt));
        }
        // Without anybody who opens it, it says so.
        let opened = image::open(store, Format::Qcow2, OpenOptions::default()).await;
        assert!(opened.err().unwrap().to_string().contains("data.img"));
    });
}

#[test]
fn a_failed_flush_of_the_data_file_poisons() {
    in_sim(async {
        let (store, data) = make(false, qcow2::Options::default(), 65536).await;
        let fault = FaultStore::new(data, 1);
        let guest = Guest::new(open_writable(store, fault.clone()).await, &[]);
        guest.write(0, &vec![1; 65536]).await.unwrap();
        fault.rule(Match::on(Operation::Flush), Action::Fail(Failure::EIO));
        assert!(guest.image.commit().await.is_err());
        assert!(guest.image.poisoned().is_some());
        assert!(guest.image.reserve(GuestRange::new(GuestOffset(1 << 20), 512), image::Purpose::Data).await.is_err());
        assert_eq!(guest.read(0, 512).await.unwrap(), [1; 512]);
    });
}

#[test]
fn the_reference_and_we_read_what_the_other_wrote() {
    let Some(lab) = lab() else { return };
    let folder = lab.path();
    for (own, cluster) in kinds() {
        for raw in [false, true] {
            let what = format!("{cluster}, raw: {raw}");
            let mut model = vec![0; SIZE as usize];
            let (store, data) = in_sim(async {
                let (store, data) = make(raw, own, cluster).await;
                let guest = Guest::new(open_writable(store.clone(), data.clone()).await, &[]);
                live(&guest, &mut model, 60).await;
                guest.image.close().await.unwrap();
                (store, data)
            });
            let put = |name: &str, bytes: &[u8]| std::fs::write(folder.join(name), bytes).unwrap();
            put("a.qcow2", &store.to_vec());
            put("data.img", &data.to_vec());
            put("ours.raw", &model);
            ok(folder, &["qemu-img", "check", "-q", "a.qcow2"]);
            ok(folder, &["qemu-img", "compare", "-q", "-f", "raw", "-F", "qcow2", "ours.raw", "a.qcow2"]);
            ok(folder, &["qemu-io", "-f", "qcow2", "-c", "write -P 77 100k 300k", "-c", "write -z 1M 128k", "a.qcow2"]);
            // Made by the reference from the start.
            for theirs in [false, true] {
                if theirs {
                    let create = format!(
                        "cluster_size={cluster},extended_l2={},data_file=data.img,data_file_raw={}",
                        if own.extended_l2 { "on" } else { "off" },
                        if raw { "on" } else { "off" }
                    );
                    ok(folder, &["qemu-img", "create", "-q", "-f", "qcow2", "-o", &create, "a.qcow2", "3146240"]);
                    ok(
                        folder,
                        &["qemu-io", "-f", "qcow2", "-c", "write -P 1 0 1M", "-c", "write -z 64k 64k", "a.qcow2"],
                    );
                }
                ok(folder, &["qemu-img", "convert", "-q", "-O", "raw", "a.qcow2", "now.raw"]);
                let mut model = std::fs::read(folder.join("now.raw")).unwrap();
                let bytes = |name: &str| std::fs::read(folder.join(name)).unwrap();
                let store = MemoryStore::from_bytes("a.qcow2", &bytes("a.qcow2"));
                let data = MemoryStore::from_bytes("data.img", &bytes("data.img"));
                in_sim(async {
                    let guest = Guest::new(open_writable(store.clone(), data.clone()).await, &[]);
                    assert_eq!(guest.image.info().qcow2.unwrap().data_file.unwrap().raw, raw);
                    assert!(guest.read_all().await.unwrap() == model, "{what}, theirs: {theirs}");
                    live(&guest, &mut model, 60).await;
                    guest.image.close().await.unwrap();
                });
                put("a.qcow2", &store.to_vec());
                put("data.img", &data.to_vec());
                put("ours.raw", &model);
                ok(folder, &["qemu-img", "check", "-q", "a.qcow2"]);
                ok(folder, &["qemu-img", "compare", "-q", "-f", "raw", "-F", "qcow2", "ours.raw", "a.qcow2"]);
                assert!(!raw || data.to_vec()[..model.len()] == model, "{what}, theirs: {theirs}");
            }
        }
    }
}

/// Both files are cut off at one moment, each with what its medium kept: what a commit covered is there.
#[test]
fn a_power_cut_of_both_files_loses_nothing_that_was_committed() {
    in_sim(async {
        let (store, data) = make(false, qcow2::Options::default(), 4096).await;
        let (store, data) = (FaultStore::new(store, 1), FaultStore::new(data, 2));
        for fault in [&store, &data] {
            fault.make_volatile(512).await.unwrap();
        }
        let committed = Rc::new(Cell::new(0_u8));
        let cuts: Rc<RefCell<Vec<(PowerCut, PowerCut, u8)>>> = Rc::default();
        for fault in [&store, &data] {
            let (store, data, committed, cuts) = (store.clone(), data.clone(), committed.clone(), cuts.clone());
            let note = move |request: &store::fault::Request| {
                if matches!(request.operation, Operation::Read | Operation::Extent) {
                    return false;
                }
                let cut = (store.power_cut().unwrap(), data.power_cut().unwrap(), committed.get());
                cuts.borrow_mut().push(cut);
                false
            };
            fault.rule(Match::any().when(note), Action::Hold);
        }
        let guest = Guest::new(open_writable(store.clone(), data.clone()).await, &[]);
        for round in 1..=8_u8 {
            for n in 0..4_u64 {
                guest.write((n * 97 + u64::from(round)) * 4096 + 512, &[round; 6000]).await.unwrap();
            }
            guest.write(2 << 20, &[round; 5000]).await.unwrap();
            guest.image.commit().await.unwrap();
            committed.set(round);
        }
        let cuts = std::mem::take(&mut *cuts.borrow_mut());
        assert!(cuts.len() > 50);
        for (moment, (tables, bytes, round)) in cuts.iter().enumerate() {
            let states = tables.states(4, moment as u64).zip(bytes.states(4, !(moment as u64)));
            for (tables, bytes) in states {
                let store = MemoryStore::from_snapshot("a.qcow2", tables.image);
                let data = MemoryStore::from_snapshot("data.img", bytes.image);
                let guest = Guest::new(open_writable(store.clone(), data.clone()).await, &[]);
                let report = guest.image.check(Repair::Leaks).await.unwrap();
                assert!(report.is_clean() && report.corruptions_fixed == 0, "moment {moment}: {report:#?}");
                if *round > 0 {
                    let last = (3 * 97 + u64::from(*round)) * 4096 + 512;
                    let read = guest.read(last, 512).await.unwrap();
                    assert!(read.iter().all(|b| *b >= *round), "moment {moment}: round {round} is gone");
                    let read = guest.read(2 << 20, 5000).await.unwrap();
                    assert!(read.iter().all(|b| *b >= *round), "moment {moment}: round {round} is gone");
                }
            }
        }
    });
}
