//! QCOW2 images as qemu-img and qemu-io make them, in every kind of cluster there is: read to the byte; and damaged ones, which
//! are errors with a place, never a panic.

use crate::guest::Guest;
use crate::reference::{lab, ok};
use image::{ErrorKind, Format, Mapping, OpenOptions};
use layout::{GuestOffset, GuestRange};
use ring::sim::Sim;
use std::path::Path;
use std::rc::Rc;
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
    ok(folder, &["qemu-img", "create", "-q", "-f", "qcow2", "-o", "data_file=data.raw", "external.qcow2", "1M"]);
    ok(folder, &["qemu-img", "create", "-q", "-f", "qcow2", "plain.qcow2", "1M"]);
    let bytes = |name: &str| std::fs::read(folder.join(name)).unwrap();
    in_sim(async {
        let error = open(&bytes("external.qcow2")).await.map(drop).unwrap_err();
        assert!(error.kind() == ErrorKind::Unsupported && error.to_string().contains("file of their own"), "{error}");
        let store = MemoryStore::from_bytes("plain.qcow2", &bytes("plain.qcow2"));
        let error = image::open(store, Format::Qcow2, OpenOptions::default()).await.map(drop).unwrap_err();
        assert!(error.kind() == ErrorKind::ReadOnly && error.to_string().contains("overlay"), "{error}");
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
