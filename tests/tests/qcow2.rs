//! Masters as people have them: QCOW2, packed, in chains; streamed out of, and served read-only.

use std::ffi::OsStr;
use std::fs;
use std::path::{Path, PathBuf};

use headwater_tests::headwater::{Headwater, headwater};
use headwater_tests::qemu::{check, compare, info, qemu_img, qemu_io};
use headwater_tests::random::Random;
use headwater_tests::{Result, peer};
use serde_json::{Value, json};

const SIZE: usize = 48 << 20;

fn img(args: &[&str], files: &[&Path]) -> Result<String> {
    qemu_img(args.iter().map(OsStr::new).chain(files.iter().map(|file| file.as_os_str())))?.ok()
}

/// A raw image with bytes that pack well, bytes that do not, and holes; and the same as QCOW2.
fn masters(dir: &Path, options: &str) -> Result<(PathBuf, PathBuf)> {
    let mut random = Random::new(8);
    let mut bytes = vec![0; SIZE];
    for (number, part) in bytes.chunks_mut(1 << 20).enumerate() {
        match number % 4 {
            0 => random.fill(part),
            1 => part.fill(number as u8),
            2 => part[..300_000].fill(7),
            _ => {}
        }
    }
    let (raw, qcow2) = (dir.join("master.raw"), dir.join("master.qcow2"));
    fs::write(&raw, bytes)?;
    img(&["convert", "-q", "-c", "-f", "raw", "-O", "qcow2", "-o", options], &[&raw, &qcow2])?;
    Ok((raw, qcow2))
}

fn overlay(dir: &Path, base: &Path, format: &str) -> Result<PathBuf> {
    let top = dir.join("my.qed");
    let args = ["create", "-q", "-f", "qed", "-F", format, "-b"].map(OsStr::new);
    headwater(args.into_iter().chain([base.as_os_str(), top.as_os_str()]))?.ok()?;
    Ok(top)
}

/// Streams everything in; afterwards the image stands alone, to the byte.
fn stream(dir: &Path, top: &Path) -> Result {
    let server = Headwater::serve(dir).image(top).start()?;
    let mut qmp = server.qmp()?;
    qmp.execute("block-stream", json!({ "job-id": "s", "device": "my" }))?;
    let done = qmp.event("BLOCK_JOB_COMPLETED")?;
    assert!(done["error"].is_null(), "{done}");
    assert_eq!(done["len"], done["offset"]);
    drop(qmp);
    server.quit()?;
    assert_eq!(info(top)?.get("backing-filename"), None);
    check(top)?.ok()?;
    Ok(())
}

#[test]
fn a_packed_master_streams_in() -> Result {
    peer!("headwater", "qemu-img");
    for options in ["compression_type=zlib", "compression_type=zstd", "extended_l2=on", "compat=0.10"] {
        let dir = tempfile::tempdir()?;
        let (raw, qcow2) = masters(dir.path(), options)?;
        let top = overlay(dir.path(), &qcow2, "qcow2")?;
        stream(dir.path(), &top)?;
        fs::remove_file(&qcow2)?;
        compare(&raw, &top)?.ok()?;
    }
    Ok(())
}

#[test]
fn a_chain_of_qcow2_streams_in() -> Result {
    peer!("headwater", "qemu-img", "qemu-io");
    let dir = tempfile::tempdir()?;
    let (_, master) = masters(dir.path(), "compat=1.1")?;
    let middle = dir.path().join("middle.qcow2");
    let create = ["create", "-q", "-f", "qcow2", "-F", "qcow2", "-b"];
    img(&create, &[&master, &middle])?;
    let io = ["-f", "qcow2", "-c", "write -P 9 1M 3M", "-c", "write -z 10M 1M", "-c", "write -P 8 20000k 5k"];
    headwater_tests::process::run(peer::find("qemu-io")?, io.map(OsStr::new).into_iter().chain([middle.as_os_str()]))?
        .ok()?;
    let expected = dir.path().join("expected.raw");
    img(&["convert", "-q", "-O", "raw"], &[&middle, &expected])?;
    let top = overlay(dir.path(), &middle, "qcow2")?;
    stream(dir.path(), &top)?;
    compare(&expected, &top)?.ok()?;
    Ok(())
}

#[test]
fn it_is_served_read_only() -> Result {
    peer!("headwater", "qemu-img", "qemu-io");
    let dir = tempfile::tempdir()?;
    let (raw, master) = masters(dir.path(), "compat=1.1")?;
    let socket = dir.path().join("nbd.sock");
    let server = Headwater::serve(dir.path()).image(&master).arg("--read-only").nbd(&socket).start()?;
    let uri = format!("nbd+unix:///master?socket={}", socket.display());
    img(&["compare", "-f", "raw", "-F", "raw"], &[&raw, Path::new(&uri)])?;
    server.quit()?;
    Ok(())
}

/// The whole story with QCOW2 on top: written to and read from while it streams, cut short by a kill, streamed to its end;
/// then it stands alone, holds what was written, and QEMU finds nothing wrong with it.
#[test]
fn a_qcow2_overlay_is_served_streamed_and_survives_a_kill() -> Result {
    peer!("headwater", "qemu-img", "qemu-io");
    for options in ["compat=1.1", "compat=0.10", "extended_l2=on,refcount_bits=64", "cluster_size=4k"] {
        let dir = tempfile::tempdir()?;
        let (raw, master) = masters(dir.path(), "compression_type=zlib")?;
        let top = dir.path().join("my.qcow2");
        img(&["create", "-q", "-f", "qcow2", "-o", options, "-F", "qcow2", "-b"], &[&master, &top])?;
        let socket = dir.path().join("nbd.sock");
        let uri = format!("nbd+unix:///my?socket={}", socket.display());
        let mut server = Headwater::serve(dir.path()).image(&top).nbd(&socket).arg("--stream=8M").start()?;
        qemu_io("raw", Path::new(&uri), &["write -P 9 1M 300k", "write -z 5M 1M", "discard 10M 1M", "flush"])?;
        server.daemon.kill()?;
        headwater_tests::kill::released(&top)?;
        let checked = check(&top)?;
        assert!([0, 3].contains(&checked.code()?), "{options}: {} {}", checked.stdout, checked.stderr);
        qemu_io("qcow2", &top, &["read -P 9 1M 300k", "read -P 0 5M 1M"])?;
        let server = Headwater::serve(dir.path()).image(&top).nbd(&socket).arg("--copy-on-read").start()?;
        let mut qmp = server.qmp()?;
        qmp.execute("block-stream", json!({ "job-id": "s", "device": "my" }))?;
        qemu_io("raw", Path::new(&uri), &["write -P 8 20M 5000", "read -P 9 1M 300k", "flush"])?;
        let done = qmp.event("BLOCK_JOB_COMPLETED")?;
        assert!(done["error"].is_null(), "{options}: {done}");
        drop(qmp);
        server.quit()?;
        assert_eq!(info(&top)?.get("backing-filename"), None, "{options}");
        fs::remove_file(&master)?;
        let checked = check(&top)?;
        assert!([0, 3].contains(&checked.code()?), "{options}: {} {}", checked.stdout, checked.stderr);
        qemu_io("raw", &raw, &["write -P 9 1M 300k", "write -z 5M 1M", "write -z 10M 1M", "write -P 8 20M 5000"])?;
        compare(&raw, &top)?.ok()?;
        // What the kill left counted and unused is found and given back.
        headwater([OsStr::new("img"), OsStr::new("check"), OsStr::new("-r"), OsStr::new("leaks"), top.as_os_str()])?
            .ok()?;
        check(&top)?.ok()?;
    }
    Ok(())
}

#[test]
fn info_and_map_say_what_the_reference_says() -> Result {
    peer!("headwater", "qemu-img");
    let dir = tempfile::tempdir()?;
    let (_, master) = masters(dir.path(), "compat=1.1")?;
    let json = |args: &[&str]| -> Result<Value> {
        let args = args.iter().map(OsStr::new).chain([master.as_os_str()]);
        Ok(serde_json::from_str(&headwater(args)?.ok()?)?)
    };
    let ours = json(&["info", "--output", "json"])?;
    let theirs = info(&master)?;
    for key in ["virtual-size", "format", "cluster-size"] {
        assert_eq!(ours[key], theirs[key], "{key}");
    }
    // The same runs of zeros and data, however either cuts them.
    let flat = |map: Value| -> Vec<bool> {
        let mut zero = vec![true; SIZE >> 16];
        for run in map.as_array().into_iter().flatten() {
            let number = |key: &str| run[key].as_u64().unwrap_or_default() as usize;
            let (start, end) = (number("start") >> 16, (number("start") + number("length")) >> 16);
            zero[start..end].fill(run["zero"] == true);
        }
        zero
    };
    let theirs: Value = serde_json::from_str(&img(&["map", "--output", "json"], &[&master])?)?;
    assert_eq!(flat(json(&["map", "--output", "json"])?), flat(theirs));
    Ok(())
}

/// Masters in formats that are only read: an overlay streams out of them, and they are converted.
#[test]
fn masters_of_other_formats_stream_in() -> Result {
    peer!("headwater", "qemu-img");
    for (format, options) in [
        ("vdi", "static=off"),
        ("vpc", "subformat=dynamic,force_size=on"),
        ("parallels", "cluster_size=1M"),
        ("vmdk", "subformat=monolithicSparse"),
        ("vmdk", "subformat=streamOptimized"),
        ("vmdk", "subformat=twoGbMaxExtentFlat"),
        ("qcow", "nocow=off"),
        ("vhdx", "subformat=dynamic,block_size=1M"),
    ] {
        let dir = tempfile::tempdir()?;
        let (raw, _) = masters(dir.path(), "compat=1.1")?;
        let master = dir.path().join("master");
        img(&["convert", "-q", "-f", "raw", "-O", format, "-o", options], &[&raw, &master])?;
        let top = dir.path().join("my.qcow2");
        let create = ["img", "create", "-q", "-f", "qcow2", "-F", format, "-b"].map(OsStr::new);
        headwater(create.into_iter().chain([master.as_os_str(), top.as_os_str()]))?.ok()?;
        stream(dir.path(), &top)?;
        compare(&raw, &top)?.ok()?;
        let converted = dir.path().join("converted.qcow2");
        let convert = ["img", "convert", "-f", format, "-O", "qcow2"].map(OsStr::new);
        headwater(convert.into_iter().chain([master.as_os_str(), converted.as_os_str()]))?.ok()?;
        compare(&raw, &converted)?.ok()?;
        fs::remove_file(&master)?;
        compare(&raw, &top)?.ok()?;
    }
    Ok(())
}

/// What a guest writes must not decide what is opened: a header that leaves the format open is refused, with the remedy.
#[test]
fn a_backing_file_without_a_format_is_not_guessed_at() -> Result {
    peer!("headwater", "qemu-img");
    let dir = tempfile::tempdir()?;
    let (raw, _) = masters(dir.path(), "compat=1.1")?;
    let vague = dir.path().join("vague.qcow2");
    img(&["create", "-q", "-f", "qcow2", "-F", "raw", "-b"], &[&raw, &vague])?;
    // As old tools wrote it: the extension that names the format becomes one that nobody knows.
    let mut bytes = fs::read(&vague)?;
    let extension = 0xe279_2aca_u32.to_be_bytes();
    let at = bytes.windows(4).position(|four| four == extension).ok_or("no format is recorded")?;
    bytes[at..at + 4].copy_from_slice(&0x1234_5678_u32.to_be_bytes());
    fs::write(&vague, bytes)?;
    let socket = dir.path().join("nbd.sock");
    let refused = Headwater::serve(dir.path()).image(&vague).arg("--read-only").nbd(&socket).refused()?;
    assert!(refused.stderr.contains("without a format") && refused.stderr.contains("-F FORMAT"), "{}", refused.stderr);
    Ok(())
}
