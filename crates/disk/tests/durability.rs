//! Flushes, FUA, write-through, what goes on in the background, and requests nobody waits for.

extern crate headwater_disk as disk;

mod harness;

use disk::{Disk, DiskOptions, ErrorKind};
use futures_util::future::join_all;
use harness::world::{Formats, World, noise, quiet, read, write};
use layout::GuestOffset;
use ring::Iov;
use ring::sim::Sim;
use std::rc::Rc;
use std::time::Duration;
use store::Operation::{Allocate, Flush, SetSize, Write, Zero};
use store::fault::{Action, Failure, Match};
use store::memory::MemoryStore;

const UNIT: u64 = 65536;

async fn alone(formats: Formats, seed: u64, options: DiskOptions) -> (Rc<World>, Rc<Disk>) {
    let world = World::new(formats, seed, false);
    world.create("top", Some(UNIT), 16 * UNIT, None).await;
    let disk = world.disk("top", options).await;
    (world, disk)
}

#[test]
fn flushes_that_wait_together_share_a_commit() {
    for seed in 0..10 {
        Sim::new(seed).block_on(async {
            let (world, disk) = alone(Formats::Sketched, seed, DiskOptions::default()).await;
            write(&disk, 0, &[1; 100]).await.unwrap();
            let sketch = world.file("top").sketch.unwrap();
            let held = world.hold("top", Flush);
            let first = ring::spawn({
                let disk = Rc::clone(&disk);
                async move { disk.flush().await }
            });
            held.wait_for(1).await;
            let others: Vec<_> = (0..10)
                .map(|_| {
                    let disk = Rc::clone(&disk);
                    ring::spawn(async move { disk.flush().await })
                })
                .collect();
            quiet().await;
            assert_eq!(sketch.commits(), 1, "one at a time");
            assert!(others.iter().all(|other| !other.is_finished()));
            held.end();
            first.await.unwrap();
            join_all(others).await.into_iter().for_each(Result::unwrap);
            assert_eq!(sketch.commits(), 2, "the one under way did not cover them, one more did");
            disk.flush().await.unwrap();
            assert_eq!(sketch.commits(), 2, "nothing was written since");
            assert_eq!(disk.stats().flush_operations, 12);
            disk.close().await.unwrap();
        });
    }
}

#[test]
fn a_failed_flush_fails_all_that_shared_it_and_all_after() {
    Sim::new(1).block_on(async {
        let (world, disk) = alone(Formats::Real, 1, DiskOptions::default()).await;
        write(&disk, 0, &[1; 100]).await.unwrap();
        world.faults("top").rule(Match::on(Flush).times(1), Action::Fail(Failure::EIO));
        let results = join_all((0..3).map(|_| disk.flush())).await;
        assert!(results.iter().all(Result::is_err));
        assert!(disk.flush().await.is_err());
        assert!(disk.write(GuestOffset(UNIT), Iov::zeroed(512), true).await.is_err());
        assert_eq!(read(&disk, 0, 100).await.unwrap(), [1; 100], "reads go on");
        assert!(disk.close().await.is_err() || world.faults("top").poisoned().is_some());
    });
}

/// The store is sound, a table could not be written: what is written in place from then on could reach the disk, but no flush
/// could say so. It is refused like all else.
#[test]
fn a_poisoned_image_refuses_writes_in_place_too() {
    Sim::new(1).block_on(async {
        let (world, disk) = alone(Formats::Real, 1, DiskOptions::default()).await;
        write(&disk, 0, &[1; 512]).await.unwrap();
        disk.flush().await.unwrap();
        write(&disk, UNIT, &[2; 512]).await.unwrap();
        world.faults("top").rule(Match::on(Write).once(), Action::Fail(Failure::EIO));
        disk.flush().await.unwrap_err();
        assert!(world.faults("top").poisoned().is_none(), "it was no flush that failed");
        let refused = write(&disk, 0, &[3; 512]).await.unwrap_err();
        assert_eq!(refused.kind(), ErrorKind::Poisoned);
        assert_eq!(read(&disk, 0, 512).await.unwrap(), [1; 512]);
        assert_eq!(read(&disk, UNIT, 512).await.unwrap(), [2; 512]);
        disk.close().await.unwrap();
    });
}

/// What a guest was answered hangs on this process as long as a table that leads to it is in memory only, whoever put the
/// entry there: its own write, a zeroing, or a copy that it then wrote over in place.
#[test]
fn what_hangs_on_this_process_is_known() {
    Sim::new(1).block_on(async {
        let world = World::new(Formats::Real, 1, false);
        world.raw("base", &noise(1, 16 * UNIT as usize));
        world.create("top", Some(UNIT), 16 * UNIT, Some("base")).await;
        let disk = world.disk("top", DiskOptions::default()).await;
        assert!(!disk.has_unsettled_writes());
        disk.prefetch(GuestOffset(0).range(UNIT)).await.unwrap();
        assert!(!disk.has_unsettled_writes(), "a copy that is lost is fetched again");
        write(&disk, 512, &[1; 512]).await.unwrap();
        assert!(disk.has_unsettled_writes(), "in place, over the copy");
        let settled = disk.settled();
        disk.flush().await.unwrap();
        settled.await;
        assert!(!disk.has_unsettled_writes());
        write(&disk, 1024, &[2; 512]).await.unwrap();
        assert!(!disk.has_unsettled_writes(), "in place, where the table is durable: the page cache keeps it");
        write(&disk, UNIT, &[3; 512]).await.unwrap();
        assert!(disk.has_unsettled_writes(), "into a new cluster");
        disk.flush().await.unwrap();
        disk.write_zeroes(GuestOffset(2 * UNIT).range(UNIT), true, false).await.unwrap();
        assert!(disk.has_unsettled_writes(), "a mark");
        disk.close().await.unwrap();
    });
}

#[test]
fn a_write_in_place_with_fua_costs_one_write() {
    Sim::new(1).block_on(async {
        let (world, disk) = alone(Formats::Real, 1, DiskOptions::default()).await;
        write(&disk, 0, &[1; 4096]).await.unwrap();
        disk.flush().await.unwrap();
        let flushes = world.begun("top", Flush).len();
        disk.write(GuestOffset(512), Iov::from_slice(&[2; 512]), true).await.unwrap();
        assert_eq!(world.begun("top", Flush).len(), flushes);
        assert!(
            world.trace.records().iter().any(|r| r.operation == Write && r.flagged && r.range.unwrap().len() == 512)
        );
        // With a mapping that is not durable yet, the bytes alone are worth nothing.
        write(&disk, UNIT, &[1; 4096]).await.unwrap();
        disk.write(GuestOffset(512), Iov::from_slice(&[3; 512]), true).await.unwrap();
        assert!(world.begun("top", Flush).len() > flushes);
        disk.close().await.unwrap();
    });
}

#[test]
fn what_was_said_to_be_durable_survives_a_power_cut() {
    for (seed, write_through) in [(1, false), (2, true), (3, false), (4, true)] {
        Sim::new(seed).block_on(async {
            let (world, disk) =
                alone(Formats::Real, seed, DiskOptions { write_through, ..DiskOptions::default() }).await;
            let faults = world.faults("top");
            faults.make_volatile(512).await.unwrap();
            let mut expected = vec![0; 16 * UNIT as usize];
            for i in 0..24_usize {
                let at = i * 7919 * 61 % (15 * UNIT as usize);
                let bytes = noise(i as u64, 3000);
                if i % 5 == 4 {
                    disk.write_zeroes(GuestOffset(at as u64).range(3000), true, true).await.unwrap();
                    expected[at..at + 3000].fill(0);
                } else {
                    disk.write(GuestOffset(at as u64), Iov::from_slice(&bytes), i % 2 == 0).await.unwrap();
                    expected[at..at + 3000].copy_from_slice(&bytes);
                    if i % 2 == 1 && !write_through {
                        disk.flush().await.unwrap();
                    }
                }
                for state in faults.power_cut().unwrap().states(6, seed) {
                    let after = World::new(Formats::Real, 0, false);
                    after.adopt("top", MemoryStore::from_snapshot("top", state.image), image::Format::Qed);
                    let disk = after.disk("top", DiskOptions::default()).await;
                    assert!(read(&disk, 0, expected.len()).await.unwrap() == expected, "write {i}");
                    disk.close().await.unwrap();
                }
            }
            disk.close().await.unwrap();
        });
    }
}

#[test]
fn unflushed_tables_are_committed_and_an_idle_image_is_marked_clean() {
    Sim::new(1).block_on(async {
        let (world, disk) = alone(Formats::Real, 1, DiskOptions::default()).await;
        let image = Rc::clone(&disk.chain()[0].image);
        // The need-check bit, as it is in the header.
        let marked = || world.file("top").bytes.peek().to_vec()[16] & 2 != 0;
        write(&disk, 0, &[1; 100]).await.unwrap();
        assert!(image.is_dirty());
        ring::sleep(Duration::from_millis(1500)).await;
        assert!(!image.is_dirty(), "committed without a flush");
        assert!(marked(), "but not marked as clean at once");
        write(&disk, UNIT, &[1; 100]).await.unwrap();
        ring::sleep(Duration::from_secs(4)).await;
        assert!(marked(), "not while it is in use");
        ring::sleep(Duration::from_secs(4)).await;
        assert!(!marked(), "idle for more than five seconds");
        write(&disk, 2 * UNIT, &[1; 100]).await.unwrap();
        assert!(marked(), "and it begins anew");
        disk.close().await.unwrap();
    });
}

#[test]
fn a_disk_that_is_dropped_leaves_nothing_running() {
    let sim = Sim::new(1);
    sim.block_on(async {
        let (_world, disk) = alone(Formats::Real, 1, DiskOptions::default()).await;
        let image = Rc::downgrade(&disk.chain()[0].image);
        write(&disk, 0, &[1; 100]).await.unwrap();
        drop(disk);
        ring::sleep(Duration::from_secs(30)).await;
        assert!(image.upgrade().is_none());
    });
}

#[test]
fn a_write_that_nobody_waits_for_goes_to_its_end() {
    for seed in 0..20 {
        Sim::new(seed).block_on(async {
            let (world, disk) = alone(Formats::Real, seed, DiskOptions::default()).await;
            if seed % 2 == 0 {
                write(&disk, 0, &[1; 4096]).await.unwrap();
            }
            let held = world.hold("top", Write);
            let writer = {
                let disk = Rc::clone(&disk);
                ring::spawn(async move { write(&disk, 0, &[2; 4096]).await })
            };
            held.wait_for(1).await;
            writer.cancel();
            quiet().await;
            // Its clusters are its own until it has ended: nobody may discard, and a closing disk waits.
            let discard = {
                let disk = Rc::clone(&disk);
                ring::spawn(async move { disk.discard(GuestOffset(0).range(UNIT)).await })
            };
            quiet().await;
            assert!(!discard.is_finished());
            held.end();
            discard.await.unwrap();
            assert_eq!(read(&disk, 0, 4096).await.unwrap(), [0; 4096]);
            disk.close().await.unwrap();
        });
    }
}

#[test]
fn closing_waits_for_requests_in_flight() {
    Sim::new(3).block_on(async {
        let (world, disk) = alone(Formats::Real, 3, DiskOptions::default()).await;
        let held = world.hold("top", Write);
        let writer = {
            let disk = Rc::clone(&disk);
            ring::spawn(async move { write(&disk, 0, &[2; 4096]).await })
        };
        held.wait_for(1).await;
        let closing = {
            let disk = Rc::clone(&disk);
            ring::spawn(async move { disk.close().await })
        };
        quiet().await;
        assert!(!closing.is_finished());
        assert_eq!(disk.flush().await.unwrap_err().kind(), ErrorKind::Busy);
        held.end();
        writer.await.unwrap();
        closing.await.unwrap();
        let disk = world.disk("top", DiskOptions::default()).await;
        assert_eq!(read(&disk, 0, 4096).await.unwrap(), [2; 4096]);
        assert!(!disk.chain()[0].image.info().dirty);
        disk.close().await.unwrap();
    });
}

#[test]
fn a_write_without_space_fails_alone() {
    Sim::new(3).block_on(async {
        let (world, disk) = alone(Formats::Real, 3, DiskOptions::default()).await;
        write(&disk, 0, &[1; 512]).await.unwrap();
        disk.flush().await.unwrap();
        // The payload, not the tables.
        let payload = Match::on(Write)
            .or(Zero)
            .or(Allocate)
            .or(SetSize)
            .when(|request| request.range.is_some_and(|range| range.len() == 5000));
        let full = world.faults("top").rule(payload, Action::Fail(Failure::ENOSPC));
        let error = write(&disk, 5 * UNIT, &[2; 5000]).await.unwrap_err();
        assert_eq!(error.errno(), 28, "{error}");
        full.end();
        assert_eq!(read(&disk, 5 * UNIT, 5000).await.unwrap(), [0; 5000], "nothing was linked");
        write(&disk, 5 * UNIT, &[3; 5000]).await.unwrap();
        assert_eq!(read(&disk, 5 * UNIT, 5000).await.unwrap(), [3; 5000]);
        assert_eq!(disk.stats().failed_wr_operations, 1);
        disk.close().await.unwrap();
        let disk = world.disk("top", DiskOptions::default()).await;
        let report = disk.chain()[0].image.check(image::Repair::None).await.unwrap();
        assert!(report.is_clean(), "{report:?}");
        disk.close().await.unwrap();
    });
}

#[test]
fn many_small_writes_allocate_side_by_side() {
    Sim::new(3).block_on(async {
        let (world, disk) = alone(Formats::Real, 3, DiskOptions::default()).await;
        let held =
            world.faults("top").rule(Match::on(Write).when(|r| r.range.is_some_and(|r| r.len() == 3000)), Action::Hold);
        let writers: Vec<_> = (0..12)
            .map(|i| {
                let disk = Rc::clone(&disk);
                ring::spawn(async move { write(&disk, i * UNIT, &[7; 3000]).await })
            })
            .collect();
        quiet().await;
        assert_eq!(held.held(), 12, "all in flight at once");
        held.end();
        join_all(writers).await.into_iter().for_each(Result::unwrap);
        disk.close().await.unwrap();
    });
}

#[test]
fn requests_past_the_end_are_refused() {
    Sim::new(3).block_on(async {
        let (_world, disk) = alone(Formats::Real, 3, DiskOptions::default()).await;
        let size = disk.size();
        for (at, len) in [(size, 1), (size - 1, 2), (u64::MAX - 1, 1), (u64::MAX, 1)] {
            let at = GuestOffset(at);
            let kinds = [
                disk.read(at, Iov::zeroed(len)).await.unwrap_err().kind(),
                disk.write(at, Iov::zeroed(len), false).await.unwrap_err().kind(),
            ];
            assert_eq!(kinds, [ErrorKind::InvalidArgument; 2]);
        }
        assert!(disk.write_zeroes(GuestOffset(size).range(1), true, false).await.is_err());
        assert!(disk.discard(GuestOffset(0).range(size + 1)).await.is_err());
        disk.read(GuestOffset(size), Iov::empty()).await.unwrap();
        disk.write(GuestOffset(size), Iov::empty(), true).await.unwrap();
        disk.close().await.unwrap();
    });
}
