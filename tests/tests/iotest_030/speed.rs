//! Streams at a rate, from the start or set later, and streams that are cancelled.

use std::time::Duration;

use headwater_tests::storage::Storage;
use headwater_tests::{Result, peer};
use serde_json::json;

use crate::{MIB, World, everywhere, nothing_runs, raw_node};

/// A sparse `base.raw` with 32 MiB, below `test`, which has the next 32 MiB itself.
fn start(world: &World, size: u64) -> Result<Storage> {
    std::fs::File::create(world.at("base.raw"))?.set_len(size)?;
    world.io("raw", "base.raw", "write -P 0x1 0 32M")?;
    world.overlay("test", "base.raw", "raw", None)?;
    world.io(world.format, "test", "write -P 0x1 32M 32M")?;
    world.start(&world.node("drive0", "test", Some(raw_node("base", "base.raw"))))
}

/// Cancels the job and waits until it is gone; what it left is as good as before.
fn cancel(daemon: &mut Storage) -> Result {
    daemon.does("block-job-cancel", json!({"device": "drive0"}))?;
    let done = daemon.ended("drive0")?;
    assert_eq!((&done["event"], &done["type"]), (&json!("BLOCK_JOB_CANCELLED"), &json!("stream")), "{done}");
    daemon.gone("drive0")?;
    nothing_runs(daemon)
}

/// A job that is slow says nothing but how its state changes, and is cancelled at once.
#[test]
fn a_stream_is_cancelled() -> Result {
    peer!("headwater", "qemu-storage-daemon", "qemu-img", "qemu-io");
    everywhere(|world| {
        let mut daemon = start(world, 8 << 30)?;
        nothing_runs(&mut daemon)?;
        daemon.does("block-stream", json!({"device": "drive0", "job-id": "drive0", "speed": 65536}))?;
        std::thread::sleep(Duration::from_millis(100));
        for event in daemon.qmp.drain() {
            assert_eq!((&event["event"], &event["data"]["id"]), (&json!("JOB_STATUS_CHANGE"), &json!("drive0")));
        }
        let began = std::time::Instant::now();
        cancel(&mut daemon)?;
        assert!(began.elapsed() < Duration::from_secs(5));
        daemon.end()?;
        assert_eq!(world.backing("test")?.as_deref(), Some("base.raw"));
        headwater_tests::qemu::check(&world.at("test"))?.ok()?;
        headwater_tests::qemu::compare(&world.at("base.raw"), &world.at("test"))?.code()?;
        Ok(())
    })
}

#[test]
fn a_rate_is_set() -> Result {
    peer!("headwater", "qemu-storage-daemon", "qemu-img", "qemu-io");
    everywhere(|world| {
        let mut daemon = start(world, 80 * MIB)?;
        let speed = |daemon: &mut Storage| -> Result<_> {
            let job = daemon.jobs()?[0].clone();
            assert_eq!(job["device"], "drive0", "{job}");
            Ok(job["speed"].clone())
        };
        // None is 0; it waits for a word to publish, so that it is there to be asked.
        let waits = json!({"device": "drive0", "job-id": "drive0", "auto-finalize": false});
        daemon.does("block-stream", waits)?;
        assert_eq!(speed(&mut daemon)?, 0);
        daemon.does("job-cancel", json!({"id": "drive0"}))?;
        daemon.ended("drive0")?;
        daemon.gone("drive0")?;
        daemon.end()?;

        let mut daemon = start(world, 80 * MIB)?;
        daemon.does("block-stream", json!({"device": "drive0", "job-id": "drive0", "speed": 4 * MIB}))?;
        assert_eq!(speed(&mut daemon)?, 4 * MIB);
        daemon.does("block-job-set-speed", json!({"device": "drive0", "speed": 8 * MIB}))?;
        assert_eq!(speed(&mut daemon)?, 8 * MIB);
        cancel(&mut daemon)?;
        daemon.end()
    })
}

#[test]
fn a_rate_below_zero_is_refused() -> Result {
    peer!("headwater", "qemu-storage-daemon", "qemu-img", "qemu-io");
    everywhere(|world| {
        let mut daemon = start(world, 80 * MIB)?;
        let text = "Parameter 'speed' expects a non-negative value";
        let stream = |speed: i64| json!({"device": "drive0", "job-id": "drive0", "speed": speed});
        assert_eq!(daemon.refuses("block-stream", stream(-1))?, text);
        nothing_runs(&mut daemon)?;
        daemon.does("block-stream", stream(65536))?;
        let set = json!({"device": "drive0", "speed": -1});
        assert_eq!(daemon.refuses("block-job-set-speed", set)?, text);
        assert_eq!(daemon.jobs()?[0]["speed"], 65536);
        cancel(&mut daemon)?;
        daemon.end()
    })
}
