//! Streams and commits in one chain: side by side where they do not meet, refused where they do.

use headwater_tests::process::PATIENCE;
use headwater_tests::storage::Storage;
use headwater_tests::{Result, peer};
use serde_json::{Value, json};

use crate::parallel::{IMAGES, chain, guest_reads, image, start};
use crate::{MIB, World, everywhere, nothing_runs};

/// A stream into node `top`, or a commit from the disk's top.
fn stream(top: usize, base: Option<usize>) -> (&'static str, Value) {
    let mut arguments = json!({"device": format!("node{top}"), "job-id": format!("stream-{top}")});
    if let Some(base) = base {
        arguments["base"] = json!(image(base));
    }
    ("block-stream", arguments)
}

fn commit(id: &str, top: Option<usize>, base: usize) -> (&'static str, Value) {
    let mut arguments = json!({"device": format!("node{}", IMAGES - 1), "job-id": id, "base": image(base)});
    if let Some(top) = top {
        arguments["top"] = json!(image(top));
    }
    ("block-commit", arguments)
}

fn slow((command, mut arguments): (&'static str, Value)) -> (&'static str, Value) {
    arguments["speed"] = json!(MIB);
    (command, arguments)
}

/// Begins `first`, which blocks its nodes, and is refused all the others. The disk reads the same at the end.
fn blocked(
    world: &World,
    id: &str,
    first: (&str, Value),
    others: &[(&str, Value)],
    at_end: impl Fn(&mut Storage) -> Result,
) -> Result {
    let disk = chain(world)?;
    let mut daemon = start(world)?;
    daemon.does(first.0, first.1)?;
    for (command, arguments) in others {
        let refused = daemon.qmp.refused(command, arguments.clone())?;
        assert_eq!(refused.class, "GenericError", "{command} {arguments}");
        assert_eq!(daemon.jobs()?.len(), 1, "{command} {arguments}");
    }
    daemon.does("block-job-set-speed", json!({"device": id, "speed": 0}))?;
    at_end(&mut daemon)?;
    daemon.completed(id)?;
    nothing_runs(&mut daemon)?;
    assert!(guest_reads(world)? == disk);
    daemon.end()
}

/// The commit of the active layer is ready: it is told to end.
fn complete(daemon: &mut Storage, id: &str) -> Result {
    let ready = daemon.qmp.event_where(PATIENCE, |event| event["event"] == "BLOCK_JOB_READY")?;
    assert_eq!((&ready["data"]["device"], &ready["data"]["type"]), (&json!(id), &json!("commit")));
    assert!(ready["data"].get("error").is_none());
    daemon.does("block-job-complete", json!({"device": id}))?;
    Ok(())
}

#[test]
fn commits_keep_off_a_stream() -> Result {
    peer!("headwater", "qemu-storage-daemon", "qemu-img", "qemu-io");
    everywhere(|world| {
        // The last one would change the header of node 2, which is the stream's.
        let others = [commit("c", None, 4), commit("c", Some(3), 1), commit("c", Some(1), 0)];
        blocked(world, "stream-4", slow(stream(4, Some(1))), &others, |_| Ok(()))
    })
}

#[test]
fn streams_keep_off_a_commit_in_the_middle() -> Result {
    peer!("headwater", "qemu-storage-daemon", "qemu-img", "qemu-io");
    everywhere(|world| {
        // Node 6 lies on what is committed: its header is changed. The top is blocked, although it has no part in it.
        let others = [
            stream(3, None),
            stream(6, Some(2)),
            stream(4, Some(2)),
            stream(6, Some(4)),
            stream(7, Some(5)),
            stream(8, Some(5)),
        ];
        blocked(world, "c", slow(commit("c", Some(5), 3)), &others, |_| Ok(()))
    })
}

#[test]
fn streams_keep_off_a_commit_of_the_top() -> Result {
    peer!("headwater", "qemu-storage-daemon", "qemu-img", "qemu-io");
    everywhere(|world| {
        blocked(world, "c", slow(commit("c", None, 3)), &[stream(5, Some(3))], |daemon| complete(daemon, "c"))
    })
}

#[test]
fn a_stream_and_a_commit_run_side_by_side() -> Result {
    peer!("headwater", "qemu-storage-daemon", "qemu-img", "qemu-io");
    everywhere(|world| {
        let disk = chain(world)?;
        let mut daemon = start(world)?;
        let (command, arguments) = slow(stream(2, None));
        daemon.does(command, arguments)?;
        let (command, arguments) = commit("c", None, 3);
        daemon.does(command, arguments)?;
        complete(&mut daemon, "c")?;
        daemon.completed("c")?;
        assert!(guest_reads(world)? == disk);
        daemon.does("block-job-set-speed", json!({"device": "stream-2", "speed": 0}))?;
        daemon.completed("stream-2")?;
        nothing_runs(&mut daemon)?;
        assert!(guest_reads(world)? == disk);
        daemon.end()?;
        assert_eq!(world.backing(&image(2))?, None);
        world.sound(&image(3), &disk)
    })
}
