//! The monitors driven by the public Python package `qemu.qmp`, and by its `qmp-shell`: somebody else's client, with somebody else's
//! reading of QMP.

use std::ffi::OsStr;
use std::io::Write as _;
use std::path::Path;
use std::process::{Command, Stdio};

use headwater_tests::headwater::{Headwater, headwater};
use headwater_tests::process::run;
use headwater_tests::qemu::{info, qemu_img};
use headwater_tests::random::Random;
use headwater_tests::storage::{Kind, Storage};
use headwater_tests::{Result, error, peer};

/// Streams with events, two clients at a time, errors as exceptions.
const SCRIPT: &str = r#"
import asyncio, sys
from qemu.qmp import QMPClient, EventListener
from qemu.qmp.qmp_client import ExecuteError

async def main(socket):
    first, second = QMPClient("first"), QMPClient("second")
    await first.connect(socket)
    await second.connect(socket)
    version = await first.execute("query-version")
    assert "qemu" in version, version
    names = [c["name"] for c in await first.execute("query-commands")]
    for name in ("block_stream", "block-stream", "query-block-jobs", "job-cancel", "quit", "query-block"):
        assert name in names, (name, names)
    try:
        await first.execute("block-stream", {"device": "nobody"})
        raise SystemExit("a stream of nobody's disk was started")
    except ExecuteError as error:
        assert "nobody" in str(error), error
    devices = [d["device"] for d in await second.execute("query-block")]
    assert devices == ["my"], devices
    ended = ("BLOCK_JOB_COMPLETED", "BLOCK_JOB_CANCELLED")
    with first.listener(ended) as mine, second.listener(ended) as theirs:
        await first.execute("block-stream", {"job-id": "s", "device": "my", "speed": 65536})
        jobs = await second.execute("query-block-jobs")
        assert jobs[0]["device"] == "s" and jobs[0]["type"] == "stream", jobs
        await second.execute("block-job-cancel", {"device": "s"})
        for listener in (mine, theirs):
            event = await asyncio.wait_for(listener.get(), 30)
            assert event["event"] == "BLOCK_JOB_CANCELLED", event
        await second.execute("block_stream", {"device": "my"})
        for listener in (mine, theirs):
            event = await asyncio.wait_for(listener.get(), 30)
            assert event["event"] == "BLOCK_JOB_COMPLETED" and "error" not in event["data"], event
            assert event["data"]["offset"] == event["data"]["len"], event
    await second.disconnect()
    await first.execute("quit")
    try:
        await first.disconnect()
    except EOFError:
        pass  # The daemon has hung up, as it was told to.
    print("done")

asyncio.run(main(sys.argv[1]))
"#;

#[test]
fn the_python_client_streams() -> Result {
    peer!("headwater", "qemu-img", "qemu.qmp");
    let dir = tempfile::tempdir()?;
    let mut bytes = vec![0; 16 << 20];
    Random::new(4).fill(&mut bytes);
    std::fs::write(dir.path().join("base.raw"), bytes)?;
    let top = dir.path().join("my.qed");
    let args = ["create", "-q", "-f", "qed", "-b", "base.raw", "-F", "raw"].map(OsStr::new);
    headwater(args.into_iter().chain([top.as_os_str()]))?.ok()?;
    let mut server = Headwater::serve(dir.path()).image(&top).start()?;
    let socket = server.qmp_socket().to_path_buf();
    let python = peer::python()?;
    let said = run(&python, [OsStr::new("-c"), OsStr::new(SCRIPT), socket.as_os_str()])?.ok()?;
    assert_eq!(said.trim(), "done");
    assert!(server.daemon.exits()?.success());
    assert_eq!(info(&top)?.get("backing-filename"), None);
    Ok(())
}

/// What `qmp-shell` says to these lines, one line an answer, without its welcome.
fn shell(dir: &Path, options: &[&str], lines: &[&str]) -> Result<String> {
    let program = peer::python()?.with_file_name("qmp-shell");
    let mut command = Command::new(program);
    // It keeps what was typed in a file at home.
    command.args(options).arg("qmp.sock").current_dir(dir).env("HOME", dir);
    let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn()?;
    let mut input = child.stdin.take().ok_or("no input")?;
    input.write_all((lines.join("\n") + "\n").as_bytes())?;
    drop(input);
    let output = child.wait_with_output()?;
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    if !output.status.success() {
        return Err(error!("qmp-shell: {}\n{said}\n{}", output.status, String::from_utf8_lossy(&output.stderr)));
    }
    let begin = said.find("(QEMU)").ok_or_else(|| error!("no prompt: {said}"))?;
    Ok(said[begin..].replace("(QEMU) ", ""))
}

/// A storage daemon with an overlay over a raw master.
fn with_an_overlay(kind: Kind, dir: &Path) -> Result<Storage> {
    let mut bytes = vec![0; 8 << 20];
    Random::new(4).fill(&mut bytes);
    std::fs::write(dir.join("base.raw"), bytes)?;
    let (base, top) = (dir.join("base.raw"), dir.join("top.qcow2"));
    let args = ["create", "-q", "-f", "qcow2", "-F", "raw", "-b"].map(OsStr::new);
    qemu_img(args.into_iter().chain([base.as_os_str(), top.as_os_str()]))?.ok()?;
    let node = "driver=qcow2,node-name=top,file.driver=file,file.filename=top.qcow2";
    Storage::start(kind, dir, ["--blockdev", node])
}

/// Typed by somebody at `qmp-shell`, the same lines have the same answers from both daemons.
#[test]
fn a_storage_daemon_is_steered_by_qmp_shell() -> Result {
    peer!("headwater", "qemu-storage-daemon", "qemu-img", "qemu.qmp");
    let mut answers = Vec::new();
    for kind in Kind::ALL {
        let dir = tempfile::tempdir()?;
        let mut daemon = with_an_overlay(kind, dir.path())?;
        // QEMU's serves one client at a time.
        drop(std::mem::replace(&mut daemon.qmp, headwater_tests::qmp::Qmp::nobody()?));
        let lines = [
            "nonsense",
            "blockdev-add driver=null-co node-name=n size=1048576 read-zeroes=true",
            "blockdev-add driver=null-co node-name=n",
            "blockdev-add driver=raw node-name=r file=n",
            "blockdev-del node-name=r",
            "blockdev-del node-name=n",
            "block-stream device=top job-id=j speed=65536 auto-dismiss=false",
            "block-job-pause device=j",
            "block-job-set-speed device=j speed=0",
            "block-job-resume device=j",
            "block-stream device=nobody",
            "query-jobs id=j",
        ];
        answers.push(shell(dir.path(), &[], &lines)?);
        let pretty = shell(dir.path(), &["-v", "-p"], &["block-job-resume device=j"])?;
        assert!(pretty.contains("{\n    \"arguments\": {\n        \"device\": \"j\""), "{pretty}");
        while !shell(dir.path(), &[], &["query-jobs"])?.contains("concluded") {}
        assert!(shell(dir.path(), &[], &["job-dismiss id=j", "query-jobs"])?.contains("{\"return\": []}"));
        daemon.daemon.terminate()?;
        assert_eq!(info(&dir.path().join("top.qcow2"))?.get("backing-filename"), None);
    }
    assert_eq!(answers[0], answers[1]);
    assert_eq!(answers[0].matches("\"return\"").count(), 8, "{}", answers[0]);
    Ok(())
}

/// Its mode for people, for which QEMU's storage daemon has no monitor.
#[test]
fn qmp_shell_speaks_for_people_too() -> Result {
    peer!("headwater", "qemu-img", "qemu.qmp");
    let dir = tempfile::tempdir()?;
    let daemon = with_an_overlay(Kind::Ours, dir.path())?;
    let said = shell(dir.path(), &["-H"], &["info block-jobs", "info version", "block_stream nobody", "help"])?;
    for text in ["No active jobs", "Headwater", "Cannot find device='nobody'", "block_job_set_speed"] {
        assert!(said.contains(text), "{text}: {said}");
    }
    daemon.end()
}
