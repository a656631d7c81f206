//! Images of the formats that are only read, as qemu-img makes them.
//!
//! What must hold: they read to the byte as qemu-img reads them, over what lies below them, too; they are found by their bytes; they
//! are not opened for writing; whatever bytes are damaged, there is an answer or an error that names the image, soon, and never a
//! panic.

use crate::guest::Guest;
use crate::reference::{lab, ok, tool};
use image::{ErrorKind, Format, OpenOptions};
use layout::{GuestOffset, GuestRange};
use ring::sim::Sim;
use std::path::Path;
use store::memory::MemoryStore;

pub(crate) const READ_ONLY: OpenOptions = OpenOptions { read_only: true, for_check: false };

/// Formats, and options of `convert`.
const KINDS: [(&str, &[&str]); 14] = [
    ("vdi", &["-o", "static=off"]),
    ("vdi", &["-o", "static=on"]),
    ("vpc", &["-o", "subformat=dynamic"]),
    ("vpc", &["-o", "subformat=fixed"]),
    ("vpc", &["-o", "subformat=dynamic,force_size=on"]),
    ("parallels", &["-o", "cluster_size=1M"]),
    ("parallels", &["-o", "cluster_size=64k"]),
    ("qcow", &[]),
    ("qcow", &["-c"]),
    ("vmdk", &["-o", "subformat=monolithicSparse"]),
    ("vmdk", &["-o", "subformat=streamOptimized"]),
    ("vhdx", &["-o", "subformat=dynamic,block_size=1M"]),
    ("vhdx", &["-o", "subformat=dynamic,block_state_zero=off"]),
    ("vhdx", &["-o", "subformat=fixed,block_size=2M,log_size=2M"]),
];

/// Formats that qemu-img makes over a backing file, and which format that must have.
const OVERLAYS: [(&str, &str); 2] = [("qcow", "raw"), ("vmdk", "vmdk")];

pub(crate) fn in_sim<T>(test: impl Future<Output = T>) -> T {
    Sim::new(5).block_on(test)
}

/// Numbers that look random.
pub(crate) struct Dice(pub(crate) u64);

impl Dice {
    pub(crate) fn roll(&mut self) -> u64 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        self.0 ^ self.0 >> 31
    }

    pub(crate) fn below(&mut self, end: usize) -> usize {
        (self.roll() >> 20) as usize % end.max(1)
    }
}

/// A disk with what packs well, what does not, and nothing at all.
pub(crate) fn disk(len: usize) -> Vec<u8> {
    let mut dice = Dice(7);
    let mut bytes = vec![0_u8; len];
    for (n, part) in bytes.chunks_mut(100_000).enumerate() {
        match n % 4 {
            0 => part.fill(n as u8 + 1),
            2 => part.iter_mut().for_each(|byte| *byte = dice.roll() as u8),
            _ => {}
        }
    }
    bytes
}

/// Reads an image that may be damaged, in parts and as far as that is quick; errors must name `name`.
pub(crate) async fn read_what_can_be_read(guest: &Guest, name: &str) {
    let size = guest.image.size();
    for at in (0..size.min(12 << 20)).step_by(256 << 10) {
        let len = (size - at).min(256 << 10);
        if let Err(error) = guest.read(at, len).await {
            assert!(error.to_string().contains(name), "{error}");
        }
    }
    if size > 0 {
        let last = size.min(4096);
        let _ = guest.read(size - last, last).await;
        let _ = guest.image.lookup(GuestRange::new(GuestOffset(0), size));
    }
}

/// `sound` with eight bytes of its first or last kilobytes overwritten, or its end cut off.
pub(crate) fn damaged(sound: &[u8], round: usize, dice: &mut Dice) -> Vec<u8> {
    let mut bytes = sound.to_vec();
    let reach = if round.is_multiple_of(2) { 2048 } else { 1 << 20 }.min(bytes.len());
    let at = dice.below(reach - 8);
    let at = if round % 5 == 4 { bytes.len() - 8 - at % bytes.len().min(2000).saturating_sub(8).max(1) } else { at };
    let value = match dice.below(4) {
        0 => [0xff; 8],
        1 => [0; 8],
        _ => dice.roll().to_be_bytes(),
    };
    let len = 1 << dice.below(4);
    bytes[at..at + len].copy_from_slice(&value[..len]);
    if round % 10 == 9 {
        bytes.truncate(dice.below(bytes.len()));
    }
    bytes
}

#[test]
fn images_read_as_the_reference_reads_them() {
    let Some(lab) = lab() else { return };
    let folder = lab.path();
    std::fs::write(folder.join("m.raw"), disk(9 << 20)).unwrap();
    for (format, options) in KINDS {
        let line = [&["qemu-img", "convert", "-f", "raw", "-O", format], options, &["m.raw", "a"]].concat();
        // (qemu-img 10 says 1 after it has packed all of a QCOW image well.)
        tool(folder, &line);
        ok(folder, &["qemu-img", "compare", "-f", "raw", "-F", format, "m.raw", "a"]);
        let expected = flattened(folder, format, "a");
        let sound = std::fs::read(folder.join("a")).unwrap();
        let wanted = Format::from_name(format).unwrap();
        in_sim(async {
            let store = MemoryStore::from_bytes("a", &sound).read_only();
            assert_eq!(image::probe::probe(&*store).await.unwrap(), wanted, "{format} {options:?}");
            let image = image::open(store.clone(), wanted, READ_ONLY).await.unwrap();
            assert_eq!(image.size(), expected.len() as u64, "{format} {options:?}");
            let guest = Guest::new(image, &[]);
            assert!(guest.read_all().await.unwrap() == expected, "{format} {options:?}");
            let store = MemoryStore::from_bytes("a", &sound);
            let error = image::open(store, wanted, OpenOptions::default()).await.map(drop).unwrap_err();
            assert!(error.kind() == ErrorKind::ReadOnly && error.to_string().contains("overlay"), "{error}");
        });
        let mut dice = Dice(1);
        for round in 0..60 {
            let bytes = damaged(&sound, round, &mut dice);
            in_sim(async {
                let store = MemoryStore::from_bytes("ours", &bytes).read_only();
                match image::open(store, wanted, READ_ONLY).await {
                    Ok(image) => read_what_can_be_read(&Guest::new(image, &[]), "ours").await,
                    Err(error) => assert!(error.to_string().contains("ours"), "{error}"),
                }
            });
        }
    }
}

/// The guest's bytes as qemu-img reads them.
pub(crate) fn flattened(folder: &Path, format: &str, file: &str) -> Vec<u8> {
    ok(folder, &["qemu-img", "convert", "-f", format, "-O", "raw", file, "expected.raw"]);
    std::fs::read(folder.join("expected.raw")).unwrap()
}

#[test]
fn what_lies_below_shows_through() {
    let Some(lab) = lab() else { return };
    let folder = lab.path();
    let below = disk(5 << 20);
    std::fs::write(folder.join("m.raw"), &below).unwrap();
    for (format, below_format) in OVERLAYS {
        ok(folder, &["qemu-img", "convert", "-f", "raw", "-O", below_format, "m.raw", "below"]);
        ok(folder, &["qemu-img", "create", "-q", "-f", format, "-b", "below", "-F", below_format, "a"]);
        ok(folder, &["qemu-io", "-f", format, "-c", "write -P 9 70000 5000", "-c", "write -P 8 2M 1000000", "a"]);
        let expected = flattened(folder, format, "a");
        let sound = std::fs::read(folder.join("a")).unwrap();
        in_sim(async {
            let store = MemoryStore::from_bytes("a", &sound).read_only();
            let image = image::open(store, Format::from_name(format).unwrap(), READ_ONLY).await.unwrap();
            let backing = image.backing().unwrap();
            assert_eq!(backing.name, "below", "{format}");
            assert!(backing.format.is_none_or(|format| format.name() == below_format), "{backing:?}");
            assert!(Guest::new(image, &below).read_all().await.unwrap() == expected, "{format}");
        });
    }
}

#[test]
fn what_is_encrypted_is_named() {
    let Some(lab) = lab() else { return };
    let folder = lab.path();
    ok(folder, &["qemu-img", "create", "-q", "-f", "qcow", "a", "1M"]);
    let mut bytes = std::fs::read(folder.join("a")).unwrap();
    bytes[39] = 1;
    in_sim(async {
        let store = MemoryStore::from_bytes("a", &bytes).read_only();
        assert_eq!(image::probe::probe(&*store).await.unwrap(), Format::Qcow);
        let error = image::open(store, Format::Qcow, READ_ONLY).await.map(drop).unwrap_err();
        assert!(error.kind() == ErrorKind::Unsupported && error.to_string().contains("encrypted"), "{error}");
    });
}
