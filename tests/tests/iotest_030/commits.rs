//! Streams beside commits in the chain of nine: where they touch they are refused, where they do not they run side by side.

use headwater_tests::storage::{Kind, Storage};
use headwater_tests::{Result, peer};
use serde_json::{Value, json};

use crate::parallel::{IMAGES, chain, guest_reads, image, start};
use crate::{MIB, World, everywhere, nothing_runs};

fn busy(node: &str) -> String {
    format!("Node '{node}' is busy: block device is in use by block job: commit")
}

fn stream(daemon: &mut Storage, arguments: Value) -> Result<String> {
    daemon.refuses("block-stream", arguments)
}

fn unthrottle(daemon: &mut Storage, job: &str) -> Result {
    daemon.does("block-job-set-speed", json!({"device": job, "speed": 0}))?;
    Ok(())
}

/// Completes a commit of the active layer once it is ready.
fn complete(daemon: &mut Storage, job: &str) -> Result {
    let ready = daemon.qmp.event("BLOCK_JOB_READY")?;
    assert_eq!(
        (&ready["device"], &ready["type"], ready.get("error")),
        (&json!(job), &json!("commit"), None),
        "{ready}"
    );
    daemon.does("block-job-complete", json!({"device": job}))?;
    daemon.completed(job)?;
    Ok(())
}

/// The end of each case: nothing runs, and the guest reads what it read.
fn all_is_well(world: &World, mut daemon: Storage, disk: &[u8]) -> Result {
    nothing_runs(&mut daemon)?;
    assert!(guest_reads(world)? == disk);
    daemon.end()
}

#[test]
fn a_commit_in_the_middle_keeps_streams_off() -> Result {
    peer!("headwater", "qemu-storage-daemon", "qemu-img", "qemu-io");
    everywhere(|world| {
        let disk = chain(world)?;
        let mut daemon = start(world)?;
        let commit = json!({"device": "node8", "job-id": "c", "top": image(5), "base": image(3), "speed": MIB});
        daemon.does("block-commit", commit)?;
        for (device, base, met) in [
            ("node3", None, "node3"),
            ("node6", Some(2), "node5"),
            ("node4", Some(2), "node4"),
            ("node6", Some(4), "node5"),
        ] {
            let mut arguments = json!({"device": device, "job-id": "s"});
            if let Some(base) = base {
                arguments["base"] = json!(image(base));
            }
            // A commit in the middle has the image above, too, here: it rewrites that one's header.
            let met = if world.kind == Kind::Ours && device == "node6" { "node6" } else { met };
            assert_eq!(stream(&mut daemon, arguments)?, busy(met), "{device} {base:?}");
        }
        unthrottle(&mut daemon, "c")?;
        daemon.completed("c")?;
        all_is_well(world, daemon, &disk)?;
        assert_eq!(world.backing(&image(6))?, Some(image(3)));
        world.sound(&image(IMAGES - 1), &disk)
    })
}

#[test]
fn a_commit_of_the_active_layer_keeps_streams_off() -> Result {
    peer!("headwater", "qemu-storage-daemon", "qemu-img", "qemu-io");
    everywhere(|world| {
        let disk = chain(world)?;
        let mut daemon = start(world)?;
        daemon.does("block-commit", json!({"device": "node8", "job-id": "c", "base": image(3), "speed": MIB}))?;
        let said = stream(&mut daemon, json!({"device": "node5", "job-id": "s", "base": image(3)}))?;
        assert_eq!(said, busy("node5"));
        unthrottle(&mut daemon, "c")?;
        complete(&mut daemon, "c")?;
        all_is_well(world, daemon, &disk)?;
        world.sound(&image(3), &disk)
    })
}

/// Down to the layer that is being committed there can be no stream; down to the node that stands for the commit there can.
#[test]
fn a_stream_ends_above_a_commit() -> Result {
    peer!("headwater", "qemu-storage-daemon", "qemu-img", "qemu-io");
    everywhere(|world| {
        let disk = chain(world)?;
        let mut daemon = start(world)?;
        let commit = json!({"device": "node8", "job-id": "c", "top-node": "node2", "base-node": "node0",
            "filter-node-name": "commit-filter", "speed": MIB});
        daemon.does("block-commit", commit)?;
        let to = |base: &str| json!({"device": "node4", "job-id": "s", "base-node": base});
        let frozen = stream(&mut daemon, to("node2"))?;
        // Ours keeps streams off all that lies above the commit.
        let ours = world.kind == Kind::Ours && frozen.ends_with("is in use by block job: commit");
        assert!(ours || frozen == "Cannot freeze 'backing' link to 'commit-filter'", "{frozen}");
        let above = daemon.qmp.command("block-stream", to("commit-filter"))?;
        assert!(above.is_ok() || world.kind == Kind::Ours, "{above:?}");
        unthrottle(&mut daemon, "c")?;
        daemon.completed("c")?;
        if above.is_ok() {
            daemon.completed("s")?;
            let nodes = daemon.does("query-named-block-nodes", json!({}))?;
            let node = nodes.as_array().into_iter().flatten().find(|node| node["node-name"] == "node4");
            let below = node.map(|node| node["image"]["backing-image"]["filename"].clone());
            assert_eq!(below, Some(json!(image(0))));
        }
        all_is_well(world, daemon, &disk)?;
        world.sound(&image(IMAGES - 1), &disk)
    })
}

/// A stream below and a commit above, at full speed and slowly.
#[test]
fn a_stream_and_a_commit_run_side_by_side() -> Result {
    peer!("headwater", "qemu-storage-daemon", "qemu-img", "qemu-io");
    everywhere(|world| {
        for (into, base, speed) in [("node2", 3, 0), ("node4", 5, MIB)] {
            let disk = chain(world)?;
            let mut daemon = start(world)?;
            daemon
                .does("block-stream", json!({"device": into, "job-id": "s", "base-node": "node0", "speed": speed}))?;
            daemon
                .does("block-commit", json!({"device": "node8", "job-id": "c", "base": image(base), "speed": speed}))?;
            if speed > 0 {
                unthrottle(&mut daemon, "c")?;
                unthrottle(&mut daemon, "s")?;
            }
            complete(&mut daemon, "c")?;
            daemon.completed("s")?;
            all_is_well(world, daemon, &disk)?;
            world.sound(&image(base), &disk)?;
        }
        Ok(())
    })
}

/// A stream below ends while a commit above is ready, and lets go of images that only a header named. What the commit puts in the disk's
/// place must not ask them any more: where nothing was copied, since there was nothing, there are zeros.
#[test]
fn what_a_stream_let_go_of_is_not_asked_after_a_commit() -> Result {
    peer!("headwater", "qemu-storage-daemon", "qemu-img", "qemu-io");
    everywhere(|world| {
        let size = 8 * MIB;
        world.raw("low.raw", 2 * MIB)?;
        let mut disk = std::fs::read(world.at("low.raw"))?;
        std::fs::File::options().write(true).open(world.at("low.raw"))?.set_len(size)?;
        disk.resize(8 << 20, 0);
        world.overlay("mid", "low.raw", "raw", None)?;
        world.overlay("base", "mid", world.format, None)?;
        world.overlay("top", "base", world.format, None)?;
        world.io(world.format, "top", "write -P 0xff 1M 64k")?;
        disk[1 << 20..(1 << 20) + 65536].fill(0xff);
        // What lies below `mid` is found by its header.
        let mid = world.node("mid", "mid", None);
        let mut daemon = world.start(&world.node("top", "top", Some(world.node("base", "base", Some(mid)))))?;
        daemon.does("block-commit", json!({"device": "top", "job-id": "c", "base-node": "base"}))?;
        let ready = daemon.qmp.event("BLOCK_JOB_READY")?;
        assert_eq!(ready["device"], "c");
        daemon.does("block-stream", json!({"device": "mid", "job-id": "s"}))?;
        daemon.completed("s")?;
        daemon.does("block-job-complete", json!({"device": "c"}))?;
        daemon.completed("c")?;
        all_is_well(world, daemon, &disk)?;
        assert_eq!(world.backing("mid")?, None);
        world.sound("base", &disk)
    })
}
