//! The monitor driven by the public Python package `qemu.qmp`: somebody else's client, with somebody else's reading of QMP.

use std::ffi::OsStr;

use headwater_tests::headwater::{Headwater, headwater};
use headwater_tests::process::run;
use headwater_tests::qemu::info;
use headwater_tests::random::Random;
use headwater_tests::{Result, peer};

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
