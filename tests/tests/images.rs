//! Images that both sides write and both sides read: Headwater's commands beside qemu-img and qemu-io.

use std::ffi::OsStr;
use std::fs;
use std::path::Path;

use headwater_tests::headwater::{Headwater, headwater};
use headwater_tests::nbd::Client;
use headwater_tests::process::{Finished, run};
use headwater_tests::qemu::{check, compare, info, qemu_img, qemu_io};
use headwater_tests::random::Random;
use headwater_tests::{Result, peer};
use serde_json::Value;

fn hw(args: &[&dyn AsRef<OsStr>]) -> Result<Finished> {
    headwater(args.iter().map(|arg| arg.as_ref()))
}

fn qemu(args: &[&dyn AsRef<OsStr>]) -> Result<Finished> {
    qemu_img(args.iter().map(|arg| arg.as_ref()))
}

/// A raw master with data, holes and stretches of written zeroes.
fn master(path: &Path, size: u64, seed: u64) -> Result {
    let mut random = Random::new(seed);
    let file = fs::File::create(path)?;
    file.set_len(size)?;
    for _ in 0..12 {
        let mut bytes = vec![0; (random.below(200_000) + 1).min(size) as usize];
        if random.below(4) > 0 {
            random.fill(&mut bytes);
        }
        let at = random.below(size - bytes.len() as u64 + 1);
        std::os::unix::fs::FileExt::write_all_at(&file, &bytes, at)?;
    }
    Ok(())
}

/// Where an image may differ though both creators follow the specification: QEMU leaves the bytes behind the header's
/// fields in the first sector as zeroes and so do we, so nothing is left open in what both write here.
fn assert_same_bytes(ours: &Path, theirs: &Path, what: &str) -> Result {
    let (a, b) = (fs::read(ours)?, fs::read(theirs)?);
    let differs = a.iter().zip(&b).position(|(a, b)| a != b);
    assert_eq!(differs, None, "{what}: first different byte");
    assert_eq!(a.len(), b.len(), "{what}: length");
    Ok(())
}

#[test]
fn created_images_equal_qemu_imgs_byte_for_byte() -> Result {
    peer!("headwater", "qemu-img");
    let dir = tempfile::tempdir()?;
    let base = dir.path().join("master.img");
    master(&base, 3 << 20, 1)?;
    let (ours, theirs) = (dir.path().join("ours.qed"), dir.path().join("theirs.qed"));
    for cluster in [4 << 10, 64 << 10, 1 << 20, 4 << 20] {
        for table in [1, 2, 4, 16] {
            let options = format!("cluster_size={cluster},table_size={table}");
            for backed in [false, true] {
                let what = format!("{options}, backed: {backed}");
                let lines = [(&ours, true), (&theirs, false)].map(|(file, is_ours)| {
                    let mut args: Vec<&OsStr> = ["create", "-f", "qed", "-o", &options].map(OsStr::new).to_vec();
                    if backed {
                        args.extend(["-b", "master.img", "-F", "raw"].map(OsStr::new));
                    }
                    args.push(file.as_os_str());
                    if !backed {
                        args.push(OsStr::new("10M"));
                    }
                    if is_ours { headwater(args)?.ok() } else { qemu_img(args)?.ok() }
                });
                let [our_line, their_line] = lines;
                if their_line.as_ref().is_err_and(|why| why.to_string().contains("less than 0 bytes")) {
                    // QEMU computes the largest size such tables can map in 64 bits, overflows, and refuses all.
                    our_line?;
                    hw(&[&"check", &ours])?.ok()?;
                    fs::remove_file(&ours)?;
                    continue;
                }
                assert_eq!(our_line?.replace("ours.qed", ""), their_line?.replace("theirs.qed", ""), "{what}");
                assert_same_bytes(&ours, &theirs, &what)?;
                fs::remove_file(&ours)?;
                fs::remove_file(&theirs)?;
            }
        }
    }
    Ok(())
}

/// The line of the first streaming patches. Today's qemu-img refuses it; here it works, says what it found, and records it.
#[test]
fn the_seeds_own_line_works_as_it_stands() -> Result {
    peer!("headwater", "qemu-img");
    let dir = tempfile::tempdir()?;
    let base = dir.path().join("fedora-14.img");
    master(&base, 3 << 20, 2)?;
    let top = dir.path().join("my_fedora.qed");
    let made = hw(&[&"create", &"-f", &"qed", &"-o", &"backing_file=fedora-14.img", &top])?;
    assert!(made.stderr.contains("found to be raw"), "{}", made.stderr);
    made.ok()?;
    let described = info(&top)?;
    assert_eq!(described["backing-filename-format"], "raw");
    assert_eq!(described["virtual-size"], 3 << 20);
    check(&top)?.ok()?;
    compare(&base, &top)?.ok()?;
    // Bytes that look like an image's now change nothing: what was recorded as raw stays raw.
    let mut bytes = fs::read(&base)?;
    let disguise = dir.path().join("disguise.qed");
    qemu(&[&"create", &"-q", &"-f", &"qed", &disguise, &"1M"])?.ok()?;
    let header = fs::read(&disguise)?;
    bytes[..512].copy_from_slice(&header[..512]);
    fs::write(&base, &bytes)?;
    let (socket, _server) = serve_nbd(dir.path(), &top)?;
    let mut client = Client::connect(&socket)?;
    assert_eq!(client.size(), 3 << 20);
    assert_eq!(client.read(0, 4096)?, bytes[..4096]);
    Ok(())
}

fn serve_nbd(dir: &Path, image: &Path) -> Result<(std::path::PathBuf, Headwater)> {
    let socket = dir.join("nbd.sock");
    let server = Headwater::serve(dir).image(image).nbd(&socket).start()?;
    Ok((socket, server))
}

/// `info`, `map` and `check` of both programs on one image, field by field.
fn assert_both_say_the_same(image: &Path) -> Result {
    let json = |finished: Finished| -> Result<Value> { Ok(serde_json::from_str(&finished.stdout)?) };
    for command in ["info", "map", "check"] {
        let ours = hw(&[&command, &"--output", &"json", &image])?;
        let theirs = qemu(&[&command, &"--output", &"json", &image])?;
        assert_eq!(ours.code()?, theirs.code()?, "{command} {}: {}", image.display(), ours.stderr);
        assert_eq!(json(ours)?, json(theirs)?, "{command} {}", image.display());
        let ours = hw(&[&command, &image])?.ok()?;
        let theirs = qemu(&[&command, &image])?.ok()?;
        assert_eq!(ours, theirs, "{command} {}", image.display());
    }
    Ok(())
}

/// Random writes, the same through both programs, on two images; then everything each side says of either agrees.
#[test]
fn both_sides_read_what_either_writes() -> Result {
    peer!("headwater", "qemu-img", "qemu-io");
    for (case, (cluster, table)) in
        [("4k", 1), ("4k", 2), ("4k", 16), ("64k", 4), ("64k", 1), ("1M", 2), ("4M", 2), ("64M", 16)]
            .into_iter()
            .enumerate()
    {
        let dir = tempfile::tempdir()?;
        let base = dir.path().join("master.img");
        let size = 9_000_000_u64.next_multiple_of(512) + 512 * case as u64;
        master(&base, size, case as u64)?;
        let (ours, theirs) = (dir.path().join("ours.qed"), dir.path().join("theirs.qed"));
        let options = format!("cluster_size={cluster},table_size={table}");
        hw(&[&"create", &"-q", &"-f", &"qed", &"-o", &options, &"-b", &"master.img", &"-F", &"raw", &ours])?.ok()?;
        // QEMU refuses to open what its own qemu-img creates with one-cluster tables, and refuses to create what maps more
        // than 64 bits can count; we serve both.
        let shared = table > 1 && cluster != "64M";
        if shared {
            qemu(&[&"create", &"-q", &"-f", &"qed", &"-o", &options, &"-b", &"master.img", &"-F", &"raw", &theirs])?
                .ok()?;
        }
        let mut random = Random::new(100 + case as u64);
        let mut commands = Vec::new();
        let mut written = Vec::new();
        for number in 0..25_u8 {
            let length = (random.below(90_000) + 1).next_multiple_of(512).min(size / 2);
            let at = random.below((size - length) / 512) * 512;
            let pattern = number + 1;
            commands.push(format!("write -P {pattern} {at} {length}"));
            written.push((at, vec![pattern; length as usize]));
        }
        let (socket, server) = serve_nbd(dir.path(), &ours)?;
        let mut client = Client::connect(&socket)?;
        for (at, bytes) in &written {
            client.write(*at, bytes)?;
        }
        client.disconnect()?;
        server.quit()?;
        let what = format!("cluster_size={cluster}, table_size={table}");
        if !shared {
            hw(&[&"check", &ours])?.ok()?;
            let (socket, server) = serve_nbd(dir.path(), &ours)?;
            let mut client = Client::connect(&socket)?;
            let mut expected = fs::read(&base)?;
            for (at, bytes) in &written {
                expected[*at as usize..*at as usize + bytes.len()].copy_from_slice(bytes);
            }
            assert!(client.read(0, size as u32)? == expected, "{what}: reopened, it reads otherwise");
            server.quit()?;
            continue;
        }
        let lines: Vec<&str> = commands.iter().map(String::as_str).collect();
        qemu_io("qed", &theirs, &lines)?;
        assert_eq!(check(&ours)?.code()?, 0, "{what}");
        compare(&ours, &theirs).and_then(Finished::ok).map_err(|e| format!("{what}: {e}"))?;
        assert_both_say_the_same(&ours)?;
        assert_both_say_the_same(&theirs)?;
        // And the other way round: what qemu-io wrote, read through our server.
        let (socket, server) = serve_nbd(dir.path(), &theirs)?;
        let uri = format!("nbd+unix:///?socket={}", socket.display());
        qemu(&[&"compare", &"-f", &"raw", &"-F", &"qed", &uri, &ours])?.ok().map_err(|e| format!("{what}: {e}"))?;
        server.quit()?;
    }
    Ok(())
}

#[test]
fn chains_of_mixed_depth_and_length_read_as_qemu_reads_them() -> Result {
    peer!("headwater", "qemu-img", "qemu-io");
    let dir = tempfile::tempdir()?;
    let at = |name: &str| dir.path().join(name);
    master(&at("base.img"), 8 << 20, 11)?;
    // A middle shorter than its base, and a top longer than both: the base must not show through behind the middle.
    qemu(&[&"create", &"-q", &"-f", &"qed", &"-b", &"base.img", &"-F", &"raw", &at("mid.qed"), &"3M"])?.ok()?;
    hw(&[&"create", &"-q", &"-f", &"qed", &"-b", &"mid.qed", &"-F", &"qed", &at("top.qed"), &"12M"])?.ok()?;
    qemu_io("qed", &at("mid.qed"), &["write -P 3 100k 300k", "write -P 4 2900k 100k"])?;
    qemu_io("qed", &at("top.qed"), &["write -P 5 200k 10k", "write -P 6 11M 77k"])?;
    let (socket, server) = serve_nbd(dir.path(), &at("top.qed"))?;
    let uri = format!("nbd+unix:///?socket={}", socket.display());
    qemu(&[&"compare", &"-f", &"raw", &"-F", &"qed", &uri, &at("top.qed"), &"-U"])?.ok()?;
    server.quit()?;
    let ours = hw(&[&"map", &"--output", &"json", &at("top.qed")])?.ok()?;
    let theirs = qemu(&[&"map", &"--output", &"json", &at("top.qed")])?.ok()?;
    assert_eq!(data_runs(&ours)?, data_runs(&theirs)?);
    Ok(())
}

/// Which bytes of a map are data, and where from: how finely runs are cut is each program's own affair.
fn data_runs(map: &str) -> Result<Vec<(u64, u64, u64, u64)>> {
    let runs: Vec<Value> = serde_json::from_str(map)?;
    let number = |run: &Value, key: &str| run[key].as_u64().unwrap_or(u64::MAX);
    let mut merged: Vec<(u64, u64, u64, u64)> = Vec::new();
    for run in runs.iter().filter(|run| run["data"] == true) {
        let next = (number(run, "start"), number(run, "length"), number(run, "depth"), number(run, "offset"));
        match merged.last_mut() {
            Some(last) if last.0 + last.1 == next.0 && last.2 == next.2 && last.3 + last.1 == next.3 => {
                last.1 += next.1;
            }
            _ => merged.push(next),
        }
    }
    Ok(merged)
}

/// While one side writes an image the other refuses it, both ways round, and readers are told how to look all the same.
#[test]
fn one_image_has_one_writer() -> Result {
    peer!("headwater", "qemu-img", "qemu-io");
    let dir = tempfile::tempdir()?;
    let image = dir.path().join("my.qed");
    hw(&[&"create", &"-q", &"-f", &"qed", &image, &"4M"])?.ok()?;
    let (socket, server) = serve_nbd(dir.path(), &image)?;
    let refused =
        run("qemu-io", ["-f", "qed", "-c", "write 0 4k"].map(OsStr::new).into_iter().chain([image.as_os_str()]))?;
    assert!(refused.stderr.contains("lock"), "{}", refused.stderr);
    let refused = hw(&[&"check", &"-r", &"all", &image])?;
    assert_eq!(refused.code()?, 1);
    assert!(refused.stderr.contains("another process"), "{}", refused.stderr);
    hw(&[&"info", &"-U", &image])?.ok()?;
    qemu(&[&"info", &"-U", &image])?.ok()?;
    server.quit()?;
    // Now QEMU holds it (through an NBD server of its own) and we must refuse.
    let qsd = headwater_tests::qemu::QsdBuilder::new(dir.path())
        .node(&headwater_tests::qemu::file_node("f", &image, headwater_tests::qemu::Cache::Writeback, false))
        .node(&headwater_tests::qemu::format_node("q", "qed", "f", None))
        .nbd("q", &socket)
        .start()?;
    let refused = Headwater::serve(dir.path()).image(&image).nbd(&dir.path().join("other.sock")).refused()?;
    assert_eq!(refused.code()?, 1);
    assert!(refused.stderr.contains("another process"), "{}", refused.stderr);
    qsd.quit()?;
    check(&image)?.ok()?;
    Ok(())
}
