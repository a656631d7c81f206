//! A real guest: Debian's cloud kernel under QEMU boots from a QED (or QCOW2) overlay over a raw master while the stream job runs. It
//! verifies the master's files, writes its own and syncs; after power-off the image stands alone.

use std::ffi::OsStr;
use std::path::{Path, PathBuf};

use headwater_tests::guest::{BOOT_PATIENCE, Disk, Guest};
use headwater_tests::headwater::{Headwater, Serve, headwater};
use headwater_tests::master::{self, Master, Spec};
use headwater_tests::process::PATIENCE;
use headwater_tests::qemu::{check, info, qemu_img};
use headwater_tests::{Result, peer};
use serde_json::json;
use tempfile::TempDir;

/// What the guest does while its disk arrives: reads everything, writes, deletes, trims, and reads again past its own cache.
const SCRIPT: &str = "report booted from $(grep ' / ' /proc/mounts | cut -d' ' -f1)\n\
     echo written by the guest >/written\n\
     dd if=/dev/urandom of=/blob bs=64k count=40 2>/dev/null\n\
     sha256sum /blob >/blob.sum\n\
     rm /data/3/13\n\
     sync\n\
     fstrim / 2>/dev/null || true\n\
     report waiting\n\
     read -r answer\n\
     echo 3 >/proc/sys/vm/drop_caches\n\
     grep -v '/data/3/13$' $PAYLOAD/manifest >/tmp/rest && cp /tmp/rest $PAYLOAD/manifest\n\
     verify /\n\
     sha256sum -c /blob.sum >/dev/null && report blob intact\n";

fn overlay(dir: &TempDir, format: &str) -> Result<(Master, PathBuf)> {
    let master = Master::build(dir.path(), &Spec::default())?;
    let top = dir.path().join(format!("my.{format}"));
    let args = ["create", "-q", "-f", format, "-F", "raw", "-b"].map(OsStr::new);
    headwater(args.into_iter().chain([master.image.as_os_str(), top.as_os_str()]))?.ok()?;
    Ok((master, top))
}

fn serve(dir: &Path, top: &Path) -> Serve {
    Headwater::serve(dir).image(top).arg("--copy-on-read").arg("--cache").arg("none")
}

/// The image is sound, and so is the file system in it, which is returned as a raw image.
fn sound(dir: &Path, top: &Path) -> Result<PathBuf> {
    check(top)?.ok()?;
    let raw = dir.join("after.raw");
    let args = ["convert", "-O", "raw"].map(OsStr::new);
    qemu_img(args.into_iter().chain([top.as_os_str(), raw.as_os_str()]))?.ok()?;
    master::e2fsck(&raw)?.ok()?;
    Ok(raw)
}

fn boots_while_it_arrives(
    format: &str,
    export: impl Fn(Serve, &Path) -> Serve,
    disk: impl Fn(PathBuf) -> Disk,
) -> Result {
    let dir = tempfile::tempdir()?;
    let (master, top) = overlay(&dir, format)?;
    let socket = dir.path().join("disk.sock");
    let server = export(serve(dir.path(), &top), &socket).start()?;
    let mut qmp = server.qmp()?;
    let mut guest = Guest::new(disk(socket.clone()), SCRIPT).manifest(&master.manifest).boot_from_disk().start()?;
    // Slow enough that the guest boots and works while most of its disk has not arrived.
    qmp.execute("block-stream", json!({ "job-id": "my", "device": "my", "speed": 4 << 20 }))?;
    assert_eq!(guest.reported("booted", BOOT_PATIENCE)?, "from /dev/vda");
    guest.reported("waiting", BOOT_PATIENCE)?;
    // It may be through already, on a machine where booting takes long.
    let _ = qmp.command("block-job-set-speed", json!({ "device": "my", "speed": 0 }))?;
    let done = qmp.event_where(PATIENCE, |event| event["event"] == "BLOCK_JOB_COMPLETED")?;
    assert!(done["data"].get("error").is_none(), "{done}");
    guest.say("go on")?;
    let finished = guest.finish(BOOT_PATIENCE)?.ok()?;
    let files = master.manifest.lines().count();
    assert_eq!(finished.get("verified")?, (files - 1).to_string());
    assert_eq!(finished.get("blob")?, "intact");
    drop(qmp);
    server.quit()?;

    assert_eq!(info(&top)?.get("backing-filename"), None, "the backing file is still named");
    std::fs::remove_file(&master.image)?;
    let raw = sound(dir.path(), &top)?;
    assert_eq!(master::file_in(&raw, "/written")?, "written by the guest\n");

    // A second boot, from what stands alone now.
    let server = export(serve(dir.path(), &top), &socket).start()?;
    let again = Guest::new(disk(socket), "sha256sum -c /blob.sum >/dev/null && report again $(cat /written)\n");
    let finished = again.boot_from_disk().run(BOOT_PATIENCE)?.ok()?;
    assert_eq!(finished.get("again")?, "written by the guest");
    server.quit()
}

#[test]
fn over_vhost_user_blk() -> Result {
    peer!("headwater", "guest", "qemu-img", "mke2fs", "e2fsck", "debugfs");
    boots_while_it_arrives("qed", |serve, socket| serve.vhost_user(socket), Disk::VhostUser)
}

#[test]
fn on_qcow2_over_vhost_user_blk() -> Result {
    peer!("headwater", "guest", "qemu-img", "mke2fs", "e2fsck", "debugfs");
    boots_while_it_arrives("qcow2", |serve, socket| serve.vhost_user(socket), Disk::VhostUser)
}

#[test]
fn over_nbd() -> Result {
    peer!("headwater", "guest", "qemu-img", "mke2fs", "e2fsck", "debugfs");
    boots_while_it_arrives("qed", |serve, socket| serve.nbd(socket), |socket| Disk::Nbd(socket, "my".into()))
}

/// The daemon is killed under a running guest and comes back: QEMU reconnects, and the guest goes on.
#[test]
fn a_guest_outlives_its_daemon_over_nbd() -> Result {
    peer!("headwater", "guest", "qemu-img", "mke2fs", "e2fsck", "debugfs");
    let dir = tempfile::tempdir()?;
    let (master, top) = overlay(&dir, "qed")?;
    let socket = dir.path().join("disk.sock");
    let mut server = serve(dir.path(), &top).nbd(&socket).start()?;
    let script = "echo before >/before; sync; report waiting\n\
                  read -r answer\n\
                  echo after >/after; sync; echo 3 >/proc/sys/vm/drop_caches; verify /\n";
    let disk = Disk::Nbd(socket.clone(), "my".into());
    let mut guest = Guest::new(disk, script).manifest(&master.manifest).boot_from_disk().start()?;
    guest.reported("waiting", BOOT_PATIENCE)?;
    server.daemon.kill()?;
    drop(server);
    let server = serve(dir.path(), &top).nbd(&socket).start()?;
    guest.say("go on")?;
    let finished = guest.finish(BOOT_PATIENCE)?.ok()?;
    assert_eq!(finished.get("verified")?, master.manifest.lines().count().to_string());
    server.quit()?;
    let raw = sound(dir.path(), &top)?;
    assert_eq!(master::file_in(&raw, "/before")?, "before\n");
    assert_eq!(master::file_in(&raw, "/after")?, "after\n");
    Ok(())
}

/// Killed five times in the middle of the guest's work, with requests in flight. With every answer durable nothing is lost, and the
/// guest sees no error: what was in flight is taken up from the record that QEMU keeps.
#[test]
fn a_guest_outlives_its_daemons_over_vhost_user_blk() -> Result {
    peer!("headwater", "guest", "qemu-img", "mke2fs", "e2fsck", "debugfs");
    let dir = tempfile::tempdir()?;
    let (master, top) = overlay(&dir, "qed")?;
    let socket = dir.path().join("disk.sock");
    let start = || {
        let serve = Headwater::serve(dir.path()).image(&top).arg("--copy-on-read").arg("--stream=2M");
        serve.arg("--cache").arg("directsync").vhost_user(&socket).start()
    };
    let mut server = start()?;
    let script = "mkdir /work\n\
                  n=0; while [ $n -lt 25 ]; do\n\
                  dd if=/dev/urandom of=/work/$n bs=32k count=8 conv=fsync 2>/dev/null\n\
                  (cd /work && sha256sum $n) >>/work/sums\n\
                  report round $n\n\
                  n=$((n + 1)); done\n\
                  sync; echo 3 >/proc/sys/vm/drop_caches\n\
                  (cd /work && sha256sum -c sums) | grep -c OK >/tmp/right\n\
                  report right $(cat /tmp/right)\n\
                  report errors $(dmesg | grep -ciE 'i/o error|ext4-fs error|remount')\n\
                  verify /\n";
    let disk = Disk::VhostUser(socket.clone());
    let mut guest = Guest::new(disk, script).manifest(&master.manifest).boot_from_disk().start()?;
    for kill in 0..5 {
        while guest.reported("round", BOOT_PATIENCE)? != (4 * kill + 2).to_string() {}
        server.daemon.kill()?;
        drop(server);
        server = start()?;
    }
    let finished = guest.finish(BOOT_PATIENCE)?.ok()?;
    assert_eq!(finished.get("right")?, "25");
    assert_eq!(finished.get("errors")?, "0");
    assert_eq!(finished.get("verified")?, master.manifest.lines().count().to_string());
    server.quit()?;
    let raw = sound(dir.path(), &top)?;
    assert_eq!(master::file_in(&raw, "/work/sums")?.lines().count(), 25);
    Ok(())
}
