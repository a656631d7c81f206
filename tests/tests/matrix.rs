//! Formats, versions, sizes of clusters, widths of refcounts and features, generated: what one program writes the other reads, checks
//! and writes on.

use headwater_tests::process::finish;
use headwater_tests::random::Random;
use headwater_tests::{Result, peer};
use std::fs;
use std::path::Path;
use std::process::Command;

/// Kinds that masters have: as qemu-img makes them, and with what.
const SOURCES: [(&str, &str); 21] = [
    ("raw", ""),
    ("qed", "cluster_size=4k,table_size=4"),
    ("qed", "cluster_size=128k"),
    ("qcow2", "compat=0.10"),
    ("qcow2", "compat=0.10,cluster_size=512"),
    ("qcow2", "cluster_size=4k,refcount_bits=1"),
    ("qcow2", "cluster_size=2M,refcount_bits=64"),
    ("qcow2", "extended_l2=on"),
    ("qcow2", "compression_type=zstd,lazy_refcounts=on"),
    ("qcow2 -c", ""),
    ("qcow2 -c", "compression_type=zstd,cluster_size=16k"),
    ("qcow", ""),
    ("vdi", ""),
    ("vpc", "force_size=on"),
    ("vpc", "subformat=fixed,force_size=on"),
    ("vhdx", "block_size=1M"),
    ("vhdx", "subformat=fixed"),
    ("vmdk", "subformat=monolithicSparse"),
    ("vmdk", "subformat=twoGbMaxExtentFlat"),
    ("vmdk", "subformat=streamOptimized"),
    ("parallels", ""),
];

/// Kinds that we make.
const TARGETS: [(&str, &str); 10] = [
    ("raw", ""),
    ("qed", "cluster_size=4k,table_size=2"),
    ("qed", ""),
    ("qcow2", "compat=0.10,cluster_size=64k"),
    ("qcow2", "cluster_size=512,refcount_bits=8"),
    ("qcow2", "cluster_size=2M"),
    ("qcow2", "extended_l2=on,cluster_size=16k"),
    ("qcow2", "refcount_bits=32,lazy_refcounts=on"),
    ("qcow2 -c", ""),
    ("qcow2 -c", "compression_type=zstd,cluster_size=8k"),
];

fn convert(program: &Path, first: &[&str], dir: &Path, from: (&str, &str), to: (&str, &str), target: &str) -> Result {
    let mut command = Command::new(program);
    command.current_dir(dir).args(first).args(["convert", "-f", from.0, "-O"]).args(to.0.split(' '));
    if !to.1.is_empty() {
        command.args(["-o", to.1]);
    }
    finish(command.args([from.1, target]))?.ok()?;
    Ok(())
}

/// Only the format's name, without how it is packed.
fn plain(kind: &str) -> &str {
    kind.split(' ').next().unwrap_or(kind)
}

#[test]
fn every_kind_becomes_every_kind() -> Result {
    peer!("headwater", "qemu-img");
    let (ours, theirs) = (peer::headwater()?, peer::find("qemu-img")?);
    let dir = tempfile::tempdir()?;
    let at = |name: &str| dir.path().join(name);
    // Data of every kind: noise, patterns, short runs, zeros, up to the last sector.
    let mut random = Random::new(5);
    let mut master = vec![0_u8; 6 << 20];
    for _ in 0..40 {
        let (start, len) = (random.below(11_000) as usize * 512, random.below(300) as usize * 512 + 512);
        let end = (start + len).min(master.len());
        if random.below(2) == 0 {
            random.fill(&mut master[start..end])
        } else {
            master[start..end].fill(random.below(256) as u8)
        }
    }
    let last = master.len() - 512;
    master[last..].fill(9);
    fs::write(at("master.raw"), &master)?;
    let qemu = |words: &[&str]| finish(Command::new(&theirs).current_dir(&dir).args(words));
    for (source, options) in SOURCES {
        let file = format!("source.{}", plain(source));
        convert(&theirs, &[], dir.path(), ("raw", "master.raw"), (source, options), &file)?;
        for (target, wanted) in TARGETS {
            let what = format!("{source} {options} -> {target} {wanted}");
            convert(&ours, &["img"], dir.path(), (plain(source), &file), (target, wanted), "target")?;
            let same = qemu(&["compare", "-f", "raw", "-F", plain(target), "master.raw", "target"])?;
            assert_eq!(same.code()?, 0, "{what}: {same:?}");
            if target != "raw" {
                let sound = qemu(&["check", "-f", plain(target), "target"])?;
                assert_eq!(sound.code()?, 0, "{what}: {sound:?}");
            }
            // And what QEMU made of it is read here.
            let same = finish(Command::new(&ours).current_dir(&dir).args([
                "img",
                "compare",
                "-f",
                plain(source),
                "-F",
                plain(target),
                &file,
                "target",
            ]))?;
            assert_eq!(same.code()?, 0, "{what}: {same:?}");
            fs::remove_file(at("target"))?;
        }
        for made in fs::read_dir(&dir)? {
            let path = made?.path();
            if path.file_name().is_some_and(|name| name.to_string_lossy().starts_with("source")) {
                fs::remove_file(path)?;
            }
        }
    }
    Ok(())
}

/// A geometry of an image that can be written.
fn geometry(random: &mut Random) -> (&'static str, String) {
    let mut one_of = |of: &[&'static str]| of[random.below(of.len() as u64) as usize];
    if one_of(&["qed", "qcow2", "qcow2", "qcow2"]) == "qed" {
        let (cluster, table) = (one_of(&["4k", "16k", "64k", "1M"]), one_of(&["2", "4", "16"]));
        return ("qed", format!("cluster_size={cluster},table_size={table}"));
    }
    if one_of(&["0.10", "1.1", "1.1"]) == "0.10" {
        return ("qcow2", format!("compat=0.10,cluster_size={}", one_of(&["512", "4k", "64k", "512k"])));
    }
    if one_of(&["on", "off", "off"]) == "on" {
        let (cluster, bits) = (one_of(&["16k", "64k"]), one_of(&["1", "16", "64"]));
        return ("qcow2", format!("extended_l2=on,cluster_size={cluster},refcount_bits={bits}"));
    }
    let cluster = one_of(&["512", "1k", "4k", "64k", "2M"]);
    let bits = one_of(&["1", "2", "4", "8", "16", "32", "64"]);
    let (lazy, packed) = (one_of(&["on", "off"]), one_of(&["zlib", "zstd"]));
    ("qcow2", format!("cluster_size={cluster},refcount_bits={bits},lazy_refcounts={lazy},compression_type={packed}"))
}

/// Commands for either io tool, and what they do to `disk`.
fn workload(random: &mut Random, disk: &mut [u8], zeros: bool) -> Vec<String> {
    let mut commands = Vec::new();
    for _ in 0..1 + random.below(8) {
        let sectors = disk.len() as u64 / 512;
        let longest = if random.below(4) == 0 { 1500 } else { 40 };
        let start = random.below(sectors);
        let len = (1 + random.below(longest)).min(sectors - start);
        let (from, to) = (start as usize * 512, (start + len) as usize * 512);
        let place = format!("{} {}", from, to - from);
        match random.below(8) {
            0 | 1 if !zeros => {}
            0 => {
                disk[from..to].fill(0);
                commands.push(format!("write -z {place}"));
            }
            1 => {
                disk[from..to].fill(0);
                commands.push(format!("write -z -u {place}"));
            }
            2 => commands.push("flush".to_owned()),
            _ => {
                let pattern = 1 + random.below(255) as u8;
                disk[from..to].fill(pattern);
                commands.push(format!("write -P {pattern} {place}"));
            }
        }
    }
    commands
}

/// Both programs write in turn to one image; after each turn both find it sound and read what was written.
#[test]
fn both_write_in_turn() -> Result {
    peer!("headwater", "qemu-img", "qemu-io");
    // Another one by HEADWATER_SEED; HEADWATER_ROUNDS for more.
    let number = |name: &str, or: u64| std::env::var(name).ok().and_then(|text| text.parse().ok()).unwrap_or(or);
    let (seed, rounds) = (number("HEADWATER_SEED", 2026), number("HEADWATER_ROUNDS", 24));
    let (ours, img, io) = (peer::headwater()?, peer::find("qemu-img")?, peer::find("qemu-io")?);
    for round in 0..rounds {
        let mut random = Random::new(seed.wrapping_mul(1000).wrapping_add(round));
        let dir = tempfile::tempdir()?;
        let run = |program: &Path, words: &[&str]| finish(Command::new(program).current_dir(&dir).args(words));
        let (format, options) = geometry(&mut random);
        let size = 512 * (1 + random.below(4_000));
        let what = format!("seed {seed}, round {round}: {format} {options} of {size} bytes");
        let mut disk = vec![0_u8; size as usize];
        let sized = size.to_string();
        // QEMU 10.0 fills the rest of a QED cluster of zeros from below when a part of it is written.
        let mut zeros = true;
        let mut create = vec!["create", "-q", "-f", format, "-o", &options];
        if random.below(2) == 0 {
            // A master that may be shorter or longer.
            let mut below = vec![0_u8; 512 * (1 + random.below(4_000)) as usize];
            random.fill(&mut below);
            let half = below.len() / 2;
            below[..half].fill(0x77);
            fs::write(dir.path().join("base.raw"), &below)?;
            let shown = disk.len().min(below.len());
            disk[..shown].copy_from_slice(&below[..shown]);
            create.extend(["-b", "base.raw", "-F", "raw"]);
            zeros = format != "qed";
        }
        create.extend(["image", &sized]);
        let maker = random.below(2);
        let made = if maker == 0 { run(&img, &create)? } else { run(&ours, &[&["img"], &create[..]].concat())? };
        made.ok().map_err(|error| format!("{what}: {error}"))?;
        for turn in 0..5 {
            let commands = workload(&mut random, &mut disk, zeros);
            let mut words = vec!["-f", format];
            for command in &commands {
                words.extend(["-c", command]);
            }
            words.push("image");
            let written =
                if turn % 2 == maker { run(&io, &words)? } else { run(&ours, &[&["io"], &words[..]].concat())? };
            written.ok().map_err(|error| format!("{what}, turn {turn}: {error}"))?;
            let sound = run(&img, &["check", "-f", format, "image"])?;
            assert_eq!(sound.code()?, 0, "{what}, turn {turn}: {commands:?}: {sound:?}");
            let sound = run(&ours, &["img", "check", "-f", format, "image"])?;
            assert_eq!(sound.code()?, 0, "{what}, turn {turn}: {commands:?}: {sound:?}");
            for (name, reader) in [("theirs", vec![]), ("ours", vec!["img"])] {
                let program = if reader.is_empty() { &img } else { &ours };
                run(program, &[&reader[..], &["convert", "-f", format, "-O", "raw", "image", "all"]].concat())?.ok()?;
                let all = fs::read(dir.path().join("all"))?;
                let first = all.iter().zip(&disk).position(|(a, b)| a != b);
                assert!(
                    all.len() == disk.len() && first.is_none(),
                    "{what}, turn {turn}: {name} reads other bytes from {first:?} on: {commands:?}"
                );
            }
        }
    }
    Ok(())
}
