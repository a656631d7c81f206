//! Operations that fail, and callers that leave: what poisons an image and what does not, and that nothing is left half done.

use crate::guest::Guest;
use crate::subject::{Subject, marking_subjects, subjects};
use image::{ErrorKind, Keep, OpenOptions, Purpose};
use layout::{GuestOffset, GuestRange, HostOffset, HostRange};
use ring::Iov;
use ring::sim::Sim;
use std::rc::Rc;
use std::task::Poll;
use store::fault::{Action, Failure, FaultStore, Match};
use store::memory::MemoryStore;
use store::{Operation, Store};

const SIZE: u64 = 48 << 20;

fn range(at: u64, len: u64) -> GuestRange {
    GuestRange::new(GuestOffset(at), len)
}

fn broken() -> Failure {
    Failure::Kind(store::ErrorKind::Io, "broken on purpose".to_owned())
}

fn full() -> Failure {
    Failure::Kind(store::ErrorKind::NoSpace, "full on purpose".to_owned())
}

struct Bench {
    subject: Subject,
    memory: Rc<MemoryStore>,
    fault: Rc<FaultStore>,
    guest: Guest,
}

fn each(test: impl AsyncFn(Bench)) {
    each_seeded(1, test);
}

fn each_seeded(seeds: u64, test: impl AsyncFn(Bench)) {
    each_of(subjects(), seeds, test);
}

fn each_of(subjects: Vec<Subject>, seeds: u64, test: impl AsyncFn(Bench)) {
    for subject in subjects {
        for seed in 0..seeds {
            Sim::new(seed).block_on(async {
                let memory = MemoryStore::new("test.img", 0);
                subject.create(memory.clone(), SIZE, None).await;
                let fault = FaultStore::new(memory.clone(), seed);
                let guest = Guest::new(subject.open(fault.clone()).await.unwrap(), &[]);
                test(Bench { subject: subject.clone(), memory, fault, guest }).await;
            });
        }
    }
}

/// Which step of a commit fails: every flush, and every write of a table.
#[test]
fn a_failed_commit_poisons_and_reads_go_on() {
    for number in 1..=6 {
        each(async |bench| {
            let Bench { subject, memory, fault, guest } = bench;
            guest.write(0, &[1; 9000]).await.unwrap();
            guest.image.commit().await.unwrap();
            guest.write(5 << 20, &[2; 9000]).await.unwrap();
            // Data is written by the guest itself; from here on every change is the commit's.
            let rule = fault.rule(Match::on(Operation::Write).or(Operation::Flush).nth(number), Action::Fail(broken()));
            let result = guest.image.commit().await;
            if rule.hits() == 0 {
                return assert!(result.is_ok());
            }
            let error = result.unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Store);
            assert!(error.to_string().contains("broken on purpose"), "{error}");
            fault.end_rules();
            for refused in [
                guest.image.commit().await,
                guest.image.settle().await,
                guest.image.reserve(range(0, 1), Purpose::Data).await.map(drop),
                guest.image.write_zeroes(range(0, 1 << 20), true, true).await,
                guest.image.set_backing(None).await,
                guest.image.resize(SIZE * 2).await,
            ] {
                let refused = refused.unwrap_err();
                assert_eq!(refused.kind(), ErrorKind::Poisoned);
                assert!(refused.to_string().contains("broken on purpose"), "{refused}");
            }
            assert!(guest.image.poisoned().is_some());
            assert_eq!(guest.read(0, 9000).await.unwrap(), [1; 9000]);
            assert_eq!(guest.read(5 << 20, 9000).await.unwrap(), [2; 9000], "what is in memory stays visible");
            guest.image.close().await.unwrap();
            let guest = Guest::new(subject.open(memory.clone()).await.unwrap(), &[]);
            assert_eq!(guest.read(0, 9000).await.unwrap(), [1; 9000]);
            guest.image.close().await.unwrap();
            subject.assert_clean_after_a_cut(memory).await;
        });
    }
}

#[test]
fn everybody_who_waits_for_a_failed_commit_learns_why() {
    each_seeded(8, async |bench| {
        let Bench { fault, guest, .. } = bench;
        guest.write(0, &[1; 9000]).await.unwrap();
        fault.rule(Match::on(Operation::Flush), Action::Fail(broken()));
        let waiting: Vec<_> = (0..4)
            .map(|_| {
                let image = guest.image.clone();
                ring::spawn(async move { image.commit().await.unwrap_err() })
            })
            .collect();
        for error in waiting {
            let error = error.await;
            assert!(error.to_string().contains("broken on purpose"), "{error}");
        }
    });
}

#[test]
fn a_full_disk_is_a_clean_error_wherever_it_strikes() {
    for number in 1..=8 {
        each(async |bench| {
            let Bench { subject, memory, fault, guest } = bench;
            guest.write(0, &[1; 9000]).await.unwrap();
            let growing = Match::on(Operation::Allocate).or(Operation::SetSize).skip(number - 1);
            fault.rule(growing, Action::Fail(full()));
            let mut written = 0;
            let error = loop {
                let at = (written + 1) * (3 << 20) % SIZE;
                match guest.write(at, &vec![written as u8 + 2; 1 << 20]).await {
                    Ok(()) if written < 14 => written += 1,
                    Ok(()) => return,
                    Err(error) => break error,
                }
            };
            assert!(error.is_no_space(), "{error}");
            assert!(guest.image.poisoned().is_none());
            for n in 0..written {
                let at = (n + 1) * (3 << 20) % SIZE;
                assert!(guest.read(at, 1 << 20).await.unwrap().iter().all(|b| *b == n as u8 + 2));
            }
            guest.image.commit().await.unwrap();
            // Room again: it goes on.
            fault.end_rules();
            guest.write(40 << 20, &vec![9; 3 << 20]).await.unwrap();
            guest.image.close().await.unwrap();
            subject.assert_clean(memory).await;
        });
    }
}

#[test]
fn what_cannot_be_read_now_is_read_later() {
    each(async |bench| {
        let Bench { subject, memory, fault, guest } = bench;
        guest.write(0, &[1; 9000]).await.unwrap();
        guest.image.close().await.unwrap();
        let guest = Guest::new(subject.open(fault.clone()).await.unwrap(), &[]);
        let rule = fault.rule(Match::on(Operation::Read), Action::Fail(broken()));
        assert!(guest.image.load(range(0, 1)).await.is_err());
        assert!(guest.image.reserve(range(0, 1), Purpose::Data).await.is_err());
        rule.end();
        assert!(guest.image.poisoned().is_none());
        assert_eq!(guest.read(0, 9000).await.unwrap(), [1; 9000]);
        guest.write(9000, &[2; 9000]).await.unwrap();
        guest.image.close().await.unwrap();
        subject.assert_clean(memory).await;
    });
}

#[test]
fn a_table_is_read_once_however_many_wait_for_it() {
    each(async |bench| {
        let Bench { subject, fault, guest, .. } = bench;
        guest.write(0, &[1; 9000]).await.unwrap();
        guest.image.close().await.unwrap();
        let guest = Guest::new(subject.open(fault.clone()).await.unwrap(), &[]);
        let reads = fault.rule(Match::on(Operation::Read), Action::Hold);
        let waiting: Vec<_> = (0..10)
            .map(|_| {
                let image = guest.image.clone();
                ring::spawn(async move { image.load(range(0, 1)).await })
            })
            .collect();
        while reads.held() == 0 {
            ring::yield_now().await;
        }
        for _ in 0..50 {
            ring::yield_now().await;
        }
        // The one that reads goes away: another one takes over, and only one.
        let mut waiting = waiting.into_iter();
        waiting.next().unwrap().cancel();
        reads.release_all();
        let after = reads.hits();
        for task in waiting {
            while !task.is_finished() {
                reads.release_all();
                ring::yield_now().await;
            }
            task.await.unwrap();
        }
        assert!(reads.hits() <= after + 1, "{} reads", reads.hits());
    });
}

/// A reservation, a commit, a settling, each dropped after so and so many polls, while the store goes on with what it
/// was told: whatever was begun ends or is undone.
#[test]
fn callers_that_leave_leave_nothing_half_done() {
    for polls in 0..24 {
        each_seeded(2, async |bench| {
            let Bench { subject, memory, fault, guest } = bench;
            fault.outlive_callers(true);
            let image = guest.image.clone();
            drop_after(polls, image.reserve(range(7 << 20, 3 << 20), Purpose::Data)).await;
            guest.write(100, &vec![1; 100_000]).await.unwrap();
            drop_after(polls, image.commit()).await;
            guest.write(20 << 20, &vec![2; 100_000]).await.unwrap();
            drop_after(polls, image.reserve(range(30 << 20, 3 << 20), Purpose::Zero)).await;
            drop_after(polls, image.settle()).await;
            drop_after(polls, image.resize(SIZE + (1 << 20))).await;
            guest.write(22 << 20, &vec![3; 100_000]).await.unwrap();
            drop_after(polls, image.settle()).await;
            let backing = image::BackingRef { name: "base.img".into(), format: None };
            drop_after(polls, image.set_backing(Some(backing))).await;
            guest.write(24 << 20, &vec![4; 100_000]).await.unwrap();
            image.commit().await.unwrap();
            image.close().await.unwrap();
            subject.assert_clean(memory.clone()).await;
            let guest = Guest::new(subject.open(memory).await.unwrap(), &[]);
            for (at, byte) in [(100, 1), (20 << 20, 2), (22 << 20, 3), (24 << 20, 4)] {
                assert!(guest.read(at, 100_000).await.unwrap().iter().all(|b| *b == byte), "after {polls} polls");
            }
        });
    }
}

async fn drop_after<T>(polls: u32, mut work: image::ImageFuture<'_, T>) {
    let mut left = polls;
    std::future::poll_fn(|context| {
        if left == 0 {
            return Poll::Ready(());
        }
        left -= 1;
        work.as_mut().poll(context).map(drop)
    })
    .await;
}

/// A cut-off tail and a reservation that comes right then: the reservation's clusters must not be cut off under it.
#[test]
fn nothing_reserved_is_cut_off_while_settling() {
    each_seeded(12, async |bench| {
        let Bench { subject, memory, fault, guest } = bench;
        guest.write(0, &[1; 9000]).await.unwrap();
        let cuts = fault.rule(Match::on(Operation::SetSize), Action::Hold);
        let settling = {
            let image = guest.image.clone();
            ring::spawn(async move { image.settle().await })
        };
        for _ in 0..60 {
            ring::yield_now().await;
        }
        let writing = {
            let guest = guest.clone();
            ring::spawn(async move { guest.write(1 << 20, &vec![2; 200_000]).await })
        };
        for _ in 0..60 {
            ring::yield_now().await;
        }
        cuts.release_all();
        cuts.end();
        settling.await.unwrap();
        writing.await.unwrap();
        guest.image.commit().await.unwrap();
        assert!(guest.read(1 << 20, 200_000).await.unwrap().iter().all(|b| *b == 2));
        guest.image.close().await.unwrap();
        subject.assert_clean(memory).await;
    });
}

/// A guest's full write over a mapped cluster: the old cluster is used again only when nothing on disk leads to it.
#[test]
fn a_replaced_cluster_is_used_again_only_after_the_commit() {
    each(async |bench| {
        let Bench { subject, memory, guest, .. } = bench;
        let cluster = guest.image.cluster_size();
        guest.write(0, &vec![1; 3 * cluster as usize]).await.unwrap();
        guest.image.commit().await.unwrap();
        let image::Mapping::Data(old) = guest.mapping(range(cluster, 1)).await.unwrap().mapping else { panic!() };
        let reservation = guest.image.reserve(range(cluster, 1), Purpose::Data).await.unwrap();
        let payload = ring::Iov::from_slice(&vec![2; cluster as usize]);
        memory.write(reservation.host().unwrap(), payload, false).await.unwrap();
        let _ = reservation.link(Keep::New, |_| false);
        let next = guest.image.reserve(range(9 * cluster, 1), Purpose::Data).await.unwrap();
        assert_ne!(next.host(), Some(old));
        drop(next);
        guest.image.commit().await.unwrap();
        let next = guest.image.reserve(range(9 * cluster, 1), Purpose::Data).await.unwrap();
        assert_eq!(next.host(), Some(old));
        drop(next);
        let all = guest.read(0, 3 * cluster).await.unwrap();
        assert!((0..3).all(|n| all[n * cluster as usize] == 1 + u8::from(n == 1)));
        guest.image.close().await.unwrap();
        subject.assert_clean(memory).await;
    });
}

/// The need-check bit is durable before anything else of a session is written.
#[test]
fn nothing_is_handed_out_before_need_check_is_durable() {
    each_of(marking_subjects(), 1, async |bench| {
        let Bench { subject, memory, fault, guest } = bench;
        fault.make_volatile(512).await.unwrap();
        let flushes = fault.rule(Match::on(Operation::Flush), Action::Hold);
        let reserving = {
            let image = guest.image.clone();
            ring::spawn(async move { image.reserve(range(0, 1), Purpose::Data).await })
        };
        while flushes.held() == 0 {
            ring::yield_now().await;
        }
        for _ in 0..50 {
            ring::yield_now().await;
        }
        assert!(!reserving.is_finished());
        flushes.release_all();
        let reservation = reserving.await.unwrap();
        let cut = fault.power_cut().unwrap();
        let left = MemoryStore::from_snapshot("cut.img", cut.image(&cut.nothing()));
        let options = OpenOptions { read_only: true, for_check: true };
        assert!(image::open(left, subject.format, options).await.unwrap().info().dirty);
        drop(reservation);
        flushes.end();
        guest.image.close().await.unwrap();
        subject.assert_clean(memory).await;
    });
}

/// Flushes of an image in which nothing changed write nothing.
#[test]
fn a_flush_without_changes_is_one_barrier() {
    each(async |bench| {
        let Bench { fault, guest, .. } = bench;
        guest.write(0, &[1; 9000]).await.unwrap();
        guest.image.commit().await.unwrap();
        let flushes = fault.rule(Match::on(Operation::Flush).when(|_| true), Action::Delay(std::time::Duration::ZERO));
        let writes = fault.rule(
            Match::on(Operation::Write).touching(HostRange::new(HostOffset::ZERO, u64::MAX)),
            Action::Delay(std::time::Duration::ZERO),
        );
        guest.image.commit().await.unwrap();
        assert_eq!((flushes.hits(), writes.hits()), (1, 0));
    });
}

/// The publish order, seen from below: data's barrier, slices, barrier, L1 entries, barrier.
#[test]
fn a_commit_writes_in_publish_order() {
    each_of(marking_subjects(), 1, async |bench| {
        let Bench { fault, .. } = bench;
        let image = bench.guest.image.clone();
        let backing = image::BackingRef { name: "base.img".into(), format: None };
        image.set_backing(Some(backing)).await.unwrap();
        let guest = Guest::new(image, &[9; 100]);
        guest.write(0, &[1; 100]).await.unwrap();
        let cluster = guest.image.cluster_size();
        let l1 = cluster..cluster + cluster * u64::from(bench.subject.table_size.unwrap());
        let seen = Rc::new(std::cell::RefCell::new(Vec::new()));
        let note = seen.clone();
        let record = Match::on(Operation::Write).or(Operation::Flush).when(move |request| {
            note.borrow_mut().push(match request.range {
                None => "barrier",
                Some(range) if l1.contains(&range.start().get()) => "L1",
                Some(_) => "L2",
            });
            false
        });
        fault.rule(record, Action::Hold);
        guest.image.commit().await.unwrap();
        assert_eq!(seen.take(), ["barrier", "L2", "barrier", "L1", "barrier"]);
        // The table is there; one more cluster in it.
        guest.write(5 * cluster, &[2; 100]).await.unwrap();
        seen.take();
        guest.image.commit().await.unwrap();
        assert_eq!(seen.take(), ["barrier", "L2", "barrier"]);
        // With nothing below, new space reads as zeros: as before the write. One barrier does.
        guest.image.set_backing(None).await.unwrap();
        guest.write(9 * cluster, &[2; 100]).await.unwrap();
        seen.take();
        guest.image.commit().await.unwrap();
        assert_eq!(seen.take(), ["L2", "barrier"]);
    });
}

/// The same with refcounts: they are durable, with the data, before anything leads to what they count.
#[test]
fn a_commit_counts_before_it_publishes() {
    let counting = subjects().into_iter().filter(|subject| subject.may_leak()).collect();
    each_of(counting, 1, async |bench| {
        let Bench { fault, guest, memory, .. } = bench;
        let header = Iov::alloc(512);
        memory.read(HostOffset::ZERO, header.clone()).await.unwrap();
        let header = layout::qcow2::Header::decode(&header.to_vec()).unwrap();
        let cluster = header.cluster_size();
        let tables = header.refcount_table.get() / cluster..header.l1_table.get() / cluster;
        let seen = Rc::new(std::cell::RefCell::new(Vec::new()));
        let note = seen.clone();
        let record = Match::on(Operation::Write).or(Operation::Flush).when(move |request| {
            let at = request.range.map(|range| range.start().get() / cluster);
            note.borrow_mut().push(match at {
                None => "barrier",
                Some(at) if tables.contains(&at) => "refcounts",
                Some(at) if header.l1_range().contains(HostOffset(at * cluster)) => "L1",
                Some(_) => "L2",
            });
            false
        });
        guest.write(0, &[1; 100]).await.unwrap();
        fault.rule(record, Action::Hold);
        guest.image.commit().await.unwrap();
        assert_eq!(seen.take(), ["refcounts", "barrier", "L2", "barrier", "L1", "barrier"]);
        // The table is there; one more cluster in it.
        guest.write(5 * cluster, &[2; 100]).await.unwrap();
        seen.take();
        guest.image.commit().await.unwrap();
        assert_eq!(seen.take(), ["refcounts", "barrier", "L2", "barrier"]);
    });
}

/// Holes are filled when an image is closed. Where an *entry* finds no space on the way, nobody knows what it looks like:
/// that is a failure, and need-check stays, so that the next opening looks.
#[test]
fn an_entry_without_space_while_holes_are_filled_leaves_need_check() {
    for number in 1..=3 {
        each(async |bench| {
            let Bench { subject, memory, fault, guest } = bench;
            let cluster = guest.image.cluster_size();
            guest.write(0, &[1; 512]).await.unwrap();
            let hole = guest.image.reserve(range(cluster, 1), Purpose::Data).await.unwrap();
            for n in 2..5 {
                guest.write(n * cluster, &[n as u8; 512]).await.unwrap();
            }
            drop(hole);
            guest.image.commit().await.unwrap();
            // The writes of a close: copies of clusters into the hole, then entries.
            let rule = fault.rule(Match::on(Operation::Write).nth(number), Action::Fail(full()));
            let closed = guest.image.close().await;
            if rule.hits() == 0 {
                return closed.unwrap();
            }
            let options = OpenOptions { read_only: true, for_check: true };
            let left = image::open(memory.clone(), subject.format, options).await.unwrap();
            let leaks = left.check(image::Repair::None).await.unwrap().leaks;
            let known = subject.may_leak() || left.info().dirty;
            assert!(leaks == 0 || known, "{leaks} leaks, and nobody will look for them ({number})");
            drop(left);
            let guest = Guest::new(subject.open(memory.clone()).await.unwrap(), &[]);
            assert_eq!(guest.read(2 * cluster, 512).await.unwrap(), [2; 512]);
            assert_eq!(guest.read(4 * cluster, 512).await.unwrap(), [4; 512]);
            guest.image.close().await.unwrap();
            subject.assert_clean_after_a_cut(memory).await;
        });
    }
}

/// A table has to move towards the front by fewer clusters than it is long: where it goes must not be cleared while half of
/// it still lies there.
#[test]
fn a_table_that_moves_by_less_than_its_length_survives() {
    each_seeded(4, async |bench| {
        let Bench { subject, memory, guest, .. } = bench;
        let cluster = guest.image.cluster_size();
        let second = subject.entries() * cluster;
        if second >= SIZE {
            guest.image.resize(second + SIZE).await.unwrap();
        }
        let mark = async |at: u64| {
            let marks = guest.image.reserve(range(at, cluster), Purpose::Zero).await.unwrap();
            assert_eq!(marks.link(Keep::New, |_| false).linked, cluster);
        };
        mark(cluster).await;
        let hole = guest.image.reserve(range(0, cluster), Purpose::Data).await.unwrap();
        // A table and nothing else: it ends the file.
        mark(second).await;
        mark(second + 5 * cluster).await;
        drop(hole);
        guest.image.close().await.unwrap();
        subject.assert_clean(memory.clone()).await;
        let guest = Guest::new(subject.open(memory).await.unwrap(), &[9; 9000]);
        for at in [cluster, second, second + 5 * cluster] {
            let found = guest.mapping(range(at, 512)).await.unwrap().mapping;
            assert_eq!(found == image::Mapping::Zero, subject.marks_zeros(), "{}: {at}", subject.name);
            assert_eq!(guest.read(at, 512).await.unwrap(), [0; 512]);
        }
        guest.image.close().await.unwrap();
    });
}
