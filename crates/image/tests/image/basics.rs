//! The contract, method by method.

use crate::guest::Guest;
use crate::subject::{Subject, subjects};
use image::{BackingRef, ErrorKind, Keep, Mapping, OpenOptions, Purpose};
use layout::{GuestOffset, GuestRange};
use ring::Iov;
use ring::sim::Sim;
use std::rc::Rc;
use store::Store;
use store::memory::MemoryStore;

const SIZE: u64 = 48 << 20;

fn range(at: u64, len: u64) -> GuestRange {
    GuestRange::new(GuestOffset(at), len)
}

/// Runs `test` for each format with a fresh image of [`SIZE`] bytes.
fn each<F: AsyncFn(Subject, Rc<MemoryStore>)>(test: F) {
    for subject in subjects() {
        Sim::new(7).block_on(async {
            let store = MemoryStore::new("test.img", 0);
            subject.create(store.clone(), SIZE, None).await;
            test(subject, store).await;
        });
    }
}

#[test]
fn new_image_is_clean_empty_and_as_large_as_asked() {
    each(async |subject, store| {
        subject.assert_clean(store.clone()).await;
        let image = subject.open(store.clone()).await.unwrap();
        assert_eq!((image.size(), image.backing(), image.is_dirty()), (SIZE, None, false));
        let guest = Guest::new(image.clone(), &[]);
        let mapped = guest.mapping(range(0, SIZE)).await.unwrap();
        assert_eq!((mapped.len, mapped.mapping), (SIZE, Mapping::Unallocated));
        let before = store.to_vec();
        image.close().await.unwrap();
        assert!(store.to_vec() == before, "opening and closing changed something");
    });
}

#[test]
fn what_was_written_is_there_after_commit_and_reopening() {
    each(async |subject, store| {
        let guest = Guest::new(subject.open(store.clone()).await.unwrap(), &[]);
        let cluster = guest.image.cluster_size();
        let pieces = [(0, 1), (cluster - 1, 2), (5 * cluster + 3, 3 * cluster), (SIZE - 7, 7), (SIZE / 2 + 1, 100)];
        for (i, (at, len)) in pieces.iter().enumerate() {
            guest.write(*at, &vec![i as u8 + 1; *len as usize]).await.unwrap();
        }
        let expected = guest.read_all().await.unwrap();
        for (i, (at, len)) in pieces.iter().enumerate() {
            assert!(expected[*at as usize..(*at + *len) as usize].iter().all(|b| *b == i as u8 + 1 || *at == 0), "{i}");
        }
        assert!(guest.image.is_dirty());
        guest.image.commit().await.unwrap();
        assert!(!guest.image.is_dirty());
        guest.image.close().await.unwrap();
        subject.assert_clean(store.clone()).await;
        let guest = Guest::new(subject.open(store.clone()).await.unwrap(), &[]);
        assert!(guest.read_all().await.unwrap() == expected);
        assert!(!guest.image.info().dirty);
        guest.image.close().await.unwrap();
    });
}

#[test]
fn dropped_reservation_leaves_nothing_behind() {
    each(async |subject, store| {
        let image = subject.open(store.clone()).await.unwrap();
        let before = store.to_vec();
        let kept = image.reserve(range(0, 1), Purpose::Data).await.unwrap();
        let dropped = image.reserve(range(image.cluster_size(), 1), Purpose::Data).await.unwrap();
        let last = image.reserve(range(SIZE - 1, 1), Purpose::Data).await.unwrap();
        drop(dropped);
        drop(kept);
        drop(last);
        assert!(!image.is_dirty());
        let mapped = Guest::new(image.clone(), &[]).mapping(range(0, SIZE)).await.unwrap();
        assert_eq!((mapped.len, mapped.mapping), (SIZE, Mapping::Unallocated));
        image.close().await.unwrap();
        assert!(store.to_vec() == before);
    });
}

#[test]
fn holes_of_dropped_reservations_are_used_again_or_filled_at_the_end() {
    each(async |subject, store| {
        let guest = Guest::new(subject.open(store.clone()).await.unwrap(), &[]);
        let cluster = guest.image.cluster_size();
        let dropped = guest.image.reserve(range(8 * cluster, 3 * cluster), Purpose::Data).await.unwrap();
        guest.write(0, &vec![1; 4 * cluster as usize]).await.unwrap();
        guest.image.commit().await.unwrap();
        let hole = dropped.host().unwrap();
        drop(dropped);
        let again = guest.image.reserve(range(20 * cluster, 1), Purpose::Data).await.unwrap();
        assert_eq!(again.host(), Some(hole), "the hole is used first");
        assert!(!again.zeroed());
        drop(again);
        guest.image.settle().await.unwrap();
        guest.image.close().await.unwrap();
        subject.assert_clean(store.clone()).await;
        let guest = Guest::new(subject.open(store.clone()).await.unwrap(), &[]);
        assert!(guest.read(0, 5 * cluster).await.unwrap().iter().take(4 * cluster as usize).all(|b| *b == 1));
    });
}

#[test]
fn populate_leaves_alone_what_is_allocated_and_what_the_veto_names() {
    each(async |subject, store| {
        let guest = Guest::new(subject.open(store.clone()).await.unwrap(), &vec![9; SIZE as usize]);
        let cluster = guest.image.cluster_size();
        let reservation = guest.image.reserve(range(0, 4 * cluster), Purpose::Data).await.unwrap();
        assert_eq!(reservation.range(), range(0, 4 * cluster));
        guest.write(cluster, &vec![1; cluster as usize]).await.unwrap();
        guest.image.write_zeroes(range(2 * cluster, cluster), true, true).await.unwrap();
        let payload = Iov::from_slice(&vec![9; 4 * cluster as usize]);
        store.write(reservation.host().unwrap(), payload, false).await.unwrap();
        let linked = reservation.link(Keep::Unallocated, |at| at == GuestOffset(3 * cluster));
        assert_eq!((linked.linked, linked.dropped), (cluster, 3 * cluster));
        let mapping = async |n| guest.mapping(range(n * cluster, cluster)).await.unwrap().mapping;
        assert!(matches!(mapping(0).await, Mapping::Data(_)));
        assert_eq!(mapping(2).await == Mapping::Zero, subject.marks_zeros());
        assert_eq!(guest.read(2 * cluster, 1).await.unwrap(), [0]);
        assert_eq!(mapping(3).await, Mapping::Unallocated);
        assert!(guest.read(cluster, 1).await.unwrap() == [1]);
        guest.image.close().await.unwrap();
        subject.assert_clean(store.clone()).await;
    });
}

#[test]
fn zeroes_are_explicit_only_where_something_shows_through() {
    each(async |subject, store| {
        let guest = Guest::new(subject.open(store.clone()).await.unwrap(), &vec![9; SIZE as usize]);
        let cluster = guest.image.cluster_size();
        guest.write(cluster, &vec![1; cluster as usize]).await.unwrap();
        guest.image.write_zeroes(range(0, 3 * cluster), true, true).await.unwrap();
        assert!(guest.read(0, 3 * cluster).await.unwrap().iter().all(|b| *b == 0));
        guest.image.write_zeroes(range(8 * cluster, 2 * cluster), true, false).await.unwrap();
        assert_eq!(guest.mapping(range(8 * cluster, cluster)).await.unwrap().mapping, Mapping::Unallocated);
        guest.image.write_zeroes(range(SIZE - cluster, cluster), false, true).await.unwrap();
        assert!(guest.read(SIZE - cluster, cluster).await.unwrap().iter().all(|b| *b == 0));
        guest.image.close().await.unwrap();
        subject.assert_clean(store.clone()).await;
        let guest = Guest::new(subject.open(store.clone()).await.unwrap(), &vec![9; SIZE as usize]);
        assert!(guest.read(0, 3 * cluster).await.unwrap().iter().all(|b| *b == 0));
        assert_eq!(guest.read(3 * cluster, 1).await.unwrap(), [9]);
    });
}

#[test]
fn whole_disk_of_zeroes_over_a_backing_file() {
    each(async |subject, store| {
        let guest = Guest::new(subject.open(store.clone()).await.unwrap(), &vec![9; SIZE as usize]);
        guest.image.write_zeroes(range(0, SIZE), true, true).await.unwrap();
        let mapped = guest.mapping(range(0, SIZE)).await.unwrap();
        assert_eq!(mapped.mapping == Mapping::Zero, subject.marks_zeros());
        assert!(guest.read_all().await.unwrap().iter().all(|b| *b == 0));
        guest.image.close().await.unwrap();
        subject.assert_clean(store.clone()).await;
    });
}

#[test]
fn lookup_runs_over_slices_and_stops_where_the_mapping_changes() {
    each(async |subject, store| {
        let guest = Guest::new(subject.open(store.clone()).await.unwrap(), &[]);
        let cluster = guest.image.cluster_size();
        let len = 1100 * cluster.min(16384);
        guest.write(0, &vec![3; len as usize]).await.unwrap();
        let mut at = 0;
        let mut runs = 0;
        while at < len {
            let mapped = guest.mapping(range(at, SIZE - at)).await.unwrap();
            assert!(matches!(mapped.mapping, Mapping::Data(_)));
            at += mapped.len;
            runs += 1;
        }
        // New tables lie between the data of small clusters.
        let tables = len / (cluster * cluster.min(4096) / 8);
        assert!(runs <= 4 + tables, "{}: {runs} runs", subject.name);
        assert_eq!(at, len.next_multiple_of(cluster));
        guest.image.close().await.unwrap();
        subject.assert_clean(store.clone()).await;
    });
}

#[test]
fn growing_shows_zeros_and_what_was_there() {
    each(async |subject, store| {
        let guest = Guest::new(subject.open(store.clone()).await.unwrap(), &[]);
        guest.write(SIZE - 10, &[5; 10]).await.unwrap();
        let grown = 20 * SIZE + 512;
        guest.image.resize(grown).await.unwrap();
        assert_eq!(guest.image.size(), grown);
        assert_eq!(guest.read(SIZE - 10, 20).await.unwrap(), [[5; 10], [0; 10]].concat());
        guest.write(grown - 512, &[6; 512]).await.unwrap();
        guest.image.close().await.unwrap();
        subject.assert_clean(store.clone()).await;
        let guest = Guest::new(subject.open(store.clone()).await.unwrap(), &[]);
        assert_eq!(guest.image.size(), grown);
        assert_eq!(guest.read(grown - 512, 512).await.unwrap(), [6; 512]);
        for (size, kind) in [
            (grown - 512, ErrorKind::InvalidArgument),
            (grown + 1, ErrorKind::InvalidArgument),
            (1 << 63, ErrorKind::InvalidArgument),
        ] {
            if size < grown && subject.may_shrink() {
                continue;
            }
            assert_eq!(guest.image.resize(size).await.unwrap_err().kind(), kind);
        }
        assert_eq!(guest.image.size(), grown);
    });
}

/// What lay behind a smaller end is gone: growing again shows zeros, and its clusters are free.
#[test]
fn shrinking_gives_back_what_lies_behind() {
    each(async |subject, store| {
        if !subject.may_shrink() {
            return;
        }
        let guest = Guest::new(subject.open(store.clone()).await.unwrap(), &[]);
        let full = 4 << 20;
        guest.write(0, &vec![5; full as usize]).await.unwrap();
        guest.write(SIZE - 4096, &[6; 4096]).await.unwrap();
        let small = full / 3 / 512 * 512;
        guest.image.resize(small).await.unwrap();
        assert_eq!(guest.image.size(), small);
        assert!(guest.read_all().await.unwrap() == vec![5; small as usize]);
        subject.assert_clean(store.clone()).await;
        guest.image.resize(SIZE).await.unwrap();
        let all = guest.read_all().await.unwrap();
        assert!(all[..small as usize].iter().all(|b| *b == 5) && all[small as usize..].iter().all(|b| *b == 0));
        guest.image.empty().await.unwrap();
        assert!(guest.read_all().await.unwrap().iter().all(|b| *b == 0));
        guest.image.close().await.unwrap();
        subject.assert_clean(store.clone()).await;
        assert!(store.size() < SIZE / 2, "{}: {} bytes are left", subject.name, store.size());
    });
}

#[test]
fn backing_reference_is_rewritten_and_dropped() {
    each(async |subject, store| {
        let long = "l".repeat(1023);
        let names = ["a.img", "somewhat-longer.img", long.as_str(), "b", &"m".repeat(460), &"k".repeat(1000), "short"];
        for (i, name) in names.iter().enumerate().filter(|(_, name)| name.len() <= subject.longest_name()) {
            let image = subject.open(store.clone()).await.unwrap();
            let format = (i % 2 == 0).then_some(image::Format::Raw);
            let backing = BackingRef { name: (*name).to_owned(), format };
            image.set_backing(Some(backing.clone())).await.unwrap();
            assert_eq!(image.backing(), Some(backing.clone()));
            image.close().await.unwrap();
            let image = subject.open(store.clone()).await.unwrap();
            assert_eq!(image.backing(), Some(backing));
            image.close().await.unwrap();
        }
        let image = subject.open(store.clone()).await.unwrap();
        let too_long = BackingRef { name: "x".repeat(1024), format: None };
        assert_eq!(image.set_backing(Some(too_long)).await.unwrap_err().kind(), ErrorKind::InvalidArgument);
        image.set_backing(None).await.unwrap();
        image.close().await.unwrap();
        assert_eq!(subject.open(store.clone()).await.unwrap().backing(), None);
        subject.assert_clean(store.clone()).await;
    });
}

#[test]
fn ranges_outside_are_refused() {
    each(async |subject, store| {
        let image = subject.open(store).await.unwrap();
        for bad in [range(SIZE, 1), range(0, SIZE + 1), range(0, 0), range(u64::MAX - 1, 1)] {
            assert_eq!(image.lookup(bad).unwrap_err().kind(), ErrorKind::InvalidArgument);
            assert_eq!(image.load(bad).await.unwrap_err().kind(), ErrorKind::InvalidArgument);
        }
        for bad in [range(SIZE, 1), range(0, 0), range(SIZE + image.cluster_size(), 1)] {
            assert!(image.reserve(bad, Purpose::Data).await.is_err(), "{bad}");
            assert!(image.write_zeroes(bad, true, true).await.is_err(), "{bad}");
        }
        assert!(image.write_zeroes(range(1, image.cluster_size()), true, true).await.is_err());
    });
}

#[test]
fn read_only_reads_and_accepts_flushes() {
    each(async |subject, store| {
        let guest = Guest::new(subject.open(store.clone()).await.unwrap(), &[]);
        guest.write(4097, &[1; 100]).await.unwrap();
        guest.image.close().await.unwrap();
        let before = store.to_vec();
        let options = OpenOptions { read_only: true, for_check: false };
        let image = image::open(store.read_only(), subject.format, options).await.unwrap();
        let guest = Guest::new(image.clone(), &[]);
        assert_eq!(guest.read(4097, 100).await.unwrap(), [1; 100]);
        image.commit().await.unwrap();
        image.settle().await.unwrap();
        assert_eq!(image.reserve(range(0, 1), Purpose::Data).await.err().unwrap().kind(), ErrorKind::ReadOnly);
        assert_eq!(image.write_zeroes(range(0, 65536), true, true).await.unwrap_err().kind(), ErrorKind::ReadOnly);
        assert_eq!(image.set_backing(None).await.unwrap_err().kind(), ErrorKind::ReadOnly);
        assert_eq!(image.resize(SIZE * 2).await.unwrap_err().kind(), ErrorKind::ReadOnly);
        image.close().await.unwrap();
        assert!(store.to_vec() == before);
        let refused = image::open(store.read_only(), subject.format, OpenOptions::default()).await.err().unwrap();
        assert_eq!(refused.kind(), ErrorKind::ReadOnly);
    });
}

#[test]
fn many_tasks_allocate_at_once() {
    for subject in subjects() {
        for seed in 0..20 {
            Sim::new(seed).block_on(async {
                let store = MemoryStore::new("test.img", 0);
                subject.create(store.clone(), SIZE, None).await;
                let guest = Guest::new(subject.open(store.clone()).await.unwrap(), &[]);
                let cluster = guest.image.cluster_size();
                let tasks: Vec<_> = (0..32u64)
                    .map(|n| {
                        let guest = guest.clone();
                        ring::spawn(async move {
                            let at = n * 7 % 32 * (SIZE / 32);
                            guest.write(at + n, &vec![n as u8 + 1; cluster as usize]).await.unwrap();
                            if n % 3 == 0 {
                                guest.image.commit().await.unwrap();
                            }
                            if n % 5 == 0 {
                                guest.image.settle().await.unwrap();
                            }
                        })
                    })
                    .collect();
                for task in tasks {
                    task.await;
                }
                guest.image.close().await.unwrap();
                subject.assert_clean(store.clone()).await;
                let guest = Guest::new(subject.open(store).await.unwrap(), &[]);
                for n in 0..32u64 {
                    let at = n * 7 % 32 * (SIZE / 32);
                    assert!(
                        guest.read(at + n, cluster).await.unwrap().iter().all(|b| *b == n as u8 + 1),
                        "{n} seed {seed}"
                    );
                }
            });
        }
    }
}
