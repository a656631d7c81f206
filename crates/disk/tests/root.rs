//! Another chain under a disk in use, and carrying data down into a lower layer of it.

extern crate headwater_disk as disk;

mod harness;

use disk::{Dirty, Disk, DiskOptions, Layer};
use harness::dice::Dice;
use harness::world::{Formats, World, noise, quiet, read, write};
use layout::{GuestOffset, GuestRange};
use ring::sim::Sim;
use std::rc::Rc;
use std::time::Duration;
use store::Operation::{Flush, Read, Write};
use store::fault::{Action, Match};

const UNIT: u64 = 65536;
const CLUSTERS: u64 = 16;
const SIZE: usize = (CLUSTERS * UNIT) as usize;

fn range(start: u64, end: u64) -> GuestRange {
    GuestRange::between(GuestOffset(start), GuestOffset(end))
}

fn lent(layer: &Layer) -> Layer {
    Layer { lent: true, ..layer.clone() }
}

/// A disk over `top` on `base`, whose layers are lent, and an overlay that can be put on it.
async fn world(seed: u64, slow: bool) -> (Rc<World>, Rc<Disk>, Vec<Layer>, Vec<u8>) {
    let world = World::new(Formats::Real, seed, slow);
    let base = noise(seed, SIZE);
    world.raw("base", &base);
    world.create("top", Some(UNIT), SIZE as u64, Some("base")).await;
    world.create("over", Some(UNIT), SIZE as u64, None).await;
    let chain: Vec<Layer> = world.open("top").await.iter().map(lent).collect();
    let disk = Disk::new("disk", chain.clone(), DiskOptions::default());
    let mut longer: Vec<Layer> = world.open("over").await.iter().map(lent).collect();
    longer.extend(chain);
    (world, disk, longer, base)
}

#[test]
fn those_inside_leave_and_the_others_wait_and_go_on_over_the_longer_chain() {
    for seed in 0..8 {
        Sim::new(seed).block_on(async {
            let (world, disk, longer, base) = world(seed, false).await;
            let held = world.hold("top", Write);
            let inside = Rc::clone(&disk);
            let inside = ring::spawn(async move { write(&inside, 5, &[1; 100]).await });
            quiet().await;
            let stopping = Rc::clone(&disk);
            let stopping = ring::spawn(async move { stopping.drain().await });
            quiet().await;
            let outside = Rc::clone(&disk);
            let outside = ring::spawn(async move { write(&outside, 50, &[2; 100]).await });
            ring::sleep(Duration::from_secs(30)).await;
            assert!(!inside.is_finished() && !outside.is_finished() && !stopping.is_finished());
            held.end();
            let mut drained = stopping.await.unwrap();
            assert!(inside.is_finished() && !outside.is_finished());
            drained.flush().await.unwrap();
            let top = Rc::clone(&drained.chain()[0].image);
            assert!(!top.is_dirty());
            let options = drained.options();
            drained.put(longer, options);
            ring::sleep(Duration::from_secs(30)).await;
            assert!(!outside.is_finished(), "the door is shut still");
            drop(drained);
            outside.await.unwrap();
            inside.await.unwrap();
            let mut wanted = base.clone();
            wanted[5..105].fill(1);
            wanted[50..150].fill(2);
            assert_eq!(read(&disk, 0, SIZE).await.unwrap(), wanted);
            assert!(!top.is_dirty(), "it went into the overlay");
            assert_eq!(disk.stats().failed_wr_operations, 0);
            assert_eq!(disk.stats().wr_operations, 2, "counters are the disk's, not the chain's");
            disk.close().await.unwrap();
        });
    }
}

#[test]
fn who_is_held_for_want_of_a_source_is_sent_out_and_comes_back() {
    Sim::new(3).block_on(async {
        let (world, disk, longer, base) = world(3, false).await;
        let away = world.faults("base").rule(Match::on(Read), Action::Fail(store::ErrorKind::Unavailable.into()));
        let reader = Rc::clone(&disk);
        let reader = ring::spawn(async move { read(&reader, 7, 100).await });
        let writer = Rc::clone(&disk);
        let writer = ring::spawn(async move { write(&writer, UNIT + 7, &[3; 100]).await });
        ring::sleep(Duration::from_secs(20)).await;
        let began = ring::now();
        let mut drained = disk.drain().await.unwrap();
        assert_eq!(ring::now().since(began), Duration::ZERO, "nobody waits for a source to put a chain in place");
        let options = drained.options();
        drained.put(longer, options);
        drop(drained);
        ring::sleep(Duration::from_secs(20)).await;
        assert!(!reader.is_finished() && !writer.is_finished());
        away.end();
        assert_eq!(reader.await.unwrap(), base[7..107]);
        writer.await.unwrap();
        assert_eq!(read(&disk, UNIT + 7, 100).await.unwrap(), [3; 100]);
        disk.close().await.unwrap();
    });
}

#[test]
fn what_was_written_before_is_flushed_after() {
    Sim::new(5).block_on(async {
        let (world, disk, _, _) = world(5, false).await;
        write(&disk, 0, &[1; 512]).await.unwrap();
        disk.flush().await.unwrap();
        // In place: no table changes.
        write(&disk, 0, &[2; 512]).await.unwrap();
        let before = world.begun("top", Flush).len();
        drop(disk.drain().await.unwrap());
        disk.flush().await.unwrap();
        assert!(world.begun("top", Flush).len() > before, "the flush owed it");
        disk.close().await.unwrap();
    });
}

/// Whoever stops a disk may go away before it stands still: the door opens when those inside have left, not before.
#[test]
fn a_drain_that_is_given_up_opens_the_door_when_nobody_is_inside() {
    Sim::new(6).block_on(async {
        let (world, disk, _, base) = world(6, false).await;
        let held = world.hold("top", Write);
        let inside = Rc::clone(&disk);
        let inside = ring::spawn(async move { write(&inside, 0, &[1; 512]).await });
        quiet().await;
        let draining = ring::timeout(Duration::from_secs(5), disk.drain()).await;
        assert!(draining.is_none());
        let outside = Rc::clone(&disk);
        let outside = ring::spawn(async move { read(&outside, UNIT, 512).await });
        ring::sleep(Duration::from_secs(30)).await;
        assert!(!outside.is_finished(), "somebody is inside still");
        held.end();
        inside.await.unwrap();
        assert_eq!(outside.await.unwrap(), base[UNIT as usize..UNIT as usize + 512]);
        disk.close().await.unwrap();
    });
}

#[test]
fn nothing_put_in_place_is_the_same_chain_again() {
    Sim::new(4).block_on(async {
        let (_world, disk, _, base) = world(4, false).await;
        write(&disk, 0, &[1; 512]).await.unwrap();
        drop(disk.drain().await.unwrap());
        write(&disk, 512, &[2; 512]).await.unwrap();
        assert_eq!(read(&disk, 1024, 512).await.unwrap(), base[1024..1536]);
        assert_eq!(read(&disk, 0, 513).await.unwrap()[511..], [1, 2]);
        disk.close().await.unwrap();
        assert!(disk.drain().await.is_err());
    });
}

/// Guests write, zero and discard while everything is carried down, several times over. They see their own disk throughout; at the
/// end the layer below has it all.
#[test]
fn what_is_carried_down_under_a_guest_at_work_is_all_there() {
    for seed in 0..24 {
        Sim::new(seed).block_on(async {
            let dice = Dice::new(seed);
            let world = World::new(Formats::Real, seed, true);
            world.raw("bottom", &noise(seed, SIZE));
            world.create("base", Some(UNIT), SIZE as u64, Some("bottom")).await;
            // What the layers hold to begin with; the middle one is shorter than its base.
            let short = if seed % 2 == 0 { SIZE as u64 } else { 9 * UNIT + 512 };
            let mut model = noise(seed, SIZE);
            let fill = async |name: &str, at: usize, bytes: &[u8]| {
                let disk = world.disk(name, DiskOptions::default()).await;
                write(&disk, at as u64, bytes).await.unwrap();
                disk.close().await.unwrap();
            };
            fill("base", 3 * UNIT as usize + 100, &noise(seed + 1, 70_000)).await;
            model[3 * UNIT as usize + 100..][..70_000].copy_from_slice(&noise(seed + 1, 70_000));
            world.create("mid", Some(UNIT), short, Some("base")).await;
            fill("mid", 4 * UNIT as usize, &noise(seed + 2, 5000)).await;
            model[4 * UNIT as usize..][..5000].copy_from_slice(&noise(seed + 2, 5000));
            model[short as usize..].fill(0);
            world.create("top", Some(UNIT), SIZE as u64, Some("mid")).await;

            // The base is open for writing, as a commit has it.
            let mut chain: Vec<Layer> = world.open("top").await.iter().map(lent).collect();
            let base: Vec<Layer> = world.open("base").await.iter().map(lent).collect();
            chain.truncate(2);
            chain.extend(base);
            let (top, below) = (chain[0].node.clone(), chain[2].node.clone());
            let disk = Disk::new("disk", chain, DiskOptions::default());
            let (source, into) = (disk.from_layer(&top).unwrap(), disk.from_layer(&below).unwrap());
            let dirty = Rc::new(Dirty::default());
            disk.watch(&dirty);
            disk.set_changes_below(true);

            let guest = Rc::clone(&disk);
            let mut seen = model.clone();
            let at_work = ring::spawn(async move {
                for _ in 0..60 {
                    let len = 1 + dice.below(3 * UNIT - 1);
                    let at = dice.below(SIZE as u64 - len);
                    let (from, to) = (at as usize, (at + len) as usize);
                    match dice.below(4) {
                        0 => {
                            guest.write_zeroes(range(at, at + len), true, false).await.unwrap();
                            seen[from..to].fill(0);
                        }
                        1 => {
                            guest.discard(range(at, at + len)).await.unwrap();
                            // Whole clusters only: look what became of it.
                            seen[from..to].copy_from_slice(&read(&guest, at, to - from).await.unwrap());
                        }
                        2 => assert!(
                            read(&guest, at, to - from).await.unwrap() == seen[from..to],
                            "at {at}, {len} bytes"
                        ),
                        _ => {
                            let bytes = noise(at ^ len, to - from);
                            write(&guest, at, &bytes).await.unwrap();
                            seen[from..to].copy_from_slice(&bytes);
                        }
                    }
                    ring::sleep(Duration::from_millis(dice.below(3))).await;
                }
                seen
            });
            let mut at = GuestOffset::ZERO;
            while let Some(run) = source.next_above(at, &below).await.unwrap() {
                let part = run.range.first(2 * UNIT);
                at = part.end();
                dirty.clear(part, GuestOffset(SIZE as u64));
                source.carry(part, &below, &into).await.unwrap();
            }
            let again = async || {
                let mut at = GuestOffset::ZERO;
                while let Some(run) = dirty.next(at, GuestOffset(SIZE as u64)) {
                    at = run.end();
                    dirty.clear(run, GuestOffset(SIZE as u64));
                    source.carry(run, &below, &into).await.unwrap();
                }
            };
            while !at_work.is_finished() {
                again().await;
                ring::sleep(Duration::from_millis(1)).await;
            }
            model.copy_from_slice(&at_work.await);
            assert!(read(&disk, 0, SIZE).await.unwrap() == model);
            let mut drained = disk.drain().await.unwrap();
            again().await;
            assert!(dirty.is_empty());
            into.close().await.unwrap();
            let left = drained.chain()[2..].to_vec();
            let options = drained.options();
            drained.put(left, options);
            drop(drained);
            assert!(read(&disk, 0, SIZE).await.unwrap() == model, "seed {seed}");
            disk.close().await.unwrap();
        });
    }
}
