//! Trace points: chosen on the command line and while the daemon runs; what fails tells how.

use headwater_tests::process::{Daemon, finish};
use headwater_tests::qemu::qemu_io;
use headwater_tests::qmp::Qmp;
use headwater_tests::sides::master;
use headwater_tests::{Result, peer};
use serde_json::json;
use std::fs;
use std::process::Command;

#[test]
fn what_happens_is_told_by_those_points_that_are_on() -> Result {
    peer!("headwater", "qemu-img", "qemu-io");
    let dir = tempfile::tempdir()?;
    let at = |name: &str| dir.path().join(name);
    master(&at("base.raw"), 1 << 20, 3)?;
    finish(Command::new("qemu-img").args("create -q -f qcow2 -b base.raw -F raw top".split(' ')).current_dir(&dir))?
        .ok()?;
    fs::write(at("events"), "# what jobs do\njob_*\n")?;
    let (log, nbd) = (at("log").display().to_string(), at("nbd").display().to_string());
    let mut command = Command::new(peer::headwater()?);
    command.current_dir(&dir).arg("storage-daemon");
    command.args(["--trace", &format!("disk_request*,events={},file={log}", at("events").display())]);
    command.args(["--trace", "no_such_thing"]);
    for node in [
        r#"{"driver": "file", "node-name": "f", "filename": "base.raw"}"#,
        r#"{"driver": "blkdebug", "node-name": "d", "image": "f", "inject-error": [{"event": "none", "iotype": "read", "sector": 1024}]}"#,
        r#"{"driver": "raw", "node-name": "b", "file": "d"}"#,
        r#"{"driver": "qcow2", "node-name": "t", "file": {"driver": "file", "filename": "top"}, "backing": "b"}"#,
    ] {
        command.args(["--blockdev", node]);
    }
    command.args([
        "--nbd-server",
        &format!("addr.type=unix,addr.path={nbd}"),
        "--export",
        "nbd,id=e,node-name=t,writable=on",
    ]);
    let qmp = format!("socket,id=m,path={},server=on,wait=off", at("qmp").display());
    command.args(["--chardev", &qmp, "--monitor", "m"]);
    let mut daemon = Daemon::spawn("trace", command)?;
    daemon.listening(&at("qmp"))?;
    assert!(daemon.log().contains("trace event 'no_such_thing' does not exist"), "{}", daemon.log());
    let mut qmp = Qmp::connect(&at("qmp"))?;
    let read = || {
        let url = format!("nbd+unix:///t?socket={nbd}");
        finish(Command::new("qemu-io").args(["-r", "-f", "raw", "-c", "read 64k 4k", &url]))?.ok()
    };
    let count = |what: &str| Ok::<_, std::io::Error>(fs::read_to_string(&log)?.matches(what).count());

    read()?;
    let begun = count("TRACE disk_request: ")?;
    assert!(begun > 0 && count("what=\"read\"")? > 0 && count("TRACE disk_request_done: ")? > 0);
    assert_eq!(count("TRACE disk_fetch")?, 0);

    // Off again: nothing more is told.
    qmp.command("trace-event-set-state", json!({ "name": "disk_*", "enable": false }))??;
    let states = qmp.command("trace-event-get-state", json!({ "name": "disk_request" }))??;
    assert_eq!(states, json!([{ "name": "disk_request", "state": "disabled" }]));
    read()?;
    assert_eq!(count("TRACE disk_request: ")?, begun);
    let refused = qmp.command("trace-event-get-state", json!({ "name": "nope" }))?.unwrap_err();
    assert_eq!(refused.desc, "unknown event \"nope\"");

    // The path of an error: a fetch that fails, what the job makes of it, and how it ends.
    qmp.command("trace-event-set-state", json!({ "name": "disk_fetch_f*", "enable": true }))??;
    qmp.command("block-stream", json!({ "device": "t", "job-id": "j", "on-error": "report" }))??;
    qmp.event("BLOCK_JOB_COMPLETED")?;
    assert!(count("TRACE disk_fetch_failed: ")? > 0);
    assert!(count("TRACE job_error: job=\"j\" write=false action=\"report\"")? == 1);
    assert!(count("TRACE job_status: job=\"j\" from=running to=aborting")? == 1, "{}", fs::read_to_string(&log)?);

    // People choose, too.
    let say = |qmp: &mut Qmp, line: &str| qmp.command("human-monitor-command", json!({ "command-line": line }));
    say(&mut qmp, "trace-event disk_request on")??;
    let told = say(&mut qmp, "info trace-events disk_r*")??;
    assert_eq!(
        told,
        "disk_request : state 1\r\ndisk_request_done : state 0\r\ndisk_request_failed : state 0\r\ndisk_request_held : state 0\r\n"
    );
    qmp.command("quit", json!({}))??;
    daemon.exits()?;
    qemu_io("qcow2", &at("top"), &["read 0 64k"])?;
    Ok(())
}
