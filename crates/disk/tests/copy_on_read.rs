//! Copy-on-read, fetches and guest writes getting in each other's way, one situation a test, in many orders.

extern crate headwater_disk as disk;

mod harness;

use disk::{Disk, DiskOptions, ErrorKind, StreamBase};
use harness::world::{Formats, World, noise, quiet, read, write};
use layout::{GuestOffset, HostOffset};
use ring::Iov;
use ring::sim::Sim;
use std::rc::Rc;
use std::time::Duration;
use store::Operation::{Read, Write};
use store::fault::{Action, Failure, Match};

const UNIT: usize = 65536;
const SIZE: usize = 16 * UNIT;
const COPY: DiskOptions = DiskOptions { copy_on_read: true, write_through: false, discard: true };

/// Runs `test` on a QED image over a raw one full of noise, in many orders.
fn each(test: impl AsyncFn(&World, &Rc<Disk>, &[u8])) {
    for seed in 0..12 {
        Sim::new(seed).block_on(async {
            let world = World::new(Formats::Real, seed, false);
            let base = noise(seed, SIZE);
            world.raw("base", &base);
            world.create("top", Some(UNIT as u64), SIZE as u64, Some("base")).await;
            let disk = world.disk("top", COPY).await;
            test(&world, &disk, &base).await;
            world.faults("base").end_rules();
            world.faults("top").end_rules();
            let size = usize::try_from(disk.size()).unwrap();
            let seen = read(&disk, 0, size).await.unwrap();
            disk.close().await.unwrap();
            let disk = world.disk("top", DiskOptions::default()).await;
            assert_eq!(read(&disk, 0, size).await.unwrap(), seen, "after opening again");
            let report = disk.chain()[0].image.check(image::Repair::None).await.unwrap();
            assert!(report.is_clean(), "{report:?}");
            disk.close().await.unwrap();
        });
    }
}

/// A request as a task of its own.
fn reading(disk: &Rc<Disk>, at: usize, len: usize) -> ring::JoinHandle<disk::Result<Vec<u8>>> {
    let disk = Rc::clone(disk);
    ring::spawn(async move { read(&disk, at as u64, len).await })
}

fn writing(disk: &Rc<Disk>, at: usize, bytes: &[u8]) -> ring::JoinHandle<disk::Result<()>> {
    let (disk, bytes) = (Rc::clone(disk), bytes.to_vec());
    ring::spawn(async move { write(&disk, at as u64, &bytes).await })
}

#[test]
fn the_guest_has_its_bytes_before_they_are_kept() {
    each(async |world, disk, base| {
        let held = world.hold("top", Write);
        assert_eq!(read(disk, 1000, 70000).await.unwrap(), base[1000..71000]);
        quiet().await;
        assert!(held.held() > 0, "populating must have begun");
        assert_eq!(disk.stats().copy_on_read_bytes, 0);
        held.end();
        quiet().await;
        assert_eq!(disk.stats().copy_on_read_bytes, 2 * UNIT as u64);
        let before = world.bytes_read("base");
        assert_eq!(before, 2 * UNIT as u64);
        assert_eq!(read(disk, 0, 2 * UNIT).await.unwrap(), base[..2 * UNIT]);
        assert_eq!(world.bytes_read("base"), before, "what was read once is here");
    });
}

#[test]
fn nothing_is_kept_without_copy_on_read_or_on_a_read_only_disk() {
    each(async |world, disk, base| {
        disk.set_copy_on_read(false);
        assert_eq!(read(disk, 0, 100).await.unwrap(), base[..100]);
        quiet().await;
        assert!(world.begun("top", Write).is_empty());
        assert_eq!(world.bytes_read("base"), 100, "exactly what was asked for");
    });
}

#[test]
fn readers_of_one_cluster_share_one_fetch() {
    each(async |world, disk, base| {
        let held = world.hold("base", Read);
        let readers: Vec<_> = (0..5).map(|i| reading(disk, i * 1000, 30000)).collect();
        held.wait_for(1).await;
        quiet().await;
        assert_eq!(held.held(), 1);
        held.end();
        for (i, reader) in readers.into_iter().enumerate() {
            assert_eq!(reader.await.unwrap(), base[i * 1000..i * 1000 + 30000]);
        }
        assert_eq!(world.bytes_read("base"), UNIT as u64);
    });
}

#[test]
fn a_write_of_a_whole_cluster_wins_over_a_fetch_and_does_not_wait_for_it() {
    each(async |world, disk, base| {
        let held = world.hold("base", Read);
        let reader = reading(disk, 0, 2 * UNIT);
        held.wait_for(1).await;
        let news = noise(77, UNIT);
        write(disk, UNIT as u64, &news).await.unwrap();
        assert_eq!(held.held(), 1, "the fetch is still under way");
        assert_eq!(read(disk, UNIT as u64, UNIT).await.unwrap(), news);
        held.end();
        let seen = reader.await.unwrap();
        assert_eq!(seen[..UNIT], base[..UNIT]);
        assert!(seen[UNIT..] == base[UNIT..2 * UNIT] || seen[UNIT..] == news);
        quiet().await;
        assert_eq!(read(disk, 0, UNIT).await.unwrap(), base[..UNIT]);
        assert_eq!(read(disk, UNIT as u64, UNIT).await.unwrap(), news, "populate left it alone");
        assert_eq!(disk.stats().copy_on_read_bytes, UNIT as u64);
    });
}

#[test]
fn a_write_of_a_part_joins_the_fetch_of_its_cluster() {
    each(async |world, disk, base| {
        let held = world.hold("base", Read);
        let reader = reading(disk, 0, 100);
        held.wait_for(1).await;
        let writer = writing(disk, 5000, &[7; 3000]);
        quiet().await;
        assert!(!writer.is_finished());
        assert_eq!(held.held(), 1, "no fetch of its own");
        held.end();
        assert_eq!(reader.await.unwrap(), base[..100]);
        writer.await.unwrap();
        let mut expected = base[..UNIT].to_vec();
        expected[5000..8000].fill(7);
        quiet().await;
        assert_eq!(read(disk, 0, UNIT).await.unwrap(), expected);
        assert_eq!(world.bytes_read("base"), UNIT as u64);
    });
}

#[test]
fn a_write_of_a_part_takes_only_what_it_needs_from_below() {
    each(async |world, disk, base| {
        disk.set_copy_on_read(false);
        write(disk, 4096, &[7; 4096]).await.unwrap();
        assert_eq!(world.bytes_read("base"), (UNIT - 4096) as u64);
        let mut expected = base[..UNIT].to_vec();
        expected[4096..8192].fill(7);
        assert_eq!(read(disk, 0, UNIT).await.unwrap(), expected);
        // One write, fill and all: the rest are tables.
        let payload: Vec<_> = world.begun("top", Write).into_iter().filter(|w| w.len() == UNIT as u64).collect();
        assert_eq!(payload.len(), 1);
    });
}

#[test]
fn a_failed_fetch_links_nothing_and_is_tried_again() {
    each(async |world, disk, base| {
        world.faults("base").rule(Match::on(Read).times(1), Action::Fail(Failure::EIO));
        let error = read(disk, 0, UNIT).await.unwrap_err();
        assert_eq!(error.errno(), 5);
        quiet().await;
        assert!(world.begun("top", Write).is_empty());
        assert_eq!(disk.stats().failed_rd_operations, 1);
        assert_eq!(read(disk, 0, UNIT).await.unwrap(), base[..UNIT]);
    });
}

#[test]
fn a_bad_spot_fails_only_those_who_ask_for_it() {
    each(async |world, disk, base| {
        let spot = HostOffset(40000).range(512);
        world.faults("base").rule(Match::on(Read).touching(spot), Action::Fail(Failure::EIO));
        assert_eq!(read(disk, 0, 30000).await.unwrap(), base[..30000]);
        assert!(read(disk, 39000, 2000).await.is_err());
        write(disk, 0, &vec![1; 30000]).await.expect_err("the fill is not to be had");
        write(disk, 0, &noise(5, UNIT)).await.expect("a whole cluster needs none");
    });
}

#[test]
fn when_the_budget_is_used_up_reads_go_on_and_nothing_more_is_kept() {
    for seed in 0..2 {
        Sim::new(seed).block_on(async {
            let world = World::new(Formats::Real, seed, false);
            let size = 48 << 20;
            let base = noise(seed, size);
            world.raw("base", &base);
            world.create("top", Some(UNIT as u64), size as u64, Some("base")).await;
            let disk = world.disk("top", COPY).await;
            let held = world.hold("top", Write);
            let chunk = 4 << 20;
            for at in (0..size).step_by(chunk) {
                assert_eq!(read(&disk, at as u64, chunk).await.unwrap(), base[at..at + chunk]);
            }
            held.end();
            quiet().await;
            ring::sleep(Duration::from_millis(1)).await;
            quiet().await;
            assert_eq!(disk.stats().copy_on_read_bytes, 32 << 20, "the budget");
            assert_eq!(world.bytes_read("base"), size as u64);
            read(&disk, 0, size).await.unwrap();
            quiet().await;
            assert_eq!(disk.stats().copy_on_read_bytes, size as u64);
            disk.close().await.unwrap();
        });
    }
}

#[test]
fn a_guest_is_held_while_a_source_does_not_answer_and_a_job_is_told() {
    each(async |world, disk, base| {
        let away = world.faults("base").rule(Match::on(Read), Action::Fail(store::ErrorKind::Unavailable.into()));
        let began = ring::now();
        let (a, b) = (reading(disk, 0, 100), reading(disk, UNIT, 100));
        let w = writing(disk, 2 * UNIT, &[3; 100]);
        let job = disk.populate(GuestOffset(0).range(UNIT as u64), &StreamBase::Nothing).await;
        assert!(job.unwrap_err().is_unavailable());
        ring::sleep(Duration::from_mins(1)).await;
        assert!(!a.is_finished() && !b.is_finished() && !w.is_finished());
        let tries = away.hits();
        assert!((20..80).contains(&tries), "{tries} tries in a minute: neither a storm nor asleep");
        away.end();
        assert_eq!(a.await.unwrap(), base[..100]);
        assert_eq!(b.await.unwrap(), base[UNIT..UNIT + 100]);
        w.await.unwrap();
        assert!(ring::now().since(began) < Duration::from_secs(66), "back soon after the source is");
        assert_eq!(disk.stats().failed_rd_operations, 0);
    });
}

/// Also where only the tables of a layer below are asked: for zeros in a part of a cluster, and for a status.
#[test]
fn a_guest_is_held_while_the_tables_below_cannot_be_read() {
    for seed in 0..4 {
        Sim::new(seed).block_on(async {
            let world = World::new(Formats::Real, seed, false);
            world.create("base", Some(UNIT as u64), SIZE as u64, None).await;
            let base = world.disk("base", DiskOptions::default()).await;
            write(&base, 0, &noise(seed, UNIT)).await.unwrap();
            base.close().await.unwrap();
            world.create("top", Some(UNIT as u64), SIZE as u64, Some("base")).await;
            let disk = world.disk("top", DiskOptions::default()).await;
            let away = world.faults("base").rule(Match::on(Read), Action::Fail(store::ErrorKind::Unavailable.into()));
            let zeroes = Rc::clone(&disk);
            let range = GuestOffset(512).range(512);
            let zeroed = ring::spawn(async move { zeroes.write_zeroes(range, true, false).await });
            let asks = Rc::clone(&disk);
            let status = ring::spawn(async move { asks.status(GuestOffset(0).range(512)).await });
            ring::sleep(Duration::from_secs(20)).await;
            assert!(!zeroed.is_finished() && !status.is_finished());
            away.end();
            zeroed.await.unwrap();
            assert!(!status.await.unwrap().zero);
            assert_eq!(read(&disk, 512, 512).await.unwrap(), [0; 512]);
            disk.close().await.unwrap();
        });
    }
}

#[test]
fn closing_ends_held_requests() {
    Sim::new(1).block_on(async {
        let world = World::new(Formats::Real, 1, false);
        world.raw("base", &noise(1, SIZE));
        world.create("top", Some(UNIT as u64), SIZE as u64, Some("base")).await;
        let disk = world.disk("top", COPY).await;
        world.faults("base").rule(Match::on(Read), Action::Fail(store::ErrorKind::Unavailable.into()));
        let reader = reading(&disk, 0, 100);
        ring::sleep(Duration::from_secs(20)).await;
        let began = ring::now();
        disk.close().await.unwrap();
        assert_eq!(ring::now().since(began), Duration::ZERO);
        assert!(reader.await.unwrap_err().is_unavailable());
        assert_eq!(read(&disk, 0, 1).await.unwrap_err().kind(), ErrorKind::Busy);
        disk.close().await.expect("closing twice is closing once");
    });
}

#[test]
fn zeros_are_kept_as_marks() {
    Sim::new(3).block_on(async {
        let world = World::new(Formats::Real, 3, false);
        let mut base = noise(3, 4 * UNIT);
        base[UNIT..2 * UNIT].fill(0);
        world.raw("base", &base);
        world.create("top", Some(UNIT as u64), 4 * UNIT as u64, Some("base")).await;
        let disk = world.disk("top", COPY).await;
        assert_eq!(read(&disk, 0, 4 * UNIT).await.unwrap(), base);
        quiet().await;
        let status = disk.status(GuestOffset(UNIT as u64).range(10)).await.unwrap();
        assert!(status.zero && status.allocated && status.depth == 0 && status.host.is_none(), "{status:?}");
        let payload: u64 =
            world.begun("top", Write).iter().filter(|w| w.start().get() >= 1 << 18).map(|w| w.len()).sum();
        assert!(payload >= 3 * UNIT as u64, "{payload}");
        disk.close().await.unwrap();
    });
}

#[test]
fn a_slow_read_never_sees_what_a_freed_cluster_holds_next() {
    for seed in 0..200 {
        Sim::new(seed).block_on(async {
            let world = World::new(Formats::Sketched, seed, false);
            world.create("top", Some(4096), 1 << 16, None).await;
            let disk = world.disk("top", DiskOptions::default()).await;
            write(&disk, 0, &[1; 4096]).await.unwrap();
            let held = world.hold("top", Read);
            let reader = reading(&disk, 0, 4096);
            held.wait_for(1).await;
            disk.discard(GuestOffset(0).range(4096)).await.unwrap();
            disk.flush().await.unwrap();
            write(&disk, 8192, &[2; 4096]).await.unwrap();
            held.end();
            let seen = reader.await.unwrap();
            assert!(seen == [0; 4096] || seen == [1; 4096], "{}", seen[0]);
            disk.close().await.unwrap();
        });
    }
}

#[test]
fn what_a_guest_scribbles_into_its_buffer_harms_nobody() {
    each(async |world, disk, base| {
        let held = world.hold("top", Write);
        let buffer = Iov::from_slice(&[1; 512]);
        let (d, b) = (Rc::clone(disk), buffer.clone());
        let writer = ring::spawn(async move { d.write(GuestOffset(512), b, false).await });
        // A read whose buffer is overwritten at once: what is kept is what came from below.
        let into = Iov::alloc(UNIT);
        disk.read(GuestOffset(UNIT as u64), into.clone()).await.unwrap();
        into.fill(0xff);
        quiet().await;
        buffer.fill(2);
        held.end();
        writer.await.unwrap();
        quiet().await;
        let seen = read(disk, 0, 2 * UNIT).await.unwrap();
        assert_eq!(seen[..512], base[..512]);
        assert!(seen[512..1024].iter().all(|b| *b == 1 || *b == 2));
        assert_eq!(seen[1024..], base[1024..2 * UNIT]);
    });
}
