//! One chain of three: streamed whole, in its middle, down to a base; and what is refused.

use std::time::Duration;

use headwater_tests::nbd::Client;
use headwater_tests::storage::Storage;
use headwater_tests::{Result, peer};
use serde_json::json;

use crate::{MIB, World, everywhere, nothing_runs, raw_node};

/// `base.raw` below `mid`, which has a sector of its own, below an empty `test`; what the disk reads as.
fn chain(world: &World) -> Result<Vec<u8>> {
    world.raw("base.raw", MIB)?;
    world.overlay("mid", "base.raw", "raw", None)?;
    world.overlay("test", "mid", world.format, None)?;
    world.io("raw", "base.raw", "write -P 0x1 0 512")?;
    world.io(world.format, "mid", "write -P 0x1 524288 512")?;
    let mut disk = std::fs::read(world.at("base.raw"))?;
    disk[524_288..524_800].fill(1);
    Ok(disk)
}

fn start(world: &World) -> Result<Storage> {
    let mid = world.node("mid", "mid", Some(raw_node("base", "base.raw")));
    world.start(&world.node("drive0", "test", Some(mid)))
}

/// What a guest reads of the whole disk, while or after jobs were at work.
fn guest_reads(world: &World) -> Result<Vec<u8>> {
    let mut guest = Client::connect(&world.at("nbd.sock"))?;
    let read = guest.read(0, u32::try_from(guest.size())?)?;
    guest.disconnect()?;
    Ok(read)
}

#[test]
fn a_whole_chain_is_streamed() -> Result {
    peer!("headwater", "qemu-storage-daemon", "qemu-img", "qemu-io");
    everywhere(|world| {
        let disk = chain(world)?;
        let mut daemon = start(world)?;
        nothing_runs(&mut daemon)?;
        daemon.does("block-stream", json!({"device": "drive0", "job-id": "drive0"}))?;
        let done = daemon.completed("drive0")?;
        assert_eq!((&done["type"], &done["offset"]), (&json!("stream"), &done["len"]), "{done}");
        nothing_runs(&mut daemon)?;
        assert!(guest_reads(world)? == disk);
        daemon.end()?;
        assert_eq!(world.map("raw", "base.raw")?, world.map(world.format, "test")?);
        assert_eq!(world.backing("test")?, None);
        world.sound("test", &disk)
    })
}

/// Into the middle of a chain whose top a guest has.
#[test]
fn the_middle_of_a_chain_is_streamed() -> Result {
    peer!("headwater", "qemu-storage-daemon", "qemu-img", "qemu-io");
    everywhere(|world| {
        let disk = chain(world)?;
        assert_ne!(world.map("raw", "base.raw")?, world.map(world.format, "mid")?);
        let mut daemon = start(world)?;
        assert!(guest_reads(world)? == disk);
        daemon.does("block-stream", json!({"device": "mid", "job-id": "stream-mid"}))?;
        daemon.completed("stream-mid")?;
        nothing_runs(&mut daemon)?;
        assert!(guest_reads(world)? == disk);
        daemon.end()?;
        assert_eq!(world.map("raw", "base.raw")?, world.map(world.format, "mid")?);
        assert_eq!((world.backing("mid")?, world.backing("test")?), (None, Some("mid".into())));
        world.sound("mid", &disk)?;
        world.sound("test", &disk)
    })
}

#[test]
fn a_paused_stream_stands_still() -> Result {
    peer!("headwater", "qemu-storage-daemon", "qemu-img", "qemu-io");
    everywhere(|world| {
        let disk = chain(world)?;
        let mut daemon = start(world)?;
        daemon.does("block-stream", json!({"device": "drive0", "job-id": "drive0", "speed": 65536}))?;
        daemon.does("block-job-pause", json!({"device": "drive0"}))?;
        daemon.qmp.event_where(Duration::from_secs(30), |event| event["data"]["status"] == "paused")?;
        let before = daemon.jobs()?[0].clone();
        assert_eq!((&before["status"], &before["paused"]), (&json!("paused"), &json!(true)), "{before}");
        std::thread::sleep(Duration::from_millis(500));
        assert_eq!(daemon.jobs()?[0]["offset"], before["offset"]);
        let again = daemon.refuses("block-job-pause", json!({"device": "drive0"}))?;
        assert_eq!(again, "Job is already paused");
        daemon.does("block-job-resume", json!({"device": "drive0"}))?;
        daemon.does("block-job-set-speed", json!({"device": "drive0", "speed": 0}))?;
        daemon.completed("drive0")?;
        nothing_runs(&mut daemon)?;
        daemon.end()?;
        assert_eq!(world.map("raw", "base.raw")?, world.map(world.format, "test")?);
        world.sound("test", &disk)
    })
}

/// With the image right below as the base there is nothing to copy.
#[test]
fn nothing_is_copied_from_above_the_base() -> Result {
    peer!("headwater", "qemu-storage-daemon", "qemu-img", "qemu-io");
    everywhere(|world| {
        let disk = chain(world)?;
        let empty = world.map(world.format, "test")?;
        let mut daemon = start(world)?;
        daemon.does("block-stream", json!({"device": "drive0", "job-id": "drive0", "base": "mid"}))?;
        daemon.completed("drive0")?;
        nothing_runs(&mut daemon)?;
        daemon.end()?;
        assert_eq!(world.map(world.format, "test")?, empty);
        assert_eq!(world.backing("test")?.as_deref(), Some("mid"));
        world.sound("test", &disk)
    })
}

/// Down to a base: by its file, by its node, or by the node right above it.
#[test]
fn a_part_of_a_chain_is_streamed() -> Result {
    peer!("headwater", "qemu-storage-daemon", "qemu-img", "qemu-io");
    everywhere(|world| {
        for base in [json!({"base": "base.raw"}), json!({"base-node": "base"}), json!({"bottom": "mid"})] {
            let disk = chain(world)?;
            let mut daemon = start(world)?;
            let mut stream = json!({"device": "drive0", "job-id": "drive0"});
            stream.as_object_mut().into_iter().for_each(|to| to.extend(base.as_object().cloned().unwrap_or_default()));
            daemon.does("block-stream", stream)?;
            daemon.completed("drive0")?;
            nothing_runs(&mut daemon)?;
            assert!(guest_reads(world)? == disk);
            daemon.end()?;
            assert_eq!(world.map(world.format, "mid")?, world.map(world.format, "test")?, "{base}");
            assert_eq!(world.backing("test")?.as_deref(), Some("base.raw"), "{base}");
            world.sound("test", &disk)?;
        }
        Ok(())
    })
}

#[test]
fn streams_that_make_no_sense_are_refused() -> Result {
    peer!("headwater", "qemu-storage-daemon", "qemu-img", "qemu-io");
    everywhere(|world| {
        chain(world)?;
        let mut daemon = start(world)?;
        let mut said = |arguments| daemon.refuses("block-stream", arguments);
        assert_eq!(
            said(json!({"device": "nonexistent"}))?,
            "Cannot find device='nonexistent' nor node-name='nonexistent'"
        );
        assert_eq!(said(json!({"device": "mid"}))?, "Invalid job ID ''");
        assert_eq!(said(json!({"device": "mid", "job-id": "1"}))?, "Invalid job ID '1'");
        assert_eq!(said(json!({}))?, "Parameter 'device' is missing");
        assert_eq!(said(json!({"device": "mid", "job-id": "j", "nonsense": 1}))?, "Parameter 'nonsense' is unexpected");
        assert_eq!(
            said(json!({"device": "drive0", "job-id": "j", "base": "none.raw"}))?,
            "Can't find 'none.raw' in the backing chain"
        );
        assert_eq!(
            said(json!({"device": "drive0", "job-id": "j", "backing-file": "b"}))?,
            "backing file specified, but streaming the entire chain"
        );
        assert_eq!(
            said(json!({"device": "drive0", "job-id": "j", "bottom": "none"}))?,
            "Cannot find device='' nor node-name='none'"
        );
        assert_eq!(
            said(json!({"device": "drive0", "job-id": "j", "bottom": "mid", "base": "base.raw"}))?,
            "'base' and 'bottom' cannot be specified at the same time"
        );
        assert_eq!(
            said(json!({"device": "drive0", "job-id": "j", "bottom": "mid", "base-node": "base"}))?,
            "'bottom' and 'base-node' cannot be specified at the same time"
        );
        nothing_runs(&mut daemon)?;
        daemon.end()
    })
}

/// Two jobs may not have one name, and a job's name can be had again when it is gone.
#[test]
fn names_of_jobs_are_each_ones_own() -> Result {
    peer!("headwater", "qemu-storage-daemon", "qemu-img", "qemu-io");
    everywhere(|world| {
        chain(world)?;
        world.overlay("other", "base.raw", "raw", None)?;
        let mut daemon = start(world)?;
        daemon.does("blockdev-add", world.node("other", "other", None))?;
        daemon.does("block-stream", json!({"device": "drive0", "job-id": "j", "speed": 1024}))?;
        let taken = daemon.refuses("block-stream", json!({"device": "other", "job-id": "j"}))?;
        assert_eq!(taken, "Job ID 'j' already in use");
        daemon.does("block-job-set-speed", json!({"device": "j", "speed": 0}))?;
        daemon.completed("j")?;
        daemon.does("block-stream", json!({"device": "other", "job-id": "j"}))?;
        daemon.completed("j")?;
        nothing_runs(&mut daemon)?;
        daemon.end()
    })
}

#[test]
fn a_top_that_is_read_only_is_not_streamed_into() -> Result {
    peer!("headwater", "qemu-storage-daemon", "qemu-img", "qemu-io");
    everywhere(|world| {
        chain(world)?;
        world.overlay("ro-top", "mid", world.format, None)?;
        let mut daemon = start(world)?;
        let mut top = world.node("ro-top", "ro-top", Some(json!("mid")));
        top["read-only"] = json!(true);
        top["file"]["read-only"] = json!(true);
        daemon.does("blockdev-add", top)?;
        let stream = json!({"device": "ro-top", "job-id": "stream", "base-node": "base"});
        assert_eq!(daemon.refuses("block-stream", stream)?, "Block node is read-only");
        daemon.does("blockdev-del", json!({"node-name": "ro-top"}))?;
        nothing_runs(&mut daemon)?;
        daemon.end()
    })
}

/// A disk that is longer than its backing file: the stream ends, and what is past the shorter one's end reads as zeros.
#[test]
fn a_backing_file_may_be_shorter() -> Result {
    peer!("headwater", "qemu-storage-daemon", "qemu-img", "qemu-io");
    everywhere(|world| {
        world.raw("base.raw", MIB)?;
        world.overlay("test", "base.raw", "raw", Some(2 * MIB))?;
        let mut disk = std::fs::read(world.at("base.raw"))?;
        disk.resize(2 << 20, 0);
        let mut daemon = world.start(&world.node("drive0", "test", None))?;
        daemon.does("block-stream", json!({"device": "drive0", "job-id": "drive0"}))?;
        daemon.completed("drive0")?;
        nothing_runs(&mut daemon)?;
        daemon.end()?;
        assert_eq!(world.backing("test")?, None);
        world.sound("test", &disk)
    })
}
