//! The reference tools' word: what they write we read, what we write they accept, and both find the same faults.
//!
//! Skipped, with a reason, where qemu-img is not installed; an error where `CI=true`.

use crate::guest::Guest;
use crate::subject::Subject;
use image::create::CreateOptions;
use image::{BackingRef, Format, Mapping, OpenOptions, Repair};
use layout::{GuestOffset, GuestRange};
use ring::sim::Sim;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::rc::Rc;
use store::memory::MemoryStore;
use tempfile::TempDir;

/// A folder for the tool's files; `None` when the tools are missing.
pub(crate) fn lab() -> Option<TempDir> {
    let found = ["qemu-img", "qemu-io"].iter().all(|tool| Command::new(tool).arg("--version").output().is_ok());
    if !found {
        assert!(std::env::var("CI").as_deref() != Ok("true"), "qemu-img and qemu-io are needed: install qemu-utils");
        eprintln!("skipped: qemu-img or qemu-io is not installed (Debian: qemu-utils)");
        return None;
    }
    Some(tempfile::tempdir().unwrap())
}

pub(crate) fn tool(folder: &Path, line: &[&str]) -> Output {
    let output = Command::new(line[0]).args(&line[1..]).current_dir(folder).output().unwrap();
    if std::env::var_os("SHOW_TOOLS").is_some() {
        eprintln!("{line:?}: {}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    }
    output
}

pub(crate) fn ok(folder: &Path, line: &[&str]) -> String {
    let output = tool(folder, line);
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.success(), "{line:?}: {said}");
    String::from_utf8(output.stdout).unwrap()
}

fn in_sim<T>(test: impl Future<Output = T>) -> T {
    Sim::new(11).block_on(test)
}

fn memory(path: &Path) -> Rc<MemoryStore> {
    MemoryStore::from_bytes("ours.qed", &std::fs::read(path).unwrap())
}

/// A number of a flat JSON object, 0 where it is missing.
fn number(json: &str, name: &str) -> u64 {
    let Some(at) = json.find(&format!("\"{name}\":")) else { return 0 };
    let rest = json[at + name.len() + 3..].trim_start();
    rest[..rest.find(|c: char| !c.is_ascii_digit()).unwrap_or(rest.len())].parse().unwrap()
}

/// Geometries the reference tool both makes and opens again.
const SHARED: [(u64, u32); 9] =
    [(4096, 2), (4096, 4), (4096, 16), (8192, 8), (65536, 2), (65536, 4), (65536, 16), (1 << 20, 4), (2 << 20, 2)];

fn subject(cluster_size: u64, table_size: u32) -> Subject {
    Subject {
        name: "qed",
        format: Format::Qed,
        cluster_size: Some(cluster_size),
        table_size: Some(table_size),
        qcow2: image::qcow2::Options::default(),
    }
}

#[test]
fn new_images_equal_the_reference_tools_byte_for_byte() {
    let Some(lab) = lab() else { return };
    let folder = lab.path();
    let name = |len| Some(BackingRef { name: "n".repeat(len), format: Some(Format::Raw) });
    let qed = Some(BackingRef { name: "base.qed".into(), format: Some(Format::Qed) });
    let mut cases: Vec<(u64, u32, u64, Option<BackingRef>)> = Vec::new();
    for (cluster, table) in SHARED {
        cases.push((cluster, table, 100 << 20, None));
    }
    cases.extend([(4096, 1, 1 << 20, None), (4 << 20, 2, 1 << 30, None), (65536, 1, 1 << 20, None)]);
    cases.extend([(65536, 4, 0, None), (65536, 4, 512, None), (65536, 4, 1000, None), (65536, 4, 64 << 40, None)]);
    cases.extend([(65536, 4, 1 << 20, name(5)), (4096, 4, 1 << 20, name(448)), (4096, 4, 1 << 20, name(1023))]);
    cases.extend([(65536, 4, 1 << 20, qed)]);
    for (cluster, table, size, backing) in cases {
        let options = format!("cluster_size={cluster},table_size={table}");
        let size_arg = size.to_string();
        let mut line = vec!["qemu-img", "create", "-q", "-f", "qed", "-u", "-o", &options];
        if let Some(backing) = &backing {
            line.extend(["-b", &backing.name, "-F", backing.format.unwrap().name()]);
        }
        line.extend(["theirs.qed", &size_arg]);
        ok(folder, &line);
        let theirs = std::fs::read(folder.join("theirs.qed")).unwrap();
        let ours = in_sim(async {
            let store = MemoryStore::new("ours.qed", 0);
            let options = CreateOptions {
                format: Format::Qed,
                size,
                backing: backing.clone(),
                cluster_size: Some(cluster),
                table_size: Some(table),
                qcow2: image::qcow2::Options::default(),
                passphrase: None,
                iteration_time: None,
            };
            image::create::create(store.clone(), &options).await.unwrap();
            store.to_vec()
        });
        assert!(ours == theirs, "cluster size {cluster}, table size {table}, size {size}, {backing:?}");
    }
}

/// Writes a pattern with qemu-io; returns what the disk must then hold.
fn fill_with_their_tool(folder: &Path, file: &str, size: u64, cluster: u64) -> Vec<u8> {
    let mut model = vec![0; size as usize];
    let mut line = vec!["qemu-io".to_owned(), "-f".into(), "qed".into()];
    let mut put = |at: u64, len: u64, byte: u8| {
        let end = (at + len).min(size);
        model[at as usize..end as usize].fill(byte);
        line.push("-c".into());
        line.push(if byte == 0 {
            format!("write -z {at} {}", end - at)
        } else {
            format!("write -P {byte} {at} {}", end - at)
        });
    };
    for i in 0..12u64 {
        put(i * i * 37 * 512 % (size - 1024) / 512 * 512, 512 + i * 1024, 1 + i as u8);
    }
    put(size - 512, 512, 77);
    put(3 * cluster, 2 * cluster, 0);
    put(0, 512, 5);
    line.push(file.into());
    ok(folder, &line.iter().map(String::as_str).collect::<Vec<_>>());
    model
}

#[test]
fn what_their_tool_writes_we_read_and_check_alike() {
    let Some(lab) = lab() else { return };
    let folder = lab.path();
    for (cluster, table) in SHARED {
        let size = 40 << 20;
        let options = format!("cluster_size={cluster},table_size={table}");
        ok(folder, &["qemu-img", "create", "-q", "-f", "qed", "-o", &options, "t.qed", &size.to_string()]);
        let model = fill_with_their_tool(folder, "t.qed", size, cluster);
        let json = ok(folder, &["qemu-img", "check", "-f", "qed", "--output", "json", "t.qed"]);
        in_sim(async {
            let store = memory(&folder.join("t.qed"));
            let options = OpenOptions { read_only: true, for_check: true };
            let report =
                image::open(store.clone(), Format::Qed, options).await.unwrap().check(Repair::None).await.unwrap();
            assert!(report.is_clean(), "{report:?}");
            let counts = [report.total_clusters, report.allocated_clusters, report.fragmented_clusters];
            let theirs =
                ["total-clusters", "allocated-clusters", "fragmented-clusters"].map(|name| number(&json, name));
            assert_eq!(counts, theirs, "cluster size {cluster}, table size {table}");
            // Reading, then going on where they stopped.
            let guest = Guest::new(subject(cluster, table).open(store.clone()).await.unwrap(), &[]);
            assert!(guest.read_all().await.unwrap() == model);
            guest.write(10 << 20, &vec![0xab; 3_000_000]).await.unwrap();
            guest.image.close().await.unwrap();
            std::fs::write(folder.join("t.qed"), store.to_vec()).unwrap();
        });
        ok(folder, &["qemu-img", "check", "-f", "qed", "t.qed"]);
        ok(folder, &["qemu-io", "-f", "qed", "-c", "read -P 0xab 10M 3000000", "-c", "read -P 5 0 512", "t.qed"]);
    }
}

#[test]
fn what_we_write_they_accept_read_and_map_alike() {
    let Some(lab) = lab() else { return };
    let folder = lab.path();
    let size = 20 << 20;
    let base: Vec<u8> = (0..size - 3_000_000).map(|i: u64| (i / 1000) as u8).collect();
    std::fs::write(folder.join("base.raw"), &base).unwrap();
    for (cluster, table) in SHARED {
        let expected = in_sim(async {
            let store = MemoryStore::new("ours.qed", 0);
            let backing = BackingRef { name: "base.raw".into(), format: Some(Format::Raw) };
            subject(cluster, table).create(store.clone(), size, Some(backing)).await;
            let guest = Guest::new(subject(cluster, table).open(store.clone()).await.unwrap(), &base);
            for i in 0..30u64 {
                guest.write((i * i * 20_011) % (size - 5000), &vec![0xc0 + i as u8; 4999]).await.unwrap();
            }
            guest.populate(GuestRange::new(GuestOffset(5 << 20), 3 << 20)).await.unwrap();
            let zeros = GuestRange::new(GuestOffset(8 << 20), 4 << 20);
            guest.image.write_zeroes(zeros, true, true).await.unwrap();
            let dropped = guest.image.reserve(GuestRange::new(GuestOffset(0), 1), image::Purpose::Data).await.unwrap();
            guest.write(size - 1, &[1]).await.unwrap();
            drop(dropped);
            let mut runs = Vec::new();
            let mut at = 0;
            while at < size {
                let mapped = guest.mapping(GuestRange::new(GuestOffset(at), size - at)).await.unwrap();
                runs.push((at, mapped.mapping));
                at += mapped.len;
            }
            let expected = guest.read_all().await.unwrap();
            guest.image.close().await.unwrap();
            std::fs::write(folder.join("ours.qed"), store.to_vec()).unwrap();
            (expected, runs)
        });
        ok(folder, &["qemu-img", "check", "-f", "qed", "ours.qed"]);
        ok(folder, &["qemu-img", "convert", "-f", "qed", "-O", "raw", "ours.qed", "flat.raw"]);
        assert!(std::fs::read(folder.join("flat.raw")).unwrap() == expected.0, "cluster size {cluster}");
        let map = ok(folder, &["qemu-img", "map", "-f", "qed", "--output", "json", "ours.qed"]);
        // Closing may have moved clusters (into the hole of the dropped reservation), not changed what is allocated.
        for (at, mapping) in expected.1 {
            let line = map.lines().rev().find(|line| number(line, "start") <= at).unwrap();
            let here = line.contains("\"depth\": 0") && line.contains("\"present\": true");
            match mapping {
                Mapping::Data(_) => assert!(here && line.contains("\"data\": true"), "{at}: {line}"),
                Mapping::Zero => assert!(here && line.contains("\"zero\": true"), "{at}: {line}"),
                Mapping::Packed | Mapping::Shared(_) => panic!("QED packs and shares nothing"),
                Mapping::Unallocated => assert!(!here, "{at}: {line}"),
            }
        }
    }
}

#[test]
fn backing_references_and_sizes_we_rewrite_they_understand() {
    let Some(lab) = lab() else { return };
    let folder = lab.path();
    for name in ["a.raw", "b.raw"] {
        std::fs::write(folder.join(name), vec![1; 1 << 20]).unwrap();
    }
    ok(folder, &["qemu-img", "create", "-q", "-f", "qed", "c.qed", "1M"]);
    let path: PathBuf = folder.join("x.qed");
    ok(folder, &["qemu-img", "create", "-q", "-f", "qed", "-b", "a.raw", "-F", "raw", "x.qed", "1M"]);
    let change = |backing: Option<BackingRef>, size: u64| {
        in_sim(async {
            let store = memory(&path);
            let image = subject(65536, 4).open(store.clone()).await.unwrap();
            image.set_backing(backing).await.unwrap();
            image.resize(size).await.unwrap();
            image.close().await.unwrap();
            std::fs::write(&path, store.to_vec()).unwrap();
        });
        ok(folder, &["qemu-img", "check", "-f", "qed", "x.qed"]);
        ok(folder, &["qemu-img", "info", "-f", "qed", "x.qed"])
    };
    let info = change(Some(BackingRef { name: "b.raw".into(), format: Some(Format::Raw) }), 2 << 20);
    assert!(info.contains("backing file: b.raw") && info.contains("backing file format: raw"), "{info}");
    assert!(info.contains("2 MiB (2097152 bytes)"), "{info}");
    let long = format!("{}c.qed", "./".repeat(450));
    let info = change(Some(BackingRef { name: long.clone(), format: Some(Format::Qed) }), 5 << 30);
    assert!(info.contains(&long) && !info.contains("backing file format: raw") && info.contains("5 GiB"), "{info}");
    let info = change(None, 5 << 30);
    assert!(!info.contains("backing"), "{info}");
}

/// Faults made on purpose: a name, and what is patched into the bytes given the first table's place.
type Fault = (&'static str, fn(&mut Vec<u8>, usize));

fn entry(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap())
}

fn patch(bytes: &mut [u8], at: usize, value: u64) {
    bytes[at..at + 8].copy_from_slice(&value.to_le_bytes());
}

const FAULTS: [Fault; 12] = [
    ("sound", |_, _| {}),
    ("data past the end", |b, t| patch(b, t + 24, 1 << 32)),
    ("misaligned data", |b, t| patch(b, t + 24, 0x3001)),
    ("data in the header", |b, t| patch(b, t + 24, 2)),
    ("data shared", |b, t| {
        let first = entry(b, t);
        patch(b, t + 24, first);
    }),
    ("data lost", |b, t| patch(b, t + 8, 0)),
    ("data in the L1 table", |b, t| patch(b, t + 24, 0x1000)),
    ("table past the end", |b, _| patch(b, 0x1000 + 16, 1 << 33)),
    ("misaligned table", |b, _| patch(b, 0x1000 + 16, 0x1001)),
    ("table lost", |b, _| patch(b, 0x1000 + 16, 0)),
    ("tail not in use", |b, _| b.resize(b.len() + 3 * 4096 + 100, 0)),
    ("tail cut off", |b, _| b.truncate(b.len() - 4096)),
];

#[test]
fn both_find_the_same_faults_and_what_we_repair_they_accept() {
    let Some(lab) = lab() else { return };
    let folder = lab.path();
    ok(folder, &["qemu-img", "create", "-q", "-f", "qed", "-o", "cluster_size=4096,table_size=2", "f.qed", "64M"]);
    let line = "qemu-io -f qed f.qed -c|write 0 4k|-c|write 8k 4k|-c|write 4M 4k|-c|write 8M 8k|-c|write 4k 4k|-c|write 12k 4k";
    let line: Vec<&str> = line
        .split('|')
        .flat_map(|part| if part.starts_with("qemu") { part.split(' ').collect() } else { vec![part] })
        .collect();
    ok(folder, &line);
    let sound = std::fs::read(folder.join("f.qed")).unwrap();
    let table = entry(&sound, 0x1000) as usize;
    for (name, damage) in FAULTS {
        let mut bytes = sound.clone();
        damage(&mut bytes, table);
        std::fs::write(folder.join("d.qed"), &bytes).unwrap();
        let theirs = tool(folder, &["qemu-img", "check", "-f", "qed", "--output", "json", "d.qed"]);
        let json = String::from_utf8(theirs.stdout).unwrap();
        in_sim(async {
            let store = MemoryStore::from_bytes("d.qed", &bytes);
            let options = OpenOptions { read_only: false, for_check: true };
            let image = image::open(store.clone(), Format::Qed, options).await.unwrap();
            let report = image.check(Repair::None).await.unwrap();
            assert!(store.to_vec() == bytes, "{name}: only looking changed something");
            let ours = [report.corruptions, report.leaks, report.allocated_clusters, report.fragmented_clusters];
            let names = ["corruptions", "leaks", "allocated-clusters", "fragmented-clusters"];
            assert_eq!(ours, names.map(|name| number(&json, name)), "{name}: {report:#?}");
            let report = image.check(Repair::All).await.unwrap();
            assert!(report.is_clean(), "{name}: {report:#?}");
            image.close().await.unwrap();
            std::fs::write(folder.join("d.qed"), store.to_vec()).unwrap();
        });
        ok(folder, &["qemu-img", "check", "-f", "qed", "d.qed"]);
    }
}

/// Killed with everything in flight: they see the need-check bit, and find no errors.
#[test]
fn what_a_kill_leaves_they_open() {
    let Some(lab) = lab() else { return };
    let folder = lab.path();
    let left = in_sim(async {
        let store = MemoryStore::new("k.qed", 0);
        let subject = subject(65536, 4);
        subject.create(store.clone(), 1 << 30, None).await;
        let guest = Guest::new(subject.open(store.clone()).await.unwrap(), &[]);
        guest.write(100, &vec![1; 200_000]).await.unwrap();
        guest.image.commit().await.unwrap();
        guest.write(400 << 20, &vec![2; 200_000]).await.unwrap();
        store.to_vec()
    });
    std::fs::write(folder.join("k.qed"), left).unwrap();
    let check = tool(folder, &["qemu-img", "check", "-f", "qed", "k.qed"]);
    assert_eq!(check.status.code(), Some(3), "only leaks: {}", String::from_utf8_lossy(&check.stdout));
    ok(folder, &["qemu-io", "-f", "qed", "-c", "read -P 1 100 200000", "-c", "read -P 0 400M 200000", "k.qed"]);
}
