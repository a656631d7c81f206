//! Streams: what is missing, what gets in their way, and how they end.

extern crate headwater_disk as disk;

mod harness;

use disk::{Disk, DiskOptions, ErrorKind, Missing, StreamBase};
use harness::world::{Formats, World, noise, quiet, read, write};
use image::Format;
use layout::{GuestOffset, GuestRange};
use ring::sim::Sim;
use std::cell::RefCell;
use std::rc::Rc;
use std::time::Duration;
use store::Operation::{Extent, Flush, Read, Write};
use store::fault::{Action, Failure, Match};
use store::memory::MemoryStore;
use store::trace::Moment;

const UNIT: u64 = 65536;

fn range(start: u64, end: u64) -> GuestRange {
    GuestRange::between(GuestOffset(start), GuestOffset(end))
}

/// Brings in everything above `base`, some chunks side by side.
async fn bring_in(disk: &Rc<Disk>, base: &StreamBase) -> disk::Result<()> {
    let mut from = GuestOffset::ZERO;
    let mut running = Vec::new();
    while let Some(missing) = disk.next_missing(from, base).await? {
        let part = missing.range.first(3 * UNIT);
        from = part.end();
        let (disk, base) = (Rc::clone(disk), base.clone());
        running.push(ring::spawn(async move { disk.populate(part, &base).await }));
        if running.len() >= 4 {
            running.remove(0).await?;
        }
    }
    for one in running {
        one.await?;
    }
    Ok(())
}

/// A world with a QED image of `clusters` over a raw file of noise.
async fn overlay(seed: u64, clusters: u64) -> (Rc<World>, Rc<Disk>, Vec<u8>) {
    let world = World::new(Formats::Real, seed, false);
    let base = noise(seed, (clusters * UNIT) as usize);
    world.raw("base", &base);
    world.create("top", Some(UNIT), clusters * UNIT, Some("base")).await;
    let disk = world.disk("top", DiskOptions::default()).await;
    (world, disk, base)
}

#[test]
fn a_stream_brings_everything_once_and_lets_go() {
    for seed in 0..12 {
        Sim::new(seed).block_on(async {
            let (world, disk, base) = overlay(seed, 40).await;
            disk.set_copy_on_read(true);
            let reader = {
                let (disk, base) = (Rc::clone(&disk), base.clone());
                ring::spawn(async move {
                    for i in 0..30_u64 {
                        let at = i * 7919 * 13 % (39 * UNIT);
                        assert_eq!(read(&disk, at, 5000).await.unwrap(), base[at as usize..at as usize + 5000]);
                    }
                })
            };
            bring_in(&disk, &StreamBase::Nothing).await.unwrap();
            reader.await;
            quiet().await;
            disk.finish_stream(&StreamBase::Nothing, None).await.unwrap();
            assert_eq!(world.bytes_read("base"), base.len() as u64, "each byte once, whoever wanted it");
            assert_eq!(disk.chain().len(), 1);
            disk.close().await.unwrap();
            let disk = world.disk("top", DiskOptions::default()).await;
            assert_eq!(disk.chain().len(), 1, "it stands alone");
            assert_eq!(read(&disk, 0, base.len()).await.unwrap(), base);
            assert_eq!(disk.next_missing(GuestOffset::ZERO, &StreamBase::Nothing).await.unwrap(), None);
            disk.finish_stream(&StreamBase::Nothing, None).await.expect("a stream with nothing to do");
            disk.close().await.unwrap();
        });
    }
}

#[test]
fn what_a_guest_discards_during_a_stream_stays_discarded() {
    for seed in 0..12 {
        Sim::new(seed).block_on(async {
            let (world, disk, base) = overlay(seed, 4).await;
            let held = world.hold("base", Read);
            let copying = {
                let disk = Rc::clone(&disk);
                ring::spawn(async move { disk.populate(range(0, 4 * UNIT), &StreamBase::Nothing).await })
            };
            held.wait_for(1).await;
            disk.discard(range(UNIT, 2 * UNIT)).await.unwrap();
            assert_eq!(held.held(), 1, "the fetch is still under way");
            held.end();
            copying.await.unwrap();
            bring_in(&disk, &StreamBase::Nothing).await.unwrap();
            disk.finish_stream(&StreamBase::Nothing, None).await.unwrap();
            let mut expected = base;
            expected[UNIT as usize..2 * UNIT as usize].fill(0);
            assert_eq!(read(&disk, 0, expected.len()).await.unwrap(), expected);
            disk.close().await.unwrap();
        });
    }
}

#[test]
fn finishing_too_early_is_refused_and_changes_nothing() {
    Sim::new(5).block_on(async {
        let (world, disk, base) = overlay(5, 8).await;
        disk.set_copy_on_read(true);
        disk.populate(range(0, 3 * UNIT), &StreamBase::Nothing).await.unwrap();
        let error = disk.finish_stream(&StreamBase::Nothing, None).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Busy, "{error}");
        assert_eq!(disk.chain().len(), 2);
        assert!(disk.chain()[0].image.backing().is_some());
        read(&disk, 5 * UNIT, 100).await.unwrap();
        quiet().await;
        assert_eq!(disk.stats().copy_on_read_bytes, UNIT, "copy-on-read goes on");
        bring_in(&disk, &StreamBase::Nothing).await.unwrap();
        disk.finish_stream(&StreamBase::Nothing, None).await.unwrap();
        assert_eq!(read(&disk, 0, base.len()).await.unwrap(), base);
        assert_eq!(world.bytes_read("base"), base.len() as u64);
        disk.close().await.unwrap();
    });
}

#[test]
fn a_write_in_flight_is_waited_for_at_the_end() {
    for seed in 0..12 {
        Sim::new(seed).block_on(async {
            let (world, disk, mut base) = overlay(seed, 4).await;
            let held = world.hold("top", Write);
            let writer = {
                let disk = Rc::clone(&disk);
                ring::spawn(async move { write(&disk, 2 * UNIT, &noise(9, UNIT as usize)).await })
            };
            held.wait_for(1).await;
            let copying = {
                let disk = Rc::clone(&disk);
                ring::spawn(async move {
                    bring_in(&disk, &StreamBase::Nothing).await.unwrap();
                    disk.finish_stream(&StreamBase::Nothing, None).await
                })
            };
            quiet().await;
            assert!(!copying.is_finished() && !writer.is_finished());
            held.end();
            writer.await.unwrap();
            copying.await.unwrap();
            base[2 * UNIT as usize..3 * UNIT as usize].copy_from_slice(&noise(9, UNIT as usize));
            assert_eq!(read(&disk, 0, base.len()).await.unwrap(), base);
            disk.close().await.unwrap();
        });
    }
}

#[test]
fn a_read_in_flight_ends_with_the_chain_it_began_with() {
    for seed in 0..40 {
        Sim::new(seed).block_on(async {
            let world = World::new(Formats::Sketched, seed, false);
            let base = noise(seed, 64 << 10);
            world.create("base", Some(4096), 64 << 10, None).await;
            let disk = world.disk("base", DiskOptions::default()).await;
            write(&disk, 0, &base).await.unwrap();
            disk.close().await.unwrap();
            world.create("top", Some(4096), 64 << 10, Some("base")).await;
            let disk = world.disk("top", DiskOptions::default()).await;
            let held = world.faults("base").rule(Match::on(Read).times(1), Action::Hold);
            let reader = {
                let disk = Rc::clone(&disk);
                ring::spawn(async move { read(&disk, 4096, 8192).await })
            };
            held.wait_for(1).await;
            bring_in(&disk, &StreamBase::Nothing).await.unwrap();
            disk.finish_stream(&StreamBase::Nothing, None).await.unwrap();
            assert_eq!(disk.chain().len(), 1);
            let below = world.file("base").sketch.unwrap();
            quiet().await;
            assert!(!below.is_closed(), "somebody still reads there");
            held.end();
            assert_eq!(reader.await.unwrap(), base[4096..12288]);
            quiet().await;
            assert!(below.is_closed(), "nobody does");
            disk.close().await.unwrap();
        });
    }
}

#[test]
fn layers_are_closed_when_the_end_is_told() {
    Sim::new(1).block_on(async {
        let world = World::new(Formats::Sketched, 1, false);
        world.create("base", Some(4096), 8192, None).await;
        world.create("middle", Some(4096), 8192, Some("base")).await;
        world.create("top", Some(4096), 8192, Some("middle")).await;
        let disk = world.disk("top", DiskOptions::default()).await;
        let base = disk.find_base("base").unwrap();
        disk.finish_stream(&base, None).await.unwrap();
        assert!(world.file("middle").sketch.unwrap().is_closed());
        assert!(!world.file("base").sketch.unwrap().is_closed());
        disk.close().await.unwrap();
        assert!(world.file("base").sketch.unwrap().is_closed());
    });
}

#[test]
fn what_a_short_layer_hides_stays_hidden_when_it_goes() {
    for seed in 0..4 {
        Sim::new(seed).block_on(async {
            let world = World::new(Formats::Real, seed, false);
            world.raw("base", &noise(seed, 10 * UNIT as usize));
            let middle = 4 * UNIT + 512;
            world.create("middle", Some(UNIT), middle, Some("base")).await;
            world.create("top", Some(UNIT), 12 * UNIT, Some("middle")).await;
            let mut expected = noise(seed, 10 * UNIT as usize);
            expected.resize(12 * UNIT as usize, 0);
            expected[middle as usize..].fill(0);
            let disk = world.disk("top", DiskOptions::default()).await;
            assert_eq!(read(&disk, 0, expected.len()).await.unwrap(), expected);
            let base = disk.find_base("base").unwrap();
            assert_eq!(disk.find_base("node-base"), Some(base.clone()));
            assert_eq!(disk.find_base("top"), None);
            // The cluster that the middle ends in is copied; what follows is masked as far as the base reaches.
            let first = disk.next_missing(GuestOffset::ZERO, &base).await.unwrap().unwrap();
            assert_eq!(first, Missing { range: range(4 * UNIT, 5 * UNIT), zero: false });
            let second = disk.next_missing(first.range.end(), &base).await.unwrap().unwrap();
            assert_eq!(second, Missing { range: range(5 * UNIT, 10 * UNIT), zero: true });
            assert_eq!(disk.next_missing(second.range.end(), &base).await.unwrap(), None);
            bring_in(&disk, &base).await.unwrap();
            disk.finish_stream(&base, None).await.unwrap();
            assert_eq!(disk.chain().len(), 2);
            assert_eq!(read(&disk, 0, expected.len()).await.unwrap(), expected);
            disk.discard(range(5 * UNIT, 12 * UNIT)).await.unwrap();
            disk.close().await.unwrap();
            let disk = world.disk("top", DiskOptions::default()).await;
            let backing = disk.chain()[0].image.backing().unwrap();
            assert_eq!((backing.name.as_str(), backing.format), ("base", Some(Format::Raw)));
            assert_eq!(read(&disk, 0, expected.len()).await.unwrap(), expected);
            disk.close().await.unwrap();
        });
    }
}

/// Whoever walks on from the end of the last run stands at the disk's end, inside its last cluster: what that lacks must
/// not be found again, and again.
#[test]
fn a_walk_ends_at_an_end_that_cuts_a_cluster() {
    Sim::new(1).block_on(async {
        let world = World::new(Formats::Real, 1, false);
        let size = 3 * UNIT + 512;
        world.raw("base", &noise(1, 4 * UNIT as usize));
        world.create("top", Some(UNIT), size, Some("base")).await;
        let disk = world.disk("top", DiskOptions::default()).await;
        let found = disk.next_missing(GuestOffset::ZERO, &StreamBase::Nothing).await.unwrap().unwrap();
        assert_eq!(found, Missing { range: range(0, size), zero: false });
        assert_eq!(disk.next_missing(found.range.end(), &StreamBase::Nothing).await.unwrap(), None);
        assert!(disk.next_missing(GuestOffset(size - 1), &StreamBase::Nothing).await.unwrap().is_some());
        disk.close().await.unwrap();
    });
}

#[test]
fn a_terabyte_of_nothing_is_soon_walked() {
    Sim::new(1).block_on(async {
        const SIZE: u64 = 1 << 40;
        let world = World::new(Formats::Real, 1, false);
        let bytes = MemoryStore::new("base", SIZE);
        store::Store::write(&*bytes, layout::HostOffset(300 << 30), ring::Iov::from_slice(&[1; 100]), false)
            .await
            .unwrap();
        world.adopt("base", bytes, Format::Raw);
        world.create("middle", Some(UNIT), SIZE, Some("base")).await;
        world.create("top", Some(UNIT), SIZE, Some("middle")).await;
        let disk = world.disk("top", DiskOptions::default()).await;
        let base = disk.find_base("base").unwrap();
        assert_eq!(disk.next_missing(GuestOffset::ZERO, &base).await.unwrap(), None);
        let found = disk.next_missing(GuestOffset::ZERO, &StreamBase::Nothing).await.unwrap().unwrap();
        assert_eq!(found, Missing { range: range(300 << 30, (300 << 30) + UNIT), zero: false });
        assert_eq!(disk.next_missing(found.range.end(), &StreamBase::Nothing).await.unwrap(), None);
        let extents = world.begun("base", Extent).len();
        assert!(extents < 200, "{extents} questions for one island in a terabyte");
        disk.close().await.unwrap();
    });
}

#[test]
fn zeros_are_found_and_marked() {
    Sim::new(2).block_on(async {
        let world = World::new(Formats::Real, 2, false);
        let mut base = noise(2, 6 * UNIT as usize);
        base[UNIT as usize..4 * UNIT as usize].fill(0);
        world.raw("base", &base);
        world.create("top", Some(UNIT), 6 * UNIT, Some("base")).await;
        let disk = world.disk("top", DiskOptions::default()).await;
        // Zeros are stored there, no holes: they have to be looked at.
        let copied = disk.populate(range(0, 6 * UNIT), &StreamBase::Nothing).await.unwrap();
        assert_eq!((copied.data, copied.zero + copied.skipped), (3 * UNIT, 3 * UNIT));
        assert_eq!(disk.next_missing(GuestOffset::ZERO, &StreamBase::Nothing).await.unwrap(), None);
        disk.finish_stream(&StreamBase::Nothing, None).await.unwrap();
        assert_eq!(read(&disk, 0, base.len()).await.unwrap(), base);
        disk.close().await.unwrap();
    });
}

#[test]
fn errors_go_to_the_job_and_leave_nothing_behind() {
    Sim::new(2).block_on(async {
        let (world, disk, base) = overlay(2, 4).await;
        let broken = world.faults("base").rule(Match::on(Read), Action::Fail(Failure::EIO));
        let error = disk.populate(range(0, 4 * UNIT), &StreamBase::Nothing).await.unwrap_err();
        assert_eq!(error.errno(), 5);
        broken.end();
        let full =
            world.faults("top").rule(Match::on(Write).or(store::Operation::Allocate), Action::Fail(Failure::ENOSPC));
        let error = disk.populate(range(0, UNIT), &StreamBase::Nothing).await;
        full.end();
        if let Err(error) = error {
            assert!(error.is_no_space() || error.kind() == ErrorKind::Poisoned, "{error}");
        }
        assert_eq!(read(&disk, 0, base.len()).await.unwrap(), base);
        let _ = disk.close().await;
    });
}

#[test]
fn one_job_at_a_time() {
    Sim::new(2).block_on(async {
        let (_world, disk, _) = overlay(2, 4).await;
        let claim = disk.claim("one").unwrap();
        let error = disk.claim("two").err().unwrap();
        assert_eq!(error.kind(), ErrorKind::Busy);
        assert!(error.to_string().contains("'one'"), "{error}");
        assert_eq!(disk.resize(8 * UNIT).await.unwrap_err().kind(), ErrorKind::Busy);
        drop(claim);
        disk.claim("two").unwrap();
        disk.resize(8 * UNIT).await.unwrap();
        disk.close().await.unwrap();
    });
}

/// The world as a power cut could leave it: the base, and `top` as given.
async fn reopened(base: &[u8], top: store::memory::Snapshot) -> (Rc<Disk>, usize) {
    let world = World::new(Formats::Real, 0, false);
    world.raw("base", base);
    world.adopt("top", MemoryStore::from_snapshot("top", top), Format::Qed);
    let disk = world.disk("top", DiskOptions::default()).await;
    let depth = disk.chain().len();
    (disk, depth)
}

#[test]
fn a_power_cut_at_any_step_of_a_stream_loses_nothing() {
    for seed in 0..3 {
        Sim::new(seed).block_on(async {
            let (world, disk, base) = overlay(seed, 6).await;
            let faults = world.faults("top");
            faults.make_volatile(512).await.unwrap();
            // One operation at a time, with a power cut before each.
            let step = faults.rule(Match::any(), Action::Hold);
            let done = Rc::new(RefCell::new(false));
            let streaming = {
                let (disk, done) = (Rc::clone(&disk), Rc::clone(&done));
                ring::spawn(async move {
                    bring_in(&disk, &StreamBase::Nothing).await.unwrap();
                    disk.finish_stream(&StreamBase::Nothing, None).await.unwrap();
                    *done.borrow_mut() = true;
                })
            };
            let (mut alone, mut steps) = (0, 0);
            loop {
                quiet().await;
                let is_done = *done.borrow();
                let cut = faults.power_cut().unwrap();
                for state in cut.states(12, seed + steps) {
                    let (disk, depth) = reopened(&base, state.image).await;
                    assert!(depth == 1 || !is_done, "the end was told: {:?}", state.choice);
                    alone += u64::from(depth == 1);
                    assert_eq!(read(&disk, 0, base.len()).await.unwrap(), base, "step {steps}, {:?}", state.choice);
                    disk.close().await.unwrap();
                }
                if is_done {
                    break;
                }
                steps += 1;
                step.release();
                ring::sleep(Duration::from_millis(1)).await;
            }
            step.end();
            streaming.await;
            assert!(alone > 0 && steps > 10, "{alone} {steps}");
            disk.close().await.unwrap();
        });
    }
}

#[test]
fn a_power_cut_at_any_step_of_growing_shows_no_old_bytes() {
    for seed in 0..3 {
        Sim::new(seed).block_on(async {
            let world = World::new(Formats::Real, seed, false);
            let base = noise(seed, 20 * UNIT as usize);
            world.raw("base", &base);
            let (old, new) = ((4 * UNIT + 1024) as usize, 15 * UNIT as usize);
            world.create("top", Some(UNIT), old as u64, Some("base")).await;
            let disk = world.disk("top", DiskOptions::default()).await;
            let faults = world.faults("top");
            faults.make_volatile(512).await.unwrap();
            let step = faults.rule(Match::any(), Action::Hold);
            let growing = {
                let disk = Rc::clone(&disk);
                ring::spawn(async move { disk.resize(new as u64).await })
            };
            let mut steps = 0;
            loop {
                quiet().await;
                let is_done = growing.is_finished();
                for state in faults.power_cut().unwrap().states(12, seed + steps) {
                    let (disk, _) = reopened(&base, state.image).await;
                    let size = usize::try_from(disk.size()).unwrap();
                    assert!(size == new || size == old && !is_done);
                    let seen = read(&disk, 0, size).await.unwrap();
                    assert_eq!(seen[..old], base[..old]);
                    assert!(seen[old..].iter().all(|b| *b == 0), "step {steps}: old bytes came to light");
                    // A growth that was cut off can be made again.
                    disk.resize(new as u64).await.unwrap();
                    let seen = read(&disk, 0, new).await.unwrap();
                    assert!(seen[..old] == base[..old] && seen[old..].iter().all(|b| *b == 0));
                    disk.close().await.unwrap();
                }
                if is_done {
                    break;
                }
                steps += 1;
                step.release();
                ring::sleep(Duration::from_millis(1)).await;
            }
            step.end();
            growing.await.unwrap();
            assert!(steps > 5, "{steps}");
            disk.close().await.unwrap();
        });
    }
}

#[test]
fn the_header_is_changed_between_two_barriers() {
    Sim::new(4).block_on(async {
        let (world, disk, _) = overlay(4, 6).await;
        bring_in(&disk, &StreamBase::Nothing).await.unwrap();
        disk.finish_stream(&StreamBase::Nothing, None).await.unwrap();
        let records = world.trace.records();
        let of_top = |operation, moment| {
            records.iter().filter(move |r| &*r.store == "top" && r.operation == operation && r.moment == moment)
        };
        let header = of_top(Write, Moment::Started).rfind(|r| r.range.is_some_and(|r| r.start().get() < 4096));
        let header = header.expect("the header was written").number;
        let others = of_top(Write, Moment::Started).rfind(|r| r.number < header).unwrap().number;
        let barriers: Vec<_> = of_top(Flush, Moment::Succeeded).map(|r| r.number).collect();
        assert!(barriers.iter().any(|barrier| (others..header).contains(barrier)), "everything durable before");
        assert!(barriers.iter().any(|barrier| *barrier > header), "durable when told");
        disk.close().await.unwrap();
    });
}
