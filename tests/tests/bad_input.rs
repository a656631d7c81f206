//! Bad input: one clear error with path, offset and cause, the documented exit code, nothing damaged, no panic.

use std::ffi::OsStr;
use std::fs;
use std::path::Path;

use headwater_tests::headwater::{Headwater, headwater};
use headwater_tests::process::{Finished, finish};
use headwater_tests::qemu::{check, qemu_img};
use headwater_tests::random::Random;
use headwater_tests::{Result, peer};
use serde_json::json;

fn hw(args: &[&dyn AsRef<OsStr>]) -> Result<Finished> {
    headwater(args.iter().map(|arg| arg.as_ref()))
}

/// Refused with the documented code and one message that names the file; no panic, no signal.
fn assert_refused(finished: &Finished, file: &Path, wanted: &str) -> Result {
    let code = finished.code()?;
    assert!((1..=3).contains(&code), "{}: exit code {code}\n{}", finished.line, finished.stderr);
    assert!(!finished.stderr.contains("panicked"), "{}", finished.stderr);
    let name = file.file_name().and_then(OsStr::to_str).unwrap_or_default();
    assert!(finished.stderr.contains(name), "no file name in: {}", finished.stderr);
    assert!(finished.stderr.contains(wanted), "no '{wanted}' in: {}", finished.stderr);
    Ok(())
}

fn fresh(dir: &Path, name: &str) -> Result<std::path::PathBuf> {
    let image = dir.join(name);
    hw(&[&"create", &"-q", &"-f", &"qed", &"-o", &"cluster_size=4k,table_size=2", &image, &"8M"])?.ok()?;
    Ok(image)
}

#[test]
fn truncated_headers_and_files() -> Result {
    peer!("headwater");
    let dir = tempfile::tempdir()?;
    let image = fresh(dir.path(), "cut.qed")?;
    let whole = fs::read(&image)?;
    for length in [0, 1, 4, 63, 64, 511, 4096, 8192] {
        fs::write(&image, &whole[..length])?;
        let before = fs::read(&image)?;
        let refused = hw(&[&"info", &"-f", &"qed", &image])?;
        if refused.status.success() {
            // A file that ends behind a whole header can be described; it must not be served or called clean.
            let checked = hw(&[&"check", &"-f", &"qed", &image])?;
            assert_ne!(checked.code()?, 0, "{length} bytes: {}", checked.stdout);
        } else {
            assert_refused(&refused, &image, "")?;
        }
        assert_eq!(fs::read(&image)?, before, "an error changed the file");
    }
    Ok(())
}

#[test]
fn hostile_header_fields_are_named() -> Result {
    peer!("headwater");
    let dir = tempfile::tempdir()?;
    let image = fresh(dir.path(), "bad.qed")?;
    let whole = fs::read(&image)?;
    // Offset in the header, bytes to put there, what the message must say.
    let hostile: [(usize, &[u8], &str); 8] = [
        (4, &3_u32.to_le_bytes(), "cluster"),
        (4, &0x8000_0000_u32.to_le_bytes(), "cluster"),
        (8, &0_u32.to_le_bytes(), "table"),
        (8, &u32::MAX.to_le_bytes(), "table"),
        (16, &(1_u64 << 40).to_le_bytes(), "40"),
        (40, &12345_u64.to_le_bytes(), "l1_table_offset"),
        (40, &(1_u64 << 62).to_le_bytes(), "l1_table_offset"),
        (48, &u64::MAX.to_le_bytes(), "size"),
    ];
    for (at, bytes, wanted) in hostile {
        let mut bad = whole.clone();
        bad[at..at + bytes.len()].copy_from_slice(bytes);
        fs::write(&image, &bad)?;
        for args in [vec!["info", "-f", "qed"], vec!["map", "-f", "qed"], vec!["check", "-f", "qed"]] {
            let refused = headwater(args.iter().map(OsStr::new).chain([image.as_os_str()]))?;
            assert_refused(&refused, &image, wanted)?;
        }
        let refused =
            Headwater::serve(dir.path()).arg("-f").arg("qed").image(&image).nbd(&dir.path().join("s")).refused()?;
        assert_refused(&refused, &image, wanted)?;
        assert_eq!(fs::read(&image)?, bad, "a refused image was changed");
    }
    Ok(())
}

/// Whatever bytes stand in header and tables: an answer in bounded time and memory, or an error; never a panic. What
/// `check -r all` has repaired is clean to qemu-img, too.
#[test]
fn mutated_images_never_panic_and_repairs_satisfy_qemu_img() -> Result {
    peer!("headwater", "qemu-img", "qemu-io");
    let dir = tempfile::tempdir()?;
    let image = fresh(dir.path(), "mutant.qed")?;
    headwater_tests::qemu::qemu_io("qed", &image, &["write -P 1 0 64k", "write -P 2 1M 128k", "write -P 3 7M 4k"])?;
    let whole = fs::read(&image)?;
    let seed = Random::seed();
    println!("HEADWATER_SEED={seed}");
    let mut random = Random::new(seed);
    for round in 0..60 {
        let mut bytes = whole.clone();
        for _ in 0..=random.below(6) {
            // Header, L1 and the L2 tables are where a flipped bit matters.
            let at = random.below(64 * 1024) as usize;
            if let Some(byte) = bytes.get_mut(at) {
                *byte ^= 1 << random.below(8);
            }
        }
        fs::write(&image, &bytes)?;
        let mut limited = std::process::Command::new("sh");
        // 1 GiB of address space beyond what io_uring maps is plenty for an 8 MiB image.
        limited.args(["-c", "ulimit -v 4194304; exec timeout 20 \"$0\" check -f qed -r all \"$1\""]);
        limited.arg(peer::headwater()?).arg(&image);
        let repaired = finish(&mut limited)?;
        let code = repaired.code()?;
        assert!(code <= 3, "round {round}: exit code {code}\n{}{}", repaired.stdout, repaired.stderr);
        assert!(!repaired.stderr.contains("panicked"), "round {round}: {}", repaired.stderr);
        if code == 0 {
            let theirs = check(&image)?;
            assert_eq!(theirs.code()?, 0, "round {round}: {}{}", theirs.stdout, theirs.stderr);
        }
    }
    Ok(())
}

#[test]
fn chains_that_cannot_be_put_together() -> Result {
    peer!("headwater", "qemu-img");
    let dir = tempfile::tempdir()?;
    let at = |name: &str| dir.path().join(name);
    // Missing: named together with the image that asks for it, at creation and at use.
    let refused = hw(&[&"create", &"-f", &"qed", &"-b", &"nowhere.img", &"-F", &"raw", &at("top.qed")])?;
    assert_refused(&refused, &at("nowhere.img"), "top.qed")?;
    assert!(!at("top.qed").exists(), "a failed create left a file");
    hw(&[&"create", &"-q", &"-u", &"-f", &"qed", &"-b", &"nowhere.img", &"-F", &"raw", &at("top.qed"), &"1M"])?.ok()?;
    let refused = hw(&[&"map", &at("top.qed")])?;
    assert_refused(&refused, &at("top.qed"), "nowhere.img")?;
    // Cyclic.
    for (top, below) in [("a.qed", "b.qed"), ("b.qed", "a.qed"), ("self.qed", "self.qed")] {
        if top != below {
            hw(&[&"create", &"-q", &"-u", &"-f", &"qed", &"-b", &below, &"-F", &"qed", &at(top), &"1M"])?.ok()?;
        } else {
            qemu_img(
                ["create", "-q", "-u", "-f", "qed", "-b", below, "-F", "qed"]
                    .map(OsStr::new)
                    .into_iter()
                    .chain([at(top).as_os_str(), OsStr::new("1M")]),
            )?
            .ok()?;
        }
    }
    for name in ["a.qed", "self.qed"] {
        let refused = Headwater::serve(dir.path()).image(&at(name)).nbd(&at("s")).refused()?;
        assert_refused(&refused, &at(name), "")?;
        assert!(refused.stderr.contains("same chain"), "{}", refused.stderr);
    }
    // A backing file that is the image itself.
    let refused = hw(&[&"create", &"-f", &"qed", &"-b", &"same.qed", &"-F", &"qed", &at("same.qed"), &"1M"])?;
    assert_refused(&refused, &at("same.qed"), "same")?;
    Ok(())
}

#[test]
fn options_that_make_no_sense() -> Result {
    peer!("headwater");
    let dir = tempfile::tempdir()?;
    let image = dir.path().join("x.qed");
    for (options, size, wanted) in [
        ("cluster_size=5000", "1M", "cluster"),
        ("cluster_size=128M", "1M", "cluster"),
        ("table_size=3", "1M", "table"),
        ("table_size=32", "1M", "table"),
        ("colour=blue", "1M", "colour"),
        ("cluster_size=4k,table_size=1", "2T", "holds at most"),
        ("size=many", "1M", "many"),
    ] {
        let refused = hw(&[&"create", &"-f", &"qed", &"-o", &options, &image, &size])?;
        assert_refused(&refused, &image, wanted)?;
        assert!(!image.exists(), "{options}: a failed create left a file");
    }
    assert_refused(&hw(&[&"create", &"-f", &"tar", &image, &"1M"])?, &image, "tar")?;
    assert_refused(&hw(&[&"create", &"-f", &"qed", &image])?, &image, "size")?;
    assert_eq!(hw(&[&"create", &"--no-such-flag"])?.code()?, 2);
    let warned = hw(&[&"create", &"-f", &"qed", &"-o", &"table_size=1", &image, &"1M"])?;
    assert!(warned.stderr.contains("table size"), "{}", warned.stderr);
    warned.ok()?;
    Ok(())
}

/// A file that cannot be written where it is: reported, and what was there stays.
#[test]
fn read_only_places() -> Result {
    peer!("headwater");
    let dir = tempfile::tempdir()?;
    let image = dir.path().join("my.qed");
    hw(&[&"create", &"-q", &"-f", &"qed", &image, &"1M"])?.ok()?;
    let before = fs::read(&image)?;
    // Permission bits do not stop root; a read-only mount stops everybody.
    let mounted = Mount::tmpfs(&dir.path().join("mnt"), "4m")?;
    let Some(mounted) = mounted else {
        peer::skip("mounting a tmpfs needs root");
        return Ok(());
    };
    fs::copy(&image, mounted.path().join("my.qed"))?;
    mounted.read_only()?;
    let refused = hw(&[&"create", &"-f", &"qed", &mounted.path().join("new.qed"), &"1M"])?;
    assert_refused(&refused, Path::new("new.qed"), "ead-only")?;
    let refused =
        Headwater::serve(dir.path()).image(&mounted.path().join("my.qed")).nbd(&dir.path().join("s")).refused()?;
    assert_refused(&refused, Path::new("my.qed"), "ead-only")?;
    assert_eq!(fs::read(mounted.path().join("my.qed"))?, before);
    // Read-only serving of it works.
    let socket = dir.path().join("ro.sock");
    let server =
        Headwater::serve(dir.path()).image(&mounted.path().join("my.qed")).arg("--read-only").nbd(&socket).start()?;
    let mut client = headwater_tests::nbd::Client::connect(&socket)?;
    assert_eq!(client.read(0, 512)?, vec![0; 512]);
    client.flush()?;
    let refused = client.write(0, &[1; 512]).map_err(|e| e.to_string());
    assert!(refused.is_err());
    server.quit()?;
    Ok(())
}

/// A disk that fills up: the guest's write fails with ENOSPC, everything that was written stays, and with space again it
/// goes on.
#[test]
fn a_full_disk_loses_nothing() -> Result {
    peer!("headwater", "qemu-img");
    let dir = tempfile::tempdir()?;
    let Some(mounted) = Mount::tmpfs(&dir.path().join("mnt"), "4m")? else {
        peer::skip("mounting a tmpfs needs root");
        return Ok(());
    };
    let image = mounted.path().join("my.qed");
    hw(&[&"create", &"-q", &"-f", &"qed", &image, &"64M"])?.ok()?;
    let socket = dir.path().join("nbd.sock");
    let server = Headwater::serve(dir.path()).image(&image).nbd(&socket).start()?;
    let mut client = headwater_tests::nbd::Client::connect(&socket)?;
    let mut written = 0_u64;
    let full = loop {
        let bytes = vec![(written / 65536 + 1) as u8; 65536];
        match client.write(written, &bytes) {
            Ok(()) => written += 65536,
            Err(why) => break why.to_string(),
        }
        assert!(written < 8 << 20, "the disk never filled");
    };
    assert!(full.contains("28"), "not ENOSPC: {full}");
    client.flush()?;
    let _ = written;
    mounted.grow("32m")?;
    client.write(written, &vec![0xee; 65536])?;
    client.flush()?;
    for at in (0..written).step_by(65536) {
        assert_eq!(client.read(at, 65536)?, vec![(at / 65536 + 1) as u8; 65536], "at {at}");
    }
    client.disconnect()?;
    server.quit()?;
    check(&image)?.ok()?;
    Ok(())
}

/// A small file system of its own, gone when dropped.
struct Mount(std::path::PathBuf);

impl Mount {
    fn tmpfs(at: &Path, size: &str) -> Result<Option<Self>> {
        fs::create_dir(at)?;
        let mut mount = std::process::Command::new("mount");
        let done = finish(mount.args(["-t", "tmpfs", "-o", &format!("size={size}"), "tmpfs"]).arg(at))?;
        Ok(done.status.success().then(|| Mount(at.to_path_buf())))
    }

    fn path(&self) -> &Path {
        &self.0
    }

    fn remount(&self, options: &str) -> Result {
        let mut mount = std::process::Command::new("mount");
        finish(mount.args(["-o", &format!("remount,{options}")]).arg(&self.0))?.ok()?;
        Ok(())
    }

    fn read_only(&self) -> Result {
        self.remount("ro")
    }

    fn grow(&self, size: &str) -> Result {
        self.remount(&format!("size={size}"))
    }
}

impl Drop for Mount {
    fn drop(&mut self) {
        let mut unmount = std::process::Command::new("umount");
        // Left behind, it goes with the machine.
        let _ = finish(unmount.arg("--lazy").arg(&self.0));
    }
}

/// Half messages and nonsense on the monitor harm nobody else.
#[test]
fn a_bad_monitor_client_is_answered_and_others_go_on() -> Result {
    peer!("headwater");
    let dir = tempfile::tempdir()?;
    let image = fresh(dir.path(), "my.qed")?;
    let server = Headwater::serve(dir.path()).image(&image).nbd(&dir.path().join("n")).start()?;
    let mut half = std::os::unix::net::UnixStream::connect(server.qmp_socket())?;
    std::io::Write::write_all(&mut half, b"{\"execute\": \"qmp_cap")?;
    let mut bad = server.qmp()?;
    bad.send_raw("}{ nonsense ][")?;
    let answer = bad.answer()?;
    assert_eq!(answer["error"]["class"], "GenericError", "{answer}");
    let mut deep = String::new();
    for _ in 0..5000 {
        deep.push('[');
    }
    let mut nested = server.qmp()?;
    // It may be answered or cut off, but not obeyed, and nobody else notices.
    let _ = nested.send_raw(&deep);
    let mut good = server.qmp()?;
    assert_eq!(good.refused("no-such-command", json!({}))?.class, "CommandNotFound");
    assert!(good.execute("query-block-jobs", json!({}))?.as_array().is_some_and(Vec::is_empty));
    drop(half);
    server.quit()
}
