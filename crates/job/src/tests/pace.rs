//! The speed limit, as it shows at the source.

use super::target::{Cluster, MIB, Sketch};
use super::{World, millis, sims};
use layout::GuestRange;
use ring::Instant;
use std::time::Duration;

/// Bytes that began within two seconds from each beginning on, at most, as a part of what `allowed` says for that window.
fn worst(begun: &[(Instant, GuestRange)], allowed: impl Fn(Instant) -> f64) -> f64 {
    let two = Duration::from_secs(2);
    let mut worst = 0.0_f64;
    let (mut bytes, mut end) = (0, 0);
    for (start, range) in begun {
        while begun.get(end).is_some_and(|(at, _)| at.since(*start) < two) {
            bytes += begun[end].1.len();
            end += 1;
        }
        worst = worst.max(bytes as f64 / allowed(*start));
        bytes -= range.len();
    }
    worst
}

#[test]
fn any_two_seconds_are_within_five_percent() {
    for speed in [2 * MIB, 10 * MIB, 50_000_000, 200 * MIB] {
        for latency in [0, 3, 120] {
            ring::sim::Sim::new(speed + latency).block_on(async {
                let world = World::new();
                let target = Sketch::new(speed * 6 / MIB);
                target.latency.set(millis(latency));
                let began = ring::now();
                world.start(&target, |start| start.speed = speed).unwrap();
                world.until(None).await;
                let took = ring::now().since(began).as_secs_f64();
                let worst = worst(&target.begun.borrow(), |_| speed as f64 * 2.0);
                assert!(worst <= 1.05, "{worst} at {speed} B/s and {latency} ms");
                // A source that answers in time is used to the full.
                if latency < 100 || speed < 100 * MIB {
                    assert!(took <= 6.0 / 0.95 + 0.2, "{took} s for 6 s at {speed} B/s and {latency} ms");
                }
            });
        }
    }
}

#[test]
fn a_change_takes_effect_at_once() {
    sims(async |world| {
        let (slow, fast) = (4 * MIB, 40 * MIB);
        let target = Sketch::new(1000);
        world.start(&target, |start| start.speed = slow).unwrap();
        ring::sleep(Duration::from_secs(5)).await;
        let up = ring::now();
        world.jobs.set_speed("j", fast).unwrap();
        ring::sleep(Duration::from_secs(5)).await;
        let down = ring::now();
        world.jobs.set_speed("j", slow).unwrap();
        ring::sleep(Duration::from_secs(5)).await;
        let end = ring::now();
        world.jobs.set_speed("j", 0).unwrap();
        world.until(None).await;
        assert!(ring::now().since(end) < Duration::from_secs(1), "no limit is no limit at once");
        let seconds = |from: Instant, to: Instant| to.since(from).as_secs_f64();
        // The chunk that is due at the moment of a change is a lump that belongs to either side.
        let lump = MIB as f64;
        let allowed = |from: Instant| {
            let to = from + Duration::from_secs(2);
            let fast_for = seconds(up.max(from), down.min(to));
            let mixed = fast_for > 0.0 && fast_for < 2.0;
            fast_for * fast as f64 + (2.0 - fast_for) * slow as f64 + if mixed { lump } else { 0.0 }
        };
        let whole = |at: Instant| at + Duration::from_secs(2) <= end;
        let begun: Vec<_> = target.begun.borrow().iter().copied().filter(|(at, _)| whole(*at)).collect();
        let worst = worst(&begun, allowed);
        assert!(worst <= 1.05, "{worst}");
        let between = |from: Instant, to: Instant| -> f64 {
            let bytes = target
                .begun
                .borrow()
                .iter()
                .filter(|(at, _)| *at >= from && *at < to)
                .map(|(_, range)| range.len())
                .sum::<u64>();
            bytes as f64 / seconds(from, to)
        };
        for (from, to, speed) in [(up, down, fast), (down, end, slow)] {
            let ratio = between(from, to) / speed as f64;
            assert!((0.95..=1.05).contains(&ratio), "{ratio} of {speed}");
        }
    });
}

#[test]
fn a_crawling_job_wakes_up_when_it_may_run() {
    sims(async |world| {
        let target = Sketch::new(100);
        world.start(&target, |start| start.speed = 1).unwrap();
        ring::sleep(Duration::from_hours(1)).await;
        assert_eq!(target.begun.borrow().len(), 1, "a cluster lasts for hours");
        let asked = ring::now();
        world.jobs.set_speed("j", 100 * MIB).unwrap();
        world.until(None).await;
        let took = ring::now().since(asked);
        assert!(took <= millis(1100), "{took:?}");
    });
}

#[test]
fn zeros_cost_no_tokens_and_are_not_counted() {
    sims(async |world| {
        let target = Sketch::new(1024);
        target.set(16..16 * 1024, Cluster::Zero);
        world.start(&target, |start| start.speed = MIB).unwrap();
        let began = ring::now();
        world.until(None).await;
        assert!(ring::now().since(began) <= Duration::from_secs(2));
        assert_eq!(world.last_progress(), (MIB, MIB));
        assert!(target.finished.get());
    });
}

#[test]
fn a_distant_source_is_asked_for_several_chunks_at_once() {
    sims(async |world| {
        let target = Sketch::new(400);
        target.latency.set(millis(20));
        let began = ring::now();
        world.start(&target, |_| {}).unwrap();
        world.until(None).await;
        let took = ring::now().since(began);
        assert!(target.most_in_flight.get() == 32, "{}", target.most_in_flight.get());
        // One at a time it would be 8 s.
        assert!(took <= millis(1200), "{took:?}");
    });
}

#[test]
fn a_fragmented_disk_keeps_many_small_requests_in_flight_but_bounded() {
    sims(async |world| {
        let target = Sketch::new(64);
        for at in (1..1024).step_by(2) {
            target.set(at..at + 1, Cluster::There);
        }
        world.start(&target, |_| {}).unwrap();
        world.until(None).await;
        assert!((32..=64).contains(&target.most_in_flight.get()), "{}", target.most_in_flight.get());
    });
}
