//! A source that fails once, under each policy.

use std::time::Duration;

use headwater_tests::storage::Storage;
use headwater_tests::{Result, peer};
use serde_json::{Value, json};

use crate::{MIB, World, everywhere, nothing_runs};

const SIZE: u64 = 2 * MIB;

/// Where the source fails: where QEMU's job reads its second chunk.
const BROKEN: u64 = 512 << 10;

/// An overlay on a file of which one read fails with `errno`, once, at [`BROKEN`].
fn start(world: &World, errno: u32) -> Result<Storage> {
    world.raw("base.raw", SIZE)?;
    let rules = format!(
        "[inject-error]\nstate = \"1\"\nevent = \"read_aio\"\nerrno = \"{errno}\"\nimmediately = \"off\"\nonce = \"on\"\n\
         sector = \"{}\"\n[set-state]\nstate = \"1\"\nevent = \"read_aio\"\nnew_state = \"2\"\n\
         [set-state]\nstate = \"2\"\nevent = \"read_aio\"\nnew_state = \"1\"\n",
        BROKEN / 512
    );
    std::fs::write(world.at("rules"), rules)?;
    let source = format!("blkdebug:{}:{}", world.at("rules").display(), world.at("base.raw").display());
    world.overlay("test", &source, "raw", None)?;
    world.start(&world.node("drive0", "test", None))
}

fn stream(daemon: &mut Storage, policy: &str) -> Result {
    nothing_runs(daemon)?;
    daemon.does("block-stream", json!({"device": "drive0", "job-id": "drive0", "on-error": policy}))?;
    let met = daemon.qmp.event("BLOCK_JOB_ERROR")?;
    assert_eq!((&met["device"], &met["operation"]), (&json!("drive0"), &json!("read")), "{met}");
    Ok(())
}

/// The job has ended with the error; how far it says it came.
fn failed(daemon: &mut Storage, text: &str) -> Result<u64> {
    let done = daemon.ended("drive0")?;
    assert_eq!(done["event"], "BLOCK_JOB_COMPLETED", "{done}");
    assert_eq!((&done["type"], &done["error"]), (&json!("stream"), &json!(text)), "{done}");
    assert_eq!(done["len"], SIZE, "{done}");
    daemon.gone("drive0")?;
    nothing_runs(daemon)?;
    Ok(done["offset"].as_u64().unwrap_or(u64::MAX))
}

/// `report`, and `enospc` where it is another error: the job ends where it met the error.
#[test]
fn an_error_that_is_reported_ends_the_stream() -> Result {
    peer!("headwater", "qemu-storage-daemon", "qemu-img", "qemu-io");
    everywhere(|world| {
        for policy in ["report", "enospc"] {
            let mut daemon = start(world, 5)?;
            stream(&mut daemon, policy)?;
            assert_eq!(failed(&mut daemon, "Input/output error")?, BROKEN, "{policy}");
            daemon.end()?;
            assert!(world.backing("test")?.is_some());
        }
        Ok(())
    })
}

/// `ignore`: it goes on, and ends with the error; the backing file is kept.
#[test]
fn an_error_that_is_ignored_is_told_at_the_end() -> Result {
    peer!("headwater", "qemu-storage-daemon", "qemu-img", "qemu-io");
    everywhere(|world| {
        let mut daemon = start(world, 5)?;
        stream(&mut daemon, "ignore")?;
        if let Some(job) = daemon.jobs()?.first() {
            let status = job["status"].as_str().unwrap_or_default();
            assert!(["running", "pending", "aborting", "concluded"].contains(&status), "{job}");
        }
        assert_eq!(failed(&mut daemon, "Input/output error")?, SIZE);
        daemon.end()?;
        assert!(world.backing("test")?.is_some());
        Ok(())
    })
}

/// The stream waits, says for what, and goes on when it is told to.
fn waits_and_goes_on(world: &World, errno: u32, policy: &str, io_status: &str) -> Result {
    let mut daemon = start(world, errno)?;
    stream(&mut daemon, policy)?;
    if daemon.jobs()?[0]["status"] != "paused" {
        let is_paused = |event: &Value| event["data"]["id"] == "drive0" && event["data"]["status"] == "paused";
        daemon.qmp.event_where(Duration::from_secs(30), is_paused)?;
    }
    let job = daemon.jobs()?[0].clone();
    assert_eq!((&job["status"], &job["io-status"]), (&json!("paused"), &json!(io_status)), "{job}");
    assert_eq!(job["offset"], BROKEN, "{job}");
    daemon.does("block-job-resume", json!({"device": "drive0"}))?;
    if let Some(job) = daemon.jobs()?.first() {
        let status = job["status"].as_str().unwrap_or_default();
        assert!(["running", "pending", "aborting", "concluded"].contains(&status), "{job}");
        assert_eq!(job["io-status"], "ok", "{job}");
    }
    let done = daemon.completed("drive0")?;
    assert_eq!((&done["offset"], &done["len"]), (&json!(SIZE), &json!(SIZE)), "{done}");
    nothing_runs(&mut daemon)?;
    daemon.end()?;
    assert_eq!(world.backing("test")?, None);
    world.sound("test", &std::fs::read(world.at("base.raw"))?)
}

#[test]
fn an_error_stops_the_stream_until_it_is_resumed() -> Result {
    peer!("headwater", "qemu-storage-daemon", "qemu-img", "qemu-io");
    everywhere(|world| waits_and_goes_on(world, 5, "stop", "failed"))
}

#[test]
fn out_of_space_stops_the_stream_until_it_is_resumed() -> Result {
    peer!("headwater", "qemu-storage-daemon", "qemu-img", "qemu-io");
    everywhere(|world| waits_and_goes_on(world, 28, "enospc", "nospace"))
}
