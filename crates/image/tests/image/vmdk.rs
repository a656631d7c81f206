//! VMDK: disks of several files, and descriptors that lie.
//!
//! What must hold: every kind that qemu-img makes reads as qemu-img reads it, over the borders of extents, too; a file that a
//! descriptor names is opened only if it lies in the image's folder; what is missing, cut off or contradictory is an error that
//! names the file it is in; whatever is damaged, there is an answer or such an error.

use crate::guest::Guest;
use crate::masters::{Dice, READ_ONLY, damaged, disk, flattened, in_sim, read_what_can_be_read};
use crate::reference::{lab, ok};
use futures_util::future::LocalBoxFuture;
use image::{Companions, Error, ErrorKind, Format, Image, Mapping, Result, Surroundings};
use layout::{GuestOffset, GuestRange};
use ring::{Config, Ring};
use std::cell::RefCell;
use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::rc::Rc;
use store::Store;
use store::file::{FileStore, OpenOptions};
use store::memory::MemoryStore;

/// Files in memory, by name; remembers what was asked for.
#[derive(Default)]
struct Folder {
    files: HashMap<String, Vec<u8>>,
    asked: RefCell<Vec<String>>,
}

impl Folder {
    /// The files of a folder whose names begin with `prefix`.
    fn of(path: &Path, prefix: &str) -> Self {
        let mut folder = Self::default();
        for entry in std::fs::read_dir(path).unwrap().flatten() {
            let name = entry.file_name().into_string().unwrap();
            if name.starts_with(prefix) {
                folder.files.insert(name, std::fs::read(entry.path()).unwrap());
            }
        }
        folder
    }

    fn with(mut self, name: &str, bytes: &[u8]) -> Self {
        self.files.insert(name.to_owned(), bytes.to_vec());
        self
    }

    async fn open(&self, name: &str) -> Result<Rc<dyn Image>> {
        let store = MemoryStore::from_bytes(name, &self.files[name]).read_only();
        image::open_in(store, Format::Vmdk, READ_ONLY, Surroundings { companions: self, ..Surroundings::default() })
            .await
    }
}

impl Companions for Folder {
    fn open<'a>(&'a self, name: &'a str, referrer: &'a str, only: bool) -> LocalBoxFuture<'a, Result<Rc<dyn Store>>> {
        assert!(only, "extents are only read");
        self.asked.borrow_mut().push(name.to_owned());
        Box::pin(async move {
            match self.files.get(name) {
                Some(bytes) => Ok(MemoryStore::from_bytes(name, bytes).read_only() as Rc<dyn Store>),
                None => Err(Error::new(ErrorKind::InvalidArgument, referrer, None, format!("no file '{name}'"))),
            }
        })
    }
}

/// Real files beside the image.
struct Beside(PathBuf);

impl Companions for Beside {
    fn open<'a>(&'a self, name: &'a str, _: &'a str, read_only: bool) -> LocalBoxFuture<'a, Result<Rc<dyn Store>>> {
        Box::pin(async move {
            let options = OpenOptions { read_only, ..OpenOptions::default() };
            Ok(FileStore::open(&self.0.join(name), options).await? as Rc<dyn Store>)
        })
    }
}

const KINDS: [&str; 7] = [
    "subformat=monolithicSparse",
    "subformat=streamOptimized",
    "subformat=monolithicFlat",
    "subformat=twoGbMaxExtentSparse",
    "subformat=twoGbMaxExtentFlat",
    "subformat=monolithicSparse,compat6=on,zeroed_grain=on",
    "subformat=streamOptimized,hwversion=7",
];

#[test]
fn every_kind_reads_as_the_reference_reads_it() {
    let Some(lab) = lab() else { return };
    let path = lab.path();
    // Neither tables nor grains end where the disk does.
    std::fs::write(path.join("m.raw"), disk((33 << 20) + 5 * 512)).unwrap();
    for (n, options) in KINDS.iter().enumerate() {
        let (name, prefix) = (format!("k{n}.vmdk"), format!("k{n}"));
        ok(path, &["qemu-img", "convert", "-f", "raw", "-O", "vmdk", "-o", options, "m.raw", &name]);
        if options.contains("zeroed_grain") {
            ok(path, &["qemu-io", "-f", "vmdk", "-c", "write -z 0 256k", "-c", "write -z 20M 1M", &name]);
        }
        let expected = flattened(path, "vmdk", &name);
        let folder = Folder::of(path, &prefix);
        in_sim(async {
            let store = MemoryStore::from_bytes(&name, &folder.files[&name]);
            assert_eq!(image::probe::probe(&*store).await.unwrap(), Format::Vmdk, "{options}");
            let guest = Guest::new(folder.open(&name).await.unwrap(), &[]);
            assert_eq!(guest.image.size(), expected.len() as u64, "{options}");
            assert!(guest.read_all().await.unwrap() == expected, "{options}");
            let first = guest.mapping(GuestRange::new(GuestOffset(0), 1 << 20)).await.unwrap();
            assert_eq!(first.mapping == Mapping::Zero, options.contains("zeroed_grain"), "{options}: {first:?}");
            assert_eq!(first.mapping == Mapping::Packed, options.contains("streamOptimized"), "{options}: {first:?}");
            assert_eq!(guest.image.info().cluster_size.is_none(), options.contains("Flat"), "{options}");
            assert_eq!(guest.image.backing(), None);
            guest.image.close().await.unwrap();
        });
    }
}

#[test]
fn whichever_file_is_damaged_the_error_names_one() {
    let Some(lab) = lab() else { return };
    let path = lab.path();
    std::fs::write(path.join("m.raw"), disk(1 << 20)).unwrap();
    for (n, options) in KINDS.iter().enumerate() {
        let (name, prefix) = (format!("k{n}.vmdk"), format!("k{n}"));
        ok(path, &["qemu-img", "convert", "-f", "raw", "-O", "vmdk", "-o", options, "m.raw", &name]);
        let folder = Folder::of(path, &prefix);
        let mut names: Vec<_> = folder.files.keys().cloned().collect();
        names.sort();
        let mut dice = Dice(3);
        for round in 0..60 {
            let target = &names[round / 2 % names.len()];
            let bytes = damaged(&folder.files[target], round, &mut dice);
            let folder = Folder { files: folder.files.clone(), ..Folder::default() }.with(target, &bytes);
            in_sim(async {
                match folder.open(&name).await {
                    Ok(image) => read_what_can_be_read(&Guest::new(image, &[]), &prefix).await,
                    Err(error) => assert!(error.to_string().contains(&prefix), "{error}"),
                }
            });
        }
    }
}

/// Extents of 2 GiB: what lies on both sides of their borders.
#[test]
fn extents_meet_at_their_borders() {
    let Some(lab) = lab() else { return };
    let path = lab.path();
    for kind in ["twoGbMaxExtentSparse", "twoGbMaxExtentFlat"] {
        let options = format!("subformat={kind}");
        ok(path, &["qemu-img", "create", "-q", "-f", "vmdk", "-o", &options, "big.vmdk", "5G"]);
        let text = std::fs::read_to_string(path.join("big.vmdk")).unwrap();
        let extents = text.lines().filter(|line| line.starts_with("RW "));
        let sizes: Vec<u64> =
            extents.map(|line| line.split(' ').nth(1).unwrap().parse::<u64>().unwrap() * 512).collect();
        assert!(sizes.len() >= 3, "{text}");
        let borders = [sizes[0], sizes[0] + sizes[1]];
        let mut line = vec!["qemu-io".to_owned(), "-f".into(), "vmdk".into()];
        for (n, border) in borders.iter().enumerate() {
            line.extend(["-c".into(), format!("write -P {} {} 200k", n + 1, border - (100 << 10))]);
        }
        line.extend(["-c".into(), "write -P 7 5368708608 512".into(), "big.vmdk".into()]);
        ok(path, &line.iter().map(String::as_str).collect::<Vec<_>>());
        Ring::new(Config::default()).unwrap().block_on(async {
            let options = OpenOptions { read_only: true, ..OpenOptions::default() };
            let store = FileStore::open(&path.join("big.vmdk"), options).await.unwrap();
            let beside = Beside(path.to_owned());
            let surroundings = Surroundings { companions: &beside, ..Surroundings::default() };
            let image = image::open_in(store, Format::Vmdk, READ_ONLY, surroundings).await.unwrap();
            let guest = Guest::new(image, &[]);
            assert_eq!(guest.image.size(), 5 << 30);
            for (n, border) in borders.iter().enumerate() {
                let bytes = guest.read(border - (150 << 10), 300 << 10).await.unwrap();
                let mut expected = vec![0; 300 << 10];
                expected[50 << 10..250 << 10].fill(n as u8 + 1);
                assert!(bytes == expected, "{kind}: border {n}");
            }
            assert_eq!(guest.read((5 << 30) - 1024, 1024).await.unwrap(), [vec![0; 512], vec![7; 512]].concat());
            guest.image.close().await.unwrap();
        });
    }
}

#[test]
fn a_parent_is_named_with_what_it_must_be() {
    let Some(lab) = lab() else { return };
    let path = lab.path();
    std::fs::write(path.join("m.raw"), disk(3 << 20)).unwrap();
    for kind in ["monolithicSparse", "twoGbMaxExtentSparse"] {
        let options = format!("subformat={kind}");
        ok(path, &["qemu-img", "convert", "-f", "raw", "-O", "vmdk", "-o", &options, "m.raw", "base.vmdk"]);
        ok(
            path,
            &["qemu-img", "create", "-q", "-f", "vmdk", "-b", "base.vmdk", "-F", "vmdk", "-o", &options, "top.vmdk"],
        );
        ok(path, &["qemu-io", "-f", "vmdk", "-c", "write -P 9 70000 5000", "-c", "write -P 8 2M 300000", "top.vmdk"]);
        let expected = flattened(path, "vmdk", "top.vmdk");
        let below = flattened(path, "vmdk", "base.vmdk");
        let folder = Folder::of(path, "");
        in_sim(async {
            let (base, top) = (folder.open("base.vmdk").await.unwrap(), folder.open("top.vmdk").await.unwrap());
            let backing = top.backing().unwrap();
            assert_eq!((backing.name.as_str(), backing.format), ("base.vmdk", Some(Format::Vmdk)));
            assert!(base.identity().is_some() && base.backing_identity().is_none());
            assert_eq!(top.backing_identity(), base.identity());
            assert!(Guest::new(top, &below).read_all().await.unwrap() == expected, "{kind}");
        });
    }
}

/// A descriptor of these extents.
fn descriptor(extents: &str) -> Vec<u8> {
    format!("# Disk DescriptorFile\nversion=1\nCID=1\nparentCID=ffffffff\ncreateType=\"custom\"\n{extents}\n")
        .into_bytes()
}

async fn refused(folder: &Folder, name: &str, kind: ErrorKind, words: &[&str]) {
    let error = folder.open(name).await.map(drop).expect_err(name);
    let text = error.to_string();
    assert!(error.kind() == kind && words.iter().all(|word| text.contains(word)), "{:?} {text}", error.kind());
}

#[test]
fn descriptors_that_lie_are_refused_and_open_nothing_else() {
    let elsewhere = ["/etc/passwd", "../secret.vmdk", "a/../../secret", "\\\\\\\\.\\\\PhysicalDrive0", ""];
    let many = "RW 1 ZERO\n".repeat(3000);
    in_sim(async {
        for name in elsewhere {
            let folder = Folder::default().with("d", &descriptor(&format!("RW 100 FLAT \"{name}\" 0")));
            refused(&folder, "d", ErrorKind::Unsupported, &["'d'", name, "folder"]).await;
            assert!(folder.asked.borrow().is_empty(), "{:?}", folder.asked);
        }
        let cases: [(&str, ErrorKind, &[&str]); 14] = [
            ("RW 100 FLAT \"gone\" 0", ErrorKind::Chain, &["'d'", "gone"]),
            ("RW 100 SPARSE \"gone\"", ErrorKind::Chain, &["'d'", "gone"]),
            ("RW 100 FLAT \"short\" 0", ErrorKind::Corrupt, &["'d'", "line 6", "'short'", "cut off"]),
            ("RW 2 FLAT \"short\" 1", ErrorKind::Corrupt, &["'short'", "cut off"]),
            ("RW 2 FLAT \"short\" 9007199254740992", ErrorKind::Corrupt, &["line 6"]),
            ("RW 2 SPARSE \"short\"", ErrorKind::Corrupt, &["'short'", "magicNumber"]),
            ("RW 2 SPARSE \"d\"", ErrorKind::Corrupt, &["'d'", "magicNumber"]),
            ("NOACCESS 2 FLAT \"short\" 0", ErrorKind::Unsupported, &["line 6", "NOACCESS"]),
            ("RW 2 VMFSSPARSE \"short\"", ErrorKind::Unsupported, &["VMFSSPARSE"]),
            ("RW 2 SESPARSE \"short\"", ErrorKind::Unsupported, &["SESPARSE"]),
            ("", ErrorKind::Unsupported, &["no extents"]),
            ("RW 18014398509481983 ZERO\nRW 1 ZERO", ErrorKind::Corrupt, &["any disk"]),
            ("RW 99999999999999999999 ZERO", ErrorKind::Corrupt, &["line 6"]),
            (&many, ErrorKind::Corrupt, &["more than 2048"]),
        ];
        for (extents, kind, words) in cases {
            let folder = Folder::default().with("short", &[7; 1000]).with("d", &descriptor(extents));
            refused(&folder, "d", kind, words).await;
        }
        let folder = Folder::default().with("d", &[&descriptor("RW 1 ZERO")[..], &vec![b'\n'; 2 << 20]].concat());
        refused(&folder, "d", ErrorKind::Corrupt, &["neither"]).await;
        let folder = Folder::default().with("d", b"COWD and more");
        refused(&folder, "d", ErrorKind::Unsupported, &["ESX"]).await;
    });
}

#[test]
fn extents_of_all_kinds_make_up_one_disk() {
    let bytes: Vec<u8> = (0..4096_u32).map(|n| (n / 16) as u8 | 1).collect();
    let text =
        descriptor("RW 3 FLAT \"f\" 2\nRDONLY 2 ZERO\nRW 0 ZERO\nRW 1 VMFS \"sub\\f\"\nRW 2 FLAT \"f\" 0\nRW 0 ZERO");
    let folder = Folder::default().with("f", &bytes).with("sub/f", &[5; 512]).with("d", &text);
    let expected = [&bytes[1024..2560], &[0; 1024], &[5; 512], &bytes[..1024]].concat();
    in_sim(async {
        let image = folder.open("d").await.unwrap();
        assert_eq!(image.size(), 8 * 512);
        assert_eq!(folder.asked.borrow().as_slice(), ["f", "sub/f"], "each file once");
        let run = image.lookup(GuestRange::new(GuestOffset(0), 8 * 512)).unwrap().unwrap();
        assert_eq!(run.len, 3 * 512);
        let guest = Guest::new(image, &[]);
        assert!(guest.read_all().await.unwrap() == expected);
        guest.image.close().await.unwrap();
    });
}

/// A sparse extent of 16 sectors in grains of 8, packed without markers, and an image cut off inside its last grain.
#[test]
fn what_no_tool_here_makes_is_read_too() {
    use std::io::Write;
    let mut header = vec![0_u8; 512];
    header[..4].copy_from_slice(b"KDMV");
    header[4] = 1;
    header[10] = 1;
    (header[12], header[20], header[45], header[56], header[77]) = (12, 8, 2, 1, 1);
    let grain: Vec<u8> = (0..4096_u32).map(|n| (n % 251) as u8).collect();
    let mut encoder = flate2::write::ZlibEncoder::new(Vec::new(), flate2::Compression::default());
    encoder.write_all(&grain).unwrap();
    let packed = encoder.finish().unwrap();
    let mut file = header.clone();
    file.resize(6 * 512, 0);
    file[512] = 2;
    (file[1024], file[1028]) = (6, 6);
    file.extend(&packed);
    let mut plain = header;
    plain[10] = 0;
    plain.resize(6 * 512, 0);
    plain[512] = 2;
    plain[1028] = 6;
    plain.extend(&grain[..1000]);
    let folder = Folder::default().with("packed", &file).with("plain", &plain);
    in_sim(async {
        let guest = Guest::new(folder.open("packed").await.unwrap(), &[]);
        assert!(guest.read_all().await.unwrap() == [&grain[..], &grain[..2048]].concat());
        assert!(guest.image.info().warnings[0].contains("descriptor"));
        let guest = Guest::new(folder.open("plain").await.unwrap(), &[]);
        assert!(guest.read_all().await.unwrap() == [&[0; 4096], &grain[..1000], &[0; 1048]].concat());
    });
    // Directories of all extents together have a bound.
    let mut greedy = plain[..512].to_vec();
    (greedy[12], greedy[14], greedy[15], greedy[20]) = (0, 0x60, 0, 1);
    (greedy[44], greedy[45]) = (1, 0);
    greedy.resize(26 << 20, 0);
    let text = descriptor(&"RW 100 SPARSE \"greedy\"\n".repeat(2));
    let folder = Folder::default().with("d", &text).with("greedy", &greedy);
    in_sim(async {
        let guest = Guest::new(folder.open("greedy").await.unwrap(), &[]);
        assert_eq!(guest.image.size(), 3 << 30);
        refused(&folder, "d", ErrorKind::Unsupported, &["'greedy'", "at most"]).await;
    });
}
