//! Images that are only read, as qemu-img makes them: read to the byte; and damaged ones, which are errors with a place.

use crate::guest::Guest;
use crate::reference::{lab, ok};
use futures_util::future::LocalBoxFuture;
use image::{Companions, ErrorKind, Format, Mapping, OpenOptions, Surroundings};
use layout::{GuestOffset, GuestRange};
use ring::sim::Sim;
use std::path::{Path, PathBuf};
use std::rc::Rc;
use store::Store;
use store::memory::MemoryStore;

const READ_ONLY: OpenOptions = OpenOptions { read_only: true, for_check: false };

/// Formats, and options of `create`.
const KINDS: [(&str, &str); 17] = [
    ("vdi", "static=off"),
    ("vdi", "static=on"),
    ("vpc", "subformat=dynamic"),
    ("vpc", "subformat=fixed"),
    ("vpc", "subformat=dynamic,force_size=on"),
    ("parallels", "cluster_size=1M"),
    ("parallels", "cluster_size=64k"),
    ("qcow", "-"),
    // Packed, too.
    ("qcow", "-c"),
    ("vmdk", "subformat=monolithicSparse"),
    ("vmdk", "subformat=monolithicSparse,zeroed_grain=on"),
    ("vmdk", "subformat=streamOptimized"),
    ("vmdk", "subformat=monolithicFlat"),
    ("vmdk", "subformat=twoGbMaxExtentSparse"),
    ("vmdk", "subformat=twoGbMaxExtentFlat"),
    ("vhdx", "subformat=dynamic"),
    ("vhdx", "subformat=fixed,block_size=1M"),
];

/// Files of the folder that the test works in, in memory.
struct Folder(PathBuf);

impl Companions for Folder {
    fn open<'a>(
        &'a self,
        name: &'a str,
        _: &'a str,
        read_only: bool,
    ) -> LocalBoxFuture<'a, image::Result<Rc<dyn Store>>> {
        assert!(read_only);
        let path = self.0.join(name.strip_prefix("file:").unwrap_or(name));
        Box::pin(async move {
            let bytes = std::fs::read(path)
                .map_err(|error| image::Error::new(ErrorKind::Chain, "ours", None, error.to_string()))?;
            Ok(MemoryStore::from_bytes("part of ours", &bytes).read_only() as Rc<dyn Store>)
        })
    }
}

fn in_sim<T>(test: impl Future<Output = T>) -> T {
    Sim::new(5).block_on(test)
}

/// Makes an image with packed clusters and plain ones, one cluster at a time: `convert -c` does not do it for every format.
fn packed(folder: &Path, format: &str) {
    ok(folder, &["qemu-img", "create", "-q", "-f", format, "a", "9M"]);
    let mut commands = vec!["write -P 77 100k 50k".to_owned()];
    commands.extend((0..100).map(|n| format!("write -c -P {n} {}k 4k", 1024 + n * 12)));
    let mut line = vec!["qemu-io", "-f", format];
    for command in &commands {
        line.extend(["-c", command]);
    }
    line.push("a");
    ok(folder, &line);
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
        if options == "-c" {
            packed(folder, format);
        } else {
            let mut line = vec!["qemu-img", "convert", "-f", "raw", "-O", format];
            if options != "-" {
                line.extend(["-o", options]);
            }
            line.extend(["m.raw", "a"]);
            ok(folder, &line);
        }
        ok(folder, &["qemu-img", "convert", "-f", format, "-O", "raw", "a", "expected.raw"]);
        let expected = std::fs::read(folder.join("expected.raw")).unwrap();
        let sound = std::fs::read(folder.join("a")).unwrap();
        let wanted = Format::from_name(format).unwrap();
        in_sim(async {
            let store = MemoryStore::from_bytes("a", &sound).read_only();
            assert_eq!(image::probe::probe(&*store).await.unwrap(), wanted, "{format} {options}");
            let files = Folder(folder.to_owned());
            let surroundings = Surroundings { companions: &files, ..Surroundings::default() };
            let image = image::open_in(store.clone(), wanted, READ_ONLY, surroundings).await.unwrap();
            assert_eq!(image.size(), expected.len() as u64, "{format} {options}");
            let guest = Guest::new(image, &[]);
            assert!(guest.read_all().await.unwrap() == expected, "{format} {options}");
            let store = MemoryStore::from_bytes("a", &sound);
            let error = image::open(store, wanted, OpenOptions::default()).await.map(drop).unwrap_err();
            assert!(error.kind() == ErrorKind::ReadOnly && error.to_string().contains("overlay"), "{error}");
        });
        // Any eight bytes of the first and the last kilobytes may be damaged.
        let mut state = 1_u64;
        for round in 0..40 {
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
                let files = Folder(folder.to_owned());
                let surroundings = Surroundings { companions: &files, ..Surroundings::default() };
                let image = match image::open_in(store, wanted, READ_ONLY, surroundings).await {
                    Ok(image) => image,
                    Err(error) => {
                        assert!(error.to_string().contains("ours"), "{format} {options}: {error}");
                        return;
                    }
                };
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

/// What an image's tables say of the byte at `at`.
fn mapping(image: &dyn image::Image, at: u64) -> Mapping {
    let range = GuestRange::new(GuestOffset(at), 1);
    in_sim(async {
        loop {
            match image.lookup(range).unwrap() {
                Some(mapped) => return mapped.mapping,
                None => image.load(range).await.unwrap(),
            }
        }
    })
}

#[test]
fn what_lies_below_shows_through_where_there_is_a_parent() {
    let Some(lab) = lab() else { return };
    let folder = lab.path();
    for (format, make) in [
        ("qcow", &["qemu-img", "create", "-q", "-f", "qcow", "-b", "base", "-F", "qcow", "a"][..]),
        ("vmdk", &["qemu-img", "create", "-q", "-f", "vmdk", "-b", "base", "-F", "vmdk", "a"]),
    ] {
        ok(folder, &["qemu-img", "create", "-q", "-f", format, "base", "4M"]);
        ok(folder, make);
        ok(folder, &["qemu-io", "-f", format, "-c", "write -P 7 1M 64k", "a"]);
        let bytes = std::fs::read(folder.join("a")).unwrap();
        let wanted = Format::from_name(format).unwrap();
        let image = in_sim(async {
            image::open(MemoryStore::from_bytes("a", &bytes).read_only(), wanted, READ_ONLY).await.unwrap()
        });
        assert_eq!(image.backing().unwrap().name, "base", "{format}");
        assert_eq!(mapping(&*image, 0), Mapping::Unallocated, "{format}");
        assert!(matches!(mapping(&*image, 1 << 20), Mapping::Data(_)), "{format}");
    }
}

#[test]
fn a_descriptor_names_no_files_of_other_folders() {
    for file in ["/etc/passwd", "../x", "sub/x", ".."] {
        let text = format!("# Disk DescriptorFile\nversion=1\nparentCID=ffffffff\nRW 8 FLAT \"{file}\" 0\n");
        let error = in_sim(async {
            let store = MemoryStore::from_bytes("ours", text.as_bytes()).read_only();
            let files = Folder(PathBuf::from("/"));
            let surroundings = Surroundings { companions: &files, ..Surroundings::default() };
            image::open_in(store, Format::Vmdk, READ_ONLY, surroundings).await.map(drop).unwrap_err()
        });
        assert!(error.to_string().contains("another folder"), "{error}");
    }
}
