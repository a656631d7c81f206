//! `headwater qemu` with guests that boot: from the line of 2011, and when Headwater is lost under them.

use std::ffi::OsStr;
use std::io::{Read as _, Write as _};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use headwater_tests::front::{self, program};
use headwater_tests::guest::{BOOT_PATIENCE, Disk, Guest};
use headwater_tests::headwater::headwater;
use headwater_tests::master::{self, Master, Spec};
use headwater_tests::process::PATIENCE;
use headwater_tests::qemu::{check, info, qemu_img};
use headwater_tests::qmp::{Qmp, row};
use headwater_tests::{Result, peer};
use rustix::process::{Signal, kill_process};
use serde_json::json;

/// A guest's disk: an overlay over a master with files and checksums.
fn disk(dir: &Path) -> Result<(Master, PathBuf)> {
    let master = Master::build(dir, &Spec::default())?;
    let top = dir.join("my_fedora.qed");
    let args = ["create", "-q", "-f", "qed", "-F", "raw", "-b"].map(OsStr::new);
    headwater(args.into_iter().chain([master.image.as_os_str(), top.as_os_str()]))?.ok()?;
    Ok((master, top))
}

/// What is true of a guest's disk when all of it has arrived: it stands alone, and holds what the guest wrote.
fn stands_alone(dir: &Path, master: &Master, top: &Path) -> Result {
    assert_eq!(info(top)?.get("backing-filename"), None, "the backing file is still named");
    std::fs::remove_file(&master.image)?;
    check(top)?.ok()?;
    let raw = dir.join("after.raw");
    let args = ["convert", "-O", "raw"].map(OsStr::new);
    qemu_img(args.into_iter().chain([top.as_os_str(), raw.as_os_str()]))?.ok()?;
    master::e2fsck(&raw)?.ok()?;
    assert_eq!(master::file_in(&raw, "/written")?, "written by the guest\n");
    Ok(())
}

const AT_WORK: &str = "echo written by the guest >/written; sync; echo 3 >/proc/sys/vm/drop_caches; verify /\n";

/// The line of the first patches, with the emulator's name exchanged: the guest boots at once, and its disk arrives. Its memory can be
/// shared, so the disk is reached over vhost-user, and may grow.
#[test]
fn a_guest_boots_by_the_line_of_2011() -> Result {
    peer!("headwater", "guest", "qemu-img", "mke2fs", "e2fsck", "debugfs");
    let dir = tempfile::tempdir()?;
    let (master, top) = disk(dir.path())?;
    let monitor = dir.path().join("guest.qmp");
    let words = [
        "-drive".to_owned(),
        format!("if=virtio,file={},cache=none,stream=on", top.display()),
        "-qmp".to_owned(),
        format!("unix:{},server=on,wait=off", monitor.display()),
    ];
    let script = format!(
        "report sectors $(cat /sys/block/vda/size)\n\
         while [ $(cat /sys/block/vda/size) = 524288 ]; do sleep 0.1; done\n\
         report grown $(cat /sys/block/vda/size)\n{AT_WORK}"
    );
    let guest = Guest::new(Disk::Words(words.into()), &script);
    let guest = guest.emulator(&program(dir.path())?).manifest(&master.manifest).boot_from_disk();
    let mut guest = guest.start()?;
    assert_eq!(guest.reported("sectors", BOOT_PATIENCE)?, "524288");
    let mut qmp = Qmp::connect(&monitor)?;
    let blocks = qmp.execute("query-block", json!({}))?;
    let device = row(&blocks, "device", "virtio0")?;
    assert_eq!(device["inserted"]["drv"], "qed");
    let path = device["qdev"].as_str().unwrap_or_default();
    let kind = qmp.execute("qom-get", json!({ "path": path, "property": "type" }))?;
    assert_eq!(kind, "vhost-user-blk-pci");
    let stats = qmp.execute("query-blockstats", json!({}))?;
    assert!(row(&stats, "device", "virtio0")?["stats"]["rd_operations"].as_u64() > Some(0), "{stats}");
    qmp.execute("block_resize", json!({ "device": "virtio0", "size": 300 << 20 }))?;
    assert_eq!(guest.reported("grown", BOOT_PATIENCE)?, (600 << 10).to_string());
    drop(qmp);
    let finished = guest.finish(BOOT_PATIENCE)?.ok()?;
    assert_eq!(finished.get("verified")?, master.manifest.lines().count().to_string());
    stands_alone(dir.path(), &master, &top)
}

#[test]
fn a_guest_boots_from_a_drive_of_a_device_of_its_own() -> Result {
    peer!("headwater", "guest", "qemu-img", "mke2fs", "e2fsck", "debugfs");
    let dir = tempfile::tempdir()?;
    let (master, top) = disk(dir.path())?;
    let drive = format!("if=none,id=d,file={},copy-on-read=on,stream=on,discard=unmap", top.display());
    let words = ["-drive", &drive, "-device", "virtio-blk-pci,drive=d,serial=abc"].map(str::to_owned);
    let script = format!("report serial $(cat /sys/block/vda/serial)\n{AT_WORK}");
    let guest = Guest::new(Disk::Words(words.into()), &script);
    let guest = guest.emulator(&program(dir.path())?).manifest(&master.manifest).boot_from_disk();
    let finished = guest.run(BOOT_PATIENCE)?.ok()?;
    assert_eq!(finished.get("serial")?, "abc");
    assert_eq!(finished.get("verified")?, master.manifest.lines().count().to_string());
    stands_alone(dir.path(), &master, &top)
}

/// A guest that reads without end, under an emulator whose Headwater is killed, and what becomes of it: `seen` looks at the status that
/// QEMU's own monitor tells.
fn headwater_is_lost(words: impl FnOnce(&Path) -> Vec<String>, seen: impl Fn(&Path) -> Result) -> Result {
    let dir = tempfile::tempdir()?;
    let (_, top) = disk(dir.path())?;
    let people = dir.path().join("people.sock");
    let mut words = words(&top);
    words.extend(["-monitor".to_owned(), format!("unix:{},server=on,wait=off", people.display())]);
    let script = "report ready\n\
                  while dd if=/dev/vda of=/dev/null bs=64k count=64 iflag=direct 2>/dev/null; do :; done\n\
                  report failed\n";
    let guest = Guest::new(Disk::Words(words), script).emulator(&program(dir.path())?);
    let mut guest = guest.start()?;
    guest.reported("ready", BOOT_PATIENCE)?;
    let emulator = front::emulator_of(guest.id())?;
    let headwater = i32::try_from(guest.id()).ok().and_then(rustix::process::Pid::from_raw).ok_or("no number")?;
    kill_process(headwater, Signal::KILL)?;
    let outcome = seen(&people);
    front::end(emulator)?;
    outcome?;
    let console = guest.finish(PATIENCE).err().map(|why| why.to_string()).unwrap_or_default();
    assert!(!console.contains("@@failed") && !console.contains("I/O error"), "{console}");
    Ok(())
}

/// Headwater is killed under a guest at work: the guest is paused, and never sees an error.
#[test]
fn a_guest_is_paused_when_headwater_is_lost() -> Result {
    peer!("headwater", "guest", "mke2fs");
    let words = |top: &Path| {
        let drive = format!("if=none,id=d,file={},cache=none", top.display());
        vec!["-drive".to_owned(), drive, "-device".to_owned(), "virtio-blk-pci,drive=d".to_owned()]
    };
    headwater_is_lost(words, |people| {
        let began = Instant::now();
        while !asked(people, "info status")?.contains("paused (io-error)") {
            assert!(began.elapsed() < PATIENCE, "the guest goes on");
            std::thread::sleep(Duration::from_millis(200));
        }
        Ok(())
    })
}

/// Over vhost-user its requests are kept.
#[test]
fn a_guest_waits_when_headwater_is_lost_over_vhost_user() -> Result {
    peer!("headwater", "guest", "mke2fs");
    let words = |top: &Path| vec!["-drive".to_owned(), format!("if=virtio,file={}", top.display())];
    headwater_is_lost(words, |people| {
        // Longer than a client of an NBD server would wait.
        std::thread::sleep(Duration::from_secs(6));
        assert!(asked(people, "info status")?.contains("running"));
        Ok(())
    })
}

/// What a monitor for people answers.
fn asked(socket: &Path, line: &str) -> Result<String> {
    let mut stream = UnixStream::connect(socket)?;
    stream.set_read_timeout(Some(Duration::from_millis(500)))?;
    stream.write_all(format!("{line}\n").as_bytes())?;
    let (mut said, mut bytes) = (Vec::new(), [0; 4096]);
    while let Ok(read @ 1..) = stream.read(&mut bytes) {
        said.extend(&bytes[..read]);
        if said.windows(7).filter(|window| window == b"(qemu) ").count() > 1 {
            break;
        }
    }
    Ok(String::from_utf8_lossy(&said).into_owned())
}
