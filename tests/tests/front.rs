//! `headwater qemu`: the real QEMU, with its disks served by Headwater and its monitors joined.

use std::ffi::OsStr;
use std::io::{BufRead as _, IoSlice, Write as _};
use std::os::fd::{AsFd as _, AsRawFd as _};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use headwater_tests::front::{self, Front, program};
use headwater_tests::headwater::headwater;
use headwater_tests::process::{Daemon, PATIENCE, run};
use headwater_tests::qemu::{check, info};
use headwater_tests::qmp::{Qmp, row};
use headwater_tests::random::Random;
use headwater_tests::{Result, peer};
use rustix::io::{FdFlags, fcntl_setfd};
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
use rustix::process::{Signal, kill_process};
use serde_json::{Value, json};

/// An overlay of `format` over a raw master of random bytes, both in `dir`.
fn overlay(dir: &Path, name: &str, format: &str) -> Result<PathBuf> {
    let mut bytes = vec![0; 16 << 20];
    Random::new(7).fill(&mut bytes);
    std::fs::write(dir.join("base.raw"), bytes)?;
    let top = dir.join(name);
    let args = ["create", "-q", "-f", format, "-b", "base.raw", "-F", "raw"].map(OsStr::new);
    headwater(args.into_iter().chain([top.as_os_str()]))?.ok()?;
    Ok(top)
}

fn names(answer: &Value) -> Vec<&str> {
    answer.as_array().into_iter().flatten().filter_map(|row| row["name"].as_str()).collect()
}

#[test]
fn what_only_asks_is_qemus_own() -> Result {
    peer!("headwater", "qemu-system-x86_64");
    let dir = tempfile::tempdir()?;
    let front = program(dir.path())?;
    for words in [&["--version"][..], &["-M", "help"], &["-drive", "file=nothing.qed", "-cpu", "help"]] {
        let theirs = run("qemu-system-x86_64", words)?;
        let ours = run(&front, words)?;
        assert_eq!(ours.stdout, theirs.stdout, "{words:?}");
        assert_eq!(ours.status.code(), theirs.status.code(), "{words:?}");
    }
    let args = ["qemu", "--with", "qemu-system-x86_64", "--version"];
    assert!(headwater(args)?.ok()?.starts_with("QEMU emulator version"));
    let missing = run(&front, ["--with", "no-such-qemu", "--version"])?;
    assert_eq!(missing.status.code(), Some(1));
    assert!(missing.stderr.contains("no-such-qemu"), "{}", missing.stderr);
    // What QEMU would refuse, QEMU refuses.
    let wrong = run(&front, ["-no-such-option"])?;
    assert!(wrong.stderr.contains("no-such-option"), "{}", wrong.stderr);
    Ok(())
}

/// As libvirt probes: without a disk the process becomes QEMU, which goes into the background itself.
#[test]
fn without_a_disk_it_is_qemu() -> Result {
    peer!("headwater", "qemu-system-x86_64");
    let dir = tempfile::tempdir()?;
    let (monitor, pid_file) = (dir.path().join("probe.monitor"), dir.path().join("probe.pid"));
    let qmp = format!("unix:{},server=on,wait=off", monitor.display());
    let words = ["-S", "-no-user-config", "-nodefaults", "-nographic", "-machine", "none,accel=tcg", "-qmp", &qmp];
    let pid = ["-pidfile".to_owned(), pid_file.display().to_string(), "-daemonize".to_owned()];
    run(program(dir.path())?, words.into_iter().map(str::to_owned).chain(pid))?.ok()?;
    let number: i32 = std::fs::read_to_string(&pid_file)?.trim().parse()?;
    let name = std::fs::read_to_string(format!("/proc/{number}/comm"))?;
    let mut qmp = Qmp::connect(&monitor)?;
    assert_eq!(qmp.greeting["capabilities"], json!(["oob"]), "QEMU's own greeting");
    qmp.execute("quit", json!({}))?;
    assert!(name.contains("qemu") && !name.contains("headwater"), "{name}");
    Ok(())
}

#[test]
fn one_monitor_for_the_guest_and_its_disks() -> Result {
    peer!("headwater", "qemu-system-x86_64", "qemu-img");
    let dir = tempfile::tempdir()?;
    let top = overlay(dir.path(), "my.qed", "qed")?;
    let words = ["-drive", "if=virtio,file=my.qed,cache=none,copy-on-read=on", "-S"];
    let mut front = Front::in_dir(dir.path()).words(words).start()?;
    let mut qmp = front.qmp()?;
    assert_eq!(qmp.greeting["version"]["qemu"]["major"], json!(10), "QEMU's own: {}", qmp.greeting);

    // Rows of both: QEMU's device, our image.
    let answer = qmp.execute("query-block", json!({}))?;
    let device = row(&answer, "device", "virtio0")?;
    assert!(device["qdev"].as_str().is_some_and(|path| path.contains("virtio-backend")), "{device}");
    assert_eq!(device["inserted"]["drv"], "qed");
    assert_eq!(device["inserted"]["cache"]["direct"], true);
    assert_eq!(device["inserted"]["image"]["backing-image"]["filename"], "base.raw");
    let nodes = qmp.execute("query-named-block-nodes", json!({}))?;
    assert!(nodes.as_array().into_iter().flatten().all(|node| node["drv"] != "nbd"), "{nodes:#}");
    let node = device["inserted"]["node-name"].clone();
    let stats = qmp.execute("query-blockstats", json!({}))?;
    assert_eq!(row(&stats, "device", "virtio0")?["node-name"], node);
    let commands = qmp.execute("query-commands", json!({}))?;
    for command in ["device_add", "stop", "block_stream", "block-stream"] {
        assert_eq!(names(&commands).iter().filter(|name| **name == command).count(), 1, "{command}");
    }
    let schema = qmp.execute("query-qmp-schema", json!({}))?;
    let mut found = names(&schema);
    let all = found.len();
    found.sort_unstable();
    found.dedup();
    assert_eq!(found.len(), all, "a name stands for one thing");
    let stream = row(&schema, "name", "block_stream")?;
    row(&schema, "name", stream["arg-type"].as_str().unwrap_or_default())?;

    // The machine is QEMU's.
    assert_eq!(qmp.execute("query-status", json!({}))?["status"], "prelaunch");
    qmp.execute("cont", json!({}))?;
    qmp.event("RESUME")?;
    qmp.execute("stop", json!({}))?;
    qmp.event("STOP")?;

    // Jobs are ours, in every API.
    assert_eq!(qmp.refused("block_job_cancel", json!({ "device": "virtio0" }))?.class, "DeviceNotActive");
    assert_eq!(qmp.refused("block-job-cancel", json!({ "device": "virtio0" }))?.class, "DeviceNotActive");
    assert_eq!(qmp.refused("block_stream", json!({ "device": "nobody" }))?.class, "DeviceNotFound");
    qmp.execute("block-stream", json!({ "device": "virtio0", "job-id": "s", "speed": 65536 }))?;
    assert_eq!(qmp.execute("query-block-jobs", json!({}))?[0]["device"], "s");
    assert_eq!(qmp.execute("query-jobs", json!({}))?[0]["id"], "s");
    let human = |line: &str| json!({ "command-line": line });
    let told = qmp.execute("human-monitor-command", human("info block-jobs"))?;
    assert!(told.as_str().is_some_and(|text| text.contains("Streaming device s")), "{told}");
    assert_eq!(qmp.execute("human-monitor-command", human("block_job_cancel s"))?, "");
    qmp.event("BLOCK_JOB_CANCELLED")?;
    let told = qmp.execute("human-monitor-command", human("info status"))?;
    assert!(told.as_str().is_some_and(|text| text.contains("paused")), "{told}");
    qmp.execute("block_stream", json!({ "device": "virtio0" }))?;
    let done = qmp.event("BLOCK_JOB_COMPLETED")?;
    assert_eq!((&done["device"], &done["offset"]), (&json!("virtio0"), &done["len"]));
    // Trace points are whoever's they are.
    let state = |name: &str| json!({ "name": name });
    assert_eq!(qmp.execute("trace-event-get-state", state("disk_request"))?[0]["state"], "disabled");
    qmp.execute("trace-event-set-state", json!({ "name": "job_status", "enable": true }))?;
    assert_eq!(qmp.execute("trace-event-get-state", state("job_status"))?[0]["state"], "enabled");
    qmp.refused("trace-event-get-state", state("no_such_event"))?;
    // What QEMU would do to its NBD client is not done to our disk.
    let refused = qmp.refused("drive-mirror", json!({ "device": "virtio0", "target": "x", "sync": "full" }))?;
    assert!(refused.desc.contains("drive-mirror") && refused.desc.contains("Headwater"), "{refused}");
    assert!(qmp.refused("block_resize", json!({ "device": "virtio0", "size": 1 << 30 }))?.desc.contains("size"));
    assert_eq!(qmp.refused("no-such-command", json!({}))?.class, "CommandNotFound");
    assert_eq!(qmp.refused("stop", json!({ "now": true }))?.class, "GenericError");

    qmp.execute("quit", json!({}))?;
    qmp.event("SHUTDOWN")?;
    assert!(front.daemon.exits()?.success(), "{}", front.daemon.log());
    check(&top)?.ok()?;
    assert_eq!(info(&top)?.get("backing-filename"), None);
    Ok(())
}

/// A domain as libvirt starts it: trees as JSON, a monitor on a listening descriptor, disks that come and go.
#[test]
fn a_domain_as_libvirt_starts_it() -> Result {
    peer!("headwater", "qemu-system-x86_64", "qemu-img");
    let dir = tempfile::tempdir()?;
    let top = overlay(dir.path(), "my.qed", "qed")?;
    let second = dir.path().join("second.qcow2");
    let made = headwater(["create", "-q", "-f", "qcow2", &second.display().to_string(), "64M"])?;
    made.ok()?;
    let monitor = dir.path().join("monitor.sock");
    let listener = UnixListener::bind(&monitor)?;
    fcntl_setfd(&listener, FdFlags::empty())?;
    let file = |name: &str, path: &Path| json!({"driver": "file", "filename": path, "node-name": name, "auto-read-only": true, "discard": "unmap"});
    let base = file("libvirt-2-storage", &dir.path().join("base.raw"));
    let words = [
        "-machine".to_owned(),
        "q35".to_owned(),
        "-chardev".to_owned(),
        format!("socket,id=charmonitor,fd={},server=on,wait=off", listener.as_raw_fd()),
        "-mon".to_owned(),
        "chardev=charmonitor,id=monitor,mode=control".to_owned(),
        "-S".to_owned(),
        "-blockdev".to_owned(),
        base.to_string(),
        "-blockdev".to_owned(),
        json!({"node-name": "libvirt-2-format", "read-only": true, "driver": "raw", "file": "libvirt-2-storage"}).to_string(),
        "-blockdev".to_owned(),
        file("libvirt-1-storage", &top).to_string(),
        "-blockdev".to_owned(),
        json!({"node-name": "libvirt-1-format", "read-only": false, "driver": "qed", "file": "libvirt-1-storage", "backing": "libvirt-2-format"})
            .to_string(),
        "-device".to_owned(),
        json!({"driver": "virtio-blk-pci", "drive": "libvirt-1-format", "id": "virtio-disk0"}).to_string(),
        "-device".to_owned(),
        json!({"driver": "virtio-scsi-pci", "id": "scsi0"}).to_string(),
    ];
    let mut daemon = Daemon::spawn("headwater-qemu", Front::in_dir(dir.path()).words(words).command()?)?;
    drop(listener);
    let mut qmp = Qmp::connect(&monitor)?;
    let blocks = qmp.execute("query-block", json!({}))?;
    let inserted = &blocks[0]["inserted"];
    assert_eq!((&inserted["node-name"], &inserted["drv"]), (&json!("libvirt-1-format"), &json!("qed")), "{blocks:#}");
    assert_eq!(inserted["image"]["backing-image"]["filename"], json!(dir.path().join("base.raw")));
    let nodes = qmp.execute("query-named-block-nodes", json!({ "flat": true }))?;
    for node in ["libvirt-1-format", "libvirt-1-storage", "libvirt-2-format", "libvirt-2-storage"] {
        row(&nodes, "node-name", node)?;
    }
    let by_node = qmp.execute("query-blockstats", json!({ "query-nodes": true }))?;
    row(&by_node, "node-name", "libvirt-1-storage")?;

    let stream =
        json!({ "job-id": "pull-vda", "device": "libvirt-1-format", "auto-finalize": true, "auto-dismiss": false });
    qmp.execute("block-stream", stream)?;
    qmp.event_where(PATIENCE, |event| {
        event["event"] == "JOB_STATUS_CHANGE" && event["data"] == json!({ "status": "concluded", "id": "pull-vda" })
    })?;
    qmp.execute("job-dismiss", json!({ "id": "pull-vda" }))?;
    qmp.execute("blockdev-del", json!({ "node-name": "libvirt-2-format" }))?;
    qmp.execute("blockdev-del", json!({ "node-name": "libvirt-2-storage" }))?;

    // A disk comes and goes.
    qmp.execute("blockdev-add", file("libvirt-3-storage", &second))?;
    let format = json!({"node-name": "libvirt-3-format", "read-only": false, "driver": "qcow2", "file": "libvirt-3-storage", "backing": null});
    qmp.execute("blockdev-add", format)?;
    let device = json!({"driver": "scsi-hd", "bus": "scsi0.0", "drive": "libvirt-3-format", "id": "sdb"});
    let wrong = json!({"driver": "scsi-hd", "bus": "no-such-bus", "drive": "libvirt-3-format", "id": "sdb"});
    qmp.refused("device_add", wrong)?;
    // Once more from the start: it is let go of with its device.
    for _ in 0..2 {
        qmp.execute("device_add", device.clone())?;
        qmp.execute("device_del", json!({ "id": "sdb" }))?;
        qmp.event("DEVICE_DELETED")?;
        assert_eq!(qmp.execute("query-block", json!({}))?.as_array().map(Vec::len), Some(1));
    }
    qmp.execute("device_add", device)?;
    let blocks = qmp.execute("query-block", json!({}))?;
    let plugged =
        blocks.as_array().into_iter().flatten().find(|row| row["inserted"]["node-name"] == "libvirt-3-format");
    assert_eq!(plugged.map(|row| &row["inserted"]["drv"]), Some(&json!("qcow2")), "{blocks:#}");
    let refused = qmp.refused("blockdev-del", json!({ "node-name": "libvirt-3-format" }))?;
    assert!(refused.desc.contains("in use"), "{refused}");
    qmp.execute("device_del", json!({ "id": "sdb" }))?;
    qmp.event("DEVICE_DELETED")?;
    qmp.execute("blockdev-del", json!({ "node-name": "libvirt-3-format" }))?;
    qmp.execute("blockdev-del", json!({ "node-name": "libvirt-3-storage" }))?;
    assert_eq!(check(&second)?.code()?, 0);

    qmp.execute("quit", json!({}))?;
    assert!(daemon.exits()?.success(), "{}", daemon.log());
    check(&top)?.ok()?;
    assert_eq!(info(&top)?.get("backing-filename"), None);
    Ok(())
}

/// Descriptors go through the monitor to QEMU, with the command that they are for.
#[test]
fn descriptors_reach_qemu() -> Result {
    peer!("headwater", "qemu-system-x86_64", "qemu-img");
    let dir = tempfile::tempdir()?;
    overlay(dir.path(), "my.qed", "qed")?;
    let front = Front::in_dir(dir.path()).words(["-hda", "my.qed", "-S"]).start()?;
    let mut stream = UnixStream::connect(front.qmp_socket())?;
    stream.set_read_timeout(Some(PATIENCE))?;
    let mut answers = std::io::BufReader::new(stream.try_clone()?).lines();
    let mut answer = || -> Result<Value> { Ok(serde_json::from_str(&answers.next().ok_or("the end")??)?) };
    answer()?;
    // All at once: the descriptor is for the last of them.
    stream.write_all(b"{'execute': 'qmp_capabilities'} {'execute': 'query-status'}")?;
    let file = std::fs::File::open(dir.path().join("base.raw"))?;
    let mut space = [std::mem::MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    let fds = [file.as_fd()];
    control.push(SendAncillaryMessage::ScmRights(&fds));
    let add = IoSlice::new(b"{'execute': 'add-fd', 'arguments': {'fdset-id': 7}}");
    sendmsg(&stream, &[add], &mut control, SendFlags::empty())?;
    assert_eq!(answer()?["return"], json!({}));
    assert_eq!(answer()?["return"]["status"], "prelaunch");
    assert_eq!(answer()?["return"]["fdset-id"], 7);
    Ok(())
}

/// Neither migration nor snapshots of the whole machine, while a disk of it is ours; and it is told why.
#[test]
fn the_state_of_a_machine_is_not_moved_without_its_disks() -> Result {
    peer!("headwater", "qemu-system-x86_64", "qemu-img");
    let dir = tempfile::tempdir()?;
    overlay(dir.path(), "my.qcow2", "qcow2")?;
    let front = Front::in_dir(dir.path()).words(["-drive", "if=virtio,file=my.qcow2,id=d", "-S"]).start()?;
    let mut qmp = front.qmp()?;
    let moved = qmp.refused("migrate", json!({ "uri": "exec:cat >state" }))?;
    assert!(moved.desc.contains("Headwater serves disks of the machine ('d')"), "{moved}");
    let kept = json!({ "job-id": "s", "tag": "t", "vmstate": "d", "devices": ["d"] });
    assert!(qmp.refused("snapshot-save", kept)?.desc.contains("can keep no state of the machine"));
    for line in ["savevm t", "loadvm t", "migrate -d exec:cat"] {
        let said = qmp.execute("human-monitor-command", json!({ "command-line": line }))?;
        assert!(said.as_str().is_some_and(|text| text.starts_with("Error: ") && text.contains("('d')")), "{said}");
    }
    // What only asks is QEMU's.
    assert_eq!(qmp.execute("query-migrate", json!({}))?, json!({}));
    assert!(!dir.path().join("state").exists());
    qmp.execute("quit", json!({}))?;
    for option in ["-incoming", "-loadvm"] {
        let refused = Front::in_dir(dir.path()).words(["-drive", "if=virtio,file=my.qcow2", option, "defer"]);
        let refused = headwater_tests::process::finish(&mut refused.command()?)?;
        assert_eq!(refused.code()?, 1);
        assert!(refused.stderr.contains(&format!("{option} is not there")), "{}", refused.stderr);
    }
    Ok(())
}

#[test]
fn what_headwater_does_not_know_stays_qemus() -> Result {
    peer!("headwater", "qemu-system-x86_64", "qemu-img");
    let dir = tempfile::tempdir()?;
    overlay(dir.path(), "my.qcow2", "qcow2")?;
    std::fs::create_dir(dir.path().join("shared"))?;
    let words = ["-drive", "if=virtio,file=fat:shared,format=raw,id=fat,readonly=on", "-hda", "my.qcow2", "-S"];
    let front = Front::in_dir(dir.path()).words(words).start()?;
    let mut qmp = front.qmp()?;
    let blocks = qmp.execute("query-block", json!({}))?;
    assert_eq!(row(&blocks, "device", "ide0-hd0")?["inserted"]["drv"], "qcow2");
    assert_eq!(row(&blocks, "device", "fat")?["inserted"]["drv"], "raw");
    assert!(front.daemon.log().contains("drive 'fat' is left to QEMU"), "{}", front.daemon.log());
    // A job on it is QEMU's, and is refused in its words.
    let refused = qmp.refused("block-stream", json!({ "device": "nobody" }))?;
    assert!(refused.desc.contains("nobody"), "{refused}");
    qmp.execute("quit", json!({}))?;
    Ok(())
}

#[test]
fn an_image_that_is_not_there_is_an_error_before_anything_runs() -> Result {
    peer!("headwater", "qemu-system-x86_64");
    let dir = tempfile::tempdir()?;
    let front = Front::in_dir(dir.path()).words(["-drive", "if=virtio,file=nothing.qed"]);
    let finished = headwater_tests::process::finish(&mut front.command()?)?;
    assert_eq!(finished.code()?, 1);
    assert!(
        finished.stderr.contains("headwater-qemu: ") && finished.stderr.contains("nothing.qed"),
        "{}",
        finished.stderr
    );
    // QEMU's own refusal, and its code.
    overlay(dir.path(), "my.qed", "qed")?;
    let front = Front::in_dir(dir.path()).words(["-hda", "my.qed", "-device", "no-such-device"]);
    let finished = headwater_tests::process::finish(&mut front.command()?)?;
    assert_eq!(finished.code()?, 1);
    assert!(finished.stderr.contains("no-such-device"), "{}", finished.stderr);
    Ok(())
}

#[test]
fn a_qemu_that_is_killed_ends_headwater_in_good_order() -> Result {
    peer!("headwater", "qemu-system-x86_64", "qemu-img");
    let dir = tempfile::tempdir()?;
    let top = overlay(dir.path(), "my.qcow2", "qcow2")?;
    let words = ["-drive", "if=virtio,file=my.qcow2,id=d", "-S"];
    let mut front = Front::in_dir(dir.path()).words(words).start()?;
    let mut qmp = front.qmp()?;
    qmp.execute("block-stream", json!({ "device": "d", "speed": 1 << 20 }))?;
    kill_process(front.emulator()?, Signal::KILL)?;
    qmp.event("BLOCK_JOB_CANCELLED")?;
    assert_eq!(front.daemon.exits()?.code(), Some(137), "{}", front.daemon.log());
    check(&top)?.ok()?;
    assert!(info(&top)?.get("backing-filename").is_some(), "the stream was not through");
    assert!(!dir.path().join("front.qmp").exists(), "the monitor's socket is gone");
    Ok(())
}

#[test]
fn signals_are_handed_on() -> Result {
    peer!("headwater", "qemu-system-x86_64", "qemu-img");
    let dir = tempfile::tempdir()?;
    let top = overlay(dir.path(), "my.qed", "qed")?;
    let words = ["-drive", "if=virtio,file=my.qed,snapshot=on,stream=on", "-S"];
    let mut front = Front::in_dir(dir.path()).words(words).start()?;
    let emulator = front.emulator()?;
    let mut qmp = front.qmp()?;
    front.daemon.signal(Signal::TERM)?;
    assert_eq!(qmp.event("SHUTDOWN")?["reason"], "host-signal");
    assert!(front.daemon.exits()?.success(), "{}", front.daemon.log());
    assert!(!front::runs(emulator));
    // What was written, and streamed, is not in the image.
    assert!(info(&top)?.get("backing-filename").is_some());
    Ok(())
}

#[test]
fn into_the_background_with_a_pidfile() -> Result {
    peer!("headwater", "qemu-system-x86_64", "qemu-img");
    let dir = tempfile::tempdir()?;
    let top = overlay(dir.path(), "my.qed", "qed")?;
    let qmp = "unix:bg.qmp,server=on,wait=off";
    let words = ["-hda", "my.qed", "-S", "-pidfile", "bg.pid", "-daemonize", "-qmp", qmp];
    let front = Front::in_dir(dir.path()).words(words);
    headwater_tests::process::finish(&mut front.command()?)?.ok()?;
    let number: i32 = std::fs::read_to_string(dir.path().join("bg.pid"))?.trim().parse()?;
    let pid = rustix::process::Pid::from_raw(number).ok_or("no number")?;
    assert!(std::fs::read_to_string(format!("/proc/{number}/comm"))?.starts_with("headwater"));
    assert_eq!(Qmp::connect(&dir.path().join("bg.qmp"))?.execute("query-status", json!({}))?["status"], "prelaunch");
    kill_process(pid, Signal::TERM)?;
    let began = Instant::now();
    while front::runs(pid) {
        assert!(began.elapsed() < PATIENCE, "it goes on");
        std::thread::sleep(Duration::from_millis(10));
    }
    assert!(!dir.path().join("bg.pid").exists());
    check(&top)?.ok()?;
    Ok(())
}

/// Somebody else's client.
const SCRIPT: &str = r#"
import asyncio, sys
from qemu.qmp import QMPClient

async def main(socket):
    client = QMPClient("joined")
    await client.connect(socket)
    devices = {d["device"]: d for d in await client.execute("query-block")}
    assert devices["virtio0"]["inserted"]["drv"] == "qed", devices
    with client.listener("BLOCK_JOB_COMPLETED") as listener:
        await client.execute("block_stream", {"device": "virtio0"})
        event = await asyncio.wait_for(listener.get(), 30)
        assert event["data"]["offset"] == event["data"]["len"], event
    await client.execute("cont")
    assert (await client.execute("query-status"))["running"]
    await client.execute("quit")
    try:
        await client.disconnect()
    except EOFError:
        pass
    print("done")

asyncio.run(main(sys.argv[1]))
"#;

#[test]
fn the_python_client_speaks_to_both() -> Result {
    peer!("headwater", "qemu-system-x86_64", "qemu-img", "qemu.qmp");
    let dir = tempfile::tempdir()?;
    overlay(dir.path(), "my.qed", "qed")?;
    let mut front = Front::in_dir(dir.path()).words(["-drive", "if=virtio,file=my.qed", "-S"]).start()?;
    let args = [OsStr::new("-c"), OsStr::new(SCRIPT), front.qmp_socket().as_os_str()];
    assert_eq!(run(peer::python()?, args)?.ok()?.trim(), "done");
    assert!(front.daemon.exits()?.success());
    Ok(())
}
