//! VDI, VHD and Parallels images as qemu-img makes them: read to the byte; and damaged ones, which are errors with a place.

use crate::guest::Guest;
use crate::reference::{lab, ok};
use image::{ErrorKind, Format, OpenOptions};
use layout::{GuestOffset, GuestRange};
use ring::sim::Sim;
use store::memory::MemoryStore;

const READ_ONLY: OpenOptions = OpenOptions { read_only: true, for_check: false };

/// Formats, and options of `create`.
const KINDS: [(&str, &str); 7] = [
    ("vdi", "static=off"),
    ("vdi", "static=on"),
    ("vpc", "subformat=dynamic"),
    ("vpc", "subformat=fixed"),
    ("vpc", "subformat=dynamic,force_size=on"),
    ("parallels", "cluster_size=1M"),
    ("parallels", "cluster_size=64k"),
];

fn in_sim<T>(test: impl Future<Output = T>) -> T {
    Sim::new(5).block_on(test)
}

#[test]
fn images_read_as_the_reference_reads_them() {
    let Some(lab) = lab() else { return };
    let folder = lab.path();
    let mut bytes = vec![0_u8; 9 << 20];
    for (n, part) in bytes.chunks_mut(100_000).enumerate().filter(|(n, _)| n % 3 != 1) {
        part.fill(n as u8);
    }
    std::fs::write(folder.join("m.raw"), &bytes).unwrap();
    for (format, options) in KINDS {
        ok(folder, &["qemu-img", "convert", "-f", "raw", "-O", format, "-o", options, "m.raw", "a"]);
        ok(folder, &["qemu-img", "convert", "-f", format, "-O", "raw", "a", "expected.raw"]);
        let expected = std::fs::read(folder.join("expected.raw")).unwrap();
        let sound = std::fs::read(folder.join("a")).unwrap();
        let wanted = Format::from_name(format).unwrap();
        in_sim(async {
            let store = MemoryStore::from_bytes("a", &sound).read_only();
            assert_eq!(image::probe::probe(&*store).await.unwrap(), wanted, "{format} {options}");
            let image = image::open(store.clone(), wanted, READ_ONLY).await.unwrap();
            assert_eq!(image.size(), expected.len() as u64, "{format} {options}");
            let guest = Guest::new(image, &[]);
            assert!(guest.read_all().await.unwrap() == expected, "{format} {options}");
            let store = MemoryStore::from_bytes("a", &sound);
            let error = image::open(store, wanted, OpenOptions::default()).await.map(drop).unwrap_err();
            assert!(error.kind() == ErrorKind::ReadOnly && error.to_string().contains("overlay"), "{error}");
        });
        // Any eight bytes of the first and the last kilobytes may be damaged.
        let mut state = 1_u64;
        for round in 0..60 {
            let mut bytes = sound.clone();
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            let reach = if round % 2 == 0 { 2048 } else { 1 << 20 }.min(bytes.len());
            let at = (state >> 33) as usize % (reach - 8);
            let at = if round % 5 == 4 { bytes.len() - 8 - at.min(500) } else { at };
            bytes[at..at + 8].copy_from_slice(&state.rotate_left(17).to_be_bytes());
            if round % 10 == 9 {
                bytes.truncate((state >> 40) as usize % bytes.len());
            }
            in_sim(async {
                let store = MemoryStore::from_bytes("ours", &bytes).read_only();
                let Ok(image) = image::open(store, wanted, READ_ONLY).await else { return };
                let guest = Guest::new(image, &[]);
                let size = guest.image.size().min(12 << 20);
                for at in (0..size).step_by(256 << 10) {
                    let len = (size - at).min(256 << 10);
                    if let Err(error) = guest.read(at, len).await {
                        assert!(error.to_string().contains("ours"), "{error}");
                    }
                }
                if size > 0 {
                    let all = GuestRange::new(GuestOffset(0), guest.image.size());
                    let _ = guest.image.lookup(all);
                }
            });
        }
    }
}
