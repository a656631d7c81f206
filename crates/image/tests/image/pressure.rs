//! Little memory, little space, odd stores.

use crate::guest::Guest;
use crate::subject::{Subject, subjects};
use image::{Format, Keep, OpenOptions, Purpose};
use layout::{GuestOffset, GuestRange};
use ring::sim::Sim;
use store::memory::MemoryStore;
use store::{Limits, Store};

fn qed() -> Vec<Subject> {
    subjects().into_iter().filter(|s| s.format == Format::Qed).collect()
}

/// More slices are touched than fit, by many tasks at once: they wait, commits make room, nothing fails.
#[test]
fn a_crowded_table_cache_makes_tasks_wait_not_fail() {
    for subject in qed() {
        Sim::new(3).block_on(async {
            let store = MemoryStore::new("test.img", 0);
            let size = 900 << 20;
            subject.create(store.clone(), size, None).await;
            // Four slices.
            let image =
                image::qed::open_with_table_memory(store.clone(), OpenOptions::default(), 4 * 4096).await.unwrap();
            let guest = Guest::new(image.clone(), &[]);
            let reach = 512 * image.cluster_size();
            let count = size.div_ceil(reach).min(64);
            let tasks: Vec<_> = (0..count)
                .map(|n| {
                    let guest = guest.clone();
                    ring::spawn(async move { guest.write(n * reach + n, &[n as u8 + 1; 3]).await.unwrap() })
                })
                .collect();
            for task in tasks {
                task.await;
            }
            for n in 0..count {
                assert_eq!(guest.read(n * reach + n, 3).await.unwrap(), [n as u8 + 1; 3]);
            }
            image.close().await.unwrap();
            subject.assert_clean(store).await;
        });
    }
}

/// Reservations that pin every slice there is room for: the next one waits until one of them ends.
#[test]
fn a_cache_full_of_pins_makes_the_next_reservation_wait() {
    let subject = qed().swap_remove(0);
    Sim::new(3).block_on(async {
        let store = MemoryStore::new("test.img", 0);
        subject.create(store.clone(), 900 << 20, None).await;
        let image = image::qed::open_with_table_memory(store.clone(), OpenOptions::default(), 4 * 4096).await.unwrap();
        let reach = 512 * image.cluster_size();
        let byte = move |n: u64| GuestRange::new(GuestOffset(n * reach), 1);
        let mut held = Vec::new();
        for n in 0..4 {
            held.push(image.reserve(byte(n), Purpose::Data).await.unwrap());
        }
        let fifth = {
            let image = image.clone();
            ring::spawn(async move { image.reserve(byte(4), Purpose::Data).await.map(drop) })
        };
        for _ in 0..100 {
            ring::yield_now().await;
        }
        assert!(!fifth.is_finished());
        drop(held.pop());
        fifth.await.unwrap();
        drop(held);
        image.close().await.unwrap();
        subject.assert_clean(store).await;
    });
}

/// A block device: no growing, and only a look at the tables tells what is free.
#[test]
fn an_image_on_a_device_finds_its_free_space_and_ends_cleanly_when_it_is_used_up() {
    for subject in qed() {
        Sim::new(5).block_on(async {
            let memory = MemoryStore::new("device", 6 << 20);
            memory.write(layout::HostOffset(0), ring::Iov::from_slice(&vec![0xee; 6 << 20]), false).await.unwrap();
            let limits = Limits { fixed_size: true, sparse: false, ..memory.limits() };
            let store = memory.with_limits(limits);
            subject.create(store.clone(), 64 << 20, None).await;
            let mut written = 0u64;
            for _ in 0..3 {
                let guest = Guest::new(subject.open(store.clone()).await.unwrap(), &[]);
                let cluster = guest.image.cluster_size();
                for n in 0..20 {
                    guest.write(written * cluster, &vec![n as u8 + 1; cluster as usize]).await.unwrap();
                    written += 1;
                }
                let all = guest.read(0, (written + 1) * cluster).await.unwrap();
                for n in 0..written {
                    assert_eq!(all[(n * cluster) as usize], (n % 20) as u8 + 1);
                }
                assert!(all[(written * cluster) as usize..].iter().all(|b| *b == 0), "old bytes of the device show");
                guest.image.close().await.unwrap();
            }
            let guest = Guest::new(subject.open(store.clone()).await.unwrap(), &[]);
            let cluster = guest.image.cluster_size();
            let mut at = written * cluster;
            let error = loop {
                match guest.write(at, &vec![7; cluster as usize]).await {
                    Ok(()) => at += cluster,
                    Err(error) => break error,
                }
            };
            assert!(error.is_no_space(), "{error}");
            assert!(guest.image.poisoned().is_none());
            assert!(guest.read(written * cluster, at - written * cluster).await.unwrap().iter().all(|b| *b == 7));
            guest.image.close().await.unwrap();
            subject.assert_clean(store).await;
        });
    }
}

/// Tables of 1 GiB cost what is touched of them.
#[test]
fn the_largest_geometry_stays_small() {
    let subject = Subject {
        name: "qed 64M/16",
        format: Format::Qed,
        cluster_size: Some(64 << 20),
        table_size: Some(16),
        qcow2: image::qcow2::Options::default(),
    };
    Sim::new(5).block_on(async {
        let store = MemoryStore::new("huge.img", 0);
        subject.create(store.clone(), 1 << 62, None).await;
        let image = subject.open(store.clone()).await.unwrap();
        for at in [0, 1 << 40, (1 << 62) - 1] {
            let reservation = image.reserve(GuestRange::new(GuestOffset(at), 1), Purpose::Data).await.unwrap();
            assert!(reservation.zeroed());
            let linked = reservation.link(Keep::New, |_| false);
            assert_eq!(linked.linked, 64 << 20);
        }
        image.commit().await.unwrap();
        let guest = Guest::new(image.clone(), &[]);
        assert!(matches!(
            guest.mapping(GuestRange::new(GuestOffset((1 << 62) - 1), 1)).await.unwrap().mapping,
            image::Mapping::Data(_)
        ));
        image.close().await.unwrap();
        subject.assert_clean(store.clone()).await;
        assert!(store.peek().held() < 1 << 20, "{} bytes held", store.peek().held());
    });
}

/// The same in the middle of a slice's worth of tasks: those that come for one new table make one table.
#[test]
fn one_table_is_made_however_many_ask_for_it() {
    for subject in qed() {
        for seed in 0..10 {
            Sim::new(seed).block_on(async {
                let store = MemoryStore::new("test.img", 0);
                subject.create(store.clone(), 4 << 20, None).await;
                let image = subject.open(store.clone()).await.unwrap();
                let cluster = image.cluster_size();
                let tasks: Vec<_> = (0..16)
                    .map(|n| {
                        let image = image.clone();
                        ring::spawn(async move {
                            let range = GuestRange::new(GuestOffset(n * cluster), 1);
                            let reservation = image.reserve(range, Purpose::Data).await.unwrap();
                            ring::yield_now().await;
                            if n % 2 == 0 { reservation.link(Keep::New, |_| false).linked } else { 0 }
                        })
                    })
                    .collect();
                for task in tasks {
                    task.await;
                }
                image.close().await.unwrap();
                subject.assert_clean(store.clone()).await;
                let table = u64::from(subject.table_size.unwrap()) * cluster;
                assert_eq!(store.size(), cluster + 2 * table + 8 * cluster);
            });
        }
    }
}
