//! Progress, as somebody sees it who looks all the time.

use super::target::{CLUSTER, Cluster, MIB, Sketch};
use super::{millis, sims};
use std::time::Duration;

#[test]
fn it_never_runs_backwards_and_is_equal_at_the_end_only() {
    sims(async |world| {
        // Holes, zeros, and a guest that writes ahead of the job and behind it.
        let target = Sketch::new(512);
        for at in (0..8192).step_by(7) {
            target.set(at..at + 2, Cluster::There);
        }
        target.set(3000..4500, Cluster::Zero);
        target.latency.set(millis(5));
        let missing = target.clusters.borrow().iter().filter(|c| **c == Cluster::Missing).count() as u64 * CLUSTER;
        world.start(&target, |start| start.speed = 100 * MIB).unwrap();
        let (mut len, mut offset) = (0, 0);
        let mut guest = 0;
        while let Some(info) = world.jobs.info("j") {
            assert!(info.len + CLUSTER >= len && info.offset >= offset, "{info:?} after {len} {offset}");
            assert!(info.offset < info.len, "not finished: {info:?}");
            (len, offset) = (info.len, info.offset);
            guest = (guest * 31 + 7) % 8190;
            target.set(guest..guest + 2, Cluster::There);
            ring::sleep(millis(3)).await;
        }
        let last = world.last_progress();
        assert_eq!(last.0, last.1);
        assert!(last.0 <= missing, "only what must be copied: {} of {missing}", last.0);
        assert!(target.finished.get());
    });
}

#[test]
fn the_total_is_known_soon_and_only_what_is_missing_counts() {
    sims(async |world| {
        let target = Sketch::new(1000);
        target.set(16 * 100..16 * 900, Cluster::There);
        world.start(&target, |start| start.speed = MIB).unwrap();
        ring::sleep(millis(100)).await;
        assert_eq!(world.info().len, 200 * MIB);
        ring::sleep(Duration::from_secs(50)).await;
        let done = world.info().offset / MIB;
        assert!((47..=53).contains(&done), "{done}");
        // A guest overwrites most of what is left: the rest of the job is short.
        target.set(16 * 60..16 * 100, Cluster::There);
        target.set(16 * 900..16 * 995, Cluster::There);
        let began = ring::now();
        world.until(None).await;
        assert!(ring::now().since(began) < Duration::from_secs(20));
        assert_eq!(world.last_progress(), (200 * MIB, 200 * MIB));
    });
}
