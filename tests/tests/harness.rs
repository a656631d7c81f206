//! The harness itself, with QEMU's own programs where Headwater will stand: if these fail, no failure of Headwater
//! can be believed.

use std::collections::HashMap;
use std::time::Duration;

use headwater_tests::guest::{BOOT_PATIENCE, Disk, Guest};
use headwater_tests::master::{self, Master, Spec};
use headwater_tests::nbd::{self, can, flag};
use headwater_tests::nbdkit::Nbdkit;
use headwater_tests::process::{PATIENCE, run};
use headwater_tests::qemu::{Cache, Qsd, QsdBuilder, check, compare, file_node, format_node, info, qemu_img, qemu_io};
use headwater_tests::random::Random;
use headwater_tests::{Result, peer, vhost};
use serde_json::json;
use tempfile::TempDir;

/// A QED overlay over a raw master, as `qemu-storage-daemon`'s nodes, with the exports `export` adds.
fn overlay(dir: &TempDir, spec: &Spec, export: impl FnOnce(QsdBuilder) -> QsdBuilder) -> Result<(Master, Qsd)> {
    let master = Master::build(dir.path(), spec)?;
    let top = dir.path().join("my.qed");
    let args = ["create", "-q", "-f", "qed", "-F", "raw", "-b"].map(std::ffi::OsStr::new);
    qemu_img(args.into_iter().chain([master.image.as_os_str(), top.as_os_str()]))?.ok()?;
    let server = QsdBuilder::new(dir.path())
        .node(&file_node("base-file", &master.image, Cache::Writeback, true))
        .node(&json!({ "driver": "raw", "node-name": "base", "file": "base-file", "read-only": true }))
        .node(&file_node("top-file", &top, Cache::Writeback, false))
        .node(&format_node("top", "qed", "top-file", Some("base")));
    let server = export(server).start()?;
    Ok((master, server))
}

/// Boots from the overlay while it is streamed, writes, and powers off; then all must stand without the master.
fn guest_while_streaming(dir: &TempDir, master: &Master, server: Qsd, disk: Disk) -> Result {
    let mut guest = Guest::new(
        disk,
        "report booted from $(grep ' / ' /proc/mounts | cut -d' ' -f1)\n\
         echo written by the guest >/written\n\
         rm /data/3/13\n\
         sync\n\
         report waiting\n\
         read -r answer\n\
         report heard $answer\n\
         echo 3 >/proc/sys/vm/drop_caches\n\
         grep -v '/data/3/13$' $PAYLOAD/manifest >/tmp/rest && cp /tmp/rest $PAYLOAD/manifest\n\
         verify /\n",
    )
    .manifest(&master.manifest)
    .boot_from_disk()
    .start()?;
    assert_eq!(guest.reported("booted", BOOT_PATIENCE)?, "from /dev/vda");
    let mut qmp = server.qmp()?;
    qmp.execute("block-stream", json!({ "job-id": "stream", "device": "top" }))?;
    guest.reported("waiting", PATIENCE)?;
    let done = qmp.event("BLOCK_JOB_COMPLETED")?;
    assert_eq!(done.get("error"), None, "{done}");
    guest.say("hello guest")?;
    let finished = guest.finish(BOOT_PATIENCE)?.ok()?;
    assert_eq!(finished.get("heard")?, "hello guest");
    let files = master.manifest.lines().count();
    assert_eq!(finished.get("verified")?, (files - 1).to_string());
    drop(qmp);
    server.quit()?;

    let top = dir.path().join("my.qed");
    assert_eq!(info(&top)?.get("backing-filename"), None);
    std::fs::remove_file(&master.image)?;
    assert_eq!(check(&top)?.code()?, 0);
    let raw = dir.path().join("after.raw");
    qemu_img(["convert", "-O", "raw"].map(std::ffi::OsStr::new).into_iter().chain([top.as_os_str(), raw.as_os_str()]))?
        .ok()?;
    master::e2fsck(&raw)?.ok()?;
    assert_eq!(master::file_in(&raw, "/written")?, "written by the guest\n");

    let again = Guest::new(Disk::File(top, "qed"), "cat /written\nreport again $(cat /written)\n");
    let finished = again.boot_from_disk().run(BOOT_PATIENCE)?.ok()?;
    assert_eq!(finished.get("again")?, "written by the guest");
    Ok(())
}

#[test]
fn guest_over_vhost_user() -> Result {
    peer!("guest", "qemu-img", "qemu-storage-daemon", "mke2fs", "e2fsck");
    let dir = tempfile::tempdir()?;
    let socket = dir.path().join("vhost.sock");
    let (master, server) = overlay(&dir, &Spec::default(), |qsd| qsd.vhost_user("top", &socket, 1))?;
    guest_while_streaming(&dir, &master, server, Disk::VhostUser(socket))
}

#[test]
fn guest_over_nbd() -> Result {
    peer!("guest", "qemu-img", "qemu-storage-daemon", "mke2fs", "e2fsck");
    let dir = tempfile::tempdir()?;
    let socket = dir.path().join("nbd.sock");
    let (master, server) = overlay(&dir, &Spec::default(), |qsd| qsd.nbd("top", &socket))?;
    guest_while_streaming(&dir, &master, server, Disk::Nbd(socket, String::new()))
}

#[test]
fn guest_that_fails_says_so() -> Result {
    peer!("guest", "mke2fs");
    let dir = tempfile::tempdir()?;
    let spec = Spec { size: 32 << 20, files: 10, file_size: 4096, seed: 7 };
    let master = Master::build(dir.path(), &spec)?;
    // One bit of one file is turned over: verification must notice.
    let mut bytes = std::fs::read(&master.image)?;
    let content = Random::new(spec.seed).clone();
    let mut first = vec![
        0;
        {
            let mut sizes = content.clone();
            sizes.below(4097) as usize
        }
    ];
    let mut random = content;
    random.below(4097);
    random.fill(&mut first);
    let at = bytes.windows(64).position(|window| window == &first[..64]).ok_or("the first file is not in the image")?;
    bytes[at] ^= 1;
    std::fs::write(&master.image, bytes)?;
    let guest = Guest::new(Disk::File(master.image, "raw"), "mount_disk /mnt\nverify /mnt\nreport not reached\n");
    let finished = guest.manifest(&master.manifest).run(BOOT_PATIENCE)?;
    assert_ne!(finished.exit, 0);
    assert!(finished.get("not").is_err());
    assert_eq!(finished.get("verified")?, (master.manifest.lines().count() - 1).to_string());
    assert!(finished.console.contains("./data/0/0: FAILED"), "{}", finished.console);
    Ok(())
}

#[test]
fn nbd_client_against_qemu() -> Result {
    peer!("qemu-img", "qemu-storage-daemon", "mke2fs", "busybox");
    let dir = tempfile::tempdir()?;
    let socket = dir.path().join("nbd.sock");
    let (master, server) = overlay(&dir, &Spec::default(), |qsd| qsd.nbd("top", &socket))?;
    let image = std::fs::read(&master.image)?;
    let simple = nbd::Options { structured: false, context: None, ..nbd::Options::default() };
    for options in [nbd::Options::default(), simple] {
        let mut client = nbd::Client::connect_with(&socket, &options)?;
        assert_eq!(client.size(), image.len() as u64);
        assert_ne!(client.export().flags & can::FLUSH, 0);
        assert_eq!(client.export().structured, options.structured);
        // Mixed data and holes, many in flight and answered in any order.
        let mut random = Random::new(3);
        let mut wanted = HashMap::new();
        for _ in 0..32 {
            let offset = random.below(client.size() - (1 << 20));
            let length = 1 + random.below(1 << 20) as u32;
            let cookie = client.submit(nbd::Command::Read, 0, offset, length, &[])?;
            wanted.insert(cookie, (offset as usize, length as usize));
        }
        while client.in_flight() > 0 {
            let (cookie, reply) = client.complete()?;
            let (offset, length) = wanted.remove(&cookie).ok_or("an unknown cookie")?;
            assert!(reply?.data == image[offset..offset + length], "wrong data at {offset}");
        }
    }
    let mut client = nbd::Client::connect(&socket)?;
    client.write_with(flag::FUA, 12_345, b"here")?;
    client.write_zeroes(0, 1 << 20, 1 << 20)?;
    client.flush()?;
    client.trim(8 << 20, 1 << 20)?;
    assert_eq!(client.read(12_344, 6)?[1..5], *b"here");
    assert_eq!(client.read(1 << 20, 1 << 20)?, vec![0; 1 << 20]);
    let extents = client.block_status(0, 0, 4 << 20)?;
    assert!(extents.iter().map(|extent| extent.length).sum::<u32>() >= 4 << 20, "{extents:?}");
    let refused = client.read(client.size(), 512).expect_err("past the end");
    assert_eq!(refused.downcast::<nbd::NbdError>()?.errno, 22);
    client.disconnect()?;
    server.quit()
}

#[test]
fn vhost_user_client_against_qemu() -> Result {
    peer!("qemu-img", "qemu-storage-daemon", "mke2fs", "busybox");
    let dir = tempfile::tempdir()?;
    let socket = dir.path().join("vhost.sock");
    let (master, server) = overlay(&dir, &Spec::default(), |qsd| qsd.vhost_user("top", &socket, 2))?;
    let image = std::fs::read(&master.image)?;
    for (event_index, indirect) in [(true, true), (false, false), (true, false), (false, true)] {
        let options = vhost::Options { queues: 2, event_index, indirect, ..vhost::Options::default() };
        let mut client = vhost::Client::connect_with(&socket, options)?;
        assert_eq!(client.size(), image.len() as u64);
        assert_eq!(client.max_queues(), 2);
        let mut random = Random::new(4);
        // Several rounds through both rings, so that their indices wrap around the ring's size.
        for round in 0..20 {
            let queue = round % 2;
            let mut wanted = HashMap::new();
            while let Some(slot) = client.claim(queue) {
                let length = 512 * (1 + random.below(64) as u32);
                let offset = 512 * random.below((client.size() - (1 << 20)) / 512);
                client.submit(queue, slot, vhost::Kind::Read, offset, length)?;
                wanted.insert(slot, (offset as usize, length));
            }
            while !wanted.is_empty() {
                let (slot, status) = client.complete(queue, PATIENCE)?;
                assert_eq!(status, vhost::Status::OK);
                let (offset, length) = wanted.remove(&slot).ok_or("a request nobody made")?;
                let data = client.data(queue, slot, length)?;
                assert!(data == image[offset..offset + length as usize], "wrong data at {offset}");
            }
        }
    }
    let mut client = vhost::Client::connect(&socket)?;
    client.write(4096, &[9; 8192])?;
    client.write_zeroes(8192, 4096, false)?;
    client.flush()?;
    assert_eq!(client.read(4096, 8192)?, [[9; 4096], [0; 4096]].concat());
    client.discard(1 << 20, 1 << 20)?;
    assert_eq!(client.identify()?, "vhost_user_blk");
    let (_, status) = client.one(vhost::Kind::Other(99), 0, 0, &[])?;
    assert_eq!(status, vhost::Status::UNSUPPORTED);
    let (_, status) = client.one(vhost::Kind::Read, client.size(), 512, &[])?;
    assert_eq!(status, vhost::Status::IO_ERROR);
    drop(client);
    server.quit()
}

#[test]
fn qmp_client_against_qemu() -> Result {
    peer!("qemu-img", "qemu-storage-daemon", "mke2fs", "busybox");
    let dir = tempfile::tempdir()?;
    let (master, server) = overlay(&dir, &Spec::default(), |qsd| qsd)?;
    let mut qmp = server.qmp()?;
    assert!(qmp.greeting["version"]["qemu"]["major"].is_u64(), "{}", qmp.greeting);
    let refused = qmp.refused("block-stream", json!({ "job-id": "x", "device": "nowhere" }))?;
    assert_eq!(refused.class, "GenericError");
    qmp.execute("block-stream", json!({ "job-id": "stream", "device": "top" }))?;
    let done = qmp.event("BLOCK_JOB_COMPLETED")?;
    assert_eq!((&done["device"], done.get("error")), (&json!("stream"), None));
    // The events before it were kept.
    assert!(qmp.drain().iter().any(|event| event["event"] == "JOB_STATUS_CHANGE"));
    drop(qmp);
    server.quit()?;
    compare(&master.image, &dir.path().join("my.qed"))?.ok()?;
    Ok(())
}

#[test]
fn qemu_io_failures_are_noticed() -> Result {
    peer!("qemu-img", "qemu-io");
    let dir = tempfile::tempdir()?;
    let image = dir.path().join("a.qed");
    qemu_img(["create".as_ref(), "-f".as_ref(), "qed".as_ref(), image.as_os_str(), "1M".as_ref()])?.ok()?;
    qemu_io("qed", &image, &["write -P 7 0 64k", "read -P 7 0 64k"])?;
    qemu_io("qed", &image, &["read -P 8 0 64k"]).expect_err("the pattern is another");
    qemu_io("qed", &image, &["write 2M 4k"]).expect_err("past the end");
    Ok(())
}

#[test]
fn nbdkit_delays_and_fails() -> Result {
    peer!("nbdkit");
    let dir = tempfile::tempdir()?;
    let (file, socket) = (dir.path().join("f"), dir.path().join("s"));
    let trigger = dir.path().join("trigger");
    std::fs::write(&file, vec![5; 1 << 20])?;
    let _server = Nbdkit::new().read_delay(20).read_errors_while(&trigger).start(&file, &socket)?;
    let mut client = nbd::Client::connect(&socket)?;
    let start = std::time::Instant::now();
    assert_eq!(client.read(0, 4096)?, [5; 4096]);
    assert!(start.elapsed() >= Duration::from_millis(20));
    std::fs::write(&trigger, "")?;
    let refused = client.read(0, 4096).expect_err("an injected error");
    assert_eq!(refused.downcast::<nbd::NbdError>()?.errno, 5);
    std::fs::remove_file(&trigger)?;
    client.read(0, 4096)?;
    Ok(())
}

#[test]
fn the_python_client_is_there() -> Result {
    peer!("qemu.qmp");
    let python = headwater_tests::peer::python()?;
    run(python, ["-c", "from qemu.qmp import QMPClient"])?.ok()?;
    Ok(())
}
