//! Nine images on each other, and several streams in them.

use headwater_tests::nbd::Client;
use headwater_tests::storage::Storage;
use headwater_tests::{Result, peer};
use serde_json::{Value, json};

use crate::{MIB, World, everywhere, nothing_runs, raw_node};

/// Streams that run side by side.
const STREAMS: usize = 4;
pub(crate) const IMAGES: usize = 2 * STREAMS + 1;

pub(crate) fn image(n: usize) -> String {
    format!("img-{n}")
}

/// `img-0`, raw, below eight others, of which every other one has data; what the disk reads as.
pub(crate) fn chain(world: &World) -> Result<Vec<u8>> {
    let size = STREAMS as u64 * 4 * MIB;
    world.raw(&image(0), size)?;
    let mut disk = std::fs::read(world.at(&image(0)))?;
    for n in 1..IMAGES {
        world.overlay(&image(n), &image(n - 1), if n == 1 { "raw" } else { world.format }, None)?;
    }
    for (at, n) in (0..IMAGES).rev().filter(|n| n % 2 == 1).enumerate() {
        // Not all the same, so that they do not end in the order they began.
        let (from, len) = (at * 4, 2 + 2 * (at % 2));
        world.io(world.format, &image(n), &format!("write -P 0xff {from}M {len}M"))?;
        disk[from << 20..(from + len) << 20].fill(0xff);
    }
    Ok(disk)
}

pub(crate) fn start(world: &World) -> Result<Storage> {
    let mut chain = raw_node("node0", &image(0));
    for n in 1..IMAGES {
        chain = world.node(&format!("node{n}"), &image(n), Some(chain));
    }
    world.start(&chain)
}

pub(crate) fn guest_reads(world: &World) -> Result<Vec<u8>> {
    let mut guest = Client::connect(&world.at("nbd.sock"))?;
    let read = guest.read(0, u32::try_from(guest.size())?)?;
    guest.disconnect()?;
    Ok(read)
}

/// Every even image takes in the one below it, all at a time.
#[test]
fn streams_run_side_by_side_in_one_chain() -> Result {
    peer!("headwater", "qemu-storage-daemon", "qemu-img", "qemu-io");
    everywhere(|world| {
        let disk = chain(world)?;
        let even: Vec<usize> = (2..IMAGES).step_by(2).collect();
        for n in &even {
            assert_ne!(world.map(world.format, &image(*n))?, world.map(world.format, &image(n - 1))?);
        }
        let mut daemon = start(world)?;
        nothing_runs(&mut daemon)?;
        for n in &even {
            let (node, bottom) = (format!("node{n}"), format!("node{}", n - 1));
            let job = format!("stream-{node}");
            daemon.does("block-stream", json!({"device": node, "job-id": job, "bottom": bottom, "speed": 1024}))?;
        }
        assert_eq!(daemon.jobs()?.len(), STREAMS);
        for n in even.iter().rev() {
            daemon.does("block-job-set-speed", json!({"device": format!("stream-node{n}"), "speed": 0}))?;
        }
        for n in &even {
            daemon.completed(&format!("stream-node{n}"))?;
        }
        nothing_runs(&mut daemon)?;
        assert!(guest_reads(world)? == disk);
        daemon.end()?;
        for n in &even {
            assert_eq!(world.map(world.format, &image(*n))?, world.map(world.format, &image(n - 1))?, "{n}");
            assert_eq!(world.backing(&image(*n))?, Some(image(n - 2)));
        }
        world.sound(&image(IMAGES - 1), &disk)
    })
}

/// No node is in two streams at a time.
#[test]
fn streams_that_overlap_are_refused() -> Result {
    peer!("headwater", "qemu-storage-daemon", "qemu-img", "qemu-io");
    everywhere(|world| {
        let disk = chain(world)?;
        let mut daemon = start(world)?;
        daemon.does(
            "block-stream",
            json!({"device": "node4", "job-id": "stream-node4", "base": image(1), "speed": MIB,
                "filter-node-name": "stream-filter"}),
        )?;
        let busy = |node: &str| format!("Node '{node}' is busy: block device is in use by block job: stream");
        let above = daemon.refuses("block-stream", json!({"device": "node5", "job-id": "j5", "base": image(2)}))?;
        assert_eq!(above, busy("stream-filter"));
        let within = daemon.refuses("block-stream", json!({"device": "node3", "job-id": "j3", "base": image(2)}))?;
        assert_eq!(within, busy("node3"));
        let same = daemon.refuses("block-stream", json!({"device": "node4", "job-id": "j4"}))?;
        assert_eq!(same, busy("node4"));
        daemon.does("block-job-set-speed", json!({"device": "stream-node4", "speed": 0}))?;
        daemon.completed("stream-node4")?;
        nothing_runs(&mut daemon)?;
        assert!(guest_reads(world)? == disk);
        daemon.end()?;
        assert_eq!(world.backing(&image(4))?, Some(image(1)));
        world.sound(&image(IMAGES - 1), &disk)
    })
}

/// A base that is told by its node.
#[test]
fn a_base_is_a_node_below() -> Result {
    peer!("headwater", "qemu-storage-daemon", "qemu-img", "qemu-io");
    everywhere(|world| {
        let disk = chain(world)?;
        assert_ne!(world.map(world.format, &image(4))?, world.map(world.format, &image(3))?);
        let mut daemon = start(world)?;
        let stream = |base: &str| json!({"device": "node4", "job-id": "stream", "base-node": base});
        let mut said = |arguments: Value| daemon.refuses("block-stream", arguments);
        assert_eq!(said(stream("none"))?, "Cannot find device='' nor node-name='none'");
        assert_eq!(said(stream("node6"))?, "Node 'node6' is not a backing image of 'node4'");
        assert_eq!(said(stream("node4"))?, "Node 'node4' is not a backing image of 'node4'");
        let mut both = stream("node2");
        both["base"] = json!(image(2));
        assert_eq!(said(both)?, "'base' and 'base-node' cannot be specified at the same time");
        daemon.does("block-stream", stream("node2"))?;
        daemon.completed("stream")?;
        nothing_runs(&mut daemon)?;
        assert!(guest_reads(world)? == disk);
        daemon.end()?;
        assert_eq!(world.map(world.format, &image(4))?, world.map(world.format, &image(3))?);
        world.sound(&image(IMAGES - 1), &disk)
    })
}
