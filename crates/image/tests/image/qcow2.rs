//! QCOW2 images as qemu-img and qemu-io make them, in every kind of cluster there is: read to the byte; and damaged ones, which
//! are errors with a place, never a panic.

use crate::guest::Guest;
use crate::reference::{lab, ok};
use image::{ErrorKind, Format, Mapping, OpenOptions};
use layout::{GuestOffset, GuestRange};
use ring::sim::Sim;
use std::path::Path;
use std::rc::Rc;
use store::Store;
use store::memory::MemoryStore;

const READ_ONLY: OpenOptions = OpenOptions { read_only: true, for_check: false };

fn in_sim<T>(test: impl Future<Output = T>) -> T {
    Sim::new(5).block_on(test)
}

async fn open(bytes: &[u8]) -> image::Result<Rc<dyn image::Image>> {
    image::open(MemoryStore::from_bytes("ours.qcow2", bytes).read_only(), Format::Qcow2, READ_ONLY).await
}

/// Options of `create`, and what a new image can hold.
const KINDS: [&str; 10] = [
    "compat=0.10",
    "compat=1.1",
    "compat=1.1,cluster_size=512",
    "compat=0.10,cluster_size=4k",
    "compat=1.1,cluster_size=2M",
    "compat=1.1,refcount_bits=1",
    "compat=1.1,lazy_refcounts=on",
    "compat=1.1,compression_type=zstd",
    "compat=1.1,extended_l2=on",
    "compat=1.1,extended_l2=on,cluster_size=16k,compression_type=zstd",
];

/// Writes of every kind into an image of 5 MiB and a little: plain, zero, unmapped, packed, small, over each other.
fn fill(folder: &Path, name: &str, version_2: bool, extended: bool) {
    let mut commands = vec![
        "write -P 1 0 1M".to_owned(),
        "write -P 2 1234k 3k".to_owned(),
        "write -z 64k 128k".to_owned(),
        "write -P 3 4M 64k".to_owned(),
        "discard 512k 256k".to_owned(),
        "write -P 4 5242880 512".to_owned(),
    ];
    if !version_2 {
        commands.push("write -z -u 2M 512k".to_owned());
    }
    if extended {
        commands.push("write -P 5 3000k 1k".to_owned());
        commands.push("write -z 3100k 8k".to_owned());
    }
    let mut line = vec!["qemu-io", "-f", "qcow2"];
    for command in &commands {
        line.extend(["-c", command]);
    }
    line.push(name);
    ok(folder, &line);
}

#[test]
fn every_kind_of_image_reads_as_the_reference_reads_it() {
    let Some(lab) = lab() else { return };
    let folder = lab.path();
    // What lies below is read where an image says nothing.
    let below: Vec<u8> = (0..6_u32 << 20).map(|n| (n / 512 % 251 + 1) as u8).collect();
    std::fs::write(folder.join("below.raw"), &below).unwrap();
    for kind in KINDS {
        let (version_2, extended) = (kind.contains("0.10"), kind.contains("extended_l2"));
        let create = ["qemu-img", "create", "-q", "-f", "qcow2", "-o", kind];
        ok(folder, &[&create[..], &["-b", "below.raw", "-F", "raw", "a.qcow2", "5243392"]].concat());
        fill(folder, "a.qcow2", version_2, extended);
        // The same, everything packed (what is below is packed along).
        let pack = ["qemu-img", "convert", "-q", "-c", "-O", "qcow2", "-o", kind, "a.qcow2", "packed.qcow2"];
        ok(folder, &pack);
        for name in ["a.qcow2", "packed.qcow2"] {
            ok(folder, &["qemu-img", "convert", "-q", "-O", "raw", name, "expected.raw"]);
            let expected = std::fs::read(folder.join("expected.raw")).unwrap();
            in_sim(async {
                let image = open(&std::fs::read(folder.join(name)).unwrap()).await.unwrap();
                let has_backing = name == "a.qcow2";
                assert_eq!(image.backing().is_some(), has_backing);
                if has_backing {
                    assert_eq!(image.backing().unwrap().format, Some(Format::Raw));
                }
                assert_eq!(image.size(), expected.len() as u64);
                let guest = Guest::new(image, if has_backing { &below } else { &[] });
                assert!(guest.read_all().await.unwrap() == expected, "{kind}, {name}");
                // In pieces that know nothing of clusters.
                for n in 0..200_u64 {
                    let at = n * 7919 * 512 % (expected.len() as u64 - 1) / 3;
                    let len = (n * 131 % 5000 + 1).min(expected.len() as u64 - at);
                    let piece = guest.read(at, len).await.unwrap();
                    assert!(piece == expected[at as usize..][..len as usize], "{kind}, {name}: {len} bytes at {at}");
                }
                if name == "packed.qcow2" {
                    let first = guest.mapping(GuestRange::new(GuestOffset(0), 512)).await.unwrap();
                    assert_eq!(first.mapping, Mapping::Packed, "{kind}");
                }
            });
        }
    }
}

/// Changes an image at random places as a guest would; `model` follows. A disk never writes over parts of a cluster side by
/// side, nor does this.
async fn live(guest: &Guest, model: &mut [u8], rounds: u64, seed: u64) {
    let size = model.len() as u64;
    let cluster = guest.image.cluster_size();
    let mut state = seed;
    let mut random = |below: u64| {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 33) % below
    };
    for round in 0..rounds {
        let at = random(size / 512) * 512;
        let len = (1 + random(100_000)).min(size - at);
        if round % 4 == 3 {
            let at = at / cluster * cluster;
            let range = GuestRange::new(GuestOffset(at), (len.next_multiple_of(cluster)).min(size - at));
            guest.image.write_zeroes(range, random(2) == 0, !guest.below.is_empty()).await.unwrap();
            model[at as usize..][..range.len() as usize].fill(0);
        } else {
            let bytes: Vec<u8> = (0..len).map(|n| (n / 512 + round + seed) as u8).collect();
            guest.write(at, &bytes).await.unwrap();
            model[at as usize..][..bytes.len()].copy_from_slice(&bytes);
        }
        if round % 7 == 0 {
            guest.image.commit().await.unwrap();
        }
        if round % 13 == 0 {
            guest.image.settle().await.unwrap();
        }
    }
}

/// What the reference has made (plain, zero, packed, parts of clusters, snapshots) is written over, grown and given another
/// backing file; the reference finds nothing wrong, and reads what was written. Then it writes, and is read.
#[test]
fn what_is_written_is_sound_for_the_reference() {
    let Some(lab) = lab() else { return };
    let folder = lab.path();
    let below: Vec<u8> = (0..6_u32 << 20).map(|n| (n / 512 % 251 + 1) as u8).collect();
    std::fs::write(folder.join("below.raw"), &below).unwrap();
    for (number, kind) in KINDS.into_iter().enumerate() {
        let (version_2, extended) = (kind.contains("0.10"), kind.contains("extended_l2"));
        // A refcount of one bit counts no snapshots.
        let snapshots = !kind.contains("refcount_bits=1");
        let create = ["qemu-img", "create", "-q", "-f", "qcow2", "-o", kind];
        ok(folder, &[&create[..], &["-b", "below.raw", "-F", "raw", "a.qcow2", "5243392"]].concat());
        fill(folder, "a.qcow2", version_2, extended);
        ok(folder, &["qemu-img", "convert", "-q", "-c", "-O", "qcow2", "-o", kind, "a.qcow2", "packed.qcow2"]);
        for name in ["a.qcow2", "packed.qcow2"] {
            let what = format!("{kind}, {name}");
            ok(folder, &["qemu-img", "convert", "-q", "-O", "raw", name, "before.raw"]);
            if snapshots {
                ok(folder, &["qemu-img", "snapshot", "-c", "before", name]);
            }
            let mut model = std::fs::read(folder.join("before.raw")).unwrap();
            let has_backing = name == "a.qcow2";
            let store = MemoryStore::from_bytes("ours.qcow2", &std::fs::read(folder.join(name)).unwrap());
            in_sim(async {
                let image = image::open(store.clone(), Format::Qcow2, OpenOptions::default()).await.unwrap();
                let guest = Guest::new(image, if has_backing { &below } else { &[] });
                live(&guest, &mut model, 60, number as u64).await;
                assert!(guest.read_all().await.unwrap() == model, "{what}");
                guest.image.close().await.unwrap();
            });
            std::fs::write(folder.join(name), store.to_vec()).unwrap();
            std::fs::write(folder.join("ours.raw"), &model).unwrap();
            ok(folder, &["qemu-img", "check", "-q", name]);
            ok(folder, &["qemu-img", "compare", "-q", "-f", "raw", "-F", "qcow2", "ours.raw", name]);
            if snapshots {
                let read = ["qemu-img", "convert", "-q", "-l", "before", "-O", "raw", name, "snapshot.raw"];
                ok(folder, &read);
                ok(folder, &["qemu-img", "compare", "-q", "-f", "raw", "-F", "raw", "before.raw", "snapshot.raw"]);
                ok(folder, &["qemu-img", "snapshot", "-a", "before", name]);
                ok(folder, &["qemu-img", "compare", "-q", "-f", "raw", "-F", "qcow2", "before.raw", name]);
                ok(folder, &["qemu-img", "snapshot", "-d", "before", name]);
                ok(folder, &["qemu-img", "check", "-q", name]);
            }
            // It goes on, larger, and on its own.
            ok(folder, &["qemu-io", "-f", "qcow2", "-c", "write -P 77 100k 300k", name]);
            let ours = MemoryStore::from_bytes("ours.qcow2", &std::fs::read(folder.join(name)).unwrap());
            ok(folder, &["qemu-img", "convert", "-q", "-O", "raw", name, "now.raw"]);
            let mut model = std::fs::read(folder.join("now.raw")).unwrap();
            in_sim(async {
                let image = image::open(ours.clone(), Format::Qcow2, OpenOptions::default()).await.unwrap();
                let guest = Guest::new(image, if has_backing { &below } else { &[] });
                assert!(guest.read_all().await.unwrap() == model, "{what}");
                if has_backing {
                    guest.populate(GuestRange::new(GuestOffset(0), model.len() as u64)).await.unwrap();
                    let mut at = 0;
                    while at < model.len() as u64 {
                        // Parts of clusters are a disk's affair: here they are simply written.
                        let run = GuestRange::new(GuestOffset(at), model.len() as u64 - at);
                        let mapped = guest.mapping(run).await.unwrap();
                        if mapped.mapping == Mapping::Unallocated {
                            let bytes = model[at as usize..][..mapped.len as usize].to_vec();
                            guest.write(at, &bytes).await.unwrap();
                        }
                        at += mapped.len;
                    }
                    guest.image.set_backing(None).await.unwrap();
                }
                let grown = model.len() + (33 << 20);
                guest.image.resize(grown as u64).await.unwrap();
                model.resize(grown, 0);
                live(&guest, &mut model, 30, 5).await;
                guest.image.close().await.unwrap();
            });
            std::fs::write(folder.join(name), ours.to_vec()).unwrap();
            std::fs::write(folder.join("ours.raw"), &model).unwrap();
            ok(folder, &["qemu-img", "check", "-q", name]);
            ok(folder, &["qemu-img", "compare", "-q", "-f", "raw", "-F", "qcow2", "ours.raw", name]);
        }
    }
}

/// Snapshots that are taken, applied and deleted here are the reference's, too; so are packed clusters.
#[test]
fn snapshots_and_packed_clusters_are_the_references_too() {
    let Some(lab) = lab() else { return };
    let folder = lab.path();
    for (number, kind) in KINDS.into_iter().enumerate().filter(|(_, kind)| !kind.contains("refcount_bits=1")) {
        ok(folder, &["qemu-img", "create", "-q", "-f", "qcow2", "-o", kind, "a.qcow2", "5243392"]);
        fill(folder, "a.qcow2", kind.contains("0.10"), kind.contains("extended_l2"));
        ok(folder, &["qemu-img", "convert", "-q", "-O", "raw", "a.qcow2", "first.raw"]);
        let first = std::fs::read(folder.join("first.raw")).unwrap();
        let mut model = first.clone();
        let store = MemoryStore::from_bytes("ours.qcow2", &std::fs::read(folder.join("a.qcow2")).unwrap());
        let judge = |model: &[u8], snapshots: usize| {
            std::fs::write(folder.join("a.qcow2"), store.to_vec()).unwrap();
            std::fs::write(folder.join("model.raw"), model).unwrap();
            ok(folder, &["qemu-img", "check", "-q", "a.qcow2"]);
            ok(folder, &["qemu-img", "compare", "-q", "-f", "raw", "-F", "qcow2", "model.raw", "a.qcow2"]);
            let list = ok(folder, &["qemu-img", "snapshot", "-l", "a.qcow2"]);
            assert_eq!(list.lines().count().saturating_sub(2), snapshots, "{list}");
        };
        let open = async || image::open(store.clone(), Format::Qcow2, OpenOptions::default()).await.unwrap();
        let create = |name: &str| image::SnapshotAction::Create(name.to_owned(), (1_700_000_000, 0));
        in_sim(async {
            let guest = Guest::new(open().await, &[]);
            guest.image.snapshot(create("first")).await.unwrap();
            judge(&model, 1);
            live(&guest, &mut model, 40, number as u64).await;
            guest.image.snapshot(create("second")).await.unwrap();
            let second = model.clone();
            live(&guest, &mut model, 20, 77).await;
            // A few clusters, packed over whatever was there.
            let cluster = guest.image.cluster_size();
            let mut packed = 0;
            for n in 0..20_u64 {
                let at = n * 13 * cluster % (4 << 20) / cluster * cluster;
                let bytes: Vec<u8> = (0..cluster).map(|i| (i / 300 + n) as u8).collect();
                if guest.image.pack(GuestOffset(at), ring::Iov::from_slice(&bytes)).await.unwrap() {
                    model[at as usize..][..cluster as usize].copy_from_slice(&bytes);
                    packed += 1;
                }
            }
            assert!(packed > 0, "{kind}");
            assert!(guest.read_all().await.unwrap() == model, "{kind}");
            guest.image.close().await.unwrap();
            judge(&model, 2);
            let guest = Guest::new(open().await, &[]);
            assert_eq!(guest.image.snapshots().await.unwrap()[1].name, "second");
            guest.image.snapshot(image::SnapshotAction::Apply("second".to_owned())).await.unwrap();
            assert!(guest.read_all().await.unwrap() == second, "{kind}");
            let mut model = second;
            live(&guest, &mut model, 10, 78).await;
            guest.image.settle().await.unwrap();
            judge(&model, 2);
            guest.image.snapshot(image::SnapshotAction::Delete("2".to_owned())).await.unwrap();
            judge(&model, 1);
            guest.image.snapshot(image::SnapshotAction::Apply("first".to_owned())).await.unwrap();
            guest.image.snapshot(image::SnapshotAction::Delete("first".to_owned())).await.unwrap();
            assert!(guest.read_all().await.unwrap() == first, "{kind}");
            let missing = guest.image.snapshot(image::SnapshotAction::Delete("first".to_owned())).await.unwrap_err();
            assert!(missing.to_string().contains("does not exist"), "{missing}");
            let mut model = first.clone();
            live(&guest, &mut model, 10, 79).await;
            guest.image.close().await.unwrap();
            judge(&model, 0);
        });
    }
}

/// Unpacked clusters are kept in memory for a while: not longer than they are true.
#[test]
fn what_is_packed_anew_reads_anew() {
    in_sim(async {
        let store = MemoryStore::new("ours.qcow2", 0);
        image::create::create(store.clone(), &image::create::CreateOptions::new(Format::Qcow2, 1 << 20)).await.unwrap();
        let image = image::open(store, Format::Qcow2, OpenOptions::default()).await.unwrap();
        let guest = Guest::new(image, &[]);
        let pack = async |byte: u8| {
            let bytes = ring::Iov::from_slice(&vec![byte; 65536]);
            assert!(guest.image.pack(GuestOffset(65536), bytes).await.unwrap());
            assert_eq!(guest.read(65536, 3).await.unwrap(), [byte; 3]);
        };
        pack(1).await;
        let action = |name: &str| image::SnapshotAction::Create(name.to_owned(), (1, 0));
        guest.image.snapshot(action("one")).await.unwrap();
        pack(2).await;
        guest.write(65536, &[3; 512]).await.unwrap();
        assert_eq!(guest.read(65536 + 511, 2).await.unwrap(), [3, 2]);
        pack(4).await;
        guest.image.snapshot(image::SnapshotAction::Apply("one".to_owned())).await.unwrap();
        assert_eq!(guest.read(65536, 3).await.unwrap(), [1; 3]);
        guest.image.close().await.unwrap();
    });
}

/// Bitmaps that record are marked as in use before anything is written; others, and all their clusters, stay what they are.
#[test]
fn bitmaps_are_not_kept_up_and_say_so() {
    let Some(lab) = lab() else { return };
    let folder = lab.path();
    ok(folder, &["qemu-img", "create", "-q", "-f", "qcow2", "a.qcow2", "5M"]);
    for line in [&["--add", "a.qcow2", "recording"][..], &["--add", "--disable", "a.qcow2", "resting"]] {
        ok(folder, &[&["qemu-img", "bitmap"], line].concat());
    }
    let store = MemoryStore::from_bytes("ours.qcow2", &std::fs::read(folder.join("a.qcow2")).unwrap());
    in_sim(async {
        let image = image::open(store.clone(), Format::Qcow2, OpenOptions::default()).await.unwrap();
        let guest = Guest::new(image, &[]);
        guest.write(1 << 20, &vec![7; 100_000]).await.unwrap();
        guest.image.close().await.unwrap();
    });
    std::fs::write(folder.join("a.qcow2"), store.to_vec()).unwrap();
    ok(folder, &["qemu-img", "check", "-q", "a.qcow2"]);
    let info = ok(folder, &["qemu-img", "info", "--output", "json", "a.qcow2"]);
    let flags = |name: &str| {
        let at = info.find(&format!("\"name\": \"{name}\"")).unwrap();
        info[..at].rsplit("\"flags\"").next().unwrap().split(']').next().unwrap().to_owned()
    };
    assert!(flags("recording").contains("in-use") && flags("recording").contains("auto"), "{info}");
    assert!(!flags("resting").contains("in-use"), "{info}");
}

/// An entry that leads to a table is an error, not a way to write over it.
#[test]
fn tables_are_not_written_over() {
    in_sim(async {
        let store = MemoryStore::new("ours.qcow2", 0);
        let options = image::create::CreateOptions {
            cluster_size: Some(4096),
            ..image::create::CreateOptions::new(Format::Qcow2, 4 << 20)
        };
        image::create::create(store.clone(), &options).await.unwrap();
        let open = async || image::open(store.clone(), Format::Qcow2, OpenOptions::default()).await.unwrap();
        let guest = Guest::new(open().await, &[]);
        guest.write(0, &[1; 4096]).await.unwrap();
        guest.image.close().await.unwrap();
        // Header, refcount table, one block, L1 table; then data and the L2 table, wherever they are.
        let bytes = store.to_vec();
        let l1 = 3 * 4096;
        let table = u64::from_be_bytes(bytes[l1..l1 + 8].try_into().unwrap()) & layout::qcow2::OFFSET;
        for target in [4096, 2 * 4096, l1 as u64, table] {
            let entry = ring::Iov::from_slice(&(target | layout::qcow2::COPIED).to_be_bytes());
            store.write(layout::HostOffset(table + 8), entry, false).await.unwrap();
            let guest = Guest::new(open().await, &[]);
            let error = guest.write(4096, &[2; 512]).await.unwrap_err();
            assert!(error.kind() == ErrorKind::Corrupt && error.to_string().contains("tables"), "{error}");
            assert_eq!(guest.read(0, 4096).await.unwrap(), [1; 4096]);
            guest.image.close().await.unwrap();
        }
        let image = image::open(store.clone(), Format::Qcow2, OpenOptions { read_only: false, for_check: true });
        let image = image.await.unwrap();
        let report = image.check(image::Repair::All).await.unwrap();
        assert!(report.is_clean() && report.corruptions_fixed > 0, "{report:#?}");
        image.close().await.unwrap();
        let guest = Guest::new(open().await, &[]);
        guest.write(4096, &[2; 512]).await.unwrap();
        assert_eq!(guest.read(0, 4096).await.unwrap(), [1; 4096]);
        guest.image.close().await.unwrap();
    });
}

/// New images, in hundreds of geometries: the reference finds nothing wrong, writes, finds nothing wrong, and is read.
#[test]
fn new_images_are_the_references_too() {
    let Some(lab) = lab() else { return };
    let folder = lab.path();
    let mut count = 0;
    for version in [2, 3] {
        for cluster_size in [512_u64, 4096, 65536, 2 << 20] {
            for refcount_bits in [1_u32, 2, 4, 8, 16, 32, 64] {
                for extended_l2 in [false, true] {
                    for size in [0_u64, 512, 3 << 20, 300 << 20] {
                        let qcow2 = image::qcow2::Options {
                            version,
                            refcount_bits,
                            extended_l2,
                            lazy_refcounts: version == 3 && count % 3 == 0,
                            ..image::qcow2::Options::default()
                        };
                        let backing = (count % 2 == 0)
                            .then(|| image::BackingRef { name: "below.raw".into(), format: Some(Format::Raw) });
                        let options = image::create::CreateOptions {
                            backing,
                            cluster_size: Some(cluster_size),
                            qcow2,
                            ..image::create::CreateOptions::new(Format::Qcow2, size)
                        };
                        if image::create::validate(&options).is_err() {
                            continue;
                        }
                        count += 1;
                        let store = MemoryStore::new("new.qcow2", 0);
                        in_sim(async { image::create::create(store.clone(), &options).await.unwrap() });
                        std::fs::write(folder.join("new.qcow2"), store.to_vec()).unwrap();
                        std::fs::write(folder.join("below.raw"), [3; 4096]).unwrap();
                        let what = format!("{options:?}");
                        let checked = crate::reference::tool(folder, &["qemu-img", "check", "-q", "new.qcow2"]);
                        assert!(checked.status.success(), "{what}: {checked:?}");
                        if size >= 3 << 20 && count % 4 == 0 {
                            ok(folder, &["qemu-io", "-f", "qcow2", "-c", "write -P 9 1M 700k", "new.qcow2"]);
                            ok(folder, &["qemu-img", "check", "-q", "new.qcow2"]);
                            in_sim(async {
                                let image = open(&std::fs::read(folder.join("new.qcow2")).unwrap()).await.unwrap();
                                let below = if options.backing.is_some() { vec![3; 4096] } else { Vec::new() };
                                let guest = Guest::new(image, &below);
                                assert_eq!(guest.read(1 << 20, 5).await.unwrap(), [9; 5], "{what}");
                                assert_eq!(guest.read(0, 1).await.unwrap()[0] == 3, !below.is_empty(), "{what}");
                            });
                        }
                    }
                }
            }
        }
    }
    assert!(count > 150, "{count} images");
}

#[test]
fn long_runs_are_answered_as_one() {
    let Some(lab) = lab() else { return };
    let folder = lab.path();
    ok(folder, &["qemu-img", "create", "-q", "-f", "qcow2", "-o", "preallocation=metadata", "a.qcow2", "64M"]);
    in_sim(async {
        let image = open(&std::fs::read(folder.join("a.qcow2")).unwrap()).await.unwrap();
        let guest = Guest::new(image, &[]);
        let all = GuestRange::new(GuestOffset(0), 64 << 20);
        let run = guest.mapping(all).await.unwrap();
        assert!(matches!(run.mapping, Mapping::Data(_)) && run.len >= 32 << 20, "{run:?}: a slice at least");
    });
}

#[test]
fn what_is_not_served_is_named() {
    let Some(lab) = lab() else { return };
    let folder = lab.path();
    ok(folder, &["qemu-img", "create", "-q", "-f", "qcow2", "plain.qcow2", "1M"]);
    let bytes = |name: &str| std::fs::read(folder.join(name)).unwrap();
    in_sim(async {
        let mut old = bytes("plain.qcow2");
        old[35] = 1;
        let error = open(&old).await.map(drop).unwrap_err();
        assert!(error.kind() == ErrorKind::Unsupported && error.to_string().contains("LUKS"), "{error}");
        let mut damaged = bytes("plain.qcow2");
        damaged[79] = 0x40;
        let error = open(&damaged).await.map(drop).unwrap_err();
        assert!(error.to_string().contains("bit 6"), "{error}");
    });
}

/// Any eight bytes may be damaged: reads are right, or an error that names the image, or (where data was hit) other bytes.
#[test]
fn damaged_images_are_errors_with_a_place() {
    let Some(lab) = lab() else { return };
    let folder = lab.path();
    for kind in ["compat=1.1,cluster_size=4k", "compat=1.1,extended_l2=on,cluster_size=16k"] {
        ok(folder, &["qemu-img", "create", "-q", "-f", "qcow2", "-o", kind, "a.qcow2", "5243392"]);
        fill(folder, "a.qcow2", false, true);
        ok(folder, &["qemu-img", "convert", "-q", "-c", "-O", "qcow2", "-o", kind, "a.qcow2", "packed.qcow2"]);
        for name in ["a.qcow2", "packed.qcow2"] {
            let sound = std::fs::read(folder.join(name)).unwrap();
            let mut state = 1_u64;
            for round in 0..300 {
                let mut bytes = sound.clone();
                for _ in 0..=round % 3 {
                    state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
                    // Mostly where the tables are.
                    let reach = if round % 2 == 0 { 512 } else { bytes.len().min(128 << 10) };
                    let at = (state >> 33) as usize % (reach - 8);
                    bytes[at..at + 8].copy_from_slice(&state.rotate_left(17).to_be_bytes());
                }
                if round % 10 == 9 {
                    bytes.truncate((state >> 40) as usize % bytes.len());
                }
                in_sim(async {
                    let Ok(image) = open(&bytes).await else { return };
                    let guest = Guest::new(image, &[]);
                    let size = guest.image.size().min(6 << 20);
                    for at in (0..size).step_by(64 << 10) {
                        let len = (size - at).min(64 << 10);
                        if let Err(error) = guest.read(at, len).await {
                            assert!(error.to_string().contains("ours.qcow2"), "{error}");
                        }
                    }
                });
            }
        }
    }
}

/// A table that leads far past the end of the file: no snapshot is made of it, none is deleted, in little memory; and nothing is
/// changed.
#[test]
fn a_snapshot_of_what_is_not_there_is_refused() {
    use image::create::CreateOptions;
    use image::{ErrorKind, Format, OpenOptions, SnapshotAction};
    use layout::HostOffset;
    use ring::Iov;
    use store::Store;
    use store::memory::MemoryStore;
    Sim::new(6).block_on(async {
        let store = MemoryStore::new("far.qcow2", 0);
        let options = CreateOptions { cluster_size: Some(4096), ..CreateOptions::new(Format::Qcow2, 1 << 20) };
        image::create::create(store.clone(), &options).await.unwrap();
        let open =
            async |store: &Rc<MemoryStore>| image::open(store.clone(), Format::Qcow2, OpenOptions::default()).await;
        let guest = Guest::new(open(&store).await.unwrap(), &[]);
        guest.write(0, &vec![1; 8192]).await.unwrap();
        guest.image.snapshot(SnapshotAction::Create("one".to_owned(), (1, 2))).await.unwrap();
        guest.image.close().await.unwrap();
        let word = async |at: u64| {
            let bytes = Iov::alloc(8);
            store.read(HostOffset(at), bytes.clone()).await.unwrap();
            u64::from_be_bytes(bytes.to_vec().try_into().unwrap()) & 0x00ff_ffff_ffff_fe00
        };
        let table = word(word(40).await).await;
        store.write(HostOffset(table + 8), Iov::from_slice(&(1_u64 << 50).to_be_bytes()), false).await.unwrap();
        let (before, held) = (store.to_vec(), store.peek().held());
        for action in [SnapshotAction::Create("two".to_owned(), (1, 2)), SnapshotAction::Delete("one".to_owned())] {
            let image = open(&store).await.unwrap();
            let what = format!("{action:?}");
            let error = image.snapshot(action).await.expect_err(&what);
            assert_eq!(error.kind(), ErrorKind::Corrupt, "{error}");
            assert!(error.to_string().contains("past the end of the file"), "{error}");
            image.close().await.unwrap();
        }
        assert!(store.to_vec()[..before.len()] == before && store.peek().held() <= held + (1 << 20));
    });
}
